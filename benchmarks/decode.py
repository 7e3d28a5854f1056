"""Generation, token by token: python benchmarks/decode.py

Greedy `.generate()`, prefill included, in milliseconds per new token. The ids of every row are compared with those of
transformers' GPT-2. The exit status is 3 unless ours in float32 are the same and torch.compile has compiled everything
in the first call.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import harness
import torch
import typer
from engines import built
from harness import REFERENCE, Checkpoint, CPUTime, Only, Output, Quick, Report, Rounds, Size, Threads

CASES = "1x32+64,2x32+64,4x32+64,8x32+64,1x928+64"


@dataclass(frozen=True)
class Case:
    """One table: the number of prompts, their length, and the new tokens for each."""

    batch: int
    prompt: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt}+{self.new_tokens} tokens"

    @property
    def left_out(self) -> str:
        """Pattern of the rows to leave out, which would take minutes, or are for one sequence only."""
        slow = "no cache|eager" if self.batch * self.prompt > 128 else "$^"
        return slow if self.batch == 1 else f"{slow}|prompt lookup"


def parsed(text: str) -> list[Case]:
    """`1x32+64,8x32+64`: batch, prompt, new tokens.

    Raises:
        typer.BadParameter: the text has another form.
    """
    found = [re.fullmatch(r"(\d+)x(\d+)\+(\d+)", case) for case in text.split(",")]
    if not all(found):
        raise typer.BadParameter(f"--cases {text!r}: use BATCHxPROMPT+NEW, separated by commas, as in {CASES}")
    return [Case(*map(int, case.groups())) for case in found if case]


@torch.inference_mode()
def measure(report: Report, case: Case, engines: dict[str, Any], vocab_size: int, rounds: int) -> bool:
    """Adds the case's table to the report; returns whether our ids are the reference's, and nothing was recompiled."""
    ids = harness.random_ids(case.batch, case.prompt, vocab_size)
    torch._dynamo.reset()  # otherwise the compiled rows could reuse the previous case's code
    measured = harness.interleaved(
        {
            name: partial(engine.generate, ids, case.new_tokens)
            for name, engine in engines.items()
            if not re.search(case.left_out, name)
        },
        rounds,
    )
    expected, passed = measured[REFERENCE].output, True
    for name, row in measured.items():
        figures: dict[str, Any] = {"first call, s": row.first}
        if row.output is not None:
            same = (row.output == expected).all(0)[case.prompt :].long().cumprod(0).sum().item()
            figures["equal ids"] = f"{same} of {case.new_tokens}"
            passed &= same == case.new_tokens or not harness.must_be_exact(name)
        if "compiled" in name:
            figures["recompilations"] = row.recompiled
            passed &= not row.recompiled
        report.add(str(case), name, [taken / case.new_tokens for taken in row.times], name == REFERENCE, **figures)
    return passed


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    cases: Annotated[str, typer.Option(help="Tables, each BATCHxPROMPT+NEW tokens.")] = CASES,
    rounds: Rounds = 5,
    only: Only = "",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
    cpu_time: CPUTime = False,
    repeating: Annotated[bool, typer.Option(help="Random weights whose text repeats itself.")] = False,
) -> None:
    """Milliseconds per token of greedy generation: batch 1 to 8, short and long prompts, all engines."""
    harness.use_threads(threads, cpu_time)
    if quick:
        size, rounds, only, cases = "tiny", 2, only or harness.QUICK, "1x5+6,2x9+4"
    report = Report("decode", "Greedy generation, a token", {"model": checkpoint or size, "rounds": rounds})
    if repeating:
        report.settings["text"] = "repeating"
    with (
        harness.official_checkpoint(size, checkpoint, repeating) as directory,
        built(directory, only, report) as engines,
    ):
        vocab_size = engines[REFERENCE].model.config.vocab_size
        passed = [measure(report, case, engines, vocab_size, rounds) for case in parsed(cases)]
    report.write(output)
    sys.exit(0 if all(passed) else 3)


if __name__ == "__main__":
    typer.run(main)
