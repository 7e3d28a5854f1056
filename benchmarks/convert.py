"""Memory and time of streamed conversions: python benchmarks/convert.py --preset 124M [--formats]

Time is compared with copying the same bytes on the same disk, both up to fsync. The two alternate, each in a process
that has done the same imports before the clock starts: a virtual machine may return freed memory to its host, and then
the first files written afterwards take longer. Memory is the peak of the converting process's anonymous pages, without
those of mapped files, which the system can reclaim, minus the peak of a process that only imports.
"""

import json
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchConfig
from hf_gpt_scratch.weights.checkpoint import Checkpoint, Progress, write_safetensors
from hf_gpt_scratch.weights.convert import gpt2_to_scratch
from hf_gpt_scratch.weights.formats import FORMATS
from hf_gpt_scratch.weights.formats.directory import Weights
from hf_gpt_scratch.weights.formats.tensorflow import HPARAMS, MAGIC, TENSORFLOW, masked_crc32c
from hf_gpt_scratch.weights.tensors import LazyTensor, with_qkv_biases

# The kernel does not record the peak of RssAnon, so it is sampled every 2 ms.
CHILD = """
import json, os, re, shutil, sys, threading, time, warnings
warnings.simplefilter("ignore")
from hf_gpt_scratch.weights import convert

def copy(source, target):
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)
        writer.flush()
        os.fsync(writer.fileno())

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not stop.wait(0.002):
        found.append(anonymous())

found, stop = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
begin, cpu = time.perf_counter(), time.process_time()
if sys.argv[1:]:
    function = {**vars(convert), "copy": copy}[sys.argv[1]]
    function(*sys.argv[2:4], **json.loads(sys.argv[4]))
figures = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
stop.set()
watcher.join()
print(json.dumps({**figures, "peak": max(found)}))
"""


def write_source(directory: Path, preset: str) -> None:
    """An official checkpoint with random weights, in float32."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPTScratchConfig.preset(preset).to_gpt2())
    model.save_pretrained(directory, state_dict={})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = {name: LazyTensor(shape, torch.float32, partial(torch.randn, shape)) for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors, Progress())


def write_tensorflow(directory: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a TensorFlow checkpoint under TensorFlow's names, without OpenAI's `hparams.json`."""

    def varint(number: int) -> bytes:
        return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def nested(field: int, value: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(value)) + value

    def block(entries: Mapping[bytes, bytes]) -> bytes:
        lines = [varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in entries.items()]
        data = b"".join(lines) + struct.pack("<II", 0, 1) + b"\0"
        return data + struct.pack("<I", masked_crc32c(np.frombuffer(data, np.uint8)))

    def handle(offset: int, block: bytes) -> bytes:
        return varint(offset) + varint(len(block) - 5)

    directory.mkdir()
    entries, offset = {b"": number(1, 1)}, 0
    with (directory / "model.ckpt.data-00000-of-00001").open("wb") as file:
        for name, tensor in sorted(tensors.items()):
            values = tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(values.data)
            shape = nested(2, b"".join(nested(2, number(1, size)) for size in tensor.shape))
            checksum = varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(values))
            entries[name.encode()] = number(1, 1) + shape + number(4, offset) + number(5, tensor.nbytes) + checksum
            offset += tensor.nbytes
    data = block(entries)
    index = block({max(entries): handle(0, data)})
    footer = (varint(0) * 2 + handle(len(data), index)).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    (directory / "model.ckpt.index").write_bytes(data + index + footer)


def write_openai(source: Path, directory: Path) -> None:
    """OpenAI's directory with the weights of a native one."""
    native = Weights(source, "gpt_scratch")
    tensors = with_qkv_biases(native.tensors(), native.config.n_layers)
    write_tensorflow(directory, TENSORFLOW.layout.from_scratch(tensors, native.config.n_layers))
    hparams = {name: getattr(native.config, ours) for name, ours in HPARAMS.items()}
    (directory / "hparams.json").write_text(json.dumps(hparams))


def run_child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def measure_formats(place: Path, preset: str, only: str) -> None:
    """One conversion from a native directory to each format and back, with the weights verified."""
    bare, native, n_heads = run_child()["peak"], place / "native", GPTScratchConfig.preset(preset).n_heads
    write_source(place / "source", preset)
    gpt2_to_scratch(place / "source", native, check=False)
    shutil.rmtree(place / "source")
    largest = max(spec.nbytes for spec in Checkpoint(native).tensors.values())
    print("| preset | conversion | peak memory | ÷ largest | time |\n| --- | --- | --- | --- | --- |", flush=True)

    def measure(what: str, name: str, source: Path, target: Path, **options: object) -> None:
        figures = run_child(name, source, target, json.dumps(options))
        peak = figures["peak"] - bare
        cells = f"{peak / 1e6:.0f} MB | {peak / largest:.2f} | {figures['seconds']:.1f} s"
        print(f"| {preset} | {what} | {cells} |", flush=True)

    for format in ("book", "nanogpt", "gguf", "tensorflow"):
        if not re.search(only, format):
            continue
        if format == "tensorflow":
            write_openai(native, place / format)
            source = place / format
        else:
            measure(f"native to {format}", "export_checkpoint", native, place / format, format=format)
            source = place / format / (FORMATS[format].file or "")
        given = {"n_heads": n_heads} if format == "book" else {}
        measure(f"{format} to native", "import_checkpoint", source, place / "back", **given)
        shutil.rmtree(place / format)
        shutil.rmtree(place / "back")


def main(
    preset: Annotated[str, typer.Option(help="124M, 355M, 774M or 1558M.")] = "124M",
    runs: Annotated[int, typer.Option(help="Runs of each; the medians are reported.")] = 5,
    weights: Annotated[bool, typer.Option(help='Convert with check="weights" instead of check=False.')] = False,
    directory: Annotated[Path | None, typer.Option(help="A directory on the disk to measure.")] = None,
    other: Annotated[
        bool, typer.Option("--formats", help="Measure other programs' formats instead, once each.")
    ] = False,
    only: Annotated[str, typer.Option(help="Regular expression: which formats.")] = "",
) -> None:
    """Measures a streamed conversion against copying the same bytes."""
    errors = Console(stderr=True)
    if other:
        with tempfile.TemporaryDirectory(dir=directory) as place:
            measure_formats(Path(place), preset, only)
        return
    with tempfile.TemporaryDirectory(dir=directory) as place:
        source, target, copied = (Path(place) / name for name in ("source", "target", "copied"))
        errors.print(f"Writing {preset}")
        write_source(source, preset)
        sizes = [spec.nbytes for spec in Checkpoint(source).tensors.values()]
        bare = run_child()["peak"]
        converted, copies = [], []
        for run in range(runs):
            copies.append(run_child("copy", source / "model.safetensors", copied, "{}")["seconds"])
            copied.unlink()
            options = json.dumps({"check": "weights" if weights else False})
            converted.append(run_child("gpt2_to_scratch", source, target, options))
            errors.print(
                f"Run {run + 1} of {runs}: copied {copies[-1]:.2f} s, converted {converted[-1]['seconds']:.2f} s"
            )
            shutil.rmtree(target)
    seconds = statistics.median(figures["seconds"] for figures in converted)
    peak = max(figures["peak"] for figures in converted) - bare
    result = {
        "preset": preset,
        "check": "weights" if weights else False,
        "runs": runs,
        "weights_MB": sum(sizes) / 1e6,
        "largest_tensor_MB": max(sizes) / 1e6,
        "peak_MB": peak / 1e6,
        "peak_in_largest_tensors": peak / max(sizes),
        "convert_s": seconds,
        "copy_s": statistics.median(copies),
        "convert_cpu_s": statistics.median(figures["cpu"] for figures in converted),
        "ratio": seconds / statistics.median(copies),
        "all_convert_s": [figures["seconds"] for figures in converted],
        "all_copy_s": copies,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))
    print(
        "\n| preset | weights | largest tensor | peak memory | ÷ largest | conversion | copy | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| {preset} | {sum(sizes) / 1e6:.0f} MB | {max(sizes) / 1e6:.0f} MB | {peak / 1e6:.0f} MB | "
        f"{peak / max(sizes):.2f} | {seconds:.2f} s | {result['copy_s']:.2f} s | {result['ratio']:.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
