"""Every collective of liveselect. All functions work unchanged on a single process."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank, 0 when training is not distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 when training is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard(total: int, index: int | None = None, count: int | None = None) -> slice:
    """Return the contiguous share of ``total`` rows that belongs to one rank; shares differ by at most one row."""
    index = rank() if index is None else index
    count = world_size() if count is None else count
    base, extra = divmod(total, count)
    start = index * base + min(index, extra)
    return slice(start, start + base + (index < extra))


def gather_shards(local: Tensor, total: int) -> Tensor:
    """Return the ``(total, ...)`` rows of all ranks in rank order, on CPU.

    ``local`` holds the rows of :func:`shard`. Shares of unequal length are padded before the collective, because gloo
    aborts the process when shapes differ.
    """
    ranks = world_size()
    if ranks == 1:
        return local.cpu()
    lengths = [(lambda part: part.stop - part.start)(shard(total, index, ranks)) for index in range(ranks)]
    device = _collective_device()
    padded = torch.zeros((max(lengths), *local.shape[1:]), dtype=local.dtype, device=device)
    padded[: len(local)] = local.to(device)
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).cpu()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the elementwise sum of ``value`` over all ranks, on its device; equal on all of them."""
    if world_size() == 1:
        return value
    total = _ready_to_send(value)
    dist.all_reduce(total)
    return total.to(value.device)


def sum_at(value: Tensor, owner: int) -> Tensor:
    """Return the elementwise sum of ``value`` over all ranks on rank ``owner``; others get back their own ``value``."""
    if world_size() == 1:
        return value
    total = _ready_to_send(value)
    dist.reduce(total, owner)
    return total.to(value.device) if rank() == owner else value


def copy_from(value: Tensor | None, owner: int, device: torch.device | None = None) -> Tensor:
    """Return rank ``owner``'s ``value`` on all ranks; only the owner needs to pass one.

    The others get it on ``device``, by default on CPU.
    """
    described = [None if value is None else (tuple(value.shape), value.dtype)]
    if world_size() > 1:
        dist.broadcast_object_list(described, owner)
    if described[0] is None:
        raise ValueError(f"rank {owner} owns a tensor that it does not pass")
    if world_size() == 1 and value is not None:
        return value
    shape, dtype = described[0]
    if rank() == owner and value is not None:
        shared = _ready_to_send(value)
    else:
        shared = torch.empty(shape, dtype=dtype, device=_collective_device())
    dist.broadcast(shared, owner)
    return shared.to(device if value is None else value.device)


def gather_objects(value: T) -> list[T]:
    """Return the picklable ``value`` of every rank, in rank order."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def first_said(sentence: str | None) -> str | None:
    """Return the sentence of the first rank that has one; a collective."""
    return next((each for each in gather_objects(sentence) if each is not None), None)


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is true on some rank."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)], device=_collective_device())
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that ranks hold in parts (a DTensor), on every rank; others are returned as they are."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def even_share(items: Sequence[T]) -> list[tuple[T, bool]]:
    """Return this rank's share of items that all ranks hold, equally many on each, and whether each of them counts.

    Where forwards are collectives, ranks with fewer items must take part in as many of them: they get the first item
    again, which does not count.
    """
    mine = [(item, True) for item in items[rank() :: world_size()]]
    return mine + [(item, False) for item in items[: -(-len(items) // world_size()) - len(mine)]]


def in_step(items: Iterable[T], spare: Callable[[], T], together: bool = True) -> Iterator[tuple[T, bool]]:
    """Yield this rank's items, and whether each of them counts, as often as on the rank that has most of them.

    A rank with fewer items yields ``spare()`` in their place, which does not count. A small collective for each item;
    with ``together`` false there is none, and each rank gets its own items only.
    """
    iterator = iter(items)
    while True:
        mine = list(islice(iterator, 1))
        if not (any_rank(bool(mine)) if together else mine):
            return
        yield (mine[0], True) if mine else (spare(), False)


def wait_for_all() -> None:
    """Return when every rank has called this; ranks of unequal speed drift no further apart than between two calls."""
    if world_size() > 1:
        dist.barrier()


def check_agreement(what: str, value: Tensor) -> None:
    """Raise RuntimeError, on every rank, when the ranks hold different values of a replicated decision."""
    if world_size() == 1:
        return
    digest = hashlib.blake2b(value.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
    digests = gather_objects(digest)
    odd = [index for index, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise RuntimeError(
            f"ranks disagree about {what}: rank 0 holds {digests[0]}, ranks {odd} hold {[digests[i] for i in odd]}. "
            "All ranks must see the same pool, reference set, seed and library versions"
        )


def _ready_to_send(value: Tensor) -> Tensor:
    """Return a copy for a collective; in row-major order, because collectives send memory and not entries."""
    return value.to(_collective_device()).clone(memory_format=torch.contiguous_format)


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
