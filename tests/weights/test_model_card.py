"""The card of a model says what the model and its receipt say."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from pairs import VOCAB, random_gpt2, random_pair
from remote import run_without_the_package

import hf_gpt_scratch
from hf_gpt_scratch import GPTScratchForCausalLM, GPTScratchForSequenceClassification, GPTScratchModel
from hf_gpt_scratch.weights.convert import RECEIPT, gpt2_to_scratch, scratch_to_gpt2
from hf_gpt_scratch.weights.formats.directory import CARD
from hf_gpt_scratch.weights.model_card import PIPELINES, model_card

pytestmark = pytest.mark.slow


@pytest.fixture
def converted(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "source")
    return tmp_path / "converted", gpt2_to_scratch(tmp_path / "source", tmp_path / "converted")


def test_a_converted_checkpoint_has_its_card_and_the_receipt_lists_it(converted):
    directory, receipt = converted
    card = ModelCard.load(directory / CARD)
    parity = receipt["parity"]
    assert f"{parity['logits']['max_abs_error']:.1e} of {parity['logits']['max_abs_logit']:.4g}" in card.text
    assert f"{parity['tensors']} of {parity['tensors']} tensors" in card.text
    assert receipt["versions"]["transformers"] in card.text
    assert receipt["target"]["files"][CARD]["bytes"] == (directory / CARD).stat().st_size
    assert json.loads((directory / RECEIPT).read_text()) == receipt
    model = GPTScratchForCausalLM.from_pretrained(directory)
    assert f"{model.num_parameters():,} parameters (float32)" in card.text
    assert f"| `vocab_size` | {VOCAB} |" in card.text
    assert "| `tie_word_embeddings` | True |" in card.text


def test_no_path_of_this_machine_is_in_a_card(converted, tmp_path):
    card = (converted[0] / CARD).read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in card


def test_unverified_conversions_claim_no_parity(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "source")
    gpt2_to_scratch(tmp_path / "source", tmp_path / "converted", check=False)
    assert "Parity" not in (tmp_path / "converted" / CARD).read_text()
    assert "Parity" not in model_card(random_pair()[1], {"parity": {"passed": False}}).text


def test_official_checkpoints_get_no_card_of_ours(converted, tmp_path):
    scratch_to_gpt2(converted[0], tmp_path / "back")
    assert not (tmp_path / "back" / CARD).exists()


def test_a_hub_id_becomes_the_base_model(tmp_path, monkeypatch):
    random_gpt2().bfloat16().save_pretrained(tmp_path / "source")
    monkeypatch.setattr("hf_gpt_scratch.weights.convert.find_source", lambda name, revision: tmp_path / "source")
    gpt2_to_scratch("openai-community/gpt2-medium", tmp_path / "converted")
    card = ModelCard.load(tmp_path / "converted" / CARD)
    assert card.data.base_model == "openai-community/gpt2-medium"
    assert card.data.license == "mit"
    assert "parameters (bfloat16)" in card.text
    assert "`openai-community/gpt2-medium`" in card.text


def test_licence_and_source_are_what_was_given():
    model = random_pair()[1]
    assert model_card(model).data.license is None
    assert "The weights: not stated." in model_card(model).text
    assert "with weights of its own" in model_card(model).text
    card = model_card(model, source="someone/model", license="cc-by-4.0")
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "someone/model")
    assert "`someone/model`, `cc-by-4.0`" in card.text
    assert model_card(model, source="someone/model").data.license is None
    assert model_card(model, source="openai-community/gpt2", license="other").data.license == "other"


def test_the_hubs_fields_survive_saving(tmp_path):
    model_card(random_pair()[1]).save(tmp_path / CARD)
    data = ModelCard.load(tmp_path / CARD).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"gpt2", "gpt_scratch", "custom_code"} <= set(data.tags)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_not_needed(tied):
    config = random_pair(tie_word_embeddings=tied)[1].config
    with torch.device("meta"):
        empty = GPTScratchForCausalLM(config)
    assert str(model_card(empty)) == str(model_card(GPTScratchForCausalLM(config)))


@pytest.mark.parametrize("model_class", [GPTScratchModel, GPTScratchForSequenceClassification])
def test_other_heads_have_their_own_pipeline(model_class):
    config = random_pair()[1].config
    with torch.device("meta"):
        card = model_card(model_class(config))
    assert card.data.pipeline_tag == PIPELINES[model_class._auto_class] != "text-generation"
    assert f"import {model_class.__name__}\n" in card.text


def test_every_class_has_a_pipeline():
    public = (getattr(hf_gpt_scratch, name) for name in hf_gpt_scratch.__all__)
    models = [value for value in public if hasattr(value, "gpt2_class")]
    assert {model._auto_class for model in models} == set(PIPELINES)


def blocks(card):
    """The Python code in a card."""
    return [part.split("```")[0] for part in card.text.split("```python\n")[1:]]


def test_the_cards_code_runs_as_it_stands(converted, tmp_path, monkeypatch):
    directory, _ = converted
    without, with_package = blocks(ModelCard.load(directory / CARD))
    run_without_the_package(f"here = sys.argv[1]\n{without}", directory, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(with_package, {"here": str(directory)})
    assert (tmp_path / "official" / "model.safetensors").is_file()


@pytest.mark.parametrize("source", ["model.pth", "chapter 7", "here/is/one"])
def test_a_source_that_is_no_id_on_the_hub_is_refused(source):
    with pytest.raises(ValueError, match=r"no id of a model on the hub.*leave it out"):
        model_card(random_pair()[1], source=source)


def test_a_file_is_no_id_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"")
    with pytest.raises(ValueError, match="no id of a model on the hub"):
        model_card(random_pair()[1], source="weights")
