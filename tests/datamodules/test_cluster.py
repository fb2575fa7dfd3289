"""Clusters of a pool: what they are, that they are there whole or not at all, and whose they are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.metrics import adjusted_rand_score

from liveselect.cli.cluster import main
from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.clusters import cluster
from liveselect.datamodules.clusters.cluster import Clustering, Clusters, cluster_pool
from liveselect.datamodules.clusters.embedding import HashedEmbedder
from liveselect.datamodules.clusters.naming import cluster_names
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.pools.tokens import write_store

torch.set_num_threads(1)
ROWS, BLOCK, TOPICS = 240, 16, 4
FOUR = Clustering(clusters=TOPICS, dimensions=16)
WORDS = {
    "law": "court appeal judge sentence verdict clerk",
    "sea": "ship anchor harbour sailor wave tide",
    "food": "bread butter oven flour sugar kitchen",
    "code": "function variable loop compiler pointer stack",
}


def make_pool(path, rows=ROWS, seed=0):
    """A pool whose blocks use the tokens of one topic each, and which topic that is."""
    draws = np.random.default_rng(seed)
    topics = draws.integers(TOPICS, size=rows)
    tokens = 10 * topics[:, None] + draws.integers(10, size=(rows, BLOCK))
    return write_store(path / "pool", tokens, block_size=BLOCK, vocab_size=10 * TOPICS), topics


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path)


def arrays(clusters):
    return {
        name: np.array(clusters.read(name)) for name in ("assignment", "offsets", "centroids", "typical", "vectors")
    }


def test_blocks_of_one_topic_are_one_cluster(pool):
    store, topics = pool
    clusters = cluster_pool(store, FOUR, quiet=True)
    assert adjusted_rand_score(topics, clusters.read("assignment")) == 1.0
    assert clusters.manifest["sizes"] == sorted(np.bincount(topics).tolist(), reverse=True)


def test_what_is_stored_is_what_it_says(pool):
    store, _ = pool
    clusters = cluster_pool(store, Clustering(clusters=12, dimensions=8, reach=1.2), quiet=True)
    found = arrays(clusters)
    vectors, centroids = found["vectors"].astype(np.float32), found["centroids"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=2e-3)
    distances = np.linalg.norm(vectors[:, None] - centroids[None], axis=-1)
    assert np.array_equal(found["assignment"], distances.argmin(axis=1))
    np.testing.assert_allclose(found["offsets"], distances.min(axis=1), atol=1e-3)
    geometry = clusters.geometry()
    for code in range(len(clusters)):
        members = np.flatnonzero(found["assignment"] == code)
        assert len(members) == clusters.manifest["sizes"][code] > 0
        nearest = members[np.argsort(found["offsets"][members], kind="stable")]
        assert found["typical"][code].tolist() == [*nearest, *[nearest[-1]] * 8][:8]
        assert geometry.typical[code] == nearest[0]
    assert geometry.reach == 1.2
    assert geometry.starts[-1] == len(geometry.columns) == len(geometry.distances) > 0


def test_the_pool_has_the_clusters_as_its_groups(pool):
    store, _ = pool
    clusters = cluster_pool(store, FOUR, quiet=True)
    candidates = clusters.pool(store.fingerprint)
    assert candidates.size == ROWS
    assert candidates.fingerprint == store.fingerprint
    assert candidates.groups.tolist() == clusters.read("assignment").tolist()
    assert candidates.group_names == clusters.names == tuple(f"cluster {i}" for i in range(TOPICS))


def test_the_datamodule_groups_candidates_by_the_clusters_it_is_told(pool):
    store, _ = pool
    clusters = cluster_pool(store, FOUR, name="topics", quiet=True)
    data = SelectionDataModule(store, [{"input_ids": [1, 2, 3, 1]}], batch_size=4, groups="topics")
    data.setup("fit")
    assert data.pool.group_names == clusters.names
    assert torch.equal(data.pool.groups, torch.from_numpy(np.array(clusters.read("assignment"))))
    assert data.pool.geometry.reach == FOUR.reach
    with pytest.raises(FileNotFoundError, match="--name other`, or leave groups out"):
        SelectionDataModule(store, [{"input_ids": [1, 2, 3, 1]}], batch_size=4, groups="other").setup("fit")


def test_the_same_settings_give_the_same_clusters_and_are_not_repeated(pool, tmp_path_factory, monkeypatch):
    store, _ = pool
    first = arrays(cluster_pool(store, FOUR, quiet=True))
    other, _ = make_pool(tmp_path_factory.mktemp("other"))
    second = arrays(cluster_pool(other, FOUR, quiet=True))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    monkeypatch.setattr(cluster, "make_embedder", None)  # nothing may be embedded again
    assert np.array_equal(arrays(cluster_pool(store, FOUR))["assignment"], first["assignment"])


def test_other_settings_are_refused_until_they_may_replace_what_is_there(pool):
    store, _ = pool
    cluster_pool(store, FOUR, quiet=True)
    with pytest.raises(ValueError, match="made with other clusters, seed: pass --overwrite, or --name"):
        cluster_pool(store, Clustering(clusters=3, dimensions=16, seed=1), quiet=True)
    assert len(Clusters(store)) == 4
    assert len(cluster_pool(store, Clustering(clusters=3, dimensions=16), overwrite=True, quiet=True)) == 3
    assert len(cluster_pool(store, FOUR, name="fine", quiet=True)) == 4
    assert sorted(file.name for file in store.path.iterdir() if file.is_dir()) == ["clusters", "fine"]


def test_the_vectors_of_one_clustering_serve_another(pool):
    store, topics = pool
    cluster_pool(store, FOUR, quiet=True)
    again = Clustering(clusters=TOPICS, embed=f"vectors:{store.path / 'clusters' / 'vectors.npy'}", seed=5)
    clusters = cluster_pool(store, again, name="again", quiet=True)
    assert adjusted_rand_score(topics, clusters.read("assignment")) == 1.0


class Interrupted(HashedEmbedder):
    """Counts the rows it embeds, and stops before ``limit``."""

    def __init__(self, limit):
        super().__init__(dimensions=16)
        self.limit, self.embedded = limit, 0

    def embed(self, ids, blocks):
        if self.embedded + len(ids) > self.limit:
            raise KeyboardInterrupt
        self.embedded += len(ids)
        return super().embed(ids, blocks)


def test_an_interrupted_call_leaves_no_clusters_and_its_repetition_embeds_only_the_rest(
    pool, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(cluster, "ROWS_PER_CHUNK", 50)
    store, _ = pool
    with pytest.raises(KeyboardInterrupt):
        cluster_pool(store, FOUR, quiet=True, embedder=Interrupted(limit=120))
    with pytest.raises(FileNotFoundError, match="run `liveselect cluster"):
        Clusters(store)
    rest = Interrupted(limit=ROWS)
    continued = arrays(cluster_pool(store, FOUR, quiet=True, embedder=rest))
    assert rest.embedded == ROWS - 100
    other, _ = make_pool(tmp_path_factory.mktemp("other"))
    whole = arrays(cluster_pool(other, FOUR, quiet=True))
    assert all(np.array_equal(continued[name], whole[name]) for name in whole)
    assert not list(store.path.glob("*.partial"))


def test_the_seconds_of_an_interrupted_call_are_counted(pool, monkeypatch):
    monkeypatch.setattr(cluster, "ROWS_PER_CHUNK", 50)
    store, _ = pool
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Ticking(Interrupted):
        def embed(self, ids, blocks):
            found = super().embed(ids, blocks)
            clock.now += 10.0
            return found

    with pytest.raises(KeyboardInterrupt):
        cluster_pool(store, FOUR, quiet=True, embedder=Ticking(limit=120))
    clock.now += 1000.0
    clusters = cluster_pool(store, FOUR, quiet=True, embedder=Ticking(limit=ROWS))
    assert clusters.cost["seconds"] == {"embed": 50.0, "cluster": 0.0}


class Network(Interrupted):
    """Embeds blocks by a linear layer, and stops before ``limit`` rows."""

    uncounted = ()

    def __init__(self, limit):
        super().__init__(limit)
        self.layer = torch.nn.Linear(BLOCK, 3)
        torch.nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        self.networks = (self.layer,)

    def fit(self, blocks):
        self.dimensions = 3

    def embed(self, ids, blocks):
        if self.embedded + len(ids) > self.limit:
            raise KeyboardInterrupt
        self.embedded += len(ids)
        with torch.no_grad():
            return self.layer(blocks.float()).numpy()


def test_the_flops_of_an_encoder_and_of_k_means_are_counted_over_an_interruption_too(pool, monkeypatch):
    monkeypatch.setattr(cluster, "ROWS_PER_CHUNK", 50)
    store, _ = pool
    settings = Clustering(clusters=TOPICS, embed="hashed", dimensions=16)
    with pytest.raises(KeyboardInterrupt):
        cluster_pool(store, settings, quiet=True, embedder=Network(limit=120))
    cost = cluster_pool(store, settings, quiet=True, embedder=Network(limit=ROWS)).cost
    assert cost["flops"] == {"embed": 2 * ROWS * BLOCK * 3, "cluster": 2 * (settings.epochs + 1) * ROWS * TOPICS * 3}
    assert not cost["uncounted"]
    data = SelectionDataModule(pool=store.path, groups="clusters", reference=[{"input_ids": [1, 2]}], batch_size=4)
    data.setup("fit")
    assert data.cost_before_training()["flops"] == cost["flops"]


def test_what_another_clustering_left_unfinished_is_not_continued(pool, monkeypatch):
    monkeypatch.setattr(cluster, "ROWS_PER_CHUNK", 50)
    store, _ = pool
    with pytest.raises(KeyboardInterrupt):
        cluster_pool(store, FOUR, quiet=True, embedder=Interrupted(limit=120))
    again = Interrupted(limit=ROWS)
    cluster_pool(store, Clustering(clusters=TOPICS, dimensions=16, seed=1), quiet=True, embedder=again)
    assert again.embedded == ROWS


def test_a_failure_while_replacing_keeps_the_old_clusters(pool, monkeypatch):
    store, _ = pool
    cluster_pool(store, FOUR, quiet=True)
    monkeypatch.setattr(cluster, "near_pairs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster_pool(store, Clustering(clusters=3, dimensions=16), overwrite=True, quiet=True)
    assert len(Clusters(store)) == 4


def test_clusters_of_another_pool_are_refused(pool, tmp_path_factory):
    store, _ = pool
    cluster_pool(store, FOUR, quiet=True)
    other, _ = make_pool(tmp_path_factory.mktemp("other"), seed=1)
    (store.path / "clusters").rename(other.path / "clusters")
    with pytest.raises(ValueError, match=f"were made from the pool {store.fingerprint}, and this is"):
        Clusters(other)


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"clusters": 241}, "clusters", r"number of clusters in 1\.\.240, got 241"),
        ({"clusters": 0}, "clusters", r"in 1\.\.240, got 0"),
        ({"engine": "spark"}, "clusters", "an engine among .* got 'spark'"),
        ({"epochs": 0}, "clusters", "at least one pass"),
        ({"reach": -0.1}, "clusters", r"a reach in 0\.\.2"),
        ({"embed": "tfidf"}, "clusters", "of the form hashed"),
        ({}, "texts", "texts holds something else"),
        ({}, "../elsewhere", "a name has no slashes"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_embedded(pool, monkeypatch, settings, name, message):
    store, _ = pool
    (store.path / "texts").mkdir()
    (store.path / "texts" / "kept").write_text("not clusters")
    monkeypatch.setattr(HashedEmbedder, "fit", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message):
        cluster_pool(store, Clustering(**{"clusters": 4, "dimensions": 8, **settings}), name=name, quiet=True)
    assert (store.path / "texts" / "kept").exists()


def test_vectors_that_are_not_finite_are_refused_and_mended_ones_go_on(pool, monkeypatch):
    monkeypatch.setattr(cluster, "ROWS_PER_CHUNK", 50)
    store, topics = pool
    vectors = np.eye(TOPICS, dtype=np.float32)[topics]
    vectors[130], vectors[170] = np.nan, np.inf
    np.save(store.path / "v.npy", vectors)
    mine = Clustering(clusters=TOPICS, embed=f"vectors:{store.path / 'v.npy'}")
    with pytest.raises(ValueError, match=r"for 1 of the blocks 100\.\.149, block 130 first: mend or replace"):
        cluster_pool(store, mine, quiet=True)
    np.save(store.path / "v.npy", np.eye(TOPICS)[topics])
    assert adjusted_rand_score(topics, cluster_pool(store, mine, quiet=True).read("assignment")) == 1.0


def test_one_cluster_as_many_as_blocks_and_fewer_than_asked_for(tmp_path):
    same = write_store(tmp_path / "pool", np.ones((12, 8), np.int64), block_size=8, vocab_size=4)
    assert len(cluster_pool(same, Clustering(clusters=5, dimensions=8), quiet=True)) == 1  # empty ones are dropped
    store, _ = make_pool(tmp_path / "other", rows=30)
    one = cluster_pool(store, Clustering(clusters=1, dimensions=8), name="one", quiet=True)
    assert one.manifest["sizes"] == [30]
    assert len(one.geometry().columns) == 0
    all_of_them = cluster_pool(store, Clustering(clusters=30, dimensions=8), name="all", quiet=True)
    assert sum(all_of_them.manifest["sizes"]) == 30
    assert min(all_of_them.manifest["sizes"]) > 0


def test_a_full_disk_is_told_before_anything_is_embedded(pool, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cluster.os, "posix_fallocate", full)
    monkeypatch.setattr(HashedEmbedder, "embed", lambda *_: 1 / 0)
    with pytest.raises(OSError, match="No space left"):
        cluster_pool(pool[0], FOUR, quiet=True)


def cluster_on_this_rank(path):
    return len(cluster_pool(path, FOUR, quiet=True))


def test_two_ranks_make_the_clusters_of_one(pool, tmp_path_factory):
    store, _ = pool
    other, _ = make_pool(tmp_path_factory.mktemp("other"))
    whole = arrays(cluster_pool(store, FOUR, quiet=True))
    assert on_ranks(cluster_on_this_rank, 2, other.path) == [4, 4]
    shared = arrays(Clusters(other))
    assert all(np.array_equal(whole[name], shared[name]) for name in whole)


def test_clusters_are_named_by_the_words_that_set_them_apart(tmp_path):
    draws = np.random.default_rng(0)
    topics = draws.integers(TOPICS, size=60)
    names = list(WORDS)
    texts = [f"the text of {' '.join(draws.permutation(WORDS[names[topic]].split()))} " for topic in topics]
    tokenizer = train_bpe(texts, 400)
    store = write_store(
        tmp_path / "pool",
        [tokenizer(text * 3)["input_ids"][:24] for text in texts],
        block_size=24,
        vocab_size=len(tokenizer),
        tokenizer=tokenizer,
    )
    clusters = cluster_pool(store, FOUR, quiet=True)
    for code, name in enumerate(clusters.names):
        number, *words = name.split()
        topic = names[np.bincount(topics[clusters.read("assignment") == code]).argmax()]
        assert int(number) == code
        assert set(words) <= set(WORDS[topic].split())
        assert len(words) == 3


def test_texts_without_words_leave_the_numbers():
    typical = np.zeros((11, 8), np.int64)
    assert cluster_names(typical, lambda ids: ["1 2 3"] * len(ids))[0] == "cluster 00"
    assert cluster_names(typical, None)[10] == "cluster 10"


def test_the_command_makes_clusters_and_says_what_it_found(pool, capsys):
    store, topics = pool
    assert main([str(store.path), "--clusters", "4", "--dimensions", "16"]) == 0
    said = capsys.readouterr().out
    assert "4 clusters of 240 blocks" in said
    assert str(np.bincount(topics).max()) in said
    assert json.loads((store.path / "clusters" / "clusters.json").read_text())["settings"]["clusters"] == 4
    assert main([str(store.path), "--dimensions", "16", "--name", "many", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert len(Clusters(store, "many")) <= round((ROWS / 2) ** 0.5)


def test_dimensions_of_vectors_that_have_their_own_are_refused(pool, tmp_path):
    store, _ = pool
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32))
    with pytest.raises(ValueError, match="dimensions=16 has no effect on vectors:"):
        cluster_pool(store, Clustering(2, embed=f"vectors:{tmp_path / 'vectors.npy'}", dimensions=16), quiet=True)
