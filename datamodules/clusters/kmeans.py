"""K-means of vectors that lie on disk, in bounded memory."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Engine = Literal["sklearn", "faiss"]
ROWS_PER_BLOCK = 256  # neighbouring rows that are read together: random order, at the speed of reading in order
ROWS_PER_BATCH = 4096  # at least; large enough that reading, not the step of k-means, takes the time
FAISS_PASSES = 20
FAISS_ROWS_PER_CENTROID = 64  # faiss warns below 39


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
        epochs: passes of the mini-batches over all vectors.
        engine: scikit-learn's mini-batch k-means; or faiss, which iterates on a sample of 64 vectors for each
            centroid.
        advance: called with the number of rows used since the last call, of ``epochs * n`` in all.

    Raises:
        ValueError: there are fewer vectors than clusters, or the engine is unknown.
        ImportError: ``engine`` is faiss, and faiss is missing.
    """
    check_fit(len(vectors), clusters, engine)
    draws = np.random.default_rng(seed)
    if engine == "faiss":
        sample = _sample(vectors, max(FAISS_ROWS_PER_CENTROID * clusters, ROWS_PER_BATCH), draws)
        faiss = _load_faiss().Kmeans(
            sample.shape[1], clusters, niter=FAISS_PASSES, seed=seed, max_points_per_centroid=len(sample)
        )
        faiss.train(np.ascontiguousarray(sample))
        advance(epochs * len(vectors))
        return np.asarray(faiss.centroids, dtype=np.float32)
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(clusters, random_state=seed, n_init=1, compute_labels=False, batch_size=ROWS_PER_BATCH)
    model.partial_fit(_sample(vectors, max(3 * clusters, ROWS_PER_BATCH), draws))  # the first call places the centroids
    for _ in range(epochs):
        for batch in _batches(vectors, max(clusters, ROWS_PER_BATCH), draws):
            model.partial_fit(batch)
            advance(len(batch))
    return np.asarray(model.cluster_centers_, dtype=np.float32)


def kmeans_flops(rows: int, clusters: int, dimensions: int, epochs: int, engine: Engine) -> float:
    """Return the FLOPs of comparing vectors with all centroids: in each pass of the fit, and to assign all rows."""
    if engine == "faiss":
        compared = FAISS_PASSES * min(rows, max(FAISS_ROWS_PER_CENTROID * clusters, ROWS_PER_BATCH)) + rows
    else:
        compared = (epochs + 1) * rows
    return 2.0 * compared * clusters * dimensions


def check_fit(rows: int, clusters: int, engine: str) -> None:
    """Check the arguments of :func:`fit_centroids` before the ``rows`` vectors are made.

    Raises:
        ValueError: there are fewer vectors than clusters, or the engine is unknown.
        ImportError: ``engine`` is faiss, and faiss is missing.
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


def near_pairs(centroids: np.ndarray, reach: float) -> "csr_matrix":
    """Return the cosine distances up to ``reach`` between different ``centroids (K, D)``, sparse ``(K, K)``.

    Centroids in the same direction are neighbours: their distance of zero is an entry.
    """
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(radius=reach, metric="cosine", algorithm="brute").fit(centroids)
    return neighbours.radius_neighbors_graph(mode="distance")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return ``vectors (n, D)`` scaled to length 1, float32; a vector of zeros stays."""
    from sklearn.preprocessing import normalize

    return normalize(np.asarray(vectors, dtype=np.float32))


def _batches(vectors: np.ndarray, size: int, draws: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield all rows in batches of about ``size``, each made of blocks from random places."""
    starts = draws.permutation(np.arange(0, len(vectors), ROWS_PER_BLOCK))
    per_batch = -(-size // ROWS_PER_BLOCK)
    for first in range(0, len(starts), per_batch):
        chosen = np.sort(starts[first : first + per_batch])  # ascending, so that the disk is read in order
        yield np.concatenate([vectors[start : start + ROWS_PER_BLOCK] for start in chosen]).astype(np.float32)


def _sample(vectors: np.ndarray, size: int, draws: np.random.Generator) -> np.ndarray:
    """Return up to ``size`` random rows, in their order."""
    if size >= len(vectors):
        return np.asarray(vectors, dtype=np.float32)
    return np.asarray(vectors[np.sort(draws.choice(len(vectors), size, replace=False))], dtype=np.float32)


def _load_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("the engine faiss needs faiss: pip install 'liveselect[faiss]'") from error
    return faiss
