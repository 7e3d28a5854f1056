# /// script
# dependencies = ["torch==2.13.0", "accelerate==1.15.0", "transformers==5.24.0"]
# ///
"""torch.distributed.checkpoint and accelerate's FSDP: two processes save, one and two load.

accelerate trains under the config that `accelerate launch` reads, on the CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import CONTEXT, WITHOUT_DROPOUT, checkpoints, row, same_weights

# What `accelerate config` writes.
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: {how}
  fsdp_cpu_ram_efficient_loading: false
"""


def train(directory: str, output: str) -> None:
    """In each of the processes."""
    import torch
    import torch.distributed.checkpoint as dcp
    from accelerate import Accelerator
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from transformers import AutoModelForCausalLM

    import hf_gpt_scratch  # noqa: F401  # for the Auto classes

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(directory))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    batches = torch.randint(900, (4, 2, 2, CONTEXT // 4), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch in batches[:, accelerator.process_index]:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{output}/dcp")
    accelerator.save_state(f"{output}/state")
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{output}/saved", is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    if accelerator.is_main_process:
        Path(output, "losses.json").write_text(json.dumps(losses))
    accelerator.end_training()


def trained(directory: Path, output: Path, how: str):
    """The losses, and the model from what each way has saved."""
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    import hf_gpt_scratch  # noqa: F401

    output.mkdir()
    config = output / "accelerate.yaml"
    config.write_text(CONFIG.format(how=how))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(config), __file__, str(directory), str(output)]
    subprocess.run(
        [sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr
    )
    saved, loaded = (AutoModelForCausalLM.from_pretrained(one) for one in (output / "saved", directory))
    state = loaded.state_dict()
    dcp.load(state, checkpoint_id=output / "dcp")
    loaded.load_state_dict(state)
    return json.loads((output / "losses.json").read_text()), saved, loaded


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder), **WITHOUT_DROPOUT)
        for how in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            expected, gpt2, official_loaded = trained(official, Path(folder) / f"gpt2-{how}", how)
            losses, saved, loaded = trained(ours, Path(folder) / f"ours-{how}", how)
            same = all(abs(one - other) <= 1e-4 * other for one, other in zip(losses, expected, strict=True))
            row(f"accelerate's FSDP, {how}: losses", same and losses[-1] < losses[0])
            row(f"accelerate's FSDP, {how}: the weights that are saved", same_weights(gpt2, saved))
            row(f"torch.distributed.checkpoint, {how}: loaded in one process", same_weights(official_loaded, loaded))


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) > 1 else main()
