"""LESS: the cosine of a candidate's preconditioned gradient with the gradients of the reference set."""

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from liveselect.arguments import check_plain
from liveselect.functional.features import adam_feature
from liveselect.functional.sketches import CountSketch, DenseSketch, LowRankSketch, Projection
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, State
from liveselect.influence.one_step import trainable_parameters
from liveselect.influence.other_weights import OtherWeights
from liveselect.influence.reference import charge_gradient, example_weights, split_rows

Features = Literal["adam", "adam_slope", "gradient"]
Form = Literal["published", "optimizer"]
Kind = Literal["sparse", "dense", "low_rank"]
Over = Literal["max", "mean"]

SUBTASK = "subtask"
"""The key of a reference batch that says which subtask each example is of, ``(B,)`` int64."""

_PROJECTIONS: dict[Kind, type[CountSketch | DenseSketch | LowRankSketch]] = {
    "sparse": CountSketch,
    "dense": DenseSketch,
    "low_rank": LowRankSketch,
}

_FLOPS_PER_COORDINATE = 9  # of moments, in each example


@dataclass(frozen=True)
class _Moments:
    """Adam's memory of one parameter, and its settings."""

    mean: Tensor
    square: Tensor
    steps: int
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class _Checkpoint:
    """A state of the model that gradients are taken in.

    Attributes:
        weights: None for the live ones.
        moments: of the parameters that have some, by name.
        weight: its share of the score.
    """

    weights: OtherWeights | None
    moments: Mapping[str, _Moments]
    weight: float


class LESSInfluence(InfluenceEstimator):
    r"""Measures how much a candidate's step is like the gradient of the reference set, whatever its length.

    .. math:: \max_j \sum_c w_c \left\langle \frac{R \Gamma_c(z)}{|R \Gamma_c(z)|},
              \operatorname{mean}_{z' \in j} \frac{R \nabla \ell_c(z')}{|R \nabla \ell_c(z')|} \right\rangle

    over subtasks j of the reference set and checkpoints c, with :math:`\Gamma` what Adam makes of the candidate's
    gradient, plain gradients of the reference examples z', and a random projection R. Reference records name their
    subtask in a column of that name (or another, ``ReferenceSet(columns={"subtask": "subject"})``); without it they
    are all of one. In a mixture of reference sets the mean over examples gives each set its weight. Gradients are taken
    one example at a time: six times the parameters in FLOPs for each token and checkpoint. A number in -1..1; larger is
    better.

    Args:
        checkpoints: checkpoints of the Trainer, with the optimizer's state; by default the live model is the only one.
        weights: of the checkpoints; by default their learning rates. They are scaled to sum to 1.
        dimensions: that gradients are projected to; None keeps them whole.
        projection: ``sparse`` adds each coordinate to one dimension (:class:`CountSketch`); ``dense`` is the matrix of
            signs of the paper, ``dimensions`` times as much work; ``low_rank`` is what a random branch of low rank
            beside each layer sees.
        over: subtasks: ``max`` as published, or ``mean``.
        features: of candidates: ``adam`` is the step that Adam would take; ``adam_slope`` leaves out the momentum,
            which all candidates share; ``gradient`` takes the gradient as it is. Without moments (another optimizer, or
            before its first step) it is ``gradient`` in any case, which ``less_preconditioned`` in the metrics shows.
        form: ``published`` has no bias correction and eps inside the root; ``optimizer`` is what Adam does.
        include: patterns of names of parameters, as in a shell, that gradients are taken in; with LoRA only its own
            are trained.
        seed: of the projection.

    Source: Xia et al. 2024, "LESS", arXiv 2402.04333: four checkpoints of LoRA weights, 8,192 dimensions of a dense
    projection.
    """

    def __init__(
        self,
        checkpoints: Sequence[str | Path] = (),
        weights: Sequence[float] | None = None,
        dimensions: int | None = 8192,
        features: Features = "adam",
        form: Form = "published",
        include: Sequence[str] = ("*",),
        seed: int = 0,
        projection: Kind = "sparse",
        over: Over = "max",
    ) -> None:
        check_plain(LESSInfluence, locals())
        named = (("features", features, Features), ("form", form, Form))
        for name, value, kind in (*named, ("projection", projection, Kind), ("over", over, Over)):
            if value not in get_args(kind):
                raise ValueError(f"expected {name} to be one of {get_args(kind)}, got {value!r}")
        if weights is not None and (len(weights) != len(checkpoints) or not sum(weights) > 0 or min(weights) < 0):
            raise ValueError(
                f"expected a weight of at least 0 for each of {len(checkpoints)} checkpoints, got {weights}"
            )
        self.checkpoints = tuple(Path(each) for each in checkpoints)
        self.weights = None if weights is None else tuple(weights)
        self.dimensions = dimensions
        self.features: Features = features
        self.form: Form = form
        self.include = tuple(include)
        self.seed = seed
        self.projection: Kind = projection
        self.over: Over = over
        self._opened: list[_Checkpoint] = []
        self._project: Projection | None = None
        self._toward: list[Tensor] = []

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Take the gradients of the reference set in every checkpoint.

        Raises:
            FileNotFoundError: a checkpoint is not there.
            NotMeasurableError: no gradient of the reference set is finite and other than zero.
            TypeError: ranks hold parts of the parameters.
            ValueError: a checkpoint does not fit the model, or no trained parameter is included.
        """
        parameters = self._parameters(model)
        self._open(model, parameters)
        self._toward = []
        with model.meter.phase("reference gradients"):
            for checkpoint in self._opened:
                with _weights_of(checkpoint, model):
                    rows = [row for batch in round.source.reference() for row in split_rows(model.to_device(batch), 1)]
                    found = [self._unit(model, row, parameters, {}) for row in rows]
                subtasks = [int(row[SUBTASK]) if SUBTASK in row else 0 for row in rows]
                weights = [float(weight) for weight in example_weights(rows)]
                known: dict[int, list[tuple[float, Tensor]]] = {}
                for subtask, weight, unit in zip(subtasks, weights, found, strict=True):
                    if unit is not None:
                        known.setdefault(subtask, []).append((weight, unit))
                if set(known) != set(subtasks):
                    raise NotMeasurableError(
                        f"none of the reference examples of {len(set(subtasks) - set(known))} of {len(set(subtasks))} "
                        "subtasks has a finite gradient other than zero: look at their labels, and at the training loss"
                    )
                self._toward.append(torch.stack([_mean(known[each]) for each in sorted(known)]))
        coordinates = sum(parameter.numel() for parameter in parameters.values())
        moments = [len(each.moments) for each in self._opened]
        return {
            "less_coordinates": float(coordinates),
            "less_dimensions": float(coordinates if self._project is None else self._project.dimensions),
            "less_subtasks": float(len(self._toward[0])),
            "less_preconditioned": sum(moments) / (len(moments) * len(parameters)),
        }

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the weighted mean cosine of each example, ``(B,)``; NaN where a gradient is zero or not finite."""
        if not self._toward:
            raise RuntimeError("LESSInfluence.score was called before fit: call fit(model, round) in each round")
        parameters = self._parameters(model)
        self._open(model, parameters)
        rows = split_rows(batch, 1)
        scores = torch.zeros(len(rows), len(self._toward[0]), device=model.device)
        with model.meter.phase("example gradients"):
            for checkpoint, toward in zip(self._opened, self._toward, strict=True):
                with _weights_of(checkpoint, model):
                    for i, row in enumerate(rows):
                        unit = self._unit(model, row, parameters, checkpoint.moments)
                        scores[i] += checkpoint.weight * (math.nan if unit is None else toward.to(unit) @ unit)
        return scores.amax(dim=1) if self.over == "max" else scores.mean(dim=1)

    def fitted_state(self) -> State | None:
        """Return the directions of the reference set."""
        return {"toward": [each.cpu() for each in self._toward]} if self._toward else None

    def load_fitted_state(self, state: State) -> None:
        """Restore the directions; checkpoints are opened again when they are needed."""
        self._toward = list(state["toward"])

    def release(self) -> None:
        """Free the projection and the checkpoints."""
        self._opened, self._project = [], None

    def _parameters(self, model: LiveModel) -> dict[str, nn.Parameter]:
        model.view.refuse_parts("LESSInfluence takes whole gradients, but ranks hold parts of the parameters (FSDP)")
        trained = {id(parameter) for parameter in trainable_parameters(model.optimizer)}
        found = {name: p for name, p in model.module.named_parameters() if id(p) in trained}
        kept = {name: p for name, p in found.items() if any(fnmatchcase(name, each) for each in self.include)}
        if not kept:
            raise ValueError(f"expected include={self.include} to fit a trained parameter, they are {sorted(found)}")
        return kept

    def _open(self, model: LiveModel, parameters: Mapping[str, nn.Parameter]) -> None:
        if self._project is None and self.dimensions is not None:
            shapes = {name: parameter.shape for name, parameter in parameters.items()}
            self._project = _PROJECTIONS[self.projection](shapes, self.dimensions, self.seed, model.device)
        if not self.checkpoints:
            wanted = self.features != "gradient"
            moments = _moments(model.optimizer.state_dict(), model.optimizer, parameters) if wanted else {}
            self._opened = [_Checkpoint(None, moments, 1.0)]
        elif not self._opened:
            read = [_read(path, model, parameters, self.features != "gradient") for path in self.checkpoints]
            shares = self.weights or tuple(rate for _, _, rate in read)
            self._opened = [
                _Checkpoint(weights, moments, share / sum(shares))
                for (weights, moments, _), share in zip(read, shares, strict=True)
            ]

    def _unit(
        self, model: LiveModel, row: Batch, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, _Moments]
    ) -> Tensor | None:
        """Return the feature of one example at unit length, None where it has none."""
        with torch.enable_grad():
            with model.autocast():
                charge_gradient(model, row, list(parameters.values()))
                loss = model.losses(row).sum()
            gradients = model.view.gradients(loss, list(parameters.values()))
        coordinates = sum(parameter.numel() for parameter in parameters.values())
        projecting = 0.0 if self._project is None else self._project.flops
        model.meter.add_flops(_FLOPS_PER_COORDINATE * coordinates + projecting)
        found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        # a parameter without moments was never updated: what Adam would do there is not known
        features = {
            name: self._feature(gradient, moments.get(name))
            for name, gradient in found.items()
            if not moments or name in moments
        }
        if self._project is not None:
            vector = self._project(features)
        else:
            vector = torch.cat([features.get(n, torch.zeros_like(p)).flatten() for n, p in parameters.items()]).float()
        length = vector.norm()
        known = length.isfinite() & (length > 0) & loss.isfinite()
        return vector / length if bool(known.item()) else None

    def _feature(self, gradient: Tensor, moments: _Moments | None) -> Tensor:
        if moments is None:
            return gradient.detach()
        return adam_feature(
            gradient.detach().float(),
            moments.mean,
            moments.square,
            moments.betas,
            moments.eps,
            steps=moments.steps if self.form == "optimizer" else None,
            momentum=self.features == "adam",
        )


def _mean(weighted: Sequence[tuple[float, Tensor]]) -> Tensor:
    total = sum(weight for weight, _ in weighted)
    return torch.stack([unit * (weight / total) for weight, unit in weighted]).sum(dim=0)


def _weights_of(checkpoint: _Checkpoint, model: LiveModel) -> AbstractContextManager[None]:
    return nullcontext() if checkpoint.weights is None else checkpoint.weights.on(model)


def _moments(
    state: Mapping[str, object], optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, _Moments]:
    """Return Adam's moments of the named parameters out of the state of an optimizer like the live one."""
    groups = cast(Iterable[Mapping[str, object]], state["param_groups"])
    memory = cast(Mapping[int, Mapping[str, Tensor]], state["state"])
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        for index, parameter in zip(cast(list[int], group["params"]), live["params"], strict=True):
            kept = memory.get(index, {})
            if id(parameter) in names and "exp_avg" in kept and "exp_avg_sq" in kept:
                found[names[id(parameter)]] = _Moments(
                    kept["exp_avg"].to(parameter.device).float(),
                    kept["exp_avg_sq"].to(parameter.device).float(),
                    int(kept["step"]),
                    cast(tuple[float, float], tuple(cast(Sequence[float], group["betas"]))),
                    float(cast(float, group["eps"])),
                )
    return found


def _read(
    path: Path, model: LiveModel, parameters: Mapping[str, nn.Parameter], wants_moments: bool
) -> tuple[OtherWeights, dict[str, _Moments], float]:
    """Return weights, moments and learning rate of a checkpoint of the Trainer."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint of the Trainer at {path}, found no file there")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        values, state = kept["state_dict"], (kept.get("optimizer_states") or [{"param_groups": [], "state": {}}])[0]
        missing = sorted(set(dict(model.module.named_parameters())) - set(values))
        if missing:
            raise ValueError(f"it lacks the parameters {missing[:5]}")
        moments = _moments(state, model.optimizer, parameters) if wants_moments else {}
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {path} does not fit the model and its optimizer: {str(error).splitlines()[0]}. Pass "
            "checkpoints that the Trainer wrote of this model, with the optimizer's state"
        ) from error
    rate = max((float(group["lr"]) for group in state["param_groups"]), default=1.0)
    return OtherWeights(values, is_whole=True), moments, rate
