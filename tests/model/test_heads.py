"""The task heads against the official ones; loading, saving, losses and gradients."""

import json

import pytest
import torch
from pairs import VOCAB, gpt2_config, random_ids, random_pair, randomize
from remote import run_without_the_package
from safetensors.torch import load_file
from transformers import (
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from hf_gpt_scratch import (
    GPTScratchConfig,
    GPTScratchDoubleHeadsModel,
    GPTScratchForCausalLM,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
)
from hf_gpt_scratch.model.heads_gpt_scratch import AUTO_CLASSES
from hf_gpt_scratch.weights.parity import FP32_GRADIENTS, FP32_LOGITS, FP32_LOSS, gradient_errors, relative_error

LABELS = 5
IDS = random_ids(4, 12)
PADDED = IDS.masked_fill(torch.arange(12) >= torch.tensor([[12], [9], [5], [10]]), VOCAB - 2)
CHOICES = random_ids(6, 12, seed=1).view(2, 3, 12)

# kind: (official class, ours, Auto class, inputs, names of the outputs that are compared)
KINDS = {
    "sequence": (
        GPT2ForSequenceClassification,
        GPTScratchForSequenceClassification,
        AutoModelForSequenceClassification,
        {"input_ids": PADDED, "labels": torch.tensor([0, 3, 4, 1])},
        ["logits"],
    ),
    "sequence, several labels": (
        GPT2ForSequenceClassification,
        GPTScratchForSequenceClassification,
        AutoModelForSequenceClassification,
        {"input_ids": PADDED, "labels": torch.rand(4, LABELS).round()},
        ["logits"],
    ),
    "token": (
        GPT2ForTokenClassification,
        GPTScratchForTokenClassification,
        AutoModelForTokenClassification,
        {"input_ids": IDS, "labels": (IDS % LABELS).masked_fill(IDS % 4 == 0, -100)},
        ["logits"],
    ),
    "question": (
        GPT2ForQuestionAnswering,
        GPTScratchForQuestionAnswering,
        AutoModelForQuestionAnswering,
        {
            "input_ids": IDS,
            "start_positions": torch.tensor([0, 3, 5, 99]),
            "end_positions": torch.tensor([1, 3, 11, 99]),
        },
        ["start_logits", "end_logits"],
    ),
    "double": (
        GPT2DoubleHeadsModel,
        GPTScratchDoubleHeadsModel,
        AutoModelForPreTraining,
        {
            "input_ids": CHOICES,
            "mc_token_ids": torch.tensor([[11, 5, 7], [0, 3, 11]]),
            "labels": CHOICES,
            "mc_labels": torch.tensor([2, 0]),
        },
        ["logits", "mc_logits"],
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make_pair(kind):
    config = gpt2_config(pad_token_id=VOCAB - 2, summary_first_dropout=0.0)
    if kind[0] is not GPT2DoubleHeadsModel:
        config.num_labels = LABELS
    gpt2 = randomize(kind[0](config)).eval()
    return gpt2, kind[1].from_gpt2(gpt2)


@pytest.fixture
def pair(kind):
    return make_pair(kind)


def losses(output):
    return [output[name] for name in ("loss", "mc_loss") if output.get(name) is not None]


def test_outputs_and_losses(kind, pair):
    theirs, ours = (model(**kind[3]) for model in pair)
    for name in kind[4]:
        assert theirs[name].shape == ours[name].shape
        assert relative_error(theirs[name], ours[name]) <= FP32_LOGITS
    assert len(losses(theirs)) == len(losses(ours)) > 0
    for a, b in zip(losses(theirs), losses(ours), strict=True):
        assert abs(a.item() - b.item()) <= FP32_LOSS * a.item()
    assert type(ours).__name__ == type(theirs).__name__


def test_gradient_of_every_parameter(kind, pair):
    for model in pair:
        sum(losses(model(**kind[3]))).backward()
    errors = gradient_errors(*pair)
    assert errors
    assert max(errors.values()) <= FP32_GRADIENTS, errors


def test_official_checkpoints_load_and_are_written(kind, pair, tmp_path):
    gpt2, scratch = pair
    gpt2.save_pretrained(tmp_path / "official")
    loaded, info = kind[1].from_pretrained(tmp_path / "official", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == scratch.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in scratch.state_dict().items())

    loaded.save_as_gpt2(tmp_path / "again")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("official", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_own_checkpoints_load_through_the_auto_class(kind, pair, tmp_path):
    _, scratch = pair
    scratch.save_pretrained(tmp_path)
    loaded = kind[2].from_pretrained(tmp_path)
    assert type(loaded) is kind[1]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in scratch.state_dict().items())


def test_a_head_read_wrongly_is_noticed(kind, pair):
    scratch = pair[1]
    heads = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.")
    changed = [p for name, p in scratch.named_parameters() if name.startswith(heads)]
    assert changed
    for parameter in changed:
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(parameter.roll(1, dims=-1) if parameter.numel() > 1 else parameter + 1)
        theirs, ours = (model(**kind[3]) for model in pair)
        assert max(relative_error(theirs[name], ours[name]) for name in kind[4]) > 100 * FP32_LOGITS
        with torch.no_grad():
            parameter.copy_(before)


FORWARD = """
import torch, transformers
for place in sys.argv[1:]:
    auto, inputs = torch.load(f"{place}/inputs.pt")
    model = getattr(transformers, auto).from_pretrained(f"{place}/saved", trust_remote_code=True)
    with torch.no_grad():
        torch.save(dict(model(**inputs)), f"{place}/output.pt")
"""


@pytest.mark.slow
def test_saved_code_of_every_head_runs_where_the_package_is_missing(tmp_path):
    places, models = [tmp_path / str(n) for n in range(len(KINDS))], {}
    for place, kind in zip(places, KINDS.values(), strict=True):
        models[place] = make_pair(kind)[1]
        models[place].save_pretrained(place / "saved")
        assert json.loads((place / "saved/config.json").read_text())["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}
        torch.save((kind[2].__name__, {"input_ids": kind[3]["input_ids"]}), place / "inputs.pt")
    run_without_the_package(FORWARD, *places, cwd=tmp_path)
    for place, kind in zip(places, KINDS.values(), strict=True):
        with torch.no_grad():
            expected = models[place](input_ids=kind[3]["input_ids"])
        got = torch.load(place / "output.pt", weights_only=False)
        # Two processes may add in two orders, as their memory happens to lie.
        assert all(relative_error(expected[name], got[name]) <= FP32_LOGITS for name in kind[4])


EVERY = """
import json, torch, transformers
official, saved = sys.argv[1:]
for auto in json.load(open(f"{saved}/config.json"))["auto_map"]:
    if auto == "AutoConfig":
        continue
    theirs, ours = (
        getattr(transformers, auto).from_pretrained(place, trust_remote_code=True).eval() for place in (official, saved)
    )
    assert type(ours).__module__.startswith("transformers_modules"), type(ours)
    ids = torch.arange(12).reshape(1, 12) % 200
    states = [model(ids, output_hidden_states=True).hidden_states[-1] for model in (theirs, ours)]
    assert torch.allclose(*states, atol=1e-4, rtol=1e-4), auto
    print(auto, type(theirs).__name__, type(ours).__name__)
"""


@pytest.mark.slow
def test_every_auto_class_opens_a_saved_language_model_as_it_opens_the_official_one(tmp_path):
    official, ours = random_pair(pad_token_id=0)
    official.save_pretrained(tmp_path / "official")
    ours.save_pretrained(tmp_path / "saved")
    run_without_the_package(EVERY, tmp_path / "official", tmp_path / "saved", cwd=tmp_path)
    GPTScratchForSequenceClassification(GPTScratchConfig.from_gpt2(gpt2_config())).save_pretrained(
        tmp_path / "classifier"
    )
    maps = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("saved", "classifier")]
    assert maps[0] == maps[1]


def test_a_language_model_becomes_a_classifier_with_a_new_head(tmp_path):
    """Fine-tuning starts like this: the base is loaded, the head is new."""
    gpt2 = randomize(GPT2LMHeadModel(gpt2_config(pad_token_id=0)))
    gpt2.save_pretrained(tmp_path)
    model, info = GPTScratchForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert model.score.weight.shape == (3, 48)
    assert torch.equal(model.model.tok_emb.weight, gpt2.transformer.wte.weight)


def test_base_models_convert_in_memory():
    gpt2 = randomize(GPT2Model(gpt2_config())).eval()
    scratch = GPTScratchModel.from_gpt2(gpt2)
    back = scratch.to_gpt2()
    assert type(back) is GPT2Model
    a, b, c = (model(IDS).last_hidden_state for model in (gpt2, scratch, back))
    assert torch.equal(a, c)
    assert relative_error(a, b) <= FP32_LOGITS


def test_inputs_of_two_and_of_three_dimensions_agree():
    gpt2 = randomize(GPT2DoubleHeadsModel(gpt2_config(tie_word_embeddings=False))).eval()
    model = GPTScratchDoubleHeadsModel.from_gpt2(gpt2)
    flat = CHOICES.view(6, 12)
    assert torch.allclose(model(flat).logits.view(2, 3, 12, -1), model(CHOICES).logits, atol=1e-5)
    embeddings = model.get_input_embeddings()(CHOICES)
    assert torch.allclose(model(inputs_embeds=embeddings).mc_logits, model(CHOICES).mc_logits, atol=1e-5)
    assert isinstance(model, GPTScratchForCausalLM)
