"""A cheap checksum of a live model and its optimizer: one pass over their memory, on their device."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liveselect.functional.sharding import is_sharded, local
from liveselect.preserve.attributes import Attributes
from liveselect.preserve.places import strided_parts

_INTEGER_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bit_sum(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the sum of the bits of all parameters, buffers and optimizer state of this rank, read as integers.

    Plain attributes of modules are part of it, unless parameters are sharded; sums can therefore be compared within one
    process only. A change of any single value changes the sum; changes that cancel each other are missed.
    """
    attributes = None if is_sharded(model) else Attributes(model)
    sums: dict[torch.device, Tensor] = {}
    seen: set[int] = set()
    held = [*attributes.tensors, *attributes.frozen.values()] if attributes else []
    for tensor in [*_tensors(model, optimizer), *held]:
        if id(tensor) in seen:
            continue
        for words in strided_parts(local(tensor).detach()):
            if not words.numel() or words.element_size() not in _INTEGER_TYPES or words.is_complex():
                continue
            seen.add(id(tensor))
            # weighted, so that exchanging two tensors is seen; by an odd number, which loses no bit of 64
            part = sum_of_words(words.contiguous().flatten()) * (2 * len(seen) + 1)
            sums[words.device] = sums.get(words.device, part.new_zeros(())) + part
    return sum(int(part) for part in sums.values()) + (attributes.fingerprint() if attributes else 0)


def sum_of_words(values: Tensor) -> Tensor:
    """Return the sum of ``values (n,)`` read as integers of 64 bits, and the last few by themselves.

    Integers of 32 bits would take 28 times as long on a CPU.
    """
    size = values.element_size()
    values = values if values.storage_offset() * size % 8 == 0 else values.clone()
    whole = len(values) - len(values) % (8 // size)
    return values[:whole].view(torch.int64).sum() + values[whole:].view(_INTEGER_TYPES[size]).sum(dtype=torch.int64)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from tensors_inside(optimizer)


def tensors_inside(value: object) -> Iterator[Tensor]:
    """Yield the tensors that lists, tuples, dicts and optimizers hold."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.optim.Optimizer):
        yield from tensors_inside(list(vars(value).values()))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_inside(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_inside(item)
