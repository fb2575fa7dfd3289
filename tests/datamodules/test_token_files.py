"""Token ids that other programs wrote are a pool as they lie there, whatever wrote them."""

import pickle
import struct

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import VOCABULARY
from small_run import TOKENS, SmallLM, rows
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule, TokenFiles
from liveselect.datamodules.opening import open_source
from liveselect.datamodules.overlap import shared_passages
from liveselect.datamodules.pools import integrity, token_files
from liveselect.datamodules.reference import Item
from liveselect.datamodules.rows import rows as rows_module
from liveselect.datamodules.rows.columns import by_role
from liveselect.datamodules.rows.groups import open_pool
from liveselect.datamodules.rows.rows import CollatedRows, DatasetRows, FileRows
from liveselect.grammar import IGNORE_INDEX, SelectionWarning
from liveselect.influence import FirstOrderInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

ROWS, WIDTH = 40, 16
TABLE = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, WIDTH))


def write_megatron(stem, documents, code=8, kind="<u2", pointers=None):
    """The published format of Megatron's IndexedDataset, written by hand."""
    lengths = [len(document) for document in documents]
    size = np.dtype(kind).itemsize
    starts = pointers or (size * (np.cumsum(lengths) - lengths)).tolist()
    stem.with_name(stem.name + ".bin").write_bytes(b"".join(np.asarray(d).astype(kind).tobytes() for d in documents))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    tail = struct.pack(f"<{len(lengths)}i{len(lengths)}q", *lengths, *starts)
    tail += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    stem.with_name(stem.name + ".idx").write_bytes(head + tail)


def write(form, folder):
    """TABLE as one of the formats; returns the arguments of TokenFiles."""
    flat = TABLE.ravel()
    path = folder / "train.bin"
    if form == "nanogpt":
        np.concatenate([flat, flat[:5]]).astype(np.uint16).tofile(path)  # the end fills no block
    elif form == "32 bits":
        flat.astype(np.uint32).tofile(path)
        return {"path": str(path), "dtype": "uint32"}
    elif form == "llm.c":
        head = np.zeros(256, np.int32)
        head[:3] = 20240520, 1, flat.size
        path.write_bytes(head.tobytes() + flat.astype(np.uint16).tobytes())
    elif form.startswith("megatron"):
        write_megatron(folder / "data", np.split(flat, [7, 100, 333]))
        return {"path": str(folder / {"megatron": "data", "megatron bin": "data.bin"}.get(form, "data.idx"))}
    elif form == "datatrove":
        (folder / "shards").mkdir()
        for part in range(2):
            name = folder / "shards" / f"{part:03d}_x.ds"
            TABLE[part * 20 : part * 20 + 20].astype(np.uint32).tofile(name)
            name.with_name(name.name + ".metadata").write_text("gpt2|4\n320\n320 T")
            name.with_name(name.name + ".index").write_bytes(struct.pack("<Q", 320))
        return {"path": str(folder / "shards")}
    elif form == "npy":
        np.save(folder / "train.npy", flat.astype(np.int32))
        return {"path": str(folder / "train.npy")}
    return {"path": str(path)}


FORMS = ["nanogpt", "32 bits", "llm.c", "megatron", "megatron bin", "megatron idx", "datatrove", "npy"]


@pytest.mark.parametrize("form", FORMS)
def test_the_rows_are_the_blocks_that_were_written(form, tmp_path):
    files = TokenFiles(block_size=WIDTH, **write(form, tmp_path))
    found = open_source(files, None)
    assert isinstance(found, FileRows)
    ids = [3, 39, 0, 21, 3]
    assert torch.equal(found.candidates(ids)["input_ids"], torch.from_numpy(TABLE[ids]))
    assert (len(found), found.vocab_size) == (ROWS, TABLE.max() + 1)
    assert torch.equal(pickle.loads(pickle.dumps(files))[39]["input_ids"], torch.from_numpy(TABLE[39]))


def test_one_fingerprint_for_the_same_tokens_and_another_for_a_changed_one(tmp_path):
    TABLE.astype(np.uint16).tofile(tmp_path / "a.bin")
    TABLE.astype(np.uint16).tofile(tmp_path / "b.bin")
    changed = TABLE.copy()
    changed[17, 3] += 1
    changed.astype(np.uint16).tofile(tmp_path / "c.bin")
    one, same, other = (FileRows(TokenFiles(str(tmp_path / f"{x}.bin"), WIDTH)).fingerprint for x in "abc")
    recut = FileRows(TokenFiles(str(tmp_path / "a.bin"), WIDTH // 2)).fingerprint
    assert one == same
    assert len({one, other, recut}) == 3


def test_megatrons_sequences_are_rows_where_no_block_size_is_given(tmp_path):
    documents = [TABLE.ravel()[a:b] for a, b in ((0, 7), (7, 100), (100, 333), (333, 640))]
    write_megatron(tmp_path / "data", documents)
    found = open_source(TokenFiles(str(tmp_path / "data")), None)
    batch = found.candidates([2, 0])
    assert batch["input_ids"][0].tolist() == documents[2].tolist()
    assert batch["input_ids"][1, :7].tolist() == documents[0].tolist()
    assert (batch["labels"][1, 7:] == IGNORE_INDEX).all()


def test_megatrons_own_reader_and_ours_agree(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.int32)
    for row in TABLE:
        builder.add_item(torch.from_numpy(row))
        builder.end_document()
    builder.finalize(str(tmp_path / "own.idx"))
    theirs, ours = indexed.IndexedDataset(str(tmp_path / "own")), TokenFiles(str(tmp_path / "own"))
    assert len(theirs) == len(ours) == ROWS
    assert all(np.array_equal(theirs[i], ours[i]["input_ids"]) for i in range(ROWS))
    assert DatasetRows(theirs).fingerprint == DatasetRows(ours).fingerprint


def test_datatroves_own_reader_and_ours_agree(tmp_path):
    dataset = pytest.importorskip("datatrove.utils.dataset")
    theirs = dataset.DatatroveFolderDataset(write("datatrove", tmp_path)["path"], WIDTH - 1, token_size=4)
    ours = TokenFiles(str(tmp_path / "shards"), WIDTH)
    assert len(theirs) == len(ours)
    assert all(torch.equal(theirs[i]["input_ids"], ours[i]["input_ids"]) for i in range(ROWS))
    assert open_source(theirs, None).fingerprint == DatasetRows(ours).fingerprint


def damaged_megatron(folder):
    write_megatron(folder / "data", [TABLE.ravel()])
    (folder / "data.bin").write_bytes((folder / "data.bin").read_bytes()[:-2])
    return {"path": str(folder / "data")}


def gaps_in_megatron(folder):
    write_megatron(folder / "data", [TABLE[0], TABLE[1]], pointers=[0, 40])
    return {"path": str(folder / "data")}


def wrong_bits(folder):
    TABLE.astype(np.uint32).tofile(folder / "x.bin")
    return {"path": str(folder / "x.bin")}


def odd_size(folder):
    (folder / "x.bin").write_bytes(b"123")
    return {"path": str(folder / "x.bin")}


def negative(folder):
    np.full(64, -3, np.int32).tofile(folder / "x.bin")
    return {"path": str(folder / "x.bin"), "dtype": "int32"}


def no_index(folder):
    (folder / "x.idx").write_bytes(b"something else, and long enough for a header")
    (folder / "x.bin").write_bytes(b"1234")
    return {"path": str(folder / "x.bin")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (damaged_megatron, "copied in part"),
        (gaps_in_megatron, "do not follow each other"),
        (wrong_bits, "dtype='uint32'"),
        (odd_size, "no whole number of ids"),
        (negative, "got -3"),
        (no_index, "does not begin with MMIDIDX"),
        (lambda folder: {"path": str(folder / "none")}, "found none"),
    ],
)
def test_files_that_cannot_be_right_are_refused_by_name(make, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        open_source(TokenFiles(block_size=WIDTH, **make(tmp_path)), None)
    assert str(tmp_path) in str(caught.value)


def test_a_path_of_ids_says_what_to_pass(tmp_path):
    write("nanogpt", tmp_path)
    with pytest.raises(ValueError, match=r"TokenFiles\(.*train.bin', block_size="):
        open_source(str(tmp_path / "train.bin"), None)
    with pytest.raises(ValueError, match="expected block_size"):
        TokenFiles(str(tmp_path / "train.bin"))
    with pytest.raises(TypeError, match="cut one stream of ids"):
        open_source(np.memmap(tmp_path / "train.bin", np.uint16, "r"), None)


def test_passages_that_cross_blocks_are_found(tmp_path):
    stream = np.random.default_rng(1).integers(1, 60_000, 4000)
    stream.astype(np.uint16).tofile(tmp_path / "x.bin")
    found = FileRows(TokenFiles(str(tmp_path / "x.bin"), 50))
    tokens = stream[1020:1100]  # from row 20 into row 21
    (overlap,) = shared_passages(found, [Item(tokens, tokens, 5)])
    assert overlap.record == 5
    assert overlap.candidate in (20, 21)


def test_of_large_files_a_spread_is_read_and_the_rest_is_checked_when_it_is_used(tmp_path, monkeypatch):
    for module in (token_files, integrity):
        monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
        monkeypatch.setattr(module, "BLOCKS", 4)
    table = np.resize(TABLE, (400, WIDTH)).astype(np.uint16)
    table.tofile(tmp_path / "a.bin")
    one = FileRows(TokenFiles(str(tmp_path / "a.bin"), WIDTH))
    table[201, 3] = 9999
    table.tofile(tmp_path / "b.bin")
    other = FileRows(TokenFiles(str(tmp_path / "b.bin"), WIDTH))
    assert one.fingerprint == other.fingerprint
    assert other.vocab_size <= VOCABULARY
    other.known_tokens = VOCABULARY
    other.candidates([200, 202])
    with pytest.raises(ValueError, match=r"row 201 .* token id 9999"):
        other.candidates([200, 201])
    assert 9999 in open_source(TokenFiles(str(tmp_path / "b.bin"), WIDTH), None).candidates([201])["input_ids"]
    table[0, 0] = 7
    table.tofile(tmp_path / "c.bin")
    assert FileRows(TokenFiles(str(tmp_path / "c.bin"), WIDTH)).fingerprint != one.fingerprint


def test_rows_of_a_large_dataset_are_checked_when_they_are_used(monkeypatch):
    monkeypatch.setattr(rows_module, "WHOLE_ROWS", 100)
    data = [{"input_ids": row.tolist()} for row in np.resize(TABLE, (9000, WIDTH))]
    data[4321]["input_ids"][2] = -7
    with pytest.warns(SelectionWarning, match="too many to read before training"):
        found = DatasetRows(data)
    found.candidates([4320, 4322])
    with pytest.raises(ValueError, match="row 4321 of the pool holds the token id -7"):
        found.candidates([4321])


def test_each_file_is_a_group_where_that_is_asked_for(tmp_path):
    found = open_source(TokenFiles(**write("datatrove", tmp_path), block_size=WIDTH), None)
    pool = open_pool(found, "file")
    assert pool.group_names == ("000_x", "001_x")
    assert pool.groups.tolist() == [0] * 20 + [1] * 20


# ---- rows of other forms -------------------------------------------------------------------------------------------


class Given(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return self.make(torch.from_numpy(TABLE[i]))


PLAIN = DatasetRows([{"input_ids": row.tolist()} for row in TABLE])


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        (Given(lambda row: row), None),
        (Given(lambda row: row.numpy()), None),
        (Given(lambda row: row.tolist()), None),
        (Given(lambda row: (row, row)), None),
        (Given(lambda row: {"tokens": row, "length": WIDTH}), {"input_ids": "tokens"}),
        (Given(lambda row: ("a", row)), {"input_ids": 1}),
        (TensorDataset(torch.from_numpy(TABLE)), None),
        (torch.from_numpy(TABLE), None),
        (TABLE.astype(np.uint16), None),
    ],
)
def test_every_form_of_the_same_rows_is_the_same_pool(source, columns):
    found = open_source(source, None, columns)
    assert found.fingerprint == PLAIN.fingerprint
    for name, tensor in PLAIN.candidates([5, 2]).items():
        assert torch.equal(found.candidates([5, 2])[name], tensor)


@pytest.mark.parametrize("columns", [None, {"input_ids": 0, "targets": 1}])
@pytest.mark.parametrize("ignored", [None, -1, -100])
def test_pairs_of_tokens_and_next_tokens_take_loss_at_the_same_tokens(columns, ignored):
    """Label t + 1 is target t: a loss that shifts labels compares what stands at t with the target of t."""

    def pair(row):
        x, y = row[:-1].clone(), row[1:].clone()
        if ignored is not None:
            y[:4] = ignored
        return x, y

    for found in (open_source(Given(pair), None, columns), CollatedRows(Given(pair), pairs_of, columns)):
        batch = found.candidates([7])
        x, y = pair(torch.from_numpy(TABLE[7]))
        assert batch["input_ids"][0].tolist() == x.tolist()
        expected = [token if token >= 0 else IGNORE_INDEX for token in y[:-1].tolist()]
        assert batch["labels"][0, 1:].tolist() == expected


def pairs_of(batch):
    return [torch.stack([pair[0] for pair in batch]), torch.stack([pair[1] for pair in batch])]


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ((torch.arange(1, 9), torch.full((8,), 3)), None, "columns="),
        ((torch.arange(1, 9), torch.tensor(1)), None, "columns="),
        ((torch.arange(8),) * 3, None, "tuple of 3"),
        ("some text", None, "liveselect prepare"),
        ({"tokens": [1, 2]}, {"input_ids": "ids"}, "columns names 'ids'"),
        ((torch.arange(8), 1), {"input_ids": 2}, "columns names 2"),
    ],
)
def test_a_form_that_is_not_understood_says_what_to_pass(row, columns, words):
    with pytest.raises((TypeError, ValueError), match=words):
        by_role(row, columns, "row 0 of the pool")


@pytest.mark.parametrize(
    "columns", [{"labels": 1}, {"input_ids": 0, "y": 1}, {"input_ids": 0, "labels": 1, "targets": 2}]
)
def test_columns_that_make_no_sense_are_refused_at_once(columns):
    with pytest.raises(ValueError, match="columns of the pool's rows"):
        SelectionDataModule(TABLE, [{"input_ids": [1, 2]}], 4, columns=columns)


class Streaming(IterableDataset):
    """Iterates in another order than it has, as streams that shuffle do."""

    def __iter__(self):
        return iter(torch.from_numpy(TABLE[::-1].copy()))

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        assert isinstance(i, int)
        return torch.from_numpy(TABLE[i])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_stream_that_can_be_asked_by_position_is_a_pool_and_another_is_not():
    assert open_source(Streaming(), None).fingerprint == PLAIN.fingerprint
    with pytest.raises(TypeError, match="a stream does not allow"):
        open_source(Endless(), None)


def test_parquet_files_and_saved_datasets_are_pools_by_their_path(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = [["web", "books"][i % 2] for i in range(ROWS)]
    columns = {"tokens": TABLE.tolist(), "text": ["x"] * ROWS, "source": names}
    for part in range(2):
        half = {name: values[part * 20 : part * 20 + 20] for name, values in columns.items()}
        pq.write_table(pa.table(half), tmp_path / f"part-{part}.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    by_name = {"input_ids": "tokens"}
    for path in ("part-*.parquet", "saved"):
        found = open_source(str(tmp_path / path), None, by_name, "source")
        assert found.fingerprint == PLAIN.fingerprint
        assert open_pool(found, "source").group_names == ("books", "web")
    with pytest.raises(ValueError, match=r"the columns are tokens, text, source.*liveselect prepare"):
        open_source(str(tmp_path / "part-0.parquet"), None)


# ---- training ------------------------------------------------------------------------------------------------------


class OfPairs(SmallLM):
    """Takes batches as nanoGPT's loop does: tokens, and next tokens."""

    def training_step(self, batch, batch_index):
        x, y = batch
        logits = self.model(input_ids=x).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Pairs(pl.LightningDataModule):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.table[:, :-1], self.table[:, 1:]), batch_size=4, shuffle=True)


class Bare(Pairs):
    def train_dataloader(self):
        return DataLoader(Streaming(), batch_size=4)


def trained(module, data, folder, selection=None):
    selection = selection or DataSelection(UniformSelector(), every_n_steps=2, warmup_rounds=0)
    trainer = pl.Trainer(
        max_steps=6, callbacks=[selection], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, selection


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


REFERENCE = rows(6, seed=50)


def test_a_module_of_pairs_trains_on_its_own_batches_with_influence(tmp_path):
    table = torch.stack([row["input_ids"] for row in rows(40, seed=1)])
    first = DataSelection(
        RegressionSelector(HashedRidgeRegressor(), probes=8, min_spearman=None),
        FirstOrderInfluence(),
        every_n_steps=2,
        warmup_rounds=0,
    )
    data = SelectionDataModule.wrap(Pairs(table), reference=REFERENCE)
    trainer, selection = trained(OfPairs(), data, tmp_path, first)
    assert trainer.global_step == 6
    assert [len(record.measured or []) if isinstance(record.measured, list) else record.measured
            for record in selection.run.ledger.rounds] == [8, 8, 8]  # fmt: skip


def test_a_nanogpt_file_trains_with_workers(tmp_path):
    stream = torch.cat([row["input_ids"] for row in rows(60, seed=1)])
    stream.numpy().astype(np.uint16).tofile(tmp_path / "train.bin")
    data = SelectionDataModule(
        TokenFiles(str(tmp_path / "train.bin"), block_size=TOKENS), REFERENCE, batch_size=4, num_workers=1
    )
    trainer, selection = trained(SmallLM(), data, tmp_path)
    assert trainer.global_step == 6
    assert selection.run.pool.size == 60


def test_a_loader_of_a_stream_that_can_be_asked_by_position_wraps_without_a_warning(tmp_path, recwarn):
    class OfBlocks(SmallLM):
        def training_step(self, batch, batch_index):
            return self.model(input_ids=batch[:, :TOKENS], labels=batch[:, :TOKENS]).loss

    data = SelectionDataModule.wrap(Bare(None), reference=REFERENCE)
    assert trained(OfBlocks(), data, tmp_path)[0].global_step == 6
    assert not [w for w in recwarn if w.category is SelectionWarning]
