"""Similarity of vectors: how close rows lie to a reference set."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from liveselect.scoring.scorer import MethodCard, Rows, Scorer, Total, counted_mask, trimmed

Embed = Callable[[Tensor], np.ndarray]
"""Maps tokens ``(n, T)`` to vectors ``(n, D)``."""


class EmbeddingSimilarity(Scorer):
    """Scores rows by the mean cosine of their vector with those of the reference examples.

    That is the product with the mean of the reference set's unit vectors, so one vector is kept.

    Args:
        embed: maps tokens ``(n, T)`` to vectors ``(n, D)``.
        fit_to: called with tokens ``(m, T)`` of the pool before anything is embedded.
        pool_rows: rows that it is called with at the most.
        networks: modules that ``embed`` runs, whose FLOPs are charged.
        uncounted: what else it computes whose FLOPs are not known, by name.
    """

    card = MethodCard(
        name="embed",
        measures="mean cosine with the reference examples, -1..1",
        source="as used in Compute-Constrained Data Selection, arXiv 2410.16208",
        published={"encoder": "gtr-t5-base", "tokens": 256, "over reference": "mean"},
    )

    def __init__(
        self,
        embed: Embed,
        fit_to: Callable[[Tensor], None] | None = None,
        pool_rows: int = 1 << 14,
        networks: Sequence[nn.Module] = (),
        uncounted: Sequence[str] = (),
    ) -> None:
        self._embed = embed
        self._fit_to = fit_to
        self.networks, self.uncounted = tuple(networks), tuple(uncounted)
        self.pool_rows, self.shares_pool = pool_rows, False  # all processes must fit the same embedding
        self._toward: np.ndarray | None = None

    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Fit the embedding to the pool, and average the reference set's unit vectors.

        Raises:
            ValueError: the reference set is empty.
        """
        if self._fit_to is not None:
            self._fit_to(torch.cat([rows["input_ids"].cpu() for rows in pool]))
        vectors = [unit_vectors(self._embed, rows) for rows in reference]
        if not vectors:
            raise ValueError("expected a reference set with at least one example, got none")
        self._toward = np.concatenate(vectors).mean(axis=0)

    def __call__(self, rows: Rows) -> Tensor:
        """Return the mean cosine of each row, ``(B,)`` float32."""
        if self._toward is None:
            raise RuntimeError("EmbeddingSimilarity was called before fit: call fit(reference, pool) first")
        return torch.from_numpy(unit_vectors(self._embed, rows) @ self._toward).float()


def unit_vectors(embed: Embed, rows: Rows) -> np.ndarray:
    """Return the vectors of rows at unit length, ``(B, D)``; tokens that the mask hides are left out."""
    mask = counted_mask(rows)
    if mask is None:
        found = embed(rows["input_ids"].cpu())
    else:  # rows of one length together: an encoder is slow row by row
        kept = [row.cpu() for row in trimmed(rows)]
        lengths = torch.tensor([len(row) for row in kept])
        parts = {int(n): (lengths == n).nonzero()[:, 0] for n in lengths.unique()}
        vectors = [embed(torch.stack([kept[i] for i in places.tolist()])) for places in parts.values()]
        found = np.concatenate(vectors)[torch.cat(list(parts.values())).argsort().numpy()]
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.maximum(norms, np.finfo(np.float32).tiny)
