"""Saving a model and converting files: python benchmarks/save.py

`save_pretrained` in both formats, and conversions with and without verification. Each measurement has a process of its
own, in which the model to save is loaded before the clock starts.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
import typer
from harness import Checkpoint, Only, Output, Quick, Report, Rounds, Size, Threads
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.weights.convert import gpt2_to_scratch, scratch_to_gpt2

SAVE = {
    "transformers GPT-2": (GPT2LMHeadModel, "save_pretrained"),
    "ours": (GPTScratchForCausalLM, "save_pretrained"),
    "ours, as GPT-2": (GPTScratchForCausalLM, "save_as_gpt2"),
}
CONVERT = {
    "transformers GPT-2, loaded and saved": None,
    "ours from GPT-2, unverified": partial(gpt2_to_scratch, check=False),
    "ours from GPT-2": gpt2_to_scratch,
    "ours to GPT-2, unverified": partial(scratch_to_gpt2, check=False),
    "ours to GPT-2": scratch_to_gpt2,
}


def save(row: str, threads: int, checkpoint: Path) -> harness.Cost:
    harness.use_threads(threads)
    model_class: Any
    model_class, method = SAVE[row]
    model = model_class.from_pretrained(checkpoint)
    # Mapped weights would be read only when they are saved, and their memory counted there.
    sum(parameter.sum().item() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as target, harness.Cost() as cost:
        getattr(model, method)(target)
    return cost


def convert(row: str, threads: int, official: Path, ours: Path) -> harness.Cost:
    harness.use_threads(threads)
    conversion = CONVERT[row]
    with tempfile.TemporaryDirectory() as directory, harness.Cost() as cost:
        target = Path(directory) / "converted"
        if conversion is None:
            GPT2LMHeadModel.from_pretrained(official).save_pretrained(target)
        else:
            conversion(ours if " to " in row else official, target)
    return cost


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    rounds: Rounds = 3,
    only: Only = "",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Seconds and peak memory of saving and converting."""
    if quick:
        size, rounds = "tiny", 0
    report = Report("save", "Saving and converting", {"model": checkpoint or size, "rounds": rounds}, unit="s")
    with harness.official_checkpoint(size, checkpoint) as official, tempfile.TemporaryDirectory() as directory:
        ours = Path(directory)
        GPTScratchForCausalLM.from_pretrained(official).save_pretrained(ours)
        saved = harness.costs_in_children(save, harness.selected(SAVE, only), rounds, threads, official)
        converted = harness.costs_in_children(convert, harness.selected(CONVERT, only), rounds, threads, official, ours)
    report.add_costs("a model to files", saved)
    report.add_costs("files to files", converted)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
