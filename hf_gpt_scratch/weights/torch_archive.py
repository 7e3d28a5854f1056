"""Reads files of `torch.save` without running, importing or building anything that a pickle refers to.

`torch.load(weights_only=True)` runs no foreign code either, but a file of a few hundred bytes can keep it busy forever,
and with mapped memory it reads beyond the end of a record that is too short. Here a pickle is a list of opcodes on
plain values, and a tensor is the place of its values in the file; `pickletools` explains the opcodes.
"""

import math
import mmap
import pickle as p
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

MOST_STEPS = 1 << 19  # a checkpoint of 1558M with its optimizer takes 70,000
LARGEST_KEY = 1 << 60  # different whole numbers beyond it have the same hash
MOST_DIMENSIONS = 8
# Of files from before 2020, which are not zip archives.
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
END_OF_ZIP = b"PK\5\6"
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.QInt8Storage": torch.int8,  # quantized: only the size of their values is needed
    "torch.QUInt8Storage": torch.uint8,
    "torch.QInt32Storage": torch.int32,
}
# Other values in checkpoints: ignored, or refused under this name where a tensor is expected.
UNBUILT = {
    "torch._utils._rebuild_sparse_tensor": "torch.sparse tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensor without values, on the meta device",
    "torch._utils._rebuild_tensor_v3": "tensor of a dtype that weights do not have",
    "torch._tensor._rebuild_from_type_v2": "tensor of a class of its own",
    "torch.Tensor": "tensor of PyTorch before 0.4",
    "torch.nn.parameter.Parameter": "parameter of PyTorch before 0.4",
    "torch.Size": "torch.Size",
    "torch.device": "torch.device",
    "torch.serialization._get_layout": "torch.layout",
    "collections.Counter": "Counter",
    "collections.defaultdict": "defaultdict",
    "_codecs.encode": "bytes",
    "__builtin__.set": "set",
    "__builtin__.complex": "complex",
    "__builtin__.bytearray": "bytearray",
    # What training scripts save beside the weights.
    "numpy.core.multiarray.scalar": "number of numpy",
    "numpy._core.multiarray.scalar": "number of numpy",
    "numpy.dtype": "dtype of numpy",
    "argparse.Namespace": "Namespace",
    # In Python 3.13, and only there, pathlib is a package, which shows in the names of its classes.
    **dict.fromkeys(
        [f"{pathlib}.{os}Path" for pathlib in ("pathlib", "pathlib._local") for os in ("Posix", "Windows")], "path"
    ),
}
# How a quantized tensor was quantized.
UNBUILT |= {f"torch.per_{what}_affine": "torch.qscheme" for what in ("tensor", "channel")}
UNBUILT |= {f"torch.per_{what}_symmetric": "torch.qscheme" for what in ("tensor", "channel")}


class ForbiddenName(ValueError):
    """The name of something that a pickle refers to and no weights need, and that could run any program."""


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """A value that was not built, by what it is; of a config class, the plain values that it was saved with."""

    what: str
    values: dict[Any, Any] | None = None


@dataclass(frozen=True, eq=False)
class _Name:
    """A function or class that a pickle refers to; it is never looked up."""

    name: str


@dataclass(eq=False)
class _Storage:
    dtype: torch.dtype
    numel: int
    offset: int = -1  # in bytes; in files from before 2020 it is known only at the end


@dataclass(frozen=True, eq=False)
class Stored:
    """A dense tensor, as the place of its values in a file; `start` and `stride` count values."""

    path: Path
    storage: _Storage
    start: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The values, contiguous, in memory of their own.

        Raises:
            EOFError: the file is shorter than it was.
        """
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        size = _span(self.shape, self.stride) * self.dtype.itemsize
        offset = self.storage.offset + self.start * self.dtype.itemsize
        data = np.fromfile(self.path, dtype=np.uint8, count=size, offset=offset)
        if len(data) != size:
            raise EOFError(f"{len(data)} of {size} bytes from {offset} on")
        return torch.from_numpy(data).view(self.dtype).as_strided(self.shape, self.stride).contiguous()


def load(path: Path) -> Any:
    """The content: dicts, lists, tuples, numbers, strings, None, `Stored` and `Unbuilt`.

    Raises:
        ForbiddenName: it refers to more than weights.
        ValueError: it is damaged, or not a file of `torch.save`.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _load_archive(path, data) if zipfile.is_zipfile(path) else _load_legacy(path, data)
    except ValueError:
        raise
    except (  # from zipfile and struct, and from opcodes that do not fit together
        zipfile.BadZipFile,
        struct.error,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        EOFError,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_values(path: Path) -> Any:
    """The content of a pickle of plain values: dicts, lists, tuples, numbers, strings, None. Nothing in it runs.

    Raises:
        ForbiddenName: it asks for anything else.
        ValueError: it is damaged, or no pickle.
    """

    def storage(key: str, dtype: torch.dtype, numel: int) -> _Storage:
        raise ValueError("it has tensors")

    try:
        return _Steps(path, path.read_bytes(), storage, protocol=5).run()
    except (struct.error, LookupError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _load_archive(path: Path, data: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = _records(archive, data)
        if bad := archive.testzip():
            raise ValueError(f"the checksum of {bad!r} is wrong")
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} records data.pkl instead of one")
    place = pickles[0].removesuffix("data.pkl")
    if f"{place}constants.pkl" in records:
        raise ValueError("it is a TorchScript program; save model.state_dict() instead")
    begin, size = records.get(f"{place}byteorder", (0, 0))
    if size and data[begin : begin + size] != b"little":
        raise ValueError(f"its byte order is {data[begin : begin + min(size, 20)]!r}, but only b'little' can be read")

    def storage(key: str, dtype: torch.dtype, numel: int) -> _Storage:
        if f"{place}data/{key}" not in records:
            raise ValueError(f"it has no record {key!r}, to which its pickle refers")
        offset, size = records[f"{place}data/{key}"]
        if size != numel * dtype.itemsize:
            raise ValueError(
                f"the record {key!r} has {size} bytes, but according to the pickle {numel * dtype.itemsize}"
            )
        return _Storage(dtype, numel, offset)

    begin, size = records[pickles[0]]
    steps = _Steps(path, data[begin : begin + size], storage)
    content = steps.run()
    if steps.at != size:
        raise ValueError(f"its pickle ends {size - steps.at} bytes before its record")
    return content


def _records(archive: zipfile.ZipFile, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where each record's bytes lie: offset and size."""
    if data[-22:-18] != END_OF_ZIP:
        raise ValueError("there are bytes after its end")
    records: dict[str, tuple[int, int]] = {}
    extents = []
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"the record {entry.filename!r} is compressed or encrypted, which torch never does")
        if entry.filename in records:
            raise ValueError(f"the record {entry.filename!r} occurs twice")
        name, extra = struct.unpack("<HH", data[entry.header_offset + 26 : entry.header_offset + 30])
        begin = entry.header_offset + 30 + name + extra
        records[entry.filename] = (begin, entry.file_size)
        extents.append((entry.header_offset, begin + entry.file_size))
    extents = [(0, 0), *sorted(extents), (archive.start_dir, len(data))]
    if extents[1][0] != 0 or any(end > begin for (_, end), (begin, _) in pairwise(extents)):
        raise ValueError("its records overlap, or do not start at the beginning of the file")
    return records


def _load_legacy(path: Path, data: mmap.mmap) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> _Storage:
        found = storages.setdefault(key, _Storage(dtype, numel))
        if (found.dtype, found.numel) != (dtype, numel):
            raise ValueError(f"its pickle gives the storage {key!r} two sizes")
        return found

    steps = _Steps(path, data, storage)
    for wanted in (LEGACY_MAGIC, LEGACY_PROTOCOL):
        found = steps.run()
        if type(found) is not int or found != wanted:
            raise ValueError("it does not begin like a file of torch.save")
    system = steps.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its byte order is not little-endian, and no other can be read")
    content, keys = steps.run(), steps.run()
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its list of storages does not match its pickle")
    at = steps.at
    for key in keys:
        (numel,) = struct.unpack("<q", data[at : at + 8])
        if numel != storages[key].numel:
            raise ValueError(
                f"the storage {key!r} has {numel} values, but according to the pickle {storages[key].numel}"
            )
        storages[key].offset = at + 8
        at += 8 + numel * storages[key].dtype.itemsize
    if at != len(data):
        raise ValueError(f"it has {len(data)} bytes, but according to its pickle {at}")
    return content


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """The number of values from a tensor's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


class _Steps:
    """Reads pickles of protocol 2, which torch.save writes, one after the other.

    Args:
        data: bytes, or mapped memory.
        storage: returns the storage of a key, dtype and number of values, after checking them.
        protocol: the newest that is read.
    """

    def __init__(self, path: Path, data: Any, storage: Callable[[str, torch.dtype, int], _Storage], protocol: int = 2):
        self.path, self.data, self.storage, self.protocol = path, data, storage, protocol
        self.at = self.count = 0

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) != size:
            raise ValueError("it ends within its pickle")
        self.at += size
        return taken

    def number(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise ValueError("a name in it does not end")
        line = self.take(end - self.at)
        self.at += 1
        return line.decode()

    def run(self) -> Any:  # noqa: C901  # one branch for each opcode
        """The value of the pickle at the current position, which then moves to its end."""
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}

        def above_mark() -> list[Any]:
            nonlocal stack
            items, stack = stack, marks.pop()
            return items

        while True:
            self.count += 1
            if self.count > MOST_STEPS:
                raise ValueError(f"its pickle has more than {MOST_STEPS:,} opcodes; save model.state_dict() alone")
            step = self.take(1)
            if step in (p.BINGET, p.LONG_BINGET):
                stack.append(memo[self.number("B" if step == p.BINGET else "<I")])
            elif step in (p.BINPUT, p.LONG_BINPUT):
                memo[self.number("B" if step == p.BINPUT else "<I")] = stack[-1]
            elif step == p.BINUNICODE:
                stack.append(self.take(self.number("<I")).decode("utf-8"))
            elif step == p.BININT1:
                stack.append(self.number("B"))
            elif step == p.BININT2:
                stack.append(self.number("<H"))
            elif step == p.BININT:
                stack.append(self.number("<i"))
            elif step == p.LONG1:
                stack.append(int.from_bytes(self.take(self.number("B")), "little", signed=True))
            elif step == p.BINFLOAT:
                stack.append(self.number(">d"))
            elif step == p.SHORT_BINSTRING:
                stack.append(self.take(self.number("B")).decode("ascii"))
            elif step in (p.NONE, p.NEWTRUE, p.NEWFALSE):
                stack.append({p.NONE: None, p.NEWTRUE: True, p.NEWFALSE: False}[step])
            elif step == p.MARK:
                marks.append(stack)
                stack = []
            elif step == p.TUPLE:
                items = tuple(above_mark())
                stack.append(items)
            elif step in (p.EMPTY_TUPLE, p.TUPLE1, p.TUPLE2, p.TUPLE3):
                count = (p.EMPTY_TUPLE, p.TUPLE1, p.TUPLE2, p.TUPLE3).index(step)
                items = tuple(stack.pop() for _ in range(count))[::-1]
                stack.append(items)
            elif step == p.EMPTY_LIST:
                stack.append([])
            elif step == p.EMPTY_DICT:
                stack.append({})
            elif step == p.APPEND:
                value = stack.pop()
                _the(list, stack[-1]).append(value)
            elif step == p.APPENDS:
                values = above_mark()
                _the(list, stack[-1]).extend(values)
            elif step == p.SETITEM:
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            elif step == p.SETITEMS:
                values = above_mark()
                _set(stack[-1], values)
            elif step == p.GLOBAL:
                stack.append(_name(f"{self.line()}.{self.line()}"))
            elif step == p.BINPERSID:
                stack.append(self.persistent(stack.pop()))
            elif step == p.REDUCE:
                arguments, function = _the(tuple, stack.pop()), _the(_Name, stack.pop())
                stack.append(self.call(function.name, arguments))
            elif step == p.NEWOBJ:
                _, function = _the(tuple, stack.pop()), _the(_Name, stack.pop())
                settings: dict[Any, Any] | None = {} if _is_config(function.name) else None
                stack.append(Unbuilt(UNBUILT.get(function.name, function.name), settings))
            elif step == p.BUILD:
                state = stack.pop()  # attributes, such as a state dict's _metadata
                if stack and isinstance(stack[-1], Unbuilt) and stack[-1].values is not None:
                    stack[-1].values.update(_the(dict, state))
            elif step == p.PROTO:
                if (protocol := self.number("B")) > self.protocol:
                    raise ValueError(f"its pickle is of protocol {protocol}; save it with torch.save's default, 2")
            elif self.protocol > 2 and step == p.FRAME:
                self.number("<Q")
            elif self.protocol > 2 and step == p.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif self.protocol > 2 and step == p.SHORT_BINUNICODE:
                stack.append(self.take(self.number("B")).decode("utf-8"))
            elif step == p.STOP:
                return stack.pop()
            else:
                raise ValueError(f"its pickle has the opcode {step!r}, which torch.save does not write")

    def persistent(self, value: Any) -> _Storage:
        """The storage that a persistent id of torch.save stands for."""
        about = _the(tuple, value)
        if len(about) not in (5, 6) or about[0] != "storage" or about[5:] not in ((), (None,)):
            raise ValueError("its pickle refers to something that is not a storage")
        kind = _the(_Name, about[1]).name.replace("torch.cuda.", "torch.")
        if kind not in STORAGES:
            raise ValueError(f"its pickle refers to a {kind}, but the known storages are {', '.join(STORAGES)}")
        return self.storage(_the(str, about[2]), STORAGES[kind], _size(about[4]))

    def call(self, name: str, arguments: tuple) -> Any:
        """The result of a function; only those that make weights are known here."""
        if name == "collections.OrderedDict":
            ordered: dict[Any, Any] = {}
            for pair in _the(list, arguments[0]) if arguments else ():
                _set(ordered, list(pair))
            return ordered
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            storage, start = _the(_Storage, arguments[0]), _size(arguments[1])
            shape, stride = (tuple(map(_size, _the(tuple, sizes))) for sizes in arguments[2:4])
            if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
                raise ValueError(f"its pickle has a tensor of {len(shape)} dimensions and {len(stride)} strides")
            if math.prod(shape) > storage.numel:
                return Unbuilt(f"tensor that repeats {storage.numel} values, of shape {list(shape)}")
            if start + _span(torch.Size(shape), stride) > storage.numel:
                raise ValueError(f"its pickle has a tensor of shape {list(shape)} that ends beyond its storage")
            return Stored(self.path, storage, start, torch.Size(shape), stride)
        return Unbuilt(UNBUILT.get(name, name))


def _the(kind: type, value: Any) -> Any:
    """The value, which must be of exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__.strip('_').lower()} belongs")
    return value


def _size(value: Any) -> int:
    if not 0 <= _the(int, value) < 1 << 48:
        raise ValueError(f"its pickle has {value} as a size")
    return value


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, Unbuilt):
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple of tuples can take forever, and many large numbers have the same hash.
        if type(key) not in (str, int, float, bool) or (type(key) is int and abs(key) > LARGEST_KEY):
            raise ValueError(f"its pickle has a {type(key).__name__} as a key, but keys must be names or small numbers")
        _the(dict, target)[key] = value


def _name(name: str) -> _Name:
    known = name == "collections.OrderedDict" or name.startswith("torch._utils._rebuild_")
    dtype = name.startswith("torch.") and isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
    if (
        not known
        and not dtype
        and not _is_config(name)
        and name.replace("torch.cuda.", "torch.") not in STORAGES
        and name not in UNBUILT
    ):
        raise ForbiddenName(name)
    return _Name(name)


def _is_config(name: str) -> bool:
    """Whether it is build-nanogpt's class of settings, in whichever file that was; it is never looked up."""
    return name.endswith(".GPTConfig")
