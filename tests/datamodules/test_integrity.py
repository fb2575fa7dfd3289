"""A pool whose files do not hold what was written is refused before it is used, with the name of the file."""

import json
import os

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from liveselect.callbacks import PDS, DataSelection
from liveselect.cli import main
from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.clusters.cluster import Clustering, cluster_pool
from liveselect.datamodules.pools import integrity
from liveselect.datamodules.pools.pool_files import TOKENS, token_dtype
from liveselect.datamodules.pools.tokens import TokenStore, write_store
from liveselect.datamodules.reference import ReferenceSet, load_reference
from liveselect.datamodules.rows.groups import Clusters, open_pool
from liveselect.datamodules.rows.rows import CollatedRows, StoreRows
from liveselect.scores import write_scores
from liveselect.selectors import UniformSelector

torch.set_num_threads(1)

ROWS, T, VOCAB = 96, 16, 60
REFERENCE = [{"input_ids": [1, 2, 3, 4]}]


def make(path, seed=0, last=None):
    table = np.random.default_rng(seed).integers(5, VOCAB, (ROWS, T))
    if last is not None:
        table[-1, -1] = last
    store = write_store(path, table, block_size=T, vocab_size=VOCAB, sources=["a", "b"] * (ROWS // 2))
    cluster_pool(store, Clustering(clusters=4, dimensions=8), quiet=True)
    return store


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "pool")


def flip(path, at=-1, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def served(path, groups="clusters"):
    data = SelectionDataModule(path, REFERENCE, batch_size=4, groups=groups)
    data.setup("fit")
    return data


def replaced(name, old, new):
    def change(pool):
        text = (pool / name).read_text()
        assert old in text
        (pool / name).write_text(text.replace(old, new))

    return change


def saved_as(dtype):
    def change(pool):
        file = pool / "clusters/assignment.npy"
        np.save(file, np.load(file).astype(dtype))

    return change


DAMAGES = {
    "tokens, one bit": (TOKENS, lambda pool: flip(pool / TOKENS)),
    "tokens, high bit": (TOKENS, lambda pool: flip(pool / TOKENS, bit=7)),
    "tokens, short": (TOKENS, lambda pool: os.truncate(pool / TOKENS, 2 * ROWS * T - 1)),
    "tokens, gone": (TOKENS, lambda pool: (pool / TOKENS).unlink()),
    "documents, one bit": ("documents.parquet", lambda pool: flip(pool / "documents.parquet", 200)),
    "documents, cut": ("documents.parquet", lambda pool: os.truncate(pool / "documents.parquet", 500)),
    "manifest, dtype": ("pool.json", replaced("pool.json", '"uint16"', '"uint32"')),
    "manifest, rows": ("pool.json", replaced("pool.json", f'"rows": {ROWS}', f'"rows": {ROWS - 1}')),
    "manifest, a name": ("pool.json", replaced("pool.json", '"fingerprint"', '"fingerprunt"')),
    "manifest, a size": ("pool.json", replaced("pool.json", f'"bytes": {2 * ROWS * T}', '"bytes": null')),
    "manifest, cut": ("pool.json", lambda pool: os.truncate(pool / "pool.json", 300)),
    "assignment, one bit": ("assignment.npy", lambda pool: flip(pool / "clusters/assignment.npy", 128)),
    "assignment, cut": ("assignment.npy", lambda pool: os.truncate(pool / "clusters/assignment.npy", 200)),
    "assignment, its header": ("assignment.npy", lambda pool: os.truncate(pool / "clusters/assignment.npy", 20)),
    "assignment, gone": ("assignment.npy", lambda pool: (pool / "clusters/assignment.npy").unlink()),
    "assignment, dtype": ("assignment.npy", saved_as(np.float32)),
    "offsets, one bit": ("offsets.npy", lambda pool: flip(pool / "clusters/offsets.npy")),
    "typical, cut": ("typical.npy", lambda pool: os.truncate(pool / "clusters/typical.npy", 150)),
    "near, cut": ("near.npz", lambda pool: os.truncate(pool / "clusters/near.npz", 90)),
    "clusters, cut": ("clusters.json", lambda pool: os.truncate(pool / "clusters/clusters.json", 300)),
    "clusters, a name": ("clusters.json", replaced("clusters/clusters.json", '"sizes"', '"sises"')),
    "clusters, a list": ("clusters.json", lambda pool: (pool / "clusters/clusters.json").write_text("[]")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused_before_training_with_the_name_of_the_file(store, case):
    name, damage = DAMAGES[case]
    assert served(store.path).pool.group_names
    damage(store.path)
    with pytest.raises(ValueError, match=rf"{name}.*again"):
        served(store.path)


OLD = [case for case in DAMAGES if DAMAGES[case][0] in ("assignment.npy", "typical.npy", "near.npz", "clusters.json")]


@pytest.mark.parametrize("case", OLD)
def test_clusters_without_stored_hashes_are_opened_and_damage_to_them_is_named(store, case):
    manifest = store.path / "clusters/clusters.json"
    content = json.loads(manifest.read_text())
    del content["files"]
    manifest.write_text(json.dumps(content, indent=1))
    assert served(store.path).pool.groups_fingerprint == served(store.path).pool.groups_fingerprint
    name, damage = DAMAGES[case]
    damage(store.path)
    with pytest.raises(ValueError, match=name):
        served(store.path)


def collate(rows):
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


@pytest.mark.parametrize(
    "use",
    [
        lambda path: StoreRows(TokenStore(path)),
        lambda path: CollatedRows(TokenStore(path), collate),
        lambda path: load_reference(ReferenceSet(str(path))),
        lambda path: cluster_pool(path, Clustering(clusters=3), name="others", quiet=True),
    ],
    ids=["pool", "wrapped or collated", "reference", "cluster"],
)
def test_every_use_of_a_pool_reads_its_content_first(store, use):
    use(store.path)
    flip(store.path / TOKENS)
    with pytest.raises(ValueError, match=r"tokens\.bin is not what the manifest says"):
        use(store.path)


def test_scores_of_a_column_are_not_made_of_damaged_documents(tmp_path, capsys):
    table = np.random.default_rng(0).integers(5, VOCAB, (ROWS, T))
    store = write_store(
        tmp_path / "pool", table, block_size=T, vocab_size=VOCAB, metadata=[{"edu": float(i)} for i in range(ROWS)]
    )
    command = ["score", "--pool", str(store.path), "--column", "edu"]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    flip(store.path / "documents.parquet", 200)
    assert main([*command, "--out", str(tmp_path / "others")]) == 1
    assert "documents.parquet is not what the manifest says" in capsys.readouterr().err


def test_vectors_are_checked_where_another_clustering_uses_them(store):
    vectors = store.path / "clusters/vectors.npy"
    again = Clustering(clusters=3, embed=f"vectors:{vectors}")
    assert len(cluster_pool(store, again, name="others", quiet=True)) == 3
    flip(vectors)
    with pytest.raises(ValueError, match=r"vectors\.npy is not what the manifest says"):
        cluster_pool(store, again, name="more", quiet=True)


def test_an_id_beyond_the_vocabulary_is_named_with_its_file_and_row(store):
    opened = TokenStore(store.path)  # the content is not read
    tokens = np.memmap(store.path / TOKENS, "<u2", "r+", shape=(ROWS, T))
    tokens[7, 3] = VOCAB + 1000
    tokens.flush()
    assert opened.read([6, 8]).max() < VOCAB
    with pytest.raises(ValueError, match=rf"tokens\.bin, row 7: token id {VOCAB + 1000} is beyond .* of {VOCAB}"):
        opened.read([6, 7, 8])


# ---- large files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(integrity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 64)
    monkeypatch.setattr(integrity, "BLOCKS", 8)


@pytest.mark.usefixtures("small_limits")
def test_a_large_file_is_compared_by_blocks_spread_over_it(tmp_path):
    store = make(tmp_path / "pool")
    entry = store.manifest["files"][TOKENS]
    size = 2 * ROWS * T
    assert len(entry["spread"]) == 8
    store.verify()
    starts = np.linspace(0, size - 64, 8).astype(int)
    for at in (0, 63, int(starts[3]), size - 1):
        flip(store.path / TOKENS, at)
        with pytest.raises(ValueError, match=r"tokens\.bin is not what the manifest says, in its bytes \d+ to \d+"):
            TokenStore(store.path, verify=True)
        flip(store.path / TOKENS, at)
    flip(store.path / TOKENS, 200)  # between the blocks: what is not read is not promised
    assert not any(start <= 200 < start + 64 for start in starts)
    store.verify()


def test_a_large_file_of_an_older_pool_is_compared_in_full(tmp_path, monkeypatch):
    store = make(tmp_path / "pool")
    assert "spread" not in store.manifest["files"][TOKENS]
    monkeypatch.setattr(integrity, "WHOLE_BYTES", 1000)
    store.verify()
    flip(store.path / TOKENS, 200)
    with pytest.raises(ValueError, match=r"tokens\.bin is not what the manifest says"):
        store.verify()


def test_a_line_is_said_before_much_is_read_and_none_otherwise(store, monkeypatch, capsys):
    store.verify()
    assert not capsys.readouterr().err
    monkeypatch.setattr(integrity, "SLOW_BYTES", 1000)
    store.verify()
    assert "reading 0.0 GB of" in capsys.readouterr().err


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"])[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, pool, selection, groups, ckpt_path=None):
    keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=2 if ckpt_path is None else 4, callbacks=[selection, keep], **quiet)
    trainer.fit(Net(), datamodule=SelectionDataModule(pool, REFERENCE, 4, groups=groups), ckpt_path=ckpt_path)
    return folder / "kept.ckpt"


def other_names(pool):
    manifest = pool / "clusters/clusters.json"
    content = json.loads(manifest.read_text())
    content["names"][0] = "another"
    manifest.write_text(json.dumps(content))


def other_members(pool):
    (pool / "clusters").rename(pool / "before")
    cluster_pool(pool, Clustering(clusters=4, dimensions=8, seed=5), quiet=True)
    assert not np.array_equal(np.load(pool / "clusters/assignment.npy"), np.load(pool / "before/assignment.npy"))


@pytest.mark.parametrize("change", [other_names, other_members])
def test_a_checkpoint_is_refused_for_other_clusters_and_taken_for_the_same(tmp_path, store, change):
    settings = {"every_n_steps": 2, "dirpath": tmp_path / "records"}
    kept = fit(tmp_path, store.path, DataSelection(UniformSelector(), **settings), "clusters")
    fit(tmp_path / "same", store.path, DataSelection(UniformSelector(), **settings), "clusters", kept)
    change(store.path)
    with pytest.raises(ValueError, match=r"the checkpoint was made with the clusters .*Put the clusters back"):
        fit(tmp_path / "other", store.path, DataSelection(UniformSelector(), **settings), "clusters", kept)


def test_a_checkpoint_is_refused_for_a_pool_in_which_one_token_is_another(tmp_path):
    one, other = make(tmp_path / "one", last=5), make(tmp_path / "other", last=6)
    settings = {"every_n_steps": 2, "dirpath": tmp_path / "records"}
    kept = fit(tmp_path, one.path, DataSelection(UniformSelector(), **settings), None)
    with pytest.raises(
        ValueError, match=f"pool '{one.fingerprint}' but this run was given pool\\s+'{other.fingerprint}'"
    ):
        fit(tmp_path, other.path, DataSelection(UniformSelector(), **settings), None, kept)


def test_scores_belong_to_a_pool_whatever_its_groups_are(tmp_path, store):
    rows = StoreRows(store)
    sources, clusters = open_pool(rows, None), open_pool(rows, "clusters")
    assert sources.fingerprint == clusters.fingerprint == store.fingerprint
    assert sources.identity != clusters.identity
    write_scores(tmp_path / "scores", torch.arange(ROWS).float(), sources.fingerprint, {})
    fit(tmp_path, store.path, PDS(tmp_path / "scores", every_n_steps=2, dirpath=tmp_path / "records"), "clusters")


def test_the_type_on_disk_follows_from_the_vocabulary(store):
    assert store.manifest["dtype"] == token_dtype(VOCAB).name == "uint16"
    assert Clusters(store).read("assignment").dtype == np.int32
