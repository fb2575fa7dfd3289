"""The direction that gradients are compared with, and their products with it."""

from collections.abc import Mapping

from torch import Tensor

from liveselect.functional.gradients import example_dot
from liveselect.grammar import Batch, LiveModel, LossFn
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

    def on_cpu(self) -> dict[str, Tensor]:
        """Return the tensors whole and on CPU, for a checkpoint; a collective where ranks hold parts."""
        return {name: ParameterView.whole(value).cpu() for name, value in self.values.items()}
