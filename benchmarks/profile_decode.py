"""How the time of a token is spent: python benchmarks/profile_decode.py

Eager `.generate()` with a growing cache, batch 1, float32. A row is the own time of an operator per token, from
torch.profiler: the number of calls times their median; matrix products are separated by their weight's shape. The
profiler slows the model down: the first row, a token's time, is measured without it, and the difference to the sum of
the operators is Python, cache and generation.
"""

import re
import statistics
from collections import defaultdict
from functools import partial
from typing import Any

import harness
import torch
import typer
from engines import built
from harness import REFERENCE, Checkpoint, Output, Quick, Report, Rounds, Size, Threads
from torch.profiler import ProfilerActivity, profile

OURS = "ours, sdpa"


def operators(engine: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, list[float]]:
    """Microseconds of each call of each operator in one `.generate()`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        engine.generate(ids, new_tokens)
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events():
        shapes = [shape for shape in event.input_shapes if len(shape) == 2]
        product = re.search("mm$|linear|mv$", event.name) and shapes
        found[event.name + (" " + "×".join(map(str, shapes[-1])) if product else "")].append(event.self_cpu_time_total)
    return found


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    rounds: Rounds = 7,
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Microseconds per token of each operator, in our model and in transformers' GPT-2."""
    harness.use_threads(threads)
    if quick:
        size, rounds = "tiny", 2
    steps = 4 if quick else 32
    report = Report("profile_decode", "A token's time", {"model": checkpoint or size, "rounds": rounds})
    with (
        harness.official_checkpoint(size, checkpoint) as directory,
        built(directory, f"^{OURS}$", report) as engines,
    ):
        ids = harness.random_ids(1, steps, engines[REFERENCE].model.config.vocab_size)
        # The prefill and the first token are subtracted: the rest are decoding steps.
        generations = {
            f"{name}, {new_tokens} tokens": partial(engine.generate, ids, new_tokens)
            for name, engine in engines.items()
            for new_tokens in (1, steps + 1)
        }
        measured = harness.interleaved(generations, rounds)
        for name, engine in engines.items():
            short, long = (measured[f"{name}, {n} tokens"].times for n in (1, steps + 1))
            token = [(whole - start) / steps for start, whole in zip(short, long, strict=True)]
            report.add(name, "a token", token, reference=True, calls=1.0, share="100 %")
            start, whole = operators(engine, ids, 1), operators(engine, ids, steps + 1)
            calls = {key: (len(whole[key]) - len(start[key])) / steps for key in whole}
            # Medians, since a call that another process interrupted says nothing about the operator.
            own = {key: calls[key] * statistics.median(whole[key]) / 1e6 for key in whole}
            for key in sorted(own, key=own.__getitem__, reverse=True)[:16]:
                report.add(name, key, [own[key]], calls=calls[key], share=f"{own[key] / statistics.median(token):.1%}")
            everything = sum(own.values())
            report.add(name, "all operators", [everything], share=f"{everything / statistics.median(token):.1%}")
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
