"""The grammar of liveselect: who measures, who predicts, who chooses, and what each of them is given.

Every round asks which candidates would lower the reference loss most. An :class:`InfluenceEstimator` measures the few
candidates that a :class:`Selector` proposes; the selector is given the results and chooses; an
:class:`InfluenceRegressor` predicts what was not measured; a :class:`CandidateSource` serves the data. Inherit from
these four and override what you need: one method is abstract in a selector, one in an estimator, two in a regressor.
Every other method is optional and has its default here, with a sentence that says when it is called.

The engine keeps these rules, so that no part has to know them:

- each candidate is trained on once before any is trained on twice, and what a pass over the pool left over comes first;
- a selector is given candidates that were used equally often; the engine shuffles what it chose;
- what a selector proposes is measured once, though it be named twice; what it chooses is checked: distinct ids, all of
  them candidates, as many as asked for;
- only finite measurements reach a selector;
- ``fit`` and ``score`` run inside :func:`~liveselect.preserve.measuring`, which the engine alone opens: modules in eval
  mode, no gradients, random states and buffers put back afterwards. Whoever moves parameters puts them back;
- all ranks decide from the same numbers, and a check fails if they ever differ.

Shape letters, used everywhere: ``B`` batch rows, ``T`` tokens, ``V`` vocabulary, ``n`` candidates, ``m`` measured,
``k`` chosen, ``R`` ranks. Influence is *larger = lowers the reference loss more*, in nats per unit learning rate;
methods whose papers use another sign are converted in one place each.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, wraps
from math import inf
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from liveselect.cost import CostMeter
from liveselect.parameters import ParameterView
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.seeding import generator_for

Batch = Mapping[str, Tensor]
"""``id (B,)`` int64, ``input_ids (B, T)``, ``labels (B, T)`` with -100 where no loss is taken; others pass through."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Maps a model and a batch to ``(B,)`` mean losses, nats per token, one for each example."""

State = Mapping[str, Any]
"""What a part remembers, as tensors and builtins: checkpoints are loaded with ``weights_only=True``."""

CostByPhase = Mapping[str, Mapping[str, float]]
"""``seconds`` and ``flops`` by phase."""

IGNORE_INDEX = -100
"""The label of a token that carries no loss."""

REFERENCE_SET, REFERENCE_WEIGHT = "reference_set", "reference_weight"
"""Keys of the batches of a mixture of reference sets: which set ``(B,)``, and the weight of its tokens ``(B,)``."""

MIN_MEASUREMENTS = 8
"""Finite measurements from which a regressor learns; a round with fewer is drawn uniformly."""

NO_IDS = torch.empty(0, dtype=torch.int64)
"""No candidates, ``(0,)``."""


class SelectionWarning(UserWarning):
    """Something about selection is not as it should be, and training goes on."""


class NotMeasurableError(ValueError):
    """Influence cannot be measured with the model as it is in this round; a later round may be able to.

    An estimator raises it on all ranks alike. A run goes on, and the selector is given no measurements.
    """


class RoundInterruptedError(RuntimeError):
    """The run was asked to stop while a round was measuring; what was measured is kept."""


class TrainingBatches(Protocol):
    """A loader of training batches: it has a length, and can be iterated again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


# ---- what parts are given ----------------------------------------------------------------------------------------


class CandidateSource(ABC):
    """The data as the engine sees it; a datamodule implements it.

    Attributes:
        pool: the candidates.
        batch_size: rows in the training batch of one rank.
        setup_seconds: seconds that reading and checking the data took, which the ledger charges to selection.
        reference_fingerprint: identifies the reference set; a resumed run reports when it has changed.
        reference_examples: how many examples it has, where that is known.
        reference_names: names of the sets that the reference set is a mixture of, none where it is a single one.
        before_batch: called in the training process when the trainer asks for its next batch; the callback sets it.
    """

    pool: CandidatePool
    batch_size: int
    setup_seconds: float = 0.0
    reference_fingerprint: str | None = None
    reference_examples: int | None = None
    reference_names: tuple[str, ...] = ()
    before_batch: Callable[[], None] | None = None

    @abstractmethod
    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order."""

    def in_bulk(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the candidates ``ids (n,)`` in batches as large as are read fastest; called where no model sees them.

        A batch that a model fits into is small, and reading a pool in such batches takes most of the time.
        """
        return self.candidates(ids)

    @abstractmethod
    def reference(self) -> Iterable[Batch]:
        """Yield the batches of the reference set, the same ones in the same order at each call."""

    @abstractmethod
    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``."""

    @abstractmethod
    def follow(self, plan: Plan) -> None:
        """Serve training batches from ``plan``, starting at its cursor."""

    def begin_loop(self, accumulate: int) -> "TrainingBatches":
        """Make the data ready for a loop without a Trainer, and return the loader of this rank's training batches.

        Called once, before anything else is asked for. The loader walks the plan that is followed, has a length that
        is a multiple of ``accumulate``, the batches of an optimizer step, and can be iterated again. By default a
        source has no loader of its own.

        Raises:
            NotImplementedError: it has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} serves no training batches of its own: define begin_loop, or pass a "
            "SelectionDataModule"
        )

    def training_batches(self, plan: Plan) -> Iterable[object] | None:
        """Yield this rank's training batches of a plan that training itself does not follow, in its process.

        Called where a verdict trains a copy on random candidates. By default None: the source does not serve them.
        """
        return None

    def further_sets(self) -> Mapping[str, Iterable[Batch]]:
        """Return sets beside the reference, by name, on which a verdict looks at what selection does not aim at."""
        return {}

    def check_model(self, module: nn.Module) -> None:  # noqa: B027 - optional
        """Raise what would fail when the module is trained on these data; called before it is trained or scored."""

    def cost_before_training(self) -> CostByPhase:
        """Return what making the pool's groups cost; asked once, when the selector uses groups."""
        return {}


@dataclass(frozen=True)
class Round:
    """What those who choose may look at during one round.

    Attributes:
        index: index of the round.
        step: optimizer steps done.
        seed: seed of the selection; :meth:`generator` derives generators from it.
        candidates: ``(n,)`` ascending ids that may be chosen, all used equally often.
        source: the data.
        leftovers: ``(l,)`` ids that the last pass over the pool left over. The engine trains on them in this round,
            so the selector is asked for ``l`` fewer.
        trained: ``(k,)`` ids of the plan that was trained on last; None before the first.
        budget: candidates that the round trains on, its leftovers among them; 0 where it is not known.
        steps: optimizer steps of the round; 0 where they are not known.
        total_steps: of the run; infinite where it has no end, or where they are not known.
        offset: ``(size,)`` float32, what a prior adds to the scores by which the round's candidates are compared, in
            standard deviations of these scores; None where there is none.
        device: where :meth:`batches` puts tensors.
        meter: where costs are charged, and the progress display.
    """

    index: int
    step: int
    seed: int
    candidates: Tensor
    source: CandidateSource
    leftovers: Tensor = NO_IDS
    trained: Tensor | None = None
    budget: int = 0
    steps: int = 0
    total_steps: float = inf
    offset: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    meter: CostMeter = field(default_factory=CostMeter)

    @property
    def pool(self) -> CandidatePool:
        """All candidates, their groups, and how often each was used."""
        return self.source.pool

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU generator for one purpose of this round, equal on all ranks and after a resume."""
        return generator_for(self.seed, self.index, purpose)

    def batches(self, ids: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the candidates ``ids (n,)`` in batches on the round's device; nothing on a rank without ids."""
        if not len(ids):
            return iter(())
        return (on_device(batch, self.device) for batch in self.source.candidates(ids))

    def in_bulk(self, ids: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the candidates ``ids (n,)`` in large batches on the round's device; nothing on a rank without ids."""
        if not len(ids):
            return iter(())
        return (on_device(batch, self.device) for batch in self.source.in_bulk(ids))


@dataclass(frozen=True)
class LiveModel:
    """What those who measure may use: the model and the optimizer as training has left them.

    Attributes:
        module: the live model, unwrapped; the module that ``loss_fn`` takes.
        optimizer: the live optimizer, unwrapped.
        loss_fn: per-example loss.
        global_batch: examples of one optimizer step, over accumulation and all ranks.
        clip_gradients: clips the ``.grad`` of the given parameters in place, as training does.
        autocast: opens the precision context of training.
        meter: where costs are charged, and the progress display.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    global_batch: int
    clip_gradients: Callable[[list[nn.Parameter]], None] = lambda parameters: None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    meter: CostMeter = field(default_factory=CostMeter)

    @cached_property
    def view(self) -> ParameterView:
        """The parameters, whole or in parts that ranks hold (FSDP), as one object."""
        return ParameterView(self.module)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.module.parameters()).device

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each example, ``(B,)`` nats per token, in the precision context that is open."""
        return self.loss_fn(self.module, batch)

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Return the batch with its tensors on the model's device."""
        return on_device(batch, self.device)

    def full_precision(self) -> AbstractContextManager[object]:
        """Return a context without autocast: differences of losses are lost in 16 bits."""
        return torch.autocast(self.device.type, enabled=False)


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def text_tokens(batch: Batch) -> Tensor | None:
    """Return which tokens are text, ``(B, T)`` bool on CPU, and no padding; None when all are.

    Batches of rows of several lengths need not have an ``attention_mask``: then what comes after the last target of a
    row is padding, and what comes before a target is its context.
    """
    if "attention_mask" in batch:
        mask = batch["attention_mask"].cpu().bool()
        return None if bool(mask.all()) else mask
    labels = batch["labels"].cpu() if "labels" in batch else None
    if labels is None or bool((labels[:, -1] != IGNORE_INDEX).all()):
        return None
    return (labels != IGNORE_INDEX).flip(1).cummax(dim=1).values.flip(1)


# ---- parts -------------------------------------------------------------------------------------------------------

_GIVEN = "_given_to_constructor"  # no attribute that a part of one's own would have
LONGEST_SETTING = 32
"""Items of a list that is noted as a setting; longer ones are data."""


class Named(str):
    """What a setting is called that is no plain value: a class, a function, a tensor."""

    __slots__ = ()


def _noted(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that notes its arguments; of nested ones (``super().__init__``) the outermost does."""
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def construct(self: "Part", *arguments: Any, **named: Any) -> None:
        if _GIVEN not in vars(self):
            with suppress(TypeError):  # the constructor itself says what is wrong with them
                bound = signature.bind(self, *arguments, **named)
                bound.apply_defaults()
                given = dict(list(bound.arguments.items())[1:])
                vars(self)[_GIVEN] = {name: as_setting(value) for name, value in given.items()}
        constructor(self, *arguments, **named)

    return construct


def given_to(part: "Part") -> Mapping[str, object]:
    """Return what the constructor of a part was given, defaults included, as :func:`as_setting` returns it."""
    found: Mapping[str, object] = vars(part).get(_GIVEN, {})
    return found


def as_setting(value: object) -> object:
    """Return a plain value or a part as it is, anything else as text that says what it is."""
    if value is None or isinstance(value, bool | int | float | str | Part):
        return value
    if isinstance(value, np.generic):
        return as_setting(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list) and len(value) <= LONGEST_SETTING:
        return [as_setting(each) for each in value]
    if isinstance(value, Mapping) and len(value) <= LONGEST_SETTING:
        return {str(name): as_setting(each) for name, each in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return Named(f"{type(value).__name__} {tuple(value.shape)} {value.dtype}")
    if isinstance(value, Sequence):
        return Named(f"{type(value).__name__} of {len(value)}")
    return Named(value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else type(value).__qualname__)


class Part(ABC):  # noqa: B024 - what is abstract is declared by the kinds of parts
    """What a selection is made of. A part without memory keeps the default state.

    What its constructor is given is noted, for the records of a run.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls):
            cls.__init__ = _noted(vars(cls)["__init__"])  # type: ignore[method-assign]

    def state_dict(self) -> State:
        """Return what the part remembers between rounds; called for every checkpoint, on every rank."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned; called when a run is resumed or starts over."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)} for it")


@dataclass(frozen=True)
class SmallFit:
    """An estimator whose fit is not rehearsed, made so small that it can be timed before training starts.

    Attributes:
        estimator: a copy with little work.
        fit: how many times as long its fit takes in the whole, a round's share of it where a fit lasts for several.
        phases: the same for single phases of its cost; what is not in one of these counts by ``fit``.
        score: how many times as long it takes to score a candidate.
    """

    estimator: "InfluenceEstimator"
    fit: float = 1.0
    phases: Mapping[str, float] = field(default_factory=dict)
    score: float = 1.0


class InfluenceEstimator(Part):
    """Measures influence with the live model.

    Attributes:
        fit_lasts: whether a fit at one optimizer step may measure at later ones; then :meth:`fitted_state` is needed.
            If not, a round that is measured between steps fits again at each of them.
        spreadable: whether a round may be measured between training steps at all.
        at_once: whether :meth:`score_ids` measures many candidates for less than :meth:`score` does batch by batch.
        rehearsed: whether a copy is fitted and scores two candidates before training starts. Where that costs too
            much, say False, let :meth:`check` raise what would fail, and :meth:`small_fit` show how long a fit takes.
        has_direction: whether influence is the product of a gradient with :meth:`direction`.
    """

    fit_lasts: bool = False
    spreadable: bool = True
    at_once: bool = False
    rehearsed: bool = True
    has_direction: bool = False

    @abstractmethod
    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)``, nats per unit learning rate; NaN where it has none."""

    def small_fit(self, round: Round) -> SmallFit | None:
        """Return what shows, before training starts, how long a fit takes that is not rehearsed; None for nothing."""
        return None

    def score_tokens(self, model: LiveModel, batch: Batch) -> Tensor | None:
        """Return the influence of each token, ``(B, T)``, or None where it is not known.

        Called instead of :meth:`score` when the selector learns from single tokens. Entry ``(i, t)`` is the influence
        of training on candidate i to predict its token t alone, NaN where no loss is taken; the influence of the
        candidate is the mean over the others.
        """
        return None

    def check(self, model: LiveModel, round: Round) -> None:
        """Raise what a round would raise; called before training starts, with a few candidates."""

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Prepare to score, and return metrics for the ledger; called before a round's first score.

        Raises:
            NotMeasurableError: with the model as it is now nothing can be measured.
        """
        return {}

    def fit_ahead(self, model: LiveModel, round: Round, examples: int) -> bool:
        """Do a part of the coming :meth:`fit`, and return whether there was one left to do.

        Called after some of the training steps before, so that the fit holds up none of them for long. What is kept of
        it belongs to :meth:`state_dict`.

        Args:
            model: as it is at that step.
            round: the round that will be measured.
            examples: whose gradients the part should take at most, over all ranks.
        """
        return False

    def score_ids(self, model: LiveModel, round: Round, ids: Tensor) -> Tensor:
        """Return the influence of the candidates ``ids (m,)``, ``(m,)``; called instead of ``score`` if ``at_once``."""
        scores = [self.score(model, batch).float().cpu() for batch in round.batches(ids)]
        return torch.cat(scores) if scores else torch.empty(0)

    def direction(self) -> Mapping[str, Tensor] | None:
        """Return what gradients are compared with, by parameter name, or None when there is nothing yet.

        Asked at the beginning of training steps whose examples are scored out of their own backward.
        """
        return None

    def fitted_state(self) -> State | None:
        """Return the last fit, for a measurement that a checkpoint interrupts; None to fit again after a resume."""
        return None

    def load_fitted_state(self, state: State) -> None:
        """Restore what :meth:`fitted_state` returned."""

    def release(self) -> None:
        """Free what only this round needed; called when a round is over."""


class InfluenceRegressor(Part):
    """Predicts influence where it was not measured.

    Attributes:
        rehearsed: whether a copy learns from a few candidates before training starts; if not, :meth:`check` says what
            would fail.
        learns_tokens: whether :meth:`fit_tokens` learns more from the influence of single tokens than :meth:`fit` does
            from that of candidates; measuring then keeps it, where the estimator gives it.
        remembers: whether what is predicted depends on earlier rounds too. A hard choice by one that forgets them sends
            the mixture back and forth.
    """

    rehearsed: bool = True
    learns_tokens: bool = False
    remembers: bool = False

    @abstractmethod
    def fit(self, round: Round, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from the finite ``influence (m,)`` of ``ids (m,)``; called when enough was measured in a round.

        Returns:
            Metrics for the ledger. ``spearman`` among them is the rank correlation on measurements held out of the fit.
        """

    def fit_tokens(self, round: Round, ids: Tensor, influence: Tensor, tokens: Tensor) -> Mapping[str, float]:
        """Learn from ``tokens (m, T)`` too, called in place of :meth:`fit` where the estimator gives them.

        Entry ``(i, t)`` is the influence of training on candidate i to predict its token t; NaN where it takes no loss
        or is not known. Rows are filled up with NaN to the longest.
        """
        return self.fit(round, ids, influence)

    @abstractmethod
    def predict(self, round: Round, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)``; only order and relative size are used."""

    def predict_tokens(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what each token adds to the predicted influence of its example, ``(B, T)``, or None where unknown.

        Called after a choice, for the few candidates that people look at.
        """
        return None

    def check(self, round: Round) -> None:
        """Raise what a round would raise; called before training starts, with a few candidates."""


@dataclass(frozen=True)
class Selection:
    """What a selector chose, and what it knew when it did.

    Attributes:
        ids: ``(k,)`` int64 distinct ids.
        scored: ``(n,)`` ids that were compared, or None when the choice used no scores.
        scores: ``(n,)`` float32, their scores before any noise; larger is better.
        metrics: scalars for the ledger.
        notes: sentences for the ledger, such as the reason of a fallback.
        group_metrics: ``(G,)`` numbers for the ledger, one for each group of the pool; NaN where there is none.
            ``reward`` and ``bonus`` among them say that groups were compared by their sum.
        noise: returns what was added to ``scores[start:stop]``, ``(stop - start,)`` float64, when it is called with
            these two; None when nothing was.
        eligible: ids that the scores let through, when they are more than the chosen ones.
        reasons: why ids were chosen, where it was something else than their scores.
        scores_id: names the scores, where they were made before training and stay: the decisions hold them once.
    """

    ids: Tensor
    scored: Tensor | None = None
    scores: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    group_metrics: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Callable[[int, int], Tensor] | None = None
    eligible: Tensor | None = None
    reasons: Mapping[str, Tensor] = field(default_factory=dict)
    scores_id: str | None = None


@dataclass(frozen=True)
class Contest:
    """What a contest has found: policies that were trained from one state, for as many steps.

    Attributes:
        step: optimizer steps done when it began.
        steps: its length.
        losses: held-out reference loss of each policy that a copy followed, nats per token.
        own: that of training itself, on the round that was chosen.
        training_flops: of training in as many steps, over all ranks.
        training_seconds: likewise.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    own: float
    training_flops: float
    training_seconds: float


class Selector(Part):
    """Decides what to measure and what to train on.

    Attributes:
        needs_estimator: whether it proposes candidates, so that a run without an estimator is refused.
        uses_groups: whether it chooses by the groups of the pool, whose cost then belongs to the run.
        learns_tokens: whether it wants the influence of single tokens, where the estimator knows it.
        engine_orders: whether the engine keeps the pass over the pool and shuffles what was chosen. A selector that
            follows recorded plans says False: its ids are trained on as they are.
        has_share: whether only a share of the pool is meant to be trained on. The last round then holds what training
            still takes, and not a whole round, which might reach below the share.
        has_contests: whether copies of training are to follow other policies beside it, in some rounds. The run then
            needs a verdict, whose held-out half of the reference set judges them.
    """

    needs_estimator: bool = False
    uses_groups: bool = False
    learns_tokens: bool = False
    engine_orders: bool = True
    has_share: bool = False
    has_contests: bool = False

    @abstractmethod
    def select(self, round: Round, budget: int) -> "Selection | Tensor":
        """Choose ``budget`` of the round's candidates: a :class:`Selection`, or the ids alone, ``(budget,)``."""

    def check(self, round: Round, budget: int) -> None:
        """Raise what a round would raise; called before training starts, with a few candidates.

        A round trains on ``budget`` candidates.
        """

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make what depends on the data alone, at the expense of ``meter``; called before each round is opened.

        All ranks call it together. What is ready and still holds needs no second making.
        """

    def warmup(self) -> "Selector | None":
        """Return who chooses in warm-up rounds, in which nothing is measured; None draws uniformly."""
        return None

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates may ever be chosen, ``(size,)`` bool, or None for all; called before each round."""
        return None

    def distinct_share(self) -> float:
        """Return the share of the pool that is trained on before any of it comes again, 0..1; by default all."""
        return 1.0

    def propose(self, round: Round) -> Tensor:
        """Return ids to measure, ``(m,)``; called again after each :meth:`observe` until there are none."""
        return NO_IDS

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Take the finite influence ``(m,)`` of proposed ``ids (m,)``, both on CPU; called after each measurement."""

    def observe_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Take the influence of single tokens ``(m, T)`` of proposed ``ids (m,)``, both on CPU; before :meth:`observe`.

        Called where ``learns_tokens`` is True and the estimator knows it. NaN stands where no loss is taken, and rows
        are filled up with NaN to the longest.
        """

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Take the influence ``(m,)`` of ``ids (m,)`` as training steps on them have shown it; called between rounds.

        Steps are captured only where ``overhear`` asks for it. The numbers are as old as the step.
        """

    def contestants(self) -> Mapping[str, Tensor]:
        """Return what copies of training are to train on beside the round just chosen, by policy; called after it.

        Each has as many ids as the round. It returns the same until the next round is chosen.
        """
        return {}

    def observe_contest(self, contest: Contest) -> None:
        """Take what a contest has found; called when the round that it began with was trained on.

        A contest that failed, or that the run's end cut off, is never observed.
        """

    def token_scores(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what each token adds to the score of its candidate, ``(B, T)``, or None where that is not known.

        Called after :meth:`select`, for the few candidates that people look at.
        """
        return None

    def observe_step_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Take what training steps have shown of single tokens, ``(m, T)``, of ``ids (m,)``; before observe_step.

        Called where ``learns_tokens`` is True. A step shows what the parameters did at each position, which is what its
        next token is worth, but for what positions take from each other; each row's mean is the candidate's influence.
        """

    def cost_before_training(self) -> CostByPhase:
        """Return what making the scores that are drawn from cost; asked once, when a run begins."""
        return {}

    def files(self) -> Mapping[str, str]:
        """Return what the folder of a run is to hold beside the ledger, texts by file name; asked after each round."""
        return {}


class Around(Selector):
    """A selector around another one: it delegates everything, so override only what you change.

    Args:
        selector: the one inside.
    """

    def __init__(self, selector: Selector) -> None:
        if not isinstance(selector, Selector):
            right = f"{selector.__name__}(...)" if isinstance(selector, type) else "an object that inherits from it"
            raise TypeError(f"expected a Selector inside {type(self).__name__}, got {selector!r}: pass {right}")
        self.selector = selector
        # what either of the two declares holds for both
        self.needs_estimator = type(self).needs_estimator or selector.needs_estimator
        self.uses_groups = type(self).uses_groups or selector.uses_groups
        self.learns_tokens = type(self).learns_tokens or selector.learns_tokens
        self.engine_orders = type(self).engine_orders and selector.engine_orders
        self.has_share = type(self).has_share or selector.has_share
        self.has_contests = type(self).has_contests or selector.has_contests

    def select(self, round: Round, budget: int) -> Selection | Tensor:
        """Let the inner selector choose."""
        return self.selector.select(round, budget)

    def check(self, round: Round, budget: int) -> None:
        """Let the inner selector check."""
        self.selector.check(round, budget)

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Let the inner selector prepare."""
        self.selector.prepare(source, meter)

    def warmup(self) -> Selector | None:
        """Return who chooses for the inner selector in warm-up rounds."""
        return self.selector.warmup()

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return what the inner selector may choose."""
        return self.selector.eligible(pool, budget)

    def distinct_share(self) -> float:
        """Return the share that the inner selector trains on."""
        return self.selector.distinct_share()

    def propose(self, round: Round) -> Tensor:
        """Return what the inner selector proposes."""
        return self.selector.propose(round)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Pass the measurements on."""
        self.selector.observe(ids, influence)

    def observe_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Pass the influence of single tokens on."""
        self.selector.observe_tokens(ids, tokens)

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Pass on what training steps have shown."""
        self.selector.observe_step(ids, influence)

    def contestants(self) -> Mapping[str, Tensor]:
        """Return the inner selector's."""
        return self.selector.contestants()

    def observe_contest(self, contest: Contest) -> None:
        """Pass on what a contest has found."""
        self.selector.observe_contest(contest)

    def token_scores(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what the inner selector says of tokens."""
        return self.selector.token_scores(round, batch)

    def observe_step_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Pass on what training steps have shown of single tokens."""
        self.selector.observe_step_tokens(ids, tokens)

    def cost_before_training(self) -> CostByPhase:
        """Return the inner selector's cost."""
        return self.selector.cost_before_training()

    def files(self) -> Mapping[str, str]:
        """Return the inner selector's files."""
        return self.selector.files()

    def state_dict(self) -> State:
        """Return the inner selector's class and state."""
        return {"inside": type(self.selector).__name__, "state": self.selector.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore the inner selector's state; raise ValueError when it was another class."""
        if state["inside"] != type(self.selector).__name__:
            raise ValueError(
                f"the checkpoint holds the state of {state['inside']} inside {type(self).__name__}, this run has "
                f"{type(self.selector).__name__} there: resume with the selector that the run began with"
            )
        self.selector.load_state_dict(state["state"])
