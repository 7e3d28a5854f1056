"""Some hundreds of the cases of fuzz.py, and that it would notice what it looks for."""

import pytest
import torch
from fuzz import DAMAGE, Broken, make_sources, run_case, run_cases

from hf_gpt_scratch import conversion
from hf_gpt_scratch.checkpoint import Checkpoint

CASES = 420


def test_spoiled_checkpoints_are_refused_or_converted_as_they_are(tmp_path):
    outcomes, broken = run_cases(range(CASES), seed=1, place=tmp_path)
    assert broken == []
    assert sum(outcomes.values()) == CASES
    assert {name for name, _ in outcomes} == {damage.__name__ for damage, _, _ in DAMAGE}
    refused = sum(n for (_, outcome), n in outcomes.items() if outcome == "refused")
    assert CASES // 2 < refused < CASES


@pytest.fixture
def sources(tmp_path):
    make_sources(tmp_path / "sources")
    return tmp_path / "sources"


def number_of(name):
    return next(i for i, (damage, _, _) in enumerate(DAMAGE) if damage.__name__ == name)


def test_fuzz_notices_a_converter_that_overlooks_damage(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: self.specs[name].file.read(name))
    with pytest.raises(Broken, match="not_finite was overlooked"):
        run_case(sources, tmp_path, 0, number_of("not_finite"))


def test_fuzz_notices_a_converter_that_changes_a_bit(sources, tmp_path, monkeypatch):
    read = Checkpoint.read

    def wrong(self, name):
        tensor = read(self, name)
        if name.endswith("ln_f.bias"):
            tensor.view(torch.int32)[0] ^= 1
        return tensor

    monkeypatch.setattr(Checkpoint, "read", wrong)
    with pytest.raises(Broken, match=r"final_norm\.shift is not what it was"):
        for number in range(number_of("odd_extra_file"), 1000, len(DAMAGE)):
            run_case(sources, tmp_path, 0, number)


def test_fuzz_notices_code_that_was_run(sources, tmp_path, monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    seen = []
    for number in range(number_of("hostile"), 30 * len(DAMAGE), len(DAMAGE)):
        try:
            run_case(sources, tmp_path, 0, number)
        except Broken as error:
            seen.append(str(error))
    assert any("left ['exploded'" in text for text in seen)


def test_fuzz_notices_errors_of_another_kind(sources, tmp_path, monkeypatch):
    def crash(*args):
        raise KeyError("x")

    monkeypatch.setattr(conversion, "check_files", crash)
    with pytest.raises(Broken, match="KeyError instead of ConversionError"):
        run_case(sources, tmp_path, 0, number_of("hostile"))
