"""Converts an official GPT-2 checkpoint into the book's layers: python convert/gpt2_to_scratch.py SOURCE TARGET"""

from typing import Annotated

import typer

from hf_gpt_scratch.conversion import gpt2_to_scratch
from hf_gpt_scratch.terminal import convert_and_report


def main(
    source: Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.")],
    target: Annotated[str, typer.Argument(help="Directory to write; it appears only when complete and verified.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with GPT2LMHeadModel before publishing.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Converts an official GPT-2 checkpoint into the book's layers, weights unchanged."""
    convert_and_report(gpt2_to_scratch, source, target, revision=revision, check=verify, overwrite=overwrite)


if __name__ == "__main__":
    typer.run(main)
