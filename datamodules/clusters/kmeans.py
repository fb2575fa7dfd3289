"""K-means of vectors that lie on disk, in bounded memory."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np

Engine = Literal["sklearn", "faiss"]
BLOCK = 256  # neighbouring rows that are read together: random order, at the speed of reading in order
BATCH = 4096
FAISS_POINTS = 64  # rows for each centroid; faiss calls fewer than 39 too few


def fit_centroids(
    vectors: np.ndarray,
    clusters: int,
    seed: int,
    epochs: int = 2,
    engine: Engine = "sklearn",
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Return the centroids of ``vectors``, ``(clusters, D)`` float32.

    Args:
        vectors: ``(n, D)``, may be a memory map; read in parts.
        clusters: K, at most n.
        seed: of the order of reading and of the initial centroids.
        epochs: how often mini-batches walk through all vectors.
        engine: scikit-learn's mini-batch k-means; or faiss, which iterates on a sample of 64 vectors for each
            centroid.
        advance: is told how many rows were used, of ``epochs * n`` in all.

    Raises:
        ValueError: there are fewer vectors than clusters, or the engine is unknown.
        ImportError: faiss is asked for and missing.
    """
    check_fit(len(vectors), clusters, engine)
    draws = np.random.default_rng(seed)
    if engine == "faiss":
        centroids = _faiss(_sample(vectors, max(FAISS_POINTS * clusters, BATCH), draws), clusters, seed)
        advance(epochs * len(vectors))
        return centroids
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(clusters, random_state=seed, n_init=1, compute_labels=False, batch_size=BATCH)
    model.partial_fit(_sample(vectors, max(3 * clusters, BATCH), draws))  # its first call places the centroids
    for _ in range(epochs):
        for batch in _batches(vectors, max(clusters, BATCH), draws):
            model.partial_fit(batch)
            advance(len(batch))
    return np.asarray(model.cluster_centers_, dtype=np.float32)


def check_fit(rows: int, clusters: int, engine: str) -> None:
    """Raise what :func:`fit_centroids` would of so many vectors, before there are any.

    Raises:
        ValueError: there are fewer vectors than clusters, or the engine is unknown.
        ImportError: faiss is asked for and missing.
    """
    if not 1 <= clusters <= rows:
        raise ValueError(f"expected a number of clusters in 1..{rows}, got {clusters}: there are {rows} rows")
    if engine not in get_args(Engine):
        raise ValueError(f"expected an engine among {get_args(Engine)}, got {engine!r}")
    if engine == "faiss":
        _load_faiss()


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centroid of each of ``vectors (n, D)`` and the distance to it, ``(n,)`` each."""
    from sklearn.metrics import pairwise_distances_argmin_min

    return pairwise_distances_argmin_min(vectors, centroids)


def near_pairs(centroids: np.ndarray, reach: float, rows: int = 1024) -> Any:
    """Return the cosine distances up to ``reach`` between different ``centroids (K, D)``, sparse ``(K, K)``."""
    from scipy.sparse import csr_matrix, vstack

    directions = unit(centroids)
    parts = []
    for start in range(0, len(directions), rows):
        distances = 1.0 - directions[start : start + rows] @ directions.T
        here, there = np.nonzero(distances <= reach)
        apart = here + start != there
        here, there = here[apart], there[apart]
        values = distances[here, there].clip(min=0.0)  # zeros stay: equal directions are neighbours
        starts = np.concatenate([[0], np.cumsum(np.bincount(here, minlength=len(distances)))])
        parts.append(csr_matrix((values, there, starts), shape=distances.shape))
    return vstack(parts, format="csr")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return ``vectors (n, D)`` scaled to length 1, float32; a vector of zeros stays."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _batches(vectors: np.ndarray, size: int, draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield all rows in batches of about ``size``, each made of blocks from random places."""
    starts = draws.permutation(np.arange(0, len(vectors), BLOCK))
    per_batch = -(-size // BLOCK)
    for first in range(0, len(starts), per_batch):
        parts = [vectors[start : start + BLOCK] for start in np.sort(starts[first : first + per_batch])]
        yield np.concatenate(parts).astype(np.float32)


def _sample(vectors: np.ndarray, size: int, draws: np.random.Generator) -> np.ndarray:
    """Return ``size`` random rows in their order, or all of them when there are not more."""
    if size >= len(vectors):
        return np.asarray(vectors, dtype=np.float32)
    return np.asarray(vectors[np.sort(draws.choice(len(vectors), size, replace=False))], dtype=np.float32)


def _faiss(sample: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    faiss = _load_faiss()
    model = faiss.Kmeans(sample.shape[1], clusters, niter=20, seed=seed, max_points_per_centroid=len(sample))
    model.train(np.ascontiguousarray(sample))
    return np.asarray(model.centroids, dtype=np.float32)


def _load_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("the engine faiss needs faiss: pip install 'liveselect[faiss]'") from error
    return faiss
