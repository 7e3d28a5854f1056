"""transformers' pipelines give the same with our model as with the official one."""

from pathlib import Path

import pytest
from pairs import randomize
from transformers import AutoTokenizer, pipeline

from hf_gpt_scratch import (
    GPTScratchConfig,
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


def test_the_books_classifier_takes_one_text_at_a_time():
    """A batch is padded under a mask, which it refuses; a single text is not padded."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    tokenizer.pad_token = tokenizer.eos_token
    config = GPTScratchConfig(
        vocab_size=1000, context_length=64, emb_dim=24, n_heads=3, n_layers=2, book_classifier=True, bos_token_id=0
    )
    model = randomize(GPTScratchForSequenceClassification(config)).eval()
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = [TEXT, TEXT[:11]]
    answers = classifier(texts, top_k=None)
    for text, answer in zip(texts, answers, strict=True):
        logits = model(tokenizer(text, return_tensors="pt").input_ids).logits[0]
        expected = dict(zip(model.config.id2label.values(), logits.softmax(0).tolist(), strict=True))
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="attention_mask that hides tokens"):
        classifier(texts, batch_size=2)
