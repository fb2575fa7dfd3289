"""In-memory stand-ins for the data plane, shared by tests."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liveselect.cost import CostMeter
from liveselect.grammar import Batch, CandidateSource, LiveModel, LossFn, Round
from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.preserve import measuring
from liveselect.rounds import SelectionRun, run_round


class FakeSource(CandidateSource):
    """A CandidateSource over token matrices: ``tokens (n, T)``, ``reference (r, T)``; text is space-joined ids.

    ``labels`` and ``reference_labels`` default to the tokens. ``mask (n, T)`` is served as ``attention_mask``, and
    what it hides is left out of the text. ``read`` records how many candidates were served.
    """

    def __init__(
        self,
        tokens: Tensor,
        reference: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        group_names: tuple[str, ...] | None = None,
        batch_size: int = 4,
        rows: int = 64,
    ) -> None:
        self.tokens = tokens
        self.labels = tokens if labels is None else labels
        self.references = tokens[:4] if reference is None else reference
        self.reference_labels = self.references if reference_labels is None else reference_labels
        self.mask = mask
        self.pool = CandidatePool(len(tokens), f"fake-{tuple(tokens.shape)}-{int(tokens.sum())}", groups, group_names)
        self.batch_size = batch_size
        self.rows = rows
        self.plan: Plan | None = None
        self.read = 0

    def candidates(self, ids: Tensor) -> Iterator[Batch]:
        for part in ids.split(self.rows):
            self.read += len(part)
            batch = {"id": part, "input_ids": self.tokens[part], "labels": self.labels[part]}
            yield batch if self.mask is None else {**batch, "attention_mask": self.mask[part]}

    def reference(self) -> Iterator[Batch]:
        for ids in torch.arange(len(self.references)).split(self.rows):
            yield {"id": ids, "input_ids": self.references[ids], "labels": self.reference_labels[ids]}

    def decode(self, input_ids: Tensor) -> list[str]:
        return [" ".join(str(token) for token in row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        self.plan = plan


def random_source(candidates: int = 64, length: int = 12, vocab: int = 50, seed: int = 0, **kwargs) -> FakeSource:
    """A source of uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (candidates, length), generator=generator)
    return FakeSource(tokens, torch.randint(0, vocab, (4, length), generator=generator), **kwargs)


def planted_source(
    candidates: int = 600, share: float = 0.1, length: int = 24, vocab: int = 60, seed: int = 0, **kwargs
) -> tuple[FakeSource, Tensor]:
    """A source with a ``share`` of the reference's tokens (the lower third of the vocabulary, skewed) among noise.

    Returns the source and which candidates are planted, ``(candidates,)`` bool.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = torch.zeros(candidates, dtype=torch.bool)
    planted[torch.randperm(candidates, generator=generator)[: round(share * candidates)]] = True
    likely = 1.0 / torch.arange(1, vocab // 3 + 1)

    def like_reference(rows: int) -> Tensor:
        return torch.multinomial(likely.expand(rows, -1), length, replacement=True, generator=generator)

    tokens = torch.randint(0, vocab, (candidates, length), generator=generator)
    tokens[planted] = like_reference(int(planted.sum()))
    return FakeSource(tokens, like_reference(8), **kwargs), planted


@dataclass(frozen=True)
class Context:
    """A live model and a round of it, with the engine's part in measuring: what tests hand to parts."""

    live: LiveModel
    round: Round

    @property
    def model(self) -> nn.Module:
        return self.live.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.live.optimizer

    @property
    def loss_fn(self) -> LossFn:
        return self.live.loss_fn

    @property
    def source(self) -> CandidateSource:
        return self.round.source

    @property
    def candidates(self) -> Tensor:
        return self.round.candidates

    @property
    def meter(self) -> CostMeter:
        return self.round.meter

    def but(self, **changes) -> "Context":
        """Return the context with other fields of the round or of the live model; ``model`` is the module."""
        if "model" in changes:
            changes["module"] = changes.pop("model")
        live = {name: value for name, value in changes.items() if name in LiveModel.__dataclass_fields__}
        of_round = {name: value for name, value in changes.items() if name in Round.__dataclass_fields__}
        unknown = changes.keys() - live.keys() - of_round.keys()
        if unknown:
            raise TypeError(f"neither the round nor the live model has {sorted(unknown)}")
        return Context(replace(self.live, **live), replace(self.round, **of_round))

    def fit(self, estimator):
        """Fit an estimator as the engine does; returns its metrics."""
        with measuring(self.model, self.optimizer):
            return estimator.fit(self.live, self.round)

    def score(self, estimator, batch) -> Tensor:
        """Let a fitted estimator score a batch as the engine does."""
        with measuring(self.model, self.optimizer):
            return estimator.score(self.live, self.live.to_device(batch)).float().cpu()

    def score_ids(self, estimator, ids) -> Tensor:
        """Let a fitted estimator score candidates as the engine does."""
        with measuring(self.model, self.optimizer):
            return estimator.score_ids(self.live, self.round, ids)

    def check(self, estimator) -> None:
        """Let an estimator check as the engine does."""
        with measuring(self.model, self.optimizer):
            estimator.check(self.live, self.round)


def fake_context(  # noqa: PLR0913 - a test names what it needs
    source: FakeSource,
    *,
    index: int = 0,
    step: int = 0,
    seed: int = 0,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = causal_lm_loss,
    candidates: Tensor | None = None,
    leftovers: Tensor | None = None,
    trained: Tensor | None = None,
    meter: CostMeter | None = None,
    **of_the_model,
) -> Context:
    """A round over ``source`` with, unless one is given, a model of one weight."""
    if model is None:
        model = nn.utils.skip_init(nn.Linear, 1, 1)  # draws nothing from the global stream
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
    meter = meter or CostMeter()
    live = LiveModel(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer,
        loss_fn=loss_fn,
        global_batch=of_the_model.pop("global_batch", source.batch_size),
        meter=meter,
        **of_the_model,
    )
    round_ = Round(
        index=index,
        step=step,
        seed=seed,
        candidates=torch.arange(source.pool.size) if candidates is None else candidates,
        source=source,
        leftovers=torch.empty(0, dtype=torch.int64) if leftovers is None else leftovers,
        trained=trained,
        device=live.device,
        meter=meter,
    )
    return Context(live, round_)


def play(run: SelectionRun, budget: int, context: Context | None = None, step: int = 0) -> Plan:
    """Run the next round of ``budget`` candidates with the model of a context, and return its plan."""
    live = (context or fake_context(run.source)).live
    return run_round(run, live, run.open_round(step, budget, meter=live.meter), budget)
