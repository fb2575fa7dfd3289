"""Sums over tokens and examples from which the Kronecker factors of linear layers are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from liveselect.functional.kronecker import Curvature, add_gram_, rotated_squares
from liveselect.functional.layer_pass import LayerPlan, LossFn, T, backward_through_layers

Sums = dict[str, dict[str, Tensor]]
"""By leader, then by kind of sum: ``tokens`` (a number); ``inputs (I, I)``, an upper triangle, or ``trace`` (a
number); :func:`key` ``("outputs", layer, block)`` ``(O_b, O_b)``, an upper triangle, or ``("squares", layer, block)``
``(O_b, I)``. The sums of ranks and batches add up."""


@dataclass(frozen=True)
class MatrixLayer:
    """A linear layer as a matrix ``(O, I)``, the bias its last column.

    Attributes:
        name: module name.
        weight: full name of the weight.
        bias: full name of the bias, None where there is none.
        transposed: whether the weight is stored as ``(I, O)``.
        outputs: O.
        inputs: I, a constant 1 for the bias included.
        leader: the first layer that reads the very same input, itself included.
        blocks: the output rows of each block of curvature, ``(O_b,)`` int64; None for all of them.
    """

    name: str
    weight: str
    bias: str | None
    transposed: bool
    outputs: int
    inputs: int
    leader: str
    blocks: tuple[Tensor | None, ...] = (None,)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of the parameters that the matrix is made of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the layer's part of ``values``, tensors by parameter name, as ``(O, I)``."""
        weight = values[self.weight].t() if self.transposed else values[self.weight]
        return weight if self.bias is None else torch.cat([weight, values[self.bias].unsqueeze(1)], dim=1)

    def by_name(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts that :meth:`matrix` joins, by parameter name."""
        weight = matrix if self.bias is None else matrix[:, :-1]
        parts = {self.weight: (weight.t() if self.transposed else weight).contiguous()}
        return parts if self.bias is None else {**parts, self.bias: matrix[:, -1].contiguous()}

    def with_one(self, inputs: Tensor) -> Tensor:
        """Return inputs ``(..., D_in)`` with the constant 1 of the bias, ``(..., I)``."""
        return inputs if self.bias is None else torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def key(kind: str, layer: str, block: int) -> str:
    """Return the name of a sum that belongs to one block of a layer's outputs."""
    return f"{kind} {layer} {block}"


def zero_sums(layers: Sequence[MatrixLayer], model: nn.Module, kinds: Sequence[str]) -> Sums:
    """Return sums of zero, of the ``kinds`` among ``inputs``, ``trace``, ``outputs`` and ``squares``.

    They are float32 or finer, as 16-bit sums stop growing after a few hundred batches, and stand where the model does.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sums: Sums = {}
    for layer in layers:
        weight = parameters[layer.weight]
        zeros = partial(torch.zeros, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        count = partial(torch.zeros, (), dtype=torch.float64, device=weight.device)
        group = sums.setdefault(layer.leader, {"tokens": count()})
        if "trace" in kinds:
            group["trace"] = count()
        if "inputs" in kinds:
            group["inputs"] = zeros(layer.inputs, layer.inputs)
        for block, index in enumerate(layer.blocks):
            height = layer.outputs if index is None else len(index)
            if "outputs" in kinds:
                group[key("outputs", layer.name, block)] = zeros(height, height)
            if "squares" in kinds:
                group[key("squares", layer.name, block)] = zeros(height, layer.inputs)
    return sums


Seen = list[tuple[MatrixLayer, Tensor, Tensor]]
"""Layers with the inputs and output gradients of their calls, as observers get them."""


def add_covariances(
    sums: Sums,
    layers: Sequence[MatrixLayer],
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    weights: Tensor,
    mask: Tensor,
    keep: Seen | None = None,
    check: bool = True,
) -> None:
    """Add one batch to the sums of ``outputs``, and of ``inputs`` or ``trace`` where these are among the sums.

    Args:
        sums: added to in place.
        layers: the layers to observe.
        model: in evaluation mode.
        loss_fn: mean loss of each example.
        batch: examples.
        weights: ``(B,)``, the target tokens of each example: they turn mean losses into sums over tokens.
        mask: ``(B, T)`` bool on CPU, the tokens that count; the gradients of others are zero.
        keep: a list that gets the observed tensors, for :func:`add_seen_squares`.
        check: look for uses of the layers' weights that no layer saw.
    """
    active = _ActiveTokens(mask)

    def observe(layer: MatrixLayer, x: Tensor, delta: Tensor) -> None:
        if keep is not None:
            keep.append((layer, x, delta))
        group = sums[layer.leader]
        rows = delta.flatten(0, -2)
        for block, index in enumerate(layer.blocks):
            part = rows if index is None else rows[:, index.to(rows.device)]
            add_gram_(group[key("outputs", layer.name, block)], part)
        if layer.leader == layer.name:  # the others have the same input
            _add_inputs(group, active.rows(x.expand(len(delta), *x.shape[1:])), layer.bias is not None)

    backward_through_layers(model, loss_fn, batch, _plan(layers, model, observe), weights, check)


def add_squares(
    sums: Sums,
    layers: Sequence[MatrixLayer],
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    weights: Tensor,
    mask: Tensor,
    curvature_of: Callable[[str, int], Curvature],
    check: bool = True,
) -> None:
    """Add one batch to the sums of ``squares``: of examples' gradients, in the basis of each block.

    Arguments are those of :func:`add_covariances`; ``curvature_of(layer name, block)`` has the bases.
    """
    active = _ActiveTokens(mask)

    def observe(layer: MatrixLayer, x: Tensor, delta: Tensor) -> None:
        _add_layer_squares(sums[layer.leader], layer, x, delta, active, curvature_of)

    backward_through_layers(model, loss_fn, batch, _plan(layers, model, observe), weights, check)


def add_seen_squares(sums: Sums, seen: Seen, mask: Tensor, curvature_of: Callable[[str, int], Curvature]) -> None:
    """Do as :func:`add_squares`, on the tensors that :func:`add_covariances` kept and without a pass of the model."""
    active = _ActiveTokens(mask)
    for layer, x, delta in seen:
        _add_layer_squares(sums[layer.leader], layer, x, delta, active, curvature_of)


def _add_inputs(group: Mapping[str, Tensor], rows: Tensor, has_bias: bool) -> None:
    """Add inputs ``(N, D_in)`` to a layer's sums, as if a 1 stood behind each where there is a bias."""
    group["tokens"].add_(len(rows))
    if "trace" in group:
        finer = torch.promote_types(rows.dtype, torch.float32)
        group["trace"].add_(rows.to(finer).square().sum(dtype=torch.float64) + has_bias * len(rows))
    if "inputs" in group and not has_bias:
        add_gram_(group["inputs"], rows)
    elif "inputs" in group:
        add_gram_(group["inputs"][:-1, :-1], rows)
        group["inputs"][:-1, -1].add_(rows.sum(dim=0, dtype=group["inputs"].dtype))
        group["inputs"][-1, -1].add_(len(rows))


def _add_layer_squares(
    group: Mapping[str, Tensor],
    layer: MatrixLayer,
    x: Tensor,
    delta: Tensor,
    active: "_ActiveTokens",
    curvature_of: Callable[[str, int], Curvature],
) -> None:
    x = x.expand(len(delta), *x.shape[1:])
    if layer.leader == layer.name:
        group["tokens"].add_(active.count(x))
    inputs, deltas = (value.unsqueeze(1).flatten(1, -2) for value in (layer.with_one(x), delta))
    for block, index in enumerate(layer.blocks):
        total = group[key("squares", layer.name, block)]
        part = deltas if index is None else deltas[..., index.to(deltas.device)]
        total.add_(rotated_squares(curvature_of(layer.name, block), inputs.to(total.dtype), part.to(total.dtype)))


def _plan(
    layers: Sequence[MatrixLayer], model: nn.Module, observe: Callable[[MatrixLayer, Tensor, Tensor], None]
) -> LayerPlan:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return LayerPlan(
        observers={layer.name: partial(observe, layer) for layer in layers},
        parameters={name: parameters[name] for layer in layers for name in layer.parameters},
        holders={name: (layer.name,) for layer in layers for name in layer.parameters},
        model=model,
    )


class _ActiveTokens:
    """The positions of a batch that count, ``mask (B, T)``; a loss may have cut the batch on the right."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._indices: dict[tuple[int, torch.device], Tensor | None] = {}

    def rows(self, values: Tensor) -> Tensor:
        """Return the active rows of ``values (B, T', ..., D)`` as ``(N, D)``; without a token dimension, all rows."""
        flat, index = values.flatten(0, -2), self._index_of(values)
        if index is None:
            return flat
        return values.flatten(0, 1).index_select(0, index).flatten(0, -2)

    def count(self, values: Tensor) -> int:
        """Return N, the number of active rows."""
        index = self._index_of(values)
        per_token = values[0, 0].numel() // values.shape[-1] if index is not None else 1
        return values.flatten(0, -2).shape[0] if index is None else len(index) * per_token

    def _index_of(self, values: Tensor) -> Tensor | None:
        """Return which of the flattened tokens count, None when all of them do."""
        if values.dim() < 3 or len(values) != len(self._mask) or values.shape[1] > self._mask.shape[1]:
            return None
        length, device = values.shape[1], values.device
        if (length, device) not in self._indices:
            mask = self._mask[:, :length]
            index = None if bool(mask.all()) else mask.flatten().nonzero().flatten().to(device)
            self._indices[length, device] = index
        return self._indices[length, device]
