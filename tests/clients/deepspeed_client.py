# /// script
# dependencies = ["torch==2.13.0", "deepspeed==0.19.8", "accelerate==1.15.0", "transformers==5.24.0"]
# ///
"""DeepSpeed: Trainer with ZeRO-2 and 3 in two processes, and what it saves."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import CONTEXT, WITHOUT_DROPOUT, checkpoints, row, same_curve, same_weights

PROCESSES = 2


def train(directory: str, output: str, stage: str) -> None:
    """In each of the processes."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import hf_gpt_scratch  # noqa: F401  # for the Auto classes

    config = {
        "zero_optimization": {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = TrainingArguments(
        output,
        deepspeed=config,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.loss_type = "ForCausalLM"  # the official class has none, by its name, and its logged loss is not the mean
    batches = torch.randint(900, (16, CONTEXT // 4), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids} for ids in batches]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(f"{output}/saved")
    if trainer.is_world_process_zero():
        curve = [{k: log[k] for k in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]
        Path(output, "curve.json").write_text(json.dumps(curve))


def trained(directory: Path, output: Path, stage: int):
    from transformers import AutoModelForCausalLM

    import hf_gpt_scratch  # noqa: F401

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    arguments = [str(directory), str(output), str(stage)]
    subprocess.run([sys.executable, *command, *arguments], check=True, env=environment, stdout=sys.stderr)
    curve = json.loads((output / "curve.json").read_text())
    return curve, AutoModelForCausalLM.from_pretrained(output / "saved")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder), **WITHOUT_DROPOUT)
        for stage in (2, 3):
            expected, gpt2 = trained(official, Path(folder) / f"gpt2-{stage}", stage)
            curve, model = trained(ours, Path(folder) / f"ours-{stage}", stage)
            same = same_curve(curve, expected) and same_weights(gpt2, model)
            row(f"ZeRO-{stage} in two processes: losses, and the weights that are saved", same)


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) > 1 else main()
