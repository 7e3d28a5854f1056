"""A model and its code, tokenizer and card on the hub: python examples/push_to_hub.py model --repo-id me/my-gpt2

`model` is a directory that save_pretrained or a conversion wrote, or an official checkpoint. Without it, a small model
is made here; without --repo-id nothing leaves this machine: the repository is shown as it would be.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from huggingface_hub import HfApi
from rich import print
from rich.filesize import decimal
from rich.text import Text

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.conversion import CARD, RECEIPT, tokenizer_beside
from hf_gpt_scratch.model_card import model_card


def main(
    model: Annotated[Path | None, typer.Argument(help="Directory of a saved model.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Push to this repository; needs `hf auth login`.")] = None,
    source: Annotated[str | None, typer.Option(help="Hub id of the model that the weights come from.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, by the hub's names.")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    output: Annotated[Path, typer.Option(help="The repository is put together in here.")] = Path("outputs/push"),
) -> None:
    """Puts a repository together, shows it, and pushes it if it is told where."""
    repository = output / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    receipt = None
    if model is None:
        torch.manual_seed(123)
        ours = GPTScratchForCausalLM(GPTScratchConfig(emb_dim=64, n_heads=4, n_layers=2, context_length=64))
    else:
        ours = GPTScratchForCausalLM.from_pretrained(model)
        if (model / RECEIPT).is_file():
            receipt = json.loads((model / RECEIPT).read_text())
    ours.save_pretrained(repository)
    if model is not None and (tokenizer := tokenizer_beside(model)) is not None:
        tokenizer.save_pretrained(repository)
    card = model_card(ours, receipt, source, license)
    card.save(repository / CARD)

    print(f"{repository}:")
    for path in sorted(repository.iterdir()):
        print(f"  {path.name:32} {decimal(path.stat().st_size):>10}")
    print(f"\n{CARD}:\n")
    print(Text(str(card)), flush=True)
    if repo_id is None:
        print("Nothing was pushed; --repo-id says where to.")
        return
    hub = HfApi()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    commit = hub.upload_folder(repo_id=repo_id, folder_path=repository, commit_message="Upload model")
    print("Pushed:", commit.commit_url)


if __name__ == "__main__":
    typer.run(main)
