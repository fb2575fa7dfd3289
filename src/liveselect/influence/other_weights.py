"""Other weights for the live model: those of a checkpoint, or those after a short training on the reference set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.grammar import LiveModel, NotMeasurableError, Round
from liveselect.influence.one_step import trainable_parameters
from liveselect.influence.reference import ReferencePass, Weighted, mean_loss_and_gradient
from liveselect.preserve import Snapshot

PHASE = "train on the reference set"


class OtherWeights:
    """Values of parameters and buffers that take the place of the model's while a block is open.

    Args:
        values: by name, whole, or the parts that this rank holds.
        is_whole: whether they are whole, and are laid out like the model at the first use.
    """

    def __init__(self, values: Mapping[str, Tensor], is_whole: bool = False) -> None:
        self._values = dict(values)
        self._is_whole = is_whole

    @contextmanager
    def on(self, model: LiveModel) -> Iterator[None]:
        """Compute with these values inside the block; the model's own are put back after it, bit for bit."""
        model.view.reshard()  # a forward before may have left whole parameters in the place of this rank's parts
        targets = _named(model)
        if self._is_whole:
            laid_out = model.view.lay_out({n: v for n, v in self._values.items() if n in targets})
            self._values = {name: model.view.local(value) for name, value in laid_out.items()}
            self._is_whole = False
        own = {name: model.view.local(targets[name]).clone() for name in self._values}
        _write(model, targets, self._values)
        try:
            yield
        finally:
            _write(model, targets, own)

    def whole(self, model: LiveModel) -> dict[str, Tensor]:
        """Return the values whole and on CPU, for a file; a collective where ranks hold parts."""
        if self._is_whole:
            return self._values
        model.view.reshard()
        targets = _named(model)
        spread = model.view.spread(self._values, {name: targets[name] for name in self._values})
        return {name: model.view.whole(value).cpu() for name, value in spread.items()}


def trained_on_reference(
    model: LiveModel, round: Round, steps: int, learning_rate: float, rows: int
) -> tuple[OtherWeights, dict[str, float]]:
    """Return the weights after a short training of the live model on the reference set, and what it did to its loss.

    AdamW without weight decay and with moments of its own takes ``steps`` steps at a constant rate; each of them on the
    next batches of the reference set, of at least ``rows`` examples together, over and over in their order. The model
    is left as it was.

    Raises:
        NotMeasurableError: the loss of the reference set is not finite.
    """
    model.view.reshard()
    parameters = {name: p for name, p in model.module.named_parameters() if _is_trained(model, p)}
    reference = ReferencePass.load(model, round)
    items: list[Weighted] = list(zip(reference.batches, reference.counts, strict=True))
    with model.meter.phase(PHASE):
        snapshot = Snapshot(model.module, model.optimizer)
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=learning_rate, weight_decay=0.0)
        losses, place = [], 0
        try:
            for _ in range(steps):
                group, place = _next(items, place, rows)
                mine = group[distributed.rank() :: distributed.world_size()]
                with model.full_precision():
                    loss, parts = mean_loss_and_gradient(model, mine, lambda: items[0], parameters)
                losses.append(loss)
                for name, gradient in model.view.spread(parts, parameters).items():
                    parameters[name].grad = gradient.to(parameters[name].dtype)
                optimizer.step()
                torch.clear_autocast_cache()
                model.view.reshard()
            values = {name: model.view.local(parameter).clone() for name, parameter in parameters.items()}
        finally:
            snapshot.restore()
            for parameter in parameters.values():
                parameter.grad = None
            torch.clear_autocast_cache()
            model.view.reshard()
    if not torch.tensor(losses).isfinite().all():
        raise NotMeasurableError(
            f"the loss of the reference set became {losses} while training on it: lower learning_rate={learning_rate}"
        )
    return OtherWeights(values), {"reference_loss": losses[0], "reference_loss_trained": losses[-1]}


def _next(items: list[Weighted], place: int, rows: int) -> tuple[list[Weighted], int]:
    """Return the next items that hold ``rows`` examples, at most all of them, and the place after them."""
    group: list[Weighted] = []
    while len(group) < len(items) and sum(len(weights) for _, weights in group) < rows:
        group.append(items[place % len(items)])
        place += 1
    return group, place


def _is_trained(model: LiveModel, parameter: Tensor) -> bool:
    return any(parameter is each for each in trainable_parameters(model.optimizer))


def _named(model: LiveModel) -> dict[str, Tensor]:
    return dict(model.module.named_parameters()) | dict(model.module.named_buffers())


@torch.no_grad()
def _write(model: LiveModel, targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.view.local(targets[name]).copy_(value)
    torch.clear_autocast_cache()  # casts of the weights made before would be used again
    model.view.reshard()
