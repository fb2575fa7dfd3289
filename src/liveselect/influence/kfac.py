"""Influence under Kronecker-factored curvature: what a natural-gradient step on a candidate does to the reference."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.functional.factors import (
    MatrixLayer,
    Seen,
    Sums,
    add_covariances,
    add_seen_squares,
    add_squares,
    zero_sums,
)
from liveselect.functional.gradients import example_dot
from liveselect.functional.kronecker import relative_damping, solve
from liveselect.functional.sharding import is_sharded, laid_out, local, part_of, refuse_flat, reshard
from liveselect.influence.blocks import Blocks, Variant
from liveselect.influence.fisher import Labels, active_tokens, with_sampled_labels
from liveselect.influence.matrices import find_matrix_layers
from liveselect.influence.reference import ReferencePass, batch_flops
from liveselect.influence.reference_gradient import mean_reference_gradient
from liveselect.losses import target_counts
from liveselect.protocols import Batch, NotMeasurableError, RoundContext
from liveselect.snapshot import measuring

FactorsOf = Literal["training", "candidates"]

_KEPT_BYTES = (
    1 << 29
)  # of activations and gradients that may be kept from one pass over the factor examples to the next


class KFACInfluence:
    r"""Measures influence to first order, with gradients compared under the curvature of the training loss.

    With :math:`g_i` the gradient of a candidate's mean loss, :math:`\bar g` that of the mean reference loss, and F a
    block-diagonal approximation of the Fisher matrix of the loss of one token,

    .. math:: I_i = \bar g^\top (F + \lambda)^{-1} g_i

    in nats per unit learning rate of a natural-gradient step on the candidate; larger is better. (Texts that print a
    minus in front define influence as the change of the loss.) Blocks are the linear layers inside the model, attention
    and MLP, biases included; embeddings, norms and the output head take no part.

    Curvature comes as ``kfac``, the Kronecker product of two covariances; ``ekfac``, which corrects its eigenvalues by
    one more pass over the examples; ``output_only``, which sees the outputs' covariance only and costs least;
    ``diagonal``; and ``identity``, the plain product of gradients. The inverse is applied once, to the mean reference
    gradient; a candidate then costs one forward, one backward through activations and one product of forward size.

    Factors come from examples of the last round's training batches, filled up with candidates where these are too few,
    and are averaged over refreshes with exponentially falling weights. They age slowly, the reference gradient does
    not: each has its own clock, counted in rounds. Several ranks share the examples of both, and each keeps and
    decomposes the factors of its own layers.

    Memory: one direction of the size of the layers, and for each layer two covariances and their eigenvectors.

    Args:
        curvature: one of the forms above.
        labels: ``empirical`` takes the labels of the text; ``sampled`` draws them from the model, as the true Fisher
            matrix asks for, at the price of one more forward. It needs a loss of the labels' log-probabilities.
        damping: :math:`\lambda` as a share of each block's mean eigenvalue, at which it does not depend on the scale of
            the loss; 0.01 to 1 rank alike.
        include: patterns of module names, as in a shell; a layer must match one.
        exclude: likewise; a layer must match none.
        split_fused: give queries, keys and values made by one layer a block each.
        factor_examples: examples of one refresh of the factors, over all ranks.
        factors_of: what they are drawn from: ``training``, whose loss the curvature is of, or ``candidates``, what
            could be trained on next.
        factor_decay: weight of the past at a refresh of the factors, 0 to forget it.
        factors_every: rounds between refreshes of the factors.
        reference_every: rounds between refreshes of the reference gradient, which also follow those of the factors.

    Source: Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884; for influence on language
    models Grosse et al. 2023, arXiv 2308.03296, and inside a bandit Zhang et al. 2024, "Quad", arXiv 2409.16986.
    """

    def __init__(
        self,
        curvature: Variant = "kfac",
        labels: Labels = "empirical",
        damping: float = 0.1,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        split_fused: bool = True,
        factor_examples: int = 128,
        factors_of: FactorsOf = "training",
        factor_decay: float = 0.5,
        factors_every: int = 5,
        reference_every: int = 1,
    ) -> None:
        for name, value, allowed in (
            ("curvature", curvature, get_args(Variant)),
            ("labels", labels, get_args(Labels)),
            ("factors_of", factors_of, get_args(FactorsOf)),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {allowed}, got {value!r}")
        if not (damping > 0 and math.isfinite(damping)):
            raise ValueError(f"expected a positive damping, got {damping}")
        if not 0 <= factor_decay < 1:
            raise ValueError(f"expected factor_decay of at least 0 and below 1, got {factor_decay}")
        for name, number in (
            ("factor_examples", factor_examples),
            ("factors_every", factors_every),
            ("reference_every", reference_every),
        ):
            if number < 1:
                raise ValueError(f"expected {name} of at least 1, got {number}")
        self.curvature: Variant = curvature
        self.labels: Labels = labels
        self.damping = damping
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.split_fused = split_fused
        self.factor_examples = factor_examples
        self.factors_of: FactorsOf = factors_of
        self.factors_every = factors_every
        self.reference_every = reference_every
        self._blocks = Blocks(curvature, factor_decay)
        self._factors_from: int | None = None  # round of the last refresh
        self._reference_from: int | None = None
        self._direction: dict[str, Tensor] | None = None
        self._coverage_checked = False  # in this process, since the direction was made
        self._is_whole = False  # a direction out of a checkpoint waits for the model

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """The preconditioned reference gradient by parameter name; its product with a gradient is an influence.

        Raises:
            RuntimeError: before ``fit``.
        """
        if self._direction is None:
            raise RuntimeError("KFACInfluence has no direction before fit: call fit(context) once in each round")
        return self._direction

    def fit(self, context: RoundContext) -> Mapping[str, float]:
        """Refresh the factors and the reference gradient, each when its clock says so.

        Raises:
            ValueError: the patterns leave no layer, the loss uses layers in ways that cannot be seen, or the reference
                set, its loss, or a factor cannot be used.
        """
        factors_due = self.curvature != "identity" and _is_due(self._factors_from, context.round, self.factors_every)
        reference_due = factors_due or _is_due(self._reference_from, context.round, self.reference_every)
        if not reference_due:
            return {"reference_age": float(context.round - (self._reference_from or 0))}
        metrics: dict[str, float] = {}
        with measuring(context.model, context.optimizer):
            reference = ReferencePass.load(context)
            layers = self._layers(context, reference)
            if factors_due:
                with context.meter.phase("factors"):
                    metrics["factor_tokens"] = self._refresh_factors(context, layers)
                self._factors_from = context.round
            with context.meter.phase("reference gradient"):
                loss, gradient = _reference_gradient(context, reference, layers)
            with context.meter.phase("precondition"):
                self._direction, self._is_whole = self._precondition(context, layers, gradient), False
            self._reference_from = context.round
        self._coverage_checked = False
        size = sum(value.numel() for value in self._direction.values())
        squares = [local(value).double().square().sum() for value in self._direction.values()]
        together = is_sharded(context.model)
        length = distributed.total_of_parts(list(self._direction.values()), squares) if together else sum(squares)
        return metrics | {
            "reference_loss": loss,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "factors_age": float(context.round - (context.round if self._factors_from is None else self._factors_from)),
            "direction_norm": math.sqrt(float(length)),
            "measured_share": size / sum(p.numel() for p in context.model.parameters() if p.requires_grad),
        }

    def check(self, context: RoundContext) -> None:
        """Raise what :meth:`fit` would of the layers, without measuring or factoring curvature."""
        with measuring(context.model, context.optimizer):
            self._layers(context, ReferencePass.load(context))

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)`` float32 on CPU; NaN where it is not finite."""
        if self._is_whole:
            self._direction, self._is_whole = laid_out(self.direction, context.model), False
        direction = self.direction
        batch = context.to_device(batch)
        with measuring(context.model, context.optimizer), context.meter.phase("example gradients"):
            with context.forward_context():
                check = not self._coverage_checked
                influence = example_dot(
                    context.model, context.loss_fn, batch, direction, check, whole=distributed.whole
                )
                self._coverage_checked = True
            context.meter.add_flops(3 * batch_flops(context.model, batch))
        return influence.where(influence.isfinite(), math.nan).float().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return factors, direction and clocks as tensors and builtins; every rank must call it."""
        direction = self._direction
        return {
            "curvature": self.curvature,
            "factors_from": self._factors_from,
            "reference_from": self._reference_from,
            "direction": None if direction is None else {n: distributed.whole(v).cpu() for n, v in direction.items()},
            "blocks": self._blocks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; raise ValueError when it was made with another form of curvature."""
        if state["curvature"] != self.curvature:
            raise ValueError(
                f"the checkpoint holds {state['curvature']!r} curvature, this run asks for {self.curvature!r}: resume "
                "with the former, or start a new run"
            )
        self._factors_from = state["factors_from"]
        self._reference_from = state["reference_from"]
        self._direction = None if state["direction"] is None else dict(state["direction"])
        self._is_whole = self._direction is not None
        self._blocks.load_state_dict(state["blocks"])

    def _layers(self, context: RoundContext, reference: ReferencePass) -> list[MatrixLayer]:
        refuse_flat(context.model, type(self).__name__)
        row = {name: value[:1] for name, value in reference.batches[0].items() if isinstance(value, Tensor)}
        layers = find_matrix_layers(
            context.model,
            lambda: context.loss_fn(context.model, row),
            self.include,
            self.exclude,
            self.split_fused,
        )
        reshard(context.model)
        return layers

    def _refresh_factors(self, context: RoundContext, layers: list[MatrixLayer]) -> float:
        """Measure curvature on a few examples and mix it into the average; returns the tokens seen."""
        ids = self._factor_ids(context)
        mine = ids[distributed.shard(len(ids))]
        together = is_sharded(context.model)
        spare = partial(self._first, context, ids)
        batches = list(distributed.in_step(context.candidate_batches(mine), spare, together))
        if self.labels == "sampled":
            generator = context.generator(f"labels of rank {distributed.rank()}")
            with context.forward_context():
                batches = [(with_sampled_labels(context.model, batch, generator), own) for batch, own in batches]
        reshard(context.model)
        seen = 0.0
        kept: list[Seen | None] = []
        for kinds in self._blocks.passes:
            sums = zero_sums(layers, context.model, kinds)
            for index, (batch, own) in enumerate(batches):
                into = sums if own else zero_sums(layers, context.model, kinds)
                if "squares" in kinds:
                    self._add_squares(context, into, layers, batch, kept[index] if kept else None)
                else:
                    found = self._add_covariances(context, into, layers, batch, _size(kept), check=index == 0)
                    lost = found is None
                    kept.append(None if together and distributed.any_rank(lost) else found)
            seen = self._blocks.take(layers, sums, kinds)
            if not seen:
                raise NotMeasurableError(
                    f"none of the {len(ids)} examples that curvature is measured on carries loss: look for examples "
                    "without labels, or take more (factor_examples)"
                )
        return seen

    @staticmethod
    def _first(context: RoundContext, ids: Tensor) -> dict[str, Tensor]:
        return next(context.candidate_batches(ids[:1]))

    def _factor_ids(self, context: RoundContext) -> Tensor:
        """Return the ids of the examples that a refresh of the factors looks at, ``(m,)``, equal on all ranks."""
        draws, ids = context.generator("factors"), context.candidates[:0]
        if self.factors_of == "training" and context.trained is not None:
            ids = context.trained[torch.randperm(len(context.trained), generator=draws)[: self.factor_examples]]
        missing = self.factor_examples - len(ids)
        others = torch.randperm(len(context.candidates), generator=draws)[:missing]
        return torch.cat([ids, context.candidates[others]])

    def _add_covariances(
        self, context: RoundContext, sums: Sums, layers: list[MatrixLayer], batch: Batch, size: int, check: bool
    ) -> Seen | None:
        """Add one batch, and return what was seen if another pass needs it and ``size`` bytes kept leave room."""
        keep: Seen | None = [] if len(self._blocks.passes) > 1 and size < _KEPT_BYTES else None
        tokens = target_counts(batch), active_tokens(batch)
        with context.forward_context():
            add_covariances(sums, layers, context.model, context.loss_fn, batch, *tokens, keep=keep, check=check)
        context.meter.add_flops(2 * batch_flops(context.model, batch))
        return keep

    def _add_squares(
        self, context: RoundContext, sums: Sums, layers: list[MatrixLayer], batch: Batch, kept: Seen | None
    ) -> None:
        if kept is not None:
            add_seen_squares(sums, kept, active_tokens(batch), self._blocks.basis)
            return
        arguments = (layers, context.model, context.loss_fn, batch, target_counts(batch), active_tokens(batch))
        with context.forward_context():
            add_squares(sums, *arguments, self._blocks.basis)
        context.meter.add_flops(2 * batch_flops(context.model, batch))

    def _precondition(
        self, context: RoundContext, layers: list[MatrixLayer], gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.curvature == "identity":
            return dict(gradient)
        direction: dict[str, Tensor] = {}
        owners = self._blocks.owners(layers)
        parameters = dict(context.model.named_parameters())
        for layer in layers:
            matrix = layer.matrix({name: distributed.whole(gradient[name]) for name in layer.parameters})
            moved = torch.zeros_like(matrix)
            if owners[layer.leader] == distributed.rank():
                for block, index in enumerate(layer.blocks):
                    rows: Any = slice(None) if index is None else index.to(matrix.device)
                    curvature = self._blocks.curvature(layer, block, matrix.device)
                    if curvature is not None:
                        moved[rows] = solve(curvature, matrix[rows], relative_damping(curvature, self.damping))
            moved = distributed.copy_from(moved, owners[layer.leader])
            direction |= {name: part_of(value, parameters[name]) for name, value in layer.by_name(moved).items()}
        return direction


def _is_due(last: int | None, now: int, every: int) -> bool:
    return last is None or now - last >= every


def _reference_gradient(
    context: RoundContext, reference: ReferencePass, layers: list[MatrixLayer]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean reference loss, nats per token, and its gradient in the layers' parameters."""
    names = {name for layer in layers for name in layer.parameters}
    parameters = {name: parameter for name, parameter in context.model.named_parameters() if name in names}
    with context.forward_context():
        mean, gradient = mean_reference_gradient(context, reference, parameters)
    if not math.isfinite(mean):
        raise NotMeasurableError(
            f"the reference loss is {mean}; influence cannot be measured from there: look at the training loss, the "
            "model may have diverged"
        )
    return mean, gradient


def _size(kept: list[Seen | None]) -> int:
    """Return the bytes of what is kept; layers that share an input share its memory."""
    tensors = {tensor.data_ptr(): tensor for seen in kept for entry in seen or [] for tensor in entry[1:]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
