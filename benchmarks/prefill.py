"""Prefill of a whole prompt: python benchmarks/prefill.py

Only the logits of the last position, as in generation (CTranslate2 computes all). They are compared with those of
transformers' GPT-2; the exit status is 3 unless ours in float32 are within FP32_LOGITS.
"""

import sys
from functools import partial
from typing import Annotated

import harness
import torch
import typer
from engines import built
from harness import REFERENCE, Checkpoint, Only, Output, Quick, Report, Rounds, Size, Threads

from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

# These rows differ only in generation, or only generate.
SAME = "no cache|static cache|llama.cpp"


@torch.inference_mode()
def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    rounds: Rounds = 7,
    only: Only = "",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Milliseconds for the last logits of a prompt, with all engines."""
    harness.use_threads(threads)
    if quick:
        size, rounds, only, length = "tiny", 2, only or harness.QUICK, 20
    settings = {"model": checkpoint or size, "batch": batch, "length": length, "rounds": rounds}
    report = Report("prefill", "Prefill, last logits", settings)
    group, passed = f"batch {batch}, {length} tokens", True
    only = f"^(?!.*(?:{SAME})).*(?:{only})"
    with harness.official_checkpoint(size, checkpoint) as directory, built(directory, only, report) as engines:
        ids = harness.random_ids(batch, length, engines[REFERENCE].model.config.vocab_size)
        rows = {name: partial(engine.prefill, ids) for name, engine in engines.items()}
        measured = harness.interleaved(rows, rounds)
    for name, row in measured.items():
        figures = {"first call, s": row.first}
        if row.output is not None:
            figures["relative error"] = error = relative_error(measured[REFERENCE].output, row.output)
            passed &= error <= FP32_LOGITS or not harness.must_be_exact(name)
        report.add(group, name, row.times, name == REFERENCE, **figures)
    report.write(output)
    sys.exit(0 if passed else 3)


if __name__ == "__main__":
    typer.run(main)
