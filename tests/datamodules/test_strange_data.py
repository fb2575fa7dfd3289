"""Data that would make selection wrong without a word are refused, mended or warned of."""

import copy
import json
import warnings

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from plan_following import PublishPlans, trainer_for
from tokenizers import normalizers
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.batching import Item
from liveselect.datamodules.overlap import shared_rows
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.pools.tokens import write_store
from liveselect.datamodules.reference import ReferenceSet, load_reference, loader_batches
from liveselect.datamodules.rows.groups import open_pool
from liveselect.datamodules.rows.rows import CollatedRows, DatasetRows
from liveselect.grammar import IGNORE_INDEX, SelectionWarning

torch.set_num_threads(1)

TABLE = np.random.default_rng(0).integers(1, 60, (48, 5))
REFERENCE = [{"input_ids": [3, 3, 3]}]
TEXTS = [f"the {animal} of house {i} went away to sleep" for i in range(20) for animal in ("cat", "dog", "horse")]


def rows(table=TABLE):
    return [{"input_ids": torch.as_tensor(row)} for row in table]


def opened(*arguments, **settings):
    return set_up(SelectionDataModule(*arguments, batch_size=4, **settings))


def set_up(data):
    data.setup("fit")
    return data


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 2)

    def training_step(self, batch, batch_idx):
        return self.embed(batch["input_ids"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Existing(pl.LightningDataModule):
    def __init__(self, loader, tokenizer=None):
        super().__init__()
        self.loader, self.tokenizer = loader, tokenizer

    def train_dataloader(self):
        return self.loader


# ---- reading -------------------------------------------------------------------------------------------------------


class Together(Dataset):
    def __len__(self):
        return len(TABLE)

    def __getitem__(self, row):
        return {"input_ids": TABLE[row]}


class InOrderOfTheFile(Together):
    """Sorts what it is asked for, as HDF5 wants it."""

    def __getitems__(self, ids):
        return [self[i] for i in sorted(ids)]


class EachOnce(Together):
    def __getitems__(self, ids):
        return [self[i] for i in sorted(set(ids))][:1]


def sorting_transform(batch):
    return {"input_ids": sorted(batch["input_ids"])}


@pytest.mark.parametrize(
    "data",
    [InOrderOfTheFile(), datasets.Dataset.from_dict({"input_ids": TABLE.tolist()}).with_transform(sorting_transform)],
    ids=["__getitems__", "transform"],
)
def test_a_dataset_that_reads_many_rows_in_an_order_of_its_own_is_refused(data):
    with pytest.raises(ValueError, match=r"when it is asked for several rows at once, changes the order of the rows"):
        DatasetRows(data)
    with pytest.raises(ValueError, match="changes the order of the rows"):
        CollatedRows(data, lambda batch: {"input_ids": torch.tensor(np.stack([row["input_ids"] for row in batch]))})


def test_a_dataset_that_returns_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"__getitems__ of EachOnce to return a list of the \d rows .*, got 1 of them"):
        DatasetRows(EachOnce())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_candidates_are_int64_whatever_the_collate_function_returns(dtype):
    def collate(batch):
        ids = torch.stack([row["input_ids"] for row in batch]).to(dtype)
        return {"input_ids": ids, "labels": ids.clone()}

    opened_rows = CollatedRows(rows(), collate)
    batch = opened_rows.candidates([3, 1])
    assert {batch[name].dtype for name in ("id", "input_ids", "labels")} == {torch.int64}
    assert batch["input_ids"].tolist() == TABLE[[3, 1]].tolist()
    assert opened_rows.load([3, 1], [0, 0])["input_ids"].dtype == dtype  # training gets what it always got


def test_groups_are_named_by_their_values_whatever_holds_them():
    for kind in (int, np.int64, torch.tensor):
        data = [{**row, "source": kind(i % 2)} for i, row in enumerate(rows())]
        assert open_pool(DatasetRows(data), "source").group_names == ("0", "1")


def open_the_file(worker):
    get_worker_info().dataset.opened_by = worker


class NeedsOpening(Together):
    opened_by = None

    def __getitem__(self, row):
        if get_worker_info() is not None and self.opened_by != get_worker_info().id:
            raise RuntimeError("the worker did not open its file")
        return {"input_ids": torch.as_tensor(TABLE[row])}


def test_a_worker_init_function_finds_the_dataset_that_it_knows(tmp_path):
    loader = DataLoader(NeedsOpening(), batch_size=4, num_workers=1, worker_init_fn=open_the_file)
    data = SelectionDataModule.wrap(Existing(loader), REFERENCE)
    trainer_for(tmp_path, max_steps=2, callbacks=[PublishPlans(2)]).fit(Net(), datamodule=data)
    data.setup("fit")
    assert torch.cat([batch["id"] for batch in data.candidates(torch.arange(48))]).tolist() == list(range(48))


def test_a_collate_function_may_empty_the_rows_that_it_is_given():
    data = rows()

    def collate(batch):
        return {"input_ids": torch.stack([row.pop("input_ids") for row in batch])}

    for _ in range(2):
        assert CollatedRows(data, collate).candidates([3])["input_ids"].tolist() == [TABLE[3].tolist()]


def test_a_mask_that_does_not_say_what_is_padding_needs_labels():
    def collate(batch, **more):
        ids = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": ids, "attention_mask": torch.ones(len(ids), 1, 5, 5), **({"labels": ids} if more else {})}

    with pytest.raises(
        ValueError, match=r"attention_mask of the shape of input_ids, \(1, 5\), or labels .* \(1, 1, 5, 5\)"
    ):
        CollatedRows(rows(), collate)
    assert len(CollatedRows(rows(), lambda batch: collate(batch, labels=True))) == len(TABLE)


# ---- wrapped loaders -----------------------------------------------------------------------------------------------


class ByLength(BatchSampler):
    def __iter__(self):
        yield from ([0, 1], [2, 3])


class Finishing(DataLoader):
    def __iter__(self):
        return ({**batch, "weight": 1} for batch in super().__iter__())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            DataLoader(rows(), batch_sampler=ByLength(SequentialSampler(rows()), 2, False)),
            "the ByLength of Existing is not",
        ),
        (Finishing(rows(), batch_size=2), "the __iter__ of Finishing is not used"),
    ],
)
def test_what_a_wrapped_loader_does_beside_collating_is_warned_of(loader, message):
    with pytest.warns(SelectionWarning, match=message):
        set_up(SelectionDataModule.wrap(Existing(loader), REFERENCE))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_wrapped_loader_is_not_warned_of(shuffle):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SelectionWarning)
        existing = Existing(DataLoader(rows(), batch_size=4, shuffle=shuffle))
        set_up(SelectionDataModule.wrap(existing, REFERENCE))


# ---- reference sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler(range(9)),
        WeightedRandomSampler([1.0] * 9, 5),
        DistributedSampler(rows(), num_replicas=2, rank=1),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_reference_loader_whose_rows_differ_between_ranks_is_refused(sampler):
    with pytest.raises(ValueError, match=f"shuffles or shares out its rows .{type(sampler).__name__}.*shuffle=False"):
        loader_batches(DataLoader(rows(), batch_size=2, sampler=sampler))


class Drawing(Together):
    def __getitem__(self, row):
        return {"input_ids": torch.randint(1, 60, (4,))}


def test_a_reference_set_that_draws_is_the_same_on_every_rank_and_after_a_resume():
    def items():
        torch.rand(1)  # the states of two processes differ
        return [item.input_ids.tolist() for item in load_reference(ReferenceSet(Drawing())).items]

    def batches():
        torch.rand(1)
        return torch.cat([batch["input_ids"] for batch in loader_batches(DataLoader(Drawing(), batch_size=4))]).tolist()

    assert items() == items()
    assert batches() == batches()
    state = torch.get_rng_state()
    load_reference(ReferenceSet(Drawing()))
    loader_batches(DataLoader(Drawing(), batch_size=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_short_row_whose_prompt_carries_no_loss_is_compared_as_a_whole():
    data = [
        {"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX, IGNORE_INDEX, 3, 4]},
        {"input_ids": [3, 4, 5, 6, 7]},
    ] * 4
    whole, answer = np.array([1, 2, 3, 4]), np.array([3, 4])
    found = shared_rows(DatasetRows(data), [Item(whole, whole, 0), Item(answer, answer, 1)])
    assert [one.record for one in found] == [0]


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def other():
    return train_bpe(["quite another text, with words that were never seen before now"] * 3, 320)


def tokenized(tokenizer):
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]


def test_the_tokenizer_of_the_pool_is_taken_without_a_word(tokenizer):
    packed = [token for row in tokenized(tokenizer) for token in [*row["input_ids"], tokenizer.eos_token_id]]
    blocks = [{"input_ids": packed[i : i + 7]} for i in range(0, len(packed) - 7, 7)]  # cut anywhere
    padded = [{"input_ids": row["input_ids"] + [0] * 40} for row in tokenized(tokenizer)]
    for data in (tokenized(tokenizer), blocks, padded):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SelectionWarning)
            opened(data, ["some text of another kind"], tokenizer=tokenizer)


def test_a_tokenizer_that_did_not_make_the_pool_is_refused_unless_it_is_allowed(tokenizer, other):
    what = r"tokenizer= does not look like the one that made .* \d+% of the ids in some rows came"
    with pytest.raises(ValueError, match=what):
        opened(tokenized(tokenizer), ["some text"], tokenizer=other)
    loader = DataLoader(tokenized(tokenizer), batch_size=1, collate_fn=lambda b: {"input_ids": _padded(b)})
    with pytest.raises(ValueError, match="the tokenizer of Existing does not look like the one"):
        set_up(SelectionDataModule.wrap(Existing(loader, other), ["some text"]))
    beyond = [*tokenized(tokenizer), {"input_ids": [5, 5000]}]
    with pytest.raises(ValueError, match=r"it knows \d+ tokens, ids of the pool go up to 5000"):
        opened(beyond, ["some text"], tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SelectionWarning)
        opened(tokenized(tokenizer), ["some text"], tokenizer=other, other_tokenizer="allow")
        opened(beyond, ["some text"], tokenizer=tokenizer, other_tokenizer="allow")
        set_up(SelectionDataModule.wrap(Existing(loader, other), ["some text"], other_tokenizer="allow"))
    with pytest.raises(ValueError, match="expected other_tokenizer to be one of"):
        opened(tokenized(tokenizer), ["some text"], other_tokenizer="yes")


def _padded(batch):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)


def test_a_prepared_pool_keeps_its_own_tokenizer(tokenizer, other, tmp_path):
    ids = [row["input_ids"] for row in tokenized(tokenizer)]
    pool = write_store(tmp_path / "pool", ids, block_size=8, vocab_size=320, tokenizer=tokenizer)
    opened(pool, ["some text"], tokenizer=tokenizer)
    same_vocabulary = copy.deepcopy(tokenizer)
    same_vocabulary.backend_tokenizer.normalizer = normalizers.Replace("a", "e")
    for wrong in (other, same_vocabulary):
        with pytest.raises(
            ValueError, match=r"tokenizer= is not the tokenizer that .*pool was prepared with.*leave it out"
        ):
            opened(pool, ["some text"], tokenizer=wrong)
    opened(pool, ["some text"], tokenizer=other, other_tokenizer="allow")


def test_something_else_is_no_tokenizer():
    with pytest.raises(TypeError, match=r"tokenizer= as a Hugging Face tokenizer, .* got object"):
        opened(rows(), REFERENCE, tokenizer=object())


# ---- what would have no effect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "sample_weight", "loss_mask"])
def test_weights_of_rows_and_records_are_refused(tokenizer, name):
    with pytest.raises(ValueError, match=f"rows of the pool have the field '{name}', which has no effect"):
        opened([{**row, name: 2.0} for row in rows()], REFERENCE)
    for record in ({"text": "some text"}, {"prompt": "a", "answer": " b"}, {"input_ids": [3, 3, 3]}):
        with pytest.raises(ValueError, match=f"record 0 of the reference set .* has the field '{name}', which has no"):
            opened(tokenized(tokenizer), [{**record, name: 2.0}], tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["loss_mask", "padding_mask", "assistant_masks", "mask"])
def test_masks_without_effect_are_refused_with_what_has_one(name):
    said = f"has? the field '{name}', which has no effect: tokens are hidden by an attention_mask"
    masked = [{**row, name: [1] * len(row["input_ids"])} for row in rows()]
    with pytest.raises(ValueError, match=f"rows of the pool have the field '{name}', which has no effect: tokens are"):
        opened(masked, REFERENCE)
    with pytest.raises(ValueError, match=f"record 0 of the reference set .* {said}"):
        opened(rows(), masked[:2])


def test_other_fields_without_effect_are_named_once_and_descriptions_are_not(tokenizer):
    records = [{"text": "some text", "id": 1, "source": "web", "choices": ["a"]}, {"text": "more", "label": 3}]
    with pytest.warns(SelectionWarning, match=r"no effect.*: 'choices' \(1\), 'label' \(1\)\. Leave") as warned:
        opened(tokenized(tokenizer), records, tokenizer=tokenizer)
    assert sum("no effect" in str(each.message) for each in warned) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": {"txt": "content"}}, "expected columns to name those for"),
        ({"columns": {"prompt": "question"}}, r"columns\['prompt'\]='question' has no effect"),
        ({"separator": " "}, "separator has no effect"),
        ({"answer": "last_word", "source": [{"input_ids": [3, 3, 3]}]}, "answer='last_word' has no effect"),
        ({"source": DataLoader([1]), "max_examples": 3}, "expected a DataLoader alone"),
    ],
)
def test_settings_of_a_reference_set_without_effect_are_refused(tokenizer, settings, said):
    with pytest.raises(ValueError, match=said):
        load_reference(ReferenceSet(**{"source": ["some text"], **settings}), tokenizer)


def test_packing_ready_batches_is_refused(tokenizer):
    loader = DataLoader([{"input_ids": torch.tensor([3, 3, 3])}])
    with pytest.raises(ValueError, match="pack_reference=True has no effect on a DataLoader"):
        opened(rows(), loader, pack_reference=True)


def test_wrap_uses_a_collate_function_and_workers_in_place_of_those_of_the_module():
    table = torch.as_tensor(TABLE)
    dataset = torch.utils.data.TensorDataset(table[:, :-1], table[:, 1:])  # pairs, as (x, y)
    called = []

    def collate(batch):
        called.append(get_worker_info() is not None)
        return {"input_ids": torch.stack([x for x, _ in batch])}

    loader = DataLoader(dataset, batch_size=4, num_workers=1, prefetch_factor=2)
    for workers in (None, 0, 2):
        data = SelectionDataModule.wrap(Existing(loader), REFERENCE, collate_fn=collate, num_workers=workers)
        opened_rows = set_up(data).open_rows()
        assert opened_rows.options["num_workers"] == (1 if workers is None else workers)
        (batch,) = data.candidates(torch.tensor([2, 5]))
        assert batch["input_ids"].tolist() == table[[2, 5], :-1].tolist()
    assert called
    with pytest.raises(ValueError, match="num_workers of 0 or more"):
        SelectionDataModule.wrap(Existing(loader), REFERENCE, num_workers=-1)


# ---- records of a reference set that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
@pytest.mark.parametrize("where", ["list", "file"])
def test_missing_texts_of_a_reference_are_left_out_with_their_number(tokenizer, missing, where, tmp_path):
    good = [{"text": f"some text number {i}"} for i in range(8)]
    records = [*good[:4], {"text": missing}, *good[4:]]
    source = records
    if where == "file":
        source = tmp_path / "reference.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(SelectionWarning, match="1 of 9 reference records have no token that could count"):
        data = opened(tokenized(tokenizer), source, tokenizer=tokenizer)
    assert {record for batch in data.reference() for record in batch["record"].tolist()} == {0, 1, 2, 3, 5, 6, 7, 8}


def test_all_kinds_of_missing_content_are_left_out(tokenizer):
    records = [
        "some text",
        None,
        {"prompt": "a", "answer": None},
        {"prompt": None, "answer": " b"},
        {"input_ids": None},
    ]
    loaded = load_reference(ReferenceSet(records), tokenizer)
    assert (loaded.left_out, len(loaded.items), loaded.positions) == (4, 1, [0, 1, 2, 3, 4])


def test_a_table_of_records_of_several_kinds_is_read_by_what_each_has(tokenizer):
    kinds = [{"text": "some text"}, {"prompt": "the", "answer": " end"}, {"input_ids": [3, 4]}, {}]
    names = ("text", "prompt", "answer", "input_ids")
    records = datasets.Dataset.from_list([{name: kind.get(name) for name in names} for kind in kinds])
    loaded = load_reference(ReferenceSet(records), tokenizer)
    assert [item.record for item in loaded.items] == [0, 1, 2]
    assert (loaded.left_out, loaded.remarks) == (1, ())


def test_halves_of_surrogate_pairs_in_a_reference_are_mended_with_their_number(tokenizer, tmp_path):
    file = tmp_path / "reference.jsonl"
    broken = '{"text": "cut \\ud83d here", "\\ud800": 1}\n{"prompt": "a", "answer": " \\udc00 b"}\n{"text": "whole"}\n'
    file.write_text(broken)
    with pytest.warns(SelectionWarning, match="2 of 3 reference records hold halves of surrogate pairs"):
        data = opened(tokenized(tokenizer), file, tokenizer=tokenizer)
    texts = "".join(text for batch in data.reference() for text in data.decode(batch["input_ids"]))
    assert texts.count("\ufffd") == 2


@pytest.mark.parametrize(("words", "cut"), [(3, False), (40, True)])
def test_answers_longer_than_an_example_are_told(tokenizer, words, cut):
    records = [{"prompt": "the cat went", "answer": " away" * words}, {"text": "the cat went away " * 40}]
    remarks = load_reference(ReferenceSet(records), tokenizer, 24).remarks
    assert any("1 of 2 reference answers do not fit into the 24 tokens" in remark for remark in remarks) == cut


def test_an_answer_without_room_for_the_token_before_it_is_told(tokenizer):
    answer = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}
    assert not load_reference(ReferenceSet([answer]), tokenizer, 4).remarks
    assert load_reference(ReferenceSet([answer]), tokenizer, 3).remarks


# ---- ranks ---------------------------------------------------------------------------------------------------------


class Sharded(pl.LightningDataModule):
    """Gives each rank a share of the data, which is right for a plain run."""

    def train_dataloader(self):
        return DataLoader(rows(TABLE[self.trainer.global_rank :: 2]), batch_size=4)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: SelectionDataModule.wrap(Sharded(), REFERENCE), "the pool"),
        (lambda: SelectionDataModule(rows(), RankReference(), batch_size=4), "the reference set"),
    ],
)
def test_ranks_with_different_data_are_refused(tmp_path, make, what):
    trainer = trainer_for(
        tmp_path,
        devices=2,
        max_steps=2,
        callbacks=[PublishPlans(2)],
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
    )
    with pytest.raises(Exception, match=rf"{what} differs between the ranks .*Do not shard data by rank"):
        trainer.fit(Net(), datamodule=make())


class RankReference(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, row):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return {"input_ids": [61 + rank, 62, 63]}
