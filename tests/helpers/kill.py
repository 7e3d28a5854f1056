"""Ends conversions of every kind at random moments and on full disks: python tests/helpers/kill.py --times 12

After each, the target is absent, the old one or the new one, complete, and what the run left does not stand in the next
one's way. Who is asked to end (SIGTERM, Ctrl-C) or told of a full disk leaves nothing at all.
"""

import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from pairs import random_gpt2
from rich.console import Console
from rich.progress import track

from hf_gpt_scratch.cli import terminal
from hf_gpt_scratch.weights import checkpoint, publish
from hf_gpt_scratch.weights import convert as conversion
from hf_gpt_scratch.weights.formats import format as one_format
from hf_gpt_scratch.weights.formats import onnx

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_gpt_scratch.cli.terminal", "hf_gpt_scratch.weights.convert"])

TO_OURS, TO_GPT2 = conversion.gpt2_to_scratch, conversion.scratch_to_gpt2
IMPORT, EXPORT = conversion.convert, conversion.export
EXPORTED = ("book", "nanogpt", "gguf", "llmc", "onnx")
# What is run, on which of the sources, with which options.
KINDS = {
    "official to ours": (TO_OURS, "official", {}),
    "official to ours, in shards": (TO_OURS, "official", {"max_shard_size": "190KB"}),
    "ours to official": (TO_GPT2, "native", {}),
    "ours to official, in shards": (TO_GPT2, "native", {"max_shard_size": "190KB"}),
    **{f"export to {format}": (EXPORT, "native", {"format": format}) for format in EXPORTED},
    "import from book": (IMPORT, "book/model.pth", {"n_heads": 4}),
    "import from nanogpt": (IMPORT, "nanogpt/ckpt.pt", {}),
    "import from mingpt": (IMPORT, "mingpt/model.pt", {"n_heads": 4}),
    "import from tensorflow": (IMPORT, "tensorflow", {}),
    "import from gguf": (IMPORT, "gguf/model.gguf", {}),
    "import from llmc": (IMPORT, "llmc/model.bin", {}),
    "import from onnx": (IMPORT, "onnx", {}),
}
ENDINGS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "full disk")


def write_sources(directory: Path) -> Path:
    """The same small model in every format that is read."""
    random_gpt2().save_pretrained(directory / "official")
    native = directory / "native"
    TO_OURS(directory / "official", native, check=False)
    trace = onnx.graph

    def traced(settings: str) -> bytes:  # kept, since it takes longer than all the rest
        (directory / "graph").write_bytes(trace(settings))
        return (directory / "graph").read_bytes()

    onnx.graph = traced
    try:
        for format in EXPORTED:
            EXPORT(native, directory / format, format, check=False)
    finally:
        onnx.graph = trace
    state_dict = torch.load(directory / "nanogpt/ckpt.pt")["model"]
    (directory / "mingpt").mkdir()
    torch.save(
        {**state_dict, "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril()}, directory / "mingpt/model.pt"
    )
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    importlib.import_module("convert").write_openai(native, directory / "tensorflow")
    return directory


def slow_down(pause: float) -> None:
    """Every tensor and every step of publishing takes a while, so that kills find them all."""

    def slow(function):
        def wrapper(*args, **kwargs):
            time.sleep(pause)
            result = function(*args, **kwargs)
            time.sleep(pause)
            return result

        return wrapper

    for owner, names in {
        checkpoint: ["checked_finite"],
        one_format: ["checked_finite"],
        publish: ["_fsync", "_clear", "_rename2"],
        Path: ["mkdir", "rename", "replace", "unlink", "rmdir"],
    }.items():
        for name in names:
            setattr(owner, name, slow(getattr(owner, name)))


def convert_slowly(function, source, target, pause: float, **options) -> None:
    warnings.simplefilter("ignore")
    slow_down(pause)
    function(source, target, check="weights", overwrite=True, **options)


def run_as_command(begun, largest_file: int | None, pause: float, sources, function, source, target, options) -> None:
    """A conversion as a terminal runs it; ends the process with its exit status."""
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 -- until the process ends
        warnings.simplefilter("ignore")
        slow_down(pause)
        onnx.graph = lambda settings: (sources / "graph").read_bytes()
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        begun.set()
        terminal.convert_and_report(function, source, target, check="weights", overwrite=True, **options)
        status = 0
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:  # just before or after
        status = terminal.INTERRUPTED
    finally:
        os._exit(status)


def end_at_random(
    sources: Path, directory: Path, kind: str, times: int, seed: int = 0, pause: float = 0.004
) -> Counter:
    """Runs conversions of a kind and ends each after a random while, in all ways; every second replaces a target.

    Returns:
        how many there were of each ending, how many came too late, and how often the target was then absent, the old
        one, or the new one.

    Raises:
        ConversionError, AssertionError: the target was anything else, or something was left.
    """
    function, source, options = KINDS[kind]
    target = directory / "target"

    def run(after: float | None = None, how=None, largest_file: int | None = None) -> tuple[int, float]:
        begun = PROCESSES.Event()
        process = PROCESSES.Process(
            target=run_as_command,
            args=(begun, largest_file, pause, sources, function, sources / source, target, options),
        )
        process.start()
        begun.wait(60)
        begin = time.monotonic()
        process.join(after)
        if how is not None and process.is_alive():
            os.kill(process.pid, how)
        process.join(60)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{kind}: did not end within a minute after {how}")
        return process.exitcode, time.monotonic() - begin

    def wholly(name: str) -> str | None:
        if not target.exists():
            return None
        conversion.verify_receipt(target)
        return f"{name} {json.loads((target / publish.RECEIPT).read_text())['created']} {target.stat().st_ino}"

    found: Counter = Counter()
    status, longest = run()
    if status:
        raise AssertionError(f"{kind}: exit status {status} undisturbed")
    largest = max(path.stat().st_size for path in target.rglob("*") if path.is_file())
    rng = random.Random(seed)
    for i in track(range(times), description=kind, disable=times < 10):
        how = ENDINGS[i % len(ENDINGS)]
        if (i // len(ENDINGS)) % 2 == seed % 2:
            shutil.rmtree(target, ignore_errors=True)
        elif not target.exists() and run()[0]:
            raise AssertionError(f"{kind}: the run after an ended one failed")
        before = wholly("target")
        if how == "full disk":
            status, _ = run(largest_file=rng.randrange(largest))
        else:
            # As often in the last third, where the target is published.
            status, _ = run(longest * rng.choice((rng.uniform(0, 1), rng.uniform(2 / 3, 1))), how)
        after = wholly("target")
        expected = {signal.SIGKILL: -signal.SIGKILL, "full disk": terminal.FAILED}.get(how, terminal.INTERRUPTED)
        if status not in (0, expected):
            raise AssertionError(f"{kind}: exit status {status} after {how}")
        found["too late" if status == 0 else str(getattr(how, "name", how))] += 1
        found["absent" if after is None else "old" if after == before else "new"] += 1
        if status == 0 and after in (None, before):
            raise AssertionError(f"{kind}: exit status 0, but no new target after {how}")
        rest = sorted(path.name for path in directory.iterdir() if path != target)
        if rest and how != signal.SIGKILL:
            raise AssertionError(f"{kind}: {how} left {rest}")
    if run()[0]:
        raise AssertionError(f"{kind}: the run after an ended one failed")
    conversion.verify_receipt(target)
    if (left := sorted(path.name for path in directory.iterdir())) != ["target"]:
        raise AssertionError(f"{kind}: the last conversion left {left}")
    return found


def main(
    times: Annotated[int, typer.Option(help="How many conversions of each kind to end.")] = 12,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Ends conversions of every kind at random moments."""
    total: Counter = Counter()
    with tempfile.TemporaryDirectory() as directory:
        sources = write_sources(Path(directory) / "sources")
        for number, kind in enumerate(KINDS):
            place = Path(directory) / str(number)
            place.mkdir()
            total += end_at_random(sources, place, kind, times, seed)
    ended = ", ".join(f"{total[kind]} {kind}" for kind in ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "too late"))
    told = ", ".join(f"{total[kind]} {kind}" for kind in ("absent", "old", "new"))
    Console().print(f"{len(KINDS)} kinds, {len(KINDS) * times} runs: {ended}")
    Console().print(f"Targets afterwards: {told}; those that were there were complete, and nothing was left")


if __name__ == "__main__":
    typer.run(main)
