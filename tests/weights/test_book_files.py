"""Every file that the book's code saves has the logits of the class that saved it, by `convert` and by `from_book`."""

import json
import re
import shutil

import pytest
import torch
from book import CFG, CONTEXT, HEADS, MODELS, VOCAB, E, adapt, classifier, fast, further_notes, masked, plain
from pairs import random_ids, randomize
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_gpt_scratch import (
    GPTModel,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchModel,
    MultiHeadAttention,
    convert,
    export,
)
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.model import book_files
from hf_gpt_scratch.weights.convert import verify_receipt
from hf_gpt_scratch.weights.formats import detect, read

pytestmark = pytest.mark.slow

IDS = random_ids(2, 20, vocab_size=VOCAB)
BOUND = 1e-5  # of the largest logit; measured: 5e-7


@torch.no_grad()
def error_of(model, reference, ids=IDS):
    theirs, ours = reference(ids), model(ids).logits
    theirs = theirs[:, -1] if ours.ndim == 2 else theirs
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def saved(path, content):
    torch.save(content, path)
    return path


def refusal(path, **options):
    with pytest.raises(ConversionError) as error:
        convert(path, path.parent / "refused", **options)
    assert not (path.parent / "refused").exists()
    assert len(str(error.value)) < 1000 + len(str(path))
    return str(error.value)


def asks(state_dict):
    """The heads, unless the file tells them."""
    return {} if any(".heads." in name for name in state_dict) else {"n_heads": HEADS}


@pytest.mark.parametrize("what", MODELS)
def test_convert_and_from_book_have_the_logits_of_the_class_that_saved_the_file(tmp_path, what):
    model = MODELS[what]()
    path, options = saved(tmp_path / "model.pth", model.state_dict()), asks(model.state_dict())
    assert detect(path) == "book"
    receipt = convert(path, tmp_path / "out", **options)
    assert receipt["parity"]["passed"] and verify_receipt(tmp_path / "out") == receipt
    converted = GPTScratchForCausalLM.from_pretrained(tmp_path / "out")
    assert error_of(converted, model) < BOUND
    ways = (path, model.state_dict(), torch.load(path, weights_only=True))
    for source in (*ways, str(path)):
        assert error_of(GPTScratchForCausalLM.from_book(source, **options), model) < BOUND
    cfg = {**CFG, "qkv_bias": "without" not in what}
    for source in (path, model.state_dict(), model):
        ours = GPTScratchForCausalLM.from_book(source, cfg)
        assert error_of(ours, model) < BOUND
        assert all(torch.equal(t, converted.state_dict()[name]) for name, t in ours.state_dict().items())
    for config in (converted.config, ours.config):
        assert (config.context_length, config.qkv_bias) == (CONTEXT, "without" not in what)


@pytest.mark.parametrize("what", MODELS)
def test_a_model_in_memory_tells_its_heads_and_dropout_and_keeps_its_mode(what):
    model = MODELS[what]().train()
    tells = "einsum" not in what
    ours = GPTScratchForCausalLM.from_book(model, **({} if tells else {"n_heads": HEADS}))
    assert model.training and not ours.training
    assert error_of(ours, model.eval()) < BOUND
    if tells and "list" not in what:
        assert (ours.config.n_heads, ours.config.drop_rate) == (HEADS, 0.1)
    if not tells:
        with pytest.raises(ValueError, match="no tensor tells the number of heads; give n_heads"):
            GPTScratchForCausalLM.from_book(model)


def test_dropout_of_several_rates_comes_along():
    model = GPTModel({**CFG, "drop_rate_emb": 0.2, "drop_rate_attn": 0.0, "drop_rate_shortcut": 0.3})
    config = GPTScratchForCausalLM.from_book(randomize(model)).config
    assert (config.drop_rate_emb, config.drop_rate_attn, config.drop_rate_shortcut) == (0.2, 0.0, 0.3)


@pytest.mark.parametrize("mistake", ["heads", "activation", "hook", "not on ids"])
def test_a_model_in_memory_that_computes_something_else_is_refused(mistake):
    model, options = plain(), {}
    if mistake == "heads":
        options["cfg"] = {**CFG, "n_heads": 4}
    elif mistake == "activation":
        model.trf_blocks[1].ff.layers[1] = nn.GELU()
    elif mistake == "hook":
        model.final_norm.register_forward_hook(lambda module, args, output: output * 1.01)
    else:
        model.forward = lambda ids, more: ids
    told = {"not on ids": "does not run", "activation": "exact GELU"}.get(mistake, "other logits")
    with pytest.raises(ValueError, match=told):
        GPTScratchForCausalLM.from_book(model, **options)


# The mutation twins: each step of the way, left out or done wrongly, shows.


@pytest.mark.parametrize(
    ("step", "make"),
    [("_renamed", fast), ("_split", fast), ("_split", MODELS["einsum"]), ("_joined", MODELS["heads in a list"])],
)
def test_a_step_that_is_left_out_is_an_error(tmp_path, monkeypatch, step, make):
    monkeypatch.setattr(book_files, step, lambda found: found.items())
    model = make()
    with pytest.raises(ConversionError):
        convert(saved(tmp_path / "model.pth", model.state_dict()), tmp_path / "out", n_heads=HEADS)
    with pytest.raises(ValueError, match=r"does not fit|lacks"):
        GPTScratchForCausalLM.from_book(model.state_dict(), n_heads=HEADS)


@pytest.mark.parametrize("mistake", ["keys and values swapped", "not transposed", "heads in another order", "scale"])
def test_a_step_that_is_done_wrongly_shows_in_the_logits(tmp_path, monkeypatch, mistake):
    options = {"n_heads": HEADS}
    if mistake == "keys and values swapped":
        model = fast()
        monkeypatch.setattr(book_files, "QKV", ("W_query", "W_value", "W_key"))
    elif mistake == "not transposed":
        model = MODELS["einsum"]()
        monkeypatch.setattr(book_files.Part, "then", lambda self, step: self)
    elif mistake == "heads in another order":
        model, options = MODELS["heads in a list"](), {}
        other = {"heads.0.W_key": "heads.1.W_key", "heads.1.W_key": "heads.0.W_key"}
        swap = re.compile("|".join(map(re.escape, other)))
        state_dict = {swap.sub(lambda found: other[found[0]], n): t for n, t in model.state_dict().items()}
    else:
        model, options = randomize(adapt(plain())).eval(), {"n_heads": HEADS, "lora_scale": 6.0}
    state_dict = state_dict if mistake == "heads in another order" else model.state_dict()
    path = saved(tmp_path / "model.pth", state_dict)
    convert(path, tmp_path / "out", **options)
    assert error_of(GPTScratchForCausalLM.from_pretrained(tmp_path / "out"), model) > 1e-3


# What lies around the weights


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("make", [plain, fast])
def test_prefixes_are_taken_off(tmp_path, prefix, make):
    model = make()
    content = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = saved(tmp_path / "model.pth", content)
    convert(path, tmp_path / "out", n_heads=HEADS)
    for ours in (
        GPTScratchForCausalLM.from_pretrained(tmp_path / "out"),
        GPTScratchForCausalLM.from_book(path, n_heads=HEADS),
    ):
        assert error_of(ours, model) < BOUND


def test_a_prefix_that_nobody_knows_is_named_and_the_way_told_works(tmp_path):
    model = plain()
    content = {"gpt." + name: tensor for name, tensor in model.state_dict().items()}
    assert "name.removeprefix('gpt.')" in refusal(saved(tmp_path / "model.pth", content), n_heads=HEADS)
    path = saved(tmp_path / "model.pth", {name.removeprefix("gpt."): tensor for name, tensor in content.items()})
    convert(path, tmp_path / "out", n_heads=HEADS)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", "state"])
def test_a_state_dict_is_found_in_what_training_saved(tmp_path, key):
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS).sum().backward()
    optimizer.step()
    content = {"epoch": 3, key: model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "loss": 1.5}
    path = saved(tmp_path / "model_and_optimizer.pth", content)
    [note, about_schedule] = further_notes(convert(path, tmp_path / "out", n_heads=HEADS))
    assert "the optimizer came along" in note
    assert "nothing of clipping or of a schedule" in about_schedule
    for ours in (
        GPTScratchForCausalLM.from_pretrained(tmp_path / "out"),
        GPTScratchForCausalLM.from_book(path, n_heads=HEADS),
        GPTScratchForCausalLM.from_book(content, CFG),
    ):
        assert error_of(ours, model) < BOUND


def test_which_of_two_state_dicts_is_meant_is_asked_or_noted(tmp_path):
    content = {"model": plain().state_dict(), "state_dict": plain().state_dict()}
    assert "under each of 'state_dict', 'model'" in refusal(saved(tmp_path / "two.pth", content), n_heads=HEADS)
    content = {"model": plain().state_dict(), "ema": plain().state_dict()}
    [note] = further_notes(convert(saved(tmp_path / "ema.pth", content), tmp_path / "out", n_heads=HEADS))
    assert "the weights are those under 'model'; left out is 'ema'" in note


def test_the_heads_are_asked_for_unless_the_file_tells_them(tmp_path):
    path = saved(tmp_path / "model.pth", plain().state_dict())
    assert "pass n_heads" in refusal(path)
    with pytest.raises(ValueError, match="no tensor tells the number of heads"):
        GPTScratchForCausalLM.from_book(path)
    listed = saved(tmp_path / "listed.pth", MODELS["heads in a list"]().state_dict())
    assert f"says {HEADS}; leave n_heads out" in refusal(listed, n_heads=4)
    for options in ({"n_heads": 4}, {"cfg": {**CFG, "n_heads": 4}}):
        with pytest.raises(ValueError, match=r"3 and 4 heads|3 heads in a list, but the cfg says 4"):
            GPTScratchForCausalLM.from_book(listed, **options)
    with pytest.raises(ValueError, match=r"context_length=32, but the config says context_length=1024.*n_heads"):
        GPTScratchForCausalLM.from_book(path, {**CFG, "context_length": 1024})
    with pytest.raises(ValueError, match="n_heads=3 and a cfg"):
        GPTScratchForCausalLM.from_book(path, CFG, n_heads=3)


# Safetensors


def test_the_authors_safetensors_are_read(tmp_path):
    model = plain()
    path = tmp_path / "hub" / "gpt2-small-124M.safetensors"
    path.parent.mkdir()
    save_file(model.state_dict() | {"trf_blocks.0.att.mask": masked(CONTEXT)}, path)
    assert f"give the file, {path}" in refusal(path.parent, n_heads=HEADS)
    convert(path, tmp_path / "out", n_heads=HEADS)
    for ours in (
        GPTScratchForCausalLM.from_pretrained(tmp_path / "out"),
        GPTScratchForCausalLM.from_book(path, n_heads=HEADS),
    ):
        assert error_of(ours, model) < BOUND


def test_a_tied_model_whose_head_was_left_out_is_tied_and_that_is_said(tmp_path, caplog):
    model = plain()
    model.out_head.weight = model.tok_emb.weight
    save_model(model, str(tmp_path / "tied.safetensors"))
    [note] = further_notes(convert(tmp_path / "tied.safetensors", tmp_path / "out", n_heads=HEADS))
    assert "so the model is tied" in note
    for ours in (
        GPTScratchForCausalLM.from_pretrained(tmp_path / "out"),
        GPTScratchForCausalLM.from_book(tmp_path / "tied.safetensors", n_heads=HEADS),
    ):
        assert ours.config.tie_word_embeddings and error_of(ours, model) < BOUND
    assert "so the model is tied" in caplog.text


def test_a_directorys_weights_without_their_config_are_refused(tmp_path):
    ours = GPTScratchForCausalLM.from_book(plain())
    ours.save_pretrained(tmp_path / "native")
    shutil.copy(tmp_path / "native/model.safetensors", tmp_path)
    assert "give it the config.json" in refusal(tmp_path / "model.safetensors", n_heads=HEADS)
    assert "give its directory" in refusal(tmp_path / "native/model.safetensors", n_heads=HEADS)
    ours.save_as_gpt2(tmp_path / "official")
    shutil.copy(tmp_path / "official/model.safetensors", tmp_path)
    assert "an official checkpoint" in refusal(tmp_path / "model.safetensors", n_heads=HEADS)


# Appendix E


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("make", [plain, fast, MODELS["heads in a list"]])
def test_adapters_are_merged_with_the_scale_that_is_given(tmp_path, make, by_rank):
    model = randomize(adapt(make(), by_rank=by_rank)).eval()
    path, scale = saved(tmp_path / "lora.pth", model.state_dict()), 1.5 if by_rank else 6.0
    options = asks(model.state_dict())
    assert "pass lora_scale" in refusal(path, **options)
    with pytest.raises(ValueError, match="pass lora_scale"):
        GPTScratchForCausalLM.from_book(path, **options)
    convert(path, tmp_path / "out", lora_scale=scale, **options)
    for ours in (
        GPTScratchForCausalLM.from_pretrained(tmp_path / "out"),
        GPTScratchForCausalLM.from_book(path, lora_scale=scale, **options),
        GPTScratchForCausalLM.from_book(model, lora_scale=scale),
        GPTScratchForCausalLM.from_book(model),  # which tells it
    ):
        assert error_of(ours, model) < BOUND
    with pytest.raises(ValueError, match="other logits"):
        GPTScratchForCausalLM.from_book(model, lora_scale=2.0)


def test_adapters_in_memory_tell_their_scale_to_the_last_bit_and_must_have_one():
    model = randomize(adapt(plain())).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = GPTScratchForCausalLM.from_book(model).state_dict()
    given = GPTScratchForCausalLM.from_book(model, lora_scale=1.5).state_dict()
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    model.out_head.scale = 3.0
    with pytest.raises(ValueError, match=r"by different numbers, 1\.5, 3\.0.*merge them"):
        GPTScratchForCausalLM.from_book(model)
    untrained = randomize(adapt(plain())).eval()
    with torch.no_grad():
        for name, parameter in untrained.named_parameters():
            if name.endswith("lora.B"):
                parameter.zero_()
    assert error_of(GPTScratchForCausalLM.from_book(untrained), untrained) < BOUND


def test_a_scale_without_adapters_is_refused_and_adapters_of_peft_are_named(tmp_path):
    path = saved(tmp_path / "model.pth", plain().state_dict())
    assert "lora_scale=2.0" in refusal(path, n_heads=HEADS, lora_scale=2.0)
    with pytest.raises(ValueError, match="has no adapters"):
        GPTScratchForCausalLM.from_book(path, n_heads=HEADS, lora_scale=2.0)
    peft = plain().state_dict() | {"trf_blocks.0.att.W_query.lora_A.default.weight": torch.ones(4, E)}
    assert "merge_and_unload" in refusal(saved(tmp_path / "peft.pth", peft), n_heads=HEADS)


@pytest.mark.parametrize("mask", ["none", "window", "transposed", "not square"])
def test_a_mask_of_another_model_in_a_file_is_refused(tmp_path, mask):
    model, causal = plain(), masked(CONTEXT)
    masks = {"none": causal & False, "window": causal | causal.T.roll(-4, 0).roll(4, 1), "transposed": causal.T}
    other = {**masks, "not square": causal[:-1]}[mask].float()
    for name, right in (("right.pth", True), ("wrong.pth", False)):
        state_dict = model.state_dict() | {"trf_blocks.1.att.mask": causal.float() if right else other}
        path = saved(tmp_path / name, state_dict)
        if right:
            GPTScratchForCausalLM.from_book(path, n_heads=HEADS)
            model_of_the_book = GPTModel(CFG)
            model_of_the_book.load_state_dict(state_dict)
            continue
        told = r"trf_blocks\.1\.att\.mask is not the causal mask, so this is another model"
        assert re.search(told, refusal(path, n_heads=HEADS))
        with pytest.raises(ValueError, match=told):
            GPTScratchForCausalLM.from_book(path, n_heads=HEADS)
        with pytest.raises(ValueError, match=told):
            model_of_the_book.load_state_dict(state_dict)


def test_a_config_that_unties_a_tied_model_is_followed_and_that_is_said(caplog):
    model = plain()
    model.out_head.weight = model.tok_emb.weight
    for tied in (True, False):
        caplog.clear()
        ours = GPTScratchForCausalLM.from_book(model, GPTScratchConfig(**{**CFG, "tie_word_embeddings": tied}))
        assert (ours.out_head.weight is ours.model.tok_emb.weight) == tied and error_of(ours, model) < BOUND
        assert ("so the copy has two, which are trained apart" in caplog.text) != tied


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    state_dict = adapt(plain()).state_dict()
    for shape in ([5, 4], [1, 4], [4, 4]):
        state_dict["trf_blocks.0.att.W_query.lora.A"] = torch.ones(shape)
        path = saved(tmp_path / "lora.pth", state_dict)
        assert "has adapters that do not fit" in refusal(path, n_heads=HEADS, lora_scale=1.0)
        with pytest.raises(ValueError, match="has adapters that do not fit"):
            GPTScratchForCausalLM.from_book(path, n_heads=HEADS, lora_scale=1.0)


@pytest.mark.parametrize("scale", [True, "2", float("nan"), float("inf")])
def test_a_scale_that_is_no_finite_number_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match="it must be a finite number"):
        GPTScratchForCausalLM.from_book(adapt(plain()).state_dict(), n_heads=HEADS, lora_scale=scale)


def test_a_scale_whose_merged_weights_overflow_is_named(tmp_path):
    state_dict = randomize(adapt(plain())).state_dict()
    path = saved(tmp_path / "lora.pth", state_dict)
    with pytest.raises(ValueError, match=r"the state dict has adapters that, merged with lora_scale=1e\+39, exceed"):
        GPTScratchForCausalLM.from_book(state_dict, n_heads=HEADS, lora_scale=1e39)
    assert "merged with lora_scale=1e+39, exceed torch.float32" in refusal(path, n_heads=HEADS, lora_scale=1e39)


def in_a_list(state_dict, *sizes):
    """The same projections as heads of these sizes, layer by layer."""
    found = {name: tensor for name, tensor in state_dict.items() if ".att.W_" not in name}
    for name in state_dict.keys() - found.keys():
        layer = int(name.split(".")[1])
        for i, part in enumerate(state_dict[name].split(sizes[layer])):
            found[name.replace(".att.", f".att.heads.{i}.")] = part.clone()
    return found


def test_heads_that_no_gpt2_has_are_refused(tmp_path):
    state_dict = plain().state_dict()
    size, layers = E // HEADS, len(plain().trf_blocks)
    even = in_a_list(state_dict, *[[size] * HEADS] * layers)
    assert error_of(GPTScratchForCausalLM.from_book(even), plain_with(state_dict)) < BOUND
    uneven = [size + 1, size - 1, *[size] * (HEADS - 2)]
    for name, heads in {
        "uneven": in_a_list(state_dict, *[uneven] * layers),
        "fewer in one layer": in_a_list(state_dict, *[[size] * HEADS] * (layers - 1), [E]),
        "one missing": {name.replace("heads.1.", "heads.7."): tensor for name, tensor in even.items()},
        "dense in one layer": {n: t for n, t in even.items() if "trf_blocks.1.att.heads" not in n}
        | {n: t for n, t in state_dict.items() if "trf_blocks.1.att" in n},
    }.items():
        with pytest.raises(ValueError, match=r"has heads in a list, but trf_blocks"):
            GPTScratchForCausalLM.from_book(heads)
        assert "has heads in a list, but trf_blocks" in refusal(saved(tmp_path / f"{name}.pth", heads))


def plain_with(state_dict):
    model = plain()
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("trf_blocks.0.att.qkv.weight", (3 * E, E)),
        ("trf_blocks.0.att.proj.weight", (E, E)),
        ("trf_blocks.0.norm1.weight", (E,)),
        ("trf_blocks.0.att.W_query", (E, E)),
    ],
)
def test_two_tensors_for_one_are_refused(tmp_path, name, shape):
    state_dict = {**plain().state_dict(), name: torch.randn(shape)}
    assert "has two tensors for" in refusal(saved(tmp_path / "model.pth", state_dict), n_heads=HEADS)
    with pytest.raises(ValueError, match=f"has two tensors for .*{re.escape(name)}"):
        GPTScratchForCausalLM.from_book(state_dict, n_heads=HEADS)


class Windowed(MultiHeadAttention):
    """Attends to the last 8 tokens alone."""

    def forward(self, x):
        b, t, _ = x.shape
        layers = (self.W_query, self.W_key, self.W_value)
        queries, keys, values = (W(x).view(b, t, self.num_heads, -1).transpose(1, 2) for W in layers)
        distance = torch.arange(t)[:, None] - torch.arange(t)
        scores = (queries @ keys.transpose(2, 3) / self.head_dim**0.5).masked_fill(
            (distance < 0) | (distance >= 8), -torch.inf
        )
        return self.out_proj((scores.softmax(-1) @ values).transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize("small", [False, True])
def test_a_window_another_epsilon_and_the_exact_gelu_are_seen_in_a_model_in_memory(small):
    def model():
        made = plain()
        if small:  # so that the logits show next to nothing
            for p in made.parameters():
                p.data.mul_(1e-2)
        return made

    other = {"window": model(), "eps": model(), "gelu": model()}
    for block in other["window"].trf_blocks:
        block.att.__class__ = Windowed
    other["eps"].final_norm.eps = 1e-6
    other["gelu"].trf_blocks[0].ff.layers[1] = nn.GELU()
    for name in ("eps", "gelu", *([] if small else ["window"])):
        with pytest.raises(ValueError, match=r"final_norm has eps=1e-06|exact GELU|computes other logits"):
            GPTScratchForCausalLM.from_book(other[name])


# Chapter 6


@pytest.mark.parametrize("kind", ["plain", "fast", "adapted", "without bias"])
def test_chapter_6s_classifier_has_its_logits_on_the_last_token_padding_or_not(tmp_path, kind):
    model, options = classifier(fast() if kind == "fast" else None, 3, bias=kind != "without bias"), {}
    if kind == "adapted":
        model, options = randomize(adapt(model)).eval(), {"lora_scale": 1.5}
    path = saved(tmp_path / "review_classifier.pth", model.state_dict())
    receipt = convert(path, tmp_path / "out", n_heads=HEADS, **options)
    assert receipt["parity"]["passed"] and any("padding or not" in note for note in receipt["notes"])
    padded = IDS.clone()
    padded[0, 5:] = VOCAB - 1  # as with 50256 in the book
    for ours in (
        GPTScratchForSequenceClassification.from_pretrained(tmp_path / "out"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        GPTScratchForSequenceClassification.from_book(path, n_heads=HEADS, **options),
        GPTScratchForSequenceClassification.from_book(model, **options),
    ):
        assert ours.config.num_labels == 3 and ours.config.book_classifier
        for ids in (IDS, padded, IDS[:1]):
            assert error_of(ours, model, ids) < BOUND
            assert torch.equal(ours(ids, torch.ones_like(ids)).logits, ours(ids).logits)
        with pytest.raises(ValueError, match=r"attention_mask that hides tokens, but the book's classifier reads"):
            ours(padded, attention_mask=padded != VOCAB - 1)
        with pytest.raises(ValueError, match="attention_mask that hides tokens"):
            ours(IDS, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool).tril())
        loss = ours(padded, labels=torch.tensor([1, 2])).loss
        torch.testing.assert_close(loss, nn.functional.cross_entropy(model(padded)[:, -1], torch.tensor([1, 2])))
        loss.backward()
        assert kind == "without bias" or ours.score.bias.grad.abs().max() > 0


def test_the_official_pooling_and_a_head_without_bias_are_not_the_books(tmp_path):
    """The mutation twins of the test above."""
    model = classifier()
    ours = GPTScratchForSequenceClassification.from_book(model)
    padded = IDS.clone()
    padded[:, 5:] = VOCAB - 1
    with torch.no_grad():
        ours.config.book_classifier, ours.config.pad_token_id = False, VOCAB - 1
        assert error_of(ours, model, padded) > 1e-2
        ours.config.book_classifier = True
        ours.score.bias.zero_()
        assert error_of(ours, model, padded) > 1e-2


def test_what_is_saved_of_a_classifier_is_a_classifier_and_no_other_format_takes_it(tmp_path):
    model = classifier()
    path = saved(tmp_path / "review_classifier.pth", model.state_dict())
    ours = GPTScratchForSequenceClassification.from_book(path, n_heads=HEADS)
    ours.save_pretrained(tmp_path / "saved")
    assert error_of(GPTScratchForSequenceClassification.from_pretrained(tmp_path / "saved"), model) < BOUND
    convert(path, tmp_path / "out", n_heads=HEADS)
    with pytest.raises(ConversionError, match=r"book_classifier=True, but gpt2 supports only False.*keep the native"):
        export(tmp_path / "out", tmp_path / "official", "gpt2")
    with pytest.raises(ConversionError, match="book_classifier=True, but gpt2 supports only False"):
        export(path, tmp_path / "official", "gpt2", n_heads=HEADS)
    for format in ("book", "nanogpt", "gguf", "llmc", "onnx"):
        told = f"holds a {type(ours).__name__}, but '{format}' stores language models alone; keep the native directory"
        with pytest.raises(ConversionError, match=told):
            export(tmp_path / "out", tmp_path / "official", format)
    for save in (ours.to_gpt2, ours.config.to_gpt2, lambda: ours.save_as_gpt2(tmp_path / "official")):
        with pytest.raises(ValueError, match="the official classifier has no bias"):
            save()
    assert not (tmp_path / "official").exists()
    for kind, message in ((GPTScratchForCausalLM, "chapter 6's classifier"), (GPTScratchModel, "chapter 6's")):
        with pytest.raises(ValueError, match=message):
            kind.from_book(path, n_heads=HEADS)
    with pytest.raises(ValueError, match=r"this is a language model.*num_labels=2"):
        GPTScratchForSequenceClassification.from_book(plain())


# What is no GPT-2


def without(state_dict, pattern):
    return {name: tensor for name, tensor in state_dict.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda d: {n: t[:8] if re.search("W_(key|value)", n) else t for n, t in d.items()},
            r"W_key of shape \[8, 24\], so its heads share keys and values; .* cannot be converted",
        ),
        (lambda d: d | {"trf_blocks.0.att.W_DKV.weight": torch.ones(8, E)}, "latent attention"),
        (lambda d: d | {"trf_blocks.0.ff.gate.weight": torch.ones(8, E)}, "has experts"),
        (lambda d: without(d, r"pos_emb|shift"), "RMSNorm and rotary positions"),
        (lambda d: d | {"out_head.bias": torch.ones(VOCAB)}, "output head has no bias"),
        (lambda d: d | {"out_head.weight": torch.ones(VOCAB + 3, E)}, "more than there are tokens"),
        (lambda d: without(d, "final_norm"), "lacks 'final_norm|1 tensors missing|2 tensors missing"),
    ],
)
def test_what_is_no_gpt2_is_refused_by_its_true_reason(tmp_path, change, told):
    path = saved(tmp_path / "model.pth", change(plain().state_dict()))
    assert re.search(told, refusal(path, n_heads=HEADS))
    with pytest.raises(ValueError, match=told):
        GPTScratchForCausalLM.from_book(path, n_heads=HEADS)


# The command


def test_a_book_model_with_another_activation_is_converted_with_that(tmp_path):
    model = plain()
    for block in model.trf_blocks:
        block.ff.layers[1] = nn.GELU()
    path = saved(tmp_path / "model.pth", model.state_dict())
    for options, close in (({}, False), ({"activation_function": "gelu"}, True)):
        convert(path, tmp_path / "out", n_heads=HEADS, overwrite=True, **options)
        assert (error_of(GPTScratchForCausalLM.from_pretrained(tmp_path / "out"), model) < BOUND) == close
    config = GPTScratchConfig.from_book({**CFG, "qkv_bias": True}, activation_function="gelu")
    assert error_of(GPTScratchForCausalLM.from_book(model, config), model) < BOUND


def test_the_command_asks_only_for_what_the_file_does_not_tell(tmp_path):
    model = classifier(randomize(adapt(plain())).eval())
    path = saved(tmp_path / "lora.pth", model.state_dict())
    command = ["convert", str(path), str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--n-heads", "3", "--lora-scale", "1.5"])
    assert done.exit_code == 0, done.output
    assert "chapter 6's classifier" in " ".join(done.output.split())
    assert error_of(GPTScratchForSequenceClassification.from_pretrained(tmp_path / "out"), model) < BOUND
    assert json.loads((tmp_path / "out/config.json").read_text())["book_classifier"] is True


def test_read_gives_what_convert_writes(tmp_path):
    model = fast()
    config, state_dict = read(saved(tmp_path / "model.pth", model.state_dict()), n_heads=HEADS)
    assert isinstance(config, GPTScratchConfig)
    assert error_of(GPTScratchForCausalLM.from_book(state_dict, config), model) < BOUND


# The other commands


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", ""])
@pytest.mark.parametrize("place", ["state", "model", None])
def test_compare_finds_a_classs_weights_where_convert_finds_them(tmp_path, prefix, place):
    model = fast()
    content = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = saved(tmp_path / "model.pth", {"epoch": 2, place: content} if place else content)
    convert(path, tmp_path / "out", n_heads=HEADS)
    (tmp_path / "fast.py").write_text("from book import fast\n\nmade = fast()\n")
    with torch.no_grad():
        own = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    torch.save(own, tmp_path / "zeros.pth")
    command = ["compare", str(tmp_path / "out"), f"{tmp_path / 'fast.py'}:made", "--weights"]
    assert CliRunner().invoke(app, [*command, str(path)]).exit_code == 0
    assert CliRunner().invoke(app, [*command, str(tmp_path / "zeros.pth")]).exit_code == 3


def test_a_classifier_of_the_books_is_inspected_and_compared(tmp_path):
    model = classifier()
    convert(saved(tmp_path / "model.pth", model.state_dict()), tmp_path / "one", n_heads=HEADS)
    with torch.no_grad():
        model.out_head.bias += 1
    convert(saved(tmp_path / "model.pth", model.state_dict()), tmp_path / "other", n_heads=HEADS)
    for command, status in (
        (["inspect", "one"], 0),
        (["compare", "one", "one"], 0),
        (["compare", "one", "other"], 3),
        (["explain", "score.bias", "--model", "one"], 0),
    ):
        command = [str(tmp_path / word) if word in ("one", "other") else word for word in command]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == status, done.output


def test_an_unknown_prefix_is_named_and_nothing_is_called_tied(caplog):
    model = randomize(plain())
    state = {f"net.base.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks the matrix tok_emb\.weight.*take off the prefix 'net\.base\.'"):
        GPTScratchForCausalLM.from_book(state, n_heads=HEADS)
    assert "tied" not in caplog.text
    there = {name.removeprefix("net.base."): tensor for name, tensor in state.items()}
    assert error_of(GPTScratchForCausalLM.from_book(there, n_heads=HEADS), model.eval()) < BOUND


def test_positions_that_the_model_does_not_have_send_to_compare():
    model = randomize(plain()).eval()
    forward = model.pos_emb.forward
    model.pos_emb.forward = lambda positions: forward(positions + 1)
    with pytest.raises(ValueError, match=rf"does not run on {CONTEXT} token ids.*IndexError.*hf-gpt-scratch compare"):
        GPTScratchForCausalLM.from_book(model)


def test_the_drop_rate_that_no_file_tells_is_noted(tmp_path):
    path = saved(tmp_path / "model.pth", randomize(plain()).state_dict())
    receipt = convert(path, tmp_path / "out", n_heads=HEADS)
    assert further_notes(receipt) == []
    [note] = receipt["notes"]
    assert GPTScratchForCausalLM.from_pretrained(tmp_path / "out").config.drop_rate == 0.1
    assert "from_pretrained(directory, drop_rate=0.0)" in note
    assert GPTScratchForCausalLM.from_pretrained(tmp_path / "out", drop_rate=0.0).model.drop_emb.p == 0.0
