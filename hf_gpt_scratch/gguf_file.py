"""GPT-2 in a GGUF file, as llama.cpp reads it; written and read by the `gguf` package."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .checkpoint import ConversionError, Progress, read_part
from .configuration_gpt_scratch import GPTScratchConfig
from .lazy import Lazy

# Our name of what the metadata say under `gpt2.…`.
METADATA = {
    "context_length": "context_length",
    "embedding_length": "emb_dim",
    "block_count": "n_layers",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("GGUF needs the package gguf; pip install 'hf-gpt-scratch[gguf]'") from error
    return gguf


def write_gguf(
    tensors: Mapping[str, Lazy],
    config: GPTScratchConfig,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> list[str]:
    """Writes tensors in GGUF's names, and says what did not go along.

    llama.cpp computes with norms, biases and positions in float32, so these are widened, which changes no value.
    """
    gguf = _gguf()
    dtype = tensors["token_embd.weight"].dtype
    if dtype not in DTYPES:
        raise ConversionError(f"the weights are {dtype}, but GGUF has {', '.join(map(str, DTYPES))}; cast them first")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.n_inner or 4 * config.emb_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[DTYPES[dtype]])
    notes = _add_tokenizer(writer, config, tokenizer)
    types = {
        name: torch.float32 if len(tensor.shape) == 1 or name == "position_embd.weight" else dtype
        for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        # numpy has no bfloat16: gguf takes its bytes.
        bf16 = types[name] == torch.bfloat16
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if bf16 else tensor.shape
        writer.add_tensor_info(
            name,
            shape,
            np.dtype(np.uint8 if bf16 else NUMPY[types[name]]),
            tensor.shape.numel() * types[name].itemsize,
            raw_dtype=gguf.GGMLQuantizationType.BF16 if bf16 else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress.step(f"Writing {path.name}", sum(tensor.nbytes for tensor in tensors.values()))
    for name, tensor in tensors.items():
        writer.write_tensor_data(tensor.read().to(types[name]).contiguous().view(torch.uint8).numpy())
        progress.advance(tensor.nbytes)
    writer.close()
    return notes


def _add_tokenizer(writer, config: GPTScratchConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        return ["the file has no tokenizer, because the source has none; llama.cpp does not run without one"]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model, splitter = backend.get("model") or {"type": None}, backend.get("pre_tokenizer") or {}
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    as_gpt2 = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    if model["type"] != "BPE" or not as_gpt2 or backend["normalizer"] or max(tokens) >= config.vocab_size:
        return [
            f"the file has no tokenizer: the source's is a {type(tokenizer).__name__} ({model['type']}) of "
            f"{max(tokens) + 1} tokens, and GPT-2's is a byte-level BPE of at most vocab_size={config.vocab_size}"
        ]
    # llama.cpp wants a token for every row of the embedding.
    types = dict.fromkeys(tokens, 1) | dict.fromkeys(tokenizer.all_special_ids, 3)  # normal, control
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(config.vocab_size)])
    writer.add_token_types([types.get(number, 5) for number in range(config.vocab_size)])  # 5: unused
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    return []


def read_gguf(path: Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """A GGUF file's tensors in its own names, and what its metadata say, in our names.

    All tensors have the dtype of the token embedding, or float32 if some would lose by it.

    Raises:
        ConversionError: no GPT-2, quantised, or corrupt.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader checks nothing: whatever numpy raises on a broken file
        raise ConversionError(f"{path} is truncated or corrupt ({error!r}); download it again") from error
    architecture = fields.get("general.architecture")
    if architecture != "gpt2":
        raise ConversionError(f"{path} holds a model of architecture {architecture!r}, but only 'gpt2' is read")
    tensors = {}
    dtypes = {kind: dtype for dtype, kind in DTYPES.items()}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in dtypes:
            raise ConversionError(
                f"{tensor.name!r} in {path} is quantised ({kind}), but only F32, F16 and BF16 are read bit for bit; "
                "take the file that was not quantised"
            )
        shape = torch.Size(reversed(tensor.shape.tolist()))
        read = partial(read_part, path, int(tensor.data_offset), shape, dtypes[kind])
        tensors[tensor.name] = Lazy(shape, dtypes[kind], read)
    told = {ours: fields[f"gpt2.{name}"] for name, ours in METADATA.items() if f"gpt2.{name}" in fields}
    told["tokenizer"] = "tokenizer.ggml.model" in fields
    if "layer_norm_epsilon" in told:
        told["layer_norm_epsilon"] = float(str(np.float32(told["layer_norm_epsilon"])))  # 1e-5, not 9.99999974e-06
    return _one_dtype(tensors), told


def _one_dtype(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        return tensors

    def loses(tensor: Lazy) -> bool:
        values = tensor.read()
        return not torch.equal(values.to(embedding.dtype).to(values.dtype), values)

    def cast(tensor: Lazy) -> torch.Tensor:
        return tensor.read().to(dtype)

    wide = any(tensor.dtype != embedding.dtype and loses(tensor) for tensor in tensors.values())
    dtype = torch.float32 if wide else embedding.dtype
    return {name: Lazy(tensor.shape, dtype, partial(cast, tensor)) for name, tensor in tensors.items()}
