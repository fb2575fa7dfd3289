import numpy as np
import pytest
import sklearn
from sklearn.cluster import KMeans

from liveselect.datamodules.clusters import kmeans
from liveselect.datamodules.clusters.kmeans import fit_centroids, near_pairs, nearest, unit


def blobs(rows=900, clusters=6, dimensions=5, seed=0):
    draws = np.random.default_rng(seed)
    centres = 10 * draws.normal(size=(clusters, dimensions))
    labels = draws.integers(clusters, size=rows)
    return (centres[labels] + draws.normal(size=(rows, dimensions))).astype(np.float32), labels


def inertia(vectors, centroids):
    return float((nearest(vectors, centroids)[1] ** 2).sum())


def test_mini_batches_end_near_what_full_k_means_finds():
    vectors, _ = blobs(rows=3000)
    full = KMeans(6, n_init=5, random_state=0).fit(vectors)
    for dtype in (np.float32, np.float16):
        assert inertia(vectors, fit_centroids(vectors.astype(dtype), 6, seed=1, epochs=4)) < 1.05 * full.inertia_


def test_an_epoch_uses_every_row_once_in_an_order_that_the_seed_draws(monkeypatch):
    monkeypatch.setattr(kmeans, "ROWS_PER_BLOCK", 7)
    rows = np.arange(100, dtype=np.float32).reshape(-1, 1)
    orders = []
    for seed in (0, 0, 1):
        batches = list(kmeans._batches(rows, 20, np.random.default_rng(seed)))
        assert sorted(np.concatenate(batches).ravel().tolist()) == list(range(100))
        assert max(map(len, batches)) <= 21
        orders.append(np.concatenate(batches).ravel().tolist())
    assert orders[0] == orders[1] != orders[2]


def test_equal_seeds_give_equal_centroids_and_progress_adds_up():
    vectors, _ = blobs()
    used = []
    first = fit_centroids(vectors, 6, seed=3, epochs=3, advance=used.append)
    assert sum(used) == 3 * len(vectors)
    assert np.array_equal(first, fit_centroids(vectors, 6, seed=3, epochs=3))


def test_the_nearest_centroid_is_the_nearest():
    vectors, _ = blobs(rows=50)
    centroids = vectors[:7]
    distances = np.linalg.norm(vectors[:, None] - centroids[None], axis=-1)
    found, offsets = nearest(vectors, centroids)
    assert np.array_equal(found, distances.argmin(axis=1))
    np.testing.assert_allclose(offsets, distances.min(axis=1), atol=1e-3)


@pytest.mark.parametrize("rows", [3, 100])  # compared at once, by the memory that scikit-learn may use
def test_near_pairs_are_all_pairs_up_to_the_reach_and_no_centroid_is_its_own_neighbour(rows):
    centroids = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    centroids[5] = 3 * centroids[11]  # the same direction, at the distance 0
    with sklearn.config_context(working_memory=rows * 20 * 8 / 2**20):
        near = near_pairs(centroids, 0.3)
    cosine = 1 - unit(centroids) @ unit(centroids).T
    for i in range(20):
        expected = [j for j in range(20) if j != i and cosine[i, j] <= 0.3]
        part = slice(near.indptr[i], near.indptr[i + 1])
        assert sorted(near.indices[part].tolist()) == expected
        np.testing.assert_allclose(near.data[part], cosine[i, near.indices[part]], atol=1e-6)
    assert 11 in near.indices[near.indptr[5] : near.indptr[6]]
    assert (near.data >= 0).all()


def test_zeros_stay_zeros_when_scaled():
    assert unit(np.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clusters": 1000}, r"clusters in 1\.\.900, got 1000"), ({"engine": "other"}, "engine among")],
)
def test_what_cannot_be_done_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_centroids(blobs()[0], **{"clusters": 3, "seed": 0, **settings})


def test_faiss_finds_what_scikit_learn_finds():
    pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    full = KMeans(20, n_init=3, random_state=0).fit(vectors)
    assert inertia(vectors, fit_centroids(vectors, 20, seed=1, engine="faiss")) < 1.05 * full.inertia_


def test_a_missing_faiss_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'liveselect\[faiss\]'"):
        fit_centroids(blobs()[0], 3, seed=0, engine="faiss")
