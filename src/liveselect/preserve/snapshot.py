"""Copies of everything that an optimizer step may change, to be put back."""

import hashlib
import inspect
from collections import deque
from numbers import Number

import torch
from torch import Tensor, nn

from liveselect.functional.several_optimizers import SeveralOptimizers, each_of
from liveselect.functional.sharding import local, reshard
from liveselect.preserve.places import Container, refill, strided_parts, without_overlap

_OPTIMIZER_ATTRIBUTES = set(vars(torch.optim.SGD([torch.zeros(1)], lr=0.1)))
_IMMUTABLE_TYPES = (Number, str, bytes, type(None), torch.dtype, torch.device)


def _is_plain(value: object) -> bool:
    """Return whether a value cannot change in place."""
    return isinstance(value, _IMMUTABLE_TYPES)


class Snapshot:
    """The values of everything that an optimizer step may change, to be put back in place, bit for bit.

    It holds the trainable parameters of the model and all parameters of the optimizer, buffers, the optimizer's state
    (moments, step counters, other tensors of its class) and the values of its parameter groups. Parameters that share
    storage are kept once. The memory is that of the live tensors again: 12 bytes per parameter for AdamW in float32. Of
    a sharded model every rank keeps its own part.

    Raises:
        TypeError: the optimizer's step needs a closure, or its state holds objects that cannot be put back exactly.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for each in each_of(optimizer):
            refuse_closure(each)
        reshard(model)  # else the model would show whole parameters that are not the optimizer's
        self._model = model
        self._attributes = [
            (vars(each), {*vars(each)}, {name: item for name, item in vars(each).items() if _is_plain(item)})
            for each in each_of(optimizer)
        ]
        self._inventory = _take_inventory(model, optimizer)
        self._inventory.save()

    def restore(self) -> None:
        """Put all values back into the same storage; entries of the optimizer's state that are new are deleted."""
        reshard(self._model)  # else the next forward would not read the restored parts
        self._inventory.restore()
        for attributes, names, plain in self._attributes:  # some keep counters here, and schedulers set flags
            for name in set(attributes) - names:
                del attributes[name]
            attributes.update(plain)


def checksum(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of the bits of all parameters, buffers and optimizer state, and of the optimizer's settings.

    Of a sharded model it is that of the part that this rank holds.
    """
    reshard(model)
    inventory = _take_inventory(model, optimizer)
    for parameter in model.parameters():  # the frozen ones too
        inventory.add(parameter)
    return inventory.digest()


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError when one step of the optimizer needs a closure that evaluates the loss again."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__}.step needs a closure, so a step on a given gradient is not defined: "
            "train with an optimizer that steps on .grad (AdamW, SGD), or choose an estimator that takes no step"
        )


class Inventory:
    """Tensors and the containers that hold them, each object once."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.containers: dict[int, tuple[Container, dict | list]] = {}  # id -> (container, shallow copy)
        self._saved: list[tuple[list[Tensor], list[Tensor]]] = []  # (live, clones), each pair one fused copy

    def add(self, value: object) -> None:
        """Note a tensor, or a container and its contents."""
        if isinstance(value, Tensor):
            self.tensors.setdefault(id(value), value)
        elif isinstance(value, dict | list | deque):
            if id(value) not in self.containers:
                self.containers[id(value)] = (value, dict(value) if isinstance(value, dict) else list(value))
                for item in list(value.values() if isinstance(value, dict) else value):
                    self.add(item)
        elif isinstance(value, tuple):
            for item in value:
                self.add(item)
        elif not isinstance(value, (*_IMMUTABLE_TYPES, type)) and not inspect.isroutine(value):
            raise TypeError(
                f"the optimizer keeps a {type(value).__name__}, which cannot be put back exactly: expected tensors, "
                "numbers, strings, lists and dicts. Train with an optimizer that keeps its state in these, or choose "
                "an estimator that takes no step"
            )

    @torch.no_grad()
    def save(self) -> None:
        """Copy the values of all tensors."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self.tensors.values():
            for part in strided_parts(local(tensor)):
                groups.setdefault((part.device, part.dtype), []).append(without_overlap(part))
        self._saved = [(live, [tensor.clone() for tensor in live]) for live in groups.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back and give every container its former entries."""
        for live, saved in self._saved:
            torch._foreach_copy_(live, saved)
        for container, entries in self.containers.values():
            refill(container, entries)

    def digest(self) -> str:
        """Return a hash of the bits of all tensors and of the plain values in the containers, in order of arrival."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.tensors.values():
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            for part in strided_parts(local(tensor)):
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for _, entries in self.containers.values():
            items = entries.items() if isinstance(entries, dict) else enumerate(entries)
            plain = [(str(key), repr(item)) for key, item in items if isinstance(item, _IMMUTABLE_TYPES)]
            digest.update(repr(plain).encode())
        return digest.hexdigest()


def _take_inventory(model: nn.Module, optimizer: torch.optim.Optimizer) -> Inventory:
    inventory = Inventory()
    for parameter in model.parameters():
        if parameter.requires_grad:
            inventory.add(parameter)
    _add_optimizer(inventory, optimizer)
    for module in model.modules():
        inventory.add(module._buffers)
    return inventory


def _add_optimizer(inventory: Inventory, optimizer: torch.optim.Optimizer) -> None:
    """Note an optimizer's state and the attributes of its class, other optimizers among them."""
    if isinstance(optimizer, SeveralOptimizers):
        for each in optimizer.inner:
            _add_optimizer(inventory, each)
        return
    inventory.add(optimizer.param_groups)
    inventory.add(optimizer.state)
    for name, value in vars(optimizer).items():
        if name in _OPTIMIZER_ATTRIBUTES:
            continue
        if isinstance(value, torch.optim.Optimizer):
            _add_optimizer(inventory, value)
        else:
            inventory.add(value)
