"""Which model is judged, with which weights, and what is asked where a model cannot be read by itself."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from book import CONTEXT, HEADS, LAYERS, VOCAB, E, adapt, plain
from pairs import random_gpt2
from test_zoo import SIZES, source_of

sys.path.insert(0, str(Path(__file__).parent))
from zoo.styles import FUSED, STYLES, Style

from hf_gpt_scratch import LabError, compare
from hf_gpt_scratch.lab.building import concept

BOOK, NANO = STYLES["book"].text, STYLES["nanoGPT"].text
CFG = dict(vocab_size=211, context_length=48, emb_dim=48, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
SCHEMA = Path(__file__).parents[2] / "docs" / "compare.schema.json"


@pytest.fixture(scope="module")
def official():
    return random_gpt2(**SIZES)


@pytest.fixture
def compared(official, tmp_path):
    def run(text, *changes, target="GPT", **options):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return compare(official, source_of(Style(text, ("", ""), target), tmp_path), **options)

    return run


def own(text):
    """A style's class, as a notebook's cell defines it."""
    names = {"__name__": "cell"}
    exec(text, names)
    return names["GPT"]


# Whose weights


def test_what_a_function_returns_is_judged_with_its_own_weights(compared):
    load = BOOK + "\n\ndef load(cfg):\n    return GPT(cfg)\n"
    comparison = compared(load, target="load")
    assert not comparison.same, "it loaded nothing"
    assert any("judged with its own weights" in note for note in comparison.notes)
    assert compared(load, target="load", weights="reference").same


@pytest.mark.slow
def test_a_loaders_mistake_is_found(compared, official, tmp_path):
    torch.save(official.state_dict(), tmp_path / "gpt2.pth")
    loader = f"""
import re


def load(config):
    model, own = GPT(config), {{}}
    for name, tensor in torch.load({str(tmp_path / "gpt2.pth")!r}).items():
        own[name] = tensor.T if re.search("(c_attn|c_proj|c_fc).weight", name) else tensor
    model.load_state_dict(own, strict=False)
    return model
"""
    assert compared(NANO + loader, target="load").same
    wrong = compared(NANO + loader, ("(c_attn|c_proj|c_fc)", "(c_attn|mlp.c_proj|c_fc)"), target="load")
    assert not wrong.same and wrong.diagnosis.names == ["not-transposed"]


def test_a_class_is_told_what_was_done_to_it(compared):
    notes = " ".join(compared(BOOK, ("qkv_bias=False", "qkv_bias=True")).notes)
    assert "copied into 37 parameters" in notes and "its forward pass alone is tested" in notes


@pytest.mark.slow
def test_models_and_classes_in_memory_are_compared(official):
    made = own(BOOK)
    assert compare(official, made).same
    model = made(CFG).eval()
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.tensor([[1, 2, 3]])).sum()
    loss.backward()
    gradient = model.out_head.weight.grad.clone()
    assert not compare(official, model).same, "a model is judged with its own weights"
    assert compare(official, model, weights="reference").same
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.out_head.weight.grad, gradient) and model.out_head.weight.requires_grad
    assert compare(official, copy.deepcopy(official)).same
    assert compare(official, lambda: copy.deepcopy(official)).same
    half = compare(official, copy.deepcopy(official).bfloat16())
    assert half.diagnosis.names == ["rounded-weights"] and any("as a copy" in note for note in half.notes)


def test_a_function_of_ones_own_calls_the_model(official):
    made = own(BOOK.replace("def forward(self, in_idx):", "def forward(self, in_idx, mask):"))
    with pytest.raises(LabError, match=r"requires 'mask'.*my_forward=run"):
        compare(official, made)
    assert compare(official, made, my_forward=lambda model, ids: model(ids, None)).same


def test_the_result_shows_itself_in_a_notebook(official):
    assert "The same model" in compare(official, own(BOOK))._repr_html_()


# What GPT-2 does not have


HEAD_BIAS = ('cfg["vocab_size"], bias=False', 'cfg["vocab_size"]')


def test_a_parameter_beyond_gpt2_is_found_and_told(compared):
    comparison = compared(BOOK, HEAD_BIAS)
    assert not comparison.same and comparison.extras == ["out_head.bias"]
    assert comparison.diagnosis.names == ["extra-parameters"] and comparison.diagnosis.explained
    assert comparison.diagnosis.faults[0].error < 1e-12, "without it, it is the same"
    assert any("does not have: out_head.bias" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("size", "names"),
    {
        "emb_dim": "ninp channels C decoder_embed_dim",
        "context_length": "maxT T max_target_positions",
        "n_inner": "nhid d_hid decoder_ffn_embed_dim",
    }.items(),
)
def test_sizes_are_known_by_these_names_too(size, names):
    assert {concept(name) for name in names.split()} == {size}


def test_objects_and_trees_in_memory_are_judged_with_their_own_weights_and_left_as_they_are(official):
    namespace: dict = {}
    exec(STYLES["a tree of tensors"].text, namespace)
    made = namespace["GPT"](211, 48, 48, 2, 3)
    for given, options in ((made, {}), (made.params, {"my_forward": namespace["apply"]})):
        comparison = compare(official, given, **options)
        assert not comparison.same
        assert {fault.kind for fault in comparison.diagnosis.faults} == {"weights"}
        assert any("is a model, which is judged with its own weights" in note for note in comparison.notes)
    assert type(made.params["wte"]) is torch.Tensor
    with pytest.raises(LabError, match="a dict has no weights"):
        compare(official, {"n_layer": 2})


@pytest.mark.slow
def test_the_neutral_values_of_what_gpt2_lacks_are_those_that_explain_the_rest(compared):
    """With another mistake, the logits may be as close to the reference's, or closer, with ones in a bias."""
    comparison = compared(BOOK, HEAD_BIAS, ("return self.out_head(x)", "return torch.relu(self.out_head(x))"))
    assert comparison.diagnosis.names == ["extra-parameters", "not-logits"]
    assert comparison.diagnosis.explained and "must be out_head.bias zeros" in comparison.diagnosis.faults[0].remedy


@pytest.mark.slow
def test_a_parameter_beyond_gpt2_hides_no_other_mistake(compared):
    comparison = compared(NANO, ("config.vocab_size, bias=False", "config.vocab_size"), STYLES["nanoGPT"].mistake)
    assert comparison.diagnosis.names == ["extra-parameters", "exact-gelu"]


def test_a_bias_of_zeros_is_judged_too(official):
    """The model's own weights have it at zero, so that the logits are equal; still it is no GPT-2."""
    made = own(BOOK.replace(*HEAD_BIAS))
    model = made(CFG).eval()
    with torch.no_grad():
        model.out_head.bias.zero_()
    state = {name: tensor for name, tensor in model.state_dict().items() if "mask" not in name}
    with_reference = compare(official, own(BOOK), my_forward=keep(kept := []))
    assert with_reference.same
    model.load_state_dict(kept[0].state_dict() | {"out_head.bias": state["out_head.bias"]})
    comparison = compare(official, model)
    assert comparison.equivalent and not comparison.same
    assert "GPT-2 does not have" in comparison.verdict and "out_head.bias" in comparison.verdict


def keep(kept):
    """A forward that also hands the model out."""

    def run(model, input_ids):
        kept[:] = [model]
        return model(input_ids)

    return run


def test_parameters_that_do_nothing_and_constants_are_no_difference(compared):
    unused = ("self.drop_emb =", 'self.value_head = nn.Linear(cfg["emb_dim"], 1)\n        self.drop_emb =')
    comparison = compared(BOOK, unused)
    assert comparison.same and any("value_head.weight" in note for note in comparison.notes)
    mask = "torch.tril(ones).view(1, 1, config.block_size, config.block_size)"
    constant = (f'self.register_buffer("bias", {mask})', f"self.bias = nn.Parameter({mask}, requires_grad=False)")
    assert compared(NANO, constant, ("flash: bool = True", "flash: bool = False")).same


def test_blocks_that_are_one_object_are_called_so(compared):
    several = 'nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])'
    comparison = compared(BOOK, (several, 'nn.Sequential(*[TransformerBlock(cfg)] * cfg["n_layers"])'))
    assert comparison.diagnosis.names == ["shared-blocks"]
    assert "one object" in comparison.diagnosis.faults[0].says


# Gradients


@pytest.mark.slow
def test_a_detached_gradient_is_a_difference(compared):
    detached = ("self.att(self.norm1(x))", "self.att(self.norm1(x)).detach()")
    comparison = compared(BOOK, detached)
    assert not comparison.same and comparison.equivalent
    assert comparison.verdict.startswith("different gradients")
    assert comparison.diagnosis.names == ["no-gradient"]
    assert "att.W_query" in comparison.diagnosis.faults[0].says and "ff" not in comparison.diagnosis.faults[0].says
    unchecked = compared(BOOK, detached, gradients=False)
    assert unchecked.same and "gradients not compared" in unchecked.verdict
    assert "gradients agree" in compared(BOOK).verdict


def test_a_forward_pass_without_gradients_is_a_difference(compared):
    comparison = compared(
        BOOK, ("    def forward(self, in_idx):", "    @torch.no_grad()\n    def forward(self, in_idx):")
    )
    assert not comparison.same and comparison.diagnosis.names == ["no-gradient"]


def test_frozen_models_are_compared_as_if_they_were_not(official):
    frozen = copy.deepcopy(official).requires_grad_(False)
    assert compare(official, frozen).same
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


def test_nan_in_both_is_no_agreement(official):
    broken = copy.deepcopy(official)
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = math.nan
    assert not compare(broken, copy.deepcopy(broken)).same


# Lengths


@pytest.mark.parametrize(
    "changes",
    [
        [("x = self.drop_emb(x)", "x = x if seq_len < 30 else 2 * x")],
        [("x = self.drop_emb(x)", "x = x if seq_len > 1 else 2 * x")],
        [("self.mask.bool()[:num_tokens", "(self.mask * (num_tokens < 48)).bool()[:num_tokens")],
    ],
)
def test_what_is_wrong_at_some_lengths_alone_is_different(compared, changes):
    assert not compared(BOOK, *changes).same


def test_a_model_that_does_not_run_on_all_positions_is_different(compared):
    comparison = compared(BOOK, ("torch.arange(seq_len,", "torch.arange(seq_len + (seq_len == 48),"))
    assert not comparison.same and "does not run on 48 of 48 tokens" in comparison.verdict


@pytest.mark.parametrize("token", [0, 210])
def test_a_token_that_is_treated_in_another_way_is_a_difference(compared, token):
    change = ("x = self.drop_emb(x)", f"x = torch.where((in_idx == {token})[..., None], 0, x)")
    assert not compared(BOOK, change).same


def test_where_a_mistake_begins_is_told(compared):
    change = ("self.out_head(x)", "self.out_head(x) * torch.where(torch.arange(seq_len) < 30, 1.0, 1.5)[:, None]")
    diagnosis = compared(BOOK, change).diagnosis
    assert not diagnosis.explained and "the first 30 tokens of each sequence are reproduced" in diagnosis.note


def test_a_model_that_cannot_be_trained_is_different_unless_the_logits_alone_are_asked_for(compared):
    change = ("x = x + self.drop_shortcut(self.att(self.norm1(x)))", "x += self.drop_shortcut(self.att(self.norm1(x)))")
    comparison = compared(BOOK, change)
    assert not comparison.same and "so it cannot be trained: RuntimeError" in comparison.verdict
    assert compared(BOOK, change, gradients=False).same
    with pytest.raises(LabError, match="--no-gradients compares the logits alone"):
        compared(BOOK, change, gradients=True)


# What is asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "changes", "question", "answer"),
    [
        (STYLES["a mask in forward"].text, [], r"requires 'mask'.*--forward run", {"my_forward": "run"}),
        (
            FUSED,
            [("dim, depth, heads):", "dim, depth, heads, zorp):")],
            r"needs zorp.*--cfg '{\"zorp\"",
            {"cfg": '{"zorp": 3}'},
        ),
        (
            BOOK + "\n\ndef run(model, ids):\n    return model(ids) @ model.out_head.weight.T\n",
            [("return self.out_head(x)\n", "return x\n")],
            r"returns \(2, 24, 48\) instead of logits.*--forward run",
            {"my_forward": "run"},
        ),
        (
            BOOK + "\n\ndef run(model, ids):\n    return model(ids)[1]\n",
            [("return self.out_head(x)\n", "x = self.out_head(x)\n        return 2 * x, x\n")],
            r"several tensors that may be the logits.*--forward run",
            {"my_forward": "run"},
        ),
        (
            BOOK + "\n\ndef run(model, ids):\n    return torch.stack([model(row) for row in ids])\n",
            [
                ("batch_size, seq_len = in_idx.shape", "(seq_len,) = in_idx.shape\n        in_idx = in_idx[None]"),
                ("return self.out_head(x)\n", "return self.out_head(x)[0]\n"),
            ],
            r"does not run on tokens.*--forward run",
            {"my_forward": "run"},
        ),
    ],
)
def test_the_answer_to_a_question_is_enough(compared, text, changes, question, answer):
    with pytest.raises(LabError, match=question):
        compared(text, *changes)
    assert compared(text, *changes, **answer).same


def test_a_size_that_is_misunderstood_is_told_by_the_failing_run(compared):
    text = FUSED.replace("max_len", "blocks") + "\n\ndef made():\n    return GPT(211, 48, 48, 2, 3)\n"
    letters = [(name, f"self.x{i}") for i, name in enumerate(("self.pre_attention", "self.pre_mlp", "self.embed"))]
    with pytest.raises(LabError, match=r"It does not run on tokens .*IndexError.*a function without arguments"):
        compared(text, *letters, ("self.to_logits", "self.x9"))
    assert compared(text, *letters, target="made", weights="reference").same


# The figures


def misfits(value, schema, place="figures"):
    """Why a value does not fit a schema, of which it must have every property and no other."""
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "null": type(None)}
    kinds |= {"boolean": bool, "integer": int}
    allowed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not isinstance(value, tuple(kinds[kind] for kind in allowed if kind != "number")) and not (
        "number" in allowed and isinstance(value, int | float)
    ):
        return [f"{place}: {value!r} is no {allowed}"]
    found = []
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        found += [f"{place} lacks {name}" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if (wanted := inner.get(name) or schema.get("additionalProperties")) is None:
                found.append(f"{place}.{name} is not in the schema")
            else:
                found += misfits(item, wanted, f"{place}.{name}")
    for item in value if isinstance(value, list) else []:
        found += misfits(item, schema["items"], f"{place}[]")
    return found


@pytest.mark.slow
def test_the_figures_have_the_documented_schema(compared):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for changes in (
        [],
        [STYLES["book"].mistake],
        [HEAD_BIAS],
        [("return self.out_head(x)", "return self.out_head(x) / 0")],
    ):
        figures = json.loads(json.dumps(compared(BOOK, *changes).to_dict(), allow_nan=False))
        assert not misfits(figures, schema)
    assert misfits({**figures, "more": 1}, schema) and misfits({**figures, "same": "yes"}, schema)


def test_adapters_are_to_be_merged_and_a_directory_of_ones_own_is_for_weights(tmp_path):
    reference = random_gpt2(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=E, n_head=HEADS, n_layer=LAYERS)
    reference.save_pretrained(tmp_path / "official")
    adapted = adapt(plain())
    with pytest.raises(LabError, match=r"has adapters, .*lora.*hf-gpt-scratch convert"):
        compare(str(tmp_path / "official"), adapted)
    config = json.loads((tmp_path / "official/config.json").read_text())
    (tmp_path / "official/config.json").write_text(json.dumps({**config, "model_type": "gpt_rotary"}))
    with pytest.raises(LabError, match=rf"'gpt_rotary'.*my\.py:MyModel.* by --weights {tmp_path}/official"):
        compare(str(tmp_path / "official"), str(tmp_path / "official"))
