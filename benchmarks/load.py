"""Loading a checkpoint: python benchmarks/load.py

`from_pretrained` and one forward pass of one token, since mapped weights are read only then. Each measurement has a
process of its own, in which everything is imported before the clock starts; after the first round the files are in the
system's cache.
"""

import tempfile
from pathlib import Path

import harness
import torch
import typer
from harness import Checkpoint, Only, Output, Quick, Report, Rounds, Size, Threads
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchForCausalLM

BFLOAT16 = dict(dtype=torch.bfloat16)
ROWS: dict[str, tuple] = {
    "transformers GPT-2": (GPT2LMHeadModel, "official", {}),
    "ours": (GPTScratchForCausalLM, "official", {}),
    "ours, from our own files": (GPTScratchForCausalLM, "ours", {}),
    "transformers GPT-2, bf16": (GPT2LMHeadModel, "official", BFLOAT16),
    "ours, bf16": (GPTScratchForCausalLM, "official", BFLOAT16),
}


@torch.inference_mode()
def load(row: str, threads: int, directories: dict[str, Path]) -> harness.Cost:
    harness.use_threads(threads)
    model_class, directory, options = ROWS[row]
    with harness.Cost() as cost:
        model = model_class.from_pretrained(directories[directory], **options)
        model(torch.tensor([[0]]))
    return cost


def main(
    size: Size = "124M",
    checkpoint: Checkpoint = None,
    rounds: Rounds = 5,
    only: Only = "",
    threads: Threads = 0,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Seconds and peak memory of loading an official checkpoint."""
    if quick:
        size, rounds = "tiny", 0
    report = Report("load", "Loading a checkpoint", {"model": checkpoint or size, "rounds": rounds}, unit="s")
    with harness.official_checkpoint(size, checkpoint) as official, tempfile.TemporaryDirectory() as ours:
        GPTScratchForCausalLM.from_pretrained(official).save_pretrained(ours)
        directories = {"official": official, "ours": Path(ours)}
        costs = harness.costs_in_children(load, harness.selected(ROWS, only), rounds, threads, directories)
    report.add_costs("from_pretrained", costs)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
