"""What is published is complete, can be checked, and survives kills and rivals."""

import fcntl
import json
import os
import shutil

import pytest
import typer
from kill import PROCESSES, convert_slowly, kill_at_random
from pairs import random_gpt2
from test_conversion import leftovers
from typer.testing import CliRunner

from hf_gpt_scratch.conversion import RECEIPT, ConversionError, atomic_directory, gpt2_to_scratch, verify_receipt
from hf_gpt_scratch.verify_receipt_command import verify_receipt_command


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted")
    random_gpt2().save_pretrained(directory / "source")
    gpt2_to_scratch(directory / "source", directory / "target", check=False, max_shard_size="190KB")
    return directory / "target"


@pytest.fixture
def copy(converted, tmp_path):
    assert (converted / SHARD).is_file()
    shutil.copytree(converted, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit_receipt(change):
    def edit(directory):
        receipt = json.loads((directory / RECEIPT).read_text())
        change(receipt)
        (directory / RECEIPT).write_text(json.dumps(receipt))

    return edit


SHARD = "model-00002-of-00003.safetensors"
CHANGED = {
    "missing": (lambda d: (d / SHARD).unlink(), rf"\(missing: '{SHARD}'\)"),
    "extra": (lambda d: (d / "new\nline").touch(), r"\(extra: 'new\\nline'\)"),
    "extra below": (lambda d: ((d / "sub").mkdir(), (d / "sub/a").touch()), r"\(extra: 'sub/a'\)"),
    "one bit": (lambda d: flip(d / SHARD), rf"\(changed: '{SHARD}'\)"),
    "longer": (
        lambda d: (d / "config.json").write_text((d / "config.json").read_text() + " "),
        r"\(changed: 'config\.json'\)",
    ),
    "pipe": (lambda d: ((d / SHARD).unlink(), os.mkfifo(d / SHARD)), r"\(changed:"),
    "several": (
        lambda d: ((d / SHARD).rename(d / "other"), flip(d / "config.json")),
        rf"missing: '{SHARD}'; extra: 'other'; changed: 'config\.json'",
    ),
    "no receipt": (lambda d: (d / RECEIPT).unlink(), r"has no conversion_receipt\.json"),
    "receipt is no JSON": (lambda d: (d / RECEIPT).write_text("{"), r"no valid JSON"),
    "receipt is a list": (lambda d: (d / RECEIPT).write_text("[]"), r"no receipt of a conversion"),
    "receipt of nothing": (edit_receipt(lambda r: r.pop("target")), r"no receipt of a conversion"),
    "receipt names a file elsewhere": (
        edit_receipt(lambda r: r["target"]["files"].update({"../x": {"sha256": "", "bytes": 0}})),
        r"\(missing: '\.\./x'\)",
    ),
}


def test_untouched_directory_is_as_its_receipt_says(copy):
    assert SHARD in verify_receipt(copy)["target"]["files"]


@pytest.mark.parametrize("case", CHANGED)
def test_every_change_is_named(copy, case):
    change, told = CHANGED[case]
    change(copy)
    with pytest.raises(ConversionError, match=told):
        verify_receipt(copy)


def test_command_exits_with_a_status_and_a_reason(copy):
    app = typer.Typer()
    app.command()(verify_receipt_command)
    done = CliRunner().invoke(app, [str(copy)])
    assert done.exit_code == 0
    assert "As it was:" in done.output
    flip(copy / SHARD)
    done = CliRunner().invoke(app, [str(copy)])
    assert done.exit_code == 1
    assert f"changed: '{SHARD}'" in done.output


def test_killed_conversions_leave_the_target_absent_or_complete(tmp_path):
    found = kill_at_random(tmp_path, times=5)
    assert found["killed"] >= 3


def hidden(target, what):
    return target.with_name(f".{target.name}.hf_gpt_scratch.{what}")


def test_what_a_killed_run_left_is_cleared_and_the_old_target_put_back(tmp_path):
    """The kill came between the two renames."""
    target = tmp_path / "target"
    hidden(target, "lock").touch()
    for what in ("incomplete", "replaced"):
        hidden(target, what).mkdir()
        (hidden(target, what) / what).touch()
    neighbour = hidden(tmp_path / "targets", "incomplete")
    neighbour.mkdir()
    with pytest.raises(ConversionError, match="exists already"), atomic_directory(target):
        pass
    assert [path.name for path in target.iterdir()] == ["replaced"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [neighbour.name, "target"]


def test_second_conversion_to_a_target_is_told_to_wait(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target) as staging:
        (staging / "mine").touch()
        with pytest.raises(ConversionError, match=r"another process is writing.*wait"), atomic_directory(target):
            pass
        with atomic_directory(tmp_path / "other"):
            pass
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert leftovers(target) == []


def test_lock_that_its_holder_removed_is_taken_anew(tmp_path, monkeypatch):
    """The holder lets go between our opening of the file and our locking of it."""
    target, lock = tmp_path / "target", hidden(tmp_path / "target", "lock")
    flock, calls = fcntl.flock, []

    def removed_first(descriptor, operation):
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with atomic_directory(target):
        assert lock.exists()
    assert len(calls) == 2
    assert target.is_dir()
    assert leftovers(target) == []


def rival(source, target, barrier, results):
    barrier.wait()
    try:
        convert_slowly(source, target, 0.002)
        results.put("converted")
    except ConversionError as error:
        results.put(str(error))


def test_rivals_never_make_a_mixture(tmp_path):
    target = tmp_path / "target"
    barrier, results = PROCESSES.Barrier(2), PROCESSES.Queue()
    PROCESSES.set_forkserver_preload(["hf_gpt_scratch.conversion"])
    rivals = []
    for seed in range(2):
        random_gpt2(seed).save_pretrained(tmp_path / str(seed))
        rivals.append(PROCESSES.Process(target=rival, args=(tmp_path / str(seed), target, barrier, results)))
    for process in rivals:
        process.start()
    told = sorted(results.get(timeout=100) for _ in rivals)
    for process in rivals:
        process.join()
    assert "converted" in told
    assert all(text == "converted" or "another process is writing" in text for text in told)
    verify_receipt(target)
    assert leftovers(target) == []
