"""Several optimizers that step together, as one: Muon for matrices and AdamW for the rest is a usual pair."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class SeveralOptimizers(Optimizer):
    """One step of it is a step of each; groups and state are theirs, not copies.

    Args:
        optimizers: at least one, in the order in which they step.

    Attributes:
        inner: the optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.inner = [*optimizers]
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them, as they are now: loading a state replaces them."""
        return [group for each in self.inner for group in each.param_groups]

    @param_groups.setter
    def param_groups(self, groups: object) -> None:
        pass  # the constructor of torch begins with none

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Do nothing: groups are added to the optimizers themselves."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step with each."""
        for each in self.inner:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for each in self.inner:
            each.zero_grad(set_to_none)


def as_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the only one of some optimizers, or all of them as one."""
    return optimizers[0] if len(optimizers) == 1 else SeveralOptimizers(optimizers)


def each_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that a step is taken by, in order."""
    return optimizer.inner if isinstance(optimizer, SeveralOptimizers) else [optimizer]


def owner_of(optimizer: Optimizer, parameter: Tensor) -> Optimizer:
    """Return the optimizer that steps with a parameter."""
    for each in each_of(optimizer):
        if any(parameter is one for group in each.param_groups for one in group["params"]):
            return each
    raise ValueError(
        f"expected a parameter of {type(optimizer).__name__}, got another of shape {tuple(parameter.shape)}"
    )
