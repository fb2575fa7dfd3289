"""Captures the influence of what is being trained on out of the training step's own backward."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from liveselect import distributed
from liveselect.callbacks.records import record_captured
from liveselect.callbacks.silence import silent_logging
from liveselect.cost import CostMeter
from liveselect.functional.several_optimizers import as_one
from liveselect.functional.sharding import is_sharded
from liveselect.grammar import Batch, InfluenceEstimator, LossFn, SelectionWarning, State
from liveselect.influence.training_step import (
    LossMean,
    TrainingStepScores,
    find_loss_mean,
    mean_weights,
    tokens_of_positions,
)
from liveselect.losses import target_counts, targets_shape
from liveselect.parts import checked_direction
from liveselect.preserve import measuring
from liveselect.rounds import SelectionRun

PHASE = "overhearing"
"""The name of its cost in the ledger."""


def check_overhear(overhear: int, estimator: InfluenceEstimator | None, is_spread: bool) -> None:
    """Raise ValueError when that many steps of a round, which may be spread over training steps, cannot be captured."""
    if not isinstance(overhear, int) or overhear < 0:
        raise ValueError(f"expected overhear of zero or more optimizer steps of each round, got {overhear}")
    if overhear and (estimator is None or not estimator.has_direction):
        raise ValueError(
            f"{type(estimator).__name__} compares gradients with no direction, so training steps cannot show influence "
            "as it measures it: leave out overhear, or take FirstOrderInfluence (with another engine than "
            "optimizer_step) or KFACInfluence"
        )
    if overhear > 1 and is_spread:
        raise ValueError(
            f"with overhear={overhear} steps show influence while the round to come is being measured: expected at "
            "most 1 together with probes_between_steps or max_overhead"
        )


class Overhearing:
    """Captures the first optimizer steps of each round; ledger and selector get what they show.

    Args:
        steps: how many; 0 captures none.
        loss_fn: per-example loss.
        examples: how many examples of a step are scored, over all ranks; None is all.
    """

    def __init__(self, steps: int, loss_fn: LossFn, examples: int | None = None) -> None:
        self.steps = steps
        self.capture = StepCapture(loss_fn, examples)

    def forget(self) -> None:
        """Begin from the start, as for another fit."""
        self.capture = StepCapture(self.capture.loss_fn, self.capture.examples)

    def direction(self, run: SelectionRun, global_batch: int) -> Mapping[str, Tensor] | None:
        """Return what the examples of the present optimizer step are compared with, None where it is not captured."""
        plan = run.plan
        if plan is None or plan.cursor >= self.steps * global_batch or run.selector_for(plan.round) is not run.selector:
            return None
        return None if run.estimator is None else checked_direction(run.estimator)

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, run: SelectionRun, global_batch: int
    ) -> None:
        """Capture a micro-batch, if it belongs to one of the steps."""
        direction = self.direction(run, global_batch)
        if direction is not None:
            self.capture.by_token = run.selector.learns_tokens
            self.capture.begin(trainer, pl_module, batch, direction)

    def end(self, trainer: pl.Trainer, run: SelectionRun, examples: int, global_batch: int) -> None:
        """Report a captured step after its last micro-batch.

        Args:
            trainer: the Trainer.
            run: of selection.
            examples: of the micro-batch over all ranks, which the plan has not counted yet.
            global_batch: examples of an optimizer step.
        """
        if run.plan is None or (run.plan.cursor + examples) % global_batch:
            return
        if self.direction(run, global_batch) is None:
            return
        record = run.ledger.rounds[-1]
        ids, influence, tokens, flops = self.capture.collect()
        if flops:
            record.flops[PHASE] = record.flops.get(PHASE, 0.0) + flops
        finite = influence.isfinite()
        if finite.any():
            record_captured(trainer, record, ids[finite], influence[finite])
            if tokens is not None:
                run.selector.observe_step_tokens(ids[finite], tokens[finite])
            run.selector.observe_step(ids[finite], influence[finite])

    def take_seconds(self) -> float:
        """Return the seconds of this rank that capturing took since the last call."""
        return self.capture.meter.seconds.pop(PHASE, 0.0)

    def state_dict(self, run: SelectionRun) -> State:
        """Return what a run that is resumed in this round needs; a collective."""
        fitted = None
        if self.steps and run.plan is not None and run.estimator is not None:
            fitted = run.estimator.fitted_state()
        return {"fitted": fitted, "loss": distributed.gather_objects(self.capture.loss_findings())}

    def load_state_dict(self, state: State, estimator: InfluenceEstimator | None) -> None:
        """Restore the state."""
        if state["fitted"] is not None and estimator is not None:
            estimator.load_fitted_state(state["fitted"])
        findings = state["loss"]
        if findings:
            self.capture.use_loss_findings(findings[min(distributed.rank(), len(findings) - 1)])


class StepCapture:
    """Scores the examples of an optimizer step while they are trained on; training does not notice.

    Where a step cannot be captured (compiled layers; a training loss that is no known mean of the examples' losses) it
    says so once and is disabled from then on.

    Args:
        loss_fn: per-example loss; the training loss is a mean of it.
        examples: how many examples of a step are scored, over all ranks; None is all.

    Attributes:
        disabled: whether it has given up.
        meter: seconds and FLOPs of this rank that were not reported yet.
        by_token: whether what single tokens were worth is kept as well.
    """

    def __init__(self, loss_fn: LossFn, examples: int | None = None) -> None:
        self.disabled = False
        self.meter = CostMeter()
        self.loss_fn = loss_fn
        self.examples = examples
        self.by_token = False
        self._scores: TrainingStepScores | None = None
        self._batch: Mapping[str, Tensor] = {}
        self._wanted = 0
        self._losses: Tensor | None = None
        self._mean: LossMean | None = None
        self._same = False  # whether both means are one, because all examples are equally long
        self._compared = False  # whether the training loss was found to be one of them
        self._captured: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def loss_findings(self) -> tuple[LossMean | None, bool]:
        """Return what was found out about the training loss, so that a resumed run does not pay for it again."""
        return self._mean, self._compared

    def use_loss_findings(self, found: tuple[LossMean | None, bool]) -> None:
        """Take over what :meth:`loss_findings` returned."""
        self._mean, self._compared = found

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, direction: Mapping[str, Tensor]
    ) -> None:
        """Capture one micro-batch; call before its forward."""
        self._stop()
        self._agree(pl_module)
        if self.disabled:
            return
        with self.meter.phase(PHASE), self._disabled_after_errors():
            if self._mean is None:
                counts = target_counts(batch)
                self._same = bool((counts == counts[0]).all())
            if self._mean is None and not (self._same and self._compared):  # which mean is the training loss?
                forward = trainer.precision_plugin.forward_context()
                with (
                    silent_logging(),
                    measuring(pl_module, as_one(trainer.optimizers)),
                    torch.no_grad(),
                    forward,
                    self.meter.counting(pl_module, "loss", batch["input_ids"].shape, targets_shape(batch)),
                ):
                    self._losses = self.loss_fn(pl_module, batch)
            # the first ones of the batch over all ranks: the same on any number of ranks
            mine = len(batch["id"])
            if self.examples is not None:
                share = math.ceil(self.examples / trainer.accumulate_grad_batches)
                mine = min(max(share - trainer.global_rank * mine, 0), mine)
            self._wanted, mine = mine, max(mine, is_sharded(pl_module))  # of a sharded model all ranks capture, or none
            if not mine:
                return
            self._batch = batch
            there = {name: value.to(pl_module.device) for name, value in direction.items()}  # a checkpoint's is on CPU
            self._scores = TrainingStepScores(pl_module, there, mine, self.by_token)
            self._scores.attach(batch)

    def before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Check, once, that the step can be captured."""
        if self._losses is None:
            return
        with self.meter.phase(PHASE):
            self._check(trainer, loss)
            self._agree(trainer.lightning_module)

    def _check(self, trainer: pl.Trainer, loss: Tensor) -> None:
        if self._scores is None or self._losses is None:
            return
        with self._disabled_after_errors():
            self._scores.check(loss)
            whole = float(loss.detach()) * trainer.accumulate_grad_batches
            self._mean = find_loss_mean(self._losses, target_counts(self._batch), whole)
            self._losses, self._compared = None, True

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Keep what the backward has shown."""
        scores = self._scores
        if scores is None:
            return
        with self.meter.phase(PHASE), self._disabled_after_errors():
            weights = mean_weights(self._batch, self._mean or "tokens", trainer.accumulate_grad_batches)
            influence = scores.collect(weights)
            influence[self._wanted :] = math.nan
            if self._mean is not None or self._same:  # else the weights of the examples are not known yet
                tokens = None if scores.positions is None else tokens_of_positions(scores.positions, self._batch)
                self._captured.append((self._batch["id"].cpu(), influence, tokens))
        self.meter.seconds[PHASE] += scores.watch.read()  # spent in the forward and backward of training
        self.meter.flops[PHASE] += sum(scores.meter.flops.values())
        for name, times in scores.meter.uncounted.items():
            self.meter.uncounted[name] += times
        self._stop()

    def collect(self) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """Return what all ranks have captured since the last call, and the FLOPs it took; a collective.

        Returns:
            ids and influence, ``(m,)`` each, that of tokens ``(m, T)`` where it is kept, and the FLOPs of all ranks.
        """
        with self.meter.phase(PHASE):
            return self._collect()

    def _collect(self) -> tuple[Tensor, Tensor, Tensor | None, float]:
        self._stop()
        ranks = distributed.gather_objects((self._captured, self.meter.flops.pop(PHASE, 0.0)))
        captured, flops = [pair for pairs, _ in ranks for pair in pairs], sum(amount for _, amount in ranks)
        self._captured = []
        if not captured:
            return torch.empty(0, dtype=torch.int64), torch.empty(0), None, flops
        ids, influence = (torch.cat(parts) for parts in zip(*(each[:2] for each in captured), strict=True))
        of_tokens = [tokens for _, _, tokens in captured if tokens is not None]
        width = max((tokens.shape[1] for tokens in of_tokens), default=0)
        if len(of_tokens) < len(captured):
            return ids, influence, None, flops
        padded = [F.pad(tokens, (0, width - tokens.shape[1]), value=math.nan) for tokens in of_tokens]
        return ids, influence, torch.cat(padded), flops

    def _agree(self, model: nn.Module) -> None:
        """Give up when another rank has: with a sharded model, capturing is a collective."""
        if is_sharded(model) and distributed.any_rank(self.disabled):
            self.disabled, self._losses = True, None
            self._stop()

    def _stop(self) -> None:
        if self._scores is not None:
            self._scores.detach()
        self._scores = None

    @contextmanager
    def _disabled_after_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # training matters more
            self.disabled = True
            self._stop()
            rank_zero_warn(
                f"the influence of what is trained on cannot be captured, only what is probed is known: {error}",
                category=SelectionWarning,
            )
