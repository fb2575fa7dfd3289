"""Taps: see the input and the output gradient of chosen layers during a backward, and leave the model as it was."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

Observer = Callable[[Tensor, Tensor], Tensor | None]
"""Called in the backward with a layer's input ``(B, ...)`` and output gradient ``(B, ...)``; its result is added to the
gradient of the anchor. Inputs that all examples share (position ids) keep their own shape."""


WAY_OUT = 'leave its parameters out (exclude=[...]), or measure with engine="central_difference"\''
"""What helps where a layer cannot be observed, in the words of the estimators."""


class LayerError(ValueError):
    """A layer cannot be observed.

    Args:
        module: its name.
        got: what it does instead, in a few words.
        message: the whole sentence.
    """

    def __init__(self, module: str, got: str, message: str) -> None:
        super().__init__(message)
        self.module = module
        self.got = got


@dataclass
class TapLog:
    """What the taps saw while they were in place.

    Attributes:
        calls: number of calls with gradients of each tapped module.
        unseen: modules that ran while gradients were switched off.
    """

    calls: Counter[str] = field(default_factory=Counter)
    unseen: set[str] = field(default_factory=set)


@contextmanager
def tapped(
    model: nn.Module,
    observers: Mapping[str, Observer],
    anchor: Tensor,
    rows: int,
    failed: Callable[[Exception], None] | None = None,
) -> Iterator[TapLog]:
    r"""Tap the modules of ``model`` named in ``observers`` while the block is open.

    Each call of a tapped module passes its output on unchanged, and ties it to ``anchor``. In the backward the
    observer receives the call's input and output gradient, and its result becomes a part of the anchor's gradient. So
    ``torch.autograd.grad(loss, anchor)`` visits all tapped layers, makes no gradient of any parameter, and holds the
    output gradient of one layer at a time. With an observer that returns :math:`\langle\delta_i, z_i\rangle` for each
    example that gradient is the derivative of the loss when each output moves by :math:`z_i`.

    The inputs that taps need in the backward are saved through autograd: activation checkpointing drops and recomputes
    them (the block must then stay open during the backward), and calls in a recomputation count once.

    An output without a batch dimension, ``(1, ...)`` or an embedding of ``(L,)`` positions, is expanded to ``rows``, so
    that its gradient arrives for each example rather than summed over them.

    Args:
        model: holds the modules; it gets no hooks beyond the block.
        observers: the functions to call, by module name.
        anchor: a leaf that requires a gradient.
        rows: B, the examples in the batch.
        failed: gets the errors of taps and observers, which then do nothing, so that forward and backward go on in any
            case; None raises them from within.

    Raises:
        ValueError: from within the forward, when a tapped module's input or output does not have one row per example.
    """
    log = TapLog()
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for name, observe in observers.items():
            safe = observe if failed is None else partial(_caught, observe, failed)
            hook = _Hook(name, safe, anchor, rows, log, failed)
            # first in line: the layer's own output, before other hooks may change it
            handle = modules[name].register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield log


@dataclass
class _Hook:
    name: str
    observe: Observer
    anchor: Tensor
    rows: int
    log: TapLog
    failed: Callable[[Exception], None] | None

    def __call__(
        self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object], output: object
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            self.log.unseen.add(self.name)
            return None
        self.log.calls[self.name] += 1
        try:
            inputs, expanded = self._rows_of(module, arguments, options, output)
        except ValueError as error:
            if self.failed is None:
                raise
            self.failed(error)
            return None
        # detached: an edge from the tap to the input's history would only make the engine wait for it
        tied: Tensor = _Tap.apply(expanded, self.anchor, inputs.detach(), self.observe)
        return tied

    def _rows_of(
        self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object], output: object
    ) -> tuple[Tensor, Tensor]:
        """Return the input of a call, and its output with one row for each example."""
        inputs = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        if len(inputs) != 1 or not isinstance(output, Tensor):
            raise LayerError(
                self.name,
                f"{len(inputs)} tensors to a {type(output).__name__}",
                f"expected module {self.name!r} ({type(module).__name__}) to map one tensor to one tensor, got "
                f"{len(inputs)} tensors and a {type(output).__name__}: {WAY_OUT}",
            )
        return inputs[0], _per_example(self.name, module, inputs[0], output, self.rows)


def _caught(observe: Observer, failed: Callable[[Exception], None], inputs: Tensor, delta: Tensor) -> Tensor | None:
    try:
        return observe(inputs, delta)
    except Exception as error:
        failed(error)
        return None


class _Tap(torch.autograd.Function):
    """The identity on ``output``, whose backward also shows the gradient to an observer."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, observe: Observer) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs)
        ctx.observe = observe
        return output.detach()  # not a view of the output: later operations may then work in place

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None) -> tuple[Tensor | None, ...]:
        if delta is None:
            return None, None, None, None
        (inputs,) = ctx.saved_tensors
        if not torch.is_autocast_enabled(delta.device.type):
            return delta, ctx.observe(inputs, delta), None, None
        with torch.autocast(delta.device.type, enabled=False):
            return delta, ctx.observe(inputs, delta), None, None


def _per_example(name: str, module: nn.Module, inputs: Tensor, output: Tensor, rows: int) -> Tensor:
    """Return the output with one row for each example, expanded where all examples share it."""
    positions = inputs.dim() == 1 and not inputs.is_floating_point() and output.dim() == 2
    if positions and len(inputs) == rows > 1:
        raise LayerError(
            name,
            f"{rows} entries for {rows} examples",
            f"cannot tell whether the {rows} entries that module {name!r} ({type(module).__name__}) looked up belong "
            f"to the {rows} examples of the batch or to {rows} positions: use another batch size",
        )
    if positions:
        output = output.unsqueeze(0)
    if output.dim() < 2 or output.shape[0] not in (1, rows):
        raise LayerError(
            name,
            f"{tuple(output.shape)} for {rows} examples",
            f"expected module {name!r} ({type(module).__name__}) to return one row for each of the {rows} examples, "
            f"got shape {tuple(output.shape)} from input {tuple(inputs.shape)}: {WAY_OUT}",
        )
    return output if output.shape[0] == rows else output.expand(rows, *output.shape[1:])


def missed_uses(
    loss: Tensor,
    parameters: Mapping[str, nn.Parameter],
    calls: Mapping[str, int],
    twins: Mapping[int, int] | None = None,
) -> dict[str, int]:
    """Return the parameters that the graph of ``loss`` uses more often than taps saw, with the number of uses.

    A weight that is used without its module being called (``F.linear(x, module.weight)``, a fused kernel) is invisible
    to hooks; autograd's graph shows it. Parameters outside of the graph have no gradient and are not reported.

    Args:
        loss: any tensor computed under grad.
        parameters: by name.
        calls: for each name, the number of tapped calls of modules that hold the parameter.
        twins: ids that stand for those of parameters in the graph:
            :func:`~liveselect.functional.sharding.whole_twins`.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    names |= {twin: names[parameter] for twin, parameter in (twins or {}).items() if parameter in names}
    uses = _count_uses(loss, names)
    return {name: count for name, count in uses.items() if count > calls.get(name, 0)}


def _count_uses(loss: Tensor, names: Mapping[int, str]) -> Counter[str]:
    """Return the number of operations that read each parameter; for a cast, which autocast caches, its readers."""
    readers: Counter[Node] = Counter()
    edges: list[tuple[Node, Node]] = []
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            readers[child] += 1
            edges.append((node, child))
            if child not in seen:
                seen.add(child)
                stack.append(child)
    uses: Counter[str] = Counter()
    for node, child in edges:
        name = names.get(id(getattr(child, "variable", None)))
        if name is not None:
            uses[name] += readers[node] if type(node).__name__ == "ToCopyBackward0" else 1
    return uses
