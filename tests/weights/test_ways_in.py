"""Files that are not quite what is read: taken as meant, or refused for the true reason with a way that works."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from book import further_notes
from pairs import random_ids, random_pair, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.weights.convert import export_checkpoint, gpt2_to_scratch, import_checkpoint
from hf_gpt_scratch.weights.formats import read, write

pytestmark = pytest.mark.slow

TF = Path(__file__).parents[1] / "fixtures" / "tiny-tensorflow"
CFG = dict(vocab_size=97, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
IDS = random_ids(2, 20, vocab_size=97)


@pytest.fixture
def book():
    return randomize(GPTModel(CFG)).eval()


@pytest.fixture
def official(tmp_path):
    gpt2, _ = random_pair()
    gpt2.save_pretrained(tmp_path / "official")
    return gpt2, tmp_path / "official"


def assert_same(directory, reference, ids=IDS):
    model = GPTScratchForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids), atol=1e-4, rtol=1e-5)
    return model


def refusal(path, **options):
    with pytest.raises(ConversionError) as error:
        import_checkpoint(path, path.parent / "refused", **options)
    assert not (path.parent / "refused").exists()
    assert len(str(error.value)) < 1000 + len(str(path))
    return str(error.value)


def saved(path, state_dict):
    torch.save(state_dict, path)
    return path


# Official directories


def change_config(directory, **changes):
    values = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], None])
def test_a_directory_of_the_first_years_is_converted_as_the_official_model(tmp_path, official, architectures):
    gpt2, source = official
    change_config(source, model_type=None, architectures=architectures)
    assert gpt2_to_scratch(source, tmp_path / "out")["parity"]["passed"]
    assert import_checkpoint(source, tmp_path / "again")["parity"]["passed"]
    export_checkpoint(source, tmp_path / "nano", "book")
    for directory in (source, tmp_path / "out"):
        assert_same(directory, lambda ids: gpt2(ids).logits)


def test_the_advice_for_a_config_of_no_type_works(tmp_path, official):
    gpt2, source = official
    change_config(source, model_type=None, architectures=["MyGPT"])
    for convert in (gpt2_to_scratch, import_checkpoint):
        with pytest.raises(ConversionError, match=r'add "model_type" to its config\.json'):
            convert(source, tmp_path / "out")
    change_config(source, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_a_directory_with_code_and_a_type_of_its_own_is_sent_where_it_loads(tmp_path, official):
    _, source = official
    change_config(source, model_type="gpt_own", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    for convert in (gpt2_to_scratch, import_checkpoint):
        told = "type 'gpt_own'.*AutoModelForCausalLM loads other models, with trust_remote_code=True"
        with pytest.raises(ConversionError, match=told):
            convert(source, tmp_path / "out")


def test_what_the_official_model_ignores_in_its_config_changes_nothing_and_is_noted(tmp_path, official):
    gpt2, source = official
    change_config(source, hidden_act="relu", n_heads=2, n_layers=1, emb_dim=8, qkv_bias=False, drop_rate=0.7)
    receipt = import_checkpoint(source, tmp_path / "out")
    assert all(name in receipt["notes"][0] for name in ("hidden_act=relu", "n_heads=2", "n_layers=1", "qkv_bias=False"))
    for model in (
        assert_same(source, lambda ids: gpt2(ids).logits),
        assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits),
        GPTScratchForCausalLM.from_gpt2(GPT2LMHeadModel.from_pretrained(source)),
    ):
        assert (model.config.n_heads, model.config.activation_function, model.config.drop_rate) == (4, "gelu_new", 0.1)


def with_head(source, weight, **changes):
    tensors = load_file(source / "model.safetensors") | {"lm_head.decoder.weight": weight.clone()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    change_config(source, **changes)


def test_the_old_name_of_a_tied_head_is_taken_if_it_is_equal(tmp_path, official):
    gpt2, source = official
    with_head(source, gpt2.lm_head.weight)
    import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_the_old_name_of_another_head_is_refused_and_the_way_that_is_told_leads_through(tmp_path, official):
    gpt2, source = official
    head = torch.randn_like(gpt2.lm_head.weight)
    with_head(source, head)
    assert "set tie_word_embeddings to false" in refusal(source)
    change_config(source, tie_word_embeddings=False)
    assert "rename it to 'lm_head.weight'" in refusal(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("lm_head.decoder.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(source, tmp_path / "out")
    assert torch.equal(GPTScratchForCausalLM.from_pretrained(tmp_path / "out").out_head.weight, head)


def test_a_value_head_is_left_behind_and_noted(tmp_path, official):
    gpt2, source = official
    head = {"v_head.summary.weight": torch.randn(1, 48), "v_head.summary.bias": torch.randn(1)}
    save_file(load_file(source / "model.safetensors") | head, source / "model.safetensors", metadata={"format": "pt"})
    change_config(source, architectures=["GPT2HeadWithValueModel"])
    assert "names the architecture 'GPT2HeadWithValueModel'" in refusal(source)
    change_config(source, architectures=["GPT2LMHeadModel"])
    receipt = import_checkpoint(source, tmp_path / "out")
    assert "left behind" in receipt["notes"][0] and all(name in receipt["notes"][0] for name in head)
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)
    assert not any(name.startswith("v_head") for name in load_file(tmp_path / "out/model.safetensors"))


# The book's


@pytest.mark.parametrize("how", ["tied", "copied"])
def test_a_books_head_that_is_the_embedding_becomes_one_matrix_with_it_and_that_is_noted(tmp_path, book, how):
    book.out_head.weight = book.tok_emb.weight if how == "tied" else nn.Parameter(book.tok_emb.weight.detach().clone())
    path = saved(tmp_path / "model.pth", book.state_dict())
    receipt = import_checkpoint(path, tmp_path / "out", n_heads=3)
    model = assert_same(tmp_path / "out", book)
    assert model.config.tie_word_embeddings and model.out_head.weight is model.model.tok_emb.weight
    assert any("tied" in note and "from_book" in note for note in receipt["notes"])
    told = GPTScratchForCausalLM.from_book(torch.load(path, weights_only=True), CFG)
    assert told.config.tie_word_embeddings == (how == "tied")


def test_an_almost_equal_head_stays_apart(tmp_path, book):
    book.out_head.weight = nn.Parameter(book.tok_emb.weight.detach().clone())
    with torch.no_grad():
        book.out_head.weight[96, 23] += 1e-3
    receipt = import_checkpoint(saved(tmp_path / "model.pth", book.state_dict()), tmp_path / "out", n_heads=3)
    assert not assert_same(tmp_path / "out", book).config.tie_word_embeddings
    assert further_notes(receipt) == []


# Activations that no file tells


def linears(gpt2, masks):
    turned = re.compile(r"c_(attn|proj|fc)\.weight")
    state_dict = {n: t.T.contiguous() if turned.search(n) else t for n, t in gpt2.state_dict().items()}
    if masks:
        state_dict |= {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(3)}
    return state_dict


@pytest.mark.parametrize(("masks", "taken", "other"), [(False, "gelu", "gelu_new"), (True, "gelu_new", "gelu")])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_an_activation_that_no_file_tells_is_noted_and_can_be_corrected_as_told(
    tmp_path, masks, taken, other, activation
):
    gpt2, _ = random_pair(activation_function=activation)
    path = saved(tmp_path / "model.pt", linears(gpt2, masks))
    [note] = import_checkpoint(path, tmp_path / "out", n_heads=4)["notes"]
    assert ("build-nanogpt" in note) != masks and f"with activation_function={other!r}" in note
    if activation != taken:
        again = import_checkpoint(path, tmp_path / "out", n_heads=4, activation_function=other, overwrite=True)
        assert again["notes"] == []
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_an_activation_that_the_file_tells_is_not_noted(tmp_path):
    gpt2, ours = random_pair(activation_function="gelu")
    write(ours, ours.config, tmp_path / "ckpt.pt", "nanogpt")
    assert import_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")["notes"] == []
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_nanogpts_names_without_their_prefix_are_taken(tmp_path):
    gpt2, _ = random_pair(activation_function="gelu")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in linears(gpt2, False).items()}
    import_checkpoint(saved(tmp_path / "model.pt", bare), tmp_path / "out", n_heads=4)
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_read_says_what_a_receipt_would(tmp_path, caplog):
    gpt2, _ = random_pair(activation_function="gelu")
    read(saved(tmp_path / "model.pt", linears(gpt2, False)), n_heads=4)
    assert "build-nanogpt" in caplog.text


def test_what_hparams_say_beyond_openais_is_noted(tmp_path):
    shutil.copytree(TF, tmp_path / "tf")
    hparams = json.loads((tmp_path / "tf/hparams.json").read_text())
    (tmp_path / "tf/hparams.json").write_text(json.dumps(hparams | {"scale_by_depth": True}))
    assert any("scale_by_depth=True" in note for note in import_checkpoint(tmp_path / "tf", tmp_path / "out")["notes"])
