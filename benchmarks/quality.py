"""The quality and speed of bf16 and int8: python benchmarks/quality.py --checkpoint DIRECTORY --text FILE

On the text's tokens, in windows of the model's context: the perplexity, and how far the predictions are from those of
transformers' GPT-2 in float32 (KL divergence, and how often the likeliest token is the same). The time is that of a
token of greedy `.generate()`. Without --checkpoint, a small official model is trained on the first nine tenths of the
text and measured on the last; without --text, the text is Python's language reference.

The exit status is 3 unless ours in float32 has the reference's logits within FP32_LOGITS.
"""

import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import harness
import torch
import typer
from engines import built
from harness import REFERENCE, Checkpoint, Only, Output, Quick, Report, Rounds, Threads
from rich.progress import track
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed

from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

NARROWER = "^ours, sdpa$|bf16|int8"
SMALL: dict[str, Any] = dict(n_positions=256, n_embd=256, n_head=4, n_layer=4)
VOCABULARY, BATCH, LEARNING_RATE = 2000, 8, 2e-3  # of the small model's training


@contextmanager
def trained(content: str, steps: int) -> Iterator[tuple[Path, torch.Tensor]]:
    """A small official checkpoint trained on the text's first nine tenths, and the ids of the last tenth."""
    set_seed(0)
    tokenizer = GPT2Tokenizer().train_new_from_iterator([content], VOCABULARY, show_progress=False)
    ids = torch.tensor(tokenizer(content, verbose=False).input_ids)
    end: dict[str, Any] = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **SMALL, **end)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    learned, held_out = ids.tensor_split([int(0.9 * len(ids))])
    rows = learned.unfold(0, SMALL["n_positions"], SMALL["n_positions"] // 2)
    for _ in track(range(steps), "Training a small model", transient=True):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        yield Path(directory), held_out


@contextmanager
def given(content: str, checkpoint: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    """The checkpoint, and the text's ids from its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    yield checkpoint, torch.tensor(tokenizer(content, verbose=False).input_ids)


@dataclass
class Quality:
    """Sums over the predictions of one row."""

    predictions: int = 0
    nll: float = 0.0  # nats
    divergence: float = 0.0  # nats
    same: int = 0
    error: float = 0.0

    def add(self, expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds one window: logits (T, V) of the reference and of the row, and the next tokens (T,)."""
        reference, row = (F.log_softmax(values.double(), dim=-1) for values in (expected, logits))
        self.predictions += len(targets)
        self.nll += F.nll_loss(row, targets, reduction="sum").item()
        self.divergence += F.kl_div(row, reference, log_target=True, reduction="sum").item()
        self.same += int((reference.argmax(-1) == row.argmax(-1)).sum())
        self.error = max(self.error, relative_error(expected, logits))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.predictions)

    def figures(self, reference: "Quality") -> dict[str, Any]:
        return {
            "perplexity": f"{self.perplexity:.4f}",
            "against fp32": f"{self.perplexity / reference.perplexity - 1:+.3%}",
            "KL, nats": self.divergence / self.predictions,
            "same likeliest token": f"{self.same / self.predictions:.2%}",
            "relative error": self.error,
        }


@torch.inference_mode()
def measure(report: Report, engines: dict[str, Any], windows: torch.Tensor, rounds: int) -> bool:
    """Adds the table; returns whether ours in float32 has the reference's logits.

    Args:
        windows: (N, T) ids.
    """
    qualities = {name: Quality() for name in engines}
    for window in track(windows, "Reading the text", transient=True):
        logits = {name: engine.logits(window[None])[0, :-1].float() for name, engine in engines.items()}
        for name, quality in qualities.items():
            quality.add(logits[REFERENCE], logits[name], window[1:])
    length = windows.shape[1] // 2
    rows = {name: partial(engine.generate, windows[:1, :length], length) for name, engine in engines.items()}
    passed, group = True, f"{qualities[REFERENCE].predictions} predictions; {length}+{length} tokens generated"
    for name, row in harness.interleaved(rows, rounds).items():
        figures = qualities[name].figures(qualities[REFERENCE])
        passed &= qualities[name].error <= FP32_LOGITS or not harness.must_be_exact(name)
        report.add(group, name, [taken / length for taken in row.times], name == REFERENCE, **figures)
    return passed


def main(
    checkpoint: Checkpoint = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to predict.")] = None,
    tokens: Annotated[int, typer.Option(help="The most tokens to predict.")] = 8192,
    steps: Annotated[int, typer.Option(help="Training steps of the small model.")] = 300,
    rounds: Rounds = 5,
    only: Only = NARROWER,
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Perplexity and KL divergence of the bf16 and int8 rows."""
    harness.use_threads(threads)
    content = text.read_text(encoding="utf-8") if text else "\n\n".join(topics.values())
    if quick:
        content, tokens, steps, rounds = content[:50_000], 300, 2, 1
        only = f"{harness.QUICK}.*(?:{only})"
    model = checkpoint or f"small, trained for {steps} steps"
    settings = {"model": model, "text": text or "Python's language reference", "rounds": rounds}
    report = Report("quality", "Quality beside speed", settings)
    with (
        given(content, checkpoint) if checkpoint else trained(content, steps) as (directory, ids),
        built(directory, only, report) as engines,
    ):
        length = min(engines[REFERENCE].model.config.n_positions, 1024)
        if len(ids) < length:
            raise typer.BadParameter(f"--text has {len(ids)} tokens to predict; give one of at least {length}")
        windows = torch.stack([window for window in ids[: max(length, tokens)].split(length) if len(window) == length])
        passed = measure(report, engines, windows, rounds)
    report.write(output)
    sys.exit(0 if passed else 3)


if __name__ == "__main__":
    typer.run(main)
