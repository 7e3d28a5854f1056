"""A model trained with the book in Hugging Face Transformers: python examples/bring_your_own.py model.pth --n-heads 12

`model.pth` is what the book saves: torch.save(model.state_dict(), "model.pth"). Without it, a small one is made.
"""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from rich import print
from transformers import AutoModelForCausalLM, set_seed

from hf_gpt_scratch import GPT_CONFIG_124M, GPTModel, GPTScratchForCausalLM, generate_text_simple

SMALL = {**GPT_CONFIG_124M, "vocab_size": 1000, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2}


def main(
    weights: Annotated[Path | None, typer.Argument(help="The saved state dict.")] = None,
    cfg: Annotated[str | None, typer.Option(help="The model's config as JSON; default GPT_CONFIG_124M.")] = None,
    n_heads: Annotated[int | None, typer.Option(help="Attention heads; the sizes are then the tensors'.")] = None,
    output: Annotated[Path, typer.Option(help="Where to save the Transformers model.")] = Path("outputs/mine"),
) -> None:
    """Turns a GPTModel into a Transformers model, saves it, loads it and generates."""
    try:
        if weights is None:
            settings: dict[str, Any] | None = SMALL
            set_seed(123)
            state_dict = GPTModel(SMALL).state_dict()
        else:
            sizes_inferred = n_heads is not None and cfg is None
            settings = None if sizes_inferred else {**GPT_CONFIG_124M, **json.loads(cfg or "{}")}
            state_dict = torch.load(weights, map_location="cpu", weights_only=True)
            state_dict = state_dict.get("model_state_dict", state_dict)  # the book's model_and_optimizer.pth
        GPTScratchForCausalLM.from_book(state_dict, settings, n_heads=n_heads).save_pretrained(output)
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, StrictDataclassError) as error:
        used = f"--cfg {cfg}" if cfg else "GPT_CONFIG_124M; give --n-heads, or your own with --cfg"
        raise SystemExit(f"{error}\nThe cfg is {used}" if n_heads is None else str(error)) from None
    model = AutoModelForCausalLM.from_pretrained(output)

    book = GPTModel(model.config).eval()
    book.load_state_dict(state_dict)
    idx = torch.arange(4).unsqueeze(0)
    slow = generate_text_simple(book, idx, max_new_tokens=12, context_size=model.config.context_length)
    mask = torch.ones_like(idx)  # nothing is padding: without a mask, token 0 would be taken for it
    fast = model.generate(
        idx, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    print("generate_text_simple:", slow[0].tolist())
    print("model.generate:      ", fast[0].tolist())
    print("equal:", torch.equal(slow, fast), "- saved to", output)
    raise typer.Exit(0 if torch.equal(slow, fast) else 3)


if __name__ == "__main__":
    typer.run(main)
