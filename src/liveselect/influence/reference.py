"""The loss over the reference set, arranged so that one pass costs little."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.flops import Flops
from liveselect.functional.layer_pass import count_rows
from liveselect.functional.updates import Vector
from liveselect.grammar import (
    IGNORE_INDEX,
    REFERENCE_SET,
    REFERENCE_WEIGHT,
    Batch,
    CandidateSource,
    LiveModel,
    NotMeasurableError,
    Round,
)
from liveselect.losses import (
    TARGET_COLUMNS,
    at_targets,
    causal_lm_loss,
    loss_sums,
    mean_of,
    reference_loss,
    target_counts,
    targets_shape,
    token_weights,
)
from liveselect.seeding import generator_for

Precision = Literal["float32", "training"]

Weighted = tuple[Batch, Tensor]
"""A batch, and the weight ``(B,)`` of each of its examples."""

_MIN_BATCH_POSITIONS = 2048  # smaller batches leave an accelerator idle
_MIN_LENGTH_RATIO = 0.8  # of a row to the longest of its batch: shorter ones need less padding in the next batch
_PADDING_VALUES = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE_INDEX}


@dataclass(frozen=True)
class ReferencePass:
    """The batches of the reference set, on the model's device.

    Attributes:
        batches: the batches of the set.
        counts: for each batch ``(B,)`` on CPU, the tokens of each example that carry loss; in a mixture of sets, times
            the weight of its set.
        tokens: positions that the model reads in one pass, padding included.
        names: the sets of a mixture, none where there is a single one.
        sets: for each batch, the number of its set.
        parts: the mean loss of each set in the last pass, nats per token, as metrics by name; filled by the passes.
    """

    batches: list[Batch]
    counts: list[Tensor]
    tokens: int
    names: tuple[str, ...] = ()
    sets: list[int] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, model: LiveModel, round: Round, rows: int | None = None) -> "ReferencePass":
        """Fetch the reference set once, or ``rows`` of it: others in each round, all of them in turn.

        For :func:`causal_lm_loss` rows are cut after their last target and grouped with rows of like length, which
        changes no loss: a causal model looks only to the left. Any other loss gets the source's own batches.

        Raises:
            ValueError: no token of the reference set carries loss.
        """
        batches = list(round.source.reference())
        if rows is not None:
            batches = _in_turn(batches, rows, round)
        if model.view.inner_loss(model.loss_fn) is causal_lm_loss:
            batches = [at_targets(batch) for apart in _by_set(batches) for batch in _grouped(apart)]
        counts = [token_weights(batch).cpu() for batch in batches]
        if not sum(int(count.sum()) for count in counts):
            raise ValueError(
                f"no token of the reference set carries loss ({len(batches)} batches): expected labels other than "
                f"{IGNORE_INDEX} beyond the first column. Check how the reference set is prepared and masked"
            )
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        names = round.source.reference_names
        sets = [_set_of(batch) for batch in batches] if names else []
        return cls([model.to_device(batch) for batch in batches], counts, tokens, names, sets)

    def part(self, begin: int, rows: int | None = None) -> "ReferencePass":
        """Return the rows from ``begin`` on; ``rows`` of them, where that is given, so that ranks share them out."""
        end = math.inf if rows is None else begin + rows
        most = None if rows is None else -(-rows // distributed.world_size())
        batches, place = list[Batch](), 0
        for batch, counts in zip(self.batches, self.counts, strict=True):
            first, last = max(0, begin - place), int(min(len(counts), end - place))
            place += len(counts)
            if first < last:
                inside = {key: _rows_of(value, len(counts), first, last) for key, value in batch.items()}
                batches += split_rows(inside, most)
        counted = [token_weights(batch).cpu() for batch in batches]
        sets = [_set_of(batch) for batch in batches] if self.names else []
        return ReferencePass(batches, counted, sum(batch["input_ids"].numel() for batch in batches), self.names, sets)

    @property
    def examples(self) -> int:
        """Number of reference examples."""
        return sum(len(count) for count in self.counts)

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return round(self.weight)

    @property
    def weight(self) -> float:
        """Their weights added up, which are 1 each unless sets have weights of their own."""
        return sum(float(count.sum()) for count in self.counts)

    def example_weights(self) -> list[Tensor]:
        """Return for each batch ``(B,)`` what its examples count in a mean over examples; 0 without a target.

        In a mixture the examples of each set share out its weight, whatever their number.
        """
        return example_weights(self.batches)

    def by_set(self) -> dict[str, tuple[float, float]]:
        """Return the mean loss of each set in the last pass, and the weight of its tokens, by name of the metric."""
        weights = dict.fromkeys(self.parts, 0.0)
        for number, count in zip(self.sets, self.counts, strict=False):
            weights[_metric_of(self.names[number])] += float(count.sum())
        return {name: (mean, weights[name]) for name, mean in self.parts.items()}

    @torch.no_grad()  # not inference_mode: tensors that a model caches in it cannot be used in training
    def loss(self, model: LiveModel, precision: Precision = "float32") -> float:
        """Return the mean loss over all reference tokens, nats per token, and charge its FLOPs to the meter.

        ``float32`` switches autocast off and computes in the precision of the parameters; ``training`` computes as
        training does. Ranks that hold parts of the parameters share out the batches, and all get the same loss.
        """
        torch.clear_autocast_cache()  # casts of the weights made before the last step would be used again
        sets = self.sets or [0] * len(self.batches)
        shares = model.view.share(list(zip(self.batches, self.counts, sets, strict=True)))
        losses = []
        with model.full_precision() if precision == "float32" else model.autocast():
            for (batch, _, _), _ in shares:
                with counting(model, "forward", batch):
                    losses.append(model.losses(batch))
        model.view.reshard()  # a step comes next
        weights = [count * own for (_, count, _), own in shares]
        total = sum(float(count.sum()) for count in self.counts)
        share = sum(float(weight.sum()) for weight in weights) / total
        mine = torch.tensor(reference_loss(losses, weights) * share, dtype=torch.float64)
        if self.names:
            sums = self._sums_by_set(losses, weights, [number for (_, _, number), _ in shares])
            self._note_parts(model.view.sum(sums))
        return float(model.view.sum(mine))

    def _sums_by_set(self, losses: Sequence[Tensor], weights: Sequence[Tensor], sets: Sequence[int]) -> Tensor:
        """Return the weighted losses and the weights of every set, ``(sets, 2)`` float64."""
        sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        for each, weight, number in zip(losses, weights, sets, strict=True):
            sums[number] += loss_sums(each, weight)
        return sums

    def _note_parts(self, sums: Tensor) -> None:
        means = [total / max(weight, 1e-30) for total, weight in sums.tolist()]
        self.parts.update({_metric_of(name): mean for name, mean in zip(self.names, means, strict=True)})

    def gradient(
        self,
        model: LiveModel,
        parameters: Mapping[str, nn.Parameter],
        weights: Sequence[Tensor] | None = None,
        seen: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[float, Vector]:
        """Return the mean loss over the set, nats per token, and its gradient in the named ``parameters``.

        Ranks share out the batches; for the form of the gradient see :func:`mean_loss_and_gradient`.

        Args:
            model: in the precision that is wanted.
            parameters: to differentiate in, by name.
            weights: for each batch ``(B,)``, of its examples; by default their numbers of tokens.
            seen: called with the losses and the weights ``(B,)`` of each batch of this rank.
        """
        items = list(zip(self.batches, self.counts if weights is None else weights, strict=True))
        mine = items[distributed.rank() :: distributed.world_size()]
        if not self.names:
            return mean_loss_and_gradient(model, mine, lambda: items[0], parameters, seen)
        found: list[tuple[Tensor, Tensor]] = []

        def note(losses: Tensor, counted: Tensor) -> None:
            found.append((losses, counted))
            if seen is not None:
                seen(losses, counted)

        result = mean_loss_and_gradient(model, mine, lambda: items[0], parameters, note)
        numbers = self.sets[distributed.rank() :: distributed.world_size()]
        sums = self._sums_by_set([each for each, _ in found], [weight for _, weight in found], numbers)
        self._note_parts(distributed.sum_over_ranks(sums))
        return result


def mean_loss_and_gradient(
    model: LiveModel,
    items: Sequence[Weighted],
    spare: Callable[[], Weighted],
    parameters: Mapping[str, nn.Parameter],
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[float, Vector]:
    """Return the weighted mean loss over the examples of all ranks, and its gradient in the named ``parameters``.

    The gradient is float32 or finer. It is whole on every rank, except for parameters of which ranks hold parts: each
    then holds the same part of the gradient, as a plain tensor.

    Args:
        model: in the precision that is wanted.
        items: of this rank; ranks may have unequally many.
        spare: the item that a rank without further ones computes and does not count, where all ranks must compute.
        parameters: to differentiate in, by name.
        seen: called with the losses and the weights ``(B,)`` of each batch that counts.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # of losses and of weights
    # where ranks hold parts, a backward reaches all trained parameters
    everything = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    reached = everything if model.view.in_parts else list(parameters.values())

    def losses() -> Iterator[Tensor]:
        for (batch, weights), counts in model.view.in_step(items, spare):
            charge_gradient(model, batch, reached)
            each = model.losses(batch)
            weighted = each @ (weights * counts).to(each)
            if seen is not None and counts:
                seen(each.detach().double().cpu(), weights.double().cpu())
            yield weighted
            sums.add_(torch.stack([weighted.detach().double().cpu(), weights.sum(dtype=torch.float64) * counts]))

    gradient = model.view.summed_gradient(losses(), parameters)
    loss, weight = distributed.sum_over_ranks(sums).tolist()
    return loss / weight, {name: value.div_(weight) for name, value in gradient.items()}


def counting(
    model: LiveModel, what: str, *batches: Batch, trial: Callable[[], object] | None = None
) -> AbstractContextManager[None]:
    """Charge the FLOPs of the block, which does ``what`` with batches; see :meth:`CostMeter.counting`.

    With a trial every rank must call it where ranks hold parts of the parameters.
    """
    work = _work(model, what, *batches)
    # where a backward is a collective, a rank that knows the cost tries again with those that do not
    if trial is not None and model.view.any(model.meter.recall(model.module, *work) is None):
        model.meter.learn(model.module, *work, trial=trial)
    return model.meter.counting(model.module, *work)


def charge_gradient(model: LiveModel, batch: Batch, parameters: Sequence[nn.Parameter]) -> None:
    """Charge the FLOPs of a forward and backward of the losses of a batch, in the precision context that is open.

    They are counted on one and on two of its rows, where the loss is known to be that of each row by itself: every
    round brings batches of other shapes, and a trial of the whole would cost as much as the gradient.
    """

    def gradient(rows: Batch) -> None:
        loss = model.losses(rows).sum()
        if loss.requires_grad:
            model.view.gradients(loss, parameters)

    what, rows = f"gradient in {len(parameters)}", count_rows(batch)
    alone = model.view.inner_loss(model.loss_fn) is causal_lm_loss and not model.view.in_parts
    if rows <= 2 or not alone:
        with counting(model, what, batch, trial=lambda: gradient(batch)):
            return
    cut = batch if TARGET_COLUMNS in batch else at_targets(batch)  # else a row may have fewer targets than the batch
    one, two = (_counted(model, what, split_rows(cut, few)[0], gradient) for few in (1, 2))
    each = Flops(two.total - one.total, two.repeated - one.repeated)
    more = each.times(rows - 1)
    model.meter.charge(Flops(one.total + more.total, one.repeated + more.repeated, one.uncounted))


def _counted(model: LiveModel, what: str, batch: Batch, trial: Callable[[Batch], object]) -> Flops:
    """Return the FLOPs of what a trial does with a batch, counted the first time for each shape."""
    work = _work(model, what, batch)
    known = model.meter.recall(model.module, *work)
    return known if known is not None else model.meter.learn(model.module, *work, trial=lambda: trial(batch))


def _work(model: LiveModel, what: str, *batches: Batch) -> tuple[Hashable, ...]:
    """Return what the cost of doing something with batches depends on."""
    trained = tuple(parameter.requires_grad for parameter in model.module.parameters())
    return what, tuple(_shapes(batch) for batch in batches), torch.is_grad_enabled(), trained


def _shapes(batch: Batch) -> Hashable:
    """Return what the cost of a batch depends on: its tensors' shapes, and where its targets are."""
    shapes = [(key, tuple(value.shape)) for key, value in batch.items() if isinstance(value, Tensor)]
    return tuple(sorted(shapes)), targets_shape(batch)


def held_out_loss(model: LiveModel, source: CandidateSource, ids: Tensor) -> float:
    """Return the mean loss over the tokens of the candidates ``ids (n,)``, nats per token; a collective.

    Ranks share them out. Call it with the model in eval mode.
    """
    spare = next(iter(source.candidates(ids[:1])))
    mine = ids[distributed.shard(len(ids))]
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), model.autocast():
        batches = source.candidates(mine) if len(mine) else ()
        for batch, counts in model.view.in_step(batches, lambda: spare):
            sums += loss_sums(model.losses(model.to_device(batch)), target_counts(batch).cpu() * counts)
    return mean_of(distributed.sum_over_ranks(sums))


def _set_of(batch: Batch) -> int:
    return int(batch[REFERENCE_SET][0]) if REFERENCE_SET in batch else 0


def example_weights(batches: Sequence[Batch]) -> list[Tensor]:
    """Return for each batch ``(B,)`` float64 on CPU what its examples count in a mean over reference examples.

    Those of one set count alike, and the sets of a mixture as they are weighted; examples without a target count 0.
    """
    counted = [(target_counts(batch) > 0).cpu().double() for batch in batches]
    sets = [_set_of(batch) for batch in batches]
    total, present = dict.fromkeys(sets, 0.0), dict.fromkeys(sets, 0.0)
    for batch, own, number in zip(batches, counted, sets, strict=True):
        total[number] += float(token_weights(batch).double().sum())
        present[number] += float(own.sum())
    everything = sum(total.values())
    return [
        own * total[number] / max(present[number], 1.0) * sum(present.values()) / max(everything, 1e-30)
        for own, number in zip(counted, sets, strict=True)
    ]


def _by_set(batches: list[Batch]) -> list[list[Batch]]:
    """Return the batches of every set of a mixture by themselves."""
    apart: dict[int, list[Batch]] = {}
    for batch in batches:
        apart.setdefault(_set_of(batch), []).append(batch)
    return list(apart.values())


def _grouped(batches: list[Batch]) -> list[Batch]:
    """Return the rows of one set in batches of like length, which know their set and its weight as before."""
    grouped = group_by_length(batches)
    kept = {key: batches[0][key][:1] for key in (REFERENCE_SET, REFERENCE_WEIGHT) if key in batches[0]}
    return [{**batch, **{key: one.expand(count_rows(batch)) for key, one in kept.items()}} for batch in grouped]


def _metric_of(name: str) -> str:
    return f"reference_loss/{name}"


def _in_turn(batches: list[Batch], rows: int, round: Round) -> list[Batch]:
    """Return ``rows`` rows of all batches, those whose turn it is in a round."""
    counts = [count_rows(batch) for batch in batches]
    total = sum(counts)
    if rows >= total:
        return batches
    order = torch.randperm(total, generator=generator_for(round.seed, 0, "reference rows"))
    mine = order[(torch.arange(rows) + round.index * rows) % total].sort().values
    parts, begin = list[Batch](), 0
    for batch, count in zip(batches, counts, strict=True):
        own = mine[(mine >= begin) & (mine < begin + count)] - begin
        begin += count
        if len(own):
            parts.append({key: value[own] if len(value) == count else value for key, value in batch.items()})
    return parts


def split_rows(batch: Batch, rows: int | None) -> list[dict[str, Tensor]]:
    """Return a batch in parts of at most ``rows`` examples; tensors without a row for each go into every part."""
    count = count_rows(batch)
    if rows is None or rows >= count:
        return [dict(batch)]

    return [
        {key: _rows_of(value, count, begin, begin + rows) for key, value in batch.items()}
        for begin in range(0, count, rows)
    ]


def _rows_of(value: Tensor, count: int, begin: int, end: int) -> Tensor:
    """Return some rows of a tensor of a batch of ``count`` examples; all of one that has none for each."""
    per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
    return value[begin:end] if per_example else value


def require_finite(loss: float, cure: str, when: str = "") -> None:
    """Raise NotMeasurableError for a reference loss from which no influence can be measured."""
    if not math.isfinite(loss):
        raise NotMeasurableError(
            f"the reference loss {when}{' ' if when else ''}is {loss}; influence cannot be measured from there: {cure}"
        )


def group_by_length(batches: list[Batch]) -> list[Batch]:
    """Return the rows of all batches cut after their last target, longest first, in batches of like length.

    No batch holds more tokens than the largest one given. Rows without targets are left out, and of the keys only those
    that :func:`causal_lm_loss` reads are kept. A mask that hides nothing to the left of a target is dropped, because
    attention is faster without one.
    """
    keys = [key for key in _PADDING_VALUES if key == "labels" or any(key in batch for batch in batches)]
    if any(key not in batch or batch[key].dim() != 2 for batch in batches for key in keys if key != "labels"):
        return batches
    room = max((batch["input_ids"].numel() for batch in batches), default=0)
    rows = [row for batch in batches for row in _rows_to_last_target(batch, keys)]
    if all(bool(row["attention_mask"].all()) for row in rows if "attention_mask" in row):
        keys = [key for key in keys if key != "attention_mask"]
    rows.sort(key=_length, reverse=True)
    groups: list[list[dict[str, Tensor]]] = []
    for row in rows:
        if not groups or _is_complete(groups[-1], _length(row), room):
            groups.append([])
        groups[-1].append(row)
    return [_stack(group, keys) for group in groups]


def _is_complete(group: list[dict[str, Tensor]], next_length: int, room: int) -> bool:
    """Whether the next row begins a new group: there is no room, or much padding and enough rows without it."""
    width = _length(group[0])
    full = (len(group) + 1) * width > room
    return full or (len(group) * width >= _MIN_BATCH_POSITIONS and next_length < _MIN_LENGTH_RATIO * width)


def _rows_to_last_target(batch: Batch, keys: list[str]) -> list[dict[str, Tensor]]:
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    carries = labels != IGNORE_INDEX
    carries[:, 0] = False  # nothing predicts the first token
    ends = (carries * torch.arange(labels.shape[1], device=labels.device)).argmax(dim=1) + 1
    tensors = {**batch, "labels": labels}
    return [
        {key: tensors[key][index, :end] for key in keys}
        for index, (end, any_target) in enumerate(zip(ends.tolist(), carries.any(dim=1).tolist(), strict=True))
        if any_target
    ]


def _length(row: dict[str, Tensor]) -> int:
    return len(row["input_ids"])


def _stack(rows: list[dict[str, Tensor]], keys: list[str]) -> dict[str, Tensor]:
    width = _length(rows[0])
    return {
        key: torch.stack([F.pad(row[key], (0, width - len(row[key])), value=_PADDING_VALUES[key]) for row in rows])
        for key in keys
    }
