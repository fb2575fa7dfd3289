"""Token n-grams hashed into buckets: cheap text features."""

import torch
from torch import Tensor

# odd 64-bit multipliers (as signed numbers); products wrap around, and the highest bits of the sum are the bucket
_TOKEN_FACTOR, _FIRST_FACTOR, _SECOND_FACTOR, _PAIR_OFFSET = (
    value - 2**64 if value >= 2**63 else value
    for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
)


def hashed_ngrams(input_ids: Tensor, buckets: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the buckets and the weights of all tokens and pairs of neighbours of each row.

    Summed over the occurrences in a bucket, the weights of a row are ``log(1 + count)``, divided by the norm of these
    values over all buckets. So a linear function is a gather and a sum, ``(w[bucket] * weight).sum(1)``.

    Args:
        input_ids: ``(B, T)`` integer token ids.
        buckets: a power of two.
        mask: ``(B, T)``, zero or False where a token does not count, or None when all do.

    Returns:
        buckets ``(B, 2 T - 1)`` int64 and weights ``(B, 2 T - 1)`` float32; a row without tokens weighs 0 everywhere.

    Raises:
        ValueError: buckets is not a power of two.
    """
    bucket, counted = counted_ngrams(input_ids, buckets, mask)
    counts = torch.zeros(len(bucket), buckets, dtype=torch.int32, device=bucket.device)
    counts.scatter_add_(1, bucket, counted.int())
    count = counts.gather(1, bucket).clamp(min=1).float()
    value = torch.log1p(count)
    norm = (counted * value.square() / count).sum(dim=1, keepdim=True).sqrt()
    return bucket, counted * value / count / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def ngram_buckets(input_ids: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Return the bucket of every token ``(B, T)`` and of every pair of neighbours ``(B, T - 1)``, int64.

    Raises:
        ValueError: buckets is not a power of two.
    """
    if buckets < 2 or buckets & (buckets - 1):
        raise ValueError(f"expected the number of buckets to be a power of two, got {buckets}")
    tokens = input_ids.long()
    pairs = (tokens[:, :-1] * _FIRST_FACTOR).add_(tokens[:, 1:] * _SECOND_FACTOR).add_(_PAIR_OFFSET)
    highest = 65 - buckets.bit_length()  # the shift that leaves the highest bits
    single = (tokens * _TOKEN_FACTOR).bitwise_right_shift_(highest).bitwise_and_(buckets - 1)
    return single, pairs.bitwise_right_shift_(highest).bitwise_and_(buckets - 1)


def counted_ngrams(input_ids: Tensor, buckets: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the buckets of all tokens and pairs of each row, ``(B, 2 T - 1)`` int64, and which count, bool.

    A linear function of the shares that buckets have in a row is a gather and a mean of these, with no row of all
    buckets. Tokens and pairs share the buckets; ``mask (B, T)`` is zero or False where a token does not count.
    """
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    bucket = torch.cat(ngram_buckets(input_ids, buckets), dim=1)
    return bucket, torch.cat([counted, counted[:, :-1] & counted[:, 1:]], dim=1)
