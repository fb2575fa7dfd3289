"""Products of the Hessian of a mean loss with a vector, by differentiating twice."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.functional.layer_pass import LossFn, T


def double_backward_product(
    model: nn.Module, loss_fn: LossFn[T], batches: Iterable[T], vector: Mapping[str, Tensor]
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
        except torch.OutOfMemoryError:
            raise
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
