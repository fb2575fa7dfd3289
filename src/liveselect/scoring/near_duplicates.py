"""Near-duplicates as a filter: what is nearly equal to an earlier row is never drawn."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from liveselect.functional.minhash import minhash, near_duplicates
from liveselect.functional.near_vectors import near_vectors
from liveselect.scoring.scorer import MethodCard, Rows, Scorer, Total, counted_mask
from liveselect.scoring.similarity import Embed, unit_vectors

_ROWS_OF_A_CLUSTER = 4096


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
        if width < 1 or permutations < 1 or bands < 1:
            raise ValueError(
                f"expected width, permutations and bands of at least 1, got {width}, {permutations} and {bands}"
            )
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
        return _first_only(near_duplicates(values, self.threshold, self.bands))


class SemanticDuplicates(Scorer):
    """Scores the first of several rows with nearly equal vectors 0 and the others -inf, which no selector draws.

    A vector of each row is kept until all are compared, 4 bytes for each of its dimensions.

    Args:
        embed: maps tokens ``(n, T)`` to vectors ``(n, D)``.
        fit_to: called with tokens ``(m, T)`` of the pool before anything is embedded.
        threshold: cosine above which two rows are near-duplicates; 1 less the epsilon of the paper.
        clusters: only rows of one cluster are compared; by default one for every 4,096 rows.
        pool_rows: rows that ``fit_to`` is called with at the most.
        networks: modules that ``embed`` runs, whose FLOPs are charged.
        uncounted: what else it computes whose FLOPs are not known, by name.
    """

    card = MethodCard(
        name="semantic-duplicates",
        measures="0 for the first of several rows with nearly equal vectors and for all else, -inf for the others",
        source="Abbas et al. 2023, 'SemDeDup', arXiv 2303.09540",
        published={"clusters on C4": 11_000, "vectors": "last token of a language model of 125M", "kept first": "far"},
    )

    def __init__(
        self,
        embed: Embed,
        fit_to: Callable[[Tensor], None] | None = None,
        threshold: float = 0.95,
        clusters: int | None = None,
        pool_rows: int = 1 << 14,
        networks: Sequence[nn.Module] = (),
        uncounted: Sequence[str] = (),
    ) -> None:
        if not -1 <= threshold <= 1:
            raise ValueError(f"expected a threshold in -1..1, a cosine, got {threshold}")
        if clusters is not None and clusters < 1:
            raise ValueError(f"expected at least one cluster, got {clusters}")
        self._embed, self._fit_to = embed, fit_to
        self.threshold, self.clusters = threshold, clusters
        self.networks, self.uncounted = tuple(networks), tuple(uncounted)
        self.pool_rows, self.shares_pool = pool_rows, False  # all processes must fit the same embedding

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Fit the embedding to the pool; the reference set is not looked at."""
        if self._fit_to is not None:
            self._fit_to(torch.cat([rows["input_ids"].cpu() for rows in pool]))

    def __call__(self, rows: Rows) -> Tensor:
        """Return the unit vector of each row, ``(B, D)`` float32."""
        return torch.from_numpy(unit_vectors(self._embed, rows)).float()

    def finished(self, values: Tensor) -> Tensor:
        """Return 0 or -inf for each row, ``(n,)`` float32, from the vectors of all, ``(n, D)``."""
        clusters = self.clusters or math.ceil(len(values) / _ROWS_OF_A_CLUSTER)
        return _first_only(near_vectors(values, self.threshold, min(clusters, len(values))))


def _first_only(dropped: Tensor) -> Tensor:
    return torch.zeros(len(dropped)).masked_fill_(dropped, -torch.inf)
