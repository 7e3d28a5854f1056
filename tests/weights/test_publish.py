"""What is published is complete, can be checked, and survives kills and rivals."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
from contextlib import suppress

import pytest
import typer
from files import leftovers
from forks import run_python
from kill import ENDINGS, KINDS, PROCESSES, convert_slowly, end_at_random, write_sources
from pairs import random_gpt2, random_pair
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.cli.app import app as cli
from hf_gpt_scratch.cli.verify_receipt_command import verify_receipt_command
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.weights import convert as conversion
from hf_gpt_scratch.weights import publish as publish_module
from hf_gpt_scratch.weights.convert import (
    RECEIPT,
    export_checkpoint,
    gpt2_to_scratch,
    import_checkpoint,
    verify_receipt,
)
from hf_gpt_scratch.weights.formats import write
from hf_gpt_scratch.weights.publish import atomic_directory, new_receipt, seal

pytestmark = pytest.mark.slow


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
    "extra below": (lambda d: ((d / "sub").mkdir(), (d / "sub/a").touch()), r"\(extra: 'sub/', 'sub/a'\)"),
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
    "receipt is no JSON": (lambda d: (d / RECEIPT).write_text("{"), r"not valid JSON"),
    "link to a folder": (lambda d: (d / "code").symlink_to(d.parent), r"\(extra: 'code'\)"),
    "link to nothing": (lambda d: (d / "code.py").symlink_to("nowhere"), r"\(extra: 'code\.py'\)"),
    "link to itself": (lambda d: (d / "loop").symlink_to("loop"), r"\(extra: 'loop'\)"),
    "empty folder": (lambda d: (d / "empty").mkdir(), r"\(extra: 'empty/'\)"),
    "hidden": (lambda d: (d / ".hidden").touch(), r"\(extra: '\.hidden'\)"),
    "compiled code": (lambda d: (d / "__pycache__").mkdir(), r"\(extra: '__pycache__/'\)"),
    "extra pipe": (lambda d: os.mkfifo(d / "pipe"), r"\(extra: 'pipe'\)"),
    "link in a file's place": (
        lambda d: ((d / SHARD).rename(d.parent / SHARD), (d / SHARD).symlink_to(d.parent / SHARD)),
        rf"\(changed: '{SHARD}'\)",
    ),
    "folder in a file's place": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()),
        rf"missing: '{SHARD}'; extra: '{SHARD}/'",
    ),
    "more than fit in a line": (
        lambda d: [(d / f"{number:0200}").touch() for number in range(1000)],
        r"\(extra: .{1000,1100} and 995 more\)",
    ),
    "receipt is a link": (
        lambda d: ((d / RECEIPT).rename(d / "other"), (d / RECEIPT).symlink_to("other")),
        r"has no conversion_receipt\.json",
    ),
    "receipt is a list": (lambda d: (d / RECEIPT).write_text("[]"), r"not a valid receipt.* it is a list"),
}
WRONG_RECEIPTS = {
    "nothing converted": (lambda r: r.pop("target"), "'target' is None"),
    "no files": (lambda r: r["target"].pop("files"), r"'target' is \{\}"),
    "files in a list": (lambda r: r["target"].update(files=["a"]), r"'target' is .* must have 'files'"),
    "no what": (lambda r: r.pop("what"), "'what' is None, but must be a string"),
    "number for a date": (lambda r: r.update(created=20261127), "'created' is 20261127, but must be a string"),
    "no date": (lambda r: r.update(created="yesterday"), "'created' is 'yesterday', but must be a date"),
    "parity in words": (lambda r: r.update(parity="good"), "'parity' is 'good'"),
    "short sha256": (
        lambda r: r["target"]["files"][SHARD].update(sha256="ab"),
        "the sha256 of .* is 'ab', but must be 64",
    ),
    "number for a sha256": (lambda r: r["target"]["files"][SHARD].update(sha256=1), "the sha256 of .* is 1, but"),
    "text for a size": (lambda r: r["target"]["files"][SHARD].update(bytes="7"), "the bytes of .* are '7', but"),
    "size below zero": (lambda r: r["target"]["files"][SHARD].update(bytes=-1), "the bytes of .* are -1, but"),
    "no size": (lambda r: r["target"]["files"][SHARD].pop("bytes"), "the bytes of .* are None, but"),
    "figures in a list": (lambda r: r["target"]["files"].update({SHARD: []}), "the sha256 of .* is None"),
    **{
        f"file named {name!r}": (
            lambda r, name=name: r["target"]["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}),
            "it names the file .* must be inside its own directory",
        )
        for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\0b", "a\\b", RECEIPT)
    },
}


def test_untouched_directory_is_as_its_receipt_says(copy):
    assert SHARD in verify_receipt(copy)["target"]["files"]


@pytest.mark.parametrize("case", CHANGED)
def test_every_change_is_named(copy, case):
    change, told = CHANGED[case]
    change(copy)
    with pytest.raises(ConversionError, match=told):
        verify_receipt(copy)


@pytest.mark.parametrize("case", WRONG_RECEIPTS)
def test_receipt_that_no_conversion_writes_is_told_in_one_line(copy, case):
    change, told = WRONG_RECEIPTS[case]
    edit_receipt(change)(copy)
    with pytest.raises(ConversionError, match=rf"is not a valid receipt: {told}") as error:
        verify_receipt(copy)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_command_exits_with_a_status_and_a_reason(copy):
    app = typer.Typer()
    app.command()(verify_receipt_command)
    done = CliRunner().invoke(app, [str(copy)])
    assert done.exit_code == 0
    assert "Unchanged:" in done.output
    flip(copy / SHARD)
    done = CliRunner().invoke(app, [str(copy)])
    assert done.exit_code == 1
    assert f"changed: '{SHARD}'" in done.output
    for path in ("~nosuchuser/x", "x" * 5000, str(copy / SHARD)):
        done = CliRunner().invoke(app, [path])
        assert (done.exit_code, type(done.exception)) == (1, SystemExit)
        assert "Changed:" in done.output
        assert len(done.output) < 1000


def publish(target, name, overwrite=False):
    """A target with one file of that name, and its receipt."""
    with atomic_directory(target, overwrite) as staging:
        (staging / name).write_text(name)
        seal(staging, new_receipt("nothing"), {})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "portable"])
def exchange(request, monkeypatch):
    """Whether the system can exchange two directories in one step."""
    if not request.param:
        monkeypatch.setattr(publish_module, "_rename2", lambda *arguments: False)
    return request.param


# Nothing is deleted that no conversion has written


@pytest.mark.parametrize("case", [case for case in CHANGED if not case.startswith("receipt is no")])
def test_overwrite_replaces_only_what_is_as_its_receipt_says(copy, case):
    change, _ = CHANGED[case]
    change(copy)
    before = publish_module._entries(copy)
    with pytest.raises(ConversionError, match=r"--overwrite does not replace it|not a valid receipt"):
        publish(copy, "new", overwrite=True)
    assert publish_module._entries(copy) == before
    assert leftovers(copy) == []


def test_an_empty_target_needs_no_overwrite(tmp_path, exchange):
    target = tmp_path / "target"
    target.mkdir()
    publish(target, "new")
    assert names(target) == [RECEIPT, "new"]
    publish(target, "newer", overwrite=True)
    assert names(target) == [RECEIPT, "newer"]
    assert verify_receipt(target)
    assert leftovers(target) == []


@pytest.mark.parametrize("what", ["directory", "file", "link"])
def test_what_appears_under_the_targets_name_meanwhile_is_left_alone(tmp_path, exchange, what):
    target = tmp_path / "target"
    with pytest.raises(ConversionError, match="another program has created"), atomic_directory(target) as staging:
        (staging / "new").touch()
        if what == "directory":
            target.mkdir()
            (target / "precious").touch()
        elif what == "file":
            target.write_text("precious")
        else:
            target.symlink_to("precious")
    found = names(target) if what == "directory" else target.read_text() if what == "file" else os.readlink(target)
    assert found in (["precious"], "precious")
    assert names(tmp_path) == ["target"]


def test_an_empty_directory_that_appears_meanwhile_is_left_alone(tmp_path):
    """Only where the system can rename without replacing."""
    with pytest.raises(ConversionError, match="another program has created"), atomic_directory(tmp_path / "target"):
        (tmp_path / "target").mkdir()
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("what", ["another file", "another content"])
def test_old_target_that_changes_meanwhile_is_left_alone(tmp_path, exchange, what):
    target = tmp_path / "target"
    publish(target, "old")
    with (
        pytest.raises(ConversionError, match="another program has changed"),
        atomic_directory(target, overwrite=True) as staging,
    ):
        (staging / "new").touch()
        (target / ("precious" if what == "another file" else "old")).write_text("precious")
    assert "precious" in [path.read_text() for path in target.iterdir()]
    assert names(tmp_path) == ["target"]


def test_replaced_target_keeps_its_permissions(tmp_path, exchange):
    target = tmp_path / "target"
    publish(target, "old")
    target.chmod(0o700)
    publish(target, "new", overwrite=True)
    assert target.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def family(tmp_path):
    """A source within a directory with something else."""
    source = tmp_path / "family" / "source"
    random_gpt2().save_pretrained(source)
    (source.parent / "precious").touch()
    return source.parent


def overlapping(family):
    source = family / "source"
    link = family.parent / "link"
    link.symlink_to(family)
    hidden_source = shutil.copytree(source, hidden(family / "new", "incomplete"))
    return {
        "the source": (source, source),
        "its parent": (source, family),
        "its grandparent": (source, family.parent),
        "below it": (source, source / "target"),
        "by a link": (source, link),
        "by the source's link": (link / "source", family),
        "by a detour": (source, source / ".." / "new" / ".." / "source"),
        "below, by a link": (source, link / "source" / "target"),
        "what a run would clear away": (hidden_source, family / "new"),
        "the file's directory": (source / "model.pth", source),
        "above the file": (source / "model.pth", family),
    }


OVERLAPS = [
    "the source",
    "its parent",
    "its grandparent",
    "below it",
    "by a link",
    "by the source's link",
    "by a detour",
    "below, by a link",
    "what a run would clear away",
    "the file's directory",
    "above the file",
]


@pytest.mark.parametrize("case", OVERLAPS)
def test_target_that_is_holds_or_lies_in_the_source_is_refused(family, case):
    source, target = overlapping(family)[case]
    model = GPTScratchForCausalLM.from_pretrained(family / "source")
    write(model, model.config, family / "source" / "model.pth", "book")
    before = publish_module._entries(family)
    with pytest.raises(ConversionError, match=r"is or contains the source|is inside the source"):
        import_checkpoint(source, target, n_heads=4 if source.suffix else None, check=False, overwrite=True)
    assert publish_module._entries(family) == before


@pytest.mark.parametrize("format", ["gpt2", "book", "nanogpt", "gguf"])
def test_no_export_goes_over_or_into_its_source(copy, format):
    before = publish_module._entries(copy.parent)
    for target in (copy, copy.parent, copy / "target"):
        with pytest.raises(ConversionError, match=r"is or contains the source|is inside the source"):
            export_checkpoint(copy, target, format, overwrite=True)
    assert publish_module._entries(copy.parent) == before


def test_a_new_name_in_the_source_takes_nothing_from_it(copy):
    before = publish_module._entries(copy)
    export_checkpoint(copy, copy / "target", "gpt2")
    assert {name: entry for name, entry in publish_module._entries(copy).items() if "target" not in str(name)} == before
    with pytest.raises(ConversionError, match=r"is or contains the source|is inside the source"):
        export_checkpoint(copy, copy / "target", "gpt2")


def test_files_that_a_source_links_to_are_part_of_it(copy, tmp_path):
    """As in the hub's cache, whose snapshots link to their blobs."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    copy.rename(tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(ConversionError, match="is or contains the source"):
        export_checkpoint(snapshot, tmp_path / "blobs", "gpt2", overwrite=True)


# Targets that cannot be


def bad_targets(place):
    (place / "file").touch()
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere")
    (place / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(place / "pipe")
    return {
        "empty": "",
        "the root": "/",
        "the working directory": ".",
        "of no user": "~nosuchuser/target",
        "a file": place / "file",
        "a pipe": place / "pipe",
        "below a file": place / "file" / "target",
        "far below a file": place / "file" / "a" / "b",
        "a link to itself": place / "loop",
        "below a link to itself": place / "loop" / "target",
        "a link to nothing": place / "dangling",
        "too long": place / ("x" * 300),
        "too long for its neighbours": place / "new" / ("x" * 250),
        "far too long": place / "/".join(["x" * 200] * 50),
        "a null character": "a\0b",
    }


BAD_TARGETS = [
    "empty",
    "the root",
    "the working directory",
    "of no user",
    "a file",
    "a pipe",
    "below a file",
    "far below a file",
    "a link to itself",
    "below a link to itself",
    "a link to nothing",
    "too long",
    "too long for its neighbours",
    "far too long",
    "a null character",
]


@pytest.mark.parametrize("case", BAD_TARGETS)
@pytest.mark.parametrize("command", ["convert", "export", "export book"])
def test_target_that_cannot_be_is_told_and_nothing_is_written(converted, tmp_path, monkeypatch, case, command):
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    target = bad_targets(tmp_path)[case]
    before = publish_module._entries(tmp_path)
    command, *format = command.split()
    source = converted.parent / "source" if command == "convert" else converted
    arguments = [command, str(source), str(target), "--overwrite", *(["--format", *format] if format else [])]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert re.search(r"Not converted: .*(choose|give|write|correct|free)", done.output, re.DOTALL)
    assert len(done.output) < 2000
    assert publish_module._entries(tmp_path) == before


@pytest.mark.parametrize("command", [["convert"], ["export"], ["export", "--format", "book"]])
@pytest.mark.parametrize("source", ["", "~nosuchuser/x", "x" * 5000, "a\0b"])
def test_source_that_cannot_be_is_told(tmp_path, command, source):
    done = CliRunner().invoke(cli, [*command, source, str(tmp_path / "target")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.exception
    assert re.search(r"Not converted: .*(give|write|correct)", done.output, re.DOTALL)
    assert len(done.output) < 1000
    assert names(tmp_path) == []


def test_no_permission_is_told(converted, tmp_path, monkeypatch):
    def refused(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "mkdir", refused)
    with pytest.raises(ConversionError, match=r"failed while writing the target: .*Permission denied.*permissions"):
        gpt2_to_scratch(converted.parent / "source", tmp_path / "a" / "target")


IMPORT_ALL = """
import importlib, pkgutil, sys
import psutil  # on Linux it needs resource itself
sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource"]))
import hf_gpt_scratch, hf_gpt_scratch_command
for module in pkgutil.walk_packages(hf_gpt_scratch.__path__, "hf_gpt_scratch."):
    # The imports of vLLM and TransformerLens alone import these.
    if module.name not in ("hf_gpt_scratch.vllm_model", "hf_gpt_scratch.transformer_lens_rows"):
        importlib.import_module(module.name)
"""


def test_no_module_needs_what_windows_does_not_have():
    done = run_python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("system", "flag"), [("win32", os.O_RDWR), ("darwin", os.O_RDONLY), ("linux", os.O_RDONLY)])
def test_files_are_opened_so_that_they_can_be_flushed(tmp_path, monkeypatch, system, flag):
    (tmp_path / "file").touch()
    opened, usual = [], os.open
    monkeypatch.setattr(publish_module.sys, "platform", system)
    monkeypatch.setattr(publish_module.os, "open", lambda path, flags: opened.append(flags) or usual(path, flags))
    publish_module._fsync(tmp_path / "file")
    assert opened == [flag]


def test_parents_that_were_made_for_nothing_are_removed(converted, tmp_path):
    with pytest.raises(ConversionError, match="max_shard_size"):
        gpt2_to_scratch(converted.parent / "source", tmp_path / "a" / "b" / "target", max_shard_size="much")
    assert names(tmp_path) == []


# What a receipt says of the source


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_source_that_changes_while_it_is_read_is_not_published(tmp_path, monkeypatch, name, how):
    source, target = tmp_path / "source", tmp_path / "target"
    random_gpt2().save_pretrained(source)
    verify_weights = conversion.verify_weights

    def meanwhile(*arguments):
        verify_weights(*arguments)
        data = (source / name).read_bytes()
        if how == "replaced":
            (source / name).unlink()
        (source / name).write_bytes(data)

    monkeypatch.setattr(conversion, "verify_weights", meanwhile)
    with pytest.raises(ConversionError, match=rf"{name} has changed while it was read"):
        gpt2_to_scratch(source, target, check="weights")
    assert names(tmp_path) == ["source"]


def test_file_that_changes_while_it_is_read_is_not_published(tmp_path, monkeypatch):
    model = random_pair()[1]
    write(model, model.config, tmp_path / "model.pth", "book")
    monkeypatch.setattr(conversion, "_verify", lambda *arguments: os.utime(tmp_path / "model.pth"))
    with pytest.raises(ConversionError, match=r"model\.pth has changed while it was read"):
        import_checkpoint(tmp_path / "model.pth", tmp_path / "target", n_heads=4)
    assert names(tmp_path) == ["model.pth"]


def test_receipt_names_the_version_that_converted(converted):
    versions = verify_receipt(converted)["versions"]
    assert versions["hf_gpt_scratch"] == importlib.metadata.version("hf-gpt-scratch")
    assert versions.keys() == {"hf_gpt_scratch", "torch", "transformers", "python"}


# Kills and rivals


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


# One for each format that is written; `python tests/helpers/kill.py` has all twelve kinds.
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.endswith(("ours, in shards", "to official")) or "export" in kind]
)
@pytest.mark.long
def test_however_a_conversion_ends_its_target_is_absent_or_complete(sources, tmp_path, kind):
    found = end_at_random(sources, tmp_path, kind, times=len(ENDINGS), seed=len(kind))
    assert sum(found[ending] for ending in ("SIGKILL", "SIGTERM", "SIGINT", "full disk")) >= 1


def hidden(target, what):
    return target.with_name(f".{target.name}.hf_gpt_scratch.{what}")


def test_what_a_killed_run_left_is_cleared_and_the_old_target_put_back(tmp_path):
    """The kill came between the two renames of a system that cannot exchange; whoever wrote the old target."""
    target = tmp_path / "target"
    hidden(target, "lock").touch()
    for what in ("incomplete", "replaced"):
        hidden(target, what).mkdir()
        (hidden(target, what) / what).touch()
    neighbour = hidden(tmp_path / "targets", "incomplete")
    neighbour.mkdir()
    with pytest.raises(ConversionError, match="exists already"), atomic_directory(target):
        pass
    assert names(target) == ["replaced"]
    assert names(tmp_path) == [neighbour.name, "target"]


@pytest.mark.parametrize("what", ["incomplete", "replaced"])
def test_what_a_run_killed_after_the_exchange_left_is_cleared_by_its_receipt(tmp_path, what):
    target = tmp_path / "target"
    publish(target, "new")
    publish(tmp_path / "old", "old")
    (tmp_path / "old").rename(hidden(target, what))
    (hidden(target, what) / "precious").touch()
    with pytest.raises(ConversionError, match=r"holds 'precious', which no conversion has written.*move that away"):
        publish(target, "newer", overwrite=True)
    assert names(hidden(target, what)) == [RECEIPT, "precious"]
    (hidden(target, what) / "precious").unlink()
    publish(target, "newer", overwrite=True)
    assert names(target) == [RECEIPT, "newer"]
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("what", ["incomplete", "replaced"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_no_run_has_left_is_not_cleared(tmp_path, what, kind):
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    if kind == "link":
        hidden(target, what).symlink_to(tmp_path / "elsewhere")
    else:
        hidden(target, what).write_text("precious")
    with pytest.raises(ConversionError, match="is in the way"):
        publish(target, "new")
    assert os.path.lexists(hidden(target, what))
    assert names(tmp_path / "elsewhere") == ["precious"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("step", range(14))
def test_interruption_between_any_two_steps_of_publishing(tmp_path, monkeypatch, exchange, number, old, step):
    """The old target or the new one is there, whole, and nothing else is."""
    target = tmp_path / "target"
    if old:
        publish(target, "old")
    calls = iter(range(100))

    def interrupted(function):
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            if next(calls) == step:
                signal.raise_signal(number)
            return result

        return wrapper

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(type(tmp_path), name, interrupted(getattr(type(tmp_path), name)))
    for name in ("_rename2", "_fsync", "_acquire", "_release"):
        monkeypatch.setattr(publish_module, name, interrupted(getattr(publish_module, name)))
    usual = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) if step < 8 else suppress(KeyboardInterrupt):
            publish(target, "new", overwrite=True)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, usual)
    monkeypatch.undo()
    assert names(tmp_path) in ([], ["target"])
    if target.exists():
        verify_receipt(target)
        assert names(target)[1] in (("old", "new") if old else ("new",))
    else:
        assert not old


def test_failed_swap_puts_the_old_target_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    publish(target, "old")
    rename = type(tmp_path).rename

    def fails_once(self, to):
        if self.name.endswith(".incomplete"):
            raise OSError("rename failed")
        return rename(self, to)

    monkeypatch.setattr(publish_module, "_rename2", lambda *arguments: False)
    monkeypatch.setattr(type(tmp_path), "rename", fails_once)
    with pytest.raises(OSError, match="rename failed"):
        publish(target, "new", overwrite=True)
    assert names(target) == [RECEIPT, "old"]
    assert names(tmp_path) == ["target"]


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


def rival(source, target, barrier, results):
    barrier.wait()
    try:
        convert_slowly(gpt2_to_scratch, source, target, 0.002)
        results.put("converted")
    except ConversionError as error:
        results.put(str(error))


@pytest.mark.long
def test_rivals_never_make_a_mixture(tmp_path):
    target = tmp_path / "target"
    barrier, results = PROCESSES.Barrier(2), PROCESSES.Queue()
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
