"""The files of a checkpoint; tensors are read and written one at a time, so that few are in memory together.

Nothing in a file is trusted before it has been checked, and no code in it is run.
"""

import codecs
import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import ConversionError
from ..model.weight_map import DROPPED_PATTERNS
from . import torch_archive
from .tensors import LazyTensor
from .torch_archive import Stored, Unbuilt

# By safetensors' names, in the order in which it stores them: widest first.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MASK_DTYPES = {"U8": torch.uint8, "BOOL": torch.bool, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
FLOATS = ("float32", "float16", "bfloat16", "float64")
# Settings of config.json, and the values with which they change neither the model nor its outputs.
SETTINGS: dict[str, tuple] = {
    "return_dict": (True,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
    "output_hidden_states": (None, False, True),
    "output_attentions": (None, False, True),
}
ADAPTER = "adapter_config.json"  # PEFT's
# Suffixes of weights that are not read: those of other names, other libraries, or half a download.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".ckpt", ".incomplete", ".part")
# Those that are read, as transformers names them.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# Bytes; the shard index of 1558M has 50 kB, and so has a header.
LARGEST_JSON = LARGEST_HEADER = 1 << 24
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MASK = re.compile("|".join(DROPPED_PATTERNS))


def shown(value: Any) -> str:
    """A value from a file, for messages: shortened, and only a few levels deep."""
    return reprlib.repr(value)


class Progress:
    """Receives the progress of a conversion; this class ignores it."""

    def step(self, what: str, total: int | None = None) -> None:
        """A new step begins, of `total` bytes if that is known."""

    def advance(self, done: int) -> None:
        """`done` more bytes of the step are done."""


class Bar(Progress):
    """Shows one step after the other in a tqdm bar, or in another one with its methods."""

    def __init__(self, bar: Any):
        self.bar = bar

    def step(self, what: str, total: int | None = None) -> None:
        self.bar.total = total
        self.bar.reset()
        self.bar.set_description(what)

    def advance(self, done: int) -> None:
        self.bar.update(done)


def as_progress(progress: Any) -> Progress:
    """The `Progress` for what the caller passed: None, a `Progress`, or a bar such as tqdm's."""
    if progress is None:
        return Progress()
    return progress if hasattr(progress, "step") else Bar(progress)


def read_json(path: Path) -> Any:
    """The content of a JSON file, which must be UTF-8 without a byte-order mark, as transformers requires.

    Raises:
        ConversionError: it cannot be read, is not valid JSON, or has a key twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}); check it") from error
    if len(data) > LARGEST_JSON:
        raise ConversionError(
            f"{path} has more than {LARGEST_JSON:,} bytes, but such files are small; download it again"
        )
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConversionError(f"{path} begins with a byte-order mark, but JSON has none; save it as UTF-8 without one")
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); download it again") from error


def parse_json(data: bytes) -> Any:
    """Like `json.loads`, but a key that occurs twice is an error: either value may be meant."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {Counter(names).most_common(1)[0][0]!r} occurs twice")
        return values

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def check_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses settings of a config.json that neither our models nor the official ones support here.

    The types that the config classes check themselves are left to them.

    Raises:
        ConversionError: there is such a setting; the message names it.
    """
    for name, value in values.items():
        rule = None
        if name in SETTINGS and not any(value == one and type(value) is type(one) for one in SETTINGS[name]):
            rule = f"must be {' or '.join(json.dumps(one) for one in SETTINGS[name])} here"
        elif name in ("dtype", "torch_dtype") and value not in (None, *FLOATS, *(f"torch.{one}" for one in FLOATS)):
            rule = f"must be one of {', '.join(FLOATS)}"
        elif name == "architectures" and not _all_of(str, [] if value is None else value):
            rule = "must be a list of names"
        elif name in ("id2label", "label2id") and not isinstance(value, dict | None):
            rule = "must map numbers to names, or names to numbers"
        elif not all(math.isfinite(number) and abs(number) < 1 << 63 for number in _numbers(value)):
            rule = "must have finite numbers of at most 64 bits"
        if rule is not None:
            raise ConversionError(f"{path} is not usable: {name}={shown(value)}, but it {rule}; correct or delete it")


def _all_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value, however deeply nested."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inside)


def check_files(directory: Path) -> None:
    """Refuses a directory with a pipe, a socket, a device or a PEFT adapter.

    Links are followed, as `from_pretrained` follows them.

    Raises:
        ConversionError: it has one of these.
    """
    for path in directory.iterdir():
        refuse_special_file(path)
    refuse_adapter(directory)


def refuse_special_file(path: Path) -> None:
    """Refuses a path that a read could wait for forever.

    Raises:
        ConversionError: it is a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConversionError(f"{str(path)!r} is not a file but a pipe or a device; copy its content into a file")


def refuse_adapter(directory: Path) -> None:
    """Refuses a directory that PEFT wrote.

    Raises:
        ConversionError: it is one.
    """
    if (directory / ADAPTER).exists():
        raise ConversionError(
            f"{directory} holds a PEFT adapter ({ADAPTER}), which is not a model but a change to one; merge it into "
            f"its model and convert the result: PeftModel.from_pretrained(model, {str(directory)!r}).merge_and_unload()"
            ".save_pretrained(another directory)"
        )


class Checkpoint:
    """The weights in a directory: `tensors` by their stored names; `read` returns one that is finite.

    Raises:
        ConversionError: a file is missing, truncated or corrupt, or holds anything but floating-point tensors; two
            files hold the same name; or an index contradicts its files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.paths, promised = _weight_files(directory)
        self.tensors: dict[str, LazyTensor] = {}
        places: dict[str, Path] = {}
        for path in self.paths:
            found = safetensors(path) if path.suffix == ".safetensors" else pickled(path)
            for name, tensor in found.items():
                if tensor.dtype not in DTYPE_NAMES and not MASK.search(name):
                    raise _wrong_dtype(name, path, str(tensor.dtype))
                if name in places:
                    raise ConversionError(f"{path.name} and {places[name].name} both hold {name!r}; keep one")
                self.tensors[name], places[name] = tensor, path
        self.places = places
        for name, path in promised.items():
            if places.get(name) != path:
                raise ConversionError(
                    f"the shard index of {directory} names {name!r} in {path.name!r}, which does not hold it; "
                    "download index and shards again"
                )
        for name in sorted(places.keys() - promised.keys()) if promised else ():
            if not MASK.search(name):
                raise ConversionError(
                    f"{places[name]} holds {name!r}, which the shard index does not name; download index "
                    "and shards again"
                )

    def read(self, name: str) -> torch.Tensor:
        """The tensor, which must not be modified.

        Raises:
            ConversionError: it cannot be read, or a value is NaN or infinite.
        """
        return checked_finite(self.tensors[name].read(), name, self.places[name].name)


def checked_finite(tensor: torch.Tensor, name: str, place: str) -> torch.Tensor:
    """The tensor, unchanged.

    Raises:
        ConversionError: a value is NaN or infinite.
    """
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # reads once and makes no copy
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(1 << 20))
        raise ConversionError(
            f"{name!r} in {place} has {bad} values that are NaN or infinite, but weights must be finite; use an "
            "earlier checkpoint"
        )
    return tensor


def read_part(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose values are stored in a file from byte `offset` on.

    Raises:
        ConversionError: the file is too short.
    """
    size = shape.numel() * dtype.itemsize
    try:
        data = np.fromfile(path, dtype=np.uint8, count=size, offset=offset)
    except OSError as error:
        raise _corrupt(path, error) from error
    if len(data) != size:
        raise _corrupt(path, EOFError(f"{len(data)} of {size} bytes from {offset} on"))
    return torch.from_numpy(data).view(dtype).reshape(shape)


def holds_weights(directory: Path) -> bool:
    """Whether a directory has weights that `Checkpoint` reads."""
    return any((directory / name).exists() for name in WEIGHT_FILES)


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files with the weights, and the file of each tensor that an index names."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            return [directory / single], {}
        if (directory / index).is_file():
            return _shards(directory / index, Path(single).suffix)
    for link in (directory / name for name in WEIGHT_FILES if (directory / name).is_symlink()):
        raise _broken_link(link)
    raise ConversionError(f"{directory} has no {SAFE_WEIGHTS_NAME}, nor any other weights{_instead(directory)}")


def _instead(directory: Path) -> str:
    """The end of the message: which weights there are instead, and the remedy."""
    if (directory / "onnx" / "model.onnx").is_file():
        return (
            f", but a graph of ONNX; hf-gpt-scratch convert {directory} TARGET makes a native directory of what export "
            "has written: give that"
        )
    names = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_WEIGHTS)
    whole = [name for name in names if re.fullmatch(r"(pytorch_)?model\.[\w.-]+\.(safetensors|bin)", name)]
    if any(re.search(r"-\d+-of-\d+\.", name) for name in names):
        return " that can be read: its shards lack their index; download that too"
    if len(whole) == 1:
        suffix = Path(whole[0]).suffix
        right = WEIGHTS_NAME if suffix == Path(WEIGHTS_NAME).suffix else SAFE_WEIGHTS_NAME
        return f" under a known name; if {whole[0]!r} is the whole model, rename it to {right}"
    others = f" that can be read, but {', '.join(repr(name[:200]) for name in names[:5])}" if names else ""
    return f"{others}; give a complete checkpoint"


def _shards(index: Path, suffix: str) -> tuple[list[Path], dict[str, Path]]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} is not a valid shard index: it maps no weights to files; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.isprintable():
            raise ConversionError(
                f"{index} names the shard {name!r}, but shards must be beside their index; do not trust it"
            )
        if not name.endswith(suffix):
            raise ConversionError(
                f"{index} names the shard {name!r}, but its shards must end in {suffix}; do not trust it"
            )
        if (index.parent / name).is_symlink() and not (index.parent / name).is_file():
            raise _broken_link(index.parent / name)
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index} names the shard {name!r}, which is missing; download it again")
    if not isinstance(content.get("metadata"), dict):
        raise ConversionError(f'{index} has no "metadata", which transformers requires; add "metadata": {{}} to it')
    places = {name: index.parent / file for name, file in weight_map.items()}
    return sorted(set(places.values())), places


def safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file.

    Raises:
        ConversionError: it is truncated or corrupt, or has a tensor of an unsupported dtype.
    """
    try:
        refuse_pointer(path)
        with path.open("rb") as file:  # safetensors itself takes the last of duplicate names
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes, but none needs more than {LARGEST_HEADER:,}")
            header = parse_json(file.read(length))
        opened = safe_open(path, framework="pt")  # this checks the header
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise _corrupt(path, error) from error

    tensors = {}
    for name in opened.keys():  # noqa: SIM118 -- not a dict
        found = opened.get_slice(name)
        dtype = (DTYPES | MASK_DTYPES).get(found.get_dtype())
        if dtype is None:
            raise _wrong_dtype(name, path, found.get_dtype())
        shape, start = torch.Size(found.get_shape()), 8 + length + header[name]["data_offsets"][0]
        # Not `opened.get_tensor`, which maps the file: if it were truncated meanwhile, the process would crash.
        tensors[name] = LazyTensor(shape, dtype, partial(read_part, path, start, shape, dtype))
    return tensors


def pickled(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a state dict that `torch.save` wrote.

    Raises:
        ConversionError: it is damaged, or holds anything else.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, but weights must be a dict of tensors; save model.state_dict()"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise ConversionError(
                f"{path.name} holds {name!r}: {kind_of(tensor)}, but weights must be dense tensors by name; save "
                "model.state_dict()"
            )
    return {name: lazy(tensor) for name, tensor in content.items()}


def lazy(stored: Stored) -> LazyTensor:
    """The lazy tensor for one in a file of `torch.save`."""
    return LazyTensor(stored.shape, stored.dtype, partial(read_stored, stored))


def read_pickle(path: Path) -> Any:
    """The content of a file of `torch.save`; nothing in it runs.

    Raises:
        ConversionError: it is damaged, or its pickle refers to more than weights.
    """
    try:
        refuse_pointer(path)
        return torch_archive.load(path)
    except torch_archive.ForbiddenName as error:
        raise ConversionError(
            f"{path} is a pickle that refers to {error}, and loading such a file can run any program; do not trust it. "
            "If it is your own, save model.state_dict() alone"
        ) from error
    except ValueError as error:
        raise ConversionError(
            f"{path} is truncated, corrupt or not a file of weights ({error}); save or download it again"
        ) from error


def read_stored(tensor: Stored) -> torch.Tensor:
    """The values of a stored tensor.

    Raises:
        ConversionError: the file has changed since it was opened.
    """
    try:
        return tensor.read()
    except (EOFError, OSError) as error:
        raise _corrupt(tensor.path, error) from error


def kind_of(value: Any) -> str:
    """The kind of a value, for messages."""
    return f"a {value.what if isinstance(value, Unbuilt) else type(value).__name__}"


def refuse_pointer(path: Path) -> None:
    """Refuses a text file in the place of weights.

    Raises:
        ConversionError: it is a Git LFS pointer or a web page.
    """
    with path.open("rb") as file:
        start = file.read(100).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a Git LFS pointer instead of weights; fetch them first: git lfs pull")
    if start.startswith((b"<!doctype", b"<html")):
        raise ConversionError(
            f"{path} is a web page instead of weights; download it again, from the file's own address"
        )


def _broken_link(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} is a link to {os.readlink(path)!r}, which does not exist; fetch it first (git annex get, dvc pull), "
        "or replace the link by the file"
    )


def _corrupt(path: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{path} is truncated or corrupt ({error!r}); download it again")


def _wrong_dtype(name: str, path: Path, found: str) -> ConversionError:
    return ConversionError(
        f"{name!r} in {path.name} is {found}, but weights must be dense and {', '.join(DTYPES)}; use a checkpoint "
        "that is not quantized"
    )


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], progress: Progress) -> str:
    """Writes the same file as `safetensors.torch.save_file`, with one tensor in memory at a time; does not sync it.

    `save_file` needs all tensors at once, so the header is made here, before any of them is read.

    Returns:
        the file's sha256.
    """
    widest = list(DTYPES.values()).index
    names = sorted(tensors, key=lambda name: (widest(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = len(encoded).to_bytes(8, "little") + encoded

    digest = hashlib.sha256(start)
    with path.open("wb") as file:
        file.write(start)
        for name in names:
            tensor, promised = tensors[name].read(), tensors[name]
            if (tensor.shape, tensor.dtype) != (promised.shape, promised.dtype):
                raise AssertionError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, but the header says {promised.dtype} "
                    f"{list(promised.shape)}"
                )
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
            progress.advance(data.nbytes)
    return digest.hexdigest()
