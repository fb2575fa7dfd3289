"""How each kind of layer turns its input and output gradient into a product of gradient and direction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.functional.taps import Call, LayerError, floating_leaves

_MIN_ENTRIES_FOR_DOT = 1 << 12  # of a row: shorter ones cost more as calls of their own than in one product
_MAX_ENTRIES_PER_DOT = 1 << 16  # as many stay in a cache, and add up with little rounding

Direction = Mapping[str, Tensor]
"""A direction in the parameters of one layer, by the layer's own names (``weight``, ``bias``)."""

Dot = Callable[[Tensor, Tensor], Tensor]
"""The inner product of each row of two tensors ``(B, ...)``, as :func:`row_dot`; or of finer parts of the rows."""

Rule = Callable[[Any, Tensor, Tensor, Direction, Dot], Tensor]
"""``rule(layer, x, delta, direction, dot) -> (B,)``: with input ``x (B, ..., D_in)`` and output gradient ``delta (B,
..., D_out)``, the product of every example's gradient with the direction, summed as ``dot`` does."""


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule for a layer's own parameters, None when there is none.

    Layers with torch's own forward have closed forms. Any other is differentiated in the parameters that it holds
    itself, as it computes once more: norms and embeddings of all kinds, routers, fused experts, state spaces.
    Layers that mix the examples of a batch, or keep their parameters in other places too, have no rule.
    """
    if isinstance(module, _MODULES_WITHOUT_RULE) or getattr(module, "scale_grad_by_freq", False):
        return None
    for kind, rule in _CLOSED_FORMS.items():
        if isinstance(module, kind) and _forward_is(module, kind):
            return rule
    if is_transposed_linear(module):
        return transposed_linear_dot
    return any_dot


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of ``a (B, ...)`` with that of ``b (B, ...)``, ``(B,)``.

    Summed in float32 or finer. A row that all examples share, ``b (1, ...)``, is met by every row of ``a``.
    """
    if a.shape == b.shape and _MIN_ENTRIES_FOR_DOT <= a[:1].numel() <= _MAX_ENTRIES_PER_DOT and _are_plain(a, b):
        return torch.stack([torch.dot(x, y) for x, y in zip(a.flatten(1), b.flatten(1), strict=True)])
    return _products(a, b).flatten(1).sum(dim=1)  # measured 4 times as fast as a batched product on CPU


def position_dot(a: Tensor, b: Tensor, positions: int) -> Tensor:
    """Return the inner product of each position of each row, ``(B, positions)``; their sum is :func:`row_dot`.

    What comes without positions, ``(B, D)`` or of another number than these or one less, is spread evenly.
    """
    products = _products(a, b)
    if products.dim() > 2 and positions - 1 <= products.shape[1] <= positions:
        return F.pad(products.flatten(2).sum(dim=2), (0, positions - products.shape[1]))
    return (products.flatten(1).sum(dim=1, keepdim=True) / positions).expand(-1, positions)


def linear_dot(layer: nn.Module, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot) -> Tensor:
    r"""Return :math:`\sum_t \delta_t^\top (V x_t + v)` for ``y = W x + b`` with ``V (D_out, D_in)`` and ``v (D_out,)``.

    The gradients ``(D_out, D_in)`` of the examples are never formed: the product is applied on the narrower side.
    """
    return _matrix_dot(x, delta, direction.get("weight"), direction.get("bias"), dot)


def transposed_linear_dot(
    layer: nn.Module, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot
) -> Tensor:
    """Return :func:`linear_dot` for Hugging Face's ``Conv1D``, whose weight is ``(D_in, D_out)``."""
    weight = direction.get("weight")
    return _matrix_dot(x, delta, None if weight is None else weight.t(), direction.get("bias"), dot)


def embedding_dot(layer: nn.Embedding, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot) -> Tensor:
    r"""Return :math:`\sum_t \delta_t^\top V[x_t]` for token ids ``x (B, T)``: a look-up and no matrix product."""
    moved = F.embedding(x, direction["weight"])
    return dot(delta, _without_padding(layer, x, moved))


def layer_norm_dot(layer: nn.LayerNorm, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot) -> Tensor:
    r"""Return :math:`\sum_t \delta_t^\top (\hat x_t \odot v_w + v_b)` with the normalised input :math:`\hat x`."""
    x, delta, direction = _in_full_precision(x, delta, direction)
    gain, shift = direction.get("weight"), direction.get("bias")
    if gain is None:
        return dot(delta, torch.zeros_like(delta) if shift is None else shift.expand_as(delta))
    return dot(delta, F.layer_norm(x, layer.normalized_shape, gain, shift, layer.eps))


def rms_norm_dot(layer: nn.RMSNorm, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot) -> Tensor:
    r"""Return :math:`\sum_t \delta_t^\top (\hat x_t \odot v)` with the root-mean-square normalised input."""
    x, delta, direction = _in_full_precision(x, delta, direction)
    return dot(delta, F.rms_norm(x, layer.normalized_shape, direction["weight"], layer.eps))


def any_dot(layer: nn.Module, x: Tensor, delta: Tensor, direction: Direction, dot: Dot = row_dot) -> Tensor:
    r"""Return :math:`\langle \delta, \partial_\theta f(x) V \rangle` by forward-mode AD through ``layer.forward``.

    The layer computes once more, with dual numbers in place of its parameters; its hooks do not run. The layer must be
    deterministic and must have an output that depends on its parameters.
    """
    own = dict(layer._parameters)
    try:
        with torch.no_grad(), forward_ad.dual_level():
            for name, value in direction.items():
                parameter = own[name]
                if parameter is not None:
                    dual = forward_ad.make_dual(parameter.detach(), value.to(parameter.dtype))
                    layer._parameters[name] = dual
            moved = forward_ad.unpack_dual(layer.forward(x)).tangent
    finally:
        layer._parameters.update(own)
    if moved is None:
        moved = torch.zeros_like(delta)
    return dot(delta, _without_padding(layer, x, moved) if isinstance(layer, nn.Embedding) else moved)


@dataclass(frozen=True)
class Move:
    """A direction in one parameter: the module that holds it, its name there, and the direction."""

    module: nn.Module
    name: str
    value: Tensor


def replayed_dot(
    layer: nn.Module,
    call: Call,
    deltas: Sequence[Tensor | None],
    moves: Sequence[Move],
    dot: Dot = row_dot,
    backwards: bool = False,
) -> Tensor:
    r"""Return :math:`\langle \delta, \partial_\theta f(x) V \rangle` for every tensor that a call returned, summed.

    The layer computes once more with its inputs as they were, by forward-mode AD. Where an operation in it has no
    forward-mode derivative, the product comes from its backward, differentiated in the gradient that it is given:
    :math:`J V = \partial_u \langle J^\top u, V \rangle`. Its taps do not see it; other hooks of layers inside do.

    Args:
        layer: that was called.
        call: what it was called with.
        deltas: of the floating tensors that it returned, None where the loss does not depend on one.
        moves: in its parameters, or in those of layers inside of it.
        dot: as of other rules.
        backwards: take the second way, which leaves out what backward leaves out: padding rows, parts under no_grad.

    Raises:
        LayerError: rows of the output are not those of examples, or it cannot be differentiated in either way.
    """
    device = next(delta.device for delta in deltas if delta is not None)
    with call.again(device), sdpa_kernel(SDPBackend.MATH):
        try:
            moved = None if backwards else _forward_tangents(layer, call, moves)
            if moved is None:
                moved = _backward_tangents(layer, call, moves)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            got = "tensors by operations that cannot be differentiated twice"
            raise LayerError(call.name, got, f"module {call.name!r} maps {got}: {error}") from error
    parts = []
    for delta, tangent in zip(deltas, moved, strict=True):
        if delta is not None and tangent is not None:
            parts.append(dot(call.by_example(delta), call.by_example(tangent.to(delta.dtype))))
    if parts:
        return sum(parts[1:], parts[0])
    some = next(delta for delta in deltas if delta is not None)
    apart = call.by_example(some)
    return dot(apart, torch.zeros_like(apart))


@contextmanager
def _exchanged(moves: Sequence[Move], values: Sequence[Tensor]) -> Iterator[None]:
    own = [(move, move.module._parameters[move.name]) for move in moves]
    try:
        for move, value in zip(moves, values, strict=True):
            move.module._parameters[move.name] = value  # type: ignore[assignment]
        yield
    finally:
        for move, parameter in own:
            move.module._parameters[move.name] = parameter


def _parameter_of(move: Move) -> Tensor:
    parameter = move.module._parameters[move.name]
    if parameter is None:
        raise RuntimeError(f"the parameter {move.name!r} is gone")
    return parameter.detach()


def _forward_tangents(layer: nn.Module, call: Call, moves: Sequence[Move]) -> list[Tensor | None] | None:
    """Return the derivative of each floating output along the moves; None where an operation has none forwards."""
    try:
        with torch.no_grad(), forward_ad.dual_level():
            values = [_parameter_of(move) for move in moves]
            duals = [forward_ad.make_dual(v, m.value.to(v.dtype)) for v, m in zip(values, moves, strict=True)]
            with _exchanged(moves, duals):
                leaves, _, floating = floating_leaves(layer.forward(*call.arguments, **call.options))
            return [forward_ad.unpack_dual(leaves[index]).tangent for index in floating]
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return None


def _backward_tangents(layer: nn.Module, call: Call, moves: Sequence[Move]) -> list[Tensor | None]:
    """Return the same from the layer's own backward."""
    with torch.enable_grad():
        values = [_parameter_of(move).requires_grad_() for move in moves]
        with _exchanged(moves, values):
            leaves, _, floating = floating_leaves(layer.forward(*call.arguments, **call.options))
        outputs = [(place, leaves[index]) for place, index in enumerate(floating) if leaves[index].requires_grad]
        found: list[Tensor | None] = [None] * len(floating)
        if not outputs:
            return found
        given = [torch.zeros_like(output, requires_grad=True) for _, output in outputs]
        heads = [output for _, output in outputs]
        back = torch.autograd.grad(heads, values, given, create_graph=True, allow_unused=True)
        products = [
            (gradient * move.value.to(gradient.dtype)).sum()
            for gradient, move in zip(back, moves, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not products and all(gradient is None for gradient in back):
            return found
        if not products:
            raise RuntimeError("its backward has no derivative")
        tangents = torch.autograd.grad(sum(products[1:], products[0]), given, allow_unused=True)
        if all(tangent is None for tangent in tangents):  # autograd leaves out what it cannot differentiate again
            raise RuntimeError("its backward has no derivative")
        for (place, _), tangent in zip(outputs, tangents, strict=True):
            found[place] = None if tangent is None else tangent.detach()
    return found


def _products(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) * b.to(dtype)


def whole_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape, ``()``, summed in float32 or finer."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if not _are_plain(a, b):
        return (a.to(dtype) * b.to(dtype)).sum()
    pieces = zip(a.view(-1).split(_MAX_ENTRIES_PER_DOT), b.view(-1).split(_MAX_ENTRIES_PER_DOT), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum(dtype=torch.float64)


def _are_plain(a: Tensor, b: Tensor) -> bool:
    """Return whether dot products of parts of both need no copy: half the time of a product and its sum on CPU."""
    fine = a.dtype == b.dtype in (torch.float32, torch.float64)
    return fine and a.device.type == b.device.type == "cpu" and a.is_contiguous() and b.is_contiguous()


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of Hugging Face GPT-2, known by name so as not to import it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "ndim", 0) == 2


def _matrix_dot(x: Tensor, delta: Tensor, matrix: Tensor | None, shift: Tensor | None, dot: Dot) -> Tensor:
    # the product is as exact as the layer's own; only float16, whose range a direction may leave, is widened
    dtype = torch.float32 if delta.dtype == torch.float16 else delta.dtype
    x, delta = x.to(dtype), delta.to(dtype)
    parts = []
    if matrix is not None:
        matrix = matrix.to(dtype)
        wide = matrix.shape[0] < matrix.shape[1]
        parts.append(dot(delta, x @ matrix.t()) if wide else dot(delta @ matrix, x))
    if shift is not None and dot is row_dot:  # without a second tensor as large as the output
        finer = torch.promote_types(dtype, torch.float32)
        parts.append(delta.flatten(1, -2).sum(dim=1, dtype=finer) @ shift.to(finer))
    elif shift is not None:
        parts.append(dot(delta, shift.to(dtype).expand_as(delta)))
    return sum(parts[1:], parts[0])


def _without_padding(layer: nn.Embedding, x: Tensor, moved: Tensor) -> Tensor:
    # backward gives the padding token's row no gradient, although the forward reads it
    if layer.padding_idx is None:
        return moved
    return moved.masked_fill((x == layer.padding_idx).unsqueeze(-1), 0.0)


def _in_full_precision(x: Tensor, delta: Tensor, direction: Direction) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), delta.to(dtype), {name: value.to(dtype) for name, value in direction.items()}


def _forward_is(module: nn.Module, kind: type[nn.Module]) -> bool:
    # a subclass, or a patched instance, may scale or quantise the result of its parent
    return type(module).forward is kind.forward and "forward" not in vars(module)


_MODULES_WITHOUT_RULE = (nn.modules.batchnorm._BatchNorm, nn.RNNBase)

_CLOSED_FORMS: dict[type[nn.Module], Rule] = {
    nn.Linear: linear_dot,
    nn.Embedding: embedding_dot,
    nn.LayerNorm: layer_norm_dot,
    nn.RMSNorm: rms_norm_dot,
}
