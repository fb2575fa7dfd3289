"""Unrolls training with the model at hand, and pulls the reference loss back through it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.adjoint import Costate, Dynamics, State, Transition, final_costate, walk_back
from liveselect.functional.differences import Reach, central_difference, central_difference_product, length_of
from liveselect.functional.flops import forward_flops
from liveselect.functional.layer_pass import count_rows
from liveselect.functional.sampling import uniform_subset
from liveselect.functional.second_order import double_backward_product
from liveselect.functional.sharding import is_sharded, local, reshard
from liveselect.functional.updates import Vector, inner, norm
from liveselect.influence.dynamics import live_state
from liveselect.influence.rank_gradients import length_over_ranks, mean_over_ranks, spread
from liveselect.influence.reference import ReferencePass
from liveselect.influence.reference_gradient import mean_reference_gradient
from liveselect.influence.trajectory import Trajectory, pack_costate, unpack_costate
from liveselect.influence.vault import Vault
from liveselect.protocols import Batch, NotMeasurableError, RoundContext

HessianKind = Literal["double_backward", "central_difference"]
Weighting = Literal["tokens", "examples"]

_FORWARDS: dict[HessianKind, int] = {
    "double_backward": 9,
    "central_difference": 6,
}  # a forward and backward is worth three forwards
_DISAGREEMENT = {torch.float64: 1e-3, torch.float32: 0.1}  # several times what rounding does to differences
_COSTATE, _METRICS = "costate", "metrics"


@dataclass(frozen=True)
class Unroll:
    """A stretch of future training, and what is to be kept of it.

    Attributes:
        context: of the round.
        parameters: what moves, by name; the live tensors, written to in place. Where ranks hold them in parts, so are
            all vectors of the unroll.
        reference: gives the reference loss J.
        ids: for each step the candidates in its batch, ``(batch,)``.
        dynamics: how the parameters move.
        hessian: how Hessian products are taken.
        weighting: whether J is a mean over tokens or over examples.
        interval: steps between two kept states.
        scored_steps: the steps whose parameters and gradient costates are kept.
        hessian_rows: examples differentiated twice at once; None takes the batches as they come.
        denominator_floor: see :meth:`~liveselect.functional.adjoint.Dynamics.damp`.
        rate: what gradient costates are divided by, so that influence comes per unit learning rate.
    """

    context: RoundContext
    parameters: Mapping[str, nn.Parameter]
    reference: ReferencePass
    ids: Sequence[Tensor]
    dynamics: Dynamics
    hessian: HessianKind
    weighting: Weighting
    interval: int
    scored_steps: Sequence[int]
    hessian_rows: int | None
    denominator_floor: float
    rate: float

    def solve(self, vault: Vault) -> dict[str, float]:
        r"""Put :math:`(\theta_t, -p_t / \eta)` of every scored step into the vault, and return what is worth recording.

        Beside each pair stands how fast J changes along the second of it, on average over the steps after it.

        The parameters are left at some step of the unroll. What a durable vault holds already is not computed again.

        Raises:
            ValueError: the unroll diverges.
        """
        context, steps = self.context, len(self.ids)
        start = live_state(context, self.dynamics)
        trajectory = Trajectory(self.dynamics, start, self._gradient, steps, self.interval, vault, context.device)
        if not _all_equal([-1, vault.get(_COSTATE)[0]] if _COSTATE in vault else trajectory.kept):
            vault.clear()  # ranks that were stopped at different places begin again together
        reach = Reach()
        if _COSTATE in vault:
            below, packed, reach.share = vault.get(_COSTATE)
            costate: Costate | None = unpack_costate(packed, context.device) if below else None
        else:
            with context.phase("unroll training", steps, "steps") as advance:
                end = trajectory.forward(advance)
                loss, gradient = self._reference_gradient(end)
            self._check_curvature(gradient)
            below, costate = steps, final_costate(gradient, end)
            vault.put(_METRICS, {"reference_loss_unrolled": loss})
        with context.phase("pull back", below, "steps") as advance:
            for begin, transitions in trajectory.backward(below):
                for step, toward, earlier in self._walk(_present(costate), transitions, reach):
                    if step.index in self.scored_steps:
                        damped = self.dynamics.damp(toward, step, self.denominator_floor)
                        direction = {name: value / -self.rate for name, value in damped.items()}
                        change = inner(direction, _present(costate).parameters, self.dynamics.whole)
                        slope = abs(float(change)) / (steps - step.index)
                        vault.put(pair_name(step.index), (step.before.parameters, direction, slope))
                    costate = earlier
                    advance(1)
                vault.put(_COSTATE, (begin, {} if costate is None else pack_costate(costate), reach.share))
        trajectory.forget()
        return dict(vault.get(_METRICS))

    def _walk(
        self, costate: Costate, transitions: list[Transition], reach: Reach
    ) -> Iterator[tuple[Transition, Vector, Costate | None]]:
        def latest_first() -> Iterator[Transition]:
            while transitions:
                yield transitions.pop()

        return walk_back(
            self.dynamics,
            costate,
            latest_first(),
            lambda state: self._reference_gradient(state)[1],
            lambda transition, vector: self._curved(transition, vector, reach),
        )

    def _gradient(self, state: State, index: int) -> Vector:
        """Return the gradient of the mean loss of a step's batch."""
        self._load(state)
        batches = self._my_batches(index)
        self._charge(3, batches)
        return self._mean_gradient(batches, index)

    def _curved(self, transition: Transition, vector: Vector, reach: Reach) -> Vector:
        """Return the Hessian of that mean loss times a vector."""
        model, index = self.context.model, transition.index
        self._load(transition.before)
        rows = self.hessian_rows if self.hessian == "double_backward" else None
        batches = self._my_batches(index, rows)
        self._charge(_FORWARDS[self.hessian], batches)
        if self.hessian == "central_difference":
            length = length_over_ranks if is_sharded(model) else length_of
            moved = spread(vector, self.parameters)
            return central_difference(model, moved, lambda: self._mean_gradient(batches, index), reach, length)
        product = double_backward_product(model, self.context.loss_fn, batches, vector) if batches else None
        return self._over_ranks(product, sum(map(count_rows, batches)) / len(self.ids[index]))

    def _mean_gradient(self, batches: Sequence[Batch], index: int) -> Vector:
        """Return the gradient of the mean loss of a step's batch, given this rank's part of it."""
        ids = self.ids[index]

        def weighted(batch: Batch) -> tuple[Batch, Tensor]:
            return batch, torch.ones(count_rows(batch))

        def spare() -> tuple[Batch, Tensor]:
            return weighted(next(self.context.candidate_batches(ids[:1])))

        return mean_over_ranks(self.context, list(map(weighted, batches)), spare, self.parameters)[1]

    def _check_curvature(self, vector: Vector) -> None:
        """Raise RuntimeError when differentiating twice misses a part of the model.

        A custom kernel whose backward is no part of the graph makes no error there: its curvature is silently zero.
        """
        batches = self._my_batches(len(self.ids) - 1, self.hessian_rows)
        if self.hessian != "double_backward" or not batches:
            return
        model, loss_fn = self.context.model, self.context.loss_fn
        exact = double_backward_product(model, loss_fn, batches[:1], vector)
        close = central_difference_product(model, loss_fn, batches[:1], vector)
        self._charge(_FORWARDS["double_backward"] + _FORWARDS["central_difference"], batches[:1])
        error = float(norm({name: exact[name] - close[name] for name in exact}) / norm(close).clamp(min=1e-30))
        if error > _DISAGREEMENT[next(iter(vector.values())).dtype]:
            raise RuntimeError(
                f"two ways to find the curvature of the training loss differ by {error:.0%}: the model has a part that "
                "cannot be differentiated twice (a custom kernel), or a loss with jumps. Use "
                'hessian="central_difference"'
            )

    def _my_batches(self, index: int, rows: int | None = None) -> list[dict[str, Any]]:
        """Return this rank's part of a step's batch, in batches of at most ``rows``."""
        ids = self.ids[index]
        mine = ids[distributed.shard(len(ids))]
        batches = self.context.candidate_batches(mine) if len(mine) else iter(())
        return [part for batch in batches for part in split_rows(batch, rows)]

    def _reference_gradient(self, state: State) -> tuple[float, Vector]:
        """Return J at a state, and its gradient."""
        self._load(state)
        counts = self.reference.counts
        weights = counts if self.weighting == "tokens" else [(count > 0).long() for count in counts]
        loss, gradient = mean_reference_gradient(self.context, self.reference, self.parameters, weights)
        if not math.isfinite(loss):
            raise NotMeasurableError(
                f"the reference loss became {loss} while {len(self.ids)} steps of training were unrolled: "
                "lower learning_rate, unroll fewer steps, or look at the training loss"
            )
        return loss, {name: local(value) for name, value in gradient.items()}

    def _over_ranks(self, mine: Mapping[str, Tensor] | None, share: float) -> Vector:
        """Return the mean over all ranks' examples, given the mean over this rank's, which are a share of them."""
        parameters = self.parameters
        if distributed.world_size() == 1 and mine is not None:
            return {name: mine[name] for name in parameters}
        zeros = [torch.zeros_like(parameter) for parameter in parameters.values()]
        parts = zeros if mine is None else [mine[name] * share for name in parameters]
        whole = distributed.sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        sums = whole.split([part.numel() for part in parts])
        return {
            name: value.view_as(parameter) for (name, parameter), value in zip(parameters.items(), sums, strict=True)
        }

    def _load(self, state: State) -> None:
        load_parameters(self.context.model, self.parameters, state.parameters)

    def _charge(self, forwards: int, batches: Sequence[Batch]) -> None:
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        self.context.meter.add_flops(forwards * forward_flops(self.context.model, tokens))


def unrolled_ids(context: RoundContext, steps: int, size: int) -> list[Tensor]:
    """Draw the candidates of every unrolled step, ``(size,)`` each; no candidate twice while there are others."""
    generator = context.generator("unrolled batches")
    drawn: list[Tensor] = []
    missing = steps * size
    while missing > 0:
        count = min(missing, len(context.candidates))
        rows = uniform_subset(len(context.candidates), count, generator)
        drawn.append(context.candidates[rows[torch.randperm(count, generator=generator)]])
        missing -= count
    return list(torch.cat(drawn).split(size))


def load_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter], values: Vector) -> None:
    """Write values into the live parameters of ``model``, in place; into this rank's parts where they are sharded."""
    reshard(model)  # else the next forward would not see what is written
    with torch.no_grad():
        torch._foreach_copy_([local(parameter) for parameter in parameters.values()], [values[n] for n in parameters])
    torch.clear_autocast_cache()  # casts of the weights before this would be used again


def split_rows(batch: Batch, rows: int | None) -> list[dict[str, Any]]:
    """Return a batch in parts of at most ``rows`` examples; what has no row for each example goes into every part."""
    count = count_rows(batch)
    if rows is None or rows >= count:
        return [dict(batch)]

    def part(value: Any, begin: int) -> Any:
        per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        return value[begin : begin + rows] if per_example else value

    return [{key: part(value, begin) for key, value in batch.items()} for begin in range(0, count, rows)]


def _all_equal(mine: list[int]) -> bool:
    return all(other == mine for other in distributed.gather_objects(mine))


def _present(costate: Costate | None) -> Costate:
    if costate is None:
        raise RuntimeError("the costate of an earlier step is missing, although not all steps were pulled back")
    return costate


def pair_name(index: int) -> str:
    """Return the name under which a scored step's parameters and direction are kept."""
    return f"pair-{index}"
