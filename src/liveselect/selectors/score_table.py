"""Scores of a pool, and the draw of its better part."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liveselect.cost import CostMeter
from liveselect.functional.sampling import gumbel_topk
from liveselect.grammar import Batch, CandidateSource, Round, SelectionWarning
from liveselect.pool import CandidatePool
from liveselect.scores import Scores, read_scores
from liveselect.selectors.ngram_prior import TEMPERATURE, NGramPrior


class BetterPart(NamedTuple):
    """The candidates of a round that a draw by score kept.

    Attributes:
        ids: ``(k,)``, in the order of the round's candidates.
        beyond: how many of them had to be taken from below the share that was asked for.
        from_below: ``(beyond,)`` which these are.
    """

    ids: Tensor
    beyond: int
    from_below: Tensor


class ScoreTable:
    """Scores of a pool, and the draw of its better part.

    Args:
        scores: what :func:`liveselect.scores.read_scores` takes; or a :class:`NGramPrior`, or True for one as it is.
        column: name of the Parquet column.
        groups: names of the groups that may be chosen; all by default.
        standardize: divide the scores by their standard deviation over these groups; those of an n-gram prior always
            are.
    """

    def __init__(
        self, scores: Any, column: str = "score", groups: Sequence[str] | None = None, standardize: bool = False
    ) -> None:
        if isinstance(groups, str):
            raise ValueError(f"expected a list of names of groups, got the string {groups!r}: pass [{groups!r}]")
        if scores is False:
            raise ValueError("expected scores, or True for those of the n-gram prior, got False: leave the prior out")
        self._prior = NGramPrior() if scores is True else scores if isinstance(scores, NGramPrior) else None
        if self._prior is not None and column != "score":
            raise ValueError(f"the n-gram prior has no column {column!r}: leave column out")
        self._source = scores
        self._column = column
        self._read: Scores | None = None
        self.groups = None if groups is None else tuple(groups)
        self.standardize = standardize or self._prior is not None
        self._values: Tensor | None = None
        self._count = 0
        self._last: tuple[tuple[int, int, float, float], Tensor, Tensor] | None = None  # draw: of what, scores, result

    @property
    def scores(self) -> Scores:
        """The scores, read when they are first asked for."""
        if self._prior is not None:
            return self._prior.scores
        if self._read is None:
            self._read = read_scores(self._source, self._column)
        return self._read

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores that depend on the run's own data."""
        if self._prior is not None and self._prior.prepare(source, meter):
            self._values = None

    def token_scores(self, batch: Batch) -> Tensor | None:
        """Return what each token adds to the score of its row, ``(B, T)``; None where scores are of whole rows."""
        return None if self._prior is None else self._prior.token_scores(batch)

    def temperature(self, given: float | None, otherwise: float) -> float:
        """Return the strength of the noise: what is ``given``, or the default of a prior or of scores."""
        return given if given is not None else otherwise if self._prior is None else TEMPERATURE

    @property
    def strength(self) -> float:
        """How much the scores are worth, 0..1; below 1 where an n-gram prior does not tell the reference set apart."""
        return 1.0 if self._prior is None else self._prior.strength

    def share(self, ratio: float | None) -> float:
        """Return the share of the pool to keep: ``ratio``, or where that is None the width of the n-gram prior.

        Raises:
            ValueError: None, and other scores.
        """
        if ratio is not None:
            return ratio
        if self._prior is None:
            raise ValueError(
                "expected ratio, the share that is kept, above 0 and up to 1, got None: only an n-gram prior "
                "(scores=True) finds it"
            )
        return self._prior.width

    @property
    def digest(self) -> Any:
        """What identifies the scores, for a checkpoint."""
        return self.scores.digest if self._prior is None else self._prior.digest

    def expect(self, digest: Any) -> None:
        """Raise ValueError when a checkpoint was made with other scores, now or when they are made."""
        if self._prior is not None:
            self._prior.expect(digest)
            self._values = None
        elif digest != self.scores.digest:
            raise ValueError(
                f"the checkpoint was made with other scores than those of {self.scores.name}: resume with the scores "
                "that the run began with, or start a new run"
            )

    @property
    def cost(self) -> Mapping[str, Mapping[str, float]]:
        """What making the scores cost, by kind and phase; an n-gram prior is charged where it is made."""
        if self._prior is not None:
            return {}
        cost: Mapping[str, Mapping[str, float]] = self.scores.about.get("cost", {})
        return cost

    def check(self, ratio: float | None, temperature: float) -> None:
        """Raise ValueError when these cannot be the arguments of a draw."""
        if not 0.0 < self.share(ratio) <= 1.0:
            raise ValueError(f"expected ratio, the share that is kept, above 0 and up to 1, got {ratio}")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"expected a finite temperature of at least 0, got {temperature}")

    def values(self, pool: CandidatePool) -> Tensor:
        """Return the scores of the pool, ``(n,)``, -inf for what is in none of the groups.

        Raises:
            ValueError: the scores or the groups are not of this pool, nothing may be chosen, or the file was changed.
        """
        self.scores.check_unchanged()
        if self._values is None:
            self.scores.check_fit(pool.size, pool.fingerprint)
            if self.scores.pool is None:
                warnings.warn(
                    f"{self.scores.name} does not say of which pool its scores are: only their number was checked",
                    SelectionWarning,
                    stacklevel=2,
                )
            values = self.scores.values
            if self.groups is not None:
                values = values.where(self._in_groups(pool), -torch.inf)
            eligible = values > -torch.inf
            self._count = int(eligible.sum())
            if not self._count:
                raise ValueError(f"no candidate in the groups {self.groups or 'of the pool'} has a score above -inf")
            if self.standardize:
                values = values / (_deviation(values[eligible].double()) or 1.0) * self.strength
            self._values = values
        return self._values

    def eligible(self, pool: CandidatePool) -> Tensor | None:
        """Return which candidates have a score above -inf, ``(n,)`` bool, or None when all have."""
        values = self.values(pool)
        return None if self._count == pool.size else values > -torch.inf

    def better_part(self, round: Round, ratio: float, temperature: float, at_least: int) -> BetterPart:
        """Draw the share ``ratio`` of the pool by score, and return the round's candidates among the drawn.

        The draw is one of all candidates that may be chosen, used or not, so that the share means the same in every
        round. When fewer than ``at_least`` of the drawn are left, it goes on among the round's candidates.

        Raises:
            ValueError: fewer than ``at_least`` of the round's candidates may be chosen at all.
        """
        values = self.values(round.pool)
        candidates = round.candidates
        is_kept = self._drawn(round, ratio, temperature)[candidates]
        beyond = max(0, at_least - int(is_kept.sum()))
        from_below = candidates[:0]
        if beyond:
            rest = (~is_kept & (values[candidates] > -torch.inf)).nonzero().flatten()
            _check_enough(round, at_least, int(is_kept.sum()) + len(rest))
            generator = round.generator("scores beyond the ratio")
            below = rest[gumbel_topk(values[candidates[rest]], beyond, temperature, generator)]
            is_kept[below], from_below = True, candidates[below]
        return BetterPart(candidates[is_kept], beyond, from_below)

    def _drawn(self, round: Round, ratio: float, temperature: float) -> Tensor:
        """Return which of the pool the draw of a round takes, ``(size,)`` bool; drawn once, however often asked."""
        values, of = self.values(round.pool), (round.seed, round.index, ratio, temperature)
        if self._last is None or self._last[0] != of or self._last[1] is not values:
            kept = torch.zeros(len(values), dtype=torch.bool)
            kept[gumbel_topk(values, max(1, self._share(ratio)), temperature, round.generator("scores"))] = True
            self._last = of, values, kept
        return self._last[2]

    def _share(self, ratio: float) -> int:
        """Return how many candidates a share of those that may be chosen is."""
        return round(ratio * self._count)

    def _in_groups(self, pool: CandidatePool) -> Tensor:
        unknown = sorted(set(self.groups or ()) - set(pool.group_names))
        if unknown:
            raise ValueError(f"the pool has no groups {unknown}: its groups are {list(pool.group_names)}")
        if pool.groups is None:
            return torch.ones(pool.size, dtype=torch.bool)
        codes = torch.tensor([pool.group_names.index(name) for name in self.groups or ()])
        return torch.isin(pool.groups, codes.to(pool.groups.dtype))


def _deviation(values: Tensor) -> float:
    """Return the standard deviation of ``values (n,)`` float64, which may be as large as float64 goes."""
    # near 1 the squares neither overflow nor vanish, and a power of two rounds nothing
    scale = 2.0 ** (math.frexp(float(values.abs().max()))[1] - 1)
    return float((values / scale).std(correction=0)) * scale


def _check_enough(round: Round, needed: int, found: int) -> None:
    if found < needed:
        raise ValueError(
            f"round {round.index} needs {needed} candidates, but of the {len(round.candidates)} that are left "
            f"{found} may be chosen by their scores and groups: name more groups, or train for fewer steps"
        )
