"""What the overlap check finds is what a search token by token finds."""

import numpy as np
import pytest
import torch

from liveselect.datamodules import overlap
from liveselect.datamodules.batching import Item
from liveselect.datamodules.overlap import PASSAGE, pool_tokens, shared_documents, shared_passages, shared_rows
from liveselect.datamodules.pools.tokens import write_store
from liveselect.datamodules.rows.rows import DatasetRows, StoreRows


def item(tokens, record):
    return Item(np.asarray(tokens, dtype=np.int64), np.asarray(tokens, dtype=np.int64), record)


def by_brute_force(stream, items, length):
    """How many passages of a record occur in the stream, if any does; one is in its middle, others beside that."""
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(stream, length).tolist()}
    found = {}
    for one in items:
        middle = (len(one) - length) // 2
        starts = [i for i in range(len(one) - length + 1) if (i - middle) % length == 0]
        held = sum(tuple(one.input_ids[i : i + length].tolist()) in windows for i in starts)
        if held:
            found[one.record] = (held, len(starts))
    return found


@pytest.mark.parametrize("block", [4, 16, 40, 64])
@pytest.mark.parametrize("seed", range(4))
def test_passages_are_found_wherever_they_stand(tmp_path, monkeypatch, block, seed):
    monkeypatch.setattr(overlap, "PIECE_TOKENS", 100)  # many pieces, so that passages lie across their borders
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 40, (2000 // block, block))
    stream = blocks.reshape(-1)
    items = []
    for record in range(60):
        size = int(rng.integers(2, 200))
        if record % 2:  # out of the stream
            start = int(rng.integers(0, len(stream) - min(size, len(stream) - 1)))
            items.append(item(stream[start : start + size], record))
        else:
            items.append(item(rng.integers(0, 40, size), record))
    rows = StoreRows(write_store(tmp_path / "pool", blocks, block_size=block, vocab_size=50))
    found = shared_passages(rows, items)
    assert {one.record: (one.found, one.looked_for) for one in found} == by_brute_force(stream, items, PASSAGE)
    for one in found:
        around = blocks[one.candidate : one.candidate + 2 + PASSAGE // block].reshape(-1)
        assert any((around[i : i + PASSAGE] == one.tokens).all() for i in range(len(around) - PASSAGE + 1))


def test_whatever_is_shared_is_found_if_it_is_twice_as_long_as_a_passage(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 40, (10, 64))
    rows = StoreRows(write_store(tmp_path / "pool", blocks, block_size=64, vocab_size=90))
    own = np.random.default_rng(1).integers(40, 90, 300)
    items = []
    for start in range(300 - 2 * PASSAGE):
        text = own.copy()
        text[start : start + 2 * PASSAGE - 1] = blocks.reshape(-1)[100 : 100 + 2 * PASSAGE - 1]
        items.append(item(text, start))
    assert [one.record for one in shared_passages(rows, items)] == list(range(len(items)))


def test_rows_of_dashes_are_no_passage(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 40, (10, 64))
    blocks[4] = np.tile([5, 5, 5, 6], 16)
    rows = StoreRows(write_store(tmp_path / "pool", blocks, block_size=64, vocab_size=50))
    assert not shared_passages(rows, [item(blocks[4], 0)])


def test_a_passage_that_stands_everywhere_costs_no_more_than_one_that_stands_once(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "PIECE_TOKENS", 100)
    blocks = np.tile(np.random.default_rng(0).permutation(40)[:32], (200, 2))
    rows = StoreRows(write_store(tmp_path / "pool", blocks, block_size=64, vocab_size=50))
    looked = []
    monkeypatch.setattr(overlap, "_matches", lambda hashes, wanted: looked.append(len(wanted)) or real(hashes, wanted))
    assert shared_passages(rows, [item(blocks[0], 0)])
    assert looked[0] == 1
    assert not any(looked[1:])


real = overlap._matches


def test_a_passage_that_differs_in_one_token_is_not_found(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 40, (10, 64))
    rows = StoreRows(write_store(tmp_path / "pool", blocks, block_size=64, vocab_size=50))
    near = blocks[3].copy()
    assert shared_passages(rows, [item(near, 0)])
    near[32] = 45
    assert not shared_passages(rows, [item(near, 0)])


@pytest.mark.parametrize("length", [5, 31, 32, 50])
@pytest.mark.parametrize("seed", range(3))
def test_in_a_dataset_passages_stand_within_one_row(monkeypatch, length, seed):
    monkeypatch.setattr(overlap, "PIECE_TOKENS", 100)
    table = np.random.default_rng(seed).integers(0, 40, (40, length))
    passage = min(PASSAGE, length)
    first = (length - passage) // 2
    inside = [item(row[: first + passage + first], i) for i, row in enumerate(table)]
    across = [item(table.reshape(-1)[i * length + length // 2 + 1 :][:passage], 100 + i) for i in range(39)]
    found = shared_passages(DatasetRows([{"input_ids": row} for row in table]), inside + across)
    # a piece across two rows is found only where it fits into the second
    assert {one.record for one in found} == {one.record for one in inside}
    assert all(one.candidate == one.record for one in found)


def test_short_rows_are_compared_as_a_whole():
    table = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [4, 5, 6]]
    rows = DatasetRows([{"input_ids": row} for row in table])
    examples = [item([4, 5], 0), item([1, 2], 1), item([6, 7, 8, 9], 2), item([4, 5, 6, 0], 3)]
    assert [(one.record, one.candidate) for one in shared_rows(rows, examples)] == [(0, 1), (2, 2)]


def test_passages_are_found_in_a_dataset_too():
    rows = [{"input_ids": torch.randint(0, 40, (48,), generator=torch.Generator().manual_seed(i))} for i in range(9)]
    (found,) = shared_passages(DatasetRows(rows), [item(torch.arange(48), 0), item(rows[7]["input_ids"], 1)])
    assert (found.record, found.candidate) == (1, 7)


def test_documents_are_compared_by_their_hashes():
    pool, reference = np.array([5, 7, 9], np.uint64), np.array([1, 7, 2, 5], np.uint64)
    assert [one.record for one in shared_documents(pool, reference)] == [1, 3]


def test_the_size_of_a_pool_is_exact_for_rows_of_one_length():
    assert pool_tokens(DatasetRows([{"input_ids": [1, 2, 3]}] * 10)) == 30
