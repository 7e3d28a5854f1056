"""ONNX: a graph with a cache, which computes in onnxruntime what the model computes; checked before it is published."""

import json
import sys
from functools import partial

import onnx
import onnxruntime
import onnxruntime.quantization
import pytest
import torch
from pairs import CONTEXT, LAYERS, VOCAB, random_gpt2, random_ids, random_pair, tiny_model
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchForCausalLM, convert, export
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.weights.formats import detect, read, write
from hf_gpt_scratch.weights.formats import onnx as onnx_format
from hf_gpt_scratch.weights.formats.onnx import DATA, FOLDER, GRAPH, INT8, ONNX, Session, positions
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = pytest.mark.slow
STATES = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]


def exported(model, directory, **options):
    """The receipt of an export to `directory/out`, from a native directory."""
    model.save_pretrained(directory / "mine")
    return export(directory / "mine", directory / "out", "onnx", **options)


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    """The official model, and the directory of its export with int8."""
    place = tmp_path_factory.mktemp("onnx")
    gpt2, ours = random_pair(tie_word_embeddings=request.param == "tied")
    receipt = exported(ours, place, quantize="int8")
    assert receipt["parity"]["passed"] and receipt["parity"]["greedy_tokens"] == onnx_format.NEW_TOKENS >= 20
    return gpt2, place / "out"


def session(directory, name=GRAPH):
    return Session(directory / FOLDER / name, GPTScratchForCausalLM.from_pretrained(directory.parent / "mine").config)


def left_padded(batch, length):
    """Ids, and a mask that hides the first half of the first row."""
    ids, mask = random_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    return ids, mask


def test_names_axes_and_files_are_those_of_transformers_js(pair):
    _, directory = pair
    run = onnxruntime.InferenceSession(directory / FOLDER / GRAPH)
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    inputs = {"input_ids": [batch, new], "attention_mask": [batch, total], "position_ids": [batch, new]}
    inputs |= {f"past_key_values.{state}": [batch, 4, past, 12] for state in STATES}
    assert {value.name: value.shape for value in run.get_inputs()} == inputs
    outputs = {"logits": [batch, new, VOCAB]}
    outputs |= {f"present.{state}": [batch, 4, f"{past} + {new}", 12] for state in STATES}
    assert {value.name: value.shape for value in run.get_outputs()} == outputs
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert [config[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")] == [LAYERS, 4, 48, CONTEXT]
    assert config["transformers.js_config"] == {"use_external_data_format": {GRAPH: 1, INT8: 1}}
    assert {path.name for path in (directory / FOLDER).iterdir()} == {GRAPH, GRAPH + DATA, INT8, INT8 + DATA}
    assert (directory / "generation_config.json").is_file()
    onnx.checker.check_model(directory / FOLDER / GRAPH, full_check=True)


@pytest.mark.long
def test_the_default_of_a_page_is_the_only_graph_there_is(tmp_path):
    write(tiny_model(), tiny_model().config, tmp_path / "out", "onnx")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {GRAPH: 1}, "dtype": "fp32"}
    assert {path.name for path in (tmp_path / "out" / FOLDER).iterdir()} == {GRAPH, GRAPH + DATA}


def test_a_graph_says_nothing_of_the_computer_that_made_it(pair):
    data = (pair[1] / FOLDER / GRAPH).read_bytes()
    assert not [word for word in (b".py", b"site-packages", str(pair[1].parent).encode()) if word in data]
    model = onnx.load(pair[1] / FOLDER / GRAPH, load_external_data=False)
    assert [entry.key for entry in model.metadata_props] == [onnx_format.ABOUT]


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "parts"), [(2, [9, 1, 1]), (1, [1] * 5), (5, [3, 8, 2]), (2, [CONTEXT]), (1, [63, 1])]
)
def test_logits_are_the_officials_however_the_tokens_come(pair, batch, parts):
    """Measured: relative error at most 7e-7."""
    gpt2, directory = pair
    run, past, logits, end = session(directory), None, [], 0
    ids, mask = left_padded(batch, sum(parts))
    for part in parts:
        begin, end = end, end + part
        one, past = run(ids[:, begin:end], mask[:, :end], past)
        logits.append(one)
    expected = gpt2(ids, attention_mask=mask, position_ids=positions(mask)).logits
    seen = mask.bool()
    assert relative_error(expected[seen], torch.cat(logits, dim=1)[seen]) <= FP32_LOGITS


@torch.no_grad()
def test_ids_are_those_of_the_official_generate_to_the_end_of_the_context(pair):
    gpt2, directory = pair
    ids, mask = left_padded(2, 6)
    options = dict(max_length=CONTEXT, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = GPT2LMHeadModel.generate(gpt2, ids, attention_mask=mask, **options)
    run, past, new = session(directory), None, ids
    while ids.shape[1] < CONTEXT:
        logits, past = run(new, mask, past)
        new = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    assert torch.equal(ids, expected)
    logits, past = run(new, mask, past)  # row 0 has positions left, and row 1 has none
    with pytest.raises(Exception, match="out of data bounds"):
        run(new, torch.cat([mask, torch.ones_like(new)], dim=1), past)


# Mistakes in the graph, each of which must be noticed before the directory has its name


def replaced(model, wrong, right):
    """The inputs of all nodes, with one name instead of another."""
    for node in model.graph.node:
        node.input[:] = [wrong if name == right else name for name in node.input]


def positions_from_zero(model):
    """The cache moves no position: those of the new tokens count from 0 again."""

    replaced(model, "from_zero", "position_ids")
    nodes = [
        onnx.helper.make_node("Slice", ["position_ids", "zero_", "one_", "one_"], ["first"]),
        onnx.helper.make_node("Sub", ["position_ids", "first"], ["from_zero"]),
    ]
    for number, name in enumerate(("zero_", "one_")):
        model.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor([number]).numpy(), name))
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def padding_is_seen(model):
    [cast] = [node for node in model.graph.node if node.input[0] == "attention_mask"]
    model.graph.node.insert(0, onnx.helper.make_node("Not", ["nothing"], ["all_seen"]))
    model.graph.node.insert(0, onnx.helper.make_node("Xor", ["hidden", "hidden"], ["nothing"]))
    cast.output[0], hidden = "hidden", cast.output[0]
    model.graph.node.remove(cast)
    model.graph.node.insert(0, cast)
    replaced(model, "all_seen", hidden)


def layers_swapped_in_the_cache(model):
    for name, other in (("past_key_values.0.key", "past_key_values.1.key"),):
        replaced(model, "kept", name)
        replaced(model, name, other)
        replaced(model, other, "kept")


def values_for_keys_in_the_cache(model):
    names = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
    for node in model.graph.node:
        for list_of_names in (node.input, node.output):
            list_of_names[:] = [names.get(name, name) for name in list_of_names]


def another_epsilon(model):
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-2


def the_exact_gelu(model):
    for node in model.graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]


@pytest.mark.parametrize(
    "mistake",
    [
        positions_from_zero,
        padding_is_seen,
        layers_swapped_in_the_cache,
        values_for_keys_in_the_cache,
        another_epsilon,
        the_exact_gelu,
    ],
)
def test_a_graph_that_computes_something_else_is_not_published(tmp_path, monkeypatch, mistake):
    trace = onnx_format.graph

    def wrong(settings):
        model = onnx.ModelProto.FromString(trace(settings))
        mistake(model)
        return model.SerializeToString()

    monkeypatch.setattr(onnx_format, "graph", wrong)
    with pytest.raises(ParityError, match=r"onnxruntime computes something else from the graph.*relative"):
        exported(random_pair()[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    exported(random_pair()[1], tmp_path, check=False)  # the file is whole: only running it can show the mistake


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"qkv_bias": False, "n_inner": 80, "tie_word_embeddings": False},
        {"activation_function": "prelu", "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu", "scale_attn_weights": False, "n_heads": 1, "n_layers": 1},
        {"context_length": 1, "activation_function": "relu"},
        {"context_length": 2},
    ],
    ids=str,
)
@pytest.mark.long
def test_every_setting_is_in_the_graph_and_is_read_back(tmp_path, settings):
    model = tiny_model(**settings)
    assert exported(model, tmp_path)["parity"]["greedy_equal"]
    receipt = convert(tmp_path / "out", tmp_path / "back")
    back = GPTScratchForCausalLM.from_pretrained(tmp_path / "back")
    assert receipt["source"]["format"] == "onnx" and back.config.to_diff_dict() == model.config.to_diff_dict()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_and_comes_back(tmp_path, dtype):
    receipt = exported(random_pair()[1].to(dtype), tmp_path)
    assert receipt["parity"]["passed"] and receipt["notes"] == [
        f"the graph is in float32, into which {dtype} fits unchanged"
    ]
    convert(tmp_path / "out", tmp_path / "back")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mine", "back")]
    assert same[0] == same[1]


def test_the_settings_for_generate_go_along(tmp_path):
    model = random_pair()[1]
    model.generation_config.update(temperature=0.7, do_sample=True)
    exported(model, tmp_path, check=False)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.7


def test_the_command_says_what_was_compared(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "official")
    arguments = ["export", str(tmp_path / "official"), str(tmp_path / "out"), "--format", "onnx", "--quantize", "int8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "against the model, in onnxruntime with a cache" in done.output and "24 greedy ids equal" in done.output
    assert "In int8 the logits have a relative error of 2." in done.output


# int8


@torch.no_grad()
def test_int8_has_int8_weights_and_nearly_the_same_logits(pair):
    """Measured: relative error 0.025."""
    gpt2, directory = pair
    model = onnx.load(directory / FOLDER / INT8)
    large = {weight.name: weight.data_type for weight in model.graph.initializer if len(weight.dims) > 1}
    assert set(large.values()) == {onnx.TensorProto.UINT8} and len(large) == 6 * LAYERS + 3
    ids, mask = left_padded(3, 12)
    logits, _ = session(directory, INT8)(ids, mask, None)
    expected = gpt2(ids, attention_mask=mask, position_ids=positions(mask)).logits
    error = relative_error(expected[mask.bool()], logits[mask.bool()])
    assert 1e-4 < error < onnx_format.INT8_LOGITS / 2


def test_int8_that_is_too_far_from_the_model_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "INT8_LOGITS", 0.01)
    with pytest.raises(ParityError, match=r"in int8 the logits have a relative error of 0\.02.*leave --quantize out"):
        exported(random_pair()[1], tmp_path, quantize="int8")
    assert not (tmp_path / "out").exists()


def test_a_quantizer_that_quantizes_nothing_is_noticed(tmp_path, monkeypatch):
    quantize = partial(onnxruntime.quantization.quantize_dynamic, nodes_to_exclude=["node_logits", "node_linear_18"])
    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", quantize)
    with pytest.raises(AssertionError, match="onnxruntime has quantized 18 of 19 matrices"):
        exported(random_pair()[1], tmp_path, quantize="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "quantize"), [("onnx", "int4"), ("gguf", "int8"), ("native", "int8")])
def test_what_no_format_can_quantize_is_refused(tmp_path, format, quantize):
    model = random_pair()[1]
    remedy = "leave quantize out" if quantize == "int4" else "give --format onnx, or leave quantize out"
    told = f"got quantize='{quantize}' for '{format}', but there is only 'int8' for 'onnx'; {remedy}"
    with pytest.raises(ConversionError, match=told):
        write(model, model.config, tmp_path / "out", format, quantize=quantize)


# What is refused


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConversionError, match=rf"needs the package {package} .*pip install 'hf-gpt-scratch\[onnx\]'"):
        exported(random_pair()[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


def test_onnxruntime_is_needed_by_what_runs_it_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for options in ({"quantize": "int8", "check": False}, {}):
        with pytest.raises(ConversionError, match=r"package onnxruntime .*--no-verify"):
            exported(random_pair()[1], tmp_path, **options)
    for check in (False, "weights"):
        exported(random_pair()[1], tmp_path, check=check, overwrite=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    convert(tmp_path / "out", tmp_path / "back")


def test_what_a_graph_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"weights are torch\.float64, but graphs are float32.*model\.float\(\)"):
        exported(random_pair()[1].double(), tmp_path)
    crossed = tiny_model(add_cross_attention=True)
    with pytest.raises(ConversionError, match=r"lacks|has 'trf_blocks|add_cross_attention"):
        write(crossed, crossed.config, tmp_path / "out", "onnx")


def test_an_activation_that_torch_cannot_translate_is_told(tmp_path, monkeypatch):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    monkeypatch.setitem(ACT2FN, "odd", Odd)
    model = tiny_model(activation_function="odd")
    with pytest.raises(
        ConversionError, match=r"torch cannot translate the model into ONNX \(.*special_airy_ai.*activation"
    ):
        write(model, model.config, tmp_path / "out", "onnx")


# Reading


def test_a_checkpoint_with_a_graph_beside_it_is_the_checkpoint(tmp_path):
    """As openai-community/gpt2 has one."""
    random_gpt2().save_pretrained(tmp_path / "both")
    (tmp_path / "both" / FOLDER).mkdir()
    (tmp_path / "both" / FOLDER / GRAPH).write_bytes(b"\x08\x0a")
    assert detect(tmp_path / "both") == "gpt2"


def test_a_graph_alone_and_a_graph_of_another_program_are_told(tmp_path):
    (tmp_path / FOLDER).mkdir()
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / FOLDER / GRAPH)
    with pytest.raises(ConversionError, match="is a graph of ONNX; give the directory that export has written"):
        detect(tmp_path / FOLDER / GRAPH)
    with pytest.raises(ConversionError, match="was not written by hf-gpt-scratch export"):
        detect(tmp_path)


def changed(directory, change):
    """Changes the graph, without its weights."""
    file = directory / FOLDER / GRAPH
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def about(directory, dtype="float32", **config):
    """Changes the graph's metadata."""

    def change(model):
        known = json.loads(model.metadata_props[0].value)
        model.metadata_props[0].value = json.dumps({"config": known["config"] | config, "dtype": dtype})

    changed(directory, change)


def first_weight(model):
    return next(value for value in model.graph.initializer if value.data_location == 1)


def data_changed(directory, change):
    """Changes the weights."""
    file = directory / FOLDER / (GRAPH + DATA)
    file.write_bytes(change(file.read_bytes()))


def elsewhere(directory):
    (directory / "secret").write_bytes((directory / FOLDER / (GRAPH + DATA)).read_bytes())
    changed(directory, lambda model: setattr(first_weight(model).external_data[0], "value", "../secret"))


def settings(directory, **changes):
    """Changes config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "another number of heads": (lambda d: settings(d, n_head=6), "config.json has n_head=6, but the graph 4"),
    "more layers": (lambda d: settings(d, n_layer=4), "n_layer=4, but the graph 3"),
    "another width": (lambda d: settings(d, n_embd=96), "n_embd=96, but the graph 48"),
    "another epsilon": (
        lambda d: settings(d, layer_norm_epsilon=1e-6),
        "layer_norm_epsilon=1e-06, but the graph 1e-05",
    ),
    "the exact GELU": (
        lambda d: settings(d, activation_function="gelu"),
        "activation_function='gelu', but the graph 'gelu_new'",
    ),
    "scores unscaled": (
        lambda d: settings(d, scale_attn_weights=False),
        "scale_attn_weights=False, but the graph True",
    ),
    "an untied head": (lambda d: settings(d, tie_word_embeddings=False), "tie_word_embeddings=False"),
    "settings of a Llama": (lambda d: settings(d, model_type="llama"), "config.json is not that of a GPT-2"),
    "settings of a wrong type": (lambda d: settings(d, n_head="4"), "config.json is not usable"),
    "heads that the graph has not": (lambda d: about(d, n_heads=2), "damaged metadata.*n_heads=2, but its cache has 4"),
    "no weights": (lambda d: (d / FOLDER / (GRAPH + DATA)).unlink(), "is missing, truncated or corrupt"),
    "half the weights": (lambda d: data_changed(d, lambda b: b[:200_000]), "is missing, truncated or corrupt"),
    "more than the weights": (
        lambda d: data_changed(d, lambda b: b + b"x"),
        "has 392449 bytes, but according to its graph 392448",
    ),
    "a NaN": (
        lambda d: data_changed(d, lambda b: b"\0\0\xc0\x7f" + b[4:]),
        "'tok_emb.weight' in .* has 1 values that are NaN",
    ),
    "half the graph": (
        lambda d: (d / FOLDER / GRAPH).write_bytes((d / FOLDER / GRAPH).read_bytes()[:9000]),
        "is truncated or corrupt|was not written by",
    ),
    "an empty graph": (lambda d: (d / FOLDER / GRAPH).write_bytes(b""), "was not written by hf-gpt-scratch export"),
    "weights elsewhere": (elsewhere, "'tok_emb.weight' is of another type, or lies elsewhere"),
    "another shape": (
        lambda d: changed(d, lambda m: first_weight(m).dims.__setitem__(0, 1 << 60)),
        "is of another type, or lies elsewhere",
    ),
    "a weight less": (
        lambda d: changed(d, lambda m: setattr(first_weight(m), "name", "other")),
        "lacks 'tok_emb.weight' and has 'other'",
    ),
    "other heads": (lambda d: about(d, n_heads=5), "has damaged metadata.*n_heads"),
    "other layers": (lambda d: about(d, n_layers=2), "has .*trf_blocks.2"),
    "a million layers": (lambda d: about(d, n_layers=1_000_000), "n_layers=1000000, but it holds"),
    "no number of layers": (lambda d: about(d, n_layers="3"), "has damaged metadata"),
    "an unknown dtype": (lambda d: about(d, dtype="int8"), "has damaged metadata"),
    "another dtype": (lambda d: about(d, dtype="bfloat16"), r"has values that torch\.bfloat16 has not"),
    "no metadata": (
        lambda d: changed(d, lambda m: setattr(m.metadata_props[0], "value", "{")),
        "has damaged metadata",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused(tmp_path, damage):
    model = random_pair()[1]
    write(model, model.config, tmp_path / "out", "onnx")
    change, told = DAMAGES[damage]
    config, _ = read(tmp_path / "out")
    assert config.to_diff_dict() == model.config.to_diff_dict()
    change(tmp_path / "out")
    with pytest.raises(ConversionError, match=told):
        read(tmp_path / "out")
    with pytest.raises(ConversionError, match=told):
        convert(tmp_path / "out", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_settings_that_are_not_the_graphs_may_change(tmp_path):
    model = random_pair()[1]
    write(model, model.config, tmp_path / "out", "onnx")
    settings(tmp_path / "out", eos_token_id=7, attn_pdrop=0.5, architectures=["GPT2Model"])
    assert read(tmp_path / "out")[0].to_diff_dict() == model.config.to_diff_dict()
    (tmp_path / "out" / "config.json").unlink()
    assert read(tmp_path / "out")[0].to_diff_dict() == model.config.to_diff_dict()


def test_verify_and_compare_say_what_to_do_with_a_graph(tmp_path):
    _, model = random_pair()
    exported(model, tmp_path, check=False)
    mine, graph = str(tmp_path / "mine"), str(tmp_path / "out")
    for command in ("verify", "compare"):
        for pair in ([graph, mine], [mine, graph]):
            done = CliRunner().invoke(app, [command, *pair])
            assert done.exit_code == 1 and f"hf-gpt-scratch convert {graph} TARGET" in " ".join(done.output.split())
    convert(graph, tmp_path / "back")
    assert CliRunner().invoke(app, ["verify", mine, str(tmp_path / "back")]).exit_code == 0


def test_weights_that_change_while_they_are_read_are_noticed(tmp_path, monkeypatch):
    """Those in the folder, too."""
    model = random_pair()[1]
    write(model, model.config, tmp_path / "out", "onnx")
    reads, data = ONNX.read, tmp_path / "out" / FOLDER / (GRAPH + DATA)

    def changed_meanwhile(*arguments):
        contents = reads(*arguments)
        data.write_bytes(data.read_bytes())
        return contents

    monkeypatch.setattr(ONNX, "read", changed_meanwhile)
    with pytest.raises(ConversionError, match="has changed while it was read"):
        convert(tmp_path / "out", tmp_path / "back")
