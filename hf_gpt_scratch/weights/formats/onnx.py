"""ONNX with a cache, in the files and names that transformers.js, onnxruntime and OpenVINO expect.

One graph, for a prompt and for the tokens after it. B batch, T new tokens, P tokens in the cache, H heads, D head
dimension:

| input | shape | output | shape |
| --- | --- | --- | --- |
| `input_ids`, `position_ids` | (B, T) | `logits` | (B, T, vocab_size) |
| `attention_mask` | (B, P + T) | `present.{n}.key`, `present.{n}.value` | (B, H, P + T, D) |
| `past_key_values.{n}.key`, `past_key_values.{n}.value` | (B, H, P, D), P = 0 for a prompt | | |

transformers' own exporters are not used: they exist since 5.14 only, have other names for inputs and outputs, and need
the whole model in memory. torch's exporter, which they call, is given the weights as inputs instead, so that it sees
their shapes alone; they then become initializers, under the book's names, whose values are streamed into a file.
"""

import hashlib
import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GPT2Config

from ...errors import ConversionError, ParityError, shortened
from ...model.config_translation import model_type_of
from ...model.configuration_gpt_scratch import GPTScratchConfig
from ...model.modeling_gpt_scratch import GPTScratchForCausalLM
from ...model.weight_map import BASE, LM_HEAD, SCRATCH_PREFIX, Row
from ...tokenizer import complete_tokenizer
from ..checkpoint import Progress, check_settings, holds_weights, parse_json, read_part, refuse_special_file
from ..parity import FP32_LOGITS, LogitParity, Verification, logit_parity, probe_ids, warm_up
from ..tensors import LazyTensor
from .directory import MAX_LAYERS, config_of, generation_settings, meta_model
from .format import DTYPES, Contents, Format, Found, Layout, Options, Source, Written, check_tensors, finite

# transformers.js's folder for graphs, its names for those in float32 and in int8 ("q8"), and its suffix for weights.
FOLDER, GRAPH, INT8, DATA = "onnx", "model.onnx", "model_quantized.onnx", "_data"
ABOUT = "hf_gpt_scratch"  # the graph's metadata that say what was exported
LARGEST_GRAPH = 1 << 26  # bytes; that of 48 layers, without its weights, has 1 MB
# Transposed, as ONNX's MatMul takes them; otherwise the book's tensors under the book's names.
LAYOUT = Layout(
    tuple(
        Row(name, (name,), row.transposed, row.meaning)
        for row in (*BASE, LM_HEAD)
        if "cross" not in row.theirs
        for name in row.ours
    ),
    stores_qkv_biases=False,
)
# Greedy tokens that are compared with the model's, after prompts of this length.
NEW_TOKENS, PROMPT = 24, 8
# Of int8 against float32, in the largest logit. Measured: 0.014 on the trained tiny model, 0.025 on a random one, 0.016
# on a random one of 124M's shape.
INT8_LOGITS = 0.25


class Onnx(Format):
    name = "onnx"
    what = "the ONNX directory that export writes"
    layout = LAYOUT
    file = ""
    mark = f"{FOLDER}/{GRAPH}"
    tokenizer = "beside"
    quantizes = ("int8",)

    def matches(self, found: Found) -> bool:
        return found.is_directory and (found.path / self.mark).is_file() and not holds_weights(found.path)

    def near(self, found: Found) -> str | None:
        if not found.is_directory and found.path.suffix == ".onnx":
            return f"{found.path} is a graph of ONNX; give the directory that export has written"
        return None

    def open(self, found: Found) -> Source:
        graph, about = _read_graph(found.path / self.mark)
        files = [found.path / self.mark, found.path / (self.mark + DATA)]
        beside = [
            path for path in found.path.iterdir() if path.is_file() and path.suffix in (".json", ".txt", ".jinja")
        ]
        return Source(self, found.path, _stored(graph, files[1], about["dtype"]), about, files=[*files, *beside])

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        config, path = source.metadata["config"], source.path
        if n_heads not in (None, config.n_heads):
            raise ConversionError(f"got n_heads={n_heads}, but {path} says {config.n_heads}; leave n_heads out")
        check_tensors(source.tensors, self.expected(config, source.tensors), str(path), "its graph's metadata")
        _check_config(path, config)
        source.tensors = {name: finite(tensor, name, path) for name, tensor in source.tensors.items()}
        ours = self.layout.to_scratch(source.tensors, config.n_layers)
        return Contents(str(path), config, ours, source.metadata["dtype"], directory=path)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        return {"add_cross_attention": (False,)}

    def check(self, contents: Contents, options: Options) -> None:
        super().check(contents, options)
        _packages("onnx", "onnxscript")
        if options.quantize or options.runs:
            _packages("onnxruntime", more="; it quantizes, and runs the graph unless --no-verify")
        if contents.dtype == torch.float64:
            raise ConversionError(
                f"the weights are {contents.dtype}, but graphs are float32, into which that does not fit; cast them "
                "first: model.float()"
            )

    def room(self, contents: Contents, options: Options) -> int:
        in_float32 = 4 * sum(tensor.shape.numel() for tensor in contents.tensors.values())
        return 2 * in_float32 if options.quantize else in_float32

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        file, settings = path / self.mark, _settings(contents.config)
        file.parent.mkdir(parents=True, exist_ok=True)
        options.progress.step("Tracing the graph")
        model = importlib.import_module("onnx").ModelProto.FromString(graph(json.dumps(settings, sort_keys=True)))
        about = {"config": settings, "dtype": str(contents.dtype).removeprefix("torch.")}
        model.metadata_props.add(key=ABOUT, value=json.dumps(about))
        hashes = {self.mark + DATA: _write_weights(model, tensors, file.with_name(GRAPH + DATA), options.progress)}
        file.write_bytes(model.SerializeToString(deterministic=True))
        if options.quantize:
            options.progress.step("Quantizing")
            quantize(file, file.with_name(INT8))
        _write_settings(contents, path)
        if options.tokenizer is not None:
            options.tokenizer.save_pretrained(path)
            complete_tokenizer(path, options.tokenizer)
        cast = contents.dtype != torch.float32
        return Written([f"the graph is in float32, into which {contents.dtype} fits unchanged"] if cast else [], hashes)

    def run(self, directory: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
        progress.step("Running the graph in onnxruntime")
        state_dict = {name: tensor.read().float() for name, tensor in contents.tensors.items()}
        model = GPTScratchForCausalLM.from_book(state_dict, contents.config).float().eval()
        logits, tokens, equal = compare_with_model(directory / self.mark, model)
        found = Verification(logits, FP32_LOGITS, tokens, equal, len(contents.tensors), weights_equal=True)
        if not found.passed:
            raise ParityError(f"onnxruntime computes something else from the graph: {found}; please report this")
        figures = {**found.to_dict(), "against": "the model, in onnxruntime with a cache"}
        if (int8 := directory / FOLDER / INT8).exists():
            logits, _, _ = compare_with_model(int8, model)
            if not logits.relative_error <= INT8_LOGITS:
                raise ParityError(
                    f"in int8 the logits have a relative error of {logits.relative_error:.2g}, which is above "
                    f"{INT8_LOGITS}: these weights do not suit it; leave --quantize out"
                )
            figures["int8"] = {**asdict(logits), "relative_error": logits.relative_error}
        return figures


def _write_settings(contents: Contents, directory: Path) -> None:
    """Writes an official config.json, which transformers.js knows, with what it must be told of the graphs."""
    config = contents.config.to_gpt2()
    config.architectures, config.dtype = [contents.kind.gpt2_class.__name__], torch.float32
    split = [name for name in (GRAPH, INT8) if (directory / FOLDER / (name + DATA)).exists()]
    about: dict[str, Any] = {"use_external_data_format": dict.fromkeys(split, 1)}
    if not (directory / FOLDER / INT8).exists():  # which it would take in a page
        about["dtype"] = "fp32"
    config.update({"transformers.js_config": about})
    try:
        config.save_pretrained(directory)
        generation_settings(contents, config).save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # wrong settings raise errors of many types
        raise ConversionError(f"the model's settings cannot be saved: {error}; correct them") from error


# What a graph is made of, by the names in an official config.
_OF_GRAPH = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"),
    *("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"),
)


def _check_config(directory: Path, config: GPTScratchConfig) -> None:
    """Raises ConversionError if config.json, by which other programs run the graph, is of another model."""
    values = config_of(directory)
    if values is None:
        return
    path = directory / "config.json"
    if not isinstance(values, dict) or model_type_of(values) != "gpt2":
        raise ConversionError(f"{path} is not that of a GPT-2, but the graph beside it is one; export the model again")
    try:
        beside = GPT2Config.from_dict(values)
    except Exception as error:  # wrong settings raise errors of many types
        reason = shortened(" ".join(str(error).split()), 300)
        raise ConversionError(f"{path} is not usable ({reason}); export the model again") from error
    graph = config.to_gpt2()
    wrong = [
        f"{name}={shortened(repr(getattr(beside, name)))}, but the graph {getattr(graph, name)!r}"
        for name in _OF_GRAPH
        if getattr(beside, name) != getattr(graph, name)
    ]
    if wrong:
        raise ConversionError(
            f"{path} has {'; '.join(wrong)}; the graph cannot be changed so: correct config.json, or export a model "
            "with these settings"
        )


def _settings(config: GPTScratchConfig) -> dict[str, Any]:
    values = json.loads(config.to_json_string())
    return {name: value for name, value in values.items() if name not in _OF_FILES}


_OF_FILES = ("architectures", "auto_map", "dtype", "transformers_version")  # not of the model


def _packages(*names: str, more: str = "") -> None:
    """Raises ConversionError if a package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConversionError(
                f"ONNX needs the package {name} ({error}); pip install 'hf-gpt-scratch[onnx]'{more}"
            ) from error


def graph(settings: str) -> bytes:
    """The graph of a model, whose weights are inputs under the layout's names.

    Args:
        settings: the config, as JSON.

    Raises:
        ConversionError: torch has no translation of it, for example of an activation of one's own.
    """
    config = GPTScratchConfig.from_dict(json.loads(settings))
    # Its mask is a large negative number, so a query of padding, which may attend to nothing, does not become NaN.
    config._attn_implementation = "eager"
    model: Any = meta_model(GPTScratchForCausalLM, config).eval()
    n_layers, shape = config.n_layers, (2, config.n_heads, 5, config.emb_dim // config.n_heads)
    ours = {name.removeprefix(SCRATCH_PREFIX): (name, tensor) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del ours["out_head.weight"]
    rows = {name: row.at(layer) for row in LAYOUT.table for layer in range(n_layers) for name in row.at(layer).ours}

    class WithCache(nn.Module):
        def forward(self, input_ids, attention_mask, position_ids, past, weights):
            cache: Any = DynamicCache(config=config)
            for layer, states in enumerate(past):
                cache.update(*states, layer)
            parameters = {
                ours[name][0]: weight.T if rows[name].transposed else weight for name, weight in weights.items()
            }
            inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
            inputs |= dict(past_key_values=cache, use_cache=True)
            logits = torch.func.functional_call(model, parameters, (), inputs).logits
            return logits, [(layer.keys, layer.values) for layer in cache.layers]

    # Sizes from 2 on: torch takes 0 and 1 for constants. The weights are not read, so no memory is needed for them.
    weights = {name: torch.empty(rows[name].to_theirs([tensor]).shape) for name, (_, tensor) in ours.items()}
    example = dict(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        position_ids=torch.zeros(2, 3, dtype=torch.long),
        past=[(torch.zeros(shape), torch.zeros(shape)) for _ in range(n_layers)],
        weights=weights,
    )
    names = ("batch_size", "sequence_length", "past_sequence_length", "total_sequence_length")
    batch, new, past, total = map(torch.export.Dim, names)  # "batch_size" is what transformers.js looks for
    axes = dict(
        input_ids={0: batch, 1: new},
        attention_mask={0: batch, 1: total},
        position_ids={0: batch, 1: new},
        past=[({0: batch, 2: past},) * 2] * n_layers,
        weights=dict.fromkeys(weights),
    )
    states = [f"{layer}.{kind}" for layer in range(n_layers) for kind in ("key", "value")]
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                WithCache().eval(),
                kwargs=example,
                dynamic_shapes=axes,
                input_names=[*list(example)[:3], *(f"past_key_values.{state}" for state in states), *weights],
                output_names=["logits", *(f"present.{state}" for state in states)],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch's, of many types
        first: BaseException = error
        while first.__cause__ is not None:  # the others are advice for torch's developers
            first = first.__cause__
        reason = shortened(" ".join(str(first).split()), 500)
        raise ConversionError(
            f"torch cannot translate the model into ONNX ({type(first).__name__}: {reason}); take an activation of "
            "functions that it can translate"
        ) from error
    proto = program.model_proto
    for node in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, proto.graph):
        node.doc_string = ""
        del node.metadata_props[:]  # where in this computer's files each operation is from
    return proto.SerializeToString(deterministic=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter and the quantizer say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_weights(model: Any, tensors: Mapping[str, LazyTensor], path: Path, progress: Progress) -> dict[str, Any]:
    """Makes initializers of the inputs for weights, and writes these in float32, one at a time.

    Returns:
        sha256 and size of the file.
    """
    inputs = {value.name: value for value in model.graph.input}
    digest, end = hashlib.sha256(), 0
    progress.step(f"Writing {path.name}", sum(tensor.nbytes for tensor in tensors.values()))
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            data = tensor.read().float().contiguous().reshape(-1).view(torch.uint8).numpy().data
            expected = [dimension.dim_value for dimension in inputs[name].type.tensor_type.shape.dim]
            if expected != list(tensor.shape):
                raise AssertionError(f"the graph has {name} of shape {expected}, but it is {list(tensor.shape)}")
            value = model.graph.initializer.add(name=name, dims=tensor.shape, data_type=_FLOAT, data_location=_EXTERNAL)
            for key, place in (("location", path.name), ("offset", end), ("length", data.nbytes)):
                value.external_data.add(key=key, value=str(place))
            model.graph.input.remove(inputs[name])
            digest.update(data)
            file.write(data)
            end += data.nbytes
            progress.advance(tensor.nbytes)
    return {"sha256": digest.hexdigest(), "bytes": end}


_FLOAT, _EXTERNAL = 1, 1  # TensorProto.FLOAT and TensorProto.EXTERNAL


def _read_graph(path: Path) -> tuple[Any, dict[str, Any]]:
    """A graph that `save` has written, and its metadata: the model's `config` and `dtype`.

    Raises:
        ConversionError: it is another graph, or damaged.
    """
    _packages("onnx")
    refuse_special_file(path)
    data = path.read_bytes() if path.stat().st_size <= LARGEST_GRAPH else b""
    try:
        model = importlib.import_module("onnx").ModelProto.FromString(data)
        known = {entry.key: entry.value for entry in model.metadata_props}
    except Exception as error:  # protobuf's
        raise ConversionError(f"{path} is truncated or corrupt ({error}); export the model again") from error
    if ABOUT not in known:
        raise ConversionError(
            f"{path} was not written by hf-gpt-scratch export, and only what it has written can be read; convert the "
            "checkpoint that the graph was made of"
        )
    try:
        about = parse_json(known[ABOUT].encode())
        check_settings(path, about["config"])
        layers = about["config"]["n_layers"]
        if type(layers) is not int or layers > min(MAX_LAYERS, len(model.graph.initializer)):
            raise ValueError(f"n_layers={shortened(repr(layers))}, but it holds {len(model.graph.initializer)} tensors")
        config = GPTScratchConfig.from_dict(about["config"])
        shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
        n_heads = shapes["past_key_values.0.key"][1].dim_value
        if n_heads != config.n_heads:
            raise ValueError(f"n_heads={config.n_heads}, but its cache has {n_heads}")
        dtype = next(dtype for dtype in DTYPES if str(dtype) == f"torch.{about['dtype']}")
        config.dtype = dtype
    except ConversionError:
        raise
    except Exception as error:  # wrong settings raise errors of many types
        reason = shortened(" ".join(str(error).split()), 300)
        raise ConversionError(
            f"{path} has damaged metadata ({type(error).__name__}: {reason}); export the model again"
        ) from error
    return model, {"config": config, "dtype": dtype}


def _stored(model: Any, data: Path, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The tensors in the file beside a graph, which they must fill, one after the other.

    Raises:
        ConversionError: they do not.
    """
    tensors: dict[str, LazyTensor] = {}
    end = 0
    try:
        refuse_special_file(data)
        size = data.stat().st_size
        for value in model.graph.initializer:
            if value.data_location != _EXTERNAL:  # a constant of the graph
                continue
            place, shape = {entry.key: entry.value for entry in value.external_data}, torch.Size(value.dims)
            length = 4 * shape.numel()
            if value.data_type != _FLOAT or place != {"location": data.name, "offset": str(end), "length": str(length)}:
                raise ValueError(f"{shortened(repr(value.name))} is of another type, or lies elsewhere")
            if min(shape, default=1) < 1 or end + length > size or value.name in tensors:
                raise ValueError(
                    f"{shortened(repr(value.name))} of shape {shortened(str(list(shape)))} at {end} of {size}"
                )
            tensors[value.name] = LazyTensor(shape, dtype, partial(_read, data, end, shape, dtype, value.name))
            end += length
        if end != size:
            raise ValueError(f"it has {size} bytes, but according to its graph {end}")
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ConversionError(f"{data} is missing, truncated or corrupt ({error}); export the model again") from error
    return tensors


def _read(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype, name: str) -> torch.Tensor:
    values = read_part(path, offset, shape, torch.float32)
    tensor = values.to(dtype)
    if dtype != torch.float32 and not torch.equal(tensor.float(), values) and torch.isfinite(values).all():
        raise ConversionError(
            f"{name!r} in {path} has values that {dtype} has not, which was the model's; export the model again"
        )
    return tensor


def quantize(graph: Path, target: Path) -> None:
    """Writes a graph with int8 weights beside one in float32, by onnxruntime's dynamic quantization.

    A matrix has a scale for each output, an embedding one alone. The weights are unsigned: the sums of signed ones
    overflow on CPUs without VNNI.
    """
    onnx, tools = (importlib.import_module(name) for name in ("onnx", "onnxruntime.quantization"))
    model = onnx.load(graph)
    weights = {weight.name: weight for weight in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        # A tied head, of which the quantizer sees that it is a weight if it is one.
        head = onnx.numpy_helper.to_array(weights[node.input[0]]).T.copy()
        model.graph.initializer.append(onnx.numpy_helper.from_array(head, node.output[0]))
        model.graph.node.remove(node)
    names = {weight.name for weight in model.graph.initializer}
    matrices = sum(node.op_type == "MatMul" and node.input[1] in names for node in model.graph.node)
    part = target.with_name(f"{target.name}.part")
    with _quiet():
        tools.quantize_dynamic(
            model,
            part,
            per_channel=True,
            weight_type=tools.QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gather"],
            extra_options={"MatMulConstBOnly": True},
            use_external_data_format=True,
        )
    quantized = onnx.load(part)
    for path in list(part.parent.glob(f"{part.name}*")):
        path.unlink()
    if (found := sum(node.op_type == "MatMulInteger" for node in quantized.graph.node)) != matrices:
        raise AssertionError(f"onnxruntime has quantized {found} of {matrices} matrices")
    onnx.save(quantized, target, save_as_external_data=True, location=target.name + DATA)
    for path in list(target.parent.glob(f"{target.name}*")):
        path.chmod(graph.stat().st_mode)  # onnx's data are for their writer alone


class Session:
    """A graph in onnxruntime, one call after the other, as a program with a cache runs it.

    Args:
        graph: the file.

    Raises:
        ConversionError: onnxruntime does not take it.
    """

    def __init__(self, graph: Path, config: GPTScratchConfig):
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own, of many types
            raise ConversionError(
                f"onnxruntime {onnxruntime.__version__} does not take the graph ({shortened(str(error), 500)}); "
                "install the versions in requirements.lock"
            ) from error
        self.states = [f"{n}.{kind}" for n in range(config.n_layers) for kind in ("key", "value")]
        self.shape = (config.n_heads, 0, config.emb_dim // config.n_heads)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, past: list[Any] | None) -> tuple[torch.Tensor, list[Any]]:
        """The logits (B, T, vocab_size) of T tokens after those in `past`, and the new `past`.

        Args:
            ids: (B, T).
            mask: (B, P + T), 0 for padding.
            past: None for a prompt.
        """
        past = past or [torch.zeros(len(ids), *self.shape).numpy()] * len(self.states)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :])
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        cached = {f"past_key_values.{state}": one for state, one in zip(self.states, past, strict=True)}
        outputs = ["logits", *(f"present.{state}" for state in self.states)]
        logits, *present = self.session.run(outputs, arrays | cached)
        return torch.from_numpy(logits), present


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions of tokens, (B, T) like their mask: padding takes none."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def compare_with_model(graph: Path, model: GPTScratchForCausalLM) -> tuple[LogitParity, int, bool]:
    """What a graph and the model make of the same tokens: a left-padded batch, which the graph continues greedily.

    The graph has a cache; the model sees all tokens at once.

    Returns:
        their logits, the number of new tokens for each of the two prompts, and whether they are the model's.
    """
    warm_up()
    session, config = Session(graph, model.config), model.config
    length = min(PROMPT, (config.context_length + 1) // 2)
    new_tokens = min(NEW_TOKENS, config.context_length - length)
    ids = probe_ids(config.vocab_size, config.context_length, length=length)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    logits, past = session(ids, mask, None)
    every = [logits]
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)
        logits, past = session(token, mask, past)
        every.append(logits)
    theirs, seen = torch.cat(every, dim=1), mask.bool()
    ours = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    equal = torch.equal(ids[:, length:], ours[:, length - 1 : -1].argmax(-1))
    return logit_parity(ours[seen], theirs[seen], int(seen.sum())), new_tokens, equal


ONNX = Onnx()
