"""Two models compared from the command line: python -m hf_gpt_scratch.cli.compare_command REFERENCE CANDIDATE"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.markup import escape

from ..errors import ConversionError, LabError
from ..lab import session
from .report import check_drawing, html_report, print_report
from .terminal import DIFFERENT, FAILED


def compare(
    reference: Annotated[
        str, typer.Argument(help="Directory, hub id, or my_gpt.py:MyGPTModel: the model that is right.")
    ],
    candidate: Annotated[str, typer.Argument(help="The same for the model in question. A .py file is run.")],
    tokens: Annotated[str | None, typer.Option(help="Token ids to compare on, such as 6109,3626,6100,345.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; gives perplexities too.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the class: model.pth or .safetensors.")] = None,
    cfg: Annotated[
        str | None, typer.Option(help="Config of the class: JSON, a JSON file, or a dict in its file.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--map", help="JSON: parameter names of the class to the book's or GPT-2's.")
    ] = None,
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures; - is the standard output.")] = None,
) -> None:
    """Compares two models layer by layer, and names the mistake if they differ.

    Exit status: 0 the same model, 3 different, 1 not compared, 2 wrong command line.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, errors = Console(stderr=str(json_) == "-"), Console(stderr=True)
    try:
        check_outputs(html, json_)
        with console.status("Loading") as status:
            comparison = session.compare(
                reference,
                candidate,
                tokens=tokens,
                text=text,
                weights=weights,
                cfg=cfg,
                mapping=mapping,
                gradients=gradients,
                step=status.update,
            )
    except (LabError, ConversionError, OSError) as error:
        errors.print(f"[bold red]Not compared:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    print_report(comparison, console)
    for file, make in ((html, html_report), (json_, as_json)):
        if file is None:
            continue
        if str(file) == "-":
            print(make(comparison))
            continue
        try:
            file.write_text(make(comparison), encoding="utf-8")
            console.print(f"Written: {escape(str(file))}", soft_wrap=True)
        except OSError as error:
            errors.print(f"[bold red]Not written:[/] {escape(str(error))}", soft_wrap=True)
    sys.exit(0 if comparison.same else DIFFERENT)


def check_outputs(html: Path | None, json_: Path | None) -> None:
    """Looks, before the work, whether the files that are asked for can be written.

    Raises:
        LabError: one of them cannot.
    """
    if html is not None:
        check_drawing()
        check_writable("--html", html)
    if json_ is not None and str(json_) != "-":
        check_writable("--json", json_)


def check_writable(option: str, file: Path) -> None:
    """Raises LabError unless the file can be written; "-" is no file."""
    place = file if file.exists() else file.parent
    if str(file) == "-" or file.is_dir() or not (file.parent.is_dir() and os.access(place, os.W_OK)):
        raise LabError(f"{option} {file} cannot be written; give a file in a directory that exists and is yours")


def as_json(comparison) -> str:
    return json.dumps(comparison.to_dict(), indent=2, allow_nan=False)


if __name__ == "__main__":
    typer.run(compare)
