"""transformers' pipelines give the same with our model as with the official one."""

from pathlib import Path

import pytest
from pairs import randomize
from transformers import AutoTokenizer, pipeline

from hf_gpt_scratch import (
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
)

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
TEXT = "I had always thought Jack Gisburn rather a cheap genius"
TASKS = {
    "text-generation": (GPTScratchForCausalLM, {"max_new_tokens": 12, "do_sample": False}),
    "feature-extraction": (GPTScratchModel, {}),
    "text-classification": (GPTScratchForSequenceClassification, {"top_k": None}),
    "token-classification": (GPTScratchForTokenClassification, {}),
}


def numbers(result):
    """Every number in a pipeline's answer, and every word."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list):
        return [number for part in result for number in numbers(part)]
    return [result if isinstance(result, (str, int)) else float(result)]


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(task, capsys):
    model_class, settings = TASKS[task]
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    official = model_class.gpt2_class.from_pretrained(TRAINED)
    if "classification" in task:
        randomize(official)
    answers = [
        numbers(pipeline(task, model=model, tokenizer=tokenizer)(TEXT, **settings))
        for model in (official, model_class.from_gpt2(official))
    ]
    assert len(answers[0]) == len(answers[1]) > 0
    for theirs, ours in zip(*answers, strict=True):
        assert ours == (pytest.approx(theirs, abs=1e-4) if isinstance(theirs, float) else theirs)
    assert "not supported" not in capsys.readouterr().err
