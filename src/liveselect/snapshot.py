"""Leave no trace: what a measurement with the live model disturbs, and how it is put back."""

import hashlib
import inspect
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from liveselect.attributes import attributes_kept, without_overlap
from liveselect.functional.sharding import local, reshard

_OF_EVERY_OPTIMIZER = set(vars(torch.optim.SGD([torch.zeros(1)], lr=0.1)))
_IMMUTABLE = (Number, str, bytes, type(None), torch.dtype, torch.device)


@contextmanager
def measuring(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Open a block in which forward, backward and optimizer steps leave no trace outside of parameters and moments.

    Inside, all modules are in eval mode, gradients start as None, hooks on the optimizer's step are silent (averages of
    the weights, loggers) and torch.compile is bypassed, because unusual shapes would recompile the training graph. On
    exit, also after an exception, these are as before: the very ``.grad`` tensors (backward adds into them in place, so
    copies would not do), buffers, each module's training flag, and the random states of torch (CPU, CUDA), numpy and
    Python. So are the plain attributes of modules, which forwards and hooks may change (a history of gradient norms):
    what they are bound to and what that holds, as :class:`~liveselect.attributes.Attributes` says, unless the
    parameters are sharded. Parameters and the optimizer's state belong to :class:`Snapshot`; a GradScaler is not
    touched. A sharded model enters and leaves the block with all of its parameters sharded.
    """
    with ExitStack() as stack:
        stack.enter_context(_resharded(model))
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(attributes_kept(model))
        stack.enter_context(_random_states_kept())
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_gradients_set_aside(list(model.parameters()) + _group_parameters(optimizer)))
        stack.enter_context(_step_hooks_silenced(optimizer))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        yield


class Snapshot:
    """The values of everything that an optimizer step may change, to be put back in place, bit for bit.

    It holds the trainable parameters of the model and all parameters of the optimizer, buffers, the optimizer's state
    (moments, step counters, whatever its kind keeps) and the values of its parameter groups. Parameters that share
    storage are kept once. The memory is that of the live tensors again: 12 bytes per parameter for AdamW in float32. Of
    a sharded model every rank keeps its own part.

    Raises:
        TypeError: the optimizer's step needs a closure, or its state holds objects that cannot be put back exactly.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        refuse_closure(optimizer)
        reshard(model)  # else the model would show whole parameters that are not the optimizer's
        self._model = model
        self._optimizer = optimizer
        self._names = set(vars(optimizer))
        self._plain = {name: value for name, value in vars(optimizer).items() if isinstance(value, _IMMUTABLE)}
        self._inventory = _take_inventory(model, optimizer)
        self._inventory.save()

    def restore(self) -> None:
        """Put all values back into the same storage; entries of the optimizer's state that are new are deleted."""
        reshard(self._model)  # else the next forward would not see what is put back
        self._inventory.restore()
        attributes = vars(self._optimizer)  # some optimizers count on themselves, and schedulers leave marks
        for name in set(attributes) - self._names:
            del attributes[name]
        attributes.update(self._plain)


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


class _Inventory:
    """Tensors, and the containers that hold them; each object once."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.containers: dict[int, tuple[Any, Any]] = {}  # id -> (container, shallow copy)
        self._saved: list[tuple[list[Tensor], list[Tensor]]] = []  # (live, clones), each pair one fused copy

    def add(self, value: Any) -> None:
        """Take note of a tensor, or of a container and all that it holds."""
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
        elif not isinstance(value, (*_IMMUTABLE, type)) and not inspect.isroutine(value):
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
            groups.setdefault((tensor.device, tensor.dtype), []).append(without_overlap(local(tensor)))
        self._saved = [(live, [tensor.clone() for tensor in live]) for live in groups.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back and give every container the entries that it had."""
        for live, saved in self._saved:
            torch._foreach_copy_(live, saved)
        for container, entries in self.containers.values():
            container.clear()
            container.update(entries) if isinstance(container, dict) else container.extend(entries)

    def digest(self) -> str:
        """Return a hash of the bits of all tensors and of the plain values in the containers, in order of arrival."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.tensors.values():
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(local(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for _, entries in self.containers.values():
            items = entries.items() if isinstance(entries, dict) else enumerate(entries)
            plain = [(str(key), repr(item)) for key, item in items if isinstance(item, _IMMUTABLE)]
            digest.update(repr(plain).encode())
        return digest.hexdigest()


def _take_inventory(model: nn.Module, optimizer: torch.optim.Optimizer) -> _Inventory:
    inventory = _Inventory()
    for parameter in model.parameters():
        if parameter.requires_grad:
            inventory.add(parameter)
    _add_optimizer(inventory, optimizer)
    for module in model.modules():
        inventory.add(module._buffers)
    return inventory


def _add_optimizer(inventory: _Inventory, optimizer: torch.optim.Optimizer) -> None:
    """Take note of an optimizer's state, and of what its class keeps beside it, other optimizers among it."""
    inventory.add(optimizer.param_groups)
    inventory.add(optimizer.state)
    for name, value in vars(optimizer).items():
        if name in _OF_EVERY_OPTIMIZER:
            continue
        if isinstance(value, torch.optim.Optimizer):
            _add_optimizer(inventory, value)
        else:
            inventory.add(value)


@contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    reshard(model)
    try:
        yield
    finally:
        reshard(model)


def _group_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    buffers = _Inventory()
    for module in model.modules():
        buffers.add(module._buffers)
    buffers.save()
    try:
        yield
    finally:
        buffers.restore()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    on_cpu, on_cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    in_numpy, in_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global state is what is kept
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        if cuda:
            torch.cuda.set_rng_state_all(on_cuda)
        np.random.set_state(in_numpy)  # noqa: NPY002
        random.setstate(in_python)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # flags, not model.eval(): some modules do work in train() (merge adapters, freeze layers), and a blanket
    # model.train() afterwards would wake up what the user had put into eval mode
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _gradients_set_aside(parameters: list[Tensor]) -> Iterator[None]:
    gradients = {parameter: parameter.grad for parameter in parameters}
    try:
        for parameter in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def _step_hooks_silenced(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    own = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    everywhere: list[Any] = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    kept = {name: getattr(optimizer, name) for name in own}
    kept_everywhere = [OrderedDict(hooks) for hooks in everywhere]
    try:
        for name in own:
            setattr(optimizer, name, OrderedDict())
        for hooks in everywhere:
            hooks.clear()
        yield
    finally:
        for name, own_hooks in kept.items():
            setattr(optimizer, name, own_hooks)
        for hooks, entries in zip(everywhere, kept_everywhere, strict=True):
            hooks.update(entries)
