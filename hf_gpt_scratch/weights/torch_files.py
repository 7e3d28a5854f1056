"""The files that torch.save writes: the book's, nanoGPT's and minGPT's; never more of a pickle than its weights."""

import hashlib
import io
import mmap
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..model.configuration_gpt_scratch import GPTScratchConfig
from .checkpoint import Progress, kind_of, read_pickle, read_stored
from .layouts import READABLE, variant
from .lazy import Lazy, all_zero, held
from .parity import same_bits
from .torch_archive import Stored

# nanoGPT's `model_args`, in our names.
MODEL_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
}


def read_torch_file(path: Path) -> tuple[str, dict[str, Lazy], dict[str, Any]]:
    """The format of a file, its tensors in their own names, and what it tells, in our names.

    Raises:
        ConversionError: not such a file, or a pickle of more than weights, of which nothing runs.
    """
    stored, told = _load(path)
    format = _format(path, stored, told)
    return format, {n: Lazy(t.shape, t.dtype, partial(read_stored, t)) for n, t in stored.items()}, told


def _load(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    content = read_pickle(path)
    told: dict[str, Any] = {}
    tensors = content
    for key in ("state_dict", "state", "model"):
        inside = content.get(key) if isinstance(content, dict) and "model_args" not in content else None
        if isinstance(inside, dict):
            raise ConversionError(
                f"{path} has a dict under {key!r}, and beside it what says nothing about weights; if that is the state "
                f"dict, save it alone: torch.save(torch.load(path, weights_only=True)[{key!r}], 'model.pth')"
            )
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        tensors = content["model_state_dict"]  # the book's model_and_optimizer.pth
    elif isinstance(content, dict) and isinstance(content.get("model"), dict):
        tensors, told = content["model"], _read_model_args(path, content)
    if not isinstance(tensors, dict) or not tensors:
        raise ConversionError(
            f"{path} holds a {type(tensors).__name__}, but a state dict is wanted; what can be read is {READABLE}"
        )
    bare: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise ConversionError(
                f"{path} holds {name!r}: {kind_of(tensor)}, but a state dict maps names to dense tensors"
            )
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)  # torch.compile, DataParallel
        if name in bare:
            raise ConversionError(f"{path} holds {name!r} twice, with different prefixes; keep one")
        bare[name] = tensor
    return bare, told


def _read_model_args(path: Path, checkpoint: dict) -> dict[str, Any]:
    args, settings = checkpoint.get("model_args"), checkpoint.get("config")
    if not isinstance(args, dict):
        raise ConversionError(
            f"{path} has 'model' but no 'model_args', which nanoGPT saves beside it; what can be read is {READABLE}"
        )
    foreign = sorted(map(str, args.keys() - MODEL_ARGS.keys() - {"bias"}))
    if foreign:
        raise ConversionError(f"{path} has the model_args {', '.join(foreign)}, which nanoGPT itself does not have")
    told = {ours: args[name] for name, ours in MODEL_ARGS.items() if name in args}
    for name in MODEL_ARGS.keys() & args.keys():
        if not isinstance(args[name], int | float):
            raise ConversionError(
                f"{path} has {kind_of(args[name])} for {name} in its model_args, but they are numbers; save it again"
            )
    if isinstance(settings, dict) and "activation_function" in settings:  # ours says which, nanoGPT's own does not
        told["activation_function"] = settings["activation_function"]
    return told


def _format(path: Path, tensors: Mapping[str, Stored], told: dict[str, Any]) -> str:
    if "trf_blocks.0.norm1.scale" in tensors:
        return "book"
    fused = tensors.get("transformer.h.0.attn.c_attn.weight", tensors.get("h.0.attn.c_attn.weight"))
    if fused is not None and len(fused.shape) == 2 and fused.shape[1] == 3 * fused.shape[0]:
        raise ConversionError(f"{path} is the weights file of an official checkpoint; give the directory it lies in")
    if "transformer.h.0.attn.c_attn.weight" not in tensors:
        if known := variant({name: tensor.shape for name, tensor in tensors.items()}):
            raise ConversionError(f"{path} {known}")
        names = ", ".join(repr(name[:200]) for name in list(tensors)[:4])
        raise ConversionError(f"{path} holds {names}, …, which no known model has; what can be read is {READABLE}")
    # minGPT always saves its mask; nanoGPT only where torch has no flash attention.
    return "mingpt" if not told and "transformer.h.0.attn.bias" in tensors else "nanogpt"


def write_book(tensors: Mapping[str, Lazy], config: GPTScratchConfig, target: Path, progress: Progress) -> str:
    """Writes a state dict that the book's own `GPTModel` loads with `strict=True`; returns the file's sha256."""
    # The book's attention registers its mask as a buffer, so `load_state_dict` asks for it; one serves all layers.
    [mask] = held({"": torch.ones(config.context_length, config.context_length).triu(1)}).values()
    masks = {f"trf_blocks.{n}.att.mask": mask for n in range(config.n_layers)}
    return _save({**tensors, **masks}, {}, None, target, progress)


def write_nanogpt(
    tensors: Mapping[str, Lazy], config: GPTScratchConfig, target: Path, bias: bool | None, progress: Progress
) -> tuple[list[str], str]:
    """Writes nanoGPT's tensors as the checkpoint that its `sample.py` loads; see `formats.write`.

    Returns:
        notes, and the file's sha256.
    """
    head, embedding = tensors["lm_head.weight"], tensors["transformer.wte.weight"]
    if head is not embedding and not same_bits(head.read(), embedding.read()):
        raise ConversionError(
            "the model's out_head.weight differs from tok_emb.weight, but nanoGPT has one matrix for both; export to "
            "'book' or 'gpt2' instead"
        )
    tensors = {**tensors, "lm_head.weight": embedding}
    set_biases = [name for name, tensor in tensors.items() if name.endswith(".bias") and not all_zero(tensor.read())]
    if bias is None:
        bias = config.qkv_bias or bool(set_biases)
    if not bias:
        if set_biases:
            raise ConversionError(
                f"bias=False was asked for, but {len(set_biases)} biases are not zero, first {set_biases[0]!r}; export "
                "with bias=True"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    about = {
        "model_args": {theirs: getattr(config, ours) for theirs, ours in MODEL_ARGS.items()} | {"bias": bias},
        "config": {"activation_function": config.activation_function},  # nanoGPT ignores it, `read` does not
    }
    sha256 = _save(tensors, about, "model", target, progress)
    if config.activation_function == "gelu":
        return [], sha256
    note = (
        f"nanoGPT computes the exact GELU, this model {config.activation_function!r}, so its logits differ "
        "slightly there, as those of nanoGPT's own GPT-2 do; read here, the file is this model"
    )
    return [note], sha256


def _save(
    tensors: Mapping[str, Lazy], about: Mapping[str, Any], place: str | None, target: Path, progress: Progress
) -> str:
    """`torch.save` of tensors that are made one at a time, alone or under the key `place` beside `about`.

    It takes all tensors at once, and writes one after the other. So their values go into a nameless file first; what it
    takes are tensors in the mapped memory of that file, and of those that it has written nothing stays in memory.

    Returns:
        the file's sha256.
    """
    distinct = dict.fromkeys(tensors.values())  # what is one tensor with two names is saved once
    progress.step(f"Writing {target.name}", 2 * sum(tensor.nbytes for tensor in distinct))
    with tempfile.TemporaryFile(dir=target.parent) as staged:
        for tensor in distinct:
            staged.write(tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress.advance(tensor.nbytes)
        staged.flush()
        memory = mmap.mmap(staged.fileno(), 0, access=mmap.ACCESS_COPY)
    offset, mapped = 0, {}
    for tensor in distinct:
        values = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.shape.numel(), offset=offset)
        mapped[tensor] = values.reshape(tensor.shape)
        offset += tensor.nbytes
    state_dict = {name: mapped[tensor] for name, tensor in tensors.items()}
    with _Saved(target, memory, progress) as file:
        torch.save(state_dict if place is None else {place: state_dict, **about}, file)
    return file.digest.hexdigest()


class _Saved(io.BufferedWriter):
    """A file that is hashed while it is written, from mapped memory that is let go of."""

    def __init__(self, path: Path, memory: mmap.mmap, progress: Progress):
        super().__init__(io.FileIO(path, "w"))
        self.memory, self.progress, self.digest = memory, progress, hashlib.sha256()
        self.pool = ThreadPoolExecutor(1)

    def write(self, data) -> int:
        hashed = self.pool.submit(self.digest.update, data)
        count = super().write(data)
        hashed.result()
        self.memory.madvise(mmap.MADV_DONTNEED)  # nobody has written to it: it is as the file when read again
        self.progress.advance(count)
        return count
