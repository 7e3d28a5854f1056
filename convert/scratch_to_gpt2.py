"""Converts a GPTScratch checkpoint into an official GPT-2 one: python convert/scratch_to_gpt2.py SOURCE TARGET"""

import typer

from hf_gpt_scratch.cli.app import export

if __name__ == "__main__":
    typer.run(export)
