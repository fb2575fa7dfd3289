"""Every row counts for the fingerprint of a dataset, and what is wrong with a row is said before training."""

import random
import warnings

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from liveselect.datamodules.rows import content, rows
from liveselect.datamodules.rows.content import Chunk, survey
from liveselect.datamodules.rows.groups import open_pool
from liveselect.datamodules.rows.rows import CollatedRows, DatasetRows
from liveselect.grammar import IGNORE_INDEX, SelectionWarning

torch.set_num_threads(1)

COUNT, WIDTH = 700, 6  # more rows than the 256 and 64 that were once looked at


@pytest.fixture(autouse=True)
def _small_spread(monkeypatch):
    monkeypatch.setattr(content, "SPREAD_ROWS", 64)  # so that a spread is not the whole


def table(count=COUNT, width=WIDTH):
    return np.random.default_rng(0).integers(1, 90, (count, width))


def ragged():
    return [row[: 2 + i % 5].tolist() for i, row in enumerate(table())]


class Tensors(Dataset):
    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, row):
        return {name: torch.tensor(values[row]) for name, values in self.columns.items()}


KINDS = {
    "list": lambda columns: [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    "tensors": Tensors,
    "hugging face": datasets.Dataset.from_dict,
    "hugging face torch": lambda columns: datasets.Dataset.from_dict(columns).with_format("torch"),
    "shuffled back": lambda columns: _shuffled_back(datasets.Dataset.from_dict(columns)),
    "transform": lambda columns: datasets.Dataset.from_dict(columns).with_transform(lambda batch: batch),
    "subset": lambda columns: Subset(Tensors(columns), range(len(columns["input_ids"]))),
    "concatenated": lambda columns: ConcatDataset(
        [
            Tensors({name: v[:100] for name, v in columns.items()}),
            Tensors({name: v[100:] for name, v in columns.items()}),
        ]
    ),
}


def _shuffled_back(dataset):
    order = np.random.default_rng(1).permutation(len(dataset))
    return dataset.select(order).select(np.argsort(order))


def columns_of(tokens, **more):
    return {"input_ids": [list(map(int, row)) for row in tokens], **more}


def fingerprint(columns, kind="list"):
    return DatasetRows(KINDS[kind](columns)).fingerprint


# ---- the fingerprint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [table().tolist(), ragged()], ids=["one length", "ragged"])
def test_the_same_rows_have_the_same_fingerprint_whatever_holds_them(kind, tokens):
    assert fingerprint(columns_of(tokens), kind) == fingerprint(columns_of(tokens))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_the_type_of_the_numbers_does_not_count(dtype):
    as_arrays = [{"input_ids": row.astype(dtype)} for row in table()]
    assert DatasetRows(as_arrays).fingerprint == fingerprint(columns_of(table()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [0, 1, 333, COUNT - 1])
def test_any_changed_token_changes_it(kind, row):
    changed = table()
    changed[row, 3] += 1
    assert fingerprint(columns_of(changed), kind) != fingerprint(columns_of(table()), kind)


def test_order_borders_and_number_of_rows_count():
    whole = ragged()
    moved = [whole[0] + whole[1][:1], whole[1][1:], *whole[2:]]
    found = {fingerprint(columns_of(rows)) for rows in (whole, whole[::-1], moved, whole[:-1])}
    assert len(found) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_label_changes_it(kind):
    labels = table().tolist()
    plain = fingerprint(columns_of(table(), labels=labels), kind)
    assert plain == fingerprint(columns_of(table()), kind)  # labels that are the tokens say nothing new
    labels[501][2] = IGNORE_INDEX
    assert fingerprint(columns_of(table(), labels=labels), kind) != plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_attention_mask_changes_it(kind):
    mask = np.ones_like(table())
    plain = fingerprint(columns_of(table(), attention_mask=mask.tolist()), kind)
    mask[501, 4:] = 0
    assert fingerprint(columns_of(table(), attention_mask=mask.tolist()), kind) != plain


def test_a_changed_mask_of_a_wrapped_dataset_changes_it():
    def collate(batch):
        return {name: torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels", "attention_mask")}

    def of(mask):
        columns = columns_of(table(), labels=table().tolist(), attention_mask=mask.tolist())
        return CollatedRows(Tensors(columns), collate).fingerprint

    mask = np.ones_like(table())
    plain = of(mask)
    mask[501, 4:] = 0
    assert of(mask) != plain


@pytest.mark.parametrize("name", ["weight", "position_ids", "note"])
def test_whatever_else_a_wrapped_dataset_hands_to_training_counts(name):
    def collate(batch):
        first = {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels", "weight")}
        first["position_ids"] = torch.stack([row["position_ids"] for row in batch])
        return {**first, "note": [chr(97 + int(row["note"])) for row in batch]}

    def of(**changed):
        columns = columns_of(table(), labels=table().tolist(), weight=np.ones(COUNT), note=np.zeros(COUNT, int))
        columns["position_ids"] = np.tile(np.arange(WIDTH), (COUNT, 1))
        return CollatedRows(Tensors({**columns, **changed}), collate).fingerprint

    values = {"weight": np.ones(COUNT), "note": np.zeros(COUNT, int)}.get(name)
    values = np.tile(np.arange(WIDTH), (COUNT, 1)) if values is None else values
    assert of(**{name: values.astype(np.float32 if name == "weight" else np.int32)}) == of()
    values[501] += 1
    assert of(**{name: values}) != of()


def test_what_a_collate_function_counts_up_keeps_the_rows_from_being_compared_no_more_than_itself():
    calls = []

    def collate(batch):
        calls.append(1)
        tokens = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": tokens, "labels": tokens, "made": torch.full((len(batch),), len(calls))}

    changed = table()
    changed[501, 2] += 1
    one, again, other = (CollatedRows(Tensors(columns_of(t)), collate) for t in (table(), table(), changed))
    assert one.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("kind", ["list", "hugging face", "subset"])
def test_the_group_of_every_row_counts(kind):
    def pool(groups):
        return open_pool(DatasetRows(KINDS[kind](columns_of(table(), source=groups))), "source")

    groups = [i % 3 for i in range(COUNT)]
    plain = pool(groups)
    assert pool(groups).fingerprint == plain.fingerprint != DatasetRows(KINDS["list"](columns_of(table()))).fingerprint
    groups[501] = 1
    assert pool(groups).fingerprint != plain.fingerprint


def test_groups_can_be_read_of_a_dataset_that_reads_many_rows_at_once_only():
    class AtOnce(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, row):
            raise AssertionError("asked for a single row")

        def __getitems__(self, ids):
            return [{"input_ids": [i, i + 1], "source": f"s{i % 2}"} for i in ids]

    assert open_pool(DatasetRows(AtOnce()), "source").group_names == ("s0", "s1")


def test_a_mapped_dataset_keeps_its_fingerprint_where_the_library_gives_it_a_random_one():
    stream = (i for i in range(3))  # cannot be hashed, so that every map is a new one to the library

    def mapped():
        plain = datasets.Dataset.from_dict(columns_of(table()))
        return plain.map(lambda row: {"labels": row["input_ids"], "no": str(type(stream))}, load_from_cache_file=False)

    one, other = mapped(), mapped()
    assert one._fingerprint != other._fingerprint
    assert DatasetRows(one).fingerprint == DatasetRows(other).fingerprint == fingerprint(columns_of(table()))


# ---- sizes and draws -----------------------------------------------------------------------------------------------


def test_a_dataset_too_large_to_read_is_spread_over_and_that_is_said(monkeypatch):
    monkeypatch.setattr(rows, "WHOLE_TOKENS", COUNT * WIDTH - 1)
    monkeypatch.setattr(content, "SPREAD_ROWS", 300)
    with pytest.warns(SelectionWarning, match=r"700 rows of about 6 tokens, too many to read .*: 300 of them"):
        plain = fingerprint(columns_of(table()))
    changed = table()
    changed[0] += 1
    with pytest.warns(SelectionWarning, match="too many to read"):
        assert fingerprint(columns_of(changed)) != plain
    monkeypatch.setattr(rows, "WHOLE_TOKENS", COUNT * WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint(columns_of(table())) != plain


class Drawing(Dataset):
    """Crops of the rows of a table, at places drawn from all three global generators."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        start = int(torch.randint(2, ())) + np.random.randint(2) + random.randrange(2)  # noqa: NPY002
        return {"input_ids": self.rows[row][start : start + 3]}


def test_a_dataset_that_draws_from_global_generators_is_compared_in_full():
    changed = table()
    changed[501] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = DatasetRows(Drawing(table())).fingerprint
        assert DatasetRows(Drawing(table())).fingerprint == plain
        assert DatasetRows(Drawing(changed)).fingerprint != plain


class DrawingAlone(Drawing):
    """Draws from a generator of its own, which nobody can seed."""

    def __init__(self, rows):
        super().__init__(rows)
        self.generator = np.random.default_rng()

    def __getitem__(self, row):
        start = self.generator.integers(4)
        return {"input_ids": self.rows[row][start : start + 3]}


def test_of_a_dataset_with_a_generator_of_its_own_only_the_length_is_compared():
    with pytest.warns(SelectionWarning, match="differ each time they are read, .* generator of its own"):
        plain = DatasetRows(DrawingAlone(table())).fingerprint
    with pytest.warns(SelectionWarning, match="only the number of rows is compared"):
        assert DatasetRows(DrawingAlone(table() + 1)).fingerprint == plain
    with pytest.warns(SelectionWarning):
        assert DatasetRows(DrawingAlone(table()[1:])).fingerprint != plain


@pytest.mark.parametrize("make", [DatasetRows, lambda data: CollatedRows(data, collate_and_draw)])
def test_opening_moves_no_global_random_state(make):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    opened = make(Drawing(torch.as_tensor(table())))
    opened.candidates([3, 4])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1][1]).all()  # noqa: NPY002
    assert np.random.get_state()[2] == before[1][2]  # noqa: NPY002
    assert random.getstate() == before[2]


def collate_and_draw(batch):
    tokens = torch.stack([row["input_ids"] for row in batch])
    return {"input_ids": torch.where(torch.rand(tokens.shape) < 0.15, 0, tokens)}


# ---- what is wrong with rows ---------------------------------------------------------------------------------------


def with_row(row, *, place=501, **more):
    tokens = table().tolist()
    tokens[place] = row
    return columns_of_raw(tokens, **more)


def columns_of_raw(tokens, **more):
    return [{"input_ids": row, **{name: values[i] for name, values in more.items()}} for i, row in enumerate(tokens)]


WRONG = {
    "empty": (with_row([]), ValueError, "row 501 of the pool has no tokens: leave empty rows out"),
    "negative": (
        with_row([3, -100, 4]),
        ValueError,
        r"token ids of 0 or more, got -100 in row 501: .*belongs into labels",
    ),
    "huge": (with_row([3, 2**40]), ValueError, f"token ids of 0 or more, got {2**40} in row 501"),
    "fractions": (with_row([1.5, 2.0]), TypeError, "input_ids of row 501 of the pool as integers, got float64"),
    "float tensors": (with_row(torch.tensor([1.0, 2.0])), TypeError, "row 501 of the pool as integers, got float32"),
    "truth values": (with_row(np.array([True, False])), TypeError, "row 501 of the pool as integers, got bool"),
    "missing values": (with_row([1, None]), TypeError, "row 501 of the pool as integers, got missing values"),
    "words": (with_row(["a", "b"]), TypeError, "row 501 of the pool as integers, got str"),
    "two dimensions": (with_row([[1, 2]]), ValueError, r"row 501 .* one-dimensional .* shapes \(1, 2\)"),
    "short labels": (with_row([1, 2], labels=[[1, 2, 3]] * COUNT), ValueError, r"of one length, got shapes \(6,\)"),
    "other ignored labels": (
        columns_of_raw(table().tolist(), labels=[*table().tolist()[:-1], [5, 5, -1, 5, 5, 5]]),
        ValueError,
        "expected labels of the pool as token ids, or -100 where no loss is taken, got -1 in row 699",
    ),
    "a short mask": (
        columns_of_raw(table().tolist(), attention_mask=[[1, 1]] * COUNT),
        ValueError,
        "attention_mask of",
    ),
    "a mask with holes": (
        columns_of_raw(table().tolist(), attention_mask=[[1, 0, 1, 1, 1, 1]] * COUNT),
        ValueError,
        "hides tokens between others.*pass a collate_fn",
    ),
    "nothing to predict": (columns_of_raw([[1]] * 9), ValueError, "none of the 9 rows .* has a token to predict"),
    "a dictionary": (datasets.DatasetDict(train=[{"input_ids": [1, 2]}]), TypeError, r"the keys \['train'\]: pass one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_cannot_be_are_refused(case):
    data, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        DatasetRows(data)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "as integers, got float"),
        ([-1, 2], ValueError, "got -1 in row 501"),
        ([], ValueError, "row 501 of the pool has no tokens"),
    ],
)
def test_columns_that_cannot_be_are_refused_too(values, error, message):
    good = [[float(i) for i in row] if isinstance((values or [0])[0], float) else row for row in table().tolist()]
    good[501] = values
    with pytest.raises(error, match=message):
        DatasetRows(datasets.Dataset.from_dict({"input_ids": good}))


def test_the_largest_id_is_found_wherever_it_stands():
    assert DatasetRows(with_row([3, 4000])).vocab_size == 4001
    assert (
        DatasetRows(with_row([3, 4], labels=[*table().tolist()[:501], [3, 4000], *table().tolist()[502:]])).vocab_size
        == 4001
    )
    assert DatasetRows(datasets.Dataset.from_list(with_row([3, 4000]))).vocab_size == 4001


def test_a_row_of_another_length_is_found_wherever_it_stands():
    found = DatasetRows(with_row([3, 4]))
    assert (found.block_size, found.longest) == (None, WIDTH)
    assert DatasetRows(columns_of_raw(table())).block_size == WIDTH


def test_rows_without_anything_to_predict_are_counted():
    labels = table().tolist()
    labels[5], labels[6] = [IGNORE_INDEX] * WIDTH, [7] + [IGNORE_INDEX] * (WIDTH - 1)
    with pytest.warns(SelectionWarning, match="2 of the 700 rows of the pool .* have no token to predict"):
        DatasetRows(columns_of_raw(table().tolist(), labels=labels))


def test_labels_that_are_shifted_already_are_warned_of():
    shifted = [[*row[1:], IGNORE_INDEX] for row in table().tolist()]
    with pytest.warns(SelectionWarning, match="labels of the pool look shifted"):
        DatasetRows(columns_of_raw(table().tolist(), labels=shifted))


def test_padding_on_the_left_is_moved_to_the_right():
    rows = [{"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}, {"input_ids": [1, 2, 3, 4, 9]}] * 2
    batch = DatasetRows(rows).candidates([0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [1, 2, 3, 4, 9]]
    assert batch["labels"].tolist() == [[5, 6, 7, IGNORE_INDEX, IGNORE_INDEX], [1, 2, 3, 4, 9]]


def test_labels_that_a_loss_of_the_users_may_know_are_only_warned_of():
    def collate(batch):
        tokens = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": tokens, "labels": torch.where(tokens > 50, -1, tokens)}

    with pytest.warns(SelectionWarning, match="have labels of -1: .*Map them to -100, or pass a loss_fn"):
        CollatedRows(columns_of_raw(table().tolist()), collate)


@pytest.mark.parametrize(
    "labels", [torch.zeros(1), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH - 1, dtype=torch.int64)]
)
def test_labels_that_are_not_those_of_tokens_are_let_through_with_a_warning(labels):
    def collate(batch):
        return {
            "input_ids": torch.tensor([row["input_ids"] for row in batch]),
            "labels": labels.repeat_interleave(len(batch), 0),
        }

    with pytest.warns(SelectionWarning, match="labels that are not one integer for each token: .*Pass a loss_fn"):
        assert len(CollatedRows(columns_of_raw(table().tolist()), collate)) == COUNT


# ---- Hugging Face formats ------------------------------------------------------------------------------------------


def test_a_transform_over_columns_of_token_ids_is_not_bypassed():
    plain = datasets.Dataset.from_dict(columns_of(table()))
    shorter = plain.with_transform(lambda batch: {"input_ids": [row[:3] for row in batch["input_ids"]]})
    assert DatasetRows(shorter).candidates([4])["input_ids"].tolist() == [table()[4, :3].tolist()]


def test_a_column_that_the_format_hides_stays_hidden():
    labels = [[IGNORE_INDEX] * 5 + [7]] * COUNT
    data = datasets.Dataset.from_dict(columns_of(table(), labels=labels)).with_format("torch", columns=["input_ids"])
    opened = DatasetRows(data)
    assert opened.candidates([4])["labels"].tolist() == [table()[4].tolist()]
    assert opened.fingerprint == fingerprint(columns_of(table()))


def test_the_survey_reads_every_row_once_more_than_its_trial():
    seen = []

    def read(ids, seed):
        seen.extend(ids)
        return Chunk(np.full(len(ids), 2), np.ones(2 * len(ids), np.int64), np.ones(2 * len(ids), np.int64))

    survey(3000, read)
    assert np.bincount(seen).min() == 1
    assert set(range(3000)) == set(seen)
