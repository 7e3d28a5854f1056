"""From an official GPT-2 checkpoint to text, through layers written from scratch: python examples/quickstart.py

Uses openai-community/gpt2 if the hub can be reached, otherwise the same architecture with seeded random weights.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print
from rich.panel import Panel
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, set_seed
from transformers import logging as transformers_logging

from hf_gpt_scratch import ConversionError, GPTScratchConfig, GPTScratchForCausalLM, convert, gpt2_tokenizer
from hf_gpt_scratch.cli.terminal import convert_and_report
from hf_gpt_scratch.weights.hub import find_source

HUB_ID = "openai-community/gpt2"


def official_checkpoint(preset: str, offline: bool, directory: Path) -> str | Path:
    """The hub's GPT-2, or a directory with the same architecture, written by the official class."""
    if preset == "124M" and not offline:
        try:
            find_source(HUB_ID)
            return HUB_ID
        except ConversionError as error:
            print(f"[dim]{error}[/]")
    print(
        f"Building an official GPT2LMHeadModel of the {preset} size with seeded random weights (it will write nonsense)"
    )
    set_seed(0)
    GPT2LMHeadModel(GPTScratchConfig.preset(preset).to_gpt2()).save_pretrained(directory)
    try:
        gpt2_tokenizer().save_pretrained(directory)
    except OSError as error:
        print(f"[dim]{error}[/]")
    return directory


@torch.no_grad()
def main(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "Every effort moves you",
    preset: Annotated[str, typer.Option(help="124M, 355M, 774M or 1558M.")] = "124M",
    new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.")] = 24,
    offline: Annotated[bool, typer.Option(help="Do not try the hub.")] = False,
    output: Annotated[Path, typer.Option(help="Where to save the checkpoints.")] = Path("outputs/quickstart"),
) -> None:
    """Builds or fetches GPT-2, converts it, verifies it and generates with both models."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shutil.rmtree(output / "official", ignore_errors=True)
    source = official_checkpoint(preset, offline, output / "official")
    receipt = convert_and_report(convert, source, output / "scratch", overwrite=True)

    official = GPT2LMHeadModel.from_pretrained(source)
    ours = AutoModelForCausalLM.from_pretrained(output / "scratch")
    assert isinstance(ours, GPTScratchForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(output / "scratch") if receipt["tokenizer"] else None
    ids = tokenizer(prompt, return_tensors="pt").input_ids if tokenizer else torch.tensor([[6109, 3626, 6100, 345]])

    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=50256)
    agree = {}
    for how, do_sample in (("greedy", False), ("sampled", True)):
        generated = []
        for model in (official, ours):
            set_seed(123)
            generated.append(model.generate(ids, do_sample=do_sample, **options)[0])
            text = str(tokenizer.decode(generated[-1])) if tokenizer else f"token ids {generated[-1].tolist()}"
            print(Panel(Text(text), title=f"{type(model).__name__}, {how}"))
        agree[how] = torch.equal(*generated)
    print("Generated ids agree:", agree)
    sys.exit(0 if all(agree.values()) else 3)


if __name__ == "__main__":
    typer.run(main)
