"""Canaries: candidates whose influence is known to be good or bad before it is measured."""

import torch
from torch import Tensor

from liveselect.protocols import Batch, InfluenceEstimator, RoundContext

SHARE = 0.01
"""Of what selection measures, so much may be spent on canaries."""
LOOKED_AT = 64
"""Candidates that random tokens are drawn like: from 0 up to their largest."""
KINDS = ("reference", "shuffled", "repeated", "random")


class Canaries:
    """Makes canaries from the reference set and measures them.

    ``reference`` are rows of the reference set itself; ``shuffled`` the same words in another order; ``repeated`` one
    of their words again and again; ``random`` tokens drawn uniformly. Nothing helps the reference loss like the first.

    Args:
        each: how many of each kind; 0 for none.
    """

    def __init__(self, each: int) -> None:
        if each < 0:
            raise ValueError(f"expected zero or more canaries of each kind, got {each}")
        self.each = each

    def affordable(self, measured: int) -> bool:
        """Whether canaries are due after so many other measurements."""
        return self.each > 0 and SHARE * measured >= self.each * len(KINDS)

    def measure(self, estimator: InfluenceEstimator, context: RoundContext) -> dict[str, float]:
        """Return the mean influence of each kind."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for batch in self.batches(context):
            scores = estimator.score(context, context.to_device(batch)).float().cpu().tolist()
            for kind, score in zip(KINDS, scores, strict=True):
                found[kind].append(score)
        return {kind: sum(scores) / len(scores) for kind, scores in found.items()}

    def batches(self, context: RoundContext) -> list[Batch]:
        """Return a batch for each canary of a kind, with one row of each kind in the order of ``KINDS``."""
        generator = context.generator("canaries")
        rows = [row for batch in context.source.reference() for row in _rows(batch)]
        drawn = torch.randperm(len(rows), generator=generator)[: self.each].tolist()
        some = context.source.candidates(context.candidates[:LOOKED_AT])
        vocabulary = 1 + max(int(batch["input_ids"].max()) for batch in some)
        return [_four_kinds(rows[index], vocabulary, generator) for index in drawn]


def _rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch["input_ids"].cpu(), batch["labels"].cpu(), strict=True))


def _four_kinds(row: tuple[Tensor, Tensor], vocabulary: int, generator: torch.Generator) -> Batch:
    """Return a batch of one canary of each kind; the bad ones carry loss everywhere."""
    ids, labels = row
    length = len(ids)
    bad = [
        ids[torch.randperm(length, generator=generator)],
        ids[torch.randint(length, (1,), generator=generator)].expand(length),
        torch.randint(vocabulary, (length,), generator=generator, dtype=ids.dtype),
    ]
    return {
        "id": torch.full((len(KINDS),), -1, dtype=torch.int64),
        "input_ids": torch.stack([ids, *bad]),
        "labels": torch.stack([labels, *bad]),
    }
