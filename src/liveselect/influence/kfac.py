"""Influence under Kronecker-factored curvature: the effect of a natural-gradient step on the reference loss."""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.arguments import check_plain
from liveselect.functional.coverage import Hidden, patterns
from liveselect.functional.factors import (
    MatrixLayer,
    Seen,
    Sums,
    add_covariances,
    add_seen_squares,
    add_squares,
    zero_sums,
)
from liveselect.functional.kronecker import relative_damping, solve
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, SmallFit, State
from liveselect.influence.blocks import Blocks, Variant
from liveselect.influence.direction import Direction
from liveselect.influence.fisher import Labels, active_tokens, with_sampled_labels
from liveselect.influence.hidden import refuse_hidden, warn_of_share
from liveselect.influence.matrices import find_matrix_layers
from liveselect.influence.reference import ReferencePass, counting, require_finite
from liveselect.losses import target_counts

FactorsOf = Literal["training", "candidates"]

_FEW_FACTORS = 8  # examples of factors from which the time of more is found
_MAX_KEPT_BYTES = 1 << 29  # of observed tensors, from one pass over the factor examples to the next


class KFACInfluence(InfluenceEstimator):
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
        exclude: patterns of the same form; a layer must match none.
        split_fused: give queries, keys and values made by one layer a block each.
        factor_examples: examples of one refresh of the factors, over all ranks.
        factors_of: their source: ``training``, the data that the curvature is of, or the ``candidates`` of the round.
        factor_decay: weight of the past at a refresh of the factors, 0 to forget it.
        factors_every: rounds between refreshes of the factors.
        reference_every: rounds between refreshes of the reference gradient, which also follow those of the factors.

    Source: Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884; for influence on language
    models Grosse et al. 2023, arXiv 2308.03296, and inside a bandit Zhang et al. 2024, "Quad", arXiv 2409.16986.
    """

    fit_lasts = True  # factors and reference gradient have clocks of their own
    rehearsed = False
    has_direction = True

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
        check_plain(KFACInfluence, locals())
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
        self._direction: Direction | None = None

    def direction(self) -> Mapping[str, Tensor] | None:
        """Return the preconditioned reference gradient by parameter name, None before a fit.

        Its product with a gradient is an influence. Out of a checkpoint it is whole until it is first used.
        """
        return None if self._direction is None else self._direction.values

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Refresh the factors and the reference gradient, each when it is due.

        Raises:
            ValueError: the patterns leave no layer, the loss uses layers in ways that cannot be observed, or the
                reference set, its loss, or a factor cannot be used.
        """
        now = round.index
        factors_due = self.curvature != "identity" and _is_due(self._factors_from, now, self.factors_every)
        if not factors_due and not _is_due(self._reference_from, now, self.reference_every):
            return {"reference_age": float(now - (self._reference_from or 0))}
        metrics: dict[str, float] = {}
        reference = ReferencePass.load(model, round)
        layers = self._layers(model, reference)
        if factors_due:
            with model.meter.phase("factors"):
                metrics["factor_tokens"] = self._refresh_factors(model, round, layers)
            self._factors_from = now
        with model.meter.phase("reference gradient"):
            loss, gradient = _reference_gradient(model, reference, layers)
        with model.meter.phase("precondition"), model.meter.counting():
            direction = self._precondition(model, layers, gradient)
        self._direction, self._reference_from = Direction(direction), now
        size = sum(value.numel() for value in direction.values())
        return metrics | {
            "reference_loss": loss,
            **reference.parts,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "factors_age": float(now - (now if self._factors_from is None else self._factors_from)),
            "direction_norm": model.view.norm(list(direction.values())),
            "measured_share": size / sum(p.numel() for p in model.module.parameters() if p.requires_grad),
        }

    def small_fit(self, round: Round) -> SmallFit:
        """Return a copy that measures curvature on a batch of examples; the reference set is read in full."""
        small = copy.deepcopy(self)
        small.factor_examples = min(self.factor_examples, max(_FEW_FACTORS, round.source.batch_size))
        small._factors_from = small._reference_from = None
        whole = self.factor_examples / small.factor_examples / self.factors_every
        return SmallFit(small, fit=1 / self.reference_every, phases={"factors": whole})

    def check(self, model: LiveModel, round: Round) -> None:
        """Raise the errors of :meth:`fit` about layers, all at once; warn where these are little of the model."""
        layers = self._layers(model, ReferencePass.load(model, round))
        sizes = {name: p.numel() for name, p in model.module.named_parameters(remove_duplicate=False)}
        names = [name for layer in layers for name in layer.parameters]

        def advice(hidden: list[Hidden]) -> str:
            found = patterns(each.module for each in hidden)
            return (
                f"Leave them out with exclude={[*self.exclude, *found]}, or take "
                'FirstOrderInfluence(engine="central_difference"), which takes any module'
            )

        with model.autocast():
            refuse_hidden(model, round, names, type(self).__name__, advice, replays=False)
        trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
        warn_of_share(
            type(self).__name__,
            sum(sizes[name] for name in names) / trained,
            "it has factors for linear layers only, and for no embedding, output head or fused layer of experts. "
            'FirstOrderInfluence(engine="central_difference") measures all of them',
        )

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)``; NaN where it is not finite."""
        if self._direction is None:
            raise RuntimeError("KFACInfluence.score was called before fit: call fit(model, round) in each round")
        products = partial(self._direction.products, model, model.loss_fn, batch)
        work = f"products of {len(self._direction.values)}"
        with model.meter.phase("example gradients"), model.autocast(), counting(model, work, batch, trial=products):
            influence = products()
        return influence.where(influence.isfinite(), math.nan)

    def score_tokens(self, model: LiveModel, batch: Batch) -> Tensor | None:
        """Return the influence of each token, ``(B, T)``, from the same direction; None where it is not known."""
        if self._direction is None:
            raise RuntimeError("score_tokens was called before fit: call fit(model, round) in each round")
        with model.meter.phase("example gradients"):
            return self._direction.tokens(model, batch)

    def state_dict(self) -> State:
        """Return factors, direction and clocks as tensors and builtins; every rank must call it."""
        return {
            "curvature": self.curvature,
            "factors_from": self._factors_from,
            "reference_from": self._reference_from,
            "direction": None if self._direction is None else self._direction.on_cpu(),
            "blocks": self._blocks.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state; raise ValueError when it was made with another form of curvature."""
        if state["curvature"] != self.curvature:
            raise ValueError(
                f"the checkpoint holds {state['curvature']!r} curvature, this run asks for {self.curvature!r}: resume "
                "with the former, or start a new run"
            )
        self._factors_from = state["factors_from"]
        self._reference_from = state["reference_from"]
        self._direction = None if state["direction"] is None else Direction(state["direction"], is_whole=True)
        self._blocks.load_state_dict(state["blocks"])

    def fitted_state(self) -> State | None:
        """Return that there is a fit, which :meth:`state_dict` holds; None before."""
        return None if self._direction is None else {}

    def load_fitted_state(self, state: State) -> None:
        """Do nothing: :meth:`load_state_dict` has restored it."""

    def _layers(self, model: LiveModel, reference: ReferencePass) -> list[MatrixLayer]:
        model.view.refuse_flat(type(self).__name__)
        row = {name: value[:1] for name, value in reference.batches[0].items() if isinstance(value, Tensor)}
        with counting(model, "find layers", row):
            layers = find_matrix_layers(
                model.module, lambda: model.losses(row), self.include, self.exclude, self.split_fused
            )
        model.view.reshard()
        return layers

    def _refresh_factors(self, model: LiveModel, round: Round, layers: list[MatrixLayer]) -> float:
        """Measure curvature on a few examples and mix it into the average; returns the number of tokens."""
        ids = self._factor_ids(round)
        mine = round.batches(ids[distributed.shard(len(ids))])
        batches = list(model.view.in_step(mine, lambda: next(round.batches(ids[:1]))))
        if self.labels == "sampled":
            generator = round.generator(f"labels of rank {distributed.rank()}")
            sampled = []
            for batch, own in batches:
                with counting(model, "sample labels", batch), model.autocast():
                    sampled.append((with_sampled_labels(model.module, batch, generator), own))
            batches = sampled
        model.view.reshard()
        seen = 0.0
        kept: list[Seen | None] = []
        for kinds in self._blocks.passes:
            sums = zero_sums(layers, model.module, kinds)
            for index, (batch, own) in enumerate(batches):
                into = sums if own else zero_sums(layers, model.module, kinds)
                if "squares" in kinds:
                    self._add_squares(model, into, kinds, layers, batch, kept[index] if kept else None)
                else:
                    found = self._add_covariances(model, into, kinds, layers, batch, _size(kept), index == 0)
                    kept.append(None if model.view.any(found is None) else found)
            with model.meter.counting():
                seen = self._blocks.take(layers, sums, kinds)
            if not seen:
                raise NotMeasurableError(
                    f"none of the {len(ids)} examples that curvature is measured on carries loss: look for examples "
                    "without labels, or take more (factor_examples)"
                )
        return seen

    def _factor_ids(self, round: Round) -> Tensor:
        """Return the ids of the examples of a refresh of the factors, ``(m,)``, equal on all ranks."""
        draws, ids = round.generator("factors"), round.candidates[:0]
        if self.factors_of == "training" and round.trained is not None:
            ids = round.trained[torch.randperm(len(round.trained), generator=draws)[: self.factor_examples]]
        missing = self.factor_examples - len(ids)
        others = torch.randperm(len(round.candidates), generator=draws)[:missing]
        return torch.cat([ids, round.candidates[others]])

    def _add_covariances(
        self,
        model: LiveModel,
        sums: Sums,
        kinds: tuple[str, ...],
        layers: list[MatrixLayer],
        batch: Batch,
        size: int,
        check: bool,
    ) -> Seen | None:
        """Add one batch; return the observed tensors if another pass needs them and ``size`` kept bytes leave room."""
        keep: Seen | None = [] if len(self._blocks.passes) > 1 and size < _MAX_KEPT_BYTES else None
        tokens = target_counts(batch), active_tokens(batch)

        def add(sums: Sums, keep: Seen | None = None) -> None:
            add_covariances(sums, layers, model.module, model.loss_fn, batch, *tokens, keep=keep, check=check)

        work = f"{kinds} of {len(layers)} layers"

        def trial() -> None:
            add(zero_sums(layers, model.module, kinds))

        with model.autocast(), counting(model, work, batch, trial=trial):
            add(sums, keep)
        return keep

    def _add_squares(
        self,
        model: LiveModel,
        sums: Sums,
        kinds: tuple[str, ...],
        layers: list[MatrixLayer],
        batch: Batch,
        kept: Seen | None,
    ) -> None:
        if kept is not None:
            with counting(model, f"squares seen of {len(layers)} layers", batch):
                add_seen_squares(sums, kept, active_tokens(batch), self._blocks.basis)
            return
        arguments = (layers, model.module, model.loss_fn, batch, target_counts(batch), active_tokens(batch))

        def add(sums: Sums) -> None:
            add_squares(sums, *arguments, self._blocks.basis)

        def trial() -> None:
            add(zero_sums(layers, model.module, kinds))

        with model.autocast(), counting(model, f"{kinds} of {len(layers)} layers", batch, trial=trial):
            add(sums)

    def _precondition(
        self, model: LiveModel, layers: list[MatrixLayer], gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.curvature == "identity":
            return dict(gradient)
        direction: dict[str, Tensor] = {}
        owners = self._blocks.owners(layers)
        for layer in layers:
            matrix = layer.matrix({name: model.view.whole(gradient[name]) for name in layer.parameters})
            moved = torch.zeros_like(matrix)
            if owners[layer.leader] == distributed.rank():
                for block, index in enumerate(layer.blocks):
                    rows = slice(None) if index is None else index.to(matrix.device)
                    curvature = self._blocks.curvature(layer, block, matrix.device)
                    if curvature is not None:
                        moved[rows] = solve(curvature, matrix[rows], relative_damping(curvature, self.damping))
            moved = distributed.copy_from(moved, owners[layer.leader])
            direction |= model.view.lay_out(layer.by_name(moved))
        return direction


def _is_due(last: int | None, now: int, every: int) -> bool:
    return last is None or now - last >= every


def _reference_gradient(
    model: LiveModel, reference: ReferencePass, layers: list[MatrixLayer]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean reference loss, nats per token, and its gradient in the layers' parameters."""
    names = {name for layer in layers for name in layer.parameters}
    parameters = {name: parameter for name, parameter in model.module.named_parameters() if name in names}
    with model.autocast():
        mean, parts = reference.gradient(model, parameters)
    require_finite(mean, "look at the training loss: the model may have diverged")
    return mean, model.view.spread(parts, parameters)


def _size(kept: list[Seen | None]) -> int:
    """Return the bytes of the kept tensors; layers that share an input share its memory."""
    tensors = {tensor.data_ptr(): tensor for seen in kept for entry in seen or [] for tensor in entry[1:]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
