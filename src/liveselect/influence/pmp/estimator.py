"""PDS's influence by Pontryagin's maximum principle: the effect of an example on all future reference losses."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.arguments import check_plain
from liveselect.functional.adjoint import Dynamics
from liveselect.functional.differences import central_difference_dots, parameters_kept
from liveselect.functional.gradients import example_dot
from liveselect.functional.updates import Vector
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, SmallFit
from liveselect.influence.hidden import refuse_hidden
from liveselect.influence.pmp.dynamics import live_dynamics, moving_parameters, sgd_dynamics
from liveselect.influence.pmp.unroll import HessianKind, Unroll, Weighting, load_parameters, pair_name, unrolled_ids
from liveselect.influence.pmp.vault import DiskVault, Vault, to_device
from liveselect.influence.reference import Precision, ReferencePass, counting
from liveselect.preserve import checksum

DynamicsKind = Literal["live", "sgd"]
ProductKind = Literal["exact", "central_difference"]

PUBLISHED_LEARNING_RATE = 0.008  # of plain SGD in the unroll

_FEW_STEPS = 2  # of an unroll from which the time of more is found


class PMPInfluence(InfluenceEstimator):
    r"""Measures influence on the future: the reference loss summed over the next T steps of training.

    Training is unrolled for T steps from the live model on random candidates. With :math:`J` the reference loss,
    :math:`F = \sum_{t=1}^{T} J(\theta_t)`, and an example added with weight :math:`\epsilon` to the mean loss of the
    scored steps S, the influence is

    .. math:: I_n = -\frac{1}{\eta} \frac{dF}{d\epsilon}
                  = -\frac{1}{\eta} \sum_{t \in S} p_t \cdot \nabla \ell_n(\theta_t)

    in nats per unit learning rate :math:`\eta` (the largest of the first unrolled step); larger lowers the future loss
    more. :math:`p_t` comes from the costate recursion, see :mod:`liveselect.functional.adjoint`; for plain SGD
    :math:`I_n = \sum_t \lambda_{t+1} \cdot \nabla \ell_n(\theta_t)`, the published score over :math:`\eta`. With one
    step it is the gradient dot product with the reference gradient after that step.

    ``fit`` unrolls and pulls back, and keeps :math:`(\theta_t, p_t)` of the scored steps; ``score`` takes the inner
    products. In units of one forward of one sequence the costs are T (6 B + h B + 3 r) for fit, with B the batch of a
    step, h = 9 or 6 for a Hessian product by double backward or central differences, and r the reference set, and 3 or
    2 per scored step and candidate for exact products or central differences. It holds about
    :math:`2 \sqrt{T}` states (parameters and moments) while fitting, and 2 |S| copies of the parameters afterwards, in
    the memory of the host or in ``directory``. Ranks share out every batch of the unroll, and candidates.

    Args:
        steps: T, how far the future goes.
        score_every: candidates take part in every n-th step, from the first.
        dynamics: ``live`` unrolls the live optimizer (SGD, Adam, AdamW) with its moments, settings and clipping;
            ``sgd`` unrolls plain SGD, as published.
        learning_rate: of the unroll; by default the live one, or the published 0.008 for ``sgd``. Groups keep their
            ratios.
        schedule: factor on the learning rate for each of the steps; by default it stays.
        batch_size: examples of an unrolled step; by default those of the run's global batch.
        hessian: ``double_backward`` is exact and runs attention in plain operations; ``central_difference`` works with
            any kernel and with sharded parameters and is cheaper, but noisy where moments are still small, as in the
            first steps of Adam. By default the exact one, and differences where parameters are sharded.
        hessian_rows: examples differentiated twice at once, which needs several times the memory of training; by
            default a batch of candidates.
        products: ``exact``, or ``central_difference``, which is cheaper, ranks the same, and works for models whose
            layers have no rule for exact products.
        product_precision: ``float32``, or as ``training`` computes: several times as fast on accelerators, and a little
            noisier. Everything else is always computed in float32.
        reference_weighting: J is the mean over reference ``tokens``, or of the means of ``examples``, as published.
        denominator_floor: Adam moves a coordinate that hardly ever had a gradient (the embedding of a rare token) a
            long way on the smallest weight, and no farther on a real one, so there the derivative alone is far too
            large. Denominators are raised to this share of the root mean square in their parameter; 0 gives the exact
            derivative.
        snapshot_every: steps between two kept states. ``steps`` keeps all, and unrolls once; less repeats steps.
        directory: folder for intermediate results, by default in memory. An interrupted fit goes on from there, and a
            finished one is not repeated, as long as the model, the data and these settings are the same.

    Source: Gu et al. 2024, "Data Selection via Optimal Control for Language Models", arXiv 2410.07064.
    """

    spreadable = False  # all candidates are measured from the one state of the model that was unrolled
    at_once = True
    rehearsed = False

    def __init__(
        self,
        steps: int = 100,
        score_every: int = 10,
        dynamics: DynamicsKind = "live",
        learning_rate: float | None = None,
        schedule: Sequence[float] = (),
        batch_size: int | None = None,
        hessian: HessianKind | None = None,
        hessian_rows: int | None = None,
        products: ProductKind = "exact",
        product_precision: Precision = "float32",
        reference_weighting: Weighting = "tokens",
        denominator_floor: float = 0.3,
        snapshot_every: int | None = None,
        directory: str | Path | None = None,
    ) -> None:
        check_plain(PMPInfluence, locals())
        self.steps = steps
        self.score_every = score_every
        self.dynamics: DynamicsKind = dynamics
        self.learning_rate = learning_rate
        self.schedule = tuple(schedule)
        self.batch_size = batch_size
        self.hessian: HessianKind | None = hessian
        self.hessian_rows = hessian_rows
        self.products: ProductKind = products
        self.product_precision: Precision = product_precision
        self.reference_weighting: Weighting = reference_weighting
        self.denominator_floor = denominator_floor
        self.snapshot_every = snapshot_every
        self.directory = directory
        self._check()
        self._solved: tuple[Vault, dict[str, nn.Parameter]] | None = None

    @property
    def scored_steps(self) -> range:
        """The steps in which candidates take part."""
        return range(0, self.steps, self.score_every)

    @property
    def settings(self) -> dict[str, object]:
        """The settings that influence depends on, as plain values."""
        hidden = {"directory", "snapshot_every", "hessian_rows"}
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in hidden}

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Unroll the future and pull the reference loss back through it.

        Raises:
            NotMeasurableError: a learning rate of zero, or an unroll whose reference loss is not finite.
            ValueError: nothing to train.
            TypeError: an optimizer or clipping whose adjoint is not known, parameters in 16 bits, or a model that is
                sharded in a way, or asked for products, that cannot be used together.
            RuntimeError: the model cannot be differentiated twice.
        """
        self._solved = None
        with model.full_precision():  # second derivatives and differences of losses are lost in 16 bits
            parameters = self._parameters(model)
            reference = ReferencePass.load(model, round)
            before = reference.loss(model)
            apart = dict(reference.parts)
            if not math.isfinite(before):
                raise NotMeasurableError(
                    f"the reference loss is {before} before anything is unrolled: look at the model's weights and loss"
                )
            dynamics, rate = self._dynamics(model, parameters)
            ids = unrolled_ids(round, self.steps, self.batch_size or model.global_batch)
            interval = min(self.steps, self.snapshot_every or math.isqrt(self.steps))
            manner = (interval, _clipping(dynamics), *_loss(model, before))
            vault = self._vault(model, round, ids, reference, manner)
            unroll = Unroll(
                model=model,
                round=round,
                parameters=parameters,
                reference=reference,
                ids=ids,
                dynamics=dynamics,
                hessian=self.hessian or ("central_difference" if model.view.in_parts else "double_backward"),
                weighting=self.reference_weighting,
                interval=interval,
                scored_steps=self.scored_steps,
                hessian_rows=self.hessian_rows,
                denominator_floor=self.denominator_floor,
                rate=rate,
            )
            with parameters_kept(model.module, parameters.values()):
                metrics = unroll.solve(vault)
        self._solved = vault, parameters
        return {
            "reference_loss": before,
            **apart,
            **metrics,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "unroll_learning_rate": rate,
        }

    def release(self) -> None:
        """Free the memory of ``fit``, which training does not need; files in ``directory`` stay."""
        self._solved = None

    def small_fit(self, round: Round) -> SmallFit:
        """Return a copy that unrolls few steps, in memory, with the learning rates of the first ones."""
        small = copy.copy(self)
        small.steps, small.directory, small._solved = min(_FEW_STEPS, self.steps), None, None
        small.schedule = self.schedule[: small.steps]
        scored = len(self.scored_steps) / len(small.scored_steps)
        return SmallFit(small, fit=self.steps / small.steps, score=scored)

    def check(self, model: LiveModel, round: Round) -> None:
        """Raise the errors of :meth:`fit` and :meth:`score` that show without an unroll."""
        parameters = self._parameters(model)
        if self.products == "exact":
            helps = 'Measure with products="central_difference", which takes any module'
            with model.autocast() if self.product_precision == "training" else model.full_precision():
                refuse_hidden(model, round, parameters.keys(), 'products="exact"', lambda hidden: helps)
        self._dynamics(model, parameters)

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)``; NaN where a loss or a gradient is not finite."""
        return self._score(model, lambda: [batch], lambda: batch)

    def score_ids(self, model: LiveModel, round: Round, ids: Tensor) -> Tensor:
        """Return the influence of the candidates ``ids (m,)``, ``(m,)``.

        The same as :meth:`score` batch by batch, but each scored step is loaded once for all of them, and the
        candidates are read once for each.
        """
        return self._score(model, lambda: round.batches(ids), lambda: next(round.batches(round.candidates[:1])))

    def _score(self, model: LiveModel, batches: Callable[[], Iterable[Batch]], spare: Callable[[], Batch]) -> Tensor:
        if self._solved is None:
            raise RuntimeError("PMPInfluence.score was called before fit: call fit(model, round) in each round")
        vault, live = self._solved

        def in_step() -> Iterator[tuple[Batch, bool]]:
            return model.view.in_step(batches(), spare)

        influence = torch.zeros(())
        with parameters_kept(model.module, live.values()):
            for index in self.scored_steps:
                at, direction, slope = to_device(vault.get(pair_name(index)), model.device)
                load_parameters(model, live, at)
                direction = model.view.spread(direction, live)
                influence = influence + self._products(model, in_step, direction, slope).double().cpu()
        return influence.where(influence.isfinite(), math.nan)

    def _products(
        self, model: LiveModel, batches: Callable[[], Iterable[tuple[Batch, bool]]], direction: Vector, slope: float
    ) -> Tensor:
        """Return the inner product of a direction with the gradient of every example that counts, ``(n,)``.

        Args:
            model: at the parameters of a scored step.
            batches: gives the same batches at each of two calls, and whether each counts.
            direction: in the parameters.
            slope: roughly how fast losses change along it.
        """
        module, loss_fn, view = model.module, model.loss_fn, model.view
        with model.autocast() if self.product_precision == "training" else model.full_precision():
            if self.products == "central_difference":
                cast = torch.is_autocast_enabled(model.device.type)
                kind = torch.get_autocast_dtype(model.device.type) if cast else next(iter(direction.values())).dtype

                def losses(module: nn.Module, item: tuple[Batch, bool]) -> Tensor:
                    batch, counts = item
                    with counting(model, "forward", batch):
                        return loss_fn(module, batch)[: None if counts else 0]

                return central_difference_dots(module, losses, batches, direction, slope, kind, view.norm)
            parts = []
            for batch, counts in batches():
                product = partial(example_dot, module, loss_fn, batch, direction, whole=view.whole)
                with counting(model, f"products of {len(direction)}", batch, trial=product):
                    parts.append(product()[: None if counts else 0])
        return torch.cat(parts) if parts else torch.empty(0)

    def _parameters(self, model: LiveModel) -> dict[str, nn.Parameter]:
        """Return the parameters that move; raise TypeError where they are sharded in a way that cannot be unrolled."""
        model.view.refuse_flat(type(self).__name__)
        if self.hessian == "double_backward":
            model.view.refuse_parts(
                "parameters that are sharded over ranks (FSDP) cannot be differentiated twice: use "
                'hessian="central_difference"'
            )
        model.view.refuse_short_casts()
        return moving_parameters(model)

    def _dynamics(self, model: LiveModel, parameters: Mapping[str, nn.Parameter]) -> tuple[Dynamics, float]:
        """Return how training moves, and the largest learning rate before the schedule."""
        if self.dynamics == "sgd":
            rate = self.learning_rate or PUBLISHED_LEARNING_RATE
            return sgd_dynamics(model, parameters, rate, self.schedule), rate
        dynamics = live_dynamics(model, parameters, self.schedule)
        largest = max(rule.rate for rule in dynamics.rules.values())
        if not 0 < largest < math.inf:
            raise NotMeasurableError(
                f"expected a positive learning rate to unroll training with, got {largest}: begin measuring after the "
                "first step of the learning-rate warm-up (more warm-up rounds, or a checkpoint from later), or unroll "
                'plain SGD, as published, with dynamics="sgd"'
            )
        if self.learning_rate is None:
            return dynamics, largest
        factor = self.learning_rate / largest
        schedule = self.schedule or (1.0,) * self.steps
        return replace(dynamics, schedule=tuple(factor * each for each in schedule)), self.learning_rate

    def _vault(
        self,
        model: LiveModel,
        round: Round,
        ids: Sequence[Tensor],
        reference: ReferencePass,
        manner: tuple[int | str, ...],
    ) -> Vault:
        if self.directory is None:
            return Vault()
        owner = hashlib.blake2b(digest_size=16)
        owner.update(repr((sorted(self.settings.items()), manner)).encode())
        owner.update(f"{round.pool.fingerprint} {checksum(model.module, model.optimizer)}".encode())
        for tensor in (*ids, *(value for batch in reference.batches for value in batch.values())):
            owner.update(tensor.cpu().contiguous().numpy().tobytes())
        return DiskVault(Path(self.directory) / f"rank-{distributed.rank()}", owner.hexdigest())

    def _check(self) -> None:
        for name, kind in (
            ("dynamics", DynamicsKind),
            ("hessian", HessianKind),
            ("products", ProductKind),
            ("product_precision", Precision),
            ("reference_weighting", Weighting),
        ):
            if getattr(self, name) not in get_args(kind) and not (name == "hessian" and self.hessian is None):
                raise ValueError(f"expected {name} to be one of {get_args(kind)}, got {getattr(self, name)!r}")
        if not 0 <= self.denominator_floor < math.inf:
            raise ValueError(f"expected denominator_floor of at least 0, got {self.denominator_floor}")
        for name in ("steps", "score_every", "batch_size", "hessian_rows", "snapshot_every"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}")
        if not all(0 <= factor < math.inf for factor in self.schedule):
            raise ValueError(f"expected factors of at least 0 in the schedule, got {self.schedule}")
        if self.schedule and len(self.schedule) != self.steps:
            raise ValueError(
                f"expected a schedule with one factor for each of the {self.steps} steps, got {len(self.schedule)}"
            )


def _clipping(dynamics: Dynamics) -> str:
    limit = getattr(dynamics.clip, "limit", 0.0)
    return f"{type(dynamics.clip).__name__} {limit:.4g}"


def _loss(model: LiveModel, value: float) -> tuple[str, str]:
    """Return what distinguishes a loss function, which may be any callable: its name and its value on the model."""
    return getattr(model.loss_fn, "__qualname__", type(model.loss_fn).__qualname__), f"{value:.4g}"
