"""Products of the Hessian of a mean loss with a vector, without forming the Hessian."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.functional.gradients import LossFn, mean_gradient

HessianProduct = Callable[[nn.Module, LossFn, Sequence[Any], Mapping[str, Tensor]], dict[str, Tensor]]


def double_backward_product(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], vector: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    r"""Return :math:`\nabla^2 L \, v` in the parameters that ``vector`` names, exact; L is the mean over all examples.

    The gradient is differentiated once more, batch by batch. Attention runs in plain operations, because fused kernels
    have no second derivative. Costs about three times a forward and backward; holds the graph of both for one batch.

    Args:
        model: in the mode in which the Hessian is wanted.
        loss_fn: per-example losses.
        batches: passed to ``loss_fn`` one after the other.
        vector: for each parameter that takes part a tensor of its shape.

    Raises:
        RuntimeError: something in the model has no second derivative.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in vector}
    leaves = list(parameters.values())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    examples = 0
    for batch in batches:
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                losses = loss_fn(model, batch)
                gradients = torch.autograd.grad(losses.sum(), leaves, create_graph=True, allow_unused=True)
                along = [
                    (gradient * vector[name]).sum()
                    for name, gradient in zip(parameters, gradients, strict=True)
                    if gradient is not None and gradient.requires_grad
                ]
                products = torch.autograd.grad(torch.stack(along).sum(), leaves, allow_unused=True)
        except RuntimeError as error:  # NotImplementedError of a kernel is one too
            raise RuntimeError(
                f"the model cannot be differentiated twice ({error}): use a Hessian product by central differences, "
                'hessian="central_difference", or switch fused kernels and reentrant activation checkpointing off'
            ) from error
        examples += len(losses)
        for total, product in zip(sums.values(), products, strict=True):
            if product is not None:
                total.add_(product)
    return {name: total / examples for name, total in sums.items()}


def central_difference_product(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    vector: Mapping[str, Tensor],
    step: float | None = None,
) -> dict[str, Tensor]:
    r"""Return the product of :func:`double_backward_product` from two gradients; works with every kernel.

    :math:`(\nabla L(\theta + hv) - \nabla L(\theta - hv)) / 2h`. Costs two forwards and backwards and no more memory
    than training. Parameters are displaced in place and put back from copies, bit for bit.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses, computed in float32 or finer.
        batches: walked twice.
        vector: as in :func:`double_backward_product`.
        step: length of the displacement as a share of that of the parameters; by default 1e-5 where these are float64
            and 1e-3 otherwise, which balances curvature against rounding.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in vector}
    share = step or (1e-5 if next(iter(parameters.values())).dtype == torch.float64 else 1e-3)
    length = _length(vector.values())
    if not length:
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    h = share * max(_length(parameters.values()), torch.finfo(torch.float32).tiny) / length
    ahead, behind = (_gradient_at(signed, model, loss_fn, batches, parameters, vector) for signed in (h, -h))
    return {name: (ahead[name] - behind[name]).div_(2 * h) for name in parameters}


def _gradient_at(
    h: float,
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    vector: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    with parameters_kept(parameters.values()):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(vector[name].to(parameter.dtype), alpha=h)
        torch.clear_autocast_cache()  # casts of the weights before the move would be used again
        return mean_gradient(model, loss_fn, batches)


@contextmanager
def parameters_kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Open a block in which parameters may be written to; on exit they are as before, bit for bit."""
    live = [parameter.detach() for parameter in parameters]
    kept = [parameter.clone() for parameter in live]
    try:
        yield
    finally:
        torch._foreach_copy_(live, kept)
        torch.clear_autocast_cache()


def _length(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(tensor.detach().double()) for tensor in tensors]).norm())
