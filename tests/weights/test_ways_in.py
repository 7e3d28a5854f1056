"""Files that are not quite what is read: taken as meant, or refused for the true reason with a way that works."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from forks import run_python
from pairs import random_ids, random_pair, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM, GPTScratchModel
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
        with pytest.raises(ConversionError, match=r'write "model_type" into its config\.json'):
            convert(source, tmp_path / "out")
    change_config(source, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    import_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


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
    assert receipt["notes"] == []


def test_the_way_told_for_a_books_safetensors_file_works(tmp_path, book):
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub" / "gpt2-small-124M.safetensors"
    save_file(book.state_dict(), path)
    assert f"give the file, {path}" in refusal(tmp_path / "hub", n_heads=3)
    command = re.search(r"torch\.save\(.*'model\.pth'\)", refusal(path, n_heads=3))[0]
    command = command.replace("'model.pth'", repr(str(tmp_path / "model.pth")))
    exec(f"import safetensors.torch, torch; {command}", {})
    import_checkpoint(tmp_path / "model.pth", tmp_path / "out", n_heads=3)
    assert_same(tmp_path / "out", book)


@pytest.mark.parametrize("bias", [True, False])
def test_the_way_told_for_a_classifier_of_chapter_6_works(tmp_path, book, bias):
    head = nn.Linear(24, 2, bias=bias)
    state_dict = {n: t for n, t in book.state_dict().items() if n != "out_head.weight"}
    classifier = state_dict | {f"out_head.{name}": t.detach() for name, t in head.named_parameters()}
    message = refusal(saved(tmp_path / "review_classifier.pth", classifier), n_heads=3)
    assert "chapter 6, a classifier's" in message and "GPTScratchModel.from_book" in message
    body = GPTScratchModel.from_book(state_dict, CFG)
    book.out_head = head
    with torch.no_grad():
        torch.testing.assert_close(head(body(IDS).last_hidden_state)[:, -1], book(IDS)[:, -1], atol=1e-4, rtol=1e-5)


def fast(state_dict):
    """As GPTModelFast has it."""
    new = {}
    for name, tensor in state_dict.items():
        renamed = re.sub(r"(norm\w*)\.scale", r"\1.weight", re.sub(r"(norm\w*)\.shift", r"\1.bias", name))
        if "W_query" in name:
            parts = [state_dict[name.replace("W_query", part)] for part in ("W_query", "W_key", "W_value")]
            new[renamed.replace("W_query", "qkv")] = torch.cat(parts)
        elif "W_key" not in name and "W_value" not in name:
            new[renamed.replace("att.out_proj", "att.proj")] = tensor
    return new


def from_fast(state_dict):
    """As the message says."""
    new = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"(norm\w*)\.weight", r"\1.scale", re.sub(r"(norm\w*)\.bias", r"\1.shift", name))
        parts = tensor.chunk(3) if "att.qkv" in name else [tensor]
        for part, chunk in zip(("W_query", "W_key", "W_value"), parts, strict=False):
            new[name.replace("qkv", part).replace("att.proj", "att.out_proj")] = chunk.clone()
    return new


def with_lora(state_dict):
    new = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        if not re.search(r"W_|out_proj|ff\.layers|out_head", name):
            new[name] = tensor
            continue
        if kind == "weight":
            a, b = torch.randn(tensor.shape[1], 4), torch.randn(4, tensor.shape[0])
            new |= {f"{module}.lora.A": a, f"{module}.lora.B": b}
            tensor = tensor - 16 * (a @ b).T
        new[f"{module}.linear.{kind}"] = tensor
    return new


def merged(state_dict):
    new = {}
    for name, tensor in state_dict.items():
        module = name.removesuffix(".linear.weight")
        if name.endswith(".linear.weight"):
            tensor = tensor + 16 * (state_dict[f"{module}.lora.A"] @ state_dict[f"{module}.lora.B"]).T
        if ".lora." not in name:
            new[name.replace(".linear.", ".")] = tensor
    return new


PROJECTION = re.compile(r"(.*\.att)\.(W_query|W_key|W_value)\.(weight|bias)")


def heads_in_a_list(state_dict):
    new = {}
    for name, tensor in state_dict.items():
        if PROJECTION.fullmatch(name):
            for i, part in enumerate(tensor.chunk(3)):
                new[name.replace("att.", f"att.heads.{i}.")] = part.clone()
        else:
            new[name] = tensor
    return new


def joined(state_dict):
    new = {name: tensor for name, tensor in state_dict.items() if ".heads." not in name}
    for name in state_dict:
        if ".heads.0." in name:
            parts = [state_dict[name.replace(".heads.0.", f".heads.{i}.")] for i in range(3)]
            new[name.replace(".heads.0.", ".")] = torch.cat(parts)
    return new


def einsum(state_dict):
    new = {}
    for name, tensor in state_dict.items():
        if found := PROJECTION.fullmatch(name):
            bare = found[2] if found[3] == "weight" else found[2].replace("W_", "bias_")[:6]
            new[f"{found[1]}.{bare}"] = tensor.T.contiguous() if found[3] == "weight" else tensor
        else:
            new[name] = tensor
    return new


def from_einsum(state_dict):
    new = {}
    for name, tensor in state_dict.items():
        if found := re.fullmatch(r"(.*\.att)\.(W_query|W_key|W_value)", name):
            new[f"{found[1]}.{found[2]}.weight"] = tensor.T.contiguous()
        elif found := re.fullmatch(r"(.*\.att)\.bias_([qkv])", name):
            full = {"q": "W_query", "k": "W_key", "v": "W_value"}[found[2]]
            new[f"{found[1]}.{full}.bias"] = tensor
        else:
            new[name] = tensor
    return new


@pytest.mark.parametrize(
    ("make", "undo", "told"),
    [
        (fast, from_fast, "query, key and value fused"),
        (with_lora, merged, "LoRA.*linear.weight \\+ alpha"),
        (heads_in_a_list, joined, "heads in a list"),
        (einsum, from_einsum, "bare matrices"),
        (
            lambda tensors: {"model." + name: tensor for name, tensor in tensors.items()},
            lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
            r"name\.removeprefix\('model\.'\)",
        ),
    ],
)
def test_a_variant_of_the_books_model_is_named_and_the_way_told_works(tmp_path, book, make, undo, told):
    other = make(book.state_dict())
    for prefix in ("", "_orig_mod."):
        path = saved(tmp_path / "other.pth", {prefix + name: tensor for name, tensor in other.items()})
        assert re.search(told, refusal(path, n_heads=3))
    import_checkpoint(saved(tmp_path / "model.pth", undo(other)), tmp_path / "out", n_heads=3)
    assert_same(tmp_path / "out", book)


def test_grouped_queries_are_called_what_they_are(tmp_path, book):
    state_dict = {n: t[:8] if "W_key" in n or "W_value" in n else t for n, t in book.state_dict().items()}
    message = refusal(saved(tmp_path / "gqa.pth", state_dict), n_heads=3)
    assert "W_key of shape [8, 24]" in message and "cannot be converted" in message


@pytest.mark.parametrize("key", ["state_dict", "state", "model"])
def test_a_state_dict_inside_another_dict_is_named_and_the_way_told_works(tmp_path, book, key):
    path = saved(tmp_path / "run.ckpt.pt", {"epoch": 3, key: book.state_dict(), "optimizer": {"lr": 1e-3}})
    assert f"[{key!r}]" in refusal(path, n_heads=3)
    command = f"import torch; torch.save(torch.load({str(path)!r}, weights_only=True)[{key!r}], 'model.pth')"
    assert run_python("-c", command, cwd=tmp_path).returncode == 0
    import_checkpoint(tmp_path / "model.pth", tmp_path / "out", n_heads=3)
    assert_same(tmp_path / "out", book)


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
    assert ("build-nanogpt" in note) != masks and f"write {other!r} as activation_function" in note
    if activation != taken:
        change_config(tmp_path / "out", activation_function=other)
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_an_activation_that_the_file_tells_is_not_noted(tmp_path):
    gpt2, ours = random_pair(activation_function="gelu")
    write(ours, ours.config, tmp_path / "ckpt.pt", "nanogpt")
    assert import_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")["notes"] == []
    assert_same(tmp_path / "out", lambda ids: gpt2(ids).logits)


def test_nanogpts_names_without_their_prefix_are_refused_and_the_way_told_works(tmp_path):
    gpt2, _ = random_pair(activation_function="gelu")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in linears(gpt2, False).items()}
    assert "without 'transformer.'" in refusal(saved(tmp_path / "bare.pt", bare), n_heads=4)
    named = {name if name == "lm_head.weight" else "transformer." + name: tensor for name, tensor in bare.items()}
    import_checkpoint(saved(tmp_path / "model.pt", named), tmp_path / "out", n_heads=4)
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
