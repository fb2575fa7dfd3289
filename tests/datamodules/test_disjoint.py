"""Reference records that stand in the pool are all named, with the rule that found them, and refused or dropped."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from liveselect.datamodules import ReferenceSet, SelectionDataModule, overlap
from liveselect.datamodules.pools.tokens import write_store
from liveselect.grammar import IGNORE_INDEX, SelectionWarning

torch.set_num_threads(1)

ROWS, WIDTH = 60, 48
TABLE = np.random.default_rng(0).integers(1, 50, (ROWS, WIDTH))
OTHER = np.random.default_rng(1).integers(50, 90, (40, WIDTH))  # no token in common


def dataset():
    return [{"input_ids": row} for row in TABLE]


def store(folder):
    return write_store(folder / "pool", TABLE, block_size=WIDTH, vocab_size=100)


def reference_with(*shared):
    """Twelve records of their own, and after them the given ones."""
    return [{"input_ids": row} for row in [*OTHER[:12], *shared]]


def opened(pool, reference, **settings):
    data = SelectionDataModule(pool, reference, batch_size=4, **settings)
    data.setup("fit")
    return data


def in_part(row):
    """A record of its own around a passage of the pool."""
    return np.concatenate([OTHER[20][:6], TABLE[row][5:41], OTHER[21][:6]])


def test_every_record_is_named_with_what_it_shares(tmp_path):
    with pytest.raises(ValueError, match="share text with the pool") as caught:
        opened(store(tmp_path), reference_with(TABLE[7], in_part(30)))
    message = str(caught.value)
    assert message.startswith(
        "2 of 14 reference records share text with the pool (looked for: the whole record is one "
    )
    assert "32 tokens in a row of an example are in the pool)" in message
    assert "record 12 is one of the pool's documents; record 13 shares '" in message
    assert re.search(r"record 13 shares '.*\.\.\.' with candidate 30\.", message)
    assert "overlap='drop' does it for you" in message
    assert "overlap='allow'" in message


def test_twenty_records_are_named_and_the_others_counted():
    with pytest.raises(ValueError, match=r"27 of 39 reference records .*; and 7 more") as caught:
        opened(dataset(), reference_with(*TABLE[:27]))
    assert re.findall(r"record (\d+) shares", str(caught.value)) == [str(i) for i in range(12, 32)]


@pytest.mark.parametrize("make", [lambda folder: dataset(), store], ids=["dataset", "prepared"])
def test_dropped_records_are_listed_and_all_others_stay(tmp_path, make):
    pool = make(tmp_path)
    with pytest.warns(
        SelectionWarning,
        match=r"2 of 14 reference records .* are left out, 12 remain. Left out: 12, 13. Record 12 ",
    ):
        data = opened(pool, reference_with(TABLE[7], in_part(30)), overlap="drop")
    kept = torch.cat([batch["input_ids"] for batch in data.reference()])
    assert sorted(kept.tolist()) == sorted(OTHER[:12].tolist())
    assert torch.equal(kept, torch.cat([batch["input_ids"] for batch in data._validation]))


def test_validation_alone_sees_what_it_sees_in_a_fit():
    data = SelectionDataModule(dataset(), reference_with(TABLE[7]), batch_size=4, overlap="drop")
    with pytest.warns(SelectionWarning, match="are left out, 12 remain"):
        data.setup("validate")
    assert sum(len(batch["id"]) for batch in data.val_dataloader()) == 12


def test_a_record_of_several_pieces_is_dropped_as_a_whole():
    long = np.concatenate([OTHER[30], TABLE[7], OTHER[31]])
    with pytest.warns(SelectionWarning, match="1 of 13 reference records"):
        data = opened(dataset(), ReferenceSet(reference_with(long), max_length=WIDTH), overlap="drop")
    assert sum(len(batch["id"]) for batch in data.reference()) == 12


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"2 of 2 .* Without them the reference set is empty"):
        opened(dataset(), [{"input_ids": row} for row in TABLE[:2]], overlap="drop")


def test_what_is_allowed_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(overlap, "shared_passages", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SelectionWarning)
        data = opened(dataset(), reference_with(TABLE[7]), overlap="allow")
    assert sum(len(batch["id"]) for batch in data.reference()) == 13


def test_records_are_named_by_their_place_in_the_source():
    reference = reference_with(*TABLE[:20])
    with pytest.warns(SelectionWarning) as caught:
        data = opened(dataset(), ReferenceSet(reference, max_examples=16, seed=3), overlap="drop")
    (listed,) = re.findall(r"Left out: ([\d, ]+)\.", str(caught[0].message))
    named = {int(i) for i in listed.split(", ")}
    kept = {tuple(row) for batch in data.reference() for row in batch["input_ids"].tolist()}
    assert len(named) + len(kept) == 16
    assert named <= set(range(12, 32))
    assert not named & set(range(12))


def test_an_unknown_policy_is_refused_at_once():
    with pytest.raises(ValueError, match=r"overlap to be one of \('refuse', 'drop', 'allow'\), got 'ignore'"):
        SelectionDataModule(dataset(), reference_with(), batch_size=4, overlap="ignore")


# ---- ready batches -------------------------------------------------------------------------------------------------


def padded(rows, mask, left=False):
    """Batches of three rows, each padded to 64 columns."""

    def collate(batch):
        ids = torch.zeros(len(batch), 64, dtype=torch.int64)
        for i, row in enumerate(batch):
            place = slice(64 - len(row), 64) if left else slice(0, len(row))
            ids[i, place] = torch.as_tensor(row)
        labels = torch.where(ids == 0, IGNORE_INDEX, ids)
        return {"input_ids": ids, "labels": labels, **({"attention_mask": (ids != 0).long()} if mask else {})}

    return DataLoader(list(rows), batch_size=3, collate_fn=collate)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("make", [lambda folder: dataset(), store], ids=["dataset", "prepared"])
def test_rows_of_a_reference_loader_are_looked_for_too(tmp_path, make, mask, left):
    pool = make(tmp_path)
    opened(pool, padded(OTHER[:7], mask, left))
    for policy in ("refuse", "drop"):
        with pytest.raises(
            ValueError, match=r"1 of 8 reference .* record 7 .* batches are used as they come"
        ) as caught:
            opened(pool, padded([*OTHER[:7], TABLE[9]], mask, left), overlap=policy)
        assert "overlap='drop'" not in str(caught.value)
    opened(pool, padded([*OTHER[:7], TABLE[9]], mask, left), overlap="allow")


def test_padding_that_pool_and_reference_share_is_no_text(tmp_path):
    rows = [{"input_ids": [*row[:10], *[0] * 60]} for row in TABLE]
    reference = [{"input_ids": torch.tensor([*row[:6], *[0] * 64])} for row in OTHER[:5].tolist()]
    opened(rows, DataLoader(reference, batch_size=2))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            torch.tensor([1.0, 2.0]),
            TypeError,
            "the reference DataLoader to return input_ids as integers, got torch.float",
        ),
        (torch.tensor([-1, 2]), ValueError, "token ids of 0 or more, got a batch .* with the smallest id -1"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "smallest id None: .*leave empty examples out"),
    ],
)
def test_batches_that_cannot_be_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        opened(dataset(), DataLoader([{"input_ids": batch}] * 4, batch_size=2))


def test_a_loader_of_bare_tensors_is_a_reference_set():
    data = opened(dataset(), DataLoader(list(torch.as_tensor(OTHER[:5])), batch_size=2))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in data.reference()]), torch.as_tensor(OTHER[:5]))
