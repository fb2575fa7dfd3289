"""A collate function that moves rows is refused, one that keeps them is not, whatever else it does."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.rows.collating import agreement, without_fill
from liveselect.datamodules.rows.rows import CollatedRows

torch.set_num_threads(1)

VOCABULARY = 90


def rows(kind):
    rng = np.random.default_rng(0)
    if kind == "one length":
        return [{"input_ids": rng.integers(1, VOCABULARY, 12)} for _ in range(40)]
    if kind == "ragged":
        return [{"input_ids": rng.integers(1, VOCABULARY, 3 + 7 * i % 19)} for i in range(40)]
    if kind == "shared beginning":  # as with a system prompt
        return [{"input_ids": np.concatenate([np.arange(1, 31), rng.integers(31, 90, 2 + i % 3)])} for i in range(40)]
    return [{"input_ids": np.array([5, 6, 7 + i % 2])} for i in range(40)]  # "nearly all the same"


KINDS = ["one length", "ragged", "shared beginning", "nearly all the same"]


def tensors(batch):
    return [torch.as_tensor(row["input_ids"]) for row in batch]


def right(batch, mask=False):
    found = {"input_ids": pad_sequence(tensors(batch), batch_first=True)}
    if mask:
        found["attention_mask"] = (found["input_ids"] != 0).long()
    return found


def left(batch, mask=False):
    found = {"input_ids": pad_sequence([row.flip(0) for row in tensors(batch)], batch_first=True).flip(1)}
    if mask:
        found["attention_mask"] = (found["input_ids"] != 0).long()
    return found


def to_multiple(batch):
    ids = right(batch)["input_ids"]
    return {"input_ids": torch.nn.functional.pad(ids, (0, -ids.shape[1] % 8))}


def to_fixed(batch):
    ids = right(batch)["input_ids"]
    return {"input_ids": torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]))}


def cut_to_shortest(batch):
    width = min(map(len, tensors(batch)))
    return {"input_ids": torch.stack([row[:width] for row in tensors(batch)])}


def cut_left_to_shortest(batch):
    width = min(map(len, tensors(batch)))
    return {"input_ids": torch.stack([row[-width:] for row in tensors(batch)])}


def middle(batch):
    """Padding on both sides: prompts end, and answers begin, in one column."""
    halves = [len(row) // 2 for row in tensors(batch)]
    before, after = max(halves), max(len(row) - half for row, half in zip(tensors(batch), halves, strict=True))
    ids = torch.zeros(len(batch), before + after, dtype=torch.int64)
    for i, (row, half) in enumerate(zip(tensors(batch), halves, strict=True)):
        ids[i, before - half : before - half + len(row)] = row
    return {"input_ids": ids}


def masked(batch):
    ids = right(batch)["input_ids"]
    return {"input_ids": ids.masked_fill(torch.rand(ids.shape) < 0.15, 91), "labels": ids}


def masked_left(batch):
    ids = left(batch, mask=True)
    hidden = torch.rand(ids["input_ids"].shape) < 0.15
    return {**ids, "input_ids": ids["input_ids"].masked_fill(hidden, 91)}


def cropped(batch):
    starts = [int(torch.randint(len(row) - 2, ())) for row in tensors(batch)]
    return {"input_ids": torch.stack([row[i : i + 3] for i, row in zip(starts, tensors(batch), strict=True)])}


KEEPING = [
    *(right, left, lambda batch: right(batch, mask=True), lambda batch: left(batch, mask=True), middle),
    *(to_multiple, to_fixed, cut_to_shortest, cut_left_to_shortest, masked, masked_left, cropped),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("collate", KEEPING)
def test_a_function_that_keeps_the_rows_in_order_is_taken(collate, kind):
    assert len(CollatedRows(rows(kind), collate)) == 40


def by_length(batch):
    return right(sorted(batch, key=lambda row: len(row["input_ids"])))


def by_length_down(batch):
    return left(sorted(batch, key=lambda row: -len(row["input_ids"])), mask=True)


def by_last_token(batch):
    return right(sorted(batch, key=lambda row: row["input_ids"][-1]))


def shuffled(batch):
    return right([batch[i] for i in torch.randperm(len(batch))])


def backwards(batch):
    return right(batch[::-1])


def sorted_and_masked(batch):
    return masked(sorted(batch, key=lambda row: len(row["input_ids"])))


MOVING = {
    by_length: ["ragged", "shared beginning"],
    by_length_down: ["ragged", "shared beginning"],
    by_last_token: KINDS,
    shuffled: ["one length", "ragged"],
    backwards: KINDS,
    sorted_and_masked: ["ragged"],
}


@pytest.mark.parametrize(("collate", "kind"), [(collate, kind) for collate, kinds in MOVING.items() for kind in kinds])
def test_a_function_that_moves_rows_is_refused(collate, kind):
    with pytest.raises(
        ValueError, match=r"changes the order of the rows: .* row \d+ of the batch holds example \d+, not"
    ):
        CollatedRows(rows(kind), collate)


def rechunked(batch):
    """As many rows as came, of equal length, cut from all of them end to end."""
    stream = torch.cat(tensors(batch))
    width = len(stream) // len(batch)
    return {"input_ids": stream[: width * len(batch)].view(len(batch), width)}


def test_a_function_that_mixes_rows_is_refused():
    with pytest.raises(ValueError, match=r"mixes rows: .* holds \d+% of what example \d+ is|changes the order"):
        CollatedRows(rows("ragged"), rechunked)


def blended(batch):
    ids = right(batch)["input_ids"]
    return {"input_ids": torch.where(torch.arange(ids.shape[1]) % 2 == 0, ids, ids.roll(1, 0))}


def test_a_function_that_blends_neighbours_is_refused():
    with pytest.raises(
        ValueError, match=r"mixes rows: .*return one row for each example, .* nothing of the others in it"
    ):
        CollatedRows(rows("one length"), blended)


@pytest.mark.parametrize("make", [DataCollatorWithPadding, lambda t: DataCollatorForLanguageModeling(t, mlm=False)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collators_of_hugging_face_are_taken(make, side):
    tokenizer = train_bpe(["some text of a few words"] * 3, 300)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = side
    data = [{"input_ids": row["input_ids"].tolist()} for row in rows("ragged")]
    assert (
        len(
            CollatedRows(
                data, make(tokenizer, return_tensors="pt") if make is DataCollatorWithPadding else make(tokenizer)
            )
        )
        == 40
    )


def test_the_masking_collator_of_hugging_face_is_taken():
    tokenizer = train_bpe(["some text of a few words"] * 3, 300)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    data = [{"input_ids": row["input_ids"].tolist()} for row in rows("ragged")]
    assert len(CollatedRows(data, DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.3))) == 40


def test_agreement_is_the_best_overlap_of_the_shorter_row():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.integers(0, 3, rng.integers(1, 9)) for _ in range(2))
        short, long = sorted((one, other), key=len)
        best = max((short == long[i : i + len(short)]).sum() for i in range(len(long) - len(short) + 1))
        assert agreement(one, other) == (best / len(short), best)


def test_very_long_rows_are_compared_at_both_ends():
    row = np.random.default_rng(0).integers(0, 1000, 4000)
    assert agreement(row, np.concatenate([np.zeros(3000, int), row]))[0] == 1.0
    assert agreement(np.concatenate([row, np.zeros(3000, int)]), row)[0] == 1.0


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ([1, 2, 3, 0, 0, 0], [1, 2, 3, 0]),
        ([0, 0, 0, 1, 2], [0, 1, 2]),
        ([1, 2, 3], [1, 2, 3]),
        ([7, 7, 7], [7]),
        ([0, 0, 1, 2, 0, 0, 0], [0, 1, 2, 0]),
        ([4], [4]),
        ([], []),
    ],
)
def test_one_token_is_kept_of_what_fills_a_row(row, kept):
    assert without_fill(np.array(row, dtype=int)).tolist() == kept
