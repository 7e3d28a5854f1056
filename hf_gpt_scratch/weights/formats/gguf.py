"""GPT-2 in a GGUF file, as llama.cpp reads it; written by the `gguf` package."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AddedToken, GPT2Tokenizer, PreTrainedTokenizerBase

from ...errors import ConversionError, shortened
from ...model.configuration_gpt_scratch import GPTScratchConfig
from ...model.weight_map import LM_HEAD
from ..checkpoint import Progress, read_part, shown
from ..tensors import LazyTensor
from .format import Contents, Format, Found, Layout, Options, Source, Written, renamed

# GGUF's names of GPT-2's tensors.
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "h.{n}.ln_1.weight": "blk.{n}.attn_norm.weight",
    "h.{n}.ln_1.bias": "blk.{n}.attn_norm.bias",
    "h.{n}.attn.c_attn.weight": "blk.{n}.attn_qkv.weight",
    "h.{n}.attn.c_attn.bias": "blk.{n}.attn_qkv.bias",
    "h.{n}.attn.c_proj.weight": "blk.{n}.attn_output.weight",
    "h.{n}.attn.c_proj.bias": "blk.{n}.attn_output.bias",
    "h.{n}.ln_2.weight": "blk.{n}.ffn_norm.weight",
    "h.{n}.ln_2.bias": "blk.{n}.ffn_norm.bias",
    "h.{n}.mlp.c_fc.weight": "blk.{n}.ffn_up.weight",
    "h.{n}.mlp.c_fc.bias": "blk.{n}.ffn_up.bias",
    "h.{n}.mlp.c_proj.weight": "blk.{n}.ffn_down.weight",
    "h.{n}.mlp.c_proj.bias": "blk.{n}.ffn_down.bias",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
# Keys of the metadata, without the prefix `gpt2.`, and our names for them.
METADATA = {
    "context_length": "context_length",
    "embedding_length": "emb_dim",
    "block_count": "n_layers",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
QUANTISED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
QUANTISED |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
# Types of metadata values, as format characters of struct.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LARGEST_HEADER = 1 << 24  # bytes; GPT-2's has 2 MB, most of it its tokens
ROLES = (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))  # ours, GGUF's
TOKENIZER = "tokenizer.ggml."
# Kinds of tokens; others are bytes and unknown ones, which GPT-2 has not.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


class Gguf(Format):
    name = "gguf"
    what = "GGUF"
    layout = Layout(
        renamed(lambda row: NAMES[row.theirs], transposed=False, head=replace(LM_HEAD, theirs="output.weight"))
    )
    file = "model.gguf"
    suffixes = (".gguf",)
    tokenizer = "inside"

    def matches(self, found: Found) -> bool:
        return found.start == b"GGUF"

    def open(self, found: Found) -> Source:
        tensors, metadata = read_gguf(found.path)
        inside = metadata.pop("tokenizer")
        tokenizer = partial(_read_tokenizer, found.path, inside) if inside else None
        return Source(self, found.path, tensors, metadata, tokenizer=tokenizer)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        limits = super().limits(config)
        return {name: limits[name] for name in limits if name not in METADATA.values()}

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        notes = write_gguf(tensors, contents.config, path, options.tokenizer, options.progress)
        carried = type(options.tokenizer).__name__ if options.tokenizer is not None and not notes else None
        return Written(notes, tokenizer=carried)


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("GGUF needs the package gguf; pip install 'hf-gpt-scratch[gguf]'") from error
    return gguf


def write_gguf(
    tensors: Mapping[str, LazyTensor],
    config: GPTScratchConfig,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> list[str]:
    """Writes tensors under GGUF's names, and returns notes on what was left out.

    llama.cpp needs norms, biases and positions in float32, so these are cast, which changes no value.
    """
    gguf = _gguf()
    dtype = tensors["token_embd.weight"].dtype
    if dtype not in DTYPES:
        raise ConversionError(
            f"the weights are {dtype}, but GGUF supports {', '.join(map(str, DTYPES))}; cast them first"
        )
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
        # numpy has no bfloat16, so gguf is given the bytes.
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
        return [
            "the file has no tokenizer, because the source has none; llama.cpp does not run without one: export again "
            "with --tokenizer DIRECTORY"
        ]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model, splitter = backend.get("model") or {"type": None}, backend.get("pre_tokenizer") or {}
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    as_gpt2 = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    if model["type"] != "BPE" or not as_gpt2 or backend["normalizer"] or max(tokens) >= config.vocab_size:
        return [
            f"the file has no tokenizer: the source's is a {type(tokenizer).__name__} ({model['type']}) of "
            f"{max(tokens) + 1} tokens, but must be a byte-level BPE of at most vocab_size={config.vocab_size} tokens"
        ]
    # llama.cpp wants a token for every row of the embedding.
    types = dict.fromkeys(tokens, NORMAL) | dict.fromkeys(tokenizer.get_added_vocab().values(), USER_DEFINED)
    types |= dict.fromkeys(tokenizer.all_special_ids, CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(config.vocab_size)])
    writer.add_token_types([types.get(number, UNUSED) for number in range(config.vocab_size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    return []


def _read_tokenizer(path: Path, about: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer inside a file; the inverse of `_add_tokenizer`.

    Args:
        about: what the metadata say of it.

    Raises:
        ConversionError: it is another than GPT-2's kind, or damaged.
    """
    kind = about.get("model"), about.get("pre", "gpt-2"), about.get("add_bos_token", False)
    if kind != ("gpt2", "gpt-2", False):
        raise ConversionError(
            f"the tokenizer inside {path.name}, which is {', '.join(map(shown, kind))} (model, pre, add_bos_token), "
            "while 'gpt2', 'gpt-2', False is read"
        )
    try:
        tokens, merges = list(about["tokens"]), [tuple(merge.split(" ")) for merge in about["merges"]]
        types = [int(one) for one in about.get("token_type", [NORMAL] * len(tokens))]
        used = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
        named: dict[str, Any] = {
            name: tokens[int(about[f"{key}_token_id"])] if f"{key}_token_id" in about else None for name, key in ROLES
        }
        named["unk_token"] = named["eos_token"]  # GPT-2's, which byte-level BPE has no use for
        tokenizer = GPT2Tokenizer(vocab=used, merges=merges, **named)  # type: ignore[arg-type]  # as in tokenizer.py
        kinds = ((CONTROL, True), (USER_DEFINED, False))
        for wanted, special in kinds:
            added = [token for token, number in used.items() if types[number] == wanted]
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added], special)
        if tokenizer.get_vocab() != used:
            raise ValueError("its tokens are not numbered as it says")
        return tokenizer
    except Exception as error:  # the tokens are the tokenizers library's, and so are the kinds of errors
        raise ConversionError(
            f"the tokenizer inside {path.name}, which is damaged ({type(error).__name__}: {shortened(str(error))})"
        ) from error


def read_gguf(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """A GGUF file's tensors under their own names, and its metadata under ours.

    All tensors get the dtype of the token embedding, or float32 if that would change a value. The gguf package's own
    reader checks nothing, so the header is parsed here.

    Raises:
        ConversionError: it is not a GPT-2, or it is quantised, big-endian or corrupt.
    """
    try:
        with path.open("rb") as file:
            metadata, tensors = _Header(file.read(LARGEST_HEADER), path).read()
    except (ValueError, struct.error) as error:
        raise ConversionError(f"{path} is truncated or corrupt ({error}); download it again") from error
    return _one_dtype(tensors), _in_our_names(path, metadata)


def _in_our_names(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    ours_to_value: dict[str, Any] = {}
    for name, value in metadata.items():
        if not name.startswith("gpt2."):
            continue
        ours = METADATA.get(name.removeprefix("gpt2."))
        wanted = float if ours == "layer_norm_epsilon" else int
        if ours is None or type(value) is not wanted:
            raise ConversionError(
                f"{path} has {name}={shown(value)}, but a GPT-2 has only {', '.join(METADATA)}: whole numbers, and an "
                "epsilon; convert a plain GPT-2"
            )
        ours_to_value[ours] = value
    ours_to_value["tokenizer"] = {
        name.removeprefix(TOKENIZER): metadata[name] for name in metadata if name.startswith(TOKENIZER)
    }
    if "layer_norm_epsilon" in ours_to_value:
        epsilon = np.float32(ours_to_value["layer_norm_epsilon"])
        ours_to_value["layer_norm_epsilon"] = float(str(epsilon))  # 1e-5, not 9.99999974e-06
    return ours_to_value


class _Header:
    """The header of a GGUF file, parsed piece by piece; no length in it is trusted before it is checked.

    Raises, in all methods:
        ValueError, struct.error: it is corrupt.
    """

    def __init__(self, data: bytes, path: Path):
        self.data, self.path, self.at = data, path, 0

    def number(self, format: str) -> Any:
        (number,) = struct.unpack_from(f"<{format}", self.data, self.at)
        self.at += struct.calcsize(f"<{format}")
        return number

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"a value of {size} bytes at {self.at}, but its header ends before {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind} at {self.at}")
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            return np.frombuffer(self.take(count * struct.calcsize(f"<{SCALARS[kind]}")), f"<{SCALARS[kind]}")
        if kind != STRING or count > (len(self.data) - self.at) // 8:
            raise ValueError(f"an array of {count} values of type {kind} at {self.at}")
        return [self.string() for _ in range(count)]

    def read(self) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
        """The metadata, and the tensors."""
        self.take(4)
        version, count, pairs = self.number("I"), self.number("Q"), self.number("Q")
        if version & 0xFFFF == 0:
            raise ConversionError(
                f"{self.path} is big-endian, but only little-endian files can be read; convert it in place with "
                f"the package gguf: gguf-convert-endian {self.path} little"
            )
        if version not in (2, 3):
            raise ValueError(f"version {version}, but only 2 and 3 can be read")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            name = self.string()
            if name in metadata:
                raise ValueError(f"the key {name!r} occurs twice")
            metadata[name] = self.value(self.number("I"))
        architecture = metadata.get("general.architecture")
        if architecture != "gpt2":
            raise ConversionError(
                f"{self.path} holds a model of architecture {shown(architecture)}, but only 'gpt2' can be read"
            )
        parts = metadata.get("split.count")
        if type(parts) is int and parts > 1:
            raise ConversionError(
                f"{self.path} is one of {parts} parts of a model; merge them first with llama.cpp: llama-gguf-split "
                "--merge FIRST-PART WHOLE.gguf"
            )
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment < 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={shown(alignment)}, which is not a power of two")
        infos = [self.info() for _ in range(count)]
        begin = self.at + -self.at % alignment
        return metadata, self.tensors(infos, begin, alignment)

    def info(self) -> tuple[str, torch.Size, int, int]:
        """A tensor's name, shape, type and offset after the header."""
        name, dimensions = self.string(), self.number("I")
        if not 0 < dimensions <= 4:
            raise ValueError(f"{name!r} has {dimensions} dimensions, but must have 1 to 4")
        sizes = [self.number("Q") for _ in range(dimensions)]
        if not all(0 < size < 1 << 40 for size in sizes):
            raise ValueError(f"{name!r} has the sizes {sizes}, which are out of range")
        return name, torch.Size(sizes[::-1]), self.number("I"), self.number("Q")

    def tensors(
        self, infos: list[tuple[str, torch.Size, int, int]], begin: int, alignment: int
    ) -> dict[str, LazyTensor]:
        """The tensors, which must fill the file, one after the other, as llama.cpp requires."""
        tensors: dict[str, LazyTensor] = {}
        end = 0
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"the tensor {name!r} occurs twice")
            if kind not in TYPES:
                raise ConversionError(
                    f"{name!r} in {self.path} is quantised ({QUANTISED.get(kind, f'type {kind}')}), but only F64, F32, "
                    "F16 and BF16 can be read bit for bit; use a file that is not quantised"
                )
            if offset != end + -end % alignment:
                raise ValueError(f"{name!r} begins at {offset}, but the one before it ends at {end}")
            end = offset + math.prod(shape) * TYPES[kind].itemsize
            read = partial(read_part, self.path, begin + offset, shape, TYPES[kind])
            tensors[name] = LazyTensor(shape, TYPES[kind], read)
        size = self.path.stat().st_size
        if not begin + end <= size <= begin + end + -end % alignment:
            raise ValueError(f"it has {size} bytes, but according to its header {begin + end}")
        return tensors


def _one_dtype(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        return tensors

    def loses(tensor: LazyTensor) -> bool:
        values = tensor.read()
        return not torch.equal(values.to(embedding.dtype).to(values.dtype), values)

    def cast(tensor: LazyTensor) -> torch.Tensor:
        return tensor.read().to(dtype)

    wide = any(tensor.dtype != embedding.dtype and loses(tensor) for tensor in tensors.values())
    dtype = torch.float32 if wide else embedding.dtype
    return {name: LazyTensor(tensor.shape, dtype, partial(cast, tensor)) for name, tensor in tensors.items()}


GGUF = Gguf()
