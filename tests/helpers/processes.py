"""Runs a function in two processes that form a gloo group, each with one thread, and collects what they return."""

import gc
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def enter(rank, port, directory, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    try:
        torch.save(function(rank, *arguments), Path(directory) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        # A gradient reducer that outlives the group can wait for ever for gloo's threads, which wait for Python:
        # github.com/pytorch/pytorch/issues/56297.
        gc.collect()
        dist.destroy_process_group()


def in_two_processes(directory, function, *arguments) -> list:
    """What `function(rank, *arguments)` returns in each; `directory` takes the files in between."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    mp.spawn(enter, (port, str(directory), function, arguments), nprocs=WORLD_SIZE)
    return [torch.load(Path(directory) / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]
