"""One optimizer step, loss included: python benchmarks/training.py

Forward, loss, backward and fused AdamW, with the checkpoint's dropout or --dropout. The loss without dropout is
compared with that of transformers' GPT-2; the exit status is 3 unless ours is within FP32_LOSS. Peak memory is that of
two steps in a process of its own for each row.
"""

import statistics
import sys
from functools import partial
from typing import Annotated, Any

import harness
import torch
import typer
from harness import REFERENCE, Checkpoint, CPUTime, Only, Output, Quick, Report, Rounds, Size, Threads
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.weights.parity import FP32_LOSS


def dropout_rates(model_class: type, dropout: float | None) -> dict[str, float]:
    """Options of `from_pretrained` that set all dropout rates; empty to keep the checkpoint's."""
    scratch, gpt2 = (
        ("drop_rate_attn", "drop_rate_emb", "drop_rate_shortcut"),
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    )
    names = scratch if model_class is GPTScratchForCausalLM else gpt2
    return {} if dropout is None else dict.fromkeys(names, dropout)


class Step:
    """A model, its optimizer and a batch; a call trains one step."""

    def __init__(
        self, model_class, checkpoint, batch, length, dropout, attention="sdpa", compiled=False, autocast=False
    ):
        rates = dropout_rates(model_class, dropout)
        self.model = model_class.from_pretrained(checkpoint, attn_implementation=attention, **rates)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.ids = harness.random_ids(batch, length, self.model.config.vocab_size)
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)

    @torch.no_grad()
    def loss(self) -> float:
        with self.autocast():
            return self.model.eval()(self.ids, labels=self.ids, use_cache=False).loss.item()

    def __call__(self) -> None:
        self.model.train()
        with self.autocast():
            loss = self.forward(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


OURS, THEIRS = partial(Step, GPTScratchForCausalLM), partial(Step, GPT2LMHeadModel)
ROWS = {
    REFERENCE: THEIRS,
    "transformers GPT-2, eager attention": partial(THEIRS, attention="eager"),
    "transformers GPT-2, compiled": partial(THEIRS, compiled=True),
    "transformers GPT-2, bf16 autocast": partial(THEIRS, autocast=True),
    "ours, sdpa": OURS,
    "ours, eager attention": partial(OURS, attention="eager"),
    "ours, compiled": partial(OURS, compiled=True),
    "ours, bf16 autocast": partial(OURS, autocast=True),
}


def two_steps(row: str, threads: int, arguments: tuple[Any, ...]) -> harness.Cost:
    """The peak from loading the model to the second step, where AdamW has all its state."""
    harness.use_threads(threads)
    with harness.Cost() as cost:
        step = ROWS[row](*arguments)
        step()
        step()
    return cost


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    dropout: Annotated[float | None, typer.Option(help="Instead of the checkpoint's rates.")] = None,
    rounds: Rounds = 5,
    only: Only = "",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
    cpu_time: CPUTime = False,
) -> None:
    """Seconds and peak memory of a training step."""
    harness.use_threads(threads, cpu_time)
    if quick:
        size, rounds, only, length = "tiny", 2, only or harness.QUICK, 20
    settings = {"model": checkpoint or size, "batch": batch, "length": length, "dropout": dropout, "rounds": rounds}
    report = Report("training", "Training step", settings, unit="s")
    names = harness.selected(ROWS, only)
    with harness.official_checkpoint(size, checkpoint) as directory:
        arguments = (directory, batch, length, dropout)
        costs = harness.costs_in_children(two_steps, names, 0 if quick else 1, threads, arguments)
        peaks = {name: cost.memory for name, [cost] in costs.items()}
        steps = {name: ROWS[name](*arguments) for name in names}
        losses = {name: step.loss() for name, step in steps.items()}
        measured = harness.interleaved(steps, rounds)
    passed = True
    for name, row in measured.items():
        error = abs(losses[name] / losses[REFERENCE] - 1)
        passed &= error <= FP32_LOSS or not harness.must_be_exact(name)
        figures = {
            "first call, s": row.first,
            "tokens a second": round(batch * length / statistics.median(row.times)),
            "peak memory, MB": peaks[name] // 10**6,
            "memory": f"{peaks[name] / max(1, peaks[REFERENCE]):.2f}×",
            "relative error of the loss": error,
        }
        report.add(f"batch {batch}×{length}", name, row.times, name == REFERENCE, **figures)
    report.write(output)
    sys.exit(0 if passed else 3)


if __name__ == "__main__":
    typer.run(main)
