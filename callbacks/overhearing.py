"""Hears the influence of what is being trained on out of the training step's own backward."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from liveselect import distributed
from liveselect.callbacks.records import record_heard
from liveselect.cost import CostMeter
from liveselect.functional.flops import forward_flops
from liveselect.functional.sharding import is_sharded
from liveselect.influence.piggyback import LossMean, TrainingStepScores, find_loss_mean, mean_weights
from liveselect.losses import target_counts
from liveselect.protocols import LossFn, SelectionWarning
from liveselect.rounds import SelectionRun
from liveselect.snapshot import measuring

PHASE = "overhearing"
"""What the cost of listening is called in the ledger."""


def direction_of(estimator: Any) -> Mapping[str, Tensor] | None:
    """Return what an estimator compares gradients with, None where it has not been fitted yet."""
    try:
        found: Mapping[str, Tensor] | None = getattr(estimator, "direction", None)
    except RuntimeError:  # nothing could be measured yet
        return None
    return found


def can_be_heard(estimator: Any) -> bool:
    """Return whether an estimator measures by the product of gradients with one direction."""
    return hasattr(type(estimator), "direction") and getattr(estimator, "engine", None) != "optimizer_step"


def check_overhear(overhear: int, estimator: Any, is_spread: bool) -> None:
    """Raise ValueError when so many steps of a round, which may be spread over training steps, cannot be heard."""
    if not isinstance(overhear, int) or overhear < 0:
        raise ValueError(f"expected overhear of zero or more optimizer steps of each round, got {overhear}")
    if overhear and not can_be_heard(estimator):
        raise ValueError(
            f"{type(estimator).__name__} compares gradients with no direction, so training steps cannot tell influence "
            "as it measures it: leave out overhear, or take FirstOrderInfluence (with another engine than "
            "optimizer_step) or KFACInfluence"
        )
    if overhear > 1 and is_spread:
        raise ValueError(
            f"with overhear={overhear} steps tell influence while the round to come is being measured: expected at "
            "most 1 together with probes_between_steps or max_overhead"
        )


class Overhearing:
    """Listens to the first optimizer steps of each round; ledger and selector are told what they show.

    Args:
        steps: how many; 0 listens to none.
        loss_fn: per-example loss.
        examples: how many examples of a step are scored, over all ranks; None is all.
    """

    def __init__(self, steps: int, loss_fn: LossFn, examples: int | None = None) -> None:
        self.steps = steps
        self.listener = StepListener(loss_fn, examples)
        self._kept: Mapping[str, Tensor] | None = None  # the direction of a checkpoint, until the next round

    def forget(self) -> None:
        """Begin anew, as for another fit."""
        self.listener, self._kept = StepListener(self.listener.loss_fn, self.listener.examples), None

    def direction(self, run: SelectionRun, global_batch: int) -> Mapping[str, Tensor] | None:
        """Return what the examples of the present optimizer step are compared with, None where nobody listens."""
        plan = run.plan
        if plan is None or plan.cursor >= self.steps * global_batch or run.selector_for(plan.round) is run.warmup:
            return None
        return direction_of(run.estimator) or self._kept

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, run: SelectionRun, global_batch: int
    ) -> None:
        """Listen to a micro-batch, if it belongs to one of the steps."""
        direction = self.direction(run, global_batch)
        if direction is not None:
            self.listener.begin(trainer, pl_module, batch, direction)

    def end(self, trainer: pl.Trainer, run: SelectionRun, examples: int, global_batch: int) -> None:
        """After a micro-batch of ``examples`` over all ranks that the plan has not counted yet: tell, if it was a
        step's last.
        """
        if run.plan is None or (run.plan.cursor + examples) % global_batch:
            return
        if self.direction(run, global_batch) is None:
            return
        record = run.ledger.rounds[-1]
        ids, influence, flops = self.listener.collect()
        if flops:
            record.flops[PHASE] = record.flops.get(PHASE, 0.0) + flops
        if not len(ids):
            return
        record_heard(trainer, record, ids, influence)
        if hasattr(run.selector, "overhear"):
            run.selector.overhear(ids, influence)

    def take_seconds(self) -> float:
        """Return the seconds of this rank that listening took since the last call."""
        return self.listener.meter.seconds.pop(PHASE, 0.0)

    def state_dict(self, run: SelectionRun) -> dict[str, Any]:
        """Return what a run that is resumed in this round needs to listen, where the estimator does not keep it.

        A collective.
        """
        direction = None
        if self.steps and run.plan is not None and not hasattr(run.estimator, "state_dict"):
            direction = direction_of(run.estimator) or self._kept
        return {
            "direction": None if direction is None else {name: value.cpu() for name, value in direction.items()},
            "loss": distributed.gather_objects(self.listener.known_of_loss()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._kept = state["direction"]
        known = state.get("loss", [])
        if known:
            self.listener.know_of_loss(known[min(distributed.rank(), len(known) - 1)])


class StepListener:
    """Scores the examples of an optimizer step while they are trained on; training does not notice.

    Where a step cannot be heard (compiled layers; a training loss that is no known mean of the examples' losses) it
    says so once and is deaf from then on.

    Args:
        loss_fn: per-example loss; the training loss is a mean of it.
        examples: how many examples of a step are scored, over all ranks; None is all.

    Attributes:
        deaf: whether it has given up.
        meter: seconds and FLOPs of this rank that were not told yet.
    """

    def __init__(self, loss_fn: LossFn, examples: int | None = None) -> None:
        self.deaf = False
        self.meter = CostMeter()
        self.loss_fn = loss_fn
        self.examples = examples
        self._scores: TrainingStepScores | None = None
        self._batch: Mapping[str, Tensor] = {}
        self._wanted = 0
        self._losses: Tensor | None = None
        self._mean: LossMean | None = None
        self._same = False  # whether both means are one, because all examples are equally long
        self._compared = False  # whether the training loss was found to be one of them
        self._heard: list[tuple[Tensor, Tensor]] = []

    def known_of_loss(self) -> list[Any]:
        """Return what was found out about the training loss, so that a resumed run does not pay for it again."""
        return [self._mean, self._compared]

    def know_of_loss(self, found: list[Any]) -> None:
        """Take over what :meth:`known_of_loss` returned."""
        self._mean, self._compared = found

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, direction: Mapping[str, Tensor]
    ) -> None:
        """Listen to one micro-batch; call before its forward."""
        self._stop()
        self._agree(pl_module)
        if self.deaf:
            return
        with self.meter.phase(PHASE), self._deaf_after_errors():
            if self._mean is None:
                counts = target_counts(batch)
                self._same = bool((counts == counts[0]).all())
            if self._mean is None and not (self._same and self._compared):  # which mean is the training loss?
                forward = trainer.precision_plugin.forward_context()
                with measuring(pl_module, trainer.optimizers[0]), torch.no_grad(), forward:
                    self._losses = self.loss_fn(pl_module, batch)
                self.meter.flops[PHASE] += forward_flops(pl_module, batch["input_ids"].numel())
            # the first ones of the batch over all ranks: the same on any number of ranks
            mine = len(batch["id"])
            if self.examples is not None:
                share = math.ceil(self.examples / trainer.accumulate_grad_batches)
                mine = min(max(share - trainer.global_rank * mine, 0), mine)
            self._wanted, mine = mine, max(mine, is_sharded(pl_module))  # to a sharded model all ranks listen, or none
            if not mine:
                return
            self._batch = batch
            there = {name: value.to(pl_module.device) for name, value in direction.items()}  # a checkpoint's is on CPU
            self._scores = TrainingStepScores(pl_module, there, mine)
            self._scores.attach(batch)

    def before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Check, once, that the step is one that can be heard."""
        if self._losses is None:
            return
        with self.meter.phase(PHASE):
            self._check(trainer, loss)
            self._agree(trainer.lightning_module)

    def _check(self, trainer: pl.Trainer, loss: Tensor) -> None:
        if self._scores is None or self._losses is None:
            return
        with self._deaf_after_errors():
            self._scores.check(loss)
            whole = float(loss.detach()) * trainer.accumulate_grad_batches
            self._mean = find_loss_mean(self._losses, target_counts(self._batch), whole)
            self._losses, self._compared = None, True

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Keep what the backward has shown."""
        scores = self._scores
        if scores is None:
            return
        with self.meter.phase(PHASE), self._deaf_after_errors():
            weights = mean_weights(self._batch, self._mean or "tokens", trainer.accumulate_grad_batches)
            influence = scores.collect(weights)
            influence[self._wanted :] = math.nan
            if self._mean is not None or self._same:  # else the weights of the examples are not known yet
                self._heard.append((self._batch["id"].cpu(), influence))
        self.meter.seconds[PHASE] += scores.watch.read()  # spent in the forward and backward of training
        self.meter.flops[PHASE] += scores.flops
        self._stop()

    def collect(self) -> tuple[Tensor, Tensor, float]:
        """Return what all ranks have heard since the last call, and the FLOPs it took; a collective.

        Returns:
            ids and influence, ``(m,)`` each, and the FLOPs of all ranks.
        """
        with self.meter.phase(PHASE):
            return self._collect()

    def _collect(self) -> tuple[Tensor, Tensor, float]:
        self._stop()
        ranks = distributed.gather_objects((self._heard, self.meter.flops.pop(PHASE, 0.0)))
        heard, flops = [pair for pairs, _ in ranks for pair in pairs], sum(amount for _, amount in ranks)
        self._heard = []
        if not heard:
            return torch.empty(0, dtype=torch.int64), torch.empty(0), flops
        ids, influence = (torch.cat(parts) for parts in zip(*heard, strict=True))
        return ids, influence, flops

    def _agree(self, model: nn.Module) -> None:
        """Be deaf when another rank is: with a sharded model, listening is a collective."""
        if is_sharded(model) and distributed.any_rank(self.deaf):
            self.deaf, self._losses = True, None
            self._stop()

    def _stop(self) -> None:
        if self._scores is not None:
            self._scores.detach()
        self._scores = None

    @contextmanager
    def _deaf_after_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # training matters more
            self.deaf = True
            self._stop()
            rank_zero_warn(
                f"the influence of what is trained on cannot be heard, only what is probed is known: {error}",
                category=SelectionWarning,
            )
