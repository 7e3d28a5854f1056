"""`compare`, also as python -m hf_gpt_scratch.cli.compare_command REFERENCE CANDIDATE"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import ConversionError, LabError
from .decoding_report import decode_meanings, decoding_report, print_decoding
from .status import DIFFERENT, FAILED


def compare(
    reference: Annotated[str, typer.Argument(help="The correct model: a directory, hub id, or my_gpt.py:MyGPTModel.")],
    candidate: Annotated[
        str,
        typer.Argument(help="The model to check, in the same form, or notebook.ipynb:MyGPT. A .py file is executed."),
    ],
    tokens: Annotated[str | None, typer.Option(help="Token ids to compare on, such as 6109,3626,6100,345.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; also gives perplexities.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights for your code: model.pth or .safetensors; reference for the reference's."),
    ] = None,
    cfg: Annotated[
        str | None, typer.Option(help="The class's config: JSON, a JSON file, or a config in its file.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--map", help="JSON file: the class's parameter names to the book's or GPT-2's.")
    ] = None,
    forward: Annotated[
        str | None, typer.Option(help="A function in the file, of the model and token ids, that returns logits.")
    ] = None,
    gradients: Annotated[
        bool | None,
        typer.Option(help="Compare gradients. Default: if the logits are equal, up to 400M parameters."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer experiments, and no gradients.")] = False,
    decode: Annotated[
        bool, typer.Option(help="Also check how the candidate generates, against its own forward.")
    ] = False,
    generate: Annotated[str | None, typer.Option(help="With --decode: the only function to check, my.py:fn.")] = None,
    decode_arguments: Annotated[
        str | None, typer.Option(help="With --decode, JSON: what a parameter of the function means.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with plots.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures; - is standard output.")] = None,
) -> None:
    """Compares two models stage by stage and, if they differ, names the mistake.

    Exit status: 0 the same model, 3 different, 1 not compared, 2 usage error.
    """
    import transformers

    from ..lab import session
    from .report import print_report

    meanings = decode_meanings(decode, generate, decode_arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, errors = Console(stderr=str(json_) == "-"), Console(stderr=True)
    try:
        check_outputs(html, json_)
        with errors.status("Loading") as status:  # shown on a terminal alone
            comparison = session.compare(
                reference,
                candidate,
                tokens=tokens,
                text=text,
                weights=weights,
                cfg=cfg,
                mapping=mapping,
                my_forward=forward,
                gradients=gradients,
                quick=quick,
                step=status.update,
            )
            decoding = decoding_report(reference, candidate, cfg, generate, meanings, status.update) if decode else None
    except (LabError, ConversionError, OSError) as error:
        errors.print(f"[bold red]Not compared:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    figures = comparison.to_dict() | ({} if decoding is None else {"decoding": decoding.to_dict()})
    told, written = write_reports(html, lambda: comparison.to_html(decoding), json_, lambda: figures, errors)
    print_report(comparison, console)
    if decoding is not None:
        print_decoding(decoding, console)
    for line in told:
        console.print(line, soft_wrap=True)
    same = comparison.same and (decoding is None or decoding.right)
    sys.exit(DIFFERENT if not same else 0 if written else FAILED)


def check_outputs(html: Path | None, json_: Path | None) -> None:
    """Checks, before any work, that the requested files can be written.

    Raises:
        LabError: one of them cannot be.
    """
    if html is not None:
        check_writable("--html", html)
    if json_ is not None and str(json_) != "-":
        check_writable("--json", json_)


def check_writable(option: str, file: Path) -> None:
    """Raises LabError unless the file can be written; "-" is not a file."""
    place = file if file.exists() else file.parent
    if str(file) == "-" or file.is_dir() or not (file.parent.is_dir() and os.access(place, os.W_OK)):
        raise LabError(f"{option} {file} cannot be written; give a file in an existing directory that you can write to")


def write_reports(
    html: Path | None, make_page: Callable[[], str], json_: Path | None, figures: Callable[[], Any], errors: Console
) -> tuple[list[str], bool]:
    """Writes what was asked for; returns the lines that say so, and whether nothing failed.

    What cannot be made or written is told, and takes neither the other file nor the verdict along.
    """
    told, written = [], True
    for file, make in ((html, make_page), (json_, lambda: as_json(figures()))):
        if file is None:
            continue
        try:
            if str(file) == "-":
                print(make())
                continue
            file.write_text(make(), encoding="utf-8")
            told.append(f"Written: {escape(str(file))}")
        except Exception as error:  # whatever making the page raises
            errors.print(f"[bold red]Not written:[/] {escape(f'{file}: {error}')}", soft_wrap=True)
            written = False
    return told, written


def as_json(figures) -> str:
    return json.dumps(figures, indent=2, allow_nan=False)


if __name__ == "__main__":
    typer.run(compare)
