"""Scores from counts of n-grams in a reference set and a pool: a log-ratio, and the importance weights of DSIR."""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from liveselect.functional.ngram_ratio import BUCKETS, SMOOTHING, add_ngrams, log_ratio, mean_log_ratio
from liveselect.functional.ngrams import ngram_buckets
from liveselect.scoring.scorer import MethodCard, Rows, Scorer, Total, counted_mask

Terms = Literal["ids", "words"]

_WORDS = re.compile(r"\w+|[^\w\s]+")
_ID_BUCKETS = 1 << 14  # the next power of two above the published number
_PUBLISHED_BUCKETS = 10_000
_FLOOR = 1e-8  # added to probabilities, as published


class NgramRatio(Scorer):
    """Scores rows by how much more likely their tokens and pairs are in the reference set than in the pool.

    The mean over tokens of the log-ratio of hashed n-grams, smoothed towards the pool; see
    :mod:`liveselect.functional.ngram_ratio`. It is a ratio: what is common everywhere counts for nothing.

    Args:
        smoothing: strength of the smoothing, in n-grams of the reference set.
        buckets: of tokens, and as many of pairs; a power of two.
    """

    card = MethodCard(
        name="ngram-ratio",
        measures="mean log-ratio of hashed tokens and pairs, reference set against pool, nats per token",
        source="Moore and Lewis 2010 (cross-entropy difference), with hashed n-grams as in DSIR, arXiv 2302.03169",
        published={"smoothing": SMOOTHING, "n-grams": "1 and 2"},
        refreshed="yes, against what was trained on: liveselect.influence.NgramRatioInfluence",
    )

    def __init__(self, smoothing: float = SMOOTHING, buckets: int = BUCKETS) -> None:
        self.smoothing = smoothing
        self.buckets = buckets
        self._table: Tensor | None = None

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Count the n-grams of both."""
        counts = [torch.zeros(2, self.buckets, dtype=torch.int64) for _ in range(2)]
        for count, batches in zip(counts, (reference, pool), strict=True):
            for rows in batches:
                add_ngrams(count, rows["input_ids"].cpu(), _on_cpu(counted_mask(rows)))
        self._table = log_ratio(counts[0], total(counts[1]), self.smoothing)

    def __call__(self, rows: Rows) -> Tensor:
        """Return the mean log-ratio of each row, ``(B,)`` float32."""
        table = _fitted(self._table, self)
        return mean_log_ratio(rows["input_ids"].cpu(), _on_cpu(counted_mask(rows)), table)


class DSIR(Scorer):
    """Scores rows by their importance weight, the sum of the log-ratios of their hashed n-grams.

    A draw by ``ScoredSelector(temperature=1.0)``, Gumbel top-k, is then the importance resampling of the paper. The
    sum is not divided by the length, as published: rows of unequal lengths have scores of unequal size.

    Args:
        terms: ``words`` hashes lower-cased words and runs of punctuation of the decoded text by SHA-256 into 10,000
            buckets, as published, at the speed of Python; ``ids`` hashes token ids into 16,384 buckets, a hundred times
            faster.
        buckets: another number of buckets; for ``ids`` a power of two.
    """

    card = MethodCard(
        name="dsir",
        measures="log importance weight, reference set over pool, of hashed n-grams; nats per row",
        source="Xie et al. 2023, 'DSIR', arXiv 2302.03169",
        published={"buckets": _PUBLISHED_BUCKETS, "n-grams": "1 and 2", "floor": _FLOOR, "terms": "words"},
    )

    def __init__(self, terms: Terms = "ids", buckets: int | None = None) -> None:
        check_terms(terms)
        if buckets is not None and buckets < 1:
            raise ValueError(f"expected at least one bucket to count n-grams in, got {buckets}")
        self.terms: Terms = terms
        self.reads = "text" if terms == "words" else "tokens"
        self.buckets = buckets or (_ID_BUCKETS if terms == "ids" else _PUBLISHED_BUCKETS)
        self._table: Tensor | None = None

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Count the n-grams of both."""
        counts = [torch.zeros(self.buckets, dtype=torch.int64) for _ in range(2)]
        for count, batches in zip(counts, (reference, pool), strict=True):
            for rows in batches:
                for buckets, inside in self._hashed(rows):
                    kept = buckets.flatten() if inside is None else buckets[inside]
                    count.index_add_(0, kept, torch.ones_like(kept))
        target, raw = (count.double() for count in (counts[0], total(counts[1])))
        if not bool((raw.sum() > 0).item()):
            raise ValueError("expected n-grams in the pool that importance weights are fitted to, got none")
        likely = [count / count.sum().clamp(min=1) + _FLOOR for count in (target, raw)]
        self._table = (likely[0] / likely[1]).log()

    def __call__(self, rows: Rows) -> Tensor:
        """Return the log importance weight of each row, ``(B,)`` float32."""
        table = _fitted(self._table, self)
        result = torch.zeros(len(rows["text"]) if self.terms == "words" else len(rows["input_ids"]), dtype=table.dtype)
        for buckets, inside in self._hashed(rows):
            values = table[buckets]
            result += (values if inside is None else values * inside).sum(dim=1)
        return result.float()

    def _hashed(self, rows: Rows) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Yield the buckets of n-grams ``(B, k)``, and which of them count, None for all."""
        if self.terms == "words":
            found = [torch.tensor(hashed_words(text, self.buckets), dtype=torch.int64) for text in rows["text"]]
            lengths = torch.tensor([len(each) for each in found])
            padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
            yield padded, torch.arange(padded.shape[1]) < lengths[:, None]
            return
        mask = _on_cpu(counted_mask(rows))
        inside = None if mask is None else mask.bool()
        pairs = None if inside is None else inside[:, :-1] & inside[:, 1:]
        yield from zip(ngram_buckets(rows["input_ids"].cpu(), self.buckets), (inside, pairs), strict=True)


def hashed_words(text: str, buckets: int = _PUBLISHED_BUCKETS) -> list[int]:
    """Return the bucket of each word and each pair of neighbouring words of a text, as the released DSIR does."""
    words = _WORDS.findall(text.lower())
    return [_bucket(word, buckets) for word in words] + [_bucket(f"{a} {b}", buckets) for a, b in pairwise(words)]


@lru_cache(maxsize=1 << 18)
def _bucket(ngram: str, buckets: int) -> int:
    return int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % buckets


def check_terms(terms: str) -> None:
    """Raise ValueError for terms that texts cannot be split into."""
    if terms not in ("ids", "words"):
        raise ValueError(f"expected terms to be 'ids' (of tokens) or 'words' (of the decoded text), got {terms!r}")


def _on_cpu(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.cpu()


def _fitted(table: Tensor | None, scorer: Scorer) -> Tensor:
    if table is None:
        raise RuntimeError(f"{type(scorer).__name__} was called before fit: call fit(reference, pool) first")
    return table
