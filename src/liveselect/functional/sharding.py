"""Models whose parameters are spread over ranks (FSDP): the part that this rank holds, and when it may be written to.

Nothing here communicates.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Return whether ranks hold different parts of the model's parameters.

    Every forward and backward of such a model is then a collective: all ranks must do the same number of them in the
    same order. Gradients come out of ``backward`` only (``torch.autograd.grad`` does not know the parameters), averaged
    over ranks. ``functional_call``, ``vmap`` and ``jvp`` on its parameters fail, or are silently wrong.
    """
    if not torch.distributed.is_available():
        return False
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def is_flat(model: nn.Module) -> bool:
    """Return whether ranks hold pieces of flattened parameters (FSDP1), and not of each parameter."""
    if not torch.distributed.is_available():
        return False
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def refuse_flat(model: nn.Module, name: str) -> None:
    """Raise TypeError for flattened parameters, with which ``name`` cannot work."""
    if is_flat(model):
        raise TypeError(
            f"{name} does not work with the flattened parameters of FullyShardedDataParallel (FSDPStrategy): shard "
            "with torch.distributed.fsdp.fully_shard (ModelParallelStrategy), or measure with OneStepInfluence"
        )


def shortest_cast(model: nn.Module) -> torch.dtype | None:
    """Return the 16-bit type that ``fully_shard`` casts parameters to before they compute, None where there is none."""
    if not torch.distributed.is_available():
        return None
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    casts = [getattr(getattr(state, "_mp_policy", None), "param_dtype", None) for state in states]
    return next((cast for cast in casts if cast is not None and cast.itemsize < 4), None)


class ThroughRoot(Generic[T]):
    """A loss that is computed inside of the forward of FSDP1's outermost wrapper, where parameters are whole.

    Args:
        loss_fn: maps the wrapped module and a batch to losses.
    """

    def __init__(self, loss_fn: Callable[[nn.Module, T], Tensor]) -> None:
        self.loss_fn = loss_fn

    def __call__(self, root: nn.Module, batch: T) -> Tensor:
        """Return the losses of a batch; ``root`` is the wrapper."""
        inner = root.get_submodule("module")
        kept = dict(vars(inner))

        def restore() -> None:
            del inner.forward
            if "forward" in kept:
                inner.forward = kept["forward"]

        def forward() -> Tensor:
            restore()  # the loss may call the module itself
            return self.loss_fn(inner, batch)

        inner.forward = forward
        try:
            losses: Tensor = root()
        finally:
            if vars(inner).get("forward") is forward:  # the wrapper failed before it came to the module
                restore()
        return losses


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward without backward leaves behind in the root; no-op when not sharded.

    The next forward would read them, and miss later writes into the shards. Until then ``model.parameters()`` yields
    them in place of the optimizer's parameters.
    """
    if not torch.distributed.is_available():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle: Any = module._handle
            # before its first forward a wrapper is sharded, and has no shard to return to; on one rank it never is
            if hasattr(getattr(handle, "flat_param", None), "_local_shard") and handle.uses_sharded_strategy:
                handle.reshard(True)  # no public way


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, detached, in the same storage; the tensor where it is whole."""
    if torch.distributed.is_available() and isinstance(tensor, DTensor):
        part: Tensor = tensor._local_tensor
        return part.detach()
    return tensor.detach()


def is_part(tensor: Tensor) -> bool:
    """Return whether ranks hold this tensor in parts, as a DTensor."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """Return ``part`` as the sharded tensor whose part on this rank it is, laid out as ``tensor``."""
    if not (torch.distributed.is_available() and isinstance(tensor, DTensor)):
        return part
    whole: Tensor = DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return whole


def part_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor that all ranks hold alike laid out as ``tensor``: each keeps its part, and nothing is sent."""
    if not (torch.distributed.is_available() and isinstance(tensor, DTensor)):
        return whole
    spread: Tensor = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return spread


def whole_twins(model: nn.Module) -> dict[int, int]:
    """Return the id of each sharded parameter by that of the whole one, which stands for it in autograd's graphs.

    Empty for a model that is not sharded by ``fully_shard``, or was never run.
    """
    if not torch.distributed.is_available():
        return {}
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    found = [each for state in states for each in _parameters_of(state)]
    pairs = [(getattr(each, "_unsharded_param", None), each.sharded_param) for each in found]
    return {id(twin): id(parameter) for twin, parameter in pairs if twin is not None}


def _parameters_of(state: object) -> "list[FSDPParam]":
    groups = getattr(state, "_fsdp_param_groups", None)  # several since torch 2.13, one or none before
    groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
    return [each for group in groups if group is not None for each in group.fsdp_params]


def copies(tensor: Tensor, ranks: int) -> int:
    """Return the number of ``ranks`` that hold the same part of a tensor of a sharded model."""
    if not (torch.distributed.is_available() and isinstance(tensor, DTensor)):
        return ranks
    count = ranks // tensor.device_mesh.size()
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        count *= size if isinstance(placement, Replicate) else 1
    return count


def backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients of a loss in sharded parameters, as ``backward`` leaves them: averaged over ranks.

    A collective. The ``.grad`` of the parameters is lost, and None afterwards. Hooks that wait for gradients to be
    accumulated, which may step, do not run.
    """
    for parameter in parameters:
        parameter.grad = None  # else the new gradient would be added to it
    with _accumulation_hooks_silenced(parameters):
        loss.backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


@contextmanager
def _accumulation_hooks_silenced(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    name = "_post_accumulate_grad_hooks"
    hooks = [(parameter, getattr(parameter, name)) for parameter in parameters if isinstance(parameter, DTensor)]
    try:
        for parameter, _ in hooks:
            setattr(parameter, name, None)
        yield
    finally:
        for parameter, kept in hooks:
            setattr(parameter, name, kept)
