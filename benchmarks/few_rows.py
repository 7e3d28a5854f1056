"""Products of a few rows in float32, by MKL and by oneDNN: python benchmarks/few_rows.py

F.linear calls MKL in torch's builds for x86. nn.Linear stores its weight as `[out, in]`, transformers' Conv1D as
`[in, out]`, here a transposed view. oneDNN multiplies by the weight as it is, or by a copy packed for it:
`.generate()` does the first on AMD's CPUs, `for_decoding` the second. Each call uses 300 MB of different weights, like
a model, so that none of them stays in a cache. `--cpu-time` on a machine that others use.
"""

from functools import partial

import harness
import torch
import typer
from harness import CPUTime, Output, Quick, Report, Rounds, Threads
from torch.nn import functional as F

SHAPES = ((768, 768), (768, 3072), (3072, 768), (768, 50257))  # in, out: those of 124M
ROWS = (1, 2, 4, 8, 16)
PACKED_FOR = 8  # rows: oneDNN's layout depends on it; for 1 and 2 it is the weight as it is


def by_torch(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor) -> None:
    for weight in weights:
        F.linear(x, weight, bias)


def by_onednn(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor) -> None:
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.inference_mode()
def main(
    rounds: Rounds = 7,
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
    cpu_time: CPUTime = False,
) -> None:
    """Milliseconds of a product of 1 to 16 rows, for each shape of weight in 124M."""
    harness.use_threads(threads, cpu_time)
    rounds = 1 if quick else rounds
    report = Report("few_rows", "Products of a few rows", {"rounds": rounds})
    for size_in, size_out in SHAPES[:1] if quick else SHAPES:
        copies = 2 if quick else max(2, int(300e6 / (size_in * size_out * 4)))
        weights, bias = [torch.randn(size_out, size_in) for _ in range(copies)], torch.randn(size_out)
        transposed = [weight.t().contiguous().t() for weight in weights]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR) for weight in weights]
        for count in ROWS[:2] if quick else ROWS:
            x = torch.randn(count, size_in)

            calls = {
                "F.linear": partial(by_torch, x, weights, bias),
                "F.linear, [in, out]": partial(by_torch, x, transposed, bias),
                "oneDNN": partial(by_onednn, x, weights, bias),
                "oneDNN, packed": partial(by_onednn, x, packed, bias),
            }
            for name, row in harness.interleaved(calls, rounds).items():
                group = f"{size_in} to {size_out}, {count} row{'s' * (count > 1)}"
                report.add(group, name, [taken / copies for taken in row.times], name == "F.linear")
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
