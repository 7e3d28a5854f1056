"""Spoils what can be read, in every way there is a name for: python tests/helpers/fuzz.py --cases 20000

Each case is a small checkpoint of some format with one thing wrong, made from the seed and the case's number, and given
to one command. The command must refuse it with a short message that leaves nothing behind. Some damage cannot be seen,
such as another finite number in place of a weight: then the result must hold exactly the numbers of the damaged source,
as the libraries read it. Worker processes run the cases, each with a limit of time and memory. One case again, with all
that it said: python tests/helpers/fuzz.py --seed SEED --first NUMBER --cases 1
"""

import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import transformers
import typer
from pairs import random_gpt2
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from typer.testing import CliRunner

from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.model.weight_map import to_gpt2_state_dict, to_scratch_state_dict
from hf_gpt_scratch.weights.convert import RECEIPT, export_checkpoint, gpt2_to_scratch
from hf_gpt_scratch.weights.formats import FORMATS, llmc
from hf_gpt_scratch.weights.formats.book import BOOK
from hf_gpt_scratch.weights.formats.gguf import GGUF
from hf_gpt_scratch.weights.formats.llmc import LLM_C
from hf_gpt_scratch.weights.formats.nanogpt import NANOGPT
from hf_gpt_scratch.weights.formats.tensorflow import masked_crc32c, read_tensorflow
from hf_gpt_scratch.weights.tensors import held

Random = random.Random
TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
TF = Path(__file__).parents[1] / "fixtures" / "tiny-tensorflow"
SIZES = dict(vocab_size=11, n_positions=8, n_embd=8, n_head=2, n_layer=2, bos_token_id=10, eos_token_id=10)
ODD = [None, True, False, -1, 0, 3.5, 10**9, 10**30, math.nan, math.inf, -math.inf, -1e30, "", "x", "2", "a\nb", "\0"]
ODD += [[], [1], {}, [[[]]], {"a": 1}, "x" * 5000, ["x"] * 3000]
ODD_NAMES = ["", ".", "..", "../x", "/etc/passwd", "sub/x", "a\nb", "a\0b", "\\x", "é\u2028", "config.json", "x" * 300]
EXTREME = [0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


# The sources


def make_sources(directory: Path) -> None:
    """One checkpoint in each format, under its name."""
    gpt2 = random_gpt2(**SIZES)
    gpt2.save_pretrained(directory / "single")
    gpt2.save_pretrained(directory / "shards", max_shard_size="3KB")
    gpt2_to_scratch(directory / "single", directory / "ours", check=False)
    tensors = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    for name, zipped in (("zip", True), ("legacy", False)):
        shutil.copytree(directory / "single", directory / name)
        (directory / name / SAFE_WEIGHTS_NAME).unlink()
        torch.save(tensors, directory / name / WEIGHTS_NAME, _use_new_zipfile_serialization=zipped)
    shutil.copytree(directory / "zip", directory / "zip shards")
    (directory / "zip shards" / WEIGHTS_NAME).unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        files.setdefault(f"pytorch_model-{i % 3}.bin", {})[name] = tensor
    for file, shard in files.items():
        torch.save(shard, directory / "zip shards" / file)
    weight_map = {name: file for file, shard in files.items() for name in shard}
    (directory / "zip shards" / WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copytree(directory / "single", directory / "with tokenizer")
    for path in TOKENIZER.iterdir():
        if not (directory / "with tokenizer" / path.name).exists():
            shutil.copy(path, directory / "with tokenizer")
    for format in ("book", "nanogpt", "gguf", "llmc"):
        export_checkpoint(directory / "ours", directory / format, format, check=False)
        (directory / format / RECEIPT).unlink()
    for name, format in (("book with optimizer", "book"), ("bare", "nanogpt"), ("mingpt", "nanogpt")):
        (directory / name).mkdir()
        content = torch.load(directory / format / FORMATS[format].file, weights_only=True)
        content = content.get("model", content)
        masks = {f"transformer.h.{n}.attn.bias": torch.ones(8, 8).tril()[None, None] for n in range(2)}
        content |= {"mingpt": masks, "bare": {}}.get(name, {})
        if name == "book with optimizer":
            moments = {i: {"step": torch.ones(()), "exp_avg": tensor} for i, tensor in enumerate(content.values())}
            state = {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [*moments]}]}
            content = {"model_state_dict": content, "optimizer_state_dict": state}
        torch.save(content, directory / name / ("model.pth" if format == "book" else "model.pt"))
    shutil.copytree(TF, directory / "tensorflow")


def weights(rng: Random, source: Path) -> Path:
    kinds = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.index", "*.data-*")
    return rng.choice(sorted(path for kind in kinds for path in source.glob(kind)))


def the(source: Path, *names: str) -> Path:
    return next(source / name for name in names if (source / name).exists())


# Damage to bytes


def truncate(rng: Random, path: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(rng: Random, path: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 100, 5000])))


def insert(rng: Random, path: Path) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + rng.randbytes(rng.choice([1, 8, 100])) + data[at:])


def cut(rng: Random, path: Path) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + data[at + rng.choice([1, 8, 100]) :])


def flip_bits(rng: Random, path: Path, begin: int = 0, end: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8, 50])):
        data[rng.randrange(begin, end or len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_early_bits(rng: Random, path: Path) -> None:
    flip_bits(rng, path, 0, min(path.stat().st_size, 200))


def flip_late_bits(rng: Random, path: Path) -> None:
    flip_bits(rng, path, max(0, path.stat().st_size - 300))


def zero_a_part(rng: Random, path: Path) -> None:
    data, at = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
    part = data[at : at + rng.choice([1, 4, 64, 1000])]
    data[at : at + len(part)] = bytes(len(part))
    path.write_bytes(data)


def replace(rng: Random, path: Path) -> None:
    kinds = [b"", b"\0" * 8, b"{}", b"PK\x03\x04", b"\x80\x04.", b"\xff" * 100, rng.randbytes(1000), b"[" * 100_000]
    path.write_bytes(rng.choice(kinds))


def odd_number(rng: Random, path: Path) -> None:
    """A length, a count or an offset somewhere in the first part or the last replaced by an extreme one."""
    data = bytearray(path.read_bytes())
    part = min(len(data), rng.choice([30, 200, 3000]))
    at = rng.choice([0, len(data) - part]) + rng.randrange(part)
    number = rng.choice([struct.pack("<Q", rng.choice(EXTREME)), struct.pack("<I", rng.choice(EXTREME) & 0xFFFFFFFF)])
    data[at : at + len(number)] = number
    path.write_bytes(data)


BYTES = [truncate, append, insert, cut, flip_bits, flip_bits, flip_early_bits, flip_late_bits, zero_a_part]
BYTES += [odd_number, odd_number, odd_number, replace]


def spoil_weights(rng: Random, source: Path) -> None:
    rng.choice(BYTES)(rng, weights(rng, source))


def spoil_any_file(rng: Random, source: Path) -> None:
    rng.choice(BYTES)(rng, rng.choice(sorted(path for path in source.iterdir() if path.stat().st_size)))


# Damage to a safetensors header


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def spoil_length(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    data = path.read_bytes()
    length = rng.choice([0, 1, 7, len(data), len(data) - 8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)])
    path.write_bytes(struct.pack("<Q", length) + data[8:])


def spoil_entry(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    header, data = split(path)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    begin, end = entry["data_offsets"]
    offsets = [[begin + 4, end + 4], [begin, end - 4], [end, begin], [-1, end], [0, 0], [begin, 2**63], [0.5, end]]
    shapes = [[], [0], [-1], [2**62, 4], [10**30], [*entry["shape"], 1], [entry["shape"][0] + 1], entry["shape"][::-1]]
    dtypes = ["I32", "U32", "BOOL", "U8", "F8_E4M3", "F64", "F16", "BF16", "I64", "C64", "Q4", "", "f32", 3]
    key, values = rng.choice([("data_offsets", offsets), ("shape", shapes), ("dtype", dtypes)])
    entry[key] = rng.choice([*values, *ODD])
    if rng.random() < 0.2:
        entry.pop(rng.choice(sorted(entry)))
    join(path, header, data)


def overlap(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    header, data = split(path)
    names = sorted(header.keys() - {"__metadata__"})
    first, second = rng.sample(names, 2) if len(names) > 1 else (names[0], "x")
    header[second] = dict(header[first])
    join(path, header, data)


def rename(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    header, data = split(path)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    new = rng.choice([*ODD_NAMES, name + "\n", "\n" + name, name.upper(), name + "\0", "score.weight", f"x.{name}"])
    header[new] = header.pop(name)
    join(path, header, data)


def double(rng: Random, source: Path) -> None:
    """The same key twice, in one of the orders, with the same or another place."""
    path = weights(rng, source)
    header, data = split(path)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    twin = dict(header[name], **rng.choice([{}, {"dtype": "I32"}, {"data_offsets": [0, 4]}, {"shape": [1]}]))
    entries = [f"{json.dumps(n)}: {json.dumps(e)}" for n, e in header.items()]
    entries.insert(rng.randrange(len(entries) + 1), f"{json.dumps(name)}: {json.dumps(twin)}")
    join(path, f"{{{', '.join(entries)}}}".encode(), data)


def odd_header(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    header, data = split(path)
    name = rng.choice(sorted(header))
    text = json.dumps(header).encode()
    odd = [
        b"[]",
        b"{}",
        b"3",
        b"[" * 50_000 + b"]" * 50_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        text[:-1],
        text + b"}",
        b"\xef\xbb\xbf" + text,
        text.decode().encode("utf-16"),
        text.replace(b"F32", b"\xff\xfe\xfd", 1),
        json.dumps({**header, name: rng.choice(ODD)}).encode(),
        json.dumps({**header, "__metadata__": rng.choice([*ODD, {"format": 3}, {"format": None}])}).encode(),
        json.dumps({**header, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(),
        text + b" " * rng.choice([1000, 10**6]),
    ]
    join(path, rng.choice(odd), data)


def not_finite(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    header, data = split(path)
    at = 4 * rng.randrange(len(data) // 4)
    bits = rng.choice([0x7FC00000, 0xFFC00000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF])
    join(path, header, data[:at] + struct.pack("<I", bits) + data[at + 4 :])


# Damage to pickles


class Hostile:
    """Makes a file when it is unpickled; a test that finds the file has found code that was run."""

    def __init__(self, rng: Random, source: Path):
        mark = str(source.parent / "exploded")
        self.call = rng.choice(
            [
                (os.system, (f"touch '{mark}'",)),
                (Path.touch, (Path(mark),)),
                (eval, (f"__import__('pathlib').Path({mark!r}).touch()",)),
                (exec, (f"import os; os.mkdir({mark!r})",)),
                (os.mkdir, (mark,)),
                (torch.save, ({}, mark)),
                (shutil.copy, (__file__, mark)),
            ]
        )

    def __reduce__(self):
        return self.call


def load_content(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a file holds, and the state dict in it, which can be changed."""
    content = torch.load(path, weights_only=True)
    return content, next((content[key] for key in ("model", "model_state_dict") if key in content), content)


def save_content(rng: Random, content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def hostile(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    bomb = Hostile(rng, source)
    content, tensors = load_content(path)
    name = rng.choice(sorted(tensors))
    kind = rng.randrange(5)
    if kind < 3:
        tensors[rng.choice([name, "x"])] = bomb
    else:
        content = rng.choice([bomb, [bomb], {bomb.__class__: bomb}])
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content, protocol=rng.randrange(6)))
    else:
        save_content(rng, content, path)


def odd_content(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    content, tensors = load_content(path)
    # Masks, and a tied head, may be missing.
    name = rng.choice([n for n in sorted(tensors) if not n.endswith(("att.mask", "attn.bias", "head.weight"))])
    tensor = tensors[name]
    with_nan = tensor.clone()
    with_nan.view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    values = [
        *ODD,
        tensor.int(),
        tensor.bool(),
        tensor.to(torch.complex64),
        tensor.to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        tensor.to_sparse(),
        torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[:1]]),
        tensor.to("meta"),
        tensor[None],
        tensor[..., :-1],
        torch.zeros(1).expand(1000, 1000),
        with_nan,
        {name: tensor},
    ]
    whole = [*tensors.values()], {}, 3, None, "x", {"something": tensors}, {3: tensor}, {(name,): tensor}, tensor
    kind = rng.randrange(4)
    if kind == 0:
        tensors[name] = rng.choice(values)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[f"{name}\n"] = tensor
    else:
        content = rng.choice(whole)
    save_content(rng, content, path)


def odd_model_args(rng: Random, source: Path) -> None:
    path = source / "ckpt.pt"
    content = torch.load(path, weights_only=True)
    args = content["model_args"]
    where, name = rng.choice([(args, rng.choice(sorted(args))), (content, rng.choice(["model_args", "config"]))])
    where[name] = rng.choice([*ODD, torch.ones(3), 2**62])
    save_content(rng, content, path)


def odd_layout(rng: Random, source: Path) -> None:
    """A tensor that lies in its storage in another order or place; its values are as good as any."""
    path = weights(rng, source)
    content, tensors = load_content(path)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.ndim in (1, 2)))
    shape = tensors[name].shape
    room = torch.randn(2 * shape.numel() + 10)
    turned = (1, shape[0]) if len(shape) == 2 else (2,)
    strides = rng.choice([tensors[name].stride(), turned, tuple(2 * stride for stride in turned[:2])])
    tensors[name] = room.as_strided(shape, strides if len(shape) == 2 else rng.choice([(1,), (2,)]), rng.randrange(10))
    save_content(rng, content, path)


def rezip(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with changed records, and checksums that are right."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def odd_record(rng: Random, source: Path) -> None:
    """A record that is shorter or longer than its pickle says, missing, compressed, or of another byte order."""
    path = weights(rng, source)
    compression = rng.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])

    def change(records: dict[str, bytes]) -> None:
        name = rng.choice(sorted(n for n in records if "/data/" in n))
        kind = rng.randrange(5) if compression == zipfile.ZIP_STORED else 9
        if kind == 0:
            records[name] = records[name][: -rng.choice([1, 4, 8])]
        elif kind == 1:
            records[name] += bytes(rng.choice([1, 4, 4000]))
        elif kind == 2:
            del records[rng.choice([name, next(n for n in records if n.endswith("data.pkl"))])]
        elif kind == 3:
            records[next(n for n in records if n.endswith("byteorder"))] = b"big"
        elif kind == 4:
            records[name] = b""

    rezip(path, change, compression)


def odd_pickle(rng: Random, source: Path) -> None:
    """A pickle that asks for much with few bytes, in an archive or bare."""
    grow = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(rng.choice([20, 100, 250])))
    grow_list = b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"e" for i in range(200))
    numbers = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(20_000))
    odd = rng.choice(
        [
            b"\x80\x02})" + grow + b"Ns.",  # a tuple as a key, whose hash takes for ever
            b"\x80\x02)" + grow + b".",
            b"\x80\x02)" + grow_list + b".",
            b"\x80\x02)" + grow + b")R.",  # called; its name takes for ever
            b"\x80\x02}(" + numbers + b"u.",  # keys with one hash
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x02" + b"(" * 300_000 + b".",
            b"\x80\x02" + b"]" * 1_500_000 + b".",
            b"\x80\x02X\xff\xff\xff\x7fabc.",
            b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
            b"\x80\x02" + b"cposix\nsystem\n" + b"." * rng.randrange(3),
            b"\x80\x02c" + b"x" * 5_000_000,
            b"\x80\x02" + b"Nr\xff\xff\xff\xff" * 3 + b".",
        ]
    )
    path = weights(rng, source)
    if rng.random() < 0.5 or not zipfile.is_zipfile(path):
        path.write_bytes(odd)
    else:
        rezip(path, lambda records: records.update({next(n for n in records if n.endswith("data.pkl")): odd}))


def spoil_pickle(rng: Random, source: Path) -> None:
    """Another byte in the pickle itself; the archive's checksum is right."""
    path = weights(rng, source)

    def change(records: dict[str, bytes]) -> None:
        name = next(n for n in records if n.endswith("data.pkl"))
        data = bytearray(records[name])
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(data))
            data[at : at + 1] = rng.choice(
                [rng.randbytes(1), b"", rng.randbytes(4), b"h\x01", b"\x85", b"R", b"N", b"]"]
            )
        records[name] = bytes(data)

    rezip(path, change)


# Damage to GGUF and TensorFlow's index


def pack_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def odd_gguf(rng: Random, source: Path) -> None:
    """A header that promises much, or contradicts itself, or is of the other byte order."""
    path = source / "model.gguf"
    data = path.read_bytes()
    begin = b"GGUF" + struct.pack("<I", 3)
    length, kind = rng.choice(EXTREME), rng.choice([0, 4, 8, 9, 12, 13, 77])
    array = pack_string(b"x") + struct.pack("<IIQ", 9, kind, length)
    tensor = pack_string(b"token_embd.weight") + struct.pack("<I", rng.choice([0, 1, 4, 5, 2**32 - 1]))
    tensor += struct.pack("<QQIQ", rng.choice(EXTREME), 8, rng.choice([0, 1, 2, 30, 99]), rng.choice(EXTREME))
    gpt2 = pack_string(b"general.architecture") + struct.pack("<I", 8) + pack_string(b"gpt2")
    path.write_bytes(
        rng.choice(
            [
                begin + struct.pack("<QQ", 0, 1) + array,
                begin + struct.pack("<QQ", 0, 1) + array + bytes(rng.choice([8, 1000, 100_000])),
                begin + struct.pack("<QQ", rng.choice(EXTREME), 0),
                begin + struct.pack("<QQ", 0, rng.choice(EXTREME)) + pack_string(b"y"),
                begin + struct.pack("<QQ", 1, 1) + gpt2 + tensor + bytes(rng.choice([0, 64, 1000])),
                begin + struct.pack("<QQ", 2, 1) + gpt2 + tensor + tensor + bytes(1000),
                data[:4] + data[4:8][::-1] + data[8:],
                data.replace(b"gpt2.block_count", rng.choice([b"gpt2.blork_count", b"gpt2.embed_count"])),
                data.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"),
                data.replace(b"gpt2.attention.head_count\4", b"gpt2.attention.head_count" + rng.randbytes(1)),
                data + bytes(32),
            ]
        )
    )


def swap_offsets(rng: Random, source: Path) -> None:
    """Tensors of a GGUF file that overlap, lie elsewhere or out of line."""
    path = source / "model.gguf"
    reader = gguf.GGUFReader(path)
    places = [(tensor.field.offset + sum(p.nbytes for p in tensor.field.parts) - 8) for tensor in reader.tensors]
    data = bytearray(path.read_bytes())
    at = rng.choice(places)
    (offset,) = struct.unpack_from("<Q", data, at)
    new = rng.choice([offset + 4, offset + 32, 0 if offset else 32, max(offset - 32, 1), rng.choice(EXTREME[4:])])
    struct.pack_into("<Q", data, at, new)
    path.write_bytes(data)


def odd_index_entry(rng: Random, source: Path) -> None:
    """Another byte in a block of TensorFlow's index, whose checksum is right."""
    path = source / "model.ckpt.index"
    data = bytearray(path.read_bytes())
    # The first block ends where its checksum fits.
    ends = [n for n in range(5, len(data) - 48) if masked(data[: n - 4]) == struct.unpack_from("<I", data, n - 4)[0]]
    end = ends[0] - 4
    for _ in range(rng.choice([1, 1, 2, 10])):
        data[rng.randrange(end - 1)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    struct.pack_into("<I", data, end, masked(data[:end]))
    path.write_bytes(data)


def masked(data: bytes) -> int:
    return masked_crc32c(np.frombuffer(bytes(data), dtype=np.uint8))


# Damage to an index


def odd_index(rng: Random, source: Path) -> None:
    path = the(source, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    name = rng.choice(sorted(weight_map))
    files = sorted(set(weight_map.values()))
    (source.parent / "outside.safetensors").write_bytes((source / files[0]).read_bytes())
    outside = ["../outside.safetensors", str(source.parent / "outside.safetensors"), f"./{files[0]}"]
    other = rng.choice([file for file in files if file != weight_map[name]])
    weight_map[name] = rng.choice([*outside, *outside, *ODD_NAMES, *ODD, files[0].upper(), f"{files[0]}\n", other])
    if rng.random() < 0.2:
        index = rng.choice([*ODD, {}, {"weight_map": rng.choice(ODD)}, {"weight_map": {name: files[0]}}, [index]])
    text = json.dumps(index).encode()
    path.write_bytes(rng.choice([text, text, text, text.replace(b"metadata", b"meta"), b"\xef\xbb\xbf" + text]))


def drop_a_shard(rng: Random, source: Path) -> None:
    weights(rng, source).unlink()


def swap_shards(rng: Random, source: Path) -> None:
    first, second = rng.sample(sorted([*source.glob("*.safetensors"), *source.glob("*.bin")]), 2)
    first.rename(source / "x")
    if rng.random() < 0.5:
        shutil.copy(second, first)
    else:
        second.rename(first)
        (source / "x").rename(second)


# Damage to the other files


# What a config.json of transformers may hold beside the sizes.
SETTINGS = (
    "num_labels n_inner auto_map dtype torch_dtype id2label label2id return_dict output_hidden_states torchscript"
)
SETTINGS += " output_attentions is_encoder_decoder is_decoder add_cross_attention chunk_size_feed_forward pruned_heads"
SETTINGS += " problem_type pad_token_id bos_token_id eos_token_id decoder_start_token_id tie_word_embeddings use_cache"
SETTINGS += (
    " tokenizer_class prefix architectures finetuning_task task_specific_params quantization_config rope_scaling"
)
SETTINGS += (
    " attn_implementation _attn_implementation_internal experts_implementation transformers_version summary_type"
)
SETTINGS += " scale_attn_weights layer_norm_epsilon activation_function per_layer_config cross_attention_hidden_size"
SETTINGS = SETTINGS.split()


def odd_setting(rng: Random, source: Path) -> None:
    path = source / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, rng.choice([*values, *SETTINGS]): rng.choice(ODD)}))


def odd_json(rng: Random, source: Path) -> None:
    """A value of a JSON file replaced, dropped, or there twice."""
    path = rng.choice(sorted(source.glob("*.json")))
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not values:
        return replace(rng, path)
    name = rng.choice([*sorted(values), *sorted(values), *SETTINGS])
    odd = [*ODD, "evil.py--evil.Model", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, {"0": "a", "x": "b"}]
    text = json.dumps({**values, name: rng.choice(odd)})
    kind = rng.randrange(8)
    if kind == 0:
        text = json.dumps({key: value for key, value in values.items() if key != name})
    elif kind == 1:
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(odd))}}}"
    elif kind == 2:
        text = text[:-1] + ', "deep": ' + "[" * 20_000 + "]" * 20_000 + "}"
    (source / "evil.py").write_text(f"open({str(source.parent / 'exploded')!r}, 'w')\nConfig = Model = None\n")
    path.write_text(text)


def odd_config(rng: Random, source: Path) -> None:
    path = source / "config.json"
    values = json.loads(path.read_text())
    sizes = [name for name in values if name.startswith(("n_", "emb", "vocab", "context"))]
    path.write_text(json.dumps({**values, rng.choice(sizes): rng.choice([*ODD, 1, 2, 3, 7, 16, 2**31, 2**62])}))


def odd_kind_of_file(rng: Random, source: Path) -> None:
    """A link out of the directory, or to itself or nowhere, a directory or a pipe in place of a file."""
    path = rng.choice(sorted(source.iterdir()))
    outside = source.parent / "outside.safetensors"
    path.rename(outside)
    kind = rng.randrange(6)
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        path.symlink_to(f"../{outside.name}")
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.mkdir()
    else:
        os.mkfifo(path)


def odd_receipt(rng: Random, source: Path) -> None:
    """A value somewhere in the receipt replaced or dropped."""
    path = source / RECEIPT
    receipt = json.loads(path.read_text())
    where: Any = receipt
    while True:
        key = rng.choice(sorted(where))
        if not isinstance(where[key], dict) or not where[key] or rng.random() < 0.3:
            break
        where = where[key]
    if rng.random() < 0.3:
        del where[key]
    else:
        where[key] = rng.choice(ODD)
    text = json.dumps(rng.choice([receipt] * 9 + ODD))
    path.write_text(text)


def odd_extra_file(rng: Random, source: Path) -> None:
    """A file that nobody asked for."""
    extra = rng.choice(["a\nb.safetensors", "x.safetensors", "pytorch_model.bin", "evil.py", "tokenizer.json", "a b"])
    if not (source / extra).exists():
        (source / extra).write_bytes(rng.randbytes(100))


# (damage, the sources it is for, whether a reader of the weights can never overlook it)
OFFICIAL = ("single", "shards", "zip", "legacy", "zip shards", "with tokenizer")
DIRECTORIES = (*OFFICIAL, "ours")
TORCH_FILES = ("book", "book with optimizer", "nanogpt", "bare", "mingpt")
ANY = (*DIRECTORIES, *TORCH_FILES, "gguf", "llmc", "tensorflow")
SAFE = ("single", "shards", "ours")
PICKLED = ("zip", "legacy", "zip shards", *TORCH_FILES)
ZIPPED = ("zip", "zip shards", *TORCH_FILES)
SHARDED = ("shards", "zip shards")
DAMAGE: list[tuple[Callable[[Random, Path], None], tuple[str, ...], bool]] = [
    (spoil_weights, ANY, False),
    (spoil_weights, SAFE, False),
    (spoil_weights, PICKLED, False),
    (spoil_weights, ("gguf",), False),
    (spoil_weights, ("llmc",), False),
    (spoil_weights, ("tensorflow",), False),
    (spoil_any_file, ANY, False),
    (spoil_length, SAFE, True),
    (spoil_entry, SAFE, False),
    (overlap, SAFE, True),
    (rename, SAFE, True),
    (double, SAFE, True),
    (odd_header, SAFE, False),
    (not_finite, SAFE, True),
    (hostile, PICKLED, True),
    (odd_content, PICKLED, True),
    (odd_layout, PICKLED, False),
    (odd_model_args, ("nanogpt",), False),
    (odd_record, ZIPPED, True),
    (odd_pickle, PICKLED, True),
    (spoil_pickle, ZIPPED, False),
    (odd_gguf, ("gguf",), False),
    (swap_offsets, ("gguf",), True),
    (odd_index_entry, ("tensorflow",), False),
    (odd_index, SHARDED, False),
    (drop_a_shard, SHARDED, True),
    (swap_shards, SHARDED, True),
    (odd_json, (*DIRECTORIES, "tensorflow"), False),
    (odd_json, ("with tokenizer",), False),
    (odd_config, DIRECTORIES, False),
    (odd_setting, DIRECTORIES, False),
    (odd_setting, DIRECTORIES, False),
    (odd_receipt, ("ours",), False),
    (odd_kind_of_file, DIRECTORIES, False),
    (odd_extra_file, ANY, False),
]


# The commands


def commands(kind: str, sources: Path, source: Path, target: Path) -> dict[str, tuple[int, list[str]]]:
    """What can be done with a source: how often, and the command line."""
    file = next(
        (
            source / name
            for name in ("model.pth", "ckpt.pt", "model.pt", "model.gguf", "model.bin")
            if kind in FILE_KINDS and (source / name).exists()
        ),
        source,
    )
    heads = ["--n-heads", "2"] if kind in ("book", "book with optimizer", "bare", "mingpt") else []
    found = {}
    if kind != "ours":
        found["convert"] = (12, ["convert", str(file), str(target), "--weights-only", *heads])
        found["convert verified"] = (2, ["convert", str(file), str(target), *heads])
        found["convert unverified"] = (2, ["convert", str(file), str(target), "--no-verify", *heads])
    if kind in OFFICIAL:
        found["verify"] = (1, ["verify", str(source), str(sources / "ours")])
        found["compare"] = (0.1, ["compare", str(source), str(sources / "ours")])
    if kind == "ours":
        found["export"] = (8, ["export", str(source), str(target), "--weights-only"])
        found["export verified"] = (2, ["export", str(source), str(target)])
        found["verify"] = (2, ["verify", str(sources / "single"), str(source)])
        found["compare"] = (0.1, ["compare", str(sources / "single"), str(source)])
        found["verify-receipt"] = (6, ["verify-receipt", str(source)])
    if kind in DIRECTORIES:
        found["inspect"] = (2, ["inspect", str(source)])
    if not heads:
        for format in ("book", "nanogpt", "gguf", "llmc"):
            if format != kind:
                found[f"export to {format}"] = (1, ["export", str(file), str(target), "--format", format])
    return found


FILE_KINDS = (*TORCH_FILES, "gguf", "llmc")


# What must hold


class Broken(Exception):
    """The command did what it must not."""


LONGEST_S, START_S = 60, 600  # of a case, and of a worker process until its first
LONGEST_MESSAGE = 2000
# Beside what the process held before: a floor for what the libraries keep, and times the size of the source.
MEMORY_FLOOR, MEMORY_TIMES = 100 << 20, 20
FILE_FORMATS = ((BOOK.layout, "trf_blocks.0.norm1.scale"), (NANOGPT.layout, "transformer.wte.weight"))


def read_by_libraries(directory: Path) -> dict[str, torch.Tensor]:
    """The weights in the book's names."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        paths = [directory / single] if (directory / single).exists() else []
        if not paths and (directory / index).exists():
            files = json.loads((directory / index).read_text())["weight_map"].values()
            paths = [directory / file for file in sorted(set(files))]
        if paths:
            load = load_file if paths[0].suffix == ".safetensors" else torch.load
            tensors = {name: tensor for path in paths for name, tensor in load(path).items()}
            config = json.loads((directory / "config.json").read_text())
            ours = config["model_type"] == "gpt_scratch"
            layers = config["n_layers" if ours else "n_layer"]
            return to_scratch_state_dict(to_gpt2_state_dict(tensors, layers) if ours else tensors, layers)
    if (directory / "hparams.json").exists():
        read = {name: tensor.read() for name, tensor in read_tensorflow(directory).items()}
        raise Broken(f"there is no library to compare {len(read)} tensors with")
    file = next(path for path in directory.iterdir() if path.suffix in (".pth", ".pt", ".gguf", ".bin"))
    if file.suffix == ".gguf":
        layout, found = GGUF.layout, {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(file).tensors}
    elif file.suffix == ".bin":
        layout, found = LLM_C.layout, read_llmc(file)
    else:
        _, found = load_content(file)
        layout = next(layout for layout, name in FILE_FORMATS if name in found)
    lazies = layout.to_scratch(held(found), layout.count_layers(found))
    return {name: tensor.read() for name, tensor in lazies.items()}


def read_llmc(file: Path) -> dict[str, torch.Tensor]:
    """llm.c's float32 weights by its names, in its order; the rows of wte beyond the vocabulary left out."""
    _, _, context, vocab, layers, heads, width, padded = map(int, np.fromfile(file, "<i4", 8))
    sizes = dict(context_length=context, vocab_size=vocab, n_layers=layers, n_heads=heads, emb_dim=width)
    values = torch.from_numpy(np.fromfile(file, "<f4", offset=4 * 256))
    values = torch.cat((values[: vocab * width], values[padded * width :]))
    shapes = llmc.shapes(sizes)
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the head that is tied, and without biases of zeros, which not all formats have."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors.setdefault("out_head.weight", tensors["tok_emb.weight"])
    return {name: t for name, t in tensors.items() if not (name.endswith(("bias", "shift")) and not t.any())}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not the same, bit for bit."""
    one, other = whole(one), whole(other)
    return sorted(name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name)))


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def check_result(kind: str, clean: Path, source: Path, result: dict[str, torch.Tensor]) -> None:
    """The result holds the bits of the damaged source, as the libraries read it, or those of the sound one.

    Raises:
        Broken: it does not, or a number in it is not finite.
    """
    if not all(torch.isfinite(tensor).all() for tensor in result.values()):
        raise Broken("a number is not finite")
    if kind != "tensorflow":
        try:
            wrong = differences(read_by_libraries(source), result)
        except Exception as error:  # whatever the libraries raise at what is damaged
            wrong = [f"what the libraries refuse: {error}"]
    else:
        wrong = ["there is no library"]
    if not wrong:
        return
    sound = read_sound(clean)
    if left := differences(sound, result):
        raise Broken(f"{', '.join(left[:3])} is not what it was ({wrong[0]})")


def read_sound(clean: Path) -> dict[str, torch.Tensor]:
    if not (clean / "hparams.json").exists():
        return read_by_libraries(clean)
    return load_sound_tensorflow(clean)


def load_sound_tensorflow(clean: Path) -> dict[str, torch.Tensor]:
    """Those of the file that was not damaged; other tests show that they are what TensorFlow wrote."""
    from hf_gpt_scratch.weights.formats import read

    return read(clean)[1]


# Of both models' settings, those that change what is computed.
COMPUTED = {"n_head": "n_heads", "activation_function": "activation_function"}
COMPUTED |= {name: name for name in ("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")}


def check_config(source: Path, target: Path) -> None:
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (source, target))
    for theirs, ours in COMPUTED.items():
        told = before.get(theirs, before.get(ours))
        if told is not None and told != after.get(ours, after.get(theirs)):
            raise Broken(f"{theirs}={told!r} became {after.get(ours, after.get(theirs))!r}")


def run_case(sources: Path, place: Path, seed: int, number: int) -> tuple[str, str, str]:
    """Makes, runs and judges one case; returns the damage's name, the command's, and what came of it.

    Raises:
        Broken: the command did what it must not.
    """
    rng = Random(f"{seed}/{number}")
    damage, kinds, visible = DAMAGE[number % len(DAMAGE)]
    kind = rng.choice(kinds)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        source, target = Path(directory) / "source", Path(directory) / "target"
        shutil.copytree(sources / kind, source)
        choice = commands(kind, sources, source, target)
        damage(rng, source)
        command = rng.choices([*choice], [often for often, _ in choice.values()])[0]
        size = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
        with memory(MEMORY_FLOOR + MEMORY_TIMES * size, f"{kind}, {command}"):
            done = CliRunner().invoke(app, choice[command][1])
        said = f"{kind}, {command}: "
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            where = traceback.extract_tb(done.exception.__traceback__)[-1]
            raise Broken(
                f"{said}{type(done.exception).__name__} instead of a message: {str(done.exception)[:300]} "
                f"({Path(where.filename).name}:{where.lineno})"
            ) from done.exception
        if done.exit_code not in (0, 1, 3):
            raise Broken(f"{said}exit status {done.exit_code}: {done.stderr[-300:]}")
        message = done.stderr.strip()
        if done.exit_code == 1 and not 20 < len(message) <= LONGEST_MESSAGE:
            raise Broken(f"{said}a message of {len(message)} letters: {message[:300]}")
        if "Traceback" in message or "please report" in message:
            raise Broken(f"{said}{message[:300]}")
        left = {path.name for path in Path(directory).iterdir()}
        if left - {"source", "target", "outside.safetensors"}:
            raise Broken(f"{said}left {sorted(left)}")
        writes = command.startswith(("convert", "export"))
        if ("target" in left) != (writes and done.exit_code == 0):
            raise Broken(f"{said}exit status {done.exit_code}, but left {sorted(left)}")
        reads = writes or command in ("verify", "compare")
        if done.exit_code == 0 and reads and visible:
            raise Broken(f"{said}{damage.__name__} was overlooked")
        if done.exit_code == 0 and writes:
            try:
                result = read_by_libraries(target)
                check_result(kind, sources / kind, source, result)
                if (source / "config.json").exists() and (target / "config.json").exists():
                    check_config(source, target)
            except Broken as error:
                raise Broken(f"{said}{error}") from error
        if (
            done.exit_code == 0
            and command == "verify"
            and (wrong := differences(read_by_libraries(source), read_by_libraries(sources / kind)))
        ):
            raise Broken(f"{said}{wrong} were called the same")
        return damage.__name__, command, {0: "done", 1: "refused", 3: "different"}[done.exit_code]


@contextmanager
def memory(allowed: int, what: str) -> Iterator[None]:
    """Raises Broken if the block takes more memory at any time."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        yield
        return
    before = resident("VmRSS")
    yield
    if (taken := resident("VmHWM") - before) > allowed:
        raise Broken(f"{what}: took {taken >> 20} MB, but {allowed >> 20} MB are allowed")


def resident(which: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


# Worker processes


def work(sources: Path, place: Path, seed: int, sound: bool, connection: Connection) -> None:
    """Runs the cases whose numbers come, and answers each with outcome or fault; before, if `sound`, what is sound."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    for kind in ANY if sound else ():
        for command, (_, line) in commands(kind, sources, sources / kind, place / "sound").items():
            done = CliRunner().invoke(app, line)
            shutil.rmtree(place / "sound", ignore_errors=True)
            if done.exit_code != 0:
                connection.send((None, f"a sound source, {kind}, {command}: {done.output} {done.exception!r}"))
                return
    limit = resident("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send((None, None))
    while (number := connection.recv()) is not None:
        try:
            connection.send((run_case(sources, place, seed, number), None))
        except Broken as error:
            connection.send((None, str(error)))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            connection.send((None, f"the fuzzer itself: {error!r} ({Path(where.filename).name}:{where.lineno})"))


class Worker:
    """A process that runs one case at a time."""

    def __init__(self, sources: Path, place: Path, seed: int, sound: bool):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fuzz"])
        self.place = place
        self.place.mkdir(exist_ok=True)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(sources, place, seed, sound, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.since = time.monotonic()

    def begin(self, number: int | None) -> None:
        self.number, self.since = number, time.monotonic()
        self.connection.send(number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.place, ignore_errors=True)


def run_cases(cases: range, seed: int, place: Path, jobs: int = 1) -> tuple[Counter, list[str]]:
    """How often each damage had which outcome by which command, and a line for each broken case."""
    outcomes: Counter = Counter()
    broken: list[str] = []
    usual = dict(os.environ)
    # Workers import this module, and must not ask the hub for a source that they do not find.
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    numbers = iter(track(cases, description="Fuzzing", disable=len(cases) < 1000, console=Console(stderr=True)))
    workers: list[Worker] = []
    started = 0

    def start() -> None:
        nonlocal started
        started += 1
        workers.append(Worker(sources, Path(directory) / f"worker {started}", seed, sound=started == 1))

    def fault(worker: Worker, what: str) -> None:
        if worker.number is None:
            raise RuntimeError(what)
        name = DAMAGE[worker.number % len(DAMAGE)][0].__name__
        outcomes[name, "", "BROKEN"] += 1
        broken.append(f"case {worker.number}, {name}: {what} (--seed {seed} --first {worker.number} --cases 1)")

    with tempfile.TemporaryDirectory(dir=place) as directory:
        try:
            sources = Path(directory) / "sources"
            make_sources(sources)
            for _ in range(jobs):
                start()
            while workers:
                ready = wait([worker.connection for worker in workers], timeout=1)
                for worker in [*workers]:
                    again = False
                    if worker.connection in ready:
                        try:
                            outcome, what = worker.connection.recv()
                        except EOFError:
                            fault(worker, "the process died")
                            again = True
                        else:
                            if what is not None:
                                fault(worker, what)
                            elif outcome is not None:
                                outcomes[outcome] += 1
                            number = next(numbers, None)
                            worker.begin(number)
                            if number is None:
                                workers.remove(worker)
                                worker.end()
                    elif time.monotonic() - worker.since > (START_S if worker.number is None else LONGEST_S):
                        fault(worker, f"hangs: {LONGEST_S} s")
                        again = True
                    if again:
                        workers.remove(worker)
                        worker.end()
                        start()
        finally:
            for worker in workers:
                worker.end()
            os.environ.clear()
            os.environ.update(usual)
    return outcomes, broken


def main(
    cases: Annotated[int, typer.Option(help="How many.")] = 20_000,
    first: Annotated[int, typer.Option(help="Number of the first; with --cases 1 to see one again.")] = 0,
    seed: Annotated[int, typer.Option(help="Another seed, other cases.")] = 0,
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = os.cpu_count() or 1,
    directory: Annotated[Path | None, typer.Option(help="Where to work; memory is faster than a disk.")] = None,
) -> None:
    """Gives spoiled checkpoints to every command and judges what comes of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        outcomes, broken = run_cases(range(first, first + cases), seed, Path(place), jobs)
    for title, column in (("damage", 0), ("command", 1)):
        print(f"By {title}:")
        for name in sorted({outcome[column] for outcome in outcomes}):
            counts = Counter(outcome[2] for outcome in outcomes.elements() if outcome[column] == name)
            print(f"  {name or 'broken'}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    print("\n".join(broken))
    totals = Counter(outcome[2] for outcome in outcomes.elements())
    print(f"{cases} cases in {time.monotonic() - begin:.0f} s: " + ", ".join(f"{n} {o}" for o, n in totals.items()))
    sys.exit(bool(broken))


if __name__ == "__main__":
    import fuzz  # the module that the workers import too

    typer.run(fuzz.main)
