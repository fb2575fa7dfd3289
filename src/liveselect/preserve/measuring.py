"""Put back what a measurement with the live model disturbs."""

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from liveselect.functional.several_optimizers import each_of
from liveselect.functional.sharding import reshard
from liveselect.preserve.attributes import attributes_kept
from liveselect.preserve.places import Entries, Memory
from liveselect.preserve.snapshot import Inventory


@contextmanager
def measuring(model: nn.Module, optimizer: torch.optim.Optimizer, training_mode: bool = False) -> Iterator[None]:
    """Open a block in which forward, backward and optimizer steps leave no trace outside of parameters and moments.

    Inside, all modules are in eval mode (also those that a list or a helper hides), gradients start as None, hooks on
    the optimizer's step are silent (averages of the weights, loggers) and torch.compile is bypassed, because unusual
    shapes would recompile the training graph. On exit, also after an exception, these are as before: the very
    ``.grad`` tensors (backward adds into them in place, so copies would not do), buffers, each module's training
    flag, the ``requires_grad`` of parameters, the random states of torch (CPU, CUDA), numpy and Python, and the
    settings of the optimizer. So are
    frozen parameters and the plain attributes of modules, which forwards and hooks may change (a history of
    gradient norms), within the limits of :class:`~liveselect.preserve.attributes.Attributes`, unless the parameters
    are sharded. Trained parameters and the optimizer's state belong to :class:`~liveselect.preserve.Snapshot`; a
    GradScaler is not touched.
    A sharded model enters and leaves the block with all of its parameters sharded.

    Args:
        model: the live model.
        optimizer: the live optimizer.
        training_mode: leave all modules in the mode that they are in.
    """
    with ExitStack() as stack:
        reshard(model)
        stack.callback(reshard, model)
        stack.enter_context(_buffers_kept(model))
        modules = [*model.modules(), *stack.enter_context(attributes_kept(model))]
        stack.enter_context(_random_states_kept())
        if not training_mode:
            stack.enter_context(_eval_mode(modules))
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        held = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        stack.enter_context(_flags_kept(held))
        stack.enter_context(_gradients_set_aside([*held, *optimized]))
        stack.enter_context(_step_hooks_silenced(optimizer))
        stack.enter_context(_settings_kept(optimizer))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    buffers = Inventory()
    for module in model.modules():
        buffers.add(module._buffers)
    buffers.save()
    memories = [Memory(buffer) for buffer in buffers.tensors.values()]
    try:
        yield
    finally:
        for memory in memories:
            memory.restore()
        buffers.restore()


@contextmanager
def _settings_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    kept = [Entries(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for settings in kept:
            settings.restore()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    on_cpu, on_cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    in_numpy, in_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global state is kept
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        if cuda:
            torch.cuda.set_rng_state_all(on_cuda)
        np.random.set_state(in_numpy)  # noqa: NPY002
        random.setstate(in_python)


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    # flags, not model.eval(): some modules do work in train() (merge adapters, freeze layers), and a blanket
    # model.train() afterwards would undo the user's own eval mode of some modules
    flags = [(module, module.training) for module in modules]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _flags_kept(parameters: list[nn.Parameter]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # not of every one: a flat view of FSDP1 cannot be set
                parameter.requires_grad_(flag)


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
    everywhere: list[dict] = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    kept = [(each, name, getattr(each, name)) for each in each_of(optimizer) for name in own]
    kept_everywhere = [dict(hooks) for hooks in everywhere]
    try:
        for each, name, _ in kept:
            setattr(each, name, OrderedDict())
        for hooks in everywhere:
            hooks.clear()
        yield
    finally:
        for each, name, own_hooks in kept:
            setattr(each, name, own_hooks)
        for hooks, entries in zip(everywhere, kept_everywhere, strict=True):
            hooks.update(entries)
