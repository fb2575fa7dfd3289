"""PDS's influence by Pontryagin's maximum principle: what an example does to the whole future of the reference loss."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.adjoint import Dynamics
from liveselect.functional.differences import central_difference_dots, length_of, parameters_kept
from liveselect.functional.flops import forward_flops
from liveselect.functional.gradients import example_dot
from liveselect.functional.sharding import is_sharded, refuse_flat, shortest_cast
from liveselect.functional.updates import Vector
from liveselect.influence.dynamics import live_dynamics, moving_parameters, sgd_dynamics
from liveselect.influence.rank_gradients import length_over_ranks, spread
from liveselect.influence.reference import Precision, ReferencePass
from liveselect.influence.unroll import HessianKind, Unroll, Weighting, load_parameters, pair_name, unrolled_ids
from liveselect.influence.vault import DiskVault, MemoryVault, Vault, to_device
from liveselect.protocols import Batch, LossFn, NotMeasurableError, RoundContext
from liveselect.snapshot import checksum, measuring

DynamicsKind = Literal["live", "sgd"]
ProductKind = Literal["exact", "central_difference"]

PUBLISHED_RATE = 0.008

_FORWARDS = {"exact": 3, "central_difference": 2}


class PMPInfluence:
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
            What counts in an example is a matter of the reference set's labels.
        denominator_floor: Adam moves a coordinate that hardly ever had a gradient (the embedding of a rare token) a
            long way on the smallest weight, and no farther on a real one, so there the derivative alone is far too
            large. Denominators below this share of the root mean square in their parameter are taken for that; 0 gives
            the exact derivative.
        snapshot_every: steps between two kept states. ``steps`` keeps all, and unrolls once; less repeats steps.
        directory: folder for what is kept, by default in memory. A fit that was interrupted goes on from there, and one
            that was finished is not repeated, as long as the model, the data and these settings are the same.

    Source: Gu et al. 2024, "Data Selection via Optimal Control for Language Models", arXiv 2410.07064.
    """

    once_a_round = True
    """All candidates are measured from the one state of the model that was unrolled."""

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
    def settings(self) -> dict[str, Any]:
        """What influence depends on, as plain values; where it is kept on the way is left out."""
        hidden = {"directory", "snapshot_every", "hessian_rows"}
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in hidden}

    def fit(self, context: RoundContext) -> Mapping[str, float]:
        """Unroll the future and pull the reference loss back through it.

        Raises:
            NotMeasurableError: a learning rate of zero, or an unroll whose reference loss is not finite.
            ValueError: nothing to train.
            TypeError: an optimizer or clipping whose adjoint is not known, parameters in 16 bits, or a model that is
                sharded in a way, or asked for products, that cannot be used together.
            RuntimeError: the model cannot be differentiated twice.
        """
        self._solved = None
        self._refuse_unfit(context)
        with measuring(context.model, context.optimizer), _full_precision(context):
            parameters = moving_parameters(context)
            reference = ReferencePass.load(context)
            before = reference.loss(context)
            if not math.isfinite(before):
                raise NotMeasurableError(
                    f"the reference loss is {before} before anything is unrolled: look at the model's weights and loss"
                )
            dynamics, rate = self._dynamics(context)
            ids = unrolled_ids(context, self.steps, self.batch_size or context.global_batch)
            interval = min(self.steps, self.snapshot_every or math.isqrt(self.steps))
            vault = self._vault(context, ids, reference, (interval, _clipping(dynamics), *_loss(context, before)))
            unroll = Unroll(
                context=context,
                parameters=parameters,
                reference=reference,
                ids=ids,
                dynamics=dynamics,
                hessian=self.hessian or ("central_difference" if is_sharded(context.model) else "double_backward"),
                weighting=self.reference_weighting,
                interval=interval,
                scored_steps=self.scored_steps,
                hessian_rows=self.hessian_rows,
                denominator_floor=self.denominator_floor,
                rate=rate,
            )
            with parameters_kept(context.model, parameters.values()):
                metrics = unroll.solve(vault)
        self._solved = vault, parameters
        return {
            "reference_loss": before,
            **metrics,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "unroll_learning_rate": rate,
        }

    def release(self) -> None:
        """Let go of what ``fit`` kept in memory, which training has no use for; what is in ``directory`` stays."""
        self._solved = None

    def check(self, context: RoundContext) -> None:
        """Raise what :meth:`fit` would, as far as it can be told without an unroll."""
        self._refuse_unfit(context)
        moving_parameters(context)
        self._dynamics(context)

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)`` float32 on CPU.

        NaN stands where a loss or a gradient of an example is not finite.
        """
        return self._score(context, lambda: [context.to_device(batch)]).float()

    def score_ids(self, context: RoundContext, ids: Tensor) -> Tensor:
        """Return the influence of the candidates ``ids (m,)``, ``(m,)`` float64 on CPU.

        The same as :meth:`score` batch by batch, but each scored step is loaded once for all of them, and the
        candidates are read once for each.
        """
        return self._score(context, lambda: context.candidate_batches(ids))

    def _score(self, context: RoundContext, batches: Callable[[], Iterable[Batch]]) -> Tensor:
        if self._solved is None:
            raise RuntimeError("PMPInfluence was asked for scores before fit: call fit(context) once in each round")
        vault, live = self._solved
        influence: Tensor | float = 0.0
        with measuring(context.model, context.optimizer), parameters_kept(context.model, live.values()):
            for index in self.scored_steps:
                at, direction, slope = to_device(vault.get(pair_name(index)), context.device)
                load_parameters(context.model, live, at)
                direction = spread(direction, live)
                influence = influence + self._products(context, batches, direction, slope).double().cpu()
        found = torch.as_tensor(influence)
        return found.where(found.isfinite(), math.nan)

    def _products(
        self, context: RoundContext, batches: Callable[[], Iterable[Batch]], direction: Vector, slope: float
    ) -> Tensor:
        """Return the inner product of a direction with the gradient of every example in the batches, ``(n,)``.

        Args:
            context: of the round.
            batches: gives the same batches at each of two calls.
            direction: in the parameters.
            slope: how fast losses change along it, roughly.
        """
        model, loss_fn = context.model, context.loss_fn
        forwards = _FORWARDS[self.products] / (1 if self.products == "exact" else 2)  # differences read them twice

        def charged() -> Iterator[tuple[Batch, bool]]:
            def spare() -> Batch:
                return next(context.candidate_batches(context.candidates[:1]))

            for batch, counts in distributed.in_step(batches(), spare, is_sharded(model)):
                context.meter.add_flops(forwards * forward_flops(model, batch["input_ids"].numel()))
                yield batch, counts

        short = self.product_precision == "training"
        with context.forward_context() if short else _full_precision(context):
            if self.products == "central_difference":
                cast = torch.is_autocast_enabled(context.device.type)
                kind = torch.get_autocast_dtype(context.device.type) if cast else next(iter(direction.values())).dtype
                length = length_over_ranks if is_sharded(model) else length_of
                return central_difference_dots(model, _own_losses(loss_fn), charged, direction, slope, kind, length)
            parts = [
                example_dot(model, loss_fn, batch, direction, whole=distributed.whole)[: None if counts else 0]
                for batch, counts in charged()
            ]
        return torch.cat(parts) if parts else torch.empty(0)

    def _refuse_unfit(self, context: RoundContext) -> None:
        refuse_flat(context.model, type(self).__name__)
        if self.hessian == "double_backward" and is_sharded(context.model):
            raise TypeError(
                "parameters that are sharded over ranks (FSDP) cannot be differentiated twice: use "
                'hessian="central_difference"'
            )
        cast = shortest_cast(context.model)
        if cast is not None:
            raise TypeError(
                f"the model's parameters compute in {cast} (MixedPrecisionPolicy), in which small changes of gradients "
                'are lost: leave param_dtype out of fully_shard, and train with precision="bf16-mixed"'
            )

    def _dynamics(self, context: RoundContext) -> tuple[Dynamics, float]:
        """Return how training moves, and the largest learning rate before the schedule."""
        if self.dynamics == "sgd":
            rate = self.learning_rate or PUBLISHED_RATE
            return sgd_dynamics(context, rate, self.schedule), rate
        dynamics = live_dynamics(context, self.schedule)
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
        self, context: RoundContext, ids: Sequence[Tensor], reference: ReferencePass, manner: tuple[Any, ...]
    ) -> Vault:
        if self.directory is None:
            return MemoryVault()
        owner = hashlib.blake2b(digest_size=16)
        owner.update(repr((sorted(self.settings.items()), manner)).encode())
        owner.update(f"{context.source.pool.fingerprint} {checksum(context.model, context.optimizer)}".encode())
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


def _own_losses(loss_fn: LossFn) -> Callable[[nn.Module, tuple[Batch, bool]], Tensor]:
    """Return a loss of batches beside each of which it stands whether they count."""

    def losses(model: nn.Module, item: tuple[Batch, bool]) -> Tensor:
        return loss_fn(model, item[0])[: None if item[1] else 0]

    return losses


def _clipping(dynamics: Dynamics) -> str:
    limit = getattr(dynamics.clip, "limit", 0.0)
    return f"{type(dynamics.clip).__name__} {limit:.4g}"


def _loss(context: RoundContext, value: float) -> tuple[str, str]:
    """Return what tells a loss function from others: it may be any callable, so its name and what it gives."""
    return getattr(context.loss_fn, "__qualname__", type(context.loss_fn).__qualname__), f"{value:.4g}"


def _full_precision(context: RoundContext) -> AbstractContextManager[Any]:
    # second derivatives and differences of losses are lost in 16 bits
    return torch.autocast(context.device.type, enabled=False)
