"""Taps: see the input and the output gradient of chosen layers during a backward, and leave the model as it was."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Observer = Callable[[Tensor, Tensor], Tensor | None]
"""Called in the backward with a layer's input ``(B, ...)`` and output gradient ``(B, ...)``; its result is added to the
gradient of the anchor. Inputs that all examples share (position ids) keep their own shape, and rows that a model has
joined, ``(B * T, ...)``, come apart again as ``(B, T, ...)``."""


WAY_OUT = 'leave its parameters out (exclude=[...]), or measure with engine="central_difference"\''
"""What helps where a layer cannot be observed, in the words of the estimators."""


class HiddenError(ValueError):
    """The gradients of single examples cannot be seen in some layers as they are observed."""


class LayerError(HiddenError):
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
        unusual: modules of whose calls it is not plain which rows belong to which example, or that compute once more.
        widths: numbers of tokens of an example, as embeddings got them.
        paused: whether calls are to be passed over, because a layer computes once more.
    """

    calls: Counter[str] = field(default_factory=Counter)
    unseen: set[str] = field(default_factory=set)
    unusual: set[str] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    paused: bool = False


@dataclass(frozen=True)
class Call:
    """A call of a module that takes or returns several tensors, or that is observed for what stands below it.

    Attributes:
        name: of the module.
        arguments: of its forward; tensors are detached.
        options: the named ones.
        rows: B.
        widths: numbers of tokens that an example may have.
        autocast: the type that its forward computes matrix products in, None outside of autocast.
        random: states of the random generators before it, empty where nothing is random.
        log: of the taps.
    """

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    rows: int
    widths: frozenset[int]
    autocast: torch.dtype | None
    random: tuple[Tensor, ...]
    log: TapLog

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Open a block in which the module computes as it did, and no tap sees it."""
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            if self.random:
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self.random[0])
                if devices:
                    torch.cuda.set_rng_state(self.random[1], device)
            enabled = self.autocast is not None
            stack.enter_context(torch.autocast(device.type, dtype=self.autocast, enabled=enabled))
            before, self.log.paused = self.log.paused, True
            stack.callback(setattr, self.log, "paused", before)
            yield

    def by_example(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the module's output with one row for each example; joined rows come apart.

        Raises:
            LayerError: its rows are not those of the examples.
        """
        rows = _rows_apart(tensor, self.rows, self.widths)
        if rows is None:
            raise LayerError(
                self.name,
                f"{tuple(tensor.shape)} for {self.rows} examples",
                f"expected module {self.name!r} to return one row for each of the {self.rows} examples, got shape "
                f"{tuple(tensor.shape)}: {WAY_OUT}",
            )
        return rows


CallObserver = Callable[[Call, tuple[Tensor | None, ...]], Tensor | None]
"""Called in the backward with a call, and with the gradient of each floating tensor that it returned, None where the
loss does not depend on it; else as an :data:`Observer`."""


def floating_leaves(output: object) -> tuple[list[Any], TreeSpec, list[int]]:
    """Return all leaves of a nested output, its structure, and the indices of the floating tensors among them."""
    leaves, spec = tree_flatten(output)
    return leaves, spec, [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _rows_apart(tensor: Tensor, rows: int, widths: Sequence[int] | frozenset[int]) -> Tensor | None:
    if tensor.dim() and tensor.shape[0] in (1, rows) and (tensor.shape[0] == rows or tensor.dim() > 2):
        return tensor
    for width in widths:
        if tensor.dim() and tensor.shape[0] == rows * width:
            return tensor.unflatten(0, (rows, width))
    return None


@contextmanager
def tapped(
    model: nn.Module,
    observers: Mapping[str, Observer],
    anchor: Tensor,
    rows: int,
    failed: Callable[[Exception], None] | None = None,
    replayed: Mapping[str, CallObserver] | None = None,
    instead: Mapping[str, CallObserver] | None = None,
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
        replayed: observers of whole calls, by module name; they may stand beside those of one tensor.
        instead: observers that take the place of those of one tensor, by module name, where a call has several.

    Raises:
        ValueError: from within the forward, when a tapped module's input or output does not have one row per example.
    """
    log = TapLog()
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for module in modules.values():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(partial(_note_width, log, rows)).remove)
        for name, look in (replayed or {}).items():
            call_hook = _CallHook(name, _safe(look, failed), anchor, rows, log, failed)
            first = modules[name].register_forward_pre_hook(call_hook.begin, prepend=True)
            stack.callback(first.remove)
            handle = modules[name].register_forward_hook(call_hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        for name, observe in observers.items():
            other = (instead or {}).get(name)
            otherwise = None if other is None else _CallHook(name, _safe(other, failed), anchor, rows, log, failed)
            hook = _Hook(name, _safe(observe, failed), anchor, rows, log, failed, otherwise)
            # first in line: the layer's own output, before other hooks may change it
            handle = modules[name].register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield log


def _note_width(log: TapLog, rows: int, module: nn.Module, arguments: tuple[object, ...]) -> None:
    ids = arguments[0] if arguments else None
    if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == rows:
        log.widths.add(ids.shape[1])


@dataclass
class _Hook:
    name: str
    observe: Observer
    anchor: Tensor
    rows: int
    log: TapLog
    failed: Callable[[Exception], None] | None
    otherwise: "_CallHook | None" = None

    def __call__(
        self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object], output: object
    ) -> object:
        if self.log.paused:
            return None
        if not torch.is_grad_enabled():
            self.log.unseen.add(self.name)
            return None
        inputs = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        if self.otherwise is not None and not (len(inputs) == 1 and isinstance(output, Tensor)):
            return self.otherwise(module, arguments, options, output)
        self.log.calls[self.name] += 1
        try:
            if len(inputs) != 1 or not isinstance(output, Tensor):
                raise LayerError(
                    self.name,
                    f"{len(inputs)} tensors to a {type(output).__name__}",
                    f"expected module {self.name!r} ({type(module).__name__}) to map one tensor to one tensor, got "
                    f"{len(inputs)} tensors and a {type(output).__name__}: {WAY_OUT}",
                )
            apart = _apart(inputs[0], output, self.rows, self.log.widths)
            expanded = output if apart is not None else _per_example(self.name, module, inputs[0], output, self.rows)
        except ValueError as error:
            if self.failed is None:
                raise
            self.failed(error)
            return None
        observe = self.observe
        if apart is not None or (output.dim() == 2 and inputs[0].is_floating_point()):
            self.log.unusual.add(self.name)  # rows may be tokens, as many as there are examples by chance
        if apart is not None:
            observe = partial(_observe_apart, observe, *apart)
        # detached: an edge from the tap to the input's history would only make the engine wait for it
        tied: Tensor = _Tap.apply(expanded, self.anchor, inputs[0].detach(), observe)
        return tied


def _apart(inputs: Tensor, output: Tensor, rows: int, widths: set[int]) -> tuple[int, int] | None:
    """Return B and T where all tokens of all examples are the rows of a layer, example after example."""
    if not output.dim() or not inputs.dim() or len(inputs) != len(output) or len(output) == rows:
        return None
    if inputs.dim() == 1 and not inputs.is_floating_point():
        return None  # positions that all examples share look the same
    return next(((rows, width) for width in widths if len(output) == rows * width), None)


def _observe_apart(observe: Observer, rows: int, width: int, inputs: Tensor, delta: Tensor) -> Tensor | None:
    return observe(inputs.unflatten(0, (rows, width)), delta.unflatten(0, (rows, width)))


@dataclass
class _CallHook:
    name: str
    observe: CallObserver
    anchor: Tensor
    rows: int
    log: TapLog
    failed: Callable[[Exception], None] | None
    states: list[tuple[Tensor, ...]] = field(default_factory=list)

    def begin(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        """Keep the states of the random generators before a call that may draw numbers."""
        if not self.log.paused:
            self.states.append(_random_states(self.anchor.device) if module.training else ())

    def __call__(
        self, module: nn.Module, arguments: tuple[object, ...], options: dict[str, object], output: object
    ) -> object:
        if self.log.paused:
            return None
        random = self.states.pop() if self.states else ()
        if not torch.is_grad_enabled():
            self.log.unseen.add(self.name)
            return None
        self.log.calls[self.name] += 1
        self.log.unusual.add(self.name)
        leaves, spec, floating = floating_leaves(output)
        inputs, in_spec = tree_flatten((arguments, options))
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        kept = [None if isinstance(value, Tensor) else value for value in inputs]

        def look(saved: Sequence[Tensor], deltas: tuple[Tensor | None, ...]) -> Tensor | None:
            values = list(kept)
            for index, tensor in zip(tensors, saved, strict=True):
                values[index] = tensor
            given, named = tree_unflatten(values, in_spec)
            widths = frozenset(self.log.widths)
            return self.observe(Call(self.name, given, named, self.rows, widths, autocast, random, self.log), deltas)

        kind = self.anchor.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        outputs = [self._for_each(leaves[i]) for i in floating]
        saved = [inputs[i].detach() for i in tensors]
        tied = _CallTap.apply(self.anchor, look, len(outputs), *outputs, *saved)
        for index, tensor in zip(floating, tied, strict=True):
            leaves[index] = tensor
        return tree_unflatten(leaves, spec)

    def _for_each(self, output: Tensor) -> Tensor:
        """Return an output that all examples share as one row for each, so that its gradient arrives apart."""
        shared = self.rows > 1 and output.dim() > 2 and output.shape[0] == 1
        return output.expand(self.rows, *output.shape[1:]) if shared else output


def _random_states(device: torch.device) -> tuple[Tensor, ...]:
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *own)


def _safe(observe: Callable[..., Tensor | None], failed: Callable[[Exception], None] | None) -> Any:
    return observe if failed is None else partial(_caught, observe, failed)


def _caught(observe: Callable[..., Tensor | None], failed: Callable[[Exception], None], *seen: Any) -> Tensor | None:
    try:
        return observe(*seen)
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


class _CallTap(torch.autograd.Function):
    """The identity on several outputs, whose backward also shows their gradients to an observer."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        look: Callable[[Sequence[Tensor], tuple[Tensor | None, ...]], Tensor | None],
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        ctx.look, ctx.inputs = look, len(tensors) - count
        return tuple(output.detach() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None, None, *deltas, *[None] * ctx.inputs)
        present = next((delta for delta in deltas if delta is not None), None)
        if present is None:
            return None, *rest
        with torch.autocast(present.device.type, enabled=False):
            return ctx.look(ctx.saved_tensors, deltas), *rest


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
    # else one row may be one token by chance
    shared = output.dim() > 2 or rows == 1 or not inputs.is_floating_point()
    if output.dim() < 2 or (output.shape[0] != rows and not (shared and output.shape[0] == 1)):
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
