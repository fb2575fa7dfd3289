"""Unrolls training with the model at hand, and pulls the reference loss back through it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.adjoint import Costate, Dynamics, State, Transition, final_costate, walk_back
from liveselect.functional.differences import Reach, central_difference, central_difference_product
from liveselect.functional.layer_pass import count_rows
from liveselect.functional.sampling import uniform_subset
from liveselect.functional.second_order import double_backward_product
from liveselect.functional.updates import Vector, inner, norm
from liveselect.grammar import Batch, LiveModel, NotMeasurableError, Round
from liveselect.influence.pmp.dynamics import live_state
from liveselect.influence.pmp.trajectory import Trajectory
from liveselect.influence.pmp.vault import Vault, to_device
from liveselect.influence.reference import ReferencePass, Weighted, counting, mean_loss_and_gradient, split_rows

HessianKind = Literal["double_backward", "central_difference"]
Weighting = Literal["tokens", "examples"]

_MAX_CURVATURE_ERROR = {torch.float64: 1e-3, torch.float32: 0.1}  # several times the rounding error of differences
_COSTATE_KEY, _METRICS_KEY = "costate", "metrics"


@dataclass(frozen=True)
class Unroll:
    """A stretch of future training, and the steps of it to keep.

    Attributes:
        model: the live model.
        round: serves the candidates.
        parameters: the parameters that move, by name; the live tensors, written to in place. Where ranks hold them in
            parts, so are all vectors of the unroll.
        reference: gives the reference loss J.
        ids: for each step the candidates in its batch, ``(batch,)``.
        dynamics: how the parameters move.
        hessian: how Hessian products are taken.
        weighting: whether J is a mean over tokens or over examples.
        interval: steps between two kept states.
        scored_steps: the steps whose parameters and gradient costates are kept.
        hessian_rows: examples differentiated twice at once; None takes the batches as they come.
        denominator_floor: see :meth:`~liveselect.functional.adjoint.Dynamics.damp`.
        rate: gradient costates are divided by it, so that influence comes per unit learning rate.
    """

    model: LiveModel
    round: Round
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
        r"""Put :math:`(\theta_t, -p_t / \eta)` of every scored step into the vault, and return metrics for the ledger.

        Beside each pair stands how fast J changes along its direction, on average over the steps after it. The
        parameters are left at some step of the unroll. Values that the vault holds already are not computed again.

        Raises:
            NotMeasurableError: the unroll diverges.
        """
        device, meter, steps = self.model.device, self.model.meter, len(self.ids)
        start = live_state(self.model, self.parameters, self.dynamics)
        trajectory = Trajectory(self.dynamics, start, self._gradient, steps, self.interval, vault, device)
        if not _all_equal([-1, vault.get(_COSTATE_KEY)[0]] if _COSTATE_KEY in vault else trajectory.kept):
            vault.clear()  # ranks that were stopped at different places begin again together
        reach = Reach()
        if _COSTATE_KEY in vault:
            below, packed, reach.share = vault.get(_COSTATE_KEY)
            costate = Costate(**to_device(packed, device)) if below else None
        else:
            with meter.tracked("unroll training", steps, "steps") as advance:
                end = trajectory.forward(advance)
                loss, gradient = self._reference_gradient(end)
            self._check_curvature(gradient)
            below, costate = steps, final_costate(gradient, end)
            vault.put(_METRICS_KEY, {"reference_loss_unrolled": loss})
        with meter.tracked("pull back", below, "steps") as advance:
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
                vault.put(_COSTATE_KEY, (begin, {} if costate is None else vars(costate), reach.share))
        trajectory.forget()
        return dict(vault.get(_METRICS_KEY))

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
        return self._mean_gradient(self._my_batches(index), index)

    def _curved(self, transition: Transition, vector: Vector, reach: Reach) -> Vector:
        """Return the Hessian of that mean loss times a vector."""
        view, index = self.model.view, transition.index
        self._load(transition.before)
        rows = self.hessian_rows if self.hessian == "double_backward" else None
        batches = self._my_batches(index, rows)
        if self.hessian == "central_difference":
            moved = view.spread(vector, self.parameters)
            gradient = partial(self._mean_gradient, batches, index)
            return central_difference(self.model.module, moved, gradient, reach, view.norm)
        model, loss_fn = self.model.module, self.model.loss_fn
        product = None
        if batches:
            twice = partial(double_backward_product, model, loss_fn, batches, vector)
            with counting(self.model, "double backward", *batches, trial=twice):
                product = twice()
        return self._over_ranks(product, sum(map(count_rows, batches)) / len(self.ids[index]))

    def _mean_gradient(self, batches: Sequence[Batch], index: int) -> Vector:
        """Return the gradient of the mean loss of a step's batch, given this rank's part of it."""

        def weighted(batch: Batch) -> Weighted:
            return batch, torch.ones(count_rows(batch))

        def spare() -> Weighted:
            return weighted(next(self.round.batches(self.ids[index][:1])))

        return mean_loss_and_gradient(self.model, list(map(weighted, batches)), spare, self.parameters)[1]

    def _check_curvature(self, vector: Vector) -> None:
        """Raise RuntimeError when differentiating twice misses a part of the model.

        A custom kernel whose backward is no part of the graph makes no error there: its curvature is silently zero.
        """
        batches = self._my_batches(len(self.ids) - 1, self.hessian_rows)
        if self.hessian != "double_backward" or not batches:
            return
        model, loss_fn = self.model.module, self.model.loss_fn
        with counting(self.model, "check of curvature", batches[0]):
            exact = double_backward_product(model, loss_fn, batches[:1], vector)
            close = central_difference_product(model, loss_fn, batches[:1], vector)
        error = float(norm({name: exact[name] - close[name] for name in exact}) / norm(close).clamp(min=1e-30))
        dtype = next(iter(vector.values())).dtype
        if error > _MAX_CURVATURE_ERROR[dtype]:
            raise RuntimeError(
                f"two ways to find the curvature of the training loss differ by {error:.2g} of it, where rounding in "
                f"{dtype} explains {_MAX_CURVATURE_ERROR[dtype]:g}: {_likely_reason(model, dtype, error)}. Use "
                'hessian="central_difference"'
            )

    def _my_batches(self, index: int, rows: int | None = None) -> list[dict[str, Tensor]]:
        """Return this rank's part of a step's batch, in batches of at most ``rows``."""
        ids = self.ids[index]
        batches = self.round.batches(ids[distributed.shard(len(ids))])
        return [part for batch in batches for part in split_rows(batch, rows)]

    def _reference_gradient(self, state: State) -> tuple[float, Vector]:
        """Return J at a state, and its gradient."""
        self._load(state)
        counts = self.reference.counts
        weights = counts if self.weighting == "tokens" else self.reference.example_weights()
        loss, gradient = self.reference.gradient(self.model, self.parameters, weights)
        if not math.isfinite(loss):
            raise NotMeasurableError(
                f"the reference loss became {loss} while {len(self.ids)} steps of training were unrolled: "
                "lower learning_rate, unroll fewer steps, or look at the training loss"
            )
        return loss, gradient

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
        load_parameters(self.model, self.parameters, state.parameters)


def unrolled_ids(round: Round, steps: int, size: int) -> list[Tensor]:
    """Draw the candidates of every unrolled step, ``(size,)`` each; no candidate twice while there are others."""
    generator = round.generator("unrolled batches")
    drawn: list[Tensor] = []
    missing = steps * size
    while missing > 0:
        count = min(missing, len(round.candidates))
        rows = uniform_subset(len(round.candidates), count, generator)
        drawn.append(round.candidates[rows[torch.randperm(count, generator=generator)]])
        missing -= count
    return list(torch.cat(drawn).split(size))


def load_parameters(model: LiveModel, parameters: Mapping[str, nn.Parameter], values: Vector) -> None:
    """Write values into the live parameters of ``model``, in place; into this rank's parts where ranks hold parts."""
    model.view.reshard()  # else the next forward would not read the written parts
    live = [model.view.local(parameter) for parameter in parameters.values()]
    with torch.no_grad():
        torch._foreach_copy_(live, [values[name] for name in parameters])
    torch.clear_autocast_cache()  # casts of the weights before this would be used again


def _likely_reason(model: nn.Module, dtype: torch.dtype, error: float) -> str:
    """Return why a second derivative may differ from the change of the first."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        others = [other for other in holders.get(id(module._parameters.get("weight")), []) if other != name]
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and others:
            return (
                f"{others[0]!r} is tied to the embedding {name!r}, whose backward leaves the row of its "
                f"padding_idx={module.padding_idx} out, while its forward reads it. Set padding_idx to None "
                "(pad_token_id=None in Hugging Face configurations), or do without double_backward"
            )
    if dtype == torch.float64 and error < _MAX_CURVATURE_ERROR[torch.float32]:
        return "a part of the model probably computes in float32 (norms and adapters often do)"
    return "the model has a part that cannot be differentiated twice (a custom kernel), or a loss with jumps"


def _all_equal(mine: list[int]) -> bool:
    return all(other == mine for other in distributed.gather_objects(mine))


def _present(costate: Costate | None) -> Costate:
    if costate is None:
        raise RuntimeError("the costate of an earlier step is missing, although not all steps were pulled back")
    return costate


def pair_name(index: int) -> str:
    """Return the name under which a scored step's parameters and direction are kept."""
    return f"pair-{index}"
