# /// script
# dependencies = ["torch==2.13.0", "lightning==2.6.6", "transformers==5.24.0"]
# ///
"""Lightning: a LightningModule around the model, trained, interrupted and resumed from its checkpoint."""

import tempfile
from pathlib import Path

import lightning
import torch
from checkpoints import CONTEXT, WITHOUT_DROPOUT, checkpoints, row, same_weights
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import hf_gpt_scratch  # noqa: F401  # for the Auto classes


class Module(lightning.LightningModule):
    def __init__(self, directory):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(directory)
        self.losses = []

    def training_step(self, batch):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trained(directory: Path, folder: str, stop: bool = False, **options):
    """The losses, and the model; with `stop` in two runs, of which the second resumes the first."""
    batches = torch.randint(900, (16, CONTEXT // 4), generator=torch.Generator().manual_seed(0))
    losses, checkpoint = [], None
    for steps in (4, 8) if stop else (8,):
        module = Module(directory)
        settings = dict(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False)
        settings |= dict(enable_checkpointing=False, max_epochs=-1, default_root_dir=folder)
        trainer = lightning.Trainer(**settings, **options)
        trainer.fit(module, DataLoader(batches, batch_size=4), ckpt_path=checkpoint)
        checkpoint = f"{folder}/stopped.ckpt"
        trainer.save_checkpoint(checkpoint)
        losses += module.losses
    module.model.save_pretrained(f"{folder}/saved")
    return losses, AutoModelForCausalLM.from_pretrained(f"{folder}/saved")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder), **WITHOUT_DROPOUT)
        for what, options in {
            "trained and saved": {},
            "interrupted and resumed": dict(stop=True),
            "accumulated, clipped gradients": dict(accumulate_grad_batches=2, gradient_clip_val=0.5),
        }.items():
            (expected, gpt2), (losses, model) = (trained(one, folder, **options) for one in (official, ours))
            same = torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-4)
            row(f"Trainer: {what}", same and losses[-1] < losses[0] and same_weights(gpt2, model))


if __name__ == "__main__":
    main()
