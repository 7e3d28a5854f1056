"""Some hundreds of the cases of fuzz.py, and that it would notice what it looks for."""

import time
from pathlib import Path

import pytest
import torch
from fuzz import DAMAGE, Broken, Worker, make_sources, memory, run_case, run_cases

from hf_gpt_scratch import errors
from hf_gpt_scratch.weights import checkpoint, convert, torch_archive
from hf_gpt_scratch.weights.checkpoint import Checkpoint
from hf_gpt_scratch.weights.formats import directory

pytestmark = pytest.mark.slow

CASES = 10 * len(DAMAGE)


@pytest.mark.long
def test_spoiled_checkpoints_are_refused_or_taken_as_they_are(tmp_path):
    outcomes, broken = run_cases(range(CASES), seed=2, place=tmp_path)
    assert broken == []
    assert sum(outcomes.values()) == CASES
    assert {name for name, _, _ in outcomes} == {damage.__name__ for damage, _, _ in DAMAGE}
    assert {command.split()[0] for _, command, _ in outcomes} >= {
        "convert",
        "export",
        "verify",
        "verify-receipt",
        "inspect",
    }
    refused = sum(n for (_, _, outcome), n in outcomes.items() if outcome == "refused")
    assert CASES // 2 < refused < CASES


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    make_sources(directory)
    return directory


def numbers_of(name, count=1000):
    """The cases with that damage."""
    first = next(i for i, (damage, _, _) in enumerate(DAMAGE) if damage.__name__ == name)
    return range(first, count * len(DAMAGE), len(DAMAGE))


def first_broken(sources, place, name):
    for number in numbers_of(name):
        run_case(sources, place, 0, number)


def test_fuzz_notices_a_converter_that_overlooks_damage(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: self.tensors[name].read())
    with pytest.raises(Broken, match=r"not_finite was overlooked|is not finite"):
        first_broken(sources, tmp_path, "not_finite")


def test_fuzz_notices_a_converter_that_changes_a_bit(sources, tmp_path, monkeypatch):
    def wrong(tensor):
        values = read(tensor)
        if values.shape == (8, 32):
            values.view(torch.int32)[0, 0] ^= 1
        return values

    read = torch_archive.Stored.read
    monkeypatch.setattr(torch_archive.Stored, "read", wrong)
    with pytest.raises(Broken, match=r"layers\.[02]\.weight is not what it was"):
        first_broken(sources, tmp_path, "odd_extra_file")


def test_fuzz_notices_code_that_was_run(sources, tmp_path, monkeypatch):
    def load(path):
        torch.load(path, weights_only=False)
        return read(path)

    read = checkpoint.read_pickle
    monkeypatch.setattr(checkpoint, "read_pickle", load)
    seen = []
    for number in numbers_of("hostile", 60):
        try:
            run_case(sources, tmp_path, 0, number)
        except Broken as error:
            seen.append(str(error))
    assert any("left ['exploded'" in text for text in seen)


def test_fuzz_notices_errors_of_another_kind(sources, tmp_path, monkeypatch):
    def crash(*args):
        raise KeyError("x")

    monkeypatch.setattr(directory, "check_files", crash)
    with pytest.raises(Broken, match="KeyError instead of a message"):
        first_broken(sources, tmp_path, "not_finite")


def test_fuzz_notices_long_messages(sources, tmp_path, monkeypatch):
    def refuse(*args):
        raise errors.ConversionError("x")

    monkeypatch.setattr(errors, "shortened", lambda message, length: 3000 * message)
    monkeypatch.setattr(directory, "check_files", refuse)
    with pytest.raises(Broken, match="a message of 30"):
        first_broken(sources, tmp_path, "not_finite")


def test_fuzz_notices_memory():
    with memory(50 << 20, "little"):
        bytearray(10 << 20)
    with pytest.raises(Broken, match=r"much: took \d+ MB, but 50 MB are allowed"), memory(50 << 20, "much"):
        bytearray(800 << 20)


def test_fuzz_notices_what_is_left_behind(sources, tmp_path, monkeypatch):
    def leave(*args, **options):
        (args[1] if len(args) > 1 else options["target"]).mkdir()
        raise errors.ConversionError("a message that is long enough")

    monkeypatch.setattr(convert, "_convert", lambda source, target, *args, **options: leave(source, Path(target)))
    with pytest.raises(Broken, match="exit status 1, but left"):
        first_broken(sources, tmp_path, "odd_gguf")


@pytest.mark.long
def test_a_worker_that_hangs_is_replaced_and_its_case_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.LONGEST_S", 1e-3)
    monkeypatch.setattr(Worker, "begin", begin_and_sleep)
    outcomes, broken = run_cases(range(3), seed=0, place=tmp_path)
    assert outcomes.total() == 3
    assert any("hangs" in line and "--seed 0 --first" in line for line in broken)


def begin_and_sleep(worker, number):
    worker.number, worker.since = number, time.monotonic()
    if number is None:
        worker.connection.send(number)
