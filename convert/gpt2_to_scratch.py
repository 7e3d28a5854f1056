"""Converts an official GPT-2 checkpoint into the book's layers: python convert/gpt2_to_scratch.py SOURCE TARGET"""

import typer

from hf_gpt_scratch.cli.app import convert

if __name__ == "__main__":
    typer.run(convert)
