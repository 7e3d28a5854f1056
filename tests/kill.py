"""Kills conversions at random moments: python tests/kill.py --times 30

After each, the target is absent or complete, and what the killed one left does not stand in the next one's way.
"""

import multiprocessing
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from pairs import random_gpt2
from rich.console import Console
from rich.progress import track

from hf_gpt_scratch import checkpoint, conversion, publish

PROCESSES = multiprocessing.get_context("forkserver")


def convert_slowly(source, target, pause: float) -> None:
    """A conversion in which every tensor and every step of publishing takes a while, so that kills find them all."""

    def slow(function):
        def wrapper(*args, **kwargs):
            time.sleep(pause)
            result = function(*args, **kwargs)
            time.sleep(pause)
            return result

        return wrapper

    warnings.simplefilter("ignore")
    checkpoint.Checkpoint.read = slow(checkpoint.Checkpoint.read)
    publish._fsync = slow(publish._fsync)
    publish._clear = slow(publish._clear)
    for name in ("mkdir", "rename"):
        setattr(Path, name, slow(getattr(Path, name)))
    conversion.gpt2_to_scratch(source, target, check=False, overwrite=True)


def kill_at_random(directory: Path, times: int, seed: int = 0, pause: float = 0.005) -> Counter:
    """Starts conversions in `directory` and kills each after a random while; every second replaces a target.

    Returns:
        how often the target was absent, the old one, or the new one; and how many kills came too late.

    Raises:
        ConversionError: the target was anything else.
    """
    source, target = directory / "source", directory / "target"
    random_gpt2().save_pretrained(source)
    PROCESSES.set_forkserver_preload(["hf_gpt_scratch.conversion"])

    def run(kill_after: float | None) -> float:
        process = PROCESSES.Process(target=convert_slowly, args=(source, target, pause))
        process.start()
        begin = time.monotonic()
        process.join(kill_after)
        took = time.monotonic() - begin
        if process.is_alive():
            process.kill()
            found["killed"] += 1
        process.join()
        return took

    def receipt() -> int:
        return (target / publish.RECEIPT).stat().st_mtime_ns

    found: Counter = Counter()
    run(None)  # starts the server, which imports
    longest = run(None)
    rng = random.Random(seed)
    for i in track(range(times), description="Killing", disable=times < 10):
        if i % 2:
            if not target.exists():
                run(None)
        else:
            shutil.rmtree(target, ignore_errors=True)
        before = receipt() if target.exists() else None
        run(rng.uniform(0, longest))
        if target.exists():
            conversion.verify_receipt(target)
        found["absent" if not target.exists() else "old" if receipt() == before else "new"] += 1
    run(None)
    conversion.verify_receipt(target)
    left = sorted(path.name for path in directory.iterdir())
    if left != ["source", "target"]:
        raise AssertionError(f"the last conversion left {left}")
    return found


def main(
    times: Annotated[int, typer.Option(help="How many conversions to kill.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kills conversions at random moments."""
    with tempfile.TemporaryDirectory() as directory:
        found = kill_at_random(Path(directory), times, seed)
    told = ", ".join(f"{found[kind]} {kind}" for kind in ("absent", "old", "new"))
    Console().print(f"{found['killed']} of {times} killed; targets: {told}; every one that was there was complete")


if __name__ == "__main__":
    typer.run(main)
