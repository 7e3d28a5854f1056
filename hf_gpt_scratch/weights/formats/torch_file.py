"""State dicts in files of `torch.save`: only weights are read from a pickle, and written one tensor at a time."""

import hashlib
import io
import mmap
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ..checkpoint import Progress, kind_of, lazy, read_pickle
from ..tensors import LazyTensor
from ..torch_archive import Stored
from .format import Found, readable

# nanoGPT's `model_args`, in our names.
MODEL_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
}


@dataclass(frozen=True)
class StateDict:
    """The content of a file of `torch.save`.

    Args:
        tensors: by name, without the prefixes of torch.compile and DataParallel.
        metadata: nanoGPT's `model_args`, stored beside the tensors, under our names.
    """

    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any]


def state_dict(found: Found) -> StateDict | None:
    """The state dict in a file; None if the path is not a file of `torch.save`.

    Raises:
        ConversionError: it is damaged, has no state dict, or its pickle refers to more than weights (none of it runs).
    """
    if found.start[:2] != b"PK" and found.start[:1] != b"\x80":
        return None
    return found.once(_read)


def _read(path: Path) -> StateDict:
    content = read_pickle(path)
    metadata: dict[str, Any] = {}
    tensors = content
    for key in ("state_dict", "state", "model"):
        inside = content.get(key) if isinstance(content, dict) and "model_args" not in content else None
        if isinstance(inside, dict):
            raise ConversionError(
                f"{path} has a dict under {key!r}, in a layout that is not known; if that dict is the state dict, save "
                f"it alone: torch.save(torch.load(path, weights_only=True)[{key!r}], 'model.pth')"
            )
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        tensors = content["model_state_dict"]  # the book's model_and_optimizer.pth
    elif isinstance(content, dict) and isinstance(content.get("model"), dict):
        tensors, metadata = content["model"], _model_args(path, content)
    if not isinstance(tensors, dict) or not tensors:
        raise ConversionError(
            f"{path} holds a {type(tensors).__name__} instead of a state dict; these formats can be read: {readable()}"
        )
    bare: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise ConversionError(
                f"{path} holds {name!r}: {kind_of(tensor)}, but a state dict maps names to dense tensors"
            )
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)  # torch.compile, DataParallel
        if name in bare:
            raise ConversionError(f"{path} holds {name!r} twice, with different prefixes; keep one")
        bare[name] = lazy(tensor)
    return StateDict(bare, metadata)


def _model_args(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The metadata that nanoGPT saves beside the weights, under our names.

    Raises:
        ConversionError: nanoGPT did not write it.
    """
    args, settings = content.get("model_args"), content.get("config")
    if not isinstance(args, dict):
        raise ConversionError(
            f"{path} has 'model' but no 'model_args', which nanoGPT saves beside it; what can be read is {readable()}"
        )
    foreign = sorted(map(str, args.keys() - MODEL_ARGS.keys() - {"bias"}))
    if foreign:
        raise ConversionError(
            f"{path} has the model_args {', '.join(foreign)}, which nanoGPT itself does not have; convert a plain GPT-2"
        )
    metadata = {ours: args[name] for name, ours in MODEL_ARGS.items() if name in args}
    for name in MODEL_ARGS.keys() & args.keys():
        if not isinstance(args[name], int | float):
            raise ConversionError(
                f"{path} has {kind_of(args[name])} for {name} in its model_args, but it must be a number; correct it"
            )
    if isinstance(settings, dict) and "activation_function" in settings:  # only files of this package have it
        metadata["activation_function"] = settings["activation_function"]
    return metadata


def holds_conv1d(there: StateDict) -> bool:
    """Whether query, key and value are in one matrix `[in, out]`, as in the official model alone."""
    names = ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight")
    fused = next((there.tensors[name] for name in names if name in there.tensors), None)
    return fused is not None and len(fused.shape) == 2 and fused.shape[1] == 3 * fused.shape[0]


def save_tensors(
    tensors: Mapping[str, LazyTensor], about: Mapping[str, Any], place: str | None, target: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Writes lazy tensors with `torch.save`: a plain state dict, or a state dict under the key `place`, beside `about`.

    `torch.save` needs all tensors at once. So the values are first written to a temporary file, one tensor at a time,
    and `torch.save` is given tensors that are mapped from it, whose memory the system can reclaim at any time.

    Returns:
        sha256 and size of the file, by file name.
    """
    distinct = dict.fromkeys(tensors.values())  # a tensor that has two names is saved once
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
    with Hashed(target, progress) as file:
        torch.save(state_dict if place is None else {place: state_dict, **about}, file)
    return {target.name: {"sha256": file.digest.hexdigest(), "bytes": target.stat().st_size}}


class Hashed(io.BufferedWriter):
    """A file that is hashed as it is written."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(io.FileIO(path, "w"))
        self.progress, self.digest = progress, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        count = super().write(data)
        self.progress.advance(count)
        return count
