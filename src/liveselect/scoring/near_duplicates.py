"""Near-duplicates as a filter: what is nearly equal to an earlier row is never drawn."""

from collections.abc import Iterable

import torch
from torch import Tensor

from liveselect.functional.minhash import minhash, near_duplicates
from liveselect.scoring.scorer import MethodCard, Rows, Scorer, Total, counted_mask


class NearDuplicates(Scorer):
    """Scores the first of several near-duplicates 0 and the others -inf, which no selector draws.

    Rows are compared by MinHash over n-grams of tokens. As a filter of other scores, pass the folder as ``--filter``.

    Args:
        threshold: share of n-grams in common from which two rows are near-duplicates, 0..1.
        width: tokens of an n-gram.
        permutations: places of a signature; 4 bytes each are kept for a row.
        bands: see :func:`liveselect.functional.minhash.near_duplicates`.
    """

    card = MethodCard(
        name="near-duplicates",
        measures="0 for the first of several near-duplicates and for all else, -inf for the others",
        source="Broder 1997; as used by Lee et al. 2022, arXiv 2107.06499",
        published={"threshold": 0.8, "n-grams": 5},
    )
    pool_rows = 0

    def __init__(self, threshold: float = 0.8, width: int = 5, permutations: int = 128, bands: int = 16) -> None:
        self.threshold, self.width, self.permutations, self.bands = threshold, width, permutations, bands
        near_duplicates(torch.zeros(1, permutations, dtype=torch.int32), threshold, bands)  # refuses what cannot be

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Do nothing: rows are compared with each other."""

    def __call__(self, rows: Rows) -> Tensor:
        """Return the signature of each row, ``(B, K)`` int32."""
        mask = counted_mask(rows)
        return minhash(rows["input_ids"].cpu(), None if mask is None else mask.cpu(), self.permutations, self.width)

    def finished(self, values: Tensor) -> Tensor:
        """Return 0 or -inf for each row, ``(n,)`` float32, from the signatures of all, ``(n, K)``."""
        dropped = near_duplicates(values, self.threshold, self.bands)
        return torch.zeros(len(values)).masked_fill_(dropped, -torch.inf)
