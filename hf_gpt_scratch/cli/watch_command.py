"""`watch`: a training script, run for a few steps and judged."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import LabError
from .compare_command import check_outputs, write_reports
from .status import FAILED

if TYPE_CHECKING:
    from ..lab.watch.findings import Finding, WatchReport

# What comes after the script is the script's, options too.
SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def watch(
    script: Annotated[str, typer.Argument(help="The training script, a .py file. It is executed.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to watch.")] = 3,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, run as python -m runs it.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which the script is stopped.")] = 120,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures; - is standard output.")] = None,
) -> None:
    """Runs a training script, unchanged, for a few steps, and names the mistakes in its training.

    Exit status: 0 no mistake, 3 a mistake, 1 the script failed or did not train, 2 usage error.
    """
    from ..lab.watch.session import watch_script

    to_output = str(json_) == "-"
    console, errors = Console(stderr=to_output), Console(stderr=True)
    try:
        check_outputs(html, json_)
        # What the script prints must not get into the JSON.
        with redirect_stdout(sys.stderr if to_output else sys.stdout):
            report = watch_script(script, arguments or [], steps=steps, timeout=timeout, module=module)
    except LabError as error:
        errors.print(f"[bold red]Not watched:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    print_watch(report, console)
    told, written = write_reports(html, lambda: report.to_html(script), json_, report.to_dict, errors)
    for line in told:
        console.print(line, soft_wrap=True)
    sys.exit(report.exit_status or (0 if written else FAILED))


def print_watch(report: "WatchReport", console: Console) -> None:
    """The verdict, the findings and the steps, on the terminal."""

    def show(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    colour = "red" if report.faults or report.error else "green" if report.steps else "yellow"
    show(f"[bold {colour}]{escape(report.verdict)}[/]")
    if report.error and report.faults:
        show(f"The script failed: {escape(report.error)}")
    for number, fault in enumerate(report.faults, start=1):
        show(f"{number}. [bold]{escape(fault.name)}[/]: {escape(fault.says)}")
        details(fault, show)
    if report.notes:
        show("Notes, which may be choices:")
    for note in report.notes:
        place = f" ({escape(note.where)})" if note.where else ""
        show(f"- [bold]{escape(note.name)}[/]: {escape(note.says)}{place}")
    for step in report.steps:
        parts = [f"step {step.number}"]
        if step.loss is not None:
            parts.append(f"loss {step.loss:.4f} over {step.tokens:,} tokens")
        if step.gradient_norm is not None:
            parts.append(f"|gradient| {step.gradient_norm:.3g}")
        if step.update_norm is not None:
            parts.append(f"|update| {step.update_norm:.3g}")
        if step.learning_rates:
            parts.append("lr " + ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(step.learning_rates)))
        show(escape(", ".join(parts)))
    for line in report.seen:
        show(f"[dim]{escape(line)}[/]")
    show(f"[dim]Watched: {escape(report.model or 'no model')}, {report.parameters:,} parameters; {report.ended}[/]")


def details(fault: "Finding", show) -> None:
    if fault.where:
        show(f"   where: {escape(fault.where)}")
    if fault.remedy:
        show(f"   fix: {escape(fault.remedy)}")
    if fault.proof:
        show(f"   proof: {escape(fault.proof)}")
