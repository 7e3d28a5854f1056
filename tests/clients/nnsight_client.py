# /// script
# dependencies = ["torch==2.13.0", "nnsight==0.8.1", "transformers==5.24.0"]
# ///
"""nnsight: hidden states that are read and changed, in forward passes and while ids are generated."""

import tempfile
from pathlib import Path

import torch
from checkpoints import PROMPTS, checkpoints, row
from nnsight import TransformersModel

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

IDS = torch.tensor([PROMPTS[1]])


def traced(directory: Path, blocks: str, attention: str) -> list[torch.Tensor]:
    """A block's output, the logits, those without its third token's attention, and ids under a change of the logits."""
    model = TransformersModel(str(directory), task="text-generation", device_map="cpu", dispatch=True)
    block = model.get(f"{blocks}.1")
    with model.trace(IDS):
        hidden = block.output.save()
        logits = model.output.logits.save()
    with model.trace(IDS):
        getattr(block, attention).output[0][:, 2] = 0
        changed = model.output.logits.save()
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    with model.generate(IDS, **options):
        block.output *= 0.5
        ids = model.generator.output.save()
    return [hidden, logits, changed, ids]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder))
        expected = traced(official, "transformer.h", "attn")
        found = traced(ours, "model.trf_blocks", "att")
        same = [torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected, strict=True)]
        row("hidden states and logits", same[0] and same[1])
        row("logits without the attention of one token", same[2] and not torch.allclose(expected[1], expected[2]))
        row("ids that are generated under a change", same[3])


if __name__ == "__main__":
    main()
