"""Canaries: candidates whose influence is known to be good or bad before it is measured."""

import torch
from torch import Tensor

from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, Round

MEASURED_SHARE = 0.01
"""Share of what selection measures that may be spent on canaries."""
VOCABULARY_CANDIDATES = 64
"""Candidates whose largest token bounds the random tokens."""
KINDS = ("reference", "shuffled", "repeated", "random")


class Canaries:
    """Makes canaries from the reference set and measures them.

    ``reference`` are rows of the reference set itself; ``shuffled`` the same words in another order; ``repeated`` one
    of their words repeated; ``random`` tokens drawn uniformly. Nothing lowers the reference loss as much as the first.

    Args:
        each: number of each kind; 0 for none.
    """

    def __init__(self, each: int) -> None:
        if each < 0:
            raise ValueError(f"expected zero or more canaries of each kind, got {each}")
        self.each = each

    def affordable(self, measured: int) -> bool:
        """Whether canaries are due after ``measured`` other measurements."""
        return self.each > 0 and MEASURED_SHARE * measured >= self.each * len(KINDS)

    def measure(self, estimator: InfluenceEstimator, model: LiveModel, round: Round) -> dict[str, float]:
        """Return the mean influence of each kind."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for batch in self.batches(round):
            scores = estimator.score(model, model.to_device(batch)).float().cpu().tolist()
            for kind, score in zip(KINDS, scores, strict=True):
                found[kind].append(score)
        return {kind: sum(scores) / len(scores) for kind, scores in found.items()}

    def batches(self, round: Round) -> list[Batch]:
        """Return a batch for each canary of a kind, with one row of each kind in the order of ``KINDS``."""
        generator = round.generator("canaries")
        rows = [row for batch in round.source.reference() for row in _rows(batch)]
        drawn = torch.randperm(len(rows), generator=generator)[: self.each].tolist()
        some = round.source.candidates(round.candidates[:VOCABULARY_CANDIDATES])
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
