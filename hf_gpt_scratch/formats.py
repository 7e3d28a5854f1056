"""GPT-2 checkpoints of other programs, read and written bit for bit through the weight map.

| format | what it is | read | written as |
| --- | --- | --- | --- |
| `native` | a directory that `save_pretrained` of this package wrote | yes | a directory |
| `gpt2` | a directory of the official `GPT2LMHeadModel` | yes | a directory |
| `book` | the book's `model.pth` or `model_and_optimizer.pth` | yes | `model.pth` |
| `nanogpt` | nanoGPT's `ckpt.pt`, or its state dict alone | yes | `ckpt.pt` |
| `mingpt` | minGPT's state dict | yes | no |
| `tensorflow` | OpenAI's directory: `hparams.json`, `model.ckpt.*` | yes | no |
| `gguf` | GGUF of architecture gpt2, not quantised | yes | `model.gguf` |
"""

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from .configuration_gpt_scratch import PRESETS, GPTScratchConfig
from .conversion import (
    TOKENIZER_FILES,
    ConversionError,
    atomic_directory,
    check_checkpoint,
    gpt2_to_scratch,
    same_bits,
    scratch_to_gpt2,
)
from .gguf_file import read_gguf, write_gguf
from .layouts import BOOK, GGUF, NANOGPT, READABLE, TENSORFLOW
from .modeling_gpt_scratch import GPTScratchForCausalLM
from .parity import ParityError
from .publish import by_name, digests, new_receipt, write_receipt
from .tf_checkpoint import read_tensorflow
from .torch_files import read_torch_file, write_book, write_nanogpt
from .weight_map import SCRATCH_PREFIX, rows, without_prefix

LAYOUTS = {"book": BOOK, "nanogpt": NANOGPT, "mingpt": NANOGPT, "tensorflow": TENSORFLOW, "gguf": GGUF}
# What a written format is called within its target directory; directories have no name of their own.
FILES = {"native": "", "gpt2": "", "book": "model.pth", "nanogpt": "ckpt.pt", "gguf": "model.gguf"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# OpenAI's hparams.json, in our names.
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


@dataclass
class _Source:
    """A checkpoint as it lies there: tensors in their own names, and what the file tells, in our names."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def detect(path: str | os.PathLike) -> str:
    """The format of a checkpoint, by its content: "native", "gpt2", "book", "nanogpt", "mingpt", "tensorflow", "gguf".

    Raises:
        ConversionError: none of them.
    """
    return _open(path).format


def read(path: str | os.PathLike, n_heads: int | None = None) -> tuple[GPTScratchConfig, dict[str, torch.Tensor]]:
    """The config and the state dict of a checkpoint in any format, in the book's names; a tied head is left out.

    Args:
        n_heads: for "book" and "mingpt", whose files do not tell it. A wrong number that divides emb_dim cannot be
            seen: the model loads and computes something else.

    Raises:
        ConversionError: not a whole, finite GPT-2 of a known format.
    """
    return _interpret(_open(path), n_heads)


def write(
    model_or_state_dict: nn.Module | Mapping[str, torch.Tensor],
    config: GPTScratchConfig,
    target: str | os.PathLike,
    format: str,
    *,
    bias: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Writes a model; `export_checkpoint` also verifies and publishes it.

    Args:
        target: a directory for "native" and "gpt2", else a file.
        bias: for "nanogpt", its `bias`; None: unless all biases are zero and `qkv_bias` is off.
        tokenizer: goes along in "native", "gpt2" and "gguf".

    Returns:
        what the reader of the file should know, in sentences.

    Raises:
        ConversionError: the weights are not those of `config`, or the format has no place for what the model does.
    """
    if format not in FILES:
        raise ConversionError(f"got format {format!r}, but what can be written is {', '.join(FILES)}; choose one")
    if bias is not None and format != "nanogpt":
        raise ConversionError(f"got bias={bias} for {format!r}, but only 'nanogpt' has the choice; leave bias out")
    if isinstance(model_or_state_dict, nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict()
    state_dict = without_prefix(model_or_state_dict, SCRATCH_PREFIX)
    state_dict = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    if config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    _check(state_dict, _expected(config), "the state dict", "its config")
    _check_plain(config, format)
    if format in ("native", "gpt2"):
        config = copy.deepcopy(config)
        config.dtype = state_dict["tok_emb.weight"].dtype
        model = GPTScratchForCausalLM.from_book(state_dict, config)
        (model.save_pretrained if format == "native" else model.save_as_gpt2)(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return []
    if config.tie_word_embeddings and LAYOUTS[format].stores_tied_head:
        state_dict["out_head.weight"] = state_dict["tok_emb.weight"]
    if format == "book":
        write_book(state_dict, config, target)
        return []
    tensors = LAYOUTS[format].from_scratch(_with_qkv_biases(state_dict, config), config.n_layers)
    if format == "gguf":
        return write_gguf(tensors, config, Path(target), tokenizer)
    return write_nanogpt(tensors, config, target, bias)


def import_checkpoint(
    source: str | os.PathLike, target: str | os.PathLike, *, n_heads: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Converts a checkpoint of any format, or of the hub, into a native directory, weights unchanged.

    Returns:
        the receipt, which also lies in the target.

    Raises:
        ConversionError: source or target is not as it must be, or `n_heads` is missing where no file tells it.
        ParityError: what was written is not what was read.
    """
    path = Path(source).expanduser()
    if not path.exists() and path.suffix not in (".pth", ".pt", ".gguf"):
        return gpt2_to_scratch(source, target, overwrite=overwrite)  # a hub id
    opened = _open(path)
    if opened.format == "gpt2" and n_heads is None:
        return gpt2_to_scratch(source, target, overwrite=overwrite)
    return _convert(opened, target, "native", n_heads, None, overwrite)


def export_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    *,
    n_heads: int | None = None,
    bias: bool | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts a native checkpoint, or one of any other format, into `format`; arguments as in `read` and `write`.

    The target is a directory: it holds `model.pth`, `ckpt.pt` or `model.gguf`, or is the checkpoint, and the receipt.

    Returns, raises: as `import_checkpoint`.
    """
    opened = _open(source)
    if (opened.format, format) == ("native", "gpt2") and n_heads is None:
        return scratch_to_gpt2(source, target, overwrite=overwrite)
    return _convert(opened, target, format, n_heads, bias, overwrite)


def _convert(opened: _Source, target, format, n_heads, bias, overwrite):
    if format not in FILES:
        raise ConversionError(f"got format {format!r}, but what can be written is {', '.join(FILES)}; choose one")
    path, target = opened.path.resolve(), Path(target).expanduser().resolve()
    if target == path or target in path.parents:
        raise ConversionError(f"the target {target} is or holds the source {path}; choose another target")
    if opened.format == format:
        raise ConversionError(f"{opened.path} has the format {format!r} already; choose another one")
    config, state_dict = _interpret(opened, n_heads)
    try:
        with atomic_directory(target, overwrite) as staging:
            tokenizer = _tokenizer(path)
            written = staging / FILES[format]
            notes = write(state_dict, config, written, format, bias=bias, tokenizer=tokenizer)
            _verify(opened, state_dict, config, written)
            if opened.format == "nanogpt" and config.activation_function == "gelu":
                notes.append(
                    "nanoGPT's files do not tell the activation; taken is today's, the exact GELU. If an early nanoGPT "
                    "with the tanh GELU trained this model, write 'gelu_new' as activation_function into config.json"
                )
            receipt = new_receipt(
                f"{opened.format} converted to {format}",
                source={"name": str(opened.path), "revision": None, "files": _digests(path)},
                tokenizer=type(tokenizer).__name__ if tokenizer is not None else None,
                parity={"passed": True, "weights_equal": True, "tensors": len(state_dict)},
                notes=notes,
                target={"files": _digests(staging)},
            )
            write_receipt(staging, receipt)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save says RuntimeError to a full disk
        raise ConversionError(
            f"failed while writing the target: {error}; {target} is as it was before; free disk space, check "
            "permissions or choose another target, then run again"
        ) from error
    return receipt


def _verify(opened: _Source, state_dict: Mapping[str, torch.Tensor], config: GPTScratchConfig, written: Path) -> None:
    """Raises ParityError unless what was written reads as what was meant, and goes back to what was read."""
    _, back = read(written, n_heads=config.n_heads)
    back.setdefault("out_head.weight", back["tok_emb.weight"])
    meant = {"out_head.weight": state_dict["tok_emb.weight"], **state_dict}
    differing = [name for name in sorted(meant.keys() | back.keys()) if not _same(meant.get(name), back.get(name))]
    if opened.format in LAYOUTS:
        there = LAYOUTS[opened.format].from_scratch(_with_qkv_biases(back, config), config.n_layers)
        differing += [name for name, tensor in opened.tensors.items() if not _same(tensor, there.get(name))]
    if differing:
        raise ParityError(f"{written.name} differs from its source in {_some(differing)}; please report this")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Equal in every bit; a tensor that is not there, which only biases may be, is zero."""
    if one is None or other is None:
        there = one if other is None else other
        return there is not None and not there.any()
    return same_bits(one, other)


# Reading


def _open(path: str | os.PathLike) -> _Source:
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}); what can be read is {READABLE}") from error
    if start == b"GGUF":
        return _Source(path, "gguf", *read_gguf(path))
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _Source(path, *read_torch_file(path))
    remedy = "give the directory it lies in" if path.suffix in (".safetensors", ".index", ".json") else READABLE
    raise ConversionError(f"{path} begins with {start!r}, which no known file does; what can be read is {remedy}")


def _open_directory(path: Path) -> _Source:
    if (path / "config.json").is_file():
        try:
            model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ConversionError(f"{path / 'config.json'} is no valid config ({error}); download it again") from error
        if model_type in ("gpt2", "gpt_scratch"):
            return _Source(path, "gpt2" if model_type == "gpt2" else "native")
        raise ConversionError(f"{path} holds a model of type {model_type!r}; what can be read is {READABLE}")
    if (path / "hparams.json").is_file():
        try:
            hparams = json.loads((path / "hparams.json").read_text(encoding="utf-8"))
            told = {ours: hparams[name] for name, ours in HPARAMS.items()}
        except (ValueError, LookupError, TypeError) as error:
            raise ConversionError(
                f"{path / 'hparams.json'} must be JSON with {', '.join(HPARAMS)} ({error!r}); download it again"
            ) from error
        tensors = read_tensorflow(path)
        # OpenAI's matrices are those of a convolution of width 1, [1, in, out].
        tensors = {name: tensor[0] if tensor.shape[:-2] == (1,) else tensor for name, tensor in tensors.items()}
        return _Source(path, "tensorflow", tensors, told)
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pth", ".pt", ".gguf"))
    remedy = f"give the file, {path / files[0]}" if files else f"what can be read is {READABLE}"
    raise ConversionError(f"{path} has neither config.json nor hparams.json; {remedy}")


def _interpret(source: _Source, n_heads: int | None) -> tuple[GPTScratchConfig, dict[str, torch.Tensor]]:
    if source.format not in LAYOUTS:
        return _read_directory(source, n_heads)
    path, layout, told = source.path, LAYOUTS[source.format], source.told
    source.tensors = {name: t for name, t in source.tensors.items() if not re.fullmatch(layout.dropped, name)}
    tensors = source.tensors

    def tensor(ours: str) -> torch.Tensor:
        name = layout.named(ours).replace("{n}", "0")
        if name not in tensors:
            raise ConversionError(f"{path} lacks {name!r}; take the whole state dict")
        if tensors[name].ndim != 2:
            raise ConversionError(f"{name!r} in {path} has shape {list(tensors[name].shape)}, but it is a matrix")
        return tensors[name]

    try:
        n_layers = layout.count_layers(tensors)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}; take the whole state dict") from error
    vocab_size, emb_dim = tensor("tok_emb.weight").shape
    n_inner = tensor("trf_blocks.{n}.ff.layers.0.weight").numel() // max(emb_dim, 1)
    biased = source.format != "nanogpt" or any(name.endswith(".bias") for name in tensors)
    qkv_bias = "trf_blocks.0.att.W_query.bias" in tensors if source.format == "book" else biased
    sizes = {
        "vocab_size": vocab_size,
        "context_length": len(tensor("pos_emb.weight")),
        "emb_dim": emb_dim,
        "n_layers": n_layers,
        "n_inner": n_inner,
    }
    for name in sizes.keys() & told.keys():
        if told[name] != sizes[name]:
            raise ConversionError(f"{path} says {name}={told[name]!r}, but its tensors say {sizes[name]}; one is wrong")
    head = layout.named("out_head.weight") if source.format != "tensorflow" else ""
    tied = head not in tensors
    end = 50256 if vocab_size > 50256 else None  # a smaller vocabulary is not GPT-2's
    try:
        config = GPTScratchConfig(
            **told
            | sizes
            | {"n_heads": _n_heads(source, emb_dim, n_heads), "n_inner": None if n_inner == 4 * emb_dim else n_inner},
            qkv_bias=qkv_bias,
            tie_word_embeddings=tied,
            bos_token_id=end,
            eos_token_id=end,
        )
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(f"{path} is not usable: {error}") from error

    expected = layout.from_scratch(_expected(config), n_layers)
    if not biased:
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith(".bias")}
    _check(tensors, expected, str(path), "the other tensors' sizes")
    state_dict = layout.to_scratch(tensors, n_layers)
    if source.format == "nanogpt" and not tied:
        config.tie_word_embeddings = torch.equal(tensors[head], state_dict["tok_emb.weight"])
        if config.tie_word_embeddings:
            del state_dict["out_head.weight"]
    for name, meta in _expected(config).items():
        if name not in state_dict:  # nanoGPT without biases
            state_dict[name] = torch.zeros(meta.shape, dtype=state_dict["tok_emb.weight"].dtype)
    return config, state_dict


def _n_heads(source: _Source, emb_dim: int, given: int | None) -> int:
    told = source.told.get("n_heads")
    if told is not None and given not in (None, told):
        raise ConversionError(f"got n_heads={given}, but {source.path} says {told}; leave n_heads out")
    n_heads = given if told is None else told
    official = {width: heads for width, _, heads in PRESETS.values()}.get(emb_dim)
    advice = (
        f"the official model of emb_dim={emb_dim} has {official}"
        if official
        else "look at the config it was trained with"
    )
    if n_heads is None:
        raise ConversionError(
            f"{source.path} does not tell n_heads, and no tensor does; pass n_heads ({advice}). A wrong number that "
            f"divides emb_dim={emb_dim} cannot be noticed: the model would load and compute something else"
        )
    if not isinstance(n_heads, int) or isinstance(n_heads, bool) or n_heads < 1 or emb_dim % n_heads:
        raise ConversionError(
            f"got n_heads={n_heads!r}, but it must be a whole number that divides emb_dim={emb_dim}; {advice}"
        )
    return n_heads


def _read_directory(source: _Source, n_heads: int | None) -> tuple[GPTScratchConfig, dict[str, torch.Tensor]]:
    check_checkpoint(source.path, "gpt2" if source.format == "gpt2" else "gpt_scratch")
    model = GPTScratchForCausalLM.from_pretrained(source.path)
    if n_heads not in (None, model.config.n_heads):
        raise ConversionError(
            f"got n_heads={n_heads}, but {source.path} says {model.config.n_heads}; leave n_heads out"
        )
    state_dict = without_prefix(model.state_dict(), SCRATCH_PREFIX)
    if model.config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    return model.config, state_dict


def _expected(config: GPTScratchConfig) -> dict[str, torch.Tensor]:
    """The state dict of a model with this config, without values; a tied head is left out."""
    with torch.device("meta"):
        state_dict = without_prefix(GPTScratchForCausalLM(config).state_dict(), SCRATCH_PREFIX)
    if config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    return state_dict


def _check(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str, whose: str) -> None:
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        lacks = f"lacks {_some(sorted(missing))}" if missing else ""
        has = f"has {_some(sorted(unknown))}, which this model does not have" if unknown else ""
        raise ConversionError(
            f"{what} {' and '.join(filter(None, (lacks, has)))}; take the whole, unchanged state dict"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name!r} of {what} has shape {list(tensor.shape)}, but by {whose} it must be "
                f"{list(expected[name].shape)}; take weights and sizes from the same model"
            )
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"{name!r} of {what} is {tensor.dtype}, but weights are floats of 16 bits or more")
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # 30 times as fast as to ask every value
            raise ConversionError(f"{name!r} of {what} has values that are NaN or infinite; take an earlier checkpoint")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ConversionError(f"{what} mixes {', '.join(dtypes)}, but a checkpoint has one dtype; cast it")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# Writing


def _check_plain(config: GPTScratchConfig, format: str) -> None:
    """Raises ConversionError for what the model does and the format cannot say."""
    if format in ("native", "gpt2"):
        return
    rules: dict[str, tuple] = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "activation_function": (*TANH_GELU, "gelu") if format == "nanogpt" else TANH_GELU,
    }
    if format != "gguf":
        rules |= {"n_inner": (None, 4 * config.emb_dim), "layer_norm_epsilon": (1e-5,)}
    for name, allowed in rules.items():
        if getattr(config, name) not in allowed:
            raise ConversionError(
                f"the model has {name}={getattr(config, name)!r}, but {format} knows only "
                f"{' or '.join(map(repr, allowed))} and cannot say otherwise; export to 'gpt2' instead"
            )


def _with_qkv_biases(state_dict: Mapping[str, torch.Tensor], config: GPTScratchConfig) -> dict[str, torch.Tensor]:
    """With zeros for the biases that a model without `qkv_bias` does not have, and most formats demand."""
    names = [name for row in rows(config.n_layers) if row.zeros_for for name in row.scratch]
    zeros = state_dict["tok_emb.weight"].new_zeros(config.emb_dim)
    there = [name for name in names if name.removesuffix("bias") + "weight" in state_dict]
    return {**dict.fromkeys(there, zeros), **state_dict}


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in a source directory, in our files or OpenAI's."""
    try:
        if any((path / name).is_file() for name in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(path)
        if (path / "encoder.json").is_file() and (path / "vocab.bpe").is_file():
            return GPT2Tokenizer(vocab=str(path / "encoder.json"), merges=str(path / "vocab.bpe"))
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise ConversionError(f"the tokenizer in {path} cannot be read ({error}); repair or remove it") from error
    return None


def _digests(path: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of a file, or of the files in a directory."""
    return by_name(digests(file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()))
