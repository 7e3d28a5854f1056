"""Cost over model size, prompt length and batch size: python benchmarks/scaling.py

Ours and transformers' GPT-2, both in float32 with sdpa; --only adds other rows of decode.py. 1558M needs 14 GB of
memory and 7 GB of disk. Ids and logits are compared with those of transformers' GPT-2 as in decode.py and prefill.py.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
import typer
from engines import built
from harness import REFERENCE, Only, Output, Quick, Report, Rounds, Threads

from hf_gpt_scratch.model.configuration_gpt_scratch import PRESETS
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

OURS = "ours, sdpa"


@dataclass(frozen=True)
class Case:
    """One point of one curve."""

    curve: str
    x: float
    batch: int
    length: int
    new_tokens: int = 0  # 0: prefill

    def __str__(self) -> str:
        new = f"+{self.new_tokens}" if self.new_tokens else ""
        return f"batch {self.batch}, {self.length}{new} tokens"


def cases(size: str, parameters: int, quick: bool) -> list[Case]:
    """The points to measure with a model of this size; only the smallest has curves over length and batch."""
    length, new_tokens = (8, 4) if quick else (32, 32)
    points = [
        Case("decode over parameters", parameters, 1, length, new_tokens),
        Case("prefill over parameters", parameters, 1, 4 * length),
    ]
    if size in ("124M", "tiny"):
        lengths, batches = ((16, 32), (1, 2)) if quick else ((128, 256, 512, 1024), (1, 2, 4, 8, 16, 32))
        points += [Case("prefill over length", length, 1, length) for length in lengths]
        points += [Case("decode over batch", batch, batch, length, new_tokens) for batch in batches]
    return points


@dataclass
class Scaling(Report):
    """A report whose plot has one diagram per curve."""

    cases: dict[str, Case] = field(default_factory=dict)  # by the row's group

    def plot(self, target: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        curves = list(dict.fromkeys(case.curve for case in self.cases.values()))
        figure, axes = plt.subplots(1, len(curves), figsize=(3.5 * len(curves), 3.5), layout="constrained")
        for axis, curve in zip(axes, curves, strict=True):
            rows = [row for row in self.rows if self.cases[row.group].curve == curve]
            for name in dict.fromkeys(row.name for row in rows):
                points = [row for row in rows if row.name == name]
                sizes = [self.cases[row.group].x for row in points]
                axis.loglog(sizes, [1e3 * row.median for row in points], "o-", label=name)
            axis.set_title(curve, fontsize=10)
            axis.set_ylabel("ms per token" if "decode" in curve else "ms")
        axes[0].legend(fontsize=8)
        figure.savefig(target, dpi=110)
        plt.close(figure)


@torch.inference_mode()
def measure(report: Scaling, size: str, case: Case, engines: dict[str, Any], vocab_size: int, rounds: int) -> bool:
    """Adds one point's rows; returns whether ours has the reference's results."""
    ids = harness.random_ids(case.batch, case.length, vocab_size)
    torch._dynamo.reset()
    rows = {
        name: partial(engine.generate, ids, case.new_tokens) if case.new_tokens else partial(engine.prefill, ids)
        for name, engine in engines.items()
    }
    group = f"{case.curve}: {size}, {case}"
    report.cases[group] = case
    measured, passed = harness.interleaved(rows, rounds), True
    expected = measured[REFERENCE].output
    for name, row in measured.items():
        same = (
            torch.equal(expected, row.output)
            if case.new_tokens
            else relative_error(expected, row.output) <= FP32_LOGITS
        )
        passed &= same or not harness.must_be_exact(name)
        times = [taken / max(1, case.new_tokens) for taken in row.times]
        report.add(group, name, times, name == REFERENCE, same=same)
    return passed


def main(
    sizes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PRESETS),
    rounds: Rounds = 3,
    only: Only = f"^{OURS}$",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Milliseconds over parameters, prompt length and batch size."""
    harness.use_threads(threads)
    if quick:
        sizes, rounds = "tiny", 1
    report = Scaling("scaling", "Cost over size", {"rounds": rounds})
    passed = True
    for size in sizes.split(","):
        with harness.official_checkpoint(size) as directory, built(directory, only, report) as engines:
            model = engines[REFERENCE].model
            for case in cases(size, model.num_parameters(), quick):
                passed &= measure(report, size, case, engines, model.config.vocab_size, rounds)
        del engines, model  # before the next size is loaded
    report.write(output)
    sys.exit(0 if passed else 3)


if __name__ == "__main__":
    typer.run(main)
