"""`F.linear` of one row, for both memory orders of its weight: python benchmarks/memory_order.py

nn.Linear stores its weight as `[out, in]`, Conv1D as `[in, out]`; the latter is a transposed view here. Each call uses
500 MB of different weights, like a model, so that none of them stays in a cache.
"""

import statistics
from functools import partial

import harness
import torch
import typer
from harness import Output, Quick, Report, Rounds, Threads
from torch.nn import functional as F

SHAPES = ((768, 768), (768, 2304), (768, 3072), (3072, 768), (768, 50257))  # in, out: those of 124M


def multiply(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


@torch.inference_mode()
def main(
    rounds: Rounds = 15,
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Microseconds and gigabytes per second of the products in one decoding step."""
    harness.use_threads(threads)
    rounds = 1 if quick else rounds
    report = Report("memory_order", "F.linear of one row", {"rounds": rounds})
    for dtype in (torch.float32, torch.bfloat16):
        for size_in, size_out in SHAPES[:1] if quick else SHAPES:
            size = size_in * size_out * dtype.itemsize
            copies = 2 if quick else max(2, int(500e6 / size))
            weights = [torch.randn(size_out, size_in).to(dtype) for _ in range(copies)]
            rows = {"[out, in]": weights, "[in, out]": [weight.t().contiguous().t() for weight in weights]}
            x = torch.randn(1, size_in).to(dtype)
            calls = {name: partial(multiply, x, row) for name, row in rows.items()}
            for name, row in harness.interleaved(calls, rounds).items():
                times = [taken / copies for taken in row.times]
                group = f"{str(dtype).removeprefix('torch.')}, {size_in} to {size_out}"
                report.add(group, name, times, name == "[out, in]", **{"GB/s": size / statistics.median(times) / 1e9})
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
