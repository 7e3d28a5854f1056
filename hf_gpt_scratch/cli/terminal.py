"""Conversion and verification on the terminal: progress, figures, and exit statuses for scripts."""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..errors import ConversionError, ParityError
from ..weights.checkpoint import Progress
from ..weights.formats import FORMATS
from ..weights.verify import verify
from .status import DIFFERENT, FAILED, INTERRUPTED

TAKEN = "`generate` and `chat` take one with --tokenizer DIRECTORY"
NO_TOKENIZER = (
    "none, so the model takes and gives token ids alone: pipeline() and servers, which take text, do not work with it. "
    f"Convert again with --tokenizer and the one that the model was trained with; {TAKEN}, too"
)
NO_PLACE = f"none, since the format has no place for one; {TAKEN}"


class TerminalProgress(Progress):
    """One line per step, with a bar if the number of bytes is known."""

    def __init__(self, bars: Bars):
        self.bars = bars
        self.task: TaskID | None = None

    def step(self, what: str, total: int | None = None) -> None:
        self.finish()
        self.task = self.bars.add_task(what, total=total)

    def advance(self, done: int) -> None:
        if self.task is not None:
            self.bars.advance(self.task, done)

    def finish(self) -> None:
        if self.task is not None:
            total = self.bars.tasks[self.task].total or 1
            self.bars.update(self.task, total=total, completed=total)


def convert_and_report(
    convert: Callable[..., dict[str, Any]], source: Any, target: Any, **options: Any
) -> dict[str, Any]:
    """Converts, prints the outcome, and returns the receipt.

    Raises:
        SystemExit: 1 not converted, 3 the result differs, 130 interrupted.
    """
    console, errors = Console(), Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    bars = Bars(SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), console=console)
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with bars:
            progress = TerminalProgress(bars)
            receipt = convert(source, target, progress=progress, **options)
            progress.finish()
    except ConversionError as error:
        errors.print(f"[bold red]Not converted:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    except ParityError as error:
        errors.print(f"[bold red]Not published:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(DIFFERENT)
    except KeyboardInterrupt:
        errors.print(f"[bold red]Interrupted:[/] {escape(str(target))} is either complete or unchanged", soft_wrap=True)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, usual)
    console.print(f"[bold green]Converted:[/] {escape(str(source))} to {escape(str(target))}", soft_wrap=True)
    if (parity := receipt["parity"]) is None:
        console.print("Not verified, as requested.")
    elif "logits" not in parity:
        console.print(f"Verified without running the models: {parity['tensors']} tensors equal bit for bit.")
    else:
        logits = parity["logits"]
        against = parity.get("against", "the official model")
        console.print(
            f"Verified in float32 against {against}: max |logit error| {logits['max_abs_error']:.1e} of "
            f"max |logit| {logits['max_abs_logit']:.4g} (relative {logits['relative_error']:.1e}, bound "
            f"{parity['logit_bound']:.0e}), top-1 agreement {logits['top1_agreement']:.2%}, "
            f"{parity['greedy_tokens']} greedy ids equal, {parity['tensors']} tensors equal bit for bit.",
            soft_wrap=True,
        )
        if int8 := parity.get("int8"):
            console.print(
                f"In int8 the logits have a relative error of {int8['relative_error']:.1e}, and "
                f"{int8['top1_agreement']:.2%} of the tokens the same largest one.",
                soft_wrap=True,
            )
    for note in receipt.get("notes", []):
        console.print(f"Note: {escape(note)}", soft_wrap=True)
    has_place = FORMATS[options.get("format", "native")].tokenizer is not None
    none = NO_TOKENIZER if has_place else NO_PLACE
    console.print("Tokenizer: " + (receipt["tokenizer"] or none), soft_wrap=True)
    return receipt


def verify_and_report(reference: str, candidate: str, as_json: bool = False) -> None:
    """Measures the difference between two checkpoints, and prints the figures.

    Raises:
        SystemExit: 1 one of them cannot be read, or they are models of different kinds; 3 they differ.
    """
    try:
        found = verify(reference, candidate)
    except ConversionError as error:
        Console(stderr=True).print(f"[bold red]Not verified:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        verdict = "[bold green]The same model[/]" if found.passed else "[bold red]Different models[/]"
        Console().print(f"{verdict} {escape(str(found))}", soft_wrap=True)
    if not found.passed:
        sys.exit(DIFFERENT)
