"""Pushes a model, its code, tokenizer and card to the hub: python examples/push_to_hub.py model --repo-id me/my-gpt2

`model` is a directory that save_pretrained or a conversion wrote, or an official checkpoint. Without it, the script
makes a small model. Without --repo-id nothing is pushed, and the repository is only shown.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import HfApi
from rich import print
from rich.filesize import decimal
from rich.text import Text

from hf_gpt_scratch import (
    ConversionError,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchPreTrainedModel,
    model_card,
)
from hf_gpt_scratch.weights.architecture import architecture
from hf_gpt_scratch.weights.checkpoint import read_json
from hf_gpt_scratch.weights.formats.directory import CARD
from hf_gpt_scratch.weights.hub import find_source
from hf_gpt_scratch.weights.publish import RECEIPT
from hf_gpt_scratch.weights.tokenizer_files import tokenizer_beside


def load(directory: Path) -> GPTScratchPreTrainedModel:
    """The model in a directory, with the head that its config names."""
    try:
        values = read_json(find_source(directory) / "config.json")
        loaded: Any = architecture(values, directory).from_pretrained(directory, output_loading_info=True)
        model, info = loaded
    except (ConversionError, OSError, ValueError) as error:
        raise SystemExit(f"cannot load {directory}: {error}") from error
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise SystemExit(f"config.json and the weights of {directory} do not match: {', '.join(wrong[:5])}")
    return model


def main(
    model: Annotated[Path | None, typer.Argument(help="Directory of a saved model.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Push to this repository; needs `hf auth login`.")] = None,
    source: Annotated[str | None, typer.Option(help="Hub id of the model that the weights come from.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, by the hub's names.")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    output: Annotated[Path, typer.Option(help="Where to assemble the repository.")] = Path("outputs/push"),
) -> None:
    """Assembles a repository, shows it, and pushes it to --repo-id."""
    repository = output / "repository"
    receipt = None
    if model is None:
        torch.manual_seed(123)
        ours: GPTScratchPreTrainedModel = GPTScratchForCausalLM(
            GPTScratchConfig(emb_dim=64, n_heads=4, n_layers=2, context_length=64)
        )
    else:
        ours = load(model)
        if (model / RECEIPT).is_file():
            receipt = json.loads((model / RECEIPT).read_text())
    if model is not None and model.resolve().is_relative_to(repository.resolve()):
        raise SystemExit(f"{model} is inside the directory where the repository is assembled; choose another --output")
    try:
        card = model_card(ours, receipt, source, license)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    shutil.rmtree(repository, ignore_errors=True)
    ours.save_pretrained(repository)
    if model is not None and (tokenizer := tokenizer_beside(model)) is not None:
        tokenizer.save_pretrained(repository)
    card.save(repository / CARD)

    print(f"{repository}:")
    for path in sorted(repository.iterdir()):
        print(f"  {path.name:32} {decimal(path.stat().st_size):>10}")
    print(f"\n{CARD}:\n")
    print(Text(str(card)), flush=True)
    if repo_id is None:
        print("Nothing was pushed; give --repo-id to push.")
        return
    hub = HfApi()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    commit = hub.upload_folder(repo_id=repo_id, folder_path=repository, commit_message="Upload model")
    print("Pushed:", commit.commit_url)


if __name__ == "__main__":
    typer.run(main)
