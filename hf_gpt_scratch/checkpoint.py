"""The files of a checkpoint, whose tensors are read and written one at a time, so that memory holds a few of them.

Nothing in a file is believed before it has been checked, and no code in one is run.
"""

import gc
import hashlib
import json
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

# By safetensors' names, in the order in which a file has them: widest first.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SYNCED_AT_ONCE = 1 << 28  # bytes
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ConversionError(Exception):
    """What stands in the way of a conversion: the value, the rule and the remedy."""


class Progress:
    """Hears how far a conversion is; this one says nothing."""

    def step(self, what: str, total: int | None = None) -> None:
        """A new step begins; `total` bytes if they are known."""

    def advance(self, done: int) -> None:
        """So many bytes more are done."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConversionError: it is no valid JSON, or has a key twice.
    """
    try:
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no valid JSON ({error}); download it again") from error


def parse_json(data: bytes) -> Any:
    """As `json.loads`, but a key that occurs twice is an error: which of the two is meant?"""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return values

    return json.loads(data, object_pairs_hook=unique)


def check_files(directory: Path) -> None:
    """Refuses what a checkpoint's directory has no use for: pipes and devices, and links that lead out of it.

    Links of the hub's cache lead to its `blobs`, and may.

    Raises:
        ConversionError: there is such a thing.
    """
    inside = Path(os.path.realpath(directory))
    allowed = [inside] + ([inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else [])
    for path in directory.iterdir():
        end = Path(os.path.realpath(path))
        if not any(end.is_relative_to(place) for place in allowed):
            raise ConversionError(
                f"{str(path)!r} is a link out of its directory, to {str(end)!r}, but a checkpoint's files lie "
                "together; if you trust the file, put a copy in the link's place"
            )
        if end.exists() and not end.is_file() and not end.is_dir():
            raise ConversionError(f"{str(path)!r} is no file, but a pipe or a device; take it out of the directory")


@dataclass(frozen=True)
class Spec:
    """What a tensor is, before it is read."""

    shape: torch.Size
    dtype: torch.dtype
    file: "_SafetensorsFile | _PickleFile"

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Checkpoint:
    """The weights in a directory: `specs` tells what there is, `read` gets one tensor.

    Raises:
        ConversionError: a file is missing, truncated or corrupt, holds anything but floating-point tensors, or has a
            name that another has too; an index leads elsewhere.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.paths, promised = _weight_files(directory)
        self.specs: dict[str, Spec] = {}
        for path in self.paths:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)
            for name, spec in file.specs().items():
                if name in self.specs:
                    other = self.specs[name].file.path.name
                    raise ConversionError(f"{path.name} and {other} both hold {name!r}; keep one")
                self.specs[name] = spec
        for name, path in promised.items():
            if name not in self.specs or self.specs[name].file.path != path:
                raise ConversionError(
                    f"the shard index of {directory} names {name!r} in {path.name!r}, but it is not there; download "
                    "index and shards again"
                )

    def read(self, name: str) -> torch.Tensor:
        """The tensor; not to be written to.

        Raises:
            ConversionError: it cannot be read, or a value is NaN or infinite.
        """
        file = self.specs[name].file
        return checked_finite(file.read(name), name, file.path.name)


def checked_finite(tensor: torch.Tensor, name: str, place: str) -> torch.Tensor:
    """The tensor itself.

    Raises:
        ConversionError: a value is NaN or infinite.
    """
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # reads once and makes no copy
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(1 << 20))
        raise ConversionError(
            f"{name!r} in {place} has {bad} values that are NaN or infinite, but weights are finite; take an earlier "
            "checkpoint"
        )
    return tensor


def read_part(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose values lie in a file from `offset` on, as they are in memory.

    Raises:
        ConversionError: the file ends before them.
    """
    size = shape.numel() * dtype.itemsize
    data = np.fromfile(path, dtype=np.uint8, count=size, offset=offset)
    if len(data) != size:
        raise _corrupt(path, EOFError(f"{len(data)} of {size} bytes from {offset} on"))
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files with the weights, and which tensors an index promises in them."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            return [directory / single], {}
        if (directory / index).is_file():
            return _shards(directory / index, Path(single).suffix)
    raise ConversionError(f"{directory} has no {SAFE_WEIGHTS_NAME}, nor any other weights; give a whole checkpoint")


def _shards(index: Path, suffix: str) -> tuple[list[Path], dict[str, Path]]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} is no valid shard index: it maps no weights to files; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.isprintable():
            raise ConversionError(
                f"{index} names the shard {name!r}, but a shard lies beside its index; do not trust it"
            )
        if not name.endswith(suffix):
            raise ConversionError(f"{index} names the shard {name!r}, but its shards end in {suffix}; do not trust it")
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index} names the shard {name!r}, which is missing; download it again")
    places = {name: index.parent / file for name, file in weight_map.items()}
    return sorted(set(places.values())), places


class _SafetensorsFile:
    def __init__(self, path: Path):
        self.path = path
        try:
            # Memory that is mapped would count as ours; what is read into a tensor is given back with it.
            self.file = safe_open(path, framework="pt", backend="pread")
            with path.open("rb") as file:  # safetensors has checked the length, but takes the last of equal names
                parse_json(file.read(int.from_bytes(file.read(8), "little")))
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            raise _corrupt(path, error) from error

    def specs(self) -> dict[str, Spec]:
        slices = {name: self.file.get_slice(name) for name in self.file.keys()}  # noqa: SIM118 -- not a dict
        for name, found in slices.items():
            if found.get_dtype() not in DTYPES:
                raise _wrong_dtype(name, self.path, found.get_dtype())
        return {n: Spec(torch.Size(s.get_shape()), DTYPES[s.get_dtype()], self) for n, s in slices.items()}

    def read(self, name: str) -> torch.Tensor:
        try:
            return self.file.get_tensor(name)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise _corrupt(self.path, error) from error


class _PickleFile:
    """A file of `torch.save`. Before 2020 it was no zip archive; such a file can only be read as a whole."""

    def __init__(self, path: Path):
        self.path = path
        self.mapped = Mapped(self._load, is_sound_archive(path))

    def _load(self, mapped: bool) -> dict[str, torch.Tensor]:
        try:
            tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise ConversionError(f"{self.path} is a pickle of more than weights ({error}); do not trust it") from error
        except Exception as error:  # whatever the bytes of a corrupt pickle lead to
            raise _corrupt(self.path, error) from error
        if not isinstance(tensors, dict):
            raise ConversionError(
                f"{self.path} holds a {type(tensors).__name__}, but weights are a dict of tensors; save "
                "model.state_dict()"
            )
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ConversionError(
                    f"{self.path.name} holds {name!r} of type {type(tensor).__name__}, but weights are tensors by "
                    "name; save model.state_dict()"
                )
            if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise _wrong_dtype(name, self.path, f"{tensor.dtype} ({tensor.layout}, {tensor.device})")
        return tensors

    def specs(self) -> dict[str, Spec]:
        return {name: Spec(tensor.shape, tensor.dtype, self) for name, tensor in self.mapped.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.mapped.read(name)


class Mapped:
    """Tensors in mapped memory, which is mapped anew before much of it has been read.

    What has been read of a mapping counts as memory of ours for as long as the mapping is there.

    Args:
        load: the tensors; told whether to map them.
        mapped: whether they can be; if not, they are loaded once and held.
    """

    def __init__(self, load: Callable[[bool], dict[str, torch.Tensor]], mapped: bool):
        self.load, self.mapped = load, mapped
        self._load()
        self.largest = max((tensor.nbytes for tensor in self.tensors.values()), default=0)

    def read(self, name: str) -> torch.Tensor:
        size = self.tensors[name].nbytes
        # A large one has a mapping of its own, because what is made of a small one may hold the mapping for long.
        if self.mapped and self.touched and self.touched + size > self.largest // 4:
            self._load()
        self.touched += size
        return self.tensors[name].detach()

    def _load(self) -> None:
        # torch.load leaves a cycle of references that holds the mapping: it is collected while it is young.
        usual = gc.isenabled()
        gc.disable()
        try:
            self.tensors, self.touched = self.load(self.mapped), 0
            gc.collect(0)
        finally:
            if usual:
                gc.enable()


def is_sound_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as torch.save writes them today.

    torch looks at the archive's checksums in some of its ways to read, and not in that which maps memory.

    Raises:
        ConversionError: it is one, and damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("compressed or overlapping entries, which torch does not write")
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {bad!r} is wrong")
        return True
    except Exception as error:  # whatever the bytes of a corrupt archive lead to
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{path} is truncated or corrupt ({error!r}); download it again")


def _wrong_dtype(name: str, path: Path, found: str) -> ConversionError:
    return ConversionError(
        f"{name!r} in {path.name} is {found}, but weights are dense and {', '.join(DTYPES)}; take a checkpoint that "
        "is not quantized"
    )


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[torch.Size, torch.dtype]],
    read: Callable[[str], torch.Tensor],
    progress: Progress,
) -> str:
    """Writes the file that `safetensors.torch.save_file` would, and makes tensors while those before are written.

    Memory holds what is being made, and of what is being written one tensor, or several of half the largest's size.
    That function takes the data of all tensors at once, so the header is made here, before any of them is there.

    Args:
        specs: shape and dtype of each tensor.
        read: gives a tensor by its name.

    Returns:
        the file's sha256.
    """
    names = sorted(specs, key=lambda name: (list(DTYPES.values()).index(specs[name][1]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = len(encoded).to_bytes(8, "little") + encoded

    digest = hashlib.sha256(start)
    largest = max((shape.numel() * dtype.itemsize for shape, dtype in specs.values()), default=0)
    under_way: deque[tuple[int, list[Future]]] = deque()
    synced: list[Future[None]] = []
    unsynced = 0
    with (
        path.open("wb") as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as writing,
        ThreadPoolExecutor(1) as syncing,
    ):
        file.write(start)
        for name in names:
            tensor = read(name)
            if (tensor.shape, tensor.dtype) != specs[name]:
                raise AssertionError(f"{name} is {tensor.dtype} {list(tensor.shape)}, the header says {specs[name]}")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            del tensor
            while under_way and sum(size for size, _ in under_way) + data.nbytes > largest // 2:
                size, futures = under_way.popleft()
                for future in futures:
                    future.result()
                progress.advance(size)
            under_way.append((data.nbytes, [hashing.submit(digest.update, data), writing.submit(file.write, data)]))
            unsynced += data.nbytes
            if unsynced > _SYNCED_AT_ONCE:  # the disk works while the next tensors are made
                synced.append(syncing.submit(os.fdatasync, file.fileno()))
                unsynced = 0
        for size, futures in under_way:
            for future in futures:
                future.result()
            progress.advance(size)
        for future in synced:
            future.result()
    return digest.hexdigest()
