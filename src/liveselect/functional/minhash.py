"""MinHash: short signatures of token rows, whose agreement estimates how much two rows have in common."""

import torch
from torch import Tensor

# odd multipliers of a 64-bit mixing function; products wrap around
_MIX = tuple(value - 2**64 if value >= 2**63 else value for value in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_ENTRIES = 1 << 15  # hashes at once: what a core keeps in its cache


def minhash(input_ids: Tensor, mask: Tensor | None = None, permutations: int = 128, width: int = 5) -> Tensor:
    """Return the signature of each row's set of n-grams of ``width`` tokens.

    Two rows agree in a place of their signatures with a probability equal to the Jaccard similarity of their sets. A
    row with fewer tokens than ``width`` has one n-gram, all of it.

    Args:
        input_ids: ``(B, T)`` integer token ids.
        mask: ``(B, T)``, zero or False where a token does not count; n-grams that hold such a token do not count.
        permutations: K, places of a signature.
        width: tokens of an n-gram.

    Returns:
        ``(B, K)`` int32.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    ids = input_ids.long()
    width = max(1, min(width, ids.shape[1]))
    hashes = torch.zeros_like(ids[:, : ids.shape[1] - width + 1])
    inside = torch.ones_like(hashes, dtype=torch.bool)
    for offset in range(width):
        part = slice(offset, offset + hashes.shape[1])
        hashes = _mixed(hashes * _MIX[0] + ids[:, part] + 1)
        if mask is not None:
            inside &= mask[:, part].bool()
    generator = torch.Generator().manual_seed(0)  # one family of functions for ever: signatures are kept in files
    factors = torch.randint(2**62, (permutations,), generator=generator) * 2 + 1
    parts = []
    step = max(1, _ENTRIES // max(1, hashes.shape[1]))
    for rows, counted in zip(hashes.split(step), inside.split(step), strict=True):
        least = []
        ignored = None if mask is None else ~counted
        for factor in factors.tolist():
            values = rows * factor
            if ignored is not None:
                values.masked_fill_(ignored, 2**63 - 1)
            least.append(values.amin(dim=1) >> 32)  # 32 bits, signed
        parts.append(torch.stack(least, dim=1).int())
    return torch.cat(parts) if parts else torch.empty(0, permutations, dtype=torch.int32)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Return the share of equal places of signatures ``(..., K)``, an estimate of the Jaccard similarity."""
    return (first == second).float().mean(dim=-1)


def near_duplicates(signatures: Tensor, threshold: float = 0.8, bands: int = 16) -> Tensor:
    """Return which rows are near-duplicates of an earlier row, ``(n,)`` bool.

    Rows that agree in all places of one of ``bands`` parts of their signatures are compared with the first such row,
    and dropped if their signatures agree in at least ``threshold`` of all places. So a chain of near-duplicates is
    dropped but for its first row.

    Args:
        signatures: ``(n, K)`` of :func:`minhash`, K a multiple of ``bands``.
        threshold: 0..1.
        bands: more of them find rows that have less in common; pairs of similarity s meet with probability
            ``1 - (1 - s ** (K / bands)) ** bands``.

    Raises:
        ValueError: K is no multiple of ``bands``, or the threshold is not in 0..1.
    """
    rows, places = signatures.shape
    if places % bands or not 0 <= threshold <= 1:
        raise ValueError(
            f"expected a number of bands that divides {places} and a threshold in 0..1, got {bands} and {threshold}"
        )
    dropped = torch.zeros(rows, dtype=torch.bool)
    for band in signatures.split(places // bands, dim=1):
        key = torch.zeros(rows, dtype=torch.int64)
        for column in band.unbind(dim=1):
            key = _mixed(key * _MIX[0] + column + 1)
        order = key.argsort(stable=True)  # rows of equal keys stay in their order
        ordered = key[order]
        starts = torch.ones(rows, dtype=torch.bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        first = order[torch.where(starts, torch.arange(rows), 0).cummax(dim=0).values]
        others = (~starts).nonzero()[:, 0]
        for part in others.split(1 << 20):
            mine, its = order[part], first[part]
            dropped[mine[agreement(signatures[mine], signatures[its]) >= threshold]] = True
    return dropped


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ ((value >> 33) & 0x7FFFFFFF)) * _MIX[1]
    return value ^ ((value >> 29) & 0x7FFFFFFFF)
