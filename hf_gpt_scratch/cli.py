"""The command `hf-gpt-scratch`.

Exit status: 0 done, 1 not done, 2 wrong command line, 3 the models differ, 130 interrupted.
"""

import json
import sys
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape

from . import inspection
from .compare_command import compare
from .conversion import gpt2_to_scratch, scratch_to_gpt2
from .inspection_report import explanation, report
from .terminal import convert_and_report, verify_and_report

Source = Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.")]
Target = Annotated[str, typer.Argument(help="Directory to write; it appears only when complete and verified.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Verify = Annotated[bool, typer.Option(help="Compare with GPT2LMHeadModel before publishing.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing target.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]
MODEL = "124M, 355M, 774M or 1558M; book, for the book's GPT_CONFIG_124M; a directory or hub id; a config.json."


def convert(
    source: Source, target: Target, revision: Revision = None, verify: Verify = True, overwrite: Overwrite = False
) -> None:
    """Converts an official GPT-2 checkpoint into the book's layers, weights unchanged."""
    convert_and_report(gpt2_to_scratch, source, target, revision=revision, check=verify, overwrite=overwrite)


def export(
    source: Source, target: Target, revision: Revision = None, verify: Verify = True, overwrite: Overwrite = False
) -> None:
    """Converts a GPTScratch checkpoint into an official GPT-2 one, weights unchanged."""
    convert_and_report(scratch_to_gpt2, source, target, revision=revision, check=verify, overwrite=overwrite)


def verify(
    reference: Annotated[str, typer.Argument(help="Directory or hub id of the official checkpoint.")],
    candidate: Annotated[str, typer.Argument(help="Directory or hub id of ours.")],
    as_json: AsJson = False,
) -> None:
    """Compares an official checkpoint with one of ours in float32: weights, logits, greedy ids."""
    verify_and_report(reference, candidate, as_json)


def explain(
    name: Annotated[str, typer.Argument(help="A parameter, GPT-2's name or ours, whole or in part: W_key, c_attn.")],
    model: Annotated[str, typer.Option(help=f"Whose shapes to show: {MODEL}")] = "124M",
    as_json: AsJson = False,
) -> None:
    """Where a parameter comes from and goes to, what it does, and in which equation."""
    found = _or_fail(inspection.explain, name, model)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
    else:
        Console().print(*map(explanation, found), sep="\n")


def inspect(model: Annotated[str, typer.Argument(help=MODEL)], as_json: AsJson = False) -> None:
    """A model's tree with shapes, parameters and memory step by step, and what it does, in words."""
    found = _or_fail(inspection.inspect, model)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        console = Console()
        console.print(report(found, console.width))


# The parts of the command; a new one is imported above and named here.
COMMANDS = (convert, export, verify, compare, explain, inspect)

app = typer.Typer(no_args_is_help=True, help="GPT-2 in the layers of the book: converted, verified, explained.")
for command in COMMANDS:
    app.command()(command)


def _or_fail(function, *arguments) -> Any:
    try:
        return function(*arguments)
    except (ValueError, StrictDataclassError) as error:
        Console(stderr=True).print(f"[bold red]Failed:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
