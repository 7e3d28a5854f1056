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
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ConversionError
from ..model.configuration_gpt_scratch import OF_ANOTHER_TYPE, PRESETS, TANH_GELU, GPTScratchConfig, model_type_of
from ..model.configuration_gpt_scratch import told as shown
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM
from ..model.weight_map import SCRATCH_PREFIX, without_prefix
from .checkpoint import Progress, check_files, checked_finite, read_json, refuse_no_file, refuse_pointer
from .conversion import (
    CARD,
    MAX_SHARD_SIZE,
    Check,
    Weights,
    find_source,
    gpt2_to_scratch,
    meta_model,
    quiet_transformers,
    scratch_to_gpt2,
    verify_weights,
    write_model,
)
from .gguf_file import read_gguf, write_gguf
from .layouts import BOOK, GGUF, GPT2, NANOGPT, NATIVE, READABLE, TENSORFLOW, variant
from .lazy import Lazy, held, with_qkv_biases, zero
from .model_card import model_card
from .parity import same_bits
from .publish import Stamps, local_path, new_receipt, publishing, refuse_overlap, seal, target_path, told_while
from .tf_checkpoint import read_tensorflow
from .tokenizer_files import carry_tokenizer, left_behind, tokenizer_beside
from .torch_files import read_torch_file, write_book, write_nanogpt
from .trust import strip_code

LAYOUTS = {
    "native": NATIVE,
    "gpt2": GPT2,
    "book": BOOK,
    "nanogpt": NANOGPT,
    "mingpt": NANOGPT,
    "tensorflow": TENSORFLOW,
    "gguf": GGUF,
}
DIRECTORIES = {"native": "gpt_scratch", "gpt2": "gpt2"}  # and their model types
# What a written format is called within its target directory; directories have no name of their own.
FILES = {"native": "", "gpt2": "", "book": "model.pth", "nanogpt": "ckpt.pt", "gguf": "model.gguf"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
logger = logging.get_logger(__name__)
# What the files of nanoGPT and minGPT do not tell: the activation that is taken, and when it is another.
ACTIVATIONS = {
    "nanogpt": (
        "gelu",
        "the exact GELU, as in today's nanoGPT",
        "gelu_new",
        "build-nanogpt or a nanoGPT of before June 2023",
    ),
    "mingpt": (
        "gelu_new",
        "the tanh GELU, as in minGPT",
        "gelu",
        "a nanoGPT without flash attention, which saves masks too,",
    ),
}
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
    """A checkpoint as it lies there: tensors in their own names, and what the file tells, in our names.

    `notes` is what its reader should know, in sentences.
    """

    path: Path
    format: str
    tensors: dict[str, Lazy] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def detect(path: str | os.PathLike) -> str:
    """The format of a checkpoint, by its content: "native", "gpt2", "book", "nanogpt", "mingpt", "tensorflow", "gguf".

    Raises:
        ConversionError: none of them.
    """
    return _open(path).format


def read(path: str | os.PathLike, n_heads: int | None = None) -> tuple[GPTScratchConfig, dict[str, torch.Tensor]]:
    """The config and the state dict of a checkpoint in any format, in the book's names; a tied head is left out.

    Args:
        n_heads: for "book" and "mingpt", whose files do not say it. A wrong number that divides emb_dim cannot be
            noticed: the model loads and computes something else.

    Raises:
        ConversionError: not a whole, finite GPT-2 of a known format.
    """
    source = _open(path)
    config, tensors = _interpret(source, n_heads)
    for note in source.notes:
        logger.warning(f"{path}: {note}")
    return config, {name: tensor.read() for name, tensor in tensors.items()}


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
    tensors = held(state_dict)
    _check(tensors, _expected(config), "the state dict", "its config")
    for name, tensor in state_dict.items():
        checked_finite(tensor, name, "the state dict")
    return _write(tensors, config, Path(target), format, bias, tokenizer, MAX_SHARD_SIZE, Progress())[0]


def import_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    n_heads: int | None = None,
    revision: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint of any format, or of the hub, into a native directory, weights unchanged.

    Memory holds about two of the largest tensors, unless `check` is True. Other programs' models are compared by their
    weights alone, unless `check` is False.

    Args:
        source: file, directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        n_heads: for "book" and "mingpt", whose files do not say it. A wrong number that divides emb_dim cannot be
            noticed: the model loads and computes something else.
        revision: branch, tag or commit of a hub id.
        check: before the result is published, compare it with the official model in float32, for which both models
            are in memory; "weights": compare only the weights, bit for bit, streaming; False: compare nothing.
        overwrite: replace a target that a conversion has written.
        max_shard_size: as in `save_pretrained`: bytes, or a string such as "5GB".
        progress: its `step` and `advance` are called as the conversion proceeds.

    Returns:
        the receipt, which also lies in the target: files with their sha256, parity figures, versions.

    Raises:
        ConversionError: source or target is not as it must be, or `n_heads` is missing where no file says it.
        ParityError: what was written is not what was read.
    """
    path = local_path(source)
    there = os.path.exists(path) or path.suffix in (".pth", ".pt", ".gguf")
    with told_while("reading the source", target):
        stamps = Stamps(path)
        opened = _open(path) if there and revision is None else None
    if opened is None or opened.format in DIRECTORIES:
        if opened is not None and n_heads is not None:
            _interpret(opened, n_heads)
        options: dict[str, Any] = dict(overwrite=overwrite, max_shard_size=max_shard_size, progress=progress)
        return gpt2_to_scratch(source, target, revision=revision, check=check, **options)
    return _convert(opened, stamps, target, "native", n_heads, None, check, overwrite, max_shard_size, progress)


def export_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    *,
    n_heads: int | None = None,
    revision: str | None = None,
    bias: bool | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a native checkpoint, or one of any other format, into `format`, weights unchanged.

    The target is a directory: it holds `model.pth`, `ckpt.pt` or `model.gguf`, or is the checkpoint, and the receipt.
    For the first two the disk must have room for the weights twice.

    Args:
        source: file, directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        format: "gpt2", "book", "nanogpt", "gguf" or "native".
        n_heads: as in `convert`.
        revision: branch, tag or commit of a hub id.
        bias: for "nanogpt", its `bias`; None: unless all biases are zero and `qkv_bias` is off.
        check: as in `convert`.
        overwrite: replace a target that a conversion has written.
        max_shard_size: as in `save_pretrained`: bytes, or a string such as "5GB".
        progress: its `step` and `advance` are called as the conversion proceeds.

    Returns:
        the receipt, which also lies in the target.

    Raises:
        ConversionError: source or target is not as it must be, or the format cannot express what the model does.
        ParityError: what was written is not what was read.
    """
    with told_while("reading the source", target):
        path = local_path(source)
        there = os.path.exists(path) or path.suffix in (".pth", ".pt", ".gguf")
        path = path if there and revision is None else find_source(source, revision)
        stamps = Stamps(path)
        opened = _open(path)
    if (opened.format, format) == ("native", "gpt2"):
        if n_heads is not None:
            _interpret(opened, n_heads)
        options: dict[str, Any] = dict(overwrite=overwrite, max_shard_size=max_shard_size, progress=progress)
        return scratch_to_gpt2(source, target, revision=revision, check=check, **options)
    return _convert(opened, stamps, target, format, n_heads, bias, check, overwrite, max_shard_size, progress)


def _convert(opened: _Source, stamps, target, format, n_heads, bias, check, overwrite, max_shard_size, progress):
    if format not in FILES:
        raise ConversionError(f"got format {format!r}, but what can be written is {', '.join(FILES)}; choose one")
    path, target, progress = opened.path, target_path(target), progress or Progress()
    refuse_overlap(target, path, overwrite)
    if opened.format == format:
        raise ConversionError(f"{opened.path} has the format {format!r} already; choose another one")
    with told_while("reading the source", target):
        config, tensors = _interpret(opened, n_heads)
    needed = sum(tensor.nbytes for tensor in tensors.values()) * (2 if format in ("book", "nanogpt") else 1)
    files = [file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    with (
        publishing(target, overwrite, needed) as staging,
        stamps.hashed_meanwhile(files) as source_files,
        quiet_transformers(),
    ):
        tokenizer = tokenizer_beside(path) if format == "gguf" else None
        written = staging / FILES[format]
        notes, target_hashes = _write(tensors, config, written, format, bias, tokenizer, max_shard_size, progress)
        if check:
            _verify(opened, config, written, progress)
        carried = type(tokenizer).__name__ if tokenizer is not None and not notes else None
        if format in DIRECTORIES:
            carried, left = carry_tokenizer(path, staging)
            notes += left
        elif tokenizer is None:
            notes += left_behind(path, f"{FILES[format]} has no place for a tokenizer")
        if not path.is_dir():
            notes += left_behind(path.parent, f"nothing says that they belong to {path.name}")
        notes = [*opened.notes, *notes, *strip_code(staging)]
        receipt = new_receipt(
            f"{opened.format} converted to {format}",
            source={"name": str(opened.path), "format": opened.format, "revision": None, "files": source_files()},
            tokenizer=carried,
            parity={"passed": True, "weights_equal": True, "tensors": len(tensors)} if check else None,
            notes=notes,
        )
        if format == "native":
            model = meta_model(GPTScratchForCausalLM, GPTScratchConfig.from_pretrained(staging))
            model_card(model, receipt).save(staging / CARD)
        seal(staging, receipt, target_hashes)
    return receipt


def _verify(opened: _Source, config: GPTScratchConfig, written: Path, progress: Progress) -> None:
    """Raises ParityError unless what was written, read again, goes back to what was read."""
    layout = LAYOUTS[opened.format]
    _, back = _interpret(_open(written), config.n_heads)
    source = opened.tensors
    if opened.format != "tensorflow":  # which has no head
        back.setdefault("out_head.weight", back["tok_emb.weight"])
        embedding, head = (layout.named(name) for name in ("tok_emb.weight", "out_head.weight"))
        source = {head: source[embedding], **source}
    back = layout.from_scratch(with_qkv_biases(back, config.n_layers), config.n_layers)
    verify_weights(source, back, progress)


# Reading


def _open(path: str | os.PathLike) -> _Source:
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    refuse_no_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}); what can be read is {READABLE}") from error
    if start == b"GGUF":
        tensors, told = read_gguf(path)
        notes = ["left behind: the tokenizer inside the file"] if told.pop("tokenizer") else []
        return _Source(path, "gguf", tensors, told, notes)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _Source(path, *read_torch_file(path))
    refuse_pointer(path)
    if path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        raise ConversionError(
            f"{path} has no config.json beside it, without which safetensors are not read; if it is the book's state "
            f"dict, torch.save(safetensors.torch.load_file({str(path)!r}), 'model.pth') makes a file that is"
        )
    remedy = f"give the directory it lies in, {path.parent}"
    if path.suffix not in (".safetensors", ".index", ".json"):
        remedy = f"what can be read is {READABLE}"
    raise ConversionError(f"{path} begins with {start!r}, which no known file does; {remedy}")


def _open_directory(path: Path) -> _Source:
    check_files(path)
    if (path / "config.json").is_file():
        values = read_json(path / "config.json")
        model_type = model_type_of(values) if isinstance(values, dict) else None
        for format, known in DIRECTORIES.items():
            if model_type == known:
                return _Source(path, format)
        raise ConversionError(
            f"{path} holds a model of type {model_type!r}; what can be read is {READABLE}. {OF_ANOTHER_TYPE}"
        )
    if (path / "hparams.json").is_file():
        hparams = read_json(path / "hparams.json")
        try:
            told = {ours: hparams[name] for name, ours in HPARAMS.items()}
        except (LookupError, TypeError) as error:
            raise ConversionError(
                f"{path / 'hparams.json'} must have {', '.join(HPARAMS)} ({error!r}); download it again"
            ) from error
        tensors = read_tensorflow(path)
        # OpenAI's matrices are those of a convolution of width 1, [1, in, out].
        tensors = {name: _first(tensor) if tensor.shape[:-2] == (1,) else tensor for name, tensor in tensors.items()}
        more = {name: value for name, value in hparams.items() if name not in HPARAMS}
        notes = [f"left out, since OpenAI's hparams.json has no such keys: {shown(more)}"] if more else []
        return _Source(path, "tensorflow", tensors, told, notes)
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pth", ".pt", ".gguf", ".safetensors"))
    remedy = f"give the file, {path / files[0]}" if files else f"what can be read is {READABLE}"
    raise ConversionError(f"{path} has neither config.json nor hparams.json; {remedy}")


def _first(tensor: Lazy) -> Lazy:
    return Lazy(tensor.shape[1:], tensor.dtype, lambda: tensor.read()[0])


def _finite(tensor: Lazy, name: str, path: Path) -> Lazy:
    """The same, but an error when a value is NaN or infinite."""
    return replace(tensor, read=lambda: checked_finite(tensor.read(), name, path.name))


def _interpret(source: _Source, n_heads: int | None) -> tuple[GPTScratchConfig, dict[str, Lazy]]:
    """The config and the tensors in the book's names; `source.tensors` has those that were used, in its own."""
    if source.format in DIRECTORIES:
        return _interpret_directory(source, n_heads)
    path, layout, told = source.path, LAYOUTS[source.format], source.told
    source.tensors = {
        name: _finite(tensor, name, path)
        for name, tensor in source.tensors.items()
        if not re.fullmatch(layout.dropped, name)
    }
    tensors = source.tensors
    if source.format == "book" and (known := variant({name: tensor.shape for name, tensor in tensors.items()})):
        raise ConversionError(f"{path} {known}")
    if source.format in ACTIVATIONS and "activation_function" not in told:
        told["activation_function"], what, other, whose = ACTIVATIONS[source.format]
        source.notes.append(
            f"no file of its kind tells the activation; taken is {what}. If {whose} trained this model, it is another: "
            f"write {other!r} as activation_function into the config.json that `convert` makes of it"
        )

    def shape(ours: str) -> torch.Size:
        name = layout.named(ours).replace("{n}", "0")
        if name not in tensors:
            raise ConversionError(f"{path} lacks {name!r}; take the whole state dict")
        if len(tensors[name].shape) != 2:
            raise ConversionError(f"{name!r} in {path} has shape {list(tensors[name].shape)}, but it is a matrix")
        return tensors[name].shape

    try:
        n_layers = layout.count_layers(tensors)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}; take the whole state dict") from error
    vocab_size, emb_dim = shape("tok_emb.weight")
    n_inner = shape("trf_blocks.{n}.ff.layers.0.weight").numel() // max(emb_dim, 1)
    biased = source.format != "nanogpt" or any(name.endswith(".bias") for name in tensors)
    qkv_bias = "trf_blocks.0.att.W_query.bias" in tensors if source.format == "book" else biased
    sizes = {
        "vocab_size": vocab_size,
        "context_length": shape("pos_emb.weight")[0],
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
    ours = layout.to_scratch(tensors, n_layers)
    if not tied and same_bits(tensors[head].read(), ours["tok_emb.weight"].read()):
        config.tie_word_embeddings = True
        del ours["out_head.weight"]
        if source.format == "book":
            source.notes.append(
                "out_head.weight is equal to tok_emb.weight, so the model is tied: one matrix, trained as one. "
                "GPTScratchForCausalLM.from_book keeps them apart if the file has two copies"
            )
    for name, meta in _expected(config).items():
        if name not in ours:  # nanoGPT without biases
            ours[name] = zero(meta.shape, ours["tok_emb.weight"].dtype)
    return config, ours


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
            f"{source.path} does not tell n_heads, and no tensor does; pass n_heads, in a command --n-heads "
            f"({advice}). A wrong number "
            f"that divides emb_dim={emb_dim} cannot be noticed: the model would load and compute something else"
        )
    if not isinstance(n_heads, int) or isinstance(n_heads, bool) or n_heads < 1 or emb_dim % n_heads:
        raise ConversionError(
            f"got n_heads={n_heads!r}, but it must be a whole number that divides emb_dim={emb_dim}; {advice}"
        )
    return n_heads


def _interpret_directory(source: _Source, n_heads: int | None) -> tuple[GPTScratchConfig, dict[str, Lazy]]:
    weights = Weights(source.path, DIRECTORIES[source.format])
    config = weights.config
    if source.format == "gpt2":
        config = GPTScratchConfig.from_gpt2(config)
    if n_heads not in (None, config.n_heads):
        raise ConversionError(f"got n_heads={n_heads}, but {source.path} says {config.n_heads}; leave n_heads out")
    source.tensors = weights.tensors()
    tensors = source.tensors if source.format == "native" else weights.translated()
    _check(tensors, _expected(config), str(source.path), "config.json")
    return config, tensors


def _expected(config: GPTScratchConfig) -> dict[str, Lazy]:
    """The tensors of a model with this config, without values; a tied head is left out."""
    with torch.device("meta"):
        state_dict = without_prefix(GPTScratchForCausalLM(config).state_dict(), SCRATCH_PREFIX)
    if config.tie_word_embeddings:
        state_dict.pop("out_head.weight", None)
    return held(state_dict)


def _check(tensors: Mapping[str, Lazy], expected: Mapping[str, Lazy], what: str, whose: str) -> None:
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        lacks = f"lacks {_some(sorted(missing))}" if missing else ""
        has = f"has {_some(sorted(unknown))}, which this model does not have" if unknown else ""
        raise ConversionError(
            f"{what} {' and '.join(filter(None, (lacks, has)))}; only the whole state dict of a plain GPT-2 is taken"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name!r} of {what} has shape {list(tensor.shape)}, but by {whose} it must be "
                f"{list(expected[name].shape)}; take weights and sizes from the same model"
            )
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"{name!r} of {what} is {tensor.dtype}, but weights are floats of 16 bits or more")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ConversionError(f"{what} mixes {', '.join(dtypes)}, but a checkpoint has one dtype; cast it")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# Writing


def _write(
    tensors: Mapping[str, Lazy],
    config: GPTScratchConfig,
    target: Path,
    format: str,
    bias: bool | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    progress: Progress,
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Writes tensors in the book's names, one at a time.

    Returns:
        notes, and sha256 and size of the files that were hashed on the way.
    """
    _check_plain(config, format)
    layout = LAYOUTS[format]
    if format in DIRECTORIES:
        model = meta_model(GPTScratchForCausalLM, copy.deepcopy(config))
        if format == "gpt2":
            model = meta_model(GPT2LMHeadModel, config.to_gpt2())
            tensors = layout.from_scratch(with_qkv_biases(tensors, config.n_layers), config.n_layers)
        model.to(next(iter(tensors.values())).dtype)
        hashes = write_model(model, tensors, target, max_shard_size, progress)
        return [], hashes
    if config.tie_word_embeddings and layout.stores_tied_head:
        tensors = {**tensors, "out_head.weight": tensors["tok_emb.weight"]}
    if format != "book":
        tensors = with_qkv_biases(tensors, config.n_layers)
    tensors = layout.from_scratch(tensors, config.n_layers)
    if format == "gguf":
        return write_gguf(tensors, config, target, tokenizer, progress), {}
    notes: list[str] = []
    if format == "book":
        sha256 = write_book(tensors, config, target, progress)
    else:
        notes, sha256 = write_nanogpt(tensors, config, target, bias, progress)
    return notes, {target.name: {"sha256": sha256, "bytes": target.stat().st_size}}


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
