"""A prior without a model: how much likelier the words of a candidate are in the reference set than in the pool."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.cost import CostMeter
from liveselect.distributed import gather_shards, shard, sum_over_ranks
from liveselect.functional.ngram_ratio import (
    BUCKETS,
    SMOOTHING,
    count_ngrams,
    log_ratio,
    mean_log_ratio,
    token_log_ratios,
)
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import REFERENCE_SET, Batch, CandidateSource, text_tokens
from liveselect.scores import Scores, read_scores
from liveselect.seeding import generator_for

TEMPERATURE = 0.3
"""Strength of the noise with which the prior is drawn from, in its standard deviations."""

USUAL_WIDTH = 0.1
"""Share of a pool to choose where nothing shows a better one."""

_COUNTED_CANDIDATES = 32_768  # of the pool, for the frequencies of its words: more would hardly change them
_COMPARED_CANDIDATES = 2048  # of the pool, against halves of the reference set
_FULL_STRENGTH = 0.5  # standard deviations by which unseen reference text scores above the pool
_HELD = 0.75  # of unseen reference text that the width must hold
_PARTS = 8  # of the reference set, each of which is left out once
_FEWEST_ROWS = 16  # of the reference set, from which its quarters are known
_NARROWEST = 0.05  # what is chosen repeats soon, and narrower was not seen to be better
_GRID = 2.0**20  # steps of a table to one nat: sums of such numbers are exact, in whatever batches rows are read


class NGramPrior:
    """Scores of a pool that cost seconds: log-ratios of hashed tokens and pairs, reference set against pool.

    The score of a row is the mean over its tokens of how much likelier the token, and its pair with the one before, is
    in the reference set than in the pool, in nats; the reference is smoothed towards the pool. It needs no score file
    and no model: pass it, or ``True``, wherever scores are taken. It is made of the run's own data when the first round
    is opened, by all ranks together, is charged to selection, and is made again when the reference set has changed.

    It knows words only. What it is worth is seen on reference text that is left out: a prior of seven eighths of the
    reference set scores the last one beside the pool, eight times. It has its full :attr:`strength` where unseen
    reference text scores higher by half a standard deviation of the pool or more, beyond the standard error, and none
    where it does not: words do not distinguish reference and pool, and what is left of the prior is chance. Its
    :attr:`width` is the share of the pool that scores as high as three quarters of unseen reference text do, over these
    three quarters: all of the pool where both are alike. Records that were cut into several rows are left out as a
    whole: what a document repeats of itself is no evidence.

    Attributes:
        strength: how much it is worth, 0..1.
        width: share of the pool that it should keep, 0.05..1; 0.1 before it is made, and for less than 16 rows of
            reference text.

    Args:
        smoothing: strength of the smoothing, in n-grams.
        buckets: of tokens and of pairs each, a power of two.

    Source: Xie et al. 2023, "DSIR", arXiv 2302.03169, which draws by the same ratio with n-grams of words.
    """

    def __init__(self, smoothing: float = SMOOTHING, buckets: int = BUCKETS) -> None:
        check_plain(NGramPrior, locals())
        if not smoothing > 0:
            raise ValueError(f"expected a smoothing above 0, got {smoothing}: without any, an unseen n-gram is -inf")
        if buckets < 2 or buckets & (buckets - 1):
            raise ValueError(f"expected the number of buckets to be a power of two, got {buckets}")
        self.smoothing = smoothing
        self.buckets = buckets
        self._scores: Scores | None = None
        self._ratios = torch.zeros(2, buckets)
        self._made_for: tuple[str, str | None] = ("", None)  # pool and reference set
        self._counted: str | None = None  # hash of the counts of the reference set
        self.strength, self.width = 1.0, USUAL_WIDTH
        self._expected: tuple[str, str] | None = None  # that hash, and the scores, of a checkpoint

    @property
    def scores(self) -> Scores:
        """The scores of the pool; raises RuntimeError before :meth:`prepare`."""
        if self._scores is None:
            raise RuntimeError("the n-gram prior is made when a round is opened: SelectionRun.open_round calls prepare")
        return self._scores

    @property
    def ready(self) -> bool:
        """Whether there are scores."""
        return self._scores is not None

    @property
    def digest(self) -> list[str] | None:
        """What identifies the reference set's counts and the scores, for a checkpoint; None before there are any."""
        if self._scores is None or self._counted is None:
            return None if self._expected is None else list(self._expected)
        return [self._counted, self._scores.digest]

    def expect(self, digest: list[str] | None) -> None:
        """Go on as a checkpoint with this :attr:`digest` did; looked at when the scores are made."""
        self._scores, self._counted, self._made_for = None, None, ("", None)
        self._expected = None if digest is None else (digest[0], digest[1])

    def prepare(self, source: CandidateSource, meter: CostMeter) -> bool:
        """Make the scores, unless they are those of this pool and reference set; returns whether they are new.

        A collective. The same scores, to the bit, on any number of ranks.

        Raises:
            ValueError: they are not those of the checkpoint, though the reference set is.
        """
        data = (source.pool.fingerprint, source.reference_fingerprint)
        if self._scores is not None and data == self._made_for and data[1] is not None:
            return False
        with meter.phase("prior"):
            reference = self._count(source.reference())
        counted = hashlib.blake2b(reference.numpy().tobytes(), digest_size=16).hexdigest()
        if self._scores is not None and (data[0], counted) == (self._made_for[0], self._counted):
            return False  # a source that does not say which reference set it has
        scores = self._score(source, reference, meter)
        with meter.phase("prior"):
            self.strength, self.width = self._unseen(source)
        if self._expected is not None and self._expected[0] == counted and self._expected[1] != scores.digest:
            raise ValueError(
                "the n-gram prior of this pool and reference set is not the one that the checkpoint was made with: "
                "resume with the same version of liveselect and the same smoothing and buckets, or start a new run"
            )
        self._scores, self._made_for, self._counted, self._expected = scores, data, counted, None
        return True

    def token_scores(self, batch: Batch) -> Tensor:
        """Return what each token adds to the score of its row, ``(B, T)`` nats, its pair with the one before included.

        Zero before :meth:`prepare`.
        """
        return token_log_ratios(batch["input_ids"].cpu(), text_tokens(batch), self._ratios)

    def _score(self, source: CandidateSource, reference: Tensor, meter: CostMeter) -> Scores:
        size = source.pool.size
        drawn = uniform_subset(size, min(size, _COUNTED_CANDIDATES), generator_for(0, 0, "n-gram prior"))
        mine, part = torch.arange(size)[shard(size)], drawn[shard(len(drawn))]
        with meter.tracked("prior", len(mine) + len(part), "candidates") as advance:
            pool = self._count(source.in_bulk(part) if len(part) else ())
            advance(len(part))
            table = log_ratio(reference, sum_over_ranks(pool), self.smoothing).double().mul_(_GRID).round_().div_(_GRID)
            parts = [torch.empty(0)]
            for batch in source.in_bulk(mine) if len(mine) else ():
                parts.append(mean_log_ratio(batch["input_ids"].cpu(), text_tokens(batch), table).float())
                advance(len(parts[-1]))
            self._ratios = table.float()
            values = gather_shards(torch.cat(parts), size)
        scores = read_scores(values)
        return Scores(scores.values, scores.digest, source.pool.fingerprint, name="the n-gram prior")

    def _unseen(self, source: CandidateSource) -> tuple[float, float]:
        """Return strength and width, by parts of the reference set that are left out of its words one after the other.

        All ranks do the same: it takes a small part of the pool.
        """
        size = source.pool.size
        few = uniform_subset(size, min(size, 2 * _COMPARED_CANDIDATES), generator_for(0, 0, "n-gram prior, compared"))
        counted, compared = few[::2], few[1::2] if size > 1 else few  # what is counted would score lower
        pool, candidates = self._count(source.in_bulk(counted)), list(source.in_bulk(compared))
        parts = _parts(list(source.reference()))
        counts = torch.stack([self._count(part) for part in parts])
        higher, above = [], []  # of each unseen row: standard deviations above the pool, and the share above it
        for part, known in zip(parts, counts.sum(dim=0) - counts, strict=True):
            table = log_ratio(known, pool, self.smoothing)
            of_pool, unseen = self._rows(candidates, table), self._rows(part, table)
            spread = float(of_pool.std(correction=0))
            higher.append((unseen - of_pool.mean()) / spread if spread else torch.zeros_like(unseen))
            above.append(1 - torch.searchsorted(of_pool.sort().values, unseen).double() / len(of_pool))
        shares = torch.cat(above)
        if len(parts) < 2:
            return 1.0, USUAL_WIDTH
        # rows of a document are alike, so the standard error is that between parts
        error = float(torch.stack([part.mean() for part in higher]).std()) * len(parts) ** -0.5
        strength = min(1.0, max(0.0, (float(torch.cat(higher).mean()) - error) / _FULL_STRENGTH))
        if len(shares) < _FEWEST_ROWS:
            return strength, USUAL_WIDTH
        return strength, min(1.0, max(_NARROWEST, float(shares.quantile(_HELD)) / _HELD))

    @staticmethod
    def _rows(batches: Iterable[Batch], table: Tensor) -> Tensor:
        parts = [mean_log_ratio(batch["input_ids"].cpu(), text_tokens(batch), table) for batch in batches]
        return torch.cat([torch.empty(0), *parts]).double()

    def _count(self, batches: Iterable[Batch]) -> Tensor:
        counts = torch.zeros(2, self.buckets, dtype=torch.int64)
        for batch in batches:
            counts += count_ngrams(batch["input_ids"].cpu(), self.buckets, text_tokens(batch))
        return counts


def _parts(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Return up to eight parts of the rows, none empty; each takes its part of each reference set.

    What is left must know all kinds of which the set is, and records may come in the order of their kinds. So records
    that were cut into several rows go to the parts by turns. Rows that are all of their own, or all of one record, may
    be pieces of documents that follow each other: each part takes some that do.
    """
    lengths = [len(batch["input_ids"]) for batch in batches]
    place = torch.arange(sum(lengths))
    sets, records = (_column(batches, key, place) for key in (REFERENCE_SET, "record"))
    part = torch.zeros_like(place)
    for rows in [place] if sets is place else [(sets == each).nonzero().flatten() for each in sets.unique()]:
        found, numbers = records[rows].unique(return_inverse=True)
        if 1 < len(found) < len(rows):
            part[rows] = numbers % _PARTS
        else:
            numbers = numbers if len(found) > 1 else place[: len(rows)]
            part[rows] = numbers * min(_PARTS, len(rows)) // max(1, len(rows))
    both = list(zip(batches, part.split(lengths), strict=True))
    return [[_rows_of(batch, of == number) for batch, of in both] for number in part.unique().tolist()]


def _column(batches: Sequence[Batch], key: str, otherwise: Tensor) -> Tensor:
    return torch.cat([batch[key].cpu() for batch in batches]) if all(key in batch for batch in batches) else otherwise


def _rows_of(batch: Batch, kept: Tensor) -> Batch:
    """Return the rows of a batch that are ``kept (B,)``."""
    keys = ("input_ids", "labels", "attention_mask")
    return {key: batch[key][kept.to(batch[key].device)] for key in keys if key in batch}
