"""Spoils checkpoints in every way there is a name for: python tests/fuzz.py --cases 10000

Each case is a small checkpoint with one thing wrong, made from a seed and the case's number, and converted. It must be
refused with a ConversionError that leaves nothing behind. Some damage cannot be seen, such as another finite number
in place of a weight: then the result must hold exactly the numbers of the damaged source, as the libraries read it.
"""

import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from pairs import random_gpt2
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_gpt_scratch.conversion import ConversionError, gpt2_to_scratch, scratch_to_gpt2
from hf_gpt_scratch.weight_map import GPT2_PREFIX, SCRATCH_PREFIX, to_gpt2_state_dict, to_scratch_state_dict

Random = random.Random
TOKENIZER = Path(__file__).parent / "fixtures" / "tiny-gpt2"
SIZES = dict(vocab_size=11, n_positions=8, n_embd=8, n_head=2, n_layer=2, bos_token_id=10, eos_token_id=10)
ODD = [None, True, -1, 0, 3.5, 10**9, 10**30, math.nan, math.inf, -math.inf, "", "x", "2", "a\nb", "\0", [], [1], {}]
ODD_NAMES = ["", ".", "..", "../x", "/etc/passwd", "sub/x", "a\nb", "a\0b", "\\x", "é\u2028", "config.json", "x" * 300]


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


def weights(rng: Random, source: Path) -> Path:
    return rng.choice(sorted([*source.glob("*.safetensors"), *source.glob("*.bin")]))


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


BYTES = [truncate, append, insert, cut, flip_bits, flip_bits, flip_early_bits, flip_late_bits, zero_a_part, replace]


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


def hostile(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    bomb = Hostile(rng, source)
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(sorted(tensors))
    content = rng.choice([bomb, [bomb], {**tensors, name: bomb}, {**tensors, "x": bomb}, {bomb.__class__: bomb}])
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content, protocol=rng.randrange(6)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def odd_content(rng: Random, source: Path) -> None:
    path = weights(rng, source)
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(sorted(tensors.keys() - {"lm_head.weight"}))  # a tied head may be missing
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
        tensor.to("meta"),
        tensor[None],
        tensor[..., :-1],
        torch.zeros(1).expand(1000, 1000),
        with_nan,
        {name: tensor},
    ]
    whole = [*tensors.values()], {}, 3, None, "x", {"state_dict": tensors}, {3: tensor}, {(name,): tensor}, tensor
    without = {key: value for key, value in tensors.items() if key != name}
    changed = [{**tensors, name: rng.choice(values)}, without, {**tensors, f"{name}\n": tensor}]
    torch.save(rng.choice([*changed, rng.choice(whole)]), path, _use_new_zipfile_serialization=rng.random() < 0.7)


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
    path.write_text(json.dumps(index))


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


def odd_json(rng: Random, source: Path) -> None:
    """A value of a JSON file replaced, dropped, or there twice."""
    path = rng.choice(sorted(source.glob("*.json")))
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not values:
        return replace(rng, path)
    name = rng.choice([*sorted(values), *sorted(values), "num_labels", "n_inner", "auto_map", "dtype", "id2label"])
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


def odd_extra_file(rng: Random, source: Path) -> None:
    """A file that nobody asked for."""
    extra = rng.choice(["a\nb.safetensors", "x.safetensors", "pytorch_model.bin", "evil.py", "tokenizer.json", "a b"])
    if not (source / extra).exists():
        (source / extra).write_bytes(rng.randbytes(100))


# (damage, the sources it is for, whether it can never be overlooked)
ANY = ("single", "shards", "ours", "zip", "legacy", "zip shards", "with tokenizer")
SAFE = ("single", "shards", "ours")
PICKLED = ("zip", "legacy", "zip shards")
SHARDED = ("shards", "zip shards")
DAMAGE: list[tuple[Callable[[Random, Path], None], tuple[str, ...], bool]] = [
    (spoil_weights, ANY, False),
    (spoil_weights, SAFE, False),
    (spoil_weights, PICKLED, False),
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
    (odd_index, SHARDED, False),
    (drop_a_shard, SHARDED, True),
    (swap_shards, SHARDED, True),
    (odd_json, ANY, False),
    (odd_json, ("with tokenizer",), False),
    (odd_config, ANY, False),
    (odd_kind_of_file, ANY, False),
    (odd_extra_file, ANY, False),
]


# What must hold


class Broken(Exception):
    """The converter did what it must not."""


class Hangs(BaseException):
    """A case took longer than any may."""


LONGEST_S = 30


def hangs(*_: object) -> None:
    raise Hangs


def read_by_libraries(directory: Path) -> dict[str, torch.Tensor]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        paths = [directory / single] if (directory / single).exists() else []
        if not paths and (directory / index).exists():
            files = json.loads((directory / index).read_text())["weight_map"].values()
            paths = [directory / file for file in sorted(set(files))]
        if paths:
            load = load_file if paths[0].suffix == ".safetensors" else torch.load
            return {name: tensor for path in paths for name, tensor in load(path).items()}
    raise Broken("there are no weights to compare")


def check_result(source: Path, target: Path) -> None:
    """The target holds the bits of the source, as the libraries read it."""
    config = json.loads((target / "config.json").read_text())
    if config["model_type"] == "gpt2":
        expected = to_gpt2_state_dict(read_by_libraries(source), config["n_layer"])
        prefix = GPT2_PREFIX
    else:
        expected = to_scratch_state_dict(read_by_libraries(source), config["n_layers"])
        prefix = SCRATCH_PREFIX
    expected = {name.removeprefix(prefix): tensor for name, tensor in expected.items()}
    found = {name.removeprefix(prefix): tensor for name, tensor in read_by_libraries(target).items()}
    if config["tie_word_embeddings"]:
        for head in ("lm_head.weight", "out_head.weight"):
            expected.pop(head, None)
    if expected.keys() != found.keys():
        raise Broken(f"other tensors: {sorted(expected.keys() ^ found.keys())}")
    for name, tensor in expected.items():
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, found[name]))
        if not torch.equal(a, b) or tensor.shape != found[name].shape:
            raise Broken(f"{name} is not what it was")
        if not torch.isfinite(tensor).all():
            raise Broken(f"{name} is not finite")


def run_case(sources: Path, place: Path, seed: int, number: int) -> tuple[str, str]:
    """Makes, converts and judges one case; returns the damage's name and what came of it.

    Raises:
        Broken: the converter did what it must not.
    """
    rng = Random(f"{seed}/{number}")
    damage, kinds, visible = DAMAGE[number % len(DAMAGE)]
    kind = rng.choice(kinds)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        source, target = Path(directory) / "source", Path(directory) / "target"
        shutil.copytree(sources / kind, source)
        damage(rng, source)
        convert = scratch_to_gpt2 if kind == "ours" else gpt2_to_scratch
        usual = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(LONGEST_S)
        try:
            convert(source, target, check=False)
            outcome = "converted"
        except ConversionError as error:
            outcome = "refused"
            if not str(error):
                raise Broken("refused without a word") from error
        except BaseException as error:
            raise Broken(f"{type(error).__name__} instead of ConversionError: {error}") from error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, usual)
        left = {path.name for path in Path(directory).iterdir()}
        if left - {"source", "target", "outside.safetensors"}:
            raise Broken(f"left {sorted(left)}")
        if ("target" in left) != (outcome == "converted"):
            raise Broken(f"{outcome}, but left {sorted(left)}")
        if outcome == "converted":
            if visible:
                raise Broken(f"{damage.__name__} was overlooked")
            try:
                check_result(source, target)
            except (ValueError, RuntimeError, OSError, SafetensorError, pickle.UnpicklingError) as error:
                raise Broken(f"converted what the libraries refuse: {error}") from error
        return damage.__name__, outcome


def run_cases(cases: range, seed: int, place: Path) -> tuple[Counter, list[str]]:
    """How often each damage had which outcome, and a line for each broken case."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    outcomes: Counter = Counter()
    broken = []
    with tempfile.TemporaryDirectory(dir=place) as directory:
        sources = Path(directory) / "sources"
        make_sources(sources)
        for number in track(cases, description="Fuzzing", disable=len(cases) < 1000, console=Console(stderr=True)):
            try:
                outcomes[run_case(sources, Path(directory), seed, number)] += 1
            except Broken as error:
                outcomes[DAMAGE[number % len(DAMAGE)][0].__name__, "BROKEN"] += 1
                cause = error.__cause__ or error
                where = traceback.extract_tb(cause.__traceback__)[-1]
                broken.append(f"case {number}: {error} ({Path(where.filename).name}:{where.lineno})")
    return outcomes, broken


def main(
    cases: Annotated[int, typer.Option(help="How many.")] = 10_000,
    first: Annotated[int, typer.Option(help="Number of the first; with --cases 1 to see one again.")] = 0,
    seed: Annotated[int, typer.Option(help="Another seed, other cases.")] = 0,
    directory: Annotated[Path | None, typer.Option(help="Where to work; memory is faster than a disk.")] = None,
) -> None:
    """Converts spoiled checkpoints and judges what comes of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        outcomes, broken = run_cases(range(first, first + cases), seed, Path(place))
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name}: " + ", ".join(f"{n} {outcome}" for (damage, outcome), n in outcomes.items() if damage == name))
    print("\n".join(broken))
    totals = Counter(outcome for _, outcome in outcomes.elements())
    print(f"{cases} cases in {time.monotonic() - begin:.0f} s: " + ", ".join(f"{n} {o}" for o, n in totals.items()))
    sys.exit(bool(broken))


if __name__ == "__main__":
    typer.run(main)
