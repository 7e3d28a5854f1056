"""OpenAI's TensorFlow checkpoints, read without TensorFlow.

`NAME.index` is a LevelDB table: blocks of sorted key-value entries, then a block that lists the blocks, then a footer.
Key "" holds a BundleHeaderProto; every other key is a tensor's name and holds a BundleEntryProto: dtype, shape, and
where in `NAME.data-*` its bytes lie. Blocks and tensors carry their CRC-32C, and both are checked here.
"""

import math
import re
import struct
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path, PureWindowsPath

import google_crc32c
import numpy as np
import torch

from ...errors import ConversionError
from ...model.configuration_gpt_scratch import listed
from ..checkpoint import read_json, read_part
from ..tensors import LazyTensor
from .format import Format, Found, Layout, Source, renamed

FOOTER_BYTES, MAGIC = 48, 0xDB4775248B80FB57
# Bytes; the index of 1558M has 54 kB, and its longest name 30.
LARGEST_INDEX, LONGEST_NAME = 1 << 22, 1000
MOST_DIMENSIONS = 8
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}  # tensorflow.DataType
CRC_PIECE = 1 << 20  # bytes
# OpenAI's names of GPT-2's tensors.
NAMES = {
    "wte.weight": "model/wte",
    "wpe.weight": "model/wpe",
    "h.{n}.ln_1.weight": "model/h{n}/ln_1/g",
    "h.{n}.ln_1.bias": "model/h{n}/ln_1/b",
    "h.{n}.attn.c_attn.weight": "model/h{n}/attn/c_attn/w",
    "h.{n}.attn.c_attn.bias": "model/h{n}/attn/c_attn/b",
    "h.{n}.attn.c_proj.weight": "model/h{n}/attn/c_proj/w",
    "h.{n}.attn.c_proj.bias": "model/h{n}/attn/c_proj/b",
    "h.{n}.ln_2.weight": "model/h{n}/ln_2/g",
    "h.{n}.ln_2.bias": "model/h{n}/ln_2/b",
    "h.{n}.mlp.c_fc.weight": "model/h{n}/mlp/c_fc/w",
    "h.{n}.mlp.c_fc.bias": "model/h{n}/mlp/c_fc/b",
    "h.{n}.mlp.c_proj.weight": "model/h{n}/mlp/c_proj/w",
    "h.{n}.mlp.c_proj.bias": "model/h{n}/mlp/c_proj/b",
    "ln_f.weight": "model/ln_f/g",
    "ln_f.bias": "model/ln_f/b",
}
# Keys of OpenAI's hparams.json, and our names for them.
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


class TensorFlow(Format):
    """Read-only: nothing is written in this format."""

    name = "tensorflow"
    what = "OpenAI's TensorFlow directory with hparams.json"
    # The optimizer's moments are stored with the weights; the output head is always the token embedding.
    layout = Layout(
        renamed(lambda row: NAMES[row.theirs], transposed=True, head=None), dropped=r"(?!model/).*|.*/Adam(_1)?"
    )
    mark = "hparams.json"

    def matches(self, found: Found) -> bool:
        return found.is_directory and (found.path / self.mark).is_file() and not (found.path / "config.json").is_file()

    def near(self, found: Found) -> str | None:
        if found.path.suffix != ".index":
            return None
        return f"{found.begins}; give its directory, {found.path.parent}"

    def open(self, found: Found) -> Source:
        path = found.path
        hparams = read_json(path / self.mark)
        try:
            metadata = {ours: hparams[name] for name, ours in HPARAMS.items()}
        except (LookupError, TypeError) as error:
            raise ConversionError(
                f"{path / self.mark} must have {', '.join(HPARAMS)} ({error!r}); download it again"
            ) from error
        tensors = read_tensorflow(path)
        # OpenAI's matrices are those of a convolution of width 1, [1, in, out].
        tensors = {name: _first(tensor) if tensor.shape[:-2] == (1,) else tensor for name, tensor in tensors.items()}
        more = {name: value for name, value in hparams.items() if name not in HPARAMS}
        notes = [f"left out, since OpenAI's hparams.json has no such keys: {listed(more)}"] if more else []
        return Source(self, path, tensors, metadata, notes)


def _first(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[1:], tensor.dtype, lambda: tensor.read()[0])


def read_tensorflow(directory: Path) -> dict[str, LazyTensor]:
    """The floating-point tensors of the directory's checkpoint by name; reading one checks its checksum.

    Raises:
        ConversionError: there is no checkpoint, or it is incomplete.
    """
    prefix = directory / _checkpoint_name(directory)
    index = prefix.with_name(prefix.name + ".index")
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has {index.stat().st_size} bytes; the index of a GPT-2 has fewer than 100,000")
        entries = dict(_table(index.read_bytes()))
        if b"" not in entries:
            raise ValueError("its header is missing")
        header = _message(entries.pop(b""))
        if header.get(2, [0])[0] != 0:
            raise ValueError("its tensors are big-endian, which only TensorFlow itself can read")
        return _tensors(prefix, entries, num_shards=header.get(1, [1])[0])
    except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise ConversionError(
            f"{index} and its data are not a complete TensorFlow checkpoint ({error}); download them again"
        ) from error


def _checkpoint_name(directory: Path) -> str:
    """The NAME in `NAME.index`: the one that the file `checkpoint` names, else the only one."""
    try:
        with (directory / "checkpoint").open(encoding="utf-8") as file:
            named = re.search(r'^model_checkpoint_path: "(.*)"', file.read(1 << 16), re.M)
    except (OSError, UnicodeDecodeError):
        named = None
    # TensorFlow writes the absolute path on the machine of the training, with backslashes on Windows.
    names = [PureWindowsPath(named[1]).name] if named else sorted(path.stem for path in directory.glob("*.index"))
    if len(names) == 1 and (directory / f"{names[0]}.index").is_file():
        return names[0]
    raise ConversionError(
        f"{directory} has {len(names)} TensorFlow checkpoints ({', '.join(names)}), but there must be "
        "exactly one `NAME.index`, the one that the file `checkpoint` names; complete the download"
    )


def _tensors(prefix: Path, entries: dict[bytes, bytes], num_shards: int) -> dict[str, LazyTensor]:
    tensors, extents = {}, []
    for key, value in entries.items():
        name, entry = key.decode(), _message(value)
        number, shard, offset, size = (entry.get(field, [0])[0] for field in (1, 3, 4, 5))
        if 7 in entry:
            raise ValueError(f"{name!r} is stored in slices, which only TensorFlow itself can read")
        shape = [_message(dim).get(1, [0])[0] for dim in _message(entry.get(2, [b""])[0]).get(2, [])]
        if len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {len(shape)} dimensions")
        if shard >= num_shards:
            raise ValueError(f"{name!r} is in shard {shard} of {num_shards}")
        path = prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{num_shards:05}")
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"{path.name} is missing or empty")
        extents.append((path, offset, offset + size, name))
        if number not in DTYPES:
            continue  # counters of a training run
        dtype = DTYPES[number]
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{name!r} of shape {shape} has {size} bytes")
        read = partial(_read, name, path, offset, torch.Size(shape), dtype, entry[6][0])
        tensors[name] = LazyTensor(torch.Size(shape), dtype, read)
    extents.sort()
    for (path, _, end, name), (next_path, begin, _, next_name) in pairwise(extents):
        if path == next_path and end > begin:
            raise ValueError(f"{name!r} and {next_name!r} overlap")
    for path, end in {path: end for path, _, end, _ in extents}.items():
        if end != path.stat().st_size:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, but its tensors end at {end}")
    return tensors


def _read(name: str, path: Path, offset: int, shape: torch.Size, dtype: torch.dtype, checksum: int) -> torch.Tensor:
    tensor = read_part(path, offset, shape, dtype)
    if masked_crc32c(tensor.reshape(-1).view(torch.uint8).numpy()) != checksum:
        raise ConversionError(f"{path} is corrupt: the checksum of {name!r} is wrong; download it again")
    return tensor


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All entries of a LevelDB table."""
    footer = file[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise ValueError("its last 8 bytes are not those of an index")
    _, _, list_offset, list_size = _varints(footer, 4)
    last, end = None, 0
    for _, handle in _block(file, list_offset, list_size):
        offset, size = _varints(handle, 2)
        if offset < end:
            raise ValueError("its blocks overlap")
        end = offset + size
        for key, value in _block(file, offset, size):
            if last is not None and key <= last:
                raise ValueError(f"the key {key!r} follows {last!r}, but keys must be sorted")
            last = key
            yield key, value


def _block(file: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """A block's entries; a key is stored as the length of the prefix shared with the one before, and the rest."""
    block = file[offset : offset + size + 5]  # and one byte for the compression, four for the checksum
    if len(block) != size + 5:
        raise ValueError("it is truncated")
    if masked_crc32c(np.frombuffer(block[:-4], dtype=np.uint8)) != struct.unpack("<I", block[-4:])[0]:
        raise ValueError("the checksum of a block of the index is wrong")
    if block[size] != 0:
        raise ValueError(f"its blocks are compressed (type {block[size]}), which TensorFlow's checkpoints never are")
    (restarts,) = struct.unpack("<I", block[size - 4 : size])
    end = size - 4 - 4 * restarts
    key, at = b"", 0
    while at < end:
        shared, rest, value_size, at = _varints(block, 3, at, with_end=True)
        if shared > len(key) or shared + rest > LONGEST_NAME or at + rest + value_size > end:
            raise ValueError("an entry is longer than its block, or its name is too long")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + value_size]
        at += rest + value_size


def _varints(data: bytes, count: int, at: int = 0, with_end: bool = False) -> list[int]:
    """`count` integers of 7 bits per byte, low bits first; and the position after them if `with_end`."""
    numbers = []
    for _ in range(count):
        number = shift = 0
        while data[at] & 0x80:
            number |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        numbers.append(number | data[at] << shift)
        at += 1
    return [*numbers, at] if with_end else numbers


def _message(data: bytes) -> dict[int, list]:
    """A protocol buffer's values by field number: integers, or bytes for nested messages."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = _varints(data, 1, at, with_end=True)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varints(data, 1, at, with_end=True)
        elif tag & 7 == 2:
            size, at = _varints(data, 1, at, with_end=True)
            if size > len(data) - at:
                raise ValueError("a message that ends within a value")
            value, at = data[at : at + size], at + size
        elif tag & 7 == 5:
            value, at = struct.unpack("<I", data[at : at + 4])[0], at + 4
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def masked_crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes, rotated and shifted as LevelDB stores it."""
    crc = 0
    for start in range(0, len(data), CRC_PIECE):  # the library takes only immutable bytes
        crc = google_crc32c.extend(crc, data[start : start + CRC_PIECE].tobytes())
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


TENSORFLOW = TensorFlow()
