"""The token store is compared with the documents it was made from, by brute force."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from liveselect.datamodules.pools.pool_files import hash_tokens
from liveselect.datamodules.pools.tokens import TokenStore, write_store

EOS, BLOCK, VOCAB = 0, 8, 50


def random_documents(seed, count=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, size=rng.integers(1, 30)).tolist() for _ in range(count)]


def joined(documents):
    """The stream, and for each of its tokens the document it belongs to; separators belong to the one before."""
    stream, owner = [], []
    for index, document in enumerate(documents):
        stream += [*document, EOS]
        owner += [index] * (len(document) + 1)
    return stream, owner


@pytest.fixture
def documents():
    return random_documents(seed=3)


@pytest.fixture
def store(tmp_path, documents):
    sources = ["news" if i % 3 else "code" for i in range(len(documents))]
    metadata = [{"url": f"https://x/{i}", "rank": i} for i in range(len(documents))]
    return write_store(
        tmp_path / "pool",
        documents,
        block_size=BLOCK,
        vocab_size=VOCAB,
        eos_id=EOS,
        sources=sources,
        metadata=metadata,
        ids=[f"doc-{i}" for i in range(len(documents))],
    )


def test_blocks_are_the_joined_documents_cut_at_every_block(store, documents):
    stream, _ = joined(documents)
    rows = len(stream) // BLOCK
    assert len(store) == store.rows == rows
    expected = torch.tensor(stream[: rows * BLOCK]).view(rows, BLOCK)
    assert torch.equal(store.read(torch.arange(rows)), expected)
    shuffled = [5, 0, 5, rows - 1]
    assert torch.equal(store.read(shuffled), expected[shuffled])


def test_ready_blocks_are_kept_as_they_are(tmp_path):
    blocks = np.arange(60).reshape(5, 12)
    store = write_store(tmp_path / "pool", blocks, block_size=12, vocab_size=60)
    assert np.array_equal(store.read(range(5)).numpy(), blocks)
    assert store.group_names == ("pool",)
    assert store.eos_id is None


def test_items_are_what_a_data_loader_asks_for(store):
    loader = torch.utils.data.DataLoader(store, batch_size=4, shuffle=False)
    batch = next(iter(loader))
    assert torch.equal(batch["id"], torch.arange(4))
    assert torch.equal(batch["input_ids"], store.read(range(4)))
    assert store[2]["id"].shape == ()
    assert torch.equal(store[2]["input_ids"], store.read([2])[0])


def test_every_token_is_traced_to_its_document_and_back(store, documents):
    for row in range(store.rows):
        block = store.read([row])[0].tolist()
        covered = [False] * BLOCK
        for found in store.documents_of(row):
            index = int(found["id"].removeprefix("doc-"))
            length = found["end"] - found["start"]
            assert length > 0
            assert block[found["start"] : found["end"]] == documents[index][found["offset"] : found["offset"] + length]
            assert found["metadata"] == {"url": f"https://x/{index}", "rank": index}
            assert row in store.rows_of(found["id"])
            covered[found["start"] : found["end"]] = [True] * length
        assert all(seen or token == EOS for seen, token in zip(covered, block, strict=True))


def test_the_rows_of_a_document_are_the_rows_that_name_it(store, documents):
    named = {}
    for row in range(store.rows):
        for found in store.documents_of(row):
            named.setdefault(found["id"], []).append(row)
    for document_id, rows in named.items():
        assert list(store.rows_of(document_id)) == rows
    with pytest.raises(KeyError, match="found 0"):
        store.rows_of("nobody")


@pytest.mark.parametrize("seed", range(5))
def test_the_group_of_a_block_is_the_source_of_most_of_its_tokens(tmp_path, seed):
    documents = random_documents(seed, count=60)
    names = np.random.default_rng(seed).choice(["a", "b", "c"], size=60).tolist()
    store = write_store(tmp_path / "pool", documents, block_size=BLOCK, vocab_size=VOCAB, eos_id=EOS, sources=names)
    _, owner = joined(documents)
    order = list(dict.fromkeys(names))
    assert store.group_names == tuple(order)
    for row in range(store.rows):
        counts = Counter(order.index(names[i]) for i in owner[row * BLOCK : (row + 1) * BLOCK])
        best = min(code for code, count in counts.items() if count == max(counts.values()))
        assert int(store.groups[row]) == best


def test_document_hashes_are_those_of_the_ids_alone(store, documents):
    assert store.document_hashes.dtype == np.uint64
    kept = len(store.document_hashes)
    assert store.document_hashes.tolist() == [hash_tokens(d) for d in documents[:kept]]
    assert hash_tokens(np.array(documents[0], dtype=np.uint16)) == hash_tokens(torch.tensor(documents[0]))
    assert store.document_tokens.tolist() == [len(d) for d in documents[:kept]]


def test_a_pickled_store_is_small_and_reads_the_same(store):
    store.read([0])
    assert store.groups is not None
    payload = pickle.dumps(store)
    assert len(payload) < 4000
    again = pickle.loads(payload)
    assert torch.equal(again.read(range(store.rows)), store.read(range(store.rows)))


def test_the_fingerprint_names_the_content_and_not_the_place(tmp_path, documents):
    make = {"block_size": BLOCK, "vocab_size": VOCAB, "eos_id": EOS}
    one = write_store(tmp_path / "one", documents, **make)
    two = write_store(tmp_path / "two", documents, **make)
    assert one.fingerprint == two.fingerprint
    documents[0] = [*documents[0][:-1], documents[0][-1] % (VOCAB - 1) + 1]
    others = [
        write_store(tmp_path / "three", documents, **make),
        write_store(tmp_path / "four", documents, **make | {"block_size": BLOCK - 1}),
        write_store(tmp_path / "five", documents, **make | {"vocab_size": VOCAB + 1}),
        write_store(tmp_path / "six", documents, sources=["web"] * len(documents), **make),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path):
    store = write_store(tmp_path / "pool", [[70000, 1, 2, 3]], block_size=2, vocab_size=70001)
    assert store.read([0]).tolist() == [[70000, 1]]
    with pytest.raises(ValueError, match="below vocab_size=70000, got 70000"):
        write_store(tmp_path / "small", [[70000, 1, 2, 3]], block_size=2, vocab_size=70000)
    assert not (tmp_path / "small").exists()


def test_a_folder_that_does_not_fit_its_manifest_is_refused(store):
    tokens = store.path / "tokens.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"has {len(content) - 2} bytes where the manifest says {len(content)}"):
        TokenStore(store.path)
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    TokenStore(store.path)
    with pytest.raises(ValueError, match=r"content of .*tokens\.bin is not what the manifest says"):
        TokenStore(store.path, verify=True)
    tokens.unlink()
    with pytest.raises(ValueError, match=r"lacks its file tokens\.bin"):
        TokenStore(store.path)


def test_an_edited_manifest_is_refused(store):
    path = store.path / "pool.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"eos_id": 7}))
    with pytest.raises(ValueError, match="was changed after the pool was made"):
        TokenStore(store.path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not the manifest of a pool"):
        TokenStore(store.path)
    path.write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="version 1: prepare the pool again"):
        TokenStore(store.path)


def test_an_unfinished_pool_is_not_opened(tmp_path):
    (tmp_path / "pool.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="is unfinished: run the same"):
        TokenStore(tmp_path / "pool")


def test_rows_outside_the_pool_are_refused(store):
    for ids in ([-1], [store.rows], [0, store.rows + 5]):
        with pytest.raises(IndexError, match=f"0..{store.rows - 1}"):
            store.read(ids)
    with pytest.raises(IndexError, match="expected a row id"):
        store.documents_of(store.rows)


def test_documents_shorter_than_a_block_altogether_are_refused_and_nothing_stays(tmp_path):
    with pytest.raises(ValueError, match="at least one block of 100 tokens, got 4 tokens in all"):
        write_store(tmp_path / "pool", [[1, 2, 3]], block_size=100, vocab_size=VOCAB, eos_id=EOS)
    assert list(tmp_path.iterdir()) == []
