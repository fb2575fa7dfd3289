"""Functions on several real processes, over gloo."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(function, ranks: int, *arguments) -> list:
    """Run ``function(*arguments)`` in a group of forked processes; return what each rank returned, or raised."""
    with mp.get_context("fork").Manager() as manager:
        results = manager.dict()
        mp.start_processes(
            _worker, (function, ranks, free_port(), results, arguments), nprocs=ranks, start_method="fork"
        )
        return [results[rank] for rank in range(ranks)]


def _worker(rank, function, ranks, port, results, arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        results[rank] = function(*arguments)
    except Exception as error:
        results[rank] = error
    dist.destroy_process_group()
