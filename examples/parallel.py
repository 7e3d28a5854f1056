"""One model on two processes: tensor parallelism, fully sharded training, or plain data parallelism.

    torchrun --standalone --nproc-per-node 2 examples/parallel.py --how tensor
    torchrun --standalone --nproc-per-node 2 examples/parallel.py --how sharded
    torchrun --standalone --nproc-per-node 2 examples/parallel.py --how data
    accelerate launch --multi_gpu --num_processes 2 examples/parallel.py --how data     # the same, on two GPUs

The processes communicate with gloo on CPUs and with NCCL on GPUs. An official checkpoint is loaded in shards.
"""

import gc
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from accelerate import Accelerator
from rich import print
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, set_seed
from transformers import logging as transformers_logging

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM


def small_official_checkpoint(directory: Path) -> Path:
    """A checkpoint that the first process writes and all processes read."""
    if dist.get_rank() == 0:
        config = GPTScratchConfig.preset("124M", vocab_size=1000, emb_dim=96, n_heads=4, n_layers=3, context_length=64)
        config.bos_token_id = config.eos_token_id = None
        set_seed(0)
        GPT2LMHeadModel(config.to_gpt2()).save_pretrained(directory)
    dist.barrier()
    return directory


def train(model, batches, optimizer, backward) -> list[float]:
    """The loss of each step, averaged over the processes."""
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def train_accelerated(model, rows, batch_size: int, optimizer, cpu: bool) -> list[float]:
    """`train` with plain data parallelism; the wrapper that averages the gradients is freed at the end."""
    accelerator = Accelerator(cpu=cpu)
    loader: Any = DataLoader(list(rows), batch_size=batch_size)  # type: ignore[arg-type]  # a list works, too; accelerate gives each process its batches
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return train(model, loader, optimizer, accelerator.backward)


def main(
    how: Annotated[Literal["tensor", "sharded", "data"], typer.Option(help="Which kind of parallelism.")] = "tensor",
    model: Annotated[
        str | None, typer.Option(help="Hub id or directory, official or ours; default: a small one.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to save the small checkpoint.")] = Path("outputs/parallel"),
) -> None:
    """Loads a checkpoint into two processes and compares their results with those of one process."""
    if "RANK" not in os.environ:
        raise SystemExit("start this example with torchrun or accelerate launch; its first lines show how")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    source = model or small_official_checkpoint(output / "official")
    alone = GPTScratchForCausalLM.from_pretrained(source).to(device=device)  # type: ignore[call-arg]  # hidden by a decorator
    ids = torch.randint(alone.config.vocab_size, (12, 16), generator=torch.Generator().manual_seed(1)).to(device)

    if how == "data":
        parallel = GPTScratchForCausalLM.from_pretrained(source)
    else:  # transformers 5.22 or newer
        from transformers.distributed import DistributedConfig

        size: dict[str, Any] = {"tp_size": processes} if how == "tensor" else {"fsdp_size": processes}
        parallel = GPTScratchForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(**size))
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parallel.parameters())
    print(f"process {rank} holds {held:,} of {alone.num_parameters():,} parameters")

    if how == "tensor":
        settings = dict(attention_mask=torch.ones_like(ids[:1]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        results = [m.eval().generate(ids[:1], **settings) for m in (alone, parallel)]
        equal = torch.equal(*results)
    else:
        # One process with the whole batch must get the same losses as several with parts of it.
        whole, share = 6, 6 // processes
        steps = ids.split(whole)
        optimizer = torch.optim.SGD(alone.eval().parameters(), lr=0.1)  # eval: no dropout, to compare
        expected = train(alone, steps, optimizer, torch.Tensor.backward)
        optimizer = torch.optim.SGD(parallel.eval().parameters(), lr=0.1)
        if how == "sharded":
            mine = [batch[rank * share : (rank + 1) * share] for batch in steps]
            losses = train(parallel, mine, optimizer, torch.Tensor.backward)
        else:
            losses = train_accelerated(parallel, ids.cpu(), share, optimizer, cpu=device.type == "cpu")
        results = [expected, losses]
        equal = torch.allclose(torch.tensor(expected), torch.tensor(losses), rtol=1e-4)
    if rank == 0:
        for name, result in zip(("one process", f"{processes} processes"), results, strict=True):
            print(f"{name}: {result[0].tolist() if how == 'tensor' else result}")
        print("equal:", equal)
    # If anything still refers to the group at Python's exit, it can wait forever for gloo's threads, which wait for it:
    # github.com/pytorch/pytorch/issues/56297.
    gc.collect()
    dist.destroy_process_group()
    raise typer.Exit(0 if equal else 3)


if __name__ == "__main__":
    typer.run(main)
