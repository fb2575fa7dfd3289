"""A table of what tokens are worth: means by pair of neighbours, backing off to single tokens, backing off to zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from liveselect.functional.ngrams import ngram_buckets


@dataclass
class TokenTable:
    """Sums and weights of values of tokens and of pairs, by bucket.

    A token's value is the mean of its pair with the token before, shrunk towards that of the token, which is shrunk
    towards zero, each as if ``shrinkage`` more tokens of the value that it is shrunk to had been seen.

    Attributes:
        sums: ``(2, buckets)`` float64, row 0 of tokens and row 1 of pairs.
        weights: the same, how many tokens were added.
    """

    sums: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, buckets: int) -> "TokenTable":
        """Return a table that knows nothing; ``buckets`` is a power of two."""
        return cls(*torch.zeros(2, 2, buckets, dtype=torch.float64).unbind())

    def add(self, input_ids: Tensor, values: Tensor, weight: float = 1.0) -> None:
        """Add the ``values (B, T)`` of the tokens ``input_ids (B, T)``; NaN is none, and column 0 has none.

        A negative weight takes them out again.
        """
        known = values[:, 1:].isfinite()
        for row, bucket in enumerate(self._buckets(input_ids)):
            places = bucket[known]
            self.sums[row].index_add_(0, places, weight * values[:, 1:][known].double())
            self.weights[row].index_add_(0, places, torch.full((len(places),), weight, dtype=torch.float64))

    def fade(self, share: float) -> None:
        """Let everything that was added so far count ``share`` as much."""
        self.sums.mul_(share)
        self.weights.mul_(share)

    def values(self, shrinkage: float) -> "TokenValues":
        """Return what the table says of every token."""
        weights = self.weights.clamp(min=0)  # what was taken out again leaves a little less than nothing
        single = self.sums[0] / (weights[0] + shrinkage)
        pairs = torch.stack([self.sums[1], torch.full_like(self.sums[1], shrinkage)], dim=1)
        return TokenValues(single.float(), (pairs / (weights[1] + shrinkage)[:, None]).float())

    def _buckets(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        single, pairs = ngram_buckets(input_ids, self.sums.shape[1])
        return single[:, 1:], pairs


@dataclass(frozen=True)
class TokenValues:
    """The function of a :class:`TokenTable`: three numbers are looked up for each token.

    Attributes:
        single: ``(buckets,)`` float32 values of tokens.
        pairs: ``(buckets, 2)`` float32, a pair's own part, and the share of its token's value.
    """

    single: Tensor
    pairs: Tensor

    def mean(self, input_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean value of each row's tokens, ``(B,)`` float32.

        Args:
            input_ids: ``(B, T)``.
            counted: ``(B, T)`` bool, the tokens that count, of which the first never does; None for all others.
        """
        values = self._of(input_ids)
        if counted is None:
            return values.sum(dim=1) / max(1, values.shape[1])
        inside = counted[:, 1:]
        return (values * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)

    def parts(self, input_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return what each token adds to the :meth:`mean` of its row, ``(B, T)`` float32; the first adds nothing."""
        values = self._of(input_ids)
        if counted is None:
            values = values / max(1, values.shape[1])
        else:
            inside = counted[:, 1:]
            values = values * inside / inside.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.nn.functional.pad(values, (1, 0))

    def _of(self, input_ids: Tensor) -> Tensor:
        single, pairs = ngram_buckets(input_ids, len(self.single))
        own, share = self.pairs[pairs].unbind(-1)
        return torch.addcmul(own, share, self.single[single[:, 1:]])
