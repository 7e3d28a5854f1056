"""Runs a function in two processes that form a gloo group, each with one thread, and collects what they return."""

import gc
import os
import pickle
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forks import run_python

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


def both(call):
    """The two processes of `in_two_processes`, each a fork of this one where there are forks."""
    arguments = pickle.loads(Path(call).read_bytes())
    mp.start_processes(enter, arguments, nprocs=WORLD_SIZE, start_method="fork" if hasattr(os, "fork") else "spawn")


def in_two_processes(directory, function, *arguments) -> list:
    """What `function(rank, *arguments)` returns in each; `directory` takes the files in between."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    call = Path(directory) / "call.pickle"
    call.write_bytes(pickle.dumps((port, str(directory), function, arguments)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_python("-c", "import sys; from processes import both; both(sys.argv[1])", call, env=environment)
    assert done.returncode == 0, done.stderr
    return [torch.load(Path(directory) / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]
