"""How much more likely the words of a text are in a reference set than in a pool, from counts of hashed n-grams.

Tokens and pairs of neighbours are counted in tables of their own, ``(2, buckets)``, row 0 for tokens and row 1 for
pairs: each row is a distribution that sums to one, and no token shares a bucket with a pair.
"""

import torch
from torch import Tensor

from liveselect.functional.ngrams import ngram_buckets

BUCKETS = 1 << 18
SMOOTHING = 1000.0


def count_ngrams(input_ids: Tensor, buckets: int = BUCKETS, mask: Tensor | None = None) -> Tensor:
    """Return how often each bucket of tokens and of pairs of neighbours occurs in all rows together.

    Args:
        input_ids: ``(B, T)`` integer token ids.
        buckets: a power of two.
        mask: ``(B, T)``, zero or False where a token does not count, or None when all do.

    Returns:
        ``(2, buckets)`` int64, additive over batches: row 0 counts tokens, row 1 pairs.

    Raises:
        ValueError: buckets is not a power of two.
    """
    counts = torch.zeros(2, buckets, dtype=torch.int64, device=input_ids.device)
    add_ngrams(counts, input_ids, mask)
    return counts


def add_ngrams(counts: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> None:
    """Add the n-grams of ``input_ids (B, T)`` to ``counts (2, buckets)`` in place; see :func:`count_ngrams`."""
    buckets = counts.shape[1]
    both = zip(counts, ngram_buckets(input_ids, buckets), _counted(input_ids, mask), strict=True)
    for count, bucket, inside in both:
        kept = bucket.flatten() if inside is None else bucket[inside]
        if len(kept) > buckets:
            count += torch.bincount(kept, minlength=buckets)
        else:  # a table for each small batch would cost more than its tokens
            count.index_add_(0, kept, torch.ones_like(kept))


def log_ratio(reference_counts: Tensor, pool_counts: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """Return the log of each bucket's probability in the reference set over that in the pool.

    The reference probability is smoothed towards the pool, ``(count + smoothing * p) / (total + smoothing)``, where p
    is the pool's: what the reference set says nothing about is worth nearly the same everywhere, and a small reference
    set cannot claim much. A bucket that the counted part of the pool leaves empty counts as filled once.

    Args:
        reference_counts: ``(2, buckets)`` as :func:`count_ngrams` makes them.
        pool_counts: the same of the pool, or of a uniform part of it.
        smoothing: strength, in n-grams: as much weight as a reference set of this size.

    Returns:
        ``(2, buckets)`` float32, nats; the larger, the more typical of the reference set.

    Raises:
        ValueError: the tables differ in shape, the pool is empty, or the smoothing is not above 0.
    """
    if reference_counts.shape != pool_counts.shape:
        raise ValueError(
            f"expected reference and pool to be counted in equal tables, got {tuple(reference_counts.shape)} and "
            f"{tuple(pool_counts.shape)}: count both with the same number of buckets"
        )
    if not smoothing > 0:
        raise ValueError(f"expected a smoothing above 0, got {smoothing}: without any, an unseen n-gram is -inf")
    reference, pool = reference_counts.double(), pool_counts.double()
    if not bool((pool[0].sum() > 0).item()):
        raise ValueError("expected counts of at least one token of the pool, got none: count its rows first")
    likely = pool.clamp(min=1) / pool.sum(dim=1, keepdim=True).clamp(min=1)
    smoothed = (reference + smoothing * likely) / (reference.sum(dim=1, keepdim=True) + smoothing)
    return (smoothed / likely).log().float()


def mean_log_ratio(input_ids: Tensor, mask: Tensor | None, table: Tensor) -> Tensor:
    """Return the log-ratio of each row, the mean over its tokens: of the token, and of its pair with the one before.

    Args:
        input_ids: ``(B, T)`` integer token ids.
        mask: ``(B, T)``, zero or False where a token does not count, or None when all do.
        table: ``(2, buckets)`` of :func:`log_ratio`.

    Returns:
        ``(B,)`` float32, nats per token; 0 for a row without tokens.
    """
    counted = _counted(input_ids, mask)
    total = torch.zeros(len(input_ids), device=table.device)
    for row, bucket, inside in zip(table, ngram_buckets(input_ids, table.shape[1]), counted, strict=True):
        values = row[bucket] if inside is None else row[bucket].mul_(inside)
        total += values.sum(dim=1)
    tokens = input_ids.shape[1] if mask is None else mask.bool().sum(dim=1).clamp(min=1)
    return total / tokens


def token_log_ratios(input_ids: Tensor, mask: Tensor | None, table: Tensor) -> Tensor:
    """Return what each token adds to :func:`mean_log_ratio`, ``(B, T)`` float32; a pair counts to its second token."""
    single, pairs = (row[bucket] for row, bucket in zip(table, ngram_buckets(input_ids, table.shape[1]), strict=True))
    counted = _counted(input_ids, mask)
    if mask is not None:
        single, pairs = (values * inside for values, inside in zip((single, pairs), counted, strict=True))
    total = single + torch.nn.functional.pad(pairs, (1, 0))
    tokens = input_ids.shape[1] if mask is None else mask.bool().sum(dim=1, keepdim=True).clamp(min=1)
    return total / tokens


def _counted(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens ``(B, T)`` and which pairs ``(B, T - 1)`` count, None for all."""
    if mask is None:
        return None, None
    inside = mask.bool()
    return inside, inside[:, :-1] & inside[:, 1:]
