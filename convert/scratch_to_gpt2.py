"""Converts a GPTScratch checkpoint into an official GPT-2 one: python convert/scratch_to_gpt2.py SOURCE TARGET"""

from typing import Annotated

import typer

from hf_gpt_scratch.conversion import scratch_to_gpt2
from hf_gpt_scratch.terminal import convert_and_report


def main(
    source: Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.")],
    target: Annotated[str, typer.Argument(help="Directory to write; it appears only when complete and verified.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with GPT2LMHeadModel before publishing.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Converts a GPTScratch checkpoint into an official GPT-2 one, weights unchanged."""
    convert_and_report(scratch_to_gpt2, source, target, revision=revision, check=verify, overwrite=overwrite)


if __name__ == "__main__":
    typer.run(main)
