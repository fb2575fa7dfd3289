"""What a model computes for a fixed row: where a measurement changes that, it has left state behind."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from liveselect.functional.sharding import is_sharded
from liveselect.grammar import Batch, LiveModel
from liveselect.preserve.bits import sum_of_words, tensors_inside
from liveselect.preserve.measuring import measuring

_SEED = 1
_REPEATS = 2  # of a response that has changed, to tell state from kernels that add up in any order
_ROUNDING_SHARE = 1e-3  # of the size of a tensor: what such kernels may do; no state that matters does less


@dataclass
class Response:
    """The tensors of one forward and backward, in order.

    Attributes:
        places: where each was computed, as words of a sentence.
        bits: the sum of its bits.
        sizes: the sum of its squares.
    """

    places: list[str] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def note(self, place: str, values: object) -> None:
        """Note tensors, also inside of containers."""
        for value in tensors_inside(values):
            if value.is_sparse or value.is_complex() or not value.numel():
                continue
            held = value.detach().contiguous().flatten()
            self.places.append(place)
            self.bits.append(int(sum_of_words(held)))
            self.sizes.append(float(held.float().square().sum()))


def response_to(model: LiveModel, row: Batch) -> Response | None:
    """Return what a forward in training mode and a backward of ``row`` compute under a fixed seed; nothing of it stays.

    None where it cannot be had: the model is sharded, its loss is not finite, or it fails, which others report.
    """
    if is_sharded(model.module):
        return None
    work = "response", row["input_ids"].shape
    try:
        if model.meter.recall(model.module, *work) is None:  # apart: a backward that is counted rounds otherwise
            with measuring(model.module, model.optimizer, training_mode=True), _fixed(model.device):
                model.meter.learn(model.module, *work, trial=lambda: _loss_and_gradients(model, row))
        with (
            measuring(model.module, model.optimizer, training_mode=True),
            _fixed(model.device),
            model.meter.counting(model.module, *work),
        ):
            return _respond(model, row)
    except Exception:  # what fails here fails in the measurement too, with better words
        return None


def changed_since(before: Response | None, model: LiveModel, row: Batch) -> str | None:
    """Return a sentence on where the model answers ``row`` otherwise than ``before``, None where it does not."""
    after = None if before is None else response_to(model, row)
    if before is None or after is None or (place := _difference(before, after)) is None:
        return None
    if model.device.type != "cpu" and _is_rounding(before, after):
        repeats = [response_to(model, row) for _ in range(_REPEATS)]
        if any(each is None or _difference(after, each) for each in repeats):
            return None  # it never answers twice alike
    return (
        f"after a measurement the model answers the same row otherwise than before it, first {place}: its forward, its "
        "backward or a hook keeps state that measuring cannot put back (a global variable, the place of an iterator, "
        "an object of a library). Keep it in a buffer or an attribute of a module, or change it only where the module "
        "is in training mode. Nothing is measured from now on"
    )


def _respond(model: LiveModel, row: Batch) -> Response:
    response = Response()
    handles = []
    for name, module in model.module.named_modules():
        path = name or type(module).__name__
        parent = name.rpartition(".")[0] or type(model.module).__name__
        handles += [
            module.register_forward_pre_hook(
                partial(_on_input, response, f"in the forward of {parent!r}, before it calls {path!r}"),
                with_kwargs=True,
            ),
            module.register_forward_hook(partial(_on_output, response, f"in {path!r} ({type(module).__name__})")),
        ]
    try:
        losses, gradients = _loss_and_gradients(model, row)
    finally:
        for handle in handles:
            handle.remove()
    response.note("in loss_fn, after the model", losses)
    if not bool(losses.isfinite().all()):
        raise ValueError("the loss is not finite")
    # the backward comes to the last parameters first
    for name, gradient in reversed(gradients.items()):
        if gradient is not None:
            response.note(f"in the backward, at the gradient of {name!r}", gradient)
    return response


def _loss_and_gradients(model: LiveModel, row: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    with model.autocast():
        losses = model.losses(row)
    # backward() would run hooks that wait for whole gradients, and these may take optimizer steps
    named = {name: each for name, each in model.module.named_parameters() if each.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
    return losses, dict(zip(named, gradients, strict=True))


def _on_input(
    response: Response, place: str, _: object, inputs: tuple[object, ...], settings: dict[str, object]
) -> None:
    response.note(place, (inputs, settings))


def _on_output(response: Response, place: str, _: object, inputs: object, output: object) -> None:
    response.note(place, output)


def _difference(one: Response, other: Response) -> str | None:
    seen = zip(one.places, other.places, one.bits, other.bits, strict=False)
    for place, now, bits, other_bits in seen:
        if place != now or bits != other_bits:
            return now
    if len(one.places) != len(other.places):
        return "in the modules that it calls"
    return None


def _is_rounding(one: Response, other: Response) -> bool:
    pairs = zip(one.sizes, other.sizes, strict=False)
    return one.places == other.places and all(abs(a - b) <= _ROUNDING_SHARE * max(a, b) for a, b in pairs)


@contextmanager
def _fixed(device: torch.device) -> Iterator[None]:
    """Fix the random states, which :func:`measuring` puts back, and on an accelerator the order of sums."""
    torch.manual_seed(_SEED)  # noqa: TID251 - the model draws from the global states, which are kept
    np.random.seed(_SEED)  # noqa: NPY002, TID251
    random.seed(_SEED)
    if device.type == "cpu":
        yield
        return
    was, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=only_warned)
