"""`verify-receipt`: whether a converted directory is unchanged since its conversion."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import ConversionError, shortened
from .status import FAILED


def verify_receipt_command(
    directory: Annotated[Path, typer.Argument(help="Directory written by a conversion.")],
) -> None:
    """Checks every file of a converted directory against the sha256 in its receipt."""
    from ..weights.publish import verify_receipt

    try:
        receipt = verify_receipt(directory)
    except ConversionError as error:
        Console(stderr=True).print(f"[bold red]Changed:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(FAILED) from error
    what = "".join(letter if letter.isprintable() else "?" for letter in shortened(receipt["what"]))
    Console().print(
        f"[bold green]Unchanged:[/] {escape(str(directory))}, files: {len(receipt['target']['files'])}, "
        f"{escape(what)} on {escape(receipt['created'])}",
        soft_wrap=True,
    )
