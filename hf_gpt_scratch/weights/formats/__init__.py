"""GPT-2 checkpoints of all programs, read and written bit for bit through the weight map.

| format | what it is | read | written as |
| --- | --- | --- | --- |
| `native` | a directory that `save_pretrained` of this package wrote | yes | a directory |
| `gpt2` | a directory of the official `GPT2LMHeadModel` | yes | a directory |
| `book` | what the book's code saves | yes | `model.pth` |
| `nanogpt` | nanoGPT's `ckpt.pt`, build-nanogpt's, or a state dict alone | yes | `ckpt.pt` |
| `mingpt` | minGPT's state dict | yes | no |
| `tensorflow` | OpenAI's directory: `hparams.json`, `model.ckpt.*` | yes | no |
| `gguf` | GGUF of architecture gpt2, not quantised | yes | `model.gguf` |
| `llmc` | llm.c's `gpt2_124M.bin` or `model_*.bin` | yes | `model.bin` |
| `onnx` | a directory that was written as this | yes | a directory with `onnx/model.onnx` |
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...errors import ConversionError
from ...model.configuration_gpt_scratch import GPTScratchConfig
from ...model.weight_map import SCRATCH_PREFIX, without_prefix
from ..checkpoint import checked_finite, refuse_pointer
from ..tensors import held
from .book import BOOK
from .directory import GPT2, NATIVE
from .format import FORMATS, Contents, Format, Found, Options, Source, readable, register, writable
from .gguf import GGUF
from .llmc import LLM_C
from .nanogpt import MINGPT, NANOGPT
from .onnx import ONNX
from .tensorflow import TENSORFLOW

__all__ = ["FORMATS", "Format", "Found", "Source", "detect", "open_source", "read", "readable", "register", "writable"]

logger = logging.get_logger(__name__)

for _known in (NATIVE, GPT2, BOOK, NANOGPT, MINGPT, TENSORFLOW, GGUF, LLM_C, ONNX):
    register(_known)


def open_source(path: str | os.PathLike) -> Source:
    """The checkpoint at a path, whatever its format; no tensor is read yet.

    Raises:
        ConversionError: it is of no known format, or damaged.
    """
    found = Found(Path(path).expanduser())
    for format in reversed(FORMATS.values()):  # a format registered later may be a special case of an earlier one
        if format.matches(found):
            return format.open(found)
    raise ConversionError(_unknown(found))


def _unknown(found: Found) -> str:
    """Why no format matches, and the remedy."""
    if not found.is_directory:
        refuse_pointer(found.path)
    hint = next(filter(None, (format.near(found) for format in FORMATS.values())), None)
    if hint is not None:
        return hint
    remedy = f"these formats can be read: {readable()}"
    if not found.is_directory:
        return f"{found.begins}; {remedy}"
    suffixes = {suffix for format in FORMATS.values() for suffix in format.suffixes}
    files = sorted(file.name for file in found.path.iterdir() if file.suffix in suffixes)
    if files:
        remedy = f"give the file, {found.path / files[0]}"
    marks = dict.fromkeys(format.mark for format in FORMATS.values() if format.mark)
    return f"{found.path} has neither {' nor '.join(marks)}; {remedy}"


def detect(path: str | os.PathLike) -> str:
    """The format of a checkpoint by its content, as `FORMATS` names it: "native", "gpt2", "book", …

    Raises:
        ConversionError: it is none of these.
    """
    return open_source(path).format.name


def read(
    path: str | os.PathLike,
    n_heads: int | None = None,
    *,
    activation_function: str | None = None,
    lora_scale: float | None = None,
) -> tuple[GPTScratchConfig, dict[str, torch.Tensor]]:
    """The config and the state dict of a checkpoint in any format, in the book's names; a tied head is left out.

    Args:
        n_heads: for "book" and "mingpt", whose files do not say it. A wrong number that divides emb_dim cannot be
            noticed: the model loads and computes something else.
        activation_function, lora_scale: as in `convert`.

    Raises:
        ConversionError: it is not a complete, finite GPT-2 of a known format.
    """
    source = open_source(path)
    source.answer(activation_function=activation_function, lora_scale=lora_scale)
    contents = source.format.read(source, n_heads)
    contents.check_plain()
    for note in source.notes:
        logger.warning(f"{path}: {note}")
    # Copies, so that later changes to the file do not matter.
    return contents.config, {name: tensor.read().clone() for name, tensor in contents.tensors.items()}


def write(
    model_or_state_dict: nn.Module | Mapping[str, torch.Tensor],
    config: GPTScratchConfig,
    target: str | os.PathLike,
    format: str,
    *,
    bias: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
) -> list[str]:
    """Writes a model; `export` also verifies and publishes it.

    Args:
        target: a directory for "native", "gpt2" and "onnx", else a file.
        bias: for "nanogpt": whether to store biases; None: unless all are zero and `qkv_bias` is off.
        tokenizer: saved too, for "native", "gpt2", "gguf" and "onnx".
        quantize: for "onnx": "int8" also writes a graph with int8 weights.

    Returns:
        sentences that users of the file should know.

    Raises:
        ConversionError: the weights are not those of `config`, or the format cannot express the model.
    """
    wanted, options = writable(format), Options(bias=bias, tokenizer=tokenizer, quantize=quantize)
    if isinstance(model_or_state_dict, nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict()
    state_dict = without_prefix(model_or_state_dict, SCRATCH_PREFIX)
    state_dict = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    if config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    dtype = next((tensor.dtype for tensor in state_dict.values()), torch.float32)
    contents = Contents("the state dict", config, held(state_dict), dtype)
    contents.check_plain("its config")
    for name, tensor in state_dict.items():
        checked_finite(tensor, name, "the state dict")
    wanted.check(contents, options)
    return wanted.write(contents, Path(target), options).notes
