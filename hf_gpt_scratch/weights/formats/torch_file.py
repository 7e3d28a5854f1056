"""State dicts in files: never more of a pickle than its weights and settings, and written a tensor at a time."""

import hashlib
import io
import mmap
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ...model.book_files import bare, shared, weights_in
from ..checkpoint import Progress, kind_of, lazy, read_pickle, safetensors, shown
from ..tensors import LazyTensor
from ..torch_archive import Stored, Unbuilt
from .format import Found, Training, readable

# nanoGPT's `model_args`, in our names.
MODEL_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
}


# What build-nanogpt's config says beside its weights; its model has the tanh GELU and no choice.
BUILD_NANOGPT = MODEL_ARGS.keys() - {"dropout"}


@dataclass(frozen=True)
class StateDict:
    """What a file of `torch.save`, or one of safetensors without a config.json, holds.

    Args:
        tensors: by their names, without the prefixes of torch.compile, DataParallel and Lightning.
        metadata: what nanoGPT's `model_args` or build-nanogpt's `config` beside them say, in our names.
        notes: what its reader should know, in sentences.
        training: what lies beside the weights for training to go on.
    """

    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    training: Training | None = None


def state_dict(found: Found) -> StateDict | None:
    """The state dict at a path; None if no such file lies there.

    Raises:
        ConversionError: it is damaged, has no state dict, or its pickle refers to more than weights (none of it runs).
    """
    if not found.is_directory and is_safetensors(found.path):
        return found.once(_read_safetensors)
    if found.start[:2] != b"PK" and found.start[:1] != b"\x80":
        return None
    return found.once(_read)


def is_safetensors(path: Path) -> bool:
    """Whether it is a file of safetensors that stands alone; beside a config.json it is part of a directory."""
    return path.suffix == ".safetensors" and not (path.parent / "config.json").is_file()


def _read_safetensors(path: Path) -> StateDict:
    tensors = safetensors(path)
    if any(name.startswith("model.") for name in tensors):
        raise ConversionError(
            f"{path} has names that begin with 'model.', as a directory's weights have, but no config.json lies beside "
            "it; give it the config.json that it came with, and give the directory"
        )
    return StateDict(shared(_named(path, tensors)))


def _read(path: Path) -> StateDict:
    content = read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, but a state dict is wanted; what can be read is {readable()}"
        )
    try:
        place, tensors = weights_in(content)
    except ValueError as error:
        raise ConversionError(f"{path} {error}") from error
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise ConversionError(
                f"{path} holds {name!r}: {kind_of(tensor)}, but a state dict maps names to dense tensors"
            )
    named = _named(path, {name: lazy(tensor) for name, tensor in tensors.items()})
    found = StateDict(named, training=_training(content, named))
    if place is not None:
        others = {name: value for name, value in content.items() if name != place and isinstance(value, dict)}
        others = {name: value for name, value in others.items() if any(isinstance(v, Stored) for v in value.values())}
        if others:
            found.notes.append(f"the weights are those under {place!r}; left out is {', '.join(map(shown, others))}")
        config = content.get("config")
        if isinstance(content.get("model_args"), dict):
            found.metadata.update(_model_args(path, content["model_args"], "model_args"))
            if isinstance(config, dict) and "activation_function" in config:  # ours says which, nanoGPT's does not
                found.metadata["activation_function"] = config["activation_function"]
        elif isinstance(config, Unbuilt) and config.values:
            found.metadata.update(_model_args(path, config.values, "config"))
            if config.values.keys() == BUILD_NANOGPT:
                found.metadata["activation_function"] = "gelu_new"
                found.notes.append("its config is build-nanogpt's, whose activation is the tanh GELU, 'gelu_new'")
    return found


def _training(content: dict[Any, Any], named: Mapping[str, LazyTensor]) -> Training:
    """What lies beside the weights for training to go on; its steps are nanoGPT's "iter_num", or "step"."""
    optimizers: dict[str, Any] = {}
    for name, value in content.items():
        states = value if isinstance(value, list) else [value]
        states = [state for state in states if isinstance(state, dict) and {"state", "param_groups"} & state.keys()]
        optimizers |= {name if i == 0 else f"{name} {i}": state for i, state in enumerate(states)}
    steps = [content[name] for name in ("iter_num", "step") if type(content.get(name)) is int and content[name] >= 0]
    config = content.get("config")
    shapes = {name: tensor.shape for name, tensor in named.items()}
    return Training(optimizers, shapes, steps[0] if steps else None, config if isinstance(config, dict) else {})


def _named(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under the names that the formats know."""
    try:
        names = bare(tensors)
    except ValueError as error:
        raise ConversionError(f"{path} {error}") from error
    found = {names[name]: tensor for name, tensor in tensors.items()}
    if "wte.weight" in found:  # nanoGPT's `model.transformer` and `lm_head`, saved without the first
        found = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in found.items()}
    return found


def _model_args(path: Path, args: dict[str, Any], place: str) -> dict[str, Any]:
    """What nanoGPT and build-nanogpt save beside the weights, in our names.

    Raises:
        ConversionError: it is not theirs.
    """
    foreign = sorted(map(str, args.keys() - MODEL_ARGS.keys() - {"bias"}))
    if foreign:
        raise ConversionError(f"{path} has the {place} {', '.join(foreign)}, which nanoGPT itself does not have")
    for name in MODEL_ARGS.keys() & args.keys():
        if not isinstance(args[name], int | float):
            raise ConversionError(
                f"{path} has {kind_of(args[name])} for {name} in its {place}, but it must be a number; correct it"
            )
    return {ours: args[name] for name, ours in MODEL_ARGS.items() if name in args}


def holds_conv1d(there: StateDict) -> bool:
    """Whether query, key and value are in one matrix `[in, out]`, as in the official model alone."""
    names = ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight")
    fused = next((there.tensors[name] for name in names if name in there.tensors), None)
    return fused is not None and len(fused.shape) == 2 and fused.shape[1] == 3 * fused.shape[0]


def save_tensors(
    tensors: Mapping[str, LazyTensor], about: Mapping[str, Any], place: str | None, target: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Writes lazy tensors with `torch.save`: a plain state dict, or a state dict under the key `place`, beside `about`.

    Returns:
        sha256 and size of the file, by file name.
    """

    def content(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
        return state_dict if place is None else {place: state_dict, **about}

    return save_lazily(tensors, content, target, progress)


def save_lazily(
    tensors: Mapping[Any, LazyTensor],
    content: Callable[[dict[Any, torch.Tensor]], Any],
    target: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes what `content` makes of the tensors with `torch.save`.

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
    with Hashed(target, progress) as file:
        torch.save(content({name: mapped[tensor] for name, tensor in tensors.items()}), file)
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
