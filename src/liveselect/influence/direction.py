"""The direction that gradients are compared with, and their products with it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect.functional.gradients import example_dot, token_dots
from liveselect.grammar import Batch, LiveModel, LossFn
from liveselect.influence.reference import counting
from liveselect.losses import causal_lm_loss, causal_lm_token_losses
from liveselect.parameters import ParameterView


class Direction:
    """A direction in the parameters of the live model.

    Args:
        values: tensors by parameter name.
        is_whole: whether they come whole out of a checkpoint, and are laid out like the model at the first use.
    """

    def __init__(self, values: Mapping[str, Tensor], is_whole: bool = False) -> None:
        self.values = values
        self._is_whole = is_whole
        self._coverage_checked = False
        self._second_order = True  # as long as nothing is known to have no second derivative

    def on(self, model: LiveModel) -> Mapping[str, Tensor]:
        """Return the tensors, on the devices and in the parts of the model's parameters."""
        if self._is_whole:
            self.values, self._is_whole = model.view.lay_out(self.values), False
        return self.values

    def products(self, model: LiveModel, loss_fn: LossFn, batch: Batch) -> Tensor:
        """Return the inner product of every example's gradient with the direction, ``(B,)``.

        Raises:
            ValueError: the loss uses parameters past the observed layers; checked once.
        """
        check, values = not self._coverage_checked, self.on(model)
        products = example_dot(model.module, loss_fn, batch, values, check, whole=model.view.whole)
        self._coverage_checked = True
        return products

    def tokens(self, model: LiveModel, batch: Batch) -> Tensor | None:
        """Return the inner product of the gradient of every token's loss with the direction, ``(B, T)``.

        None where the losses of tokens are not known, ranks hold parameters in parts, or an operation of the model has
        no second derivative, which is tried once.

        Raises:
            ValueError: as :meth:`products`.
        """
        if model.view.in_parts or not self._second_order:
            return None
        if model.view.inner_loss(model.loss_fn) is not causal_lm_loss:
            return None
        losses, values = model.view.with_loss(model.loss_fn, causal_lm_token_losses), self.on(model)

        def dots() -> Tensor:
            return token_dots(model.module, losses, batch, values, not self._coverage_checked, model.view.whole)

        work = f"tokens of {len(values)}"
        try:
            with model.autocast(), counting(model, work, batch, trial=dots):
                found = dots()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self._second_order = False
            return None
        self._coverage_checked = True
        return found

    def on_cpu(self) -> dict[str, Tensor]:
        """Return the tensors whole and on CPU, for a checkpoint; a collective where ranks hold parts."""
        return {name: ParameterView.whole(value).cpu() for name, value in self.values.items()}
