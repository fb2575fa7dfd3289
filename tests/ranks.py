"""Functions on several real processes, over gloo."""

import pickle
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(worker, ranks: int, *arguments) -> list:
    """Run ``worker(rank, ranks, folder, *arguments)`` in forked processes; return what each rank returned.

    They come up in a fraction of a second, because everything is imported already.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.start_processes(_saved, (worker, ranks, folder, arguments), nprocs=ranks, start_method="fork")
        return [pickle.loads((folder / f"{rank}").read_bytes()) for rank in range(ranks)]


def _saved(rank, worker, ranks, folder, arguments):
    torch.set_num_threads(1)
    (folder / f"{rank}").write_bytes(pickle.dumps(worker(rank, ranks, folder, *arguments)))


def on_ranks(function, ranks: int, *arguments) -> list:
    """Run ``function(*arguments)`` in a group of forked processes; return what each rank returned, or raised."""
    return forked(_in_a_group, ranks, function, arguments)


def _in_a_group(rank, ranks, folder, function, arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    try:
        return function(*arguments)
    except Exception as error:
        return error
    finally:
        dist.destroy_process_group()
