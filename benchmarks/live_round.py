"""A live model in one round, with the engine's part in measuring; what the benchmarks measure with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liveselect.grammar import Batch, CandidateSource, InfluenceEstimator, LiveModel, Round
from liveselect.losses import causal_lm_loss
from liveselect.preserve import measuring


@dataclass(frozen=True)
class LiveRound:
    """The two objects that an estimator is given."""

    live: LiveModel
    round: Round

    @property
    def model(self) -> nn.Module:
        """The live module."""
        return self.live.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The live optimizer."""
        return self.live.optimizer

    def with_source(self, source: CandidateSource) -> "LiveRound":
        """Return the round on other data."""
        return LiveRound(self.live, replace(self.round, source=source))

    def fit(self, estimator: InfluenceEstimator) -> Mapping[str, float]:
        """Fit an estimator and return its metrics."""
        with measuring(self.model, self.optimizer):
            return estimator.fit(self.live, self.round)

    def score(self, estimator: InfluenceEstimator, batch: Batch) -> Tensor:
        """Let a fitted estimator score a batch; float32 on CPU."""
        with measuring(self.model, self.optimizer):
            return estimator.score(self.live, batch).float().cpu()


def live_round(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: CandidateSource, *, index: int = 0, **of_the_model
) -> LiveRound:
    """Return the round ``index`` with all candidates of ``source``; the rest goes to the live model."""
    live = LiveModel(
        module=model,
        optimizer=optimizer,
        loss_fn=causal_lm_loss,
        **{"global_batch": source.batch_size, **of_the_model},
    )
    ids = torch.arange(source.pool.size)
    return LiveRound(live, Round(index, 0, 0, ids, source, device=live.device, meter=live.meter))
