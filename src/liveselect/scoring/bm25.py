"""BM25: how well rows match the words of a reference set."""

import re
import string
import zlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from liveselect.scoring.ngrams import Terms, check_terms
from liveselect.scoring.scorer import MethodCard, Rows, Scorer, Total, counted_mask

Variant = Literal["okapi", "lucene"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BUCKETS = 1 << 22


class BM25(Scorer):
    """Scores rows by BM25 with every example of the reference set as a query; the mean over queries.

    The score is linear in the query's counts, so all queries are one table of weights, and a row is scored in the time
    that it takes to read it, without an index of the pool: only document frequencies and the mean length are kept.
    The package bm25s, which this agrees with in tests, indexes a corpus that is in memory as a whole and scores no row
    that is not in the index: no streaming, no going on after a stop, no sharing out, and no ``okapi`` idf.

    Args:
        terms: ``words`` splits the decoded text as the published code does (lower case, punctuation deleted, split at
            spaces); ``ids`` takes token ids, which is many times faster.
        variant: ``okapi`` is the form of the package rank_bm25, as published: with the factor k1 + 1, and the idf of
            very common terms replaced by ``epsilon`` times the mean idf. ``lucene`` is the default of bm25s.
        k1: how fast repeated terms stop counting.
        b: how much long rows are discounted, 0..1.
        epsilon: see ``variant``.
        buckets: the number of hash buckets for words; two words in one bucket count as one.
    """

    card = MethodCard(
        name="bm25",
        measures="mean BM25 of the row over the reference examples as queries",
        source="Robertson et al. 1994; as used in Compute-Constrained Data Selection, arXiv 2410.16208",
        published={"k1": 1.5, "b": 0.75, "epsilon": 0.25, "terms": "words", "variant": "okapi", "over queries": "mean"},
    )

    def __init__(
        self,
        terms: Terms = "ids",
        variant: Variant = "okapi",
        k1: float = 1.5,
        b: float = 0.75,
        epsilon: float = 0.25,
        buckets: int = _BUCKETS,
    ) -> None:
        check_terms(terms)
        if variant not in ("okapi", "lucene"):
            raise ValueError(f"expected variant to be 'okapi' or 'lucene', got {variant!r}")
        if not 1 <= buckets < 2**31:
            raise ValueError(f"expected buckets in 1..2^31, got {buckets}")
        if not (k1 >= 0 and 0 <= b <= 1):
            raise ValueError(f"expected k1 of at least 0 and b in 0..1, got k1={k1} and b={b}")
        self.terms: Terms = terms
        self.reads = "text" if terms == "words" else "tokens"
        self.variant: Variant = variant
        self.k1, self.b, self.epsilon, self.buckets = k1, b, epsilon, buckets
        self._weights = np.zeros(0)
        self._mean_length = 0.0

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Count document frequencies in the pool, and the terms of the queries.

        Raises:
            ValueError: there are no rows, or a token id is beyond ``buckets``.
        """
        frequency, sizes = torch.zeros(self.buckets, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        for rows in pool:
            terms = self._terms(rows)
            _add(frequency.numpy(), _distinct(terms)[1])
            sizes += torch.tensor([len(terms), int((terms >= 0).sum())])
        frequency, sizes = total(frequency), total(sizes)
        documents, length = sizes.tolist()
        query, queries = np.zeros(self.buckets), 0
        for rows in reference:
            terms = self._terms(rows)
            _add(query, terms[terms >= 0])
            queries += len(terms)
        if not length or not queries:
            raise ValueError(f"expected rows with terms in pool and reference set, got {documents} and {queries} rows")
        self._mean_length = length / documents
        self._weights = query / queries * self._inverse_frequency(frequency.numpy(), documents)

    def __call__(self, rows: Rows) -> Tensor:
        """Return the score of each row, ``(B,)`` float32."""
        if not len(self._weights):
            raise RuntimeError("BM25 was called before fit: call fit(reference, pool) first")
        terms = self._terms(rows)
        row, term, times = _distinct(terms)
        discount = self.k1 * (1 - self.b + self.b * (terms >= 0).sum(axis=1) / self._mean_length)
        factor = self.k1 + 1 if self.variant == "okapi" else 1.0
        value = self._weights[term] * times * factor / (times + discount[row])
        return torch.from_numpy(np.bincount(row, value, minlength=len(terms))).float()

    def _inverse_frequency(self, frequency: np.ndarray, documents: int) -> np.ndarray:
        if self.variant == "lucene":
            return np.log1p((documents - frequency + 0.5) / (frequency + 0.5))
        idf = np.log(documents - frequency + 0.5) - np.log(frequency + 0.5)
        floor = self.epsilon * idf[frequency > 0].mean()
        # a term that no row of the pool has matches nothing
        return np.where(idf < 0, floor, idf)

    def _terms(self, rows: Rows) -> np.ndarray:
        """Return the terms of each row, ``(B, W)`` int32; -1 where there is none."""
        mask = counted_mask(rows)
        if self.terms == "words":
            found = [hashed_terms(text, self.buckets) for text in rows["text"]]
            terms = np.full((len(found), max([1, *map(len, found)])), -1, np.int32)
            for row, words in zip(terms, found, strict=True):
                row[: len(words)] = words
            return terms
        ids = rows["input_ids"].cpu().numpy()
        if ids.size and ids.max() >= self.buckets:
            raise ValueError(
                f"token id {ids.max()} is beyond the {self.buckets} buckets that terms are counted in: raise buckets"
            )
        terms = ids.astype(np.int32)
        return terms if mask is None else np.where(mask.cpu().numpy().astype(bool), terms, np.int32(-1))


def _distinct(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row, the term, and how often the row has it, ``(k,)`` each, of all distinct terms of rows ``(B, W)``.

    Sorting short rows of 32 bits is ten times faster than ``np.unique`` of all.
    """
    ordered = np.sort(terms, axis=1)
    begins = np.ones(ordered.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = np.flatnonzero(begins)
    times, term = np.diff(places, append=ordered.size), ordered.ravel()[places]
    known = term >= 0
    return (places // max(1, terms.shape[1]))[known], term[known], times[known]


def hashed_terms(text: str, buckets: int = _BUCKETS) -> list[int]:
    """Return the bucket of each word, after the published normalisation, which keeps empty words between spaces."""
    words = re.sub("\n", " ", text.lower()).translate(_PUNCTUATION).split(" ")
    return [zlib.crc32(word.encode()) % buckets for word in words]


def _add(counts: np.ndarray, terms: np.ndarray) -> None:
    found = np.bincount(terms)
    counts[: len(found)] += found
