"""SelectionDataModule serves all pools alike, leaves a wrapped module as it was, and refuses what cannot work."""

import copy
import multiprocessing
import pickle

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from plan_following import PublishPlans, trainer_for
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from transformers import GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTForCausalLM

from liveselect.datamodules import ReferenceSet, SelectionDataModule, ServingSettings, WrappingDataModule, overlap
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.pools.tokens import TokenStore, write_store
from liveselect.grammar import IGNORE_INDEX, CandidateSource, SelectionWarning
from liveselect.plan import Plan

torch.set_num_threads(1)

VOCABULARY = 320
REFERENCE = [f"a zebra called number {i} walks down to the river" for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([*documents(), *REFERENCE], VOCABULARY)


def documents():
    return [f"the cat of house {i} looked at dog {7 * i % 31} and went away to sleep" for i in range(80)]


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    """Two sources, blocks of 16 tokens, with the tokenizer inside."""
    ids = [tokenizer(text)["input_ids"] for text in documents()]
    return write_store(
        tmp_path_factory.mktemp("pool") / "pool",
        ids,
        block_size=16,
        vocab_size=VOCABULARY,
        eos_id=tokenizer.eos_token_id,
        sources=["first" if i < 40 else "second" for i in range(len(ids))],
        tokenizer=tokenizer,
    )


class LM(pl.LightningModule):
    """A tiny language model that remembers its batches."""

    def __init__(self, vocabulary=VOCABULARY):
        super().__init__()
        self.model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        ).train()
        self.batches, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits.square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, data, module=None, **settings):
    module = module or LM()
    publisher = PublishPlans(2)
    trainer = trainer_for(folder, **{"max_steps": 5, "callbacks": [publisher], **settings})
    trainer.fit(module, datamodule=data)
    return module, publisher, trainer


def open_for_fit(data):
    data.setup("fit")
    return data


# ---- pools ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_pool_is_trained_on_as_planned(store, tmp_path, workers):
    data = SelectionDataModule(str(store.path), REFERENCE, batch_size=4, num_workers=workers)
    module, publisher, _ = fit(tmp_path, data)
    planned = torch.cat([plan.ids for plan in publisher.published])
    for batch, ids in zip(module.batches, planned.split(4), strict=False):
        assert list(batch) == ["id", "input_ids", "labels"]
        assert torch.equal(batch["id"], ids)
        assert torch.equal(batch["input_ids"], store.read(ids))
        assert torch.equal(batch["labels"], store.read(ids))
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
    assert len(module.batches) == 5
    assert multiprocessing.active_children() == []


def test_it_is_a_candidate_source(store):
    data = open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=4, probe_batch_size=3))
    assert isinstance(data, CandidateSource)
    ids = torch.tensor([9, 2, 5, 30, 7])
    batches = list(data.candidates(ids))
    assert [len(batch["id"]) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat([batch["id"] for batch in batches]), ids)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), store.read(ids))


def test_the_pool_has_the_fingerprint_and_the_sources_of_the_store(store):
    pool = open_for_fit(SelectionDataModule(store.path, REFERENCE, batch_size=4)).pool
    assert (pool.size, pool.fingerprint, pool.group_names) == (len(store), store.fingerprint, ("first", "second"))
    assert torch.equal(pool.groups, store.groups)


def test_setting_up_twice_keeps_the_pool_and_what_was_used_of_it(store):
    data = open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=4))
    pool = data.pool
    assert open_for_fit(data).pool is pool


RAGGED = [[5, 6, 7], [8, 9], [1, 2, 3, 4], [7, 7]] * 5


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return {"input_ids": torch.tensor(self.rows[row])}


class BatchedRows(Rows):
    """Can only be asked for many rows at once."""

    def __getitem__(self, row):
        raise AssertionError("asked for a single row")

    def __getitems__(self, rows):
        return [{"input_ids": np.array(self.rows[row])} for row in rows]


KINDS = {
    "list": lambda rows: [{"input_ids": row} for row in rows],
    "dataset": Rows,
    "batched dataset": BatchedRows,
    "hugging face": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}),
    "hugging face torch": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_are_padded_without_loss(kind):
    data = open_for_fit(SelectionDataModule(KINDS[kind](RAGGED), [{"input_ids": [3, 3, 3]}], batch_size=4))
    (batch,) = data.candidates(torch.tensor([2, 1, 0]))
    assert batch["id"].tolist() == [2, 1, 0]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [8, 9, 0, 0], [5, 6, 7, 0]]
    hidden = IGNORE_INDEX
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [8, 9, hidden, hidden], [5, 6, 7, hidden]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_length_are_stacked(kind):
    rows = torch.arange(60).view(20, 3)
    data = open_for_fit(SelectionDataModule(KINDS[kind](rows.tolist()), [{"input_ids": [9, 9]}], batch_size=4))
    (batch,) = data.candidates(torch.tensor([3, 19]))
    assert torch.equal(batch["input_ids"], rows[[3, 19]])
    assert torch.equal(batch["labels"], rows[[3, 19]])


def test_masked_tokens_of_a_row_carry_no_loss():
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 0]] * 8, "attention_mask": [[1, 1, 0]] * 8})
    data = open_for_fit(SelectionDataModule(rows, [{"input_ids": [9, 9]}], batch_size=4))
    (batch,) = data.candidates(torch.tensor([3]))
    assert batch["labels"].tolist() == [[1, 2, IGNORE_INDEX]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_follows_the_content(kind):
    def fingerprint(rows):
        return open_for_fit(
            SelectionDataModule(KINDS[kind](rows), [{"input_ids": [99, 9]}], batch_size=4)
        ).pool.fingerprint

    changed = [*RAGGED[:-1], [7, 8]]
    assert fingerprint(RAGGED) == fingerprint(RAGGED) != fingerprint(changed)
    assert fingerprint(RAGGED) != fingerprint(RAGGED[:16])


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "hugging face"])
def test_a_column_can_group_the_rows(make):
    rows = make([{"input_ids": [i, i + 1], "source": "web" if i % 3 else "books"} for i in range(20)])
    pool = open_for_fit(SelectionDataModule(rows, [{"input_ids": [9, 9]}], batch_size=4, groups="source")).pool
    assert pool.group_names == ("books", "web")
    assert pool.group_counts(torch.arange(20)) == {"books": 7, "web": 13}
    with pytest.raises(ValueError, match=r"groups='topic' is no column of the dataset; .*source"):
        open_for_fit(SelectionDataModule(rows, [{"input_ids": [9, 9]}], batch_size=4, groups="topic"))


def test_a_collate_function_makes_the_training_batches(store, tmp_path):
    def collate(rows):
        return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "extra": len(rows)}

    data = SelectionDataModule(store, REFERENCE, batch_size=4, collate_fn=collate)
    module, publisher, _ = fit(tmp_path, data)
    assert module.batches[0].keys() == {"input_ids", "extra"}
    assert torch.equal(module.batches[0]["input_ids"], store.read(publisher.published[0].ids[:4]))
    (batch,) = data.candidates(torch.tensor([4, 2]))
    assert batch["id"].tolist() == [4, 2]
    assert torch.equal(batch["labels"], store.read([4, 2]))
    assert data.pool.group_names == ("first", "second")


def test_setup_leaves_the_random_state_to_training():
    class Noisy(Rows):
        def __getitem__(self, row):
            torch.rand(1), np.random.rand(1)  # noqa: NPY002 - what a dataset of the user may do
            return super().__getitem__(row)

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    open_for_fit(SelectionDataModule(Noisy(RAGGED), [{"input_ids": [9, 9]}], batch_size=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


# ---- reference and validation --------------------------------------------------------------------------------------


def test_the_reference_is_the_same_at_each_call_and_decodes_to_its_text(store):
    data = open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=4, reference_tokens=64))
    first, second = list(data.reference()), list(data.reference())
    assert len(first) > 1
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {"id", "input_ids", "labels", "record"}
        assert all(torch.equal(one[key], other[key]) for key in one)
    pieces = {
        int(i): text for batch in first for i, text in zip(batch["id"], data.decode(batch["input_ids"]), strict=True)
    }
    assert "".join(pieces[i] for i in sorted(pieces)) == "".join(REFERENCE)  # cut into blocks of 16, padding left out


def test_without_a_tokenizer_the_ids_are_shown():
    data = open_for_fit(SelectionDataModule(KINDS["list"](RAGGED), [{"input_ids": [9, 9]}], batch_size=4))
    assert data.decode(torch.tensor([[1, 2], [30, 4]])) == ["1 2", "30 4"]


def test_an_existing_loader_is_a_reference_set_as_it_is(store):
    rows = [{"input_ids": torch.arange(i, i + 5), "weight": torch.tensor(i)} for i in range(5)]
    data = open_for_fit(SelectionDataModule(store, DataLoader(rows, batch_size=2), batch_size=4))
    batches = list(data.reference())
    assert [batch["id"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches[1]["weight"].tolist() == [2, 3]
    assert torch.equal(batches[1]["labels"], batches[1]["input_ids"])


def test_the_reference_set_is_validated_on_unless_another_set_is_given(store, tmp_path):
    settings = {"limit_train_batches": 2, "max_steps": 2, "num_sanity_val_steps": 0}
    data = SelectionDataModule(store, REFERENCE, batch_size=4)
    module, *_ = fit(tmp_path, data, **settings)
    assert [b["id"].tolist() for b in module.validated] == [b["id"].tolist() for b in data.reference()]
    data = SelectionDataModule(store, REFERENCE, batch_size=4, validation=["one line"])
    module, *_ = fit(tmp_path, data, **settings)
    assert [len(batch["id"]) for batch in module.validated] == [1]


def test_validate_needs_no_fit(store, tmp_path):
    module = LM()
    trainer_for(tmp_path).validate(
        module, datamodule=SelectionDataModule(store, REFERENCE, batch_size=4), verbose=False
    )
    assert sum(len(batch["id"]) for batch in module.validated) >= len(REFERENCE)


# ---- wrapping ------------------------------------------------------------------------------------------------------


def left_padding_collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row["input_ids"]) :] = row["input_ids"]
        mask[i, width - len(row["input_ids"]) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "note": "mine"}


class Existing(pl.LightningDataModule):
    """Somebody's datamodule, with every hook; it notes which of them were called."""

    tokenizer = None

    def __init__(self, dataset=None, **loader):
        super().__init__()
        self.dataset = dataset
        self.loader = {"batch_size": 4, "shuffle": True, "collate_fn": left_padding_collate, **loader}
        self.called = set()
        self.colour = "blue"

    def prepare_data(self):
        self.called.add("prepare_data")

    def setup(self, stage):
        assert self.trainer is not None
        self.called.add(f"setup {stage.value}")
        self.rows = Rows(RAGGED) if self.dataset is None else self.dataset

    def train_dataloader(self):
        return DataLoader(self.rows, **self.loader)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=5, collate_fn=left_padding_collate)

    def predict_dataloader(self):
        return DataLoader(self.rows, batch_size=10, collate_fn=left_padding_collate)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.called.add("on_after_batch_transfer")
        return {**batch, "transferred": True}

    def teardown(self, stage):
        self.called.add(f"teardown {stage.value}")

    def state_dict(self):
        return {"seen": 3}

    def load_state_dict(self, state):
        self.called.add(f"load {state['seen']}")


SMALL_REFERENCE = [{"input_ids": [3, 3, 3]}]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_of_a_wrapped_module_look_as_before(tmp_path, workers):
    existing = Existing(num_workers=workers)
    module, publisher, _ = fit(tmp_path, SelectionDataModule.wrap(existing, SMALL_REFERENCE))
    planned = torch.cat([plan.ids for plan in publisher.published])
    for batch, ids in zip(module.batches, planned.split(4), strict=False):
        expected = {**left_padding_collate([Rows(RAGGED)[i] for i in ids.tolist()]), "transferred": True}
        assert list(batch) == list(expected)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_the_hooks_and_attributes_of_a_wrapped_module_stay_its_own(tmp_path):
    existing = Existing()
    data = SelectionDataModule.wrap(existing, SMALL_REFERENCE)
    module, _, trainer = fit(tmp_path, data, limit_train_batches=2, max_steps=2, num_sanity_val_steps=0)
    assert existing.called == {"prepare_data", "setup fit", "on_after_batch_transfer", "teardown fit"}
    assert [len(batch["input_ids"]) for batch in module.validated] == [5, 5, 5, 5]
    assert (data.wrapped, data.wrapped.colour) == (existing, "blue")
    assert data.state_dict() == {"seen": 3}
    assert existing.trainer is trainer
    with pytest.raises(AttributeError, match="size"):
        data.size  # noqa: B018
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Existing()
    trainer_for(tmp_path, max_steps=3, callbacks=[PublishPlans(2)]).fit(
        LM(), datamodule=SelectionDataModule.wrap(again, SMALL_REFERENCE), ckpt_path=tmp_path / "a.ckpt"
    )
    assert "load 3" in again.called


def test_a_name_that_only_the_wrapped_module_has_is_not_found_and_the_message_says_where_it_is():
    class Named(Existing):
        tokenizer = "theirs"

    existing = Named()
    existing._cache = "private"
    data = SelectionDataModule.wrap(existing, SMALL_REFERENCE)
    assert data.tokenizer == "theirs"
    for name in ("colour", "_cache"):
        with pytest.raises(
            AttributeError, match=rf"no attribute '{name}', but the Named .* datamodule\.wrapped\.{name}$"
        ):
            getattr(data, name)
    with pytest.raises(AttributeError, match=r"'WrappingDataModule' object has no attribute 'color'$"):
        data.color  # noqa: B018
    with pytest.raises(AttributeError, match=r"'SelectionDataModule' object has no attribute 'color'"):
        SelectionDataModule([], SMALL_REFERENCE, batch_size=4).color  # noqa: B018


def test_a_wrapped_module_can_be_copied_and_sent_to_another_process():
    data = SelectionDataModule.wrap(Existing(collate_fn=None), SMALL_REFERENCE, seed=3)
    for again in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert again.wrapped.colour == "blue"
        assert again.settings == data.settings
        assert again.state_dict() == {"seen": 3}


def test_a_datamodule_as_the_pool_is_refused_with_the_way_to_wrap_it():
    with pytest.raises(TypeError, match=r"got the datamodule Existing: use SelectionDataModule\.wrap\(Existing\("):
        SelectionDataModule(Existing(), SMALL_REFERENCE, batch_size=4)


def test_a_wrapped_module_validates_on_another_set_where_one_is_given(tmp_path):
    data = SelectionDataModule.wrap(Existing(), SMALL_REFERENCE, validation=[{"input_ids": [4, 4]}])
    settings = {"limit_train_batches": 2, "max_steps": 2, "num_sanity_val_steps": 0}
    module, *_ = fit(tmp_path, data, **settings)
    assert [batch["input_ids"].tolist() for batch in module.validated] == [[[4, 4]]]


def test_hooks_that_a_wrapped_module_lacks_are_left_to_the_model(tmp_path):
    class Bare(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Rows(RAGGED), batch_size=4, collate_fn=left_padding_collate)

    class Transfers(LM):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "by": "model"}

    module, *_ = fit(tmp_path, SelectionDataModule.wrap(Bare(), SMALL_REFERENCE), Transfers(), limit_train_batches=2)
    assert {batch["by"] for batch in module.batches} == {"model"}
    assert module.validated == []


def test_candidates_of_a_wrapped_module_get_ids_and_labels_beside_their_own_keys(tmp_path):
    data = SelectionDataModule.wrap(Existing(), SMALL_REFERENCE, probe_batch_size=2)
    fit(tmp_path, data)
    first, second = data.candidates(torch.tensor([2, 1, 0]))
    assert first.keys() == {"id", "input_ids", "attention_mask", "labels", "note"}
    assert first["id"].tolist() + second["id"].tolist() == [2, 1, 0]
    assert first["input_ids"].tolist() == [[1, 2, 3, 4], [0, 0, 8, 9]]
    assert first["labels"].tolist() == [[1, 2, 3, 4], [IGNORE_INDEX, IGNORE_INDEX, 8, 9]]


def joined(rows):
    return {"input_ids": torch.cat([row["input_ids"] for row in rows])[None]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class SeveralLoaders(Existing):
    def train_dataloader(self):
        return [super().train_dataloader()] * 2


UNWRAPPABLE = {
    "a stream": (Existing(Stream(), shuffle=None), TypeError, r"trains on an iterable dataset \(Stream\)"),
    "several loaders": (SeveralLoaders(), TypeError, "to return one torch DataLoader, got list"),
    "whole batches": (Existing(batch_size=None, shuffle=False), TypeError, "loads with batch_size=None"),
    "joining collate": (
        Existing(collate_fn=joined),
        ValueError,
        r"one row for each example, got input_ids \(1, \d+\) for 2 examples",
    ),
    "collate without ids": (
        Existing(collate_fn=lambda rows: {"tokens": rows}),
        ValueError,
        r"to return input_ids, got the keys \['tokens'\]",
    ),
    "tuples": (
        Existing(TensorDataset(*[torch.arange(20).view(10, 2)] * 3), collate_fn=None),
        TypeError,
        "a batch of the collate function of the training data as a dict .* got list of 3: .*columns=",
    ),
    "default collate over lists": (
        Existing(KINDS["list"]([[1, 2]] * 9), collate_fn=None),
        TypeError,
        r"input_ids as one tensor \(B, T\), got list",
    ),
}


@pytest.mark.parametrize("case", UNWRAPPABLE)
def test_what_cannot_be_wrapped_is_refused(tmp_path, case):
    existing, error, message = UNWRAPPABLE[case]
    with pytest.raises(error, match=message):
        fit(tmp_path, SelectionDataModule.wrap(existing, SMALL_REFERENCE))


def test_a_sampler_that_leaves_rows_out_is_warned_of(tmp_path):
    existing = Existing(shuffle=None, sampler=SubsetRandomSampler(range(8)))
    with pytest.warns(SelectionWarning, match="SubsetRandomSampler of Existing is not used"):
        fit(tmp_path, SelectionDataModule.wrap(existing, SMALL_REFERENCE))


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"batch_size": None}, "expected batch_size, the rows in the training batch of one rank"),
        ({"probe_batch_size": 0}, "expected probe_batch_size of at least 1, got 0"),
        ({"epoch_examples": -1}, "expected epoch_examples of at least 1, got -1"),
        ({"reference_tokens": 0}, "expected reference_tokens of at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused_at_once(store, settings, message):
    with pytest.raises(ValueError, match=message):
        SelectionDataModule(store, REFERENCE, **{"batch_size": 4, **settings})


def pool_of(rows):
    return KINDS["list"](rows)


RAGGED_POOL = pool_of(RAGGED)

REFUSED = {
    "no pool there": ("no/such/pool", REFERENCE, {}, FileNotFoundError, "expected a pool .*`liveselect prepare` first"),
    "text": ([{"text": "a"}] * 9, REFERENCE, {}, ValueError, r"row 0 of the pool to have input_ids, got .*\['text'\]"),
    "no dicts": ([(1, 2)] * 9, REFERENCE, {}, TypeError, "row 0 of the pool as a dict .* got tuple of 2: .*columns="),
    "a stream": (Stream(), REFERENCE, {}, TypeError, "the pool as a map-style dataset .* got Stream"),
    "nothing": ([], REFERENCE, {}, ValueError, "the pool is empty: list has no rows"),
    "too small": (RAGGED_POOL, SMALL_REFERENCE, {"batch_size": 21}, ValueError, "20 candidates, less than the 21"),
    "short epoch": (RAGGED_POOL, SMALL_REFERENCE, {"epoch_examples": 3}, ValueError, "epoch of 3 examples is less"),
    "empty reference": (RAGGED_POOL, [{"input_ids": [3]}], {}, ValueError, "the reference set is empty"),
    "no tokenizer": (RAGGED_POOL, ["some text"], {}, ValueError, "holds text, .* pass it .* as tokenizer="),
    "ids of the pool": (pool_of([[1, 400]] * 8), SMALL_REFERENCE, {}, ValueError, "the pool holds token ids up to 400"),
    "ids of the reference": (
        RAGGED_POOL,
        [{"input_ids": [3, 320, 3]}],
        {},
        ValueError,
        "the reference set holds token ids up to 320, but the model knows only 320 tokens: .*at least 321",
    ),
    "a row of the pool": (
        pool_of([[i, i + 1, i + 2, 7] for i in range(40)]),
        [{"input_ids": [5, 6, 7, 7]}],
        {},
        ValueError,
        r"1 of 1 reference records share text with the pool.* record 0 shares '5 6 7 7' with candidate 5\. .*'drop'",
    ),
    "a short row of the pool": (
        RAGGED_POOL,
        [{"input_ids": [8, 9]}],
        {},
        ValueError,
        "an example of less than 32 tokens is one of its rows.* record 0 shares '8 9' with candidate 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_said_before_training(tmp_path, case):
    pool, reference, settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        fit(tmp_path, SelectionDataModule(pool, reference, **{"batch_size": 4, **settings}))


def test_accumulation_counts_for_the_smallest_pool(tmp_path):
    data = SelectionDataModule(pool_of(RAGGED), SMALL_REFERENCE, batch_size=4)
    with pytest.raises(ValueError, match=r"less than the 24 of one optimizer step \(4 a batch, 1 ranks, .*=6\)"):
        fit(tmp_path, data, accumulate_grad_batches=6)


def test_a_reference_document_of_the_pool_is_refused(store):
    reference = [*REFERENCE, documents()[17]]
    with pytest.raises(ValueError, match=r"1 of 13 reference records share .* record 12 is one of the pool's doc"):
        open_for_fit(SelectionDataModule(store, reference, batch_size=4))
    open_for_fit(SelectionDataModule(store, reference, batch_size=4, overlap="allow"))


def test_a_reference_text_around_a_passage_of_the_pool_is_refused(tokenizer, tmp_path):
    long = [" ".join(documents()[first : first + 8]) for first in range(0, 80, 8)]
    ids = [tokenizer(text)["input_ids"] for text in long]
    pool = write_store(tmp_path / "pool", ids, block_size=24, vocab_size=VOCABULARY, tokenizer=tokenizer)
    around = ReferenceSet([f"as someone wrote: {' '.join(documents()[18:22])} or so"], max_length=500)
    with pytest.raises(ValueError, match=r"1 of 1 reference records .* record 0 shares '.*house.*' with candidate"):
        open_for_fit(SelectionDataModule(pool, around, batch_size=4))


def test_the_pool_itself_is_no_reference_set(store):
    with pytest.raises(ValueError, match="the reference set and the pool are the same prepared pool"):
        open_for_fit(SelectionDataModule(store, TokenStore(store.path), batch_size=4))


def test_a_pool_too_large_to_search_is_warned_of(store, monkeypatch):
    monkeypatch.setattr(overlap, "STORE_TOKENS", 100)
    with pytest.warns(SelectionWarning, match=r"too many to search .*: only whole documents were compared"):
        open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=4))


def test_records_that_are_left_out_are_warned_of(store):
    with pytest.warns(SelectionWarning, match="2 of 14 reference records have no token that could count"):
        open_for_fit(SelectionDataModule(store, [*REFERENCE, "", "\n"], batch_size=4))


def test_a_pool_prepared_with_another_tokenizer_is_no_reference_set(store, tmp_path):
    other = train_bpe(["entirely different words here"] * 3, VOCABULARY)
    blocks = [other("different words here")["input_ids"]] * 40
    reference = write_store(tmp_path / "other", blocks, block_size=8, vocab_size=VOCABULARY, tokenizer=other)
    with pytest.raises(ValueError, match=r"prepared with different tokenizers.*--tokenizer"):
        open_for_fit(SelectionDataModule(store, reference, batch_size=4))


def test_a_model_built_in_configure_model_is_checked_too(store, tmp_path):
    class Late(LM):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            self.model = LM(vocabulary=100).model

    with pytest.raises(ValueError, match="the pool holds token ids up to 319, but the model knows only 100 tokens"):
        fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Late())


def test_a_model_without_hugging_face_is_judged_by_its_largest_embedding(store, tmp_path):
    class Plain(LM):
        def __init__(self, vocabulary):
            super().__init__()
            self.model = nn.ModuleDict({"tokens": nn.Embedding(vocabulary, 4), "positions": nn.Embedding(16, 4)})

        def training_step(self, batch, batch_idx):
            return self.model["tokens"](batch["input_ids"]).square().mean()

    with pytest.raises(ValueError, match="knows only 319 tokens"):
        fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Plain(319))
    fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Plain(320))


class Learned(LM):
    """Has a table of learned positions."""

    def __init__(self, positions, model=GPT2LMHeadModel):
        super().__init__()
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2} if model is GPT2LMHeadModel else OPT_SIZES
        key = "n_positions" if model is GPT2LMHeadModel else "max_position_embeddings"
        self.model = model(
            model.config_class(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes, **{key: positions})
        )


OPT_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
}


@pytest.mark.parametrize("model", [GPT2LMHeadModel, OPTForCausalLM])
def test_rows_longer_than_the_positions_of_a_model_are_refused(store, tmp_path, model):
    fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Learned(16, model))
    with pytest.raises(
        ValueError, match=r"the pool has rows of up to 16 tokens, but the model has .* 15 positions.*n_pos"
    ):
        fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Learned(15, model))
    for role in ("reference", "validation"):
        sets = {"reference": REFERENCE, role: ReferenceSet([{"input_ids": list(range(17))}], max_length=20)}
        with pytest.raises(
            ValueError, match=rf"the {role} set has rows of up to 17 tokens, .* 16 positions: .*max_length"
        ):
            fit(tmp_path, SelectionDataModule(store, batch_size=4, **sets), Learned(16, model))
    packed = SelectionDataModule(store, ReferenceSet(REFERENCE, max_length=8), batch_size=4, pack_reference=True)
    if model is GPT2LMHeadModel:
        fit(tmp_path, packed, Learned(16, model))


def test_one_long_row_among_many_is_measured_against_the_positions(tmp_path):
    rows = [{"input_ids": [1 + i % 9, 2, 3]} for i in range(600)]
    rows[401] = {"input_ids": list(range(1, 20))}
    with pytest.raises(ValueError, match="the pool has rows of up to 19 tokens, but the model has embeddings for 16"):
        fit(tmp_path, SelectionDataModule(rows, SMALL_REFERENCE, batch_size=4), Learned(16))


def test_positions_of_a_plain_model_are_found_by_the_name_of_their_table(store, tmp_path):
    class Plain(LM):
        def __init__(self, name):
            super().__init__()
            self.model = nn.ModuleDict({"tokens": nn.Embedding(VOCABULARY, 4), name: nn.Embedding(8, 4)})

        def training_step(self, batch, batch_idx):
            return self.model["tokens"](batch["input_ids"]).square().mean()

    for name in ("wpe", "position_embeddings", "pos_emb", "embed_positions", "pos", "positional_encoding"):
        with pytest.raises(ValueError, match="rows of up to 16 tokens, but the model has embeddings for 8 positions"):
            fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Plain(name))
    for name in ("segments", "pos_tags", "composition", "relative_bias"):
        fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), Plain(name))


def test_computed_positions_reach_as_far_as_the_rows(store, tmp_path):
    module = LM()
    module.model.config.max_position_embeddings = 8
    fit(tmp_path, SelectionDataModule(store, REFERENCE, batch_size=4), module)


def test_an_id_in_one_row_among_many_is_measured_against_the_vocabulary(tmp_path):
    rows = [{"input_ids": [1 + i % 9, 2, 3]} for i in range(600)]
    rows[401] = {"input_ids": [4, VOCABULARY]}
    with pytest.raises(ValueError, match="the pool holds token ids up to 320, but the model knows only 320 tokens"):
        fit(tmp_path, SelectionDataModule(rows, SMALL_REFERENCE, batch_size=4))


@pytest.mark.parametrize("name", ["reference.jsonl", "reference"])
def test_a_wrapped_module_and_text_without_a_tokenizer_are_an_error_that_names_the_argument(tmp_path, name):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "a.txt").write_text("some text")
    (tmp_path / "reference.jsonl").write_text('{"text": "some text"}')
    with pytest.raises(ValueError, match=r"holds text, .* pass it to .*SelectionDataModule.wrap, as tokenizer="):
        fit(tmp_path, SelectionDataModule.wrap(Existing(), str(tmp_path / name)))


def test_a_column_of_groups_that_changed_is_another_pool():
    def pool(groups):
        rows = [{"input_ids": row, "source": group} for row, group in zip(RAGGED, groups, strict=True)]
        data = open_for_fit(SelectionDataModule(rows, [{"input_ids": [9, 9]}], batch_size=4, groups="source"))
        first = data.pool
        assert open_for_fit(data).pool is first
        return first

    groups = ["web", "book"] * 10
    state = pool(groups).state_dict()
    pool(groups).load_state_dict(state)
    groups[13] = "web"
    with pytest.raises(ValueError, match="the checkpoint was made with pool"):
        pool(groups).load_state_dict(state)


def test_packing_is_for_models_that_keep_packed_examples_apart(store, tmp_path):
    class Hiding(LM):
        def forward(self, input_ids):
            return self.model(input_ids).logits

    def packed():
        return SelectionDataModule(store, ReferenceSet(REFERENCE), batch_size=4, pack_reference=True)

    data = packed()
    fit(tmp_path, data)
    assert any((batch["position_ids"] == 0).sum() > len(batch["id"]) for batch in data.reference())
    with pytest.raises(ValueError, match=r"Hiding.forward takes no position_ids: examples would see each other"):
        fit(tmp_path, packed(), Hiding())
    other = LM()
    other.model.config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"gpt2, gpt_neox, llama do\), but the model is mamba"):
        fit(tmp_path, packed(), other)


@pytest.mark.parametrize(
    "ask", [lambda d: d.pool, lambda d: d.reference(), lambda d: list(d.candidates(torch.arange(1)))]
)
def test_before_setup_the_error_says_what_comes_first(store, ask):
    with pytest.raises(RuntimeError, match=r"setup\('fit'\) has to come first; trainer.fit calls it"):
        ask(SelectionDataModule(store, REFERENCE, batch_size=4))


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_a_plan_published_before_the_loader_exists_is_followed(store):
    data = open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=2))
    data.follow(Plan(0, torch.arange(10, 20), cursor=4))
    assert next(iter(data.train_dataloader()))["id"].tolist() == [14, 15]
    assert data.train_dataloader() is data.train_dataloader()


def test_an_epoch_has_the_examples_that_were_asked_for(store):
    data = open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=2, epoch_examples=31))
    assert len(data.train_dataloader()) == 15
    assert len(open_for_fit(SelectionDataModule(store, REFERENCE, batch_size=2)).train_dataloader()) == len(store) // 2


def test_yaml_says_the_same_as_python(store):
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parsed = parser.parse_object(
        {
            "data": {
                "class_path": "liveselect.datamodules.SelectionDataModule",
                "init_args": {
                    "pool": str(store.path),
                    "reference": {"source": str(store.path), "answer": "last_word", "max_examples": 7},
                    "validation": "some/file.jsonl",
                    "batch_size": 3,
                    "num_workers": 2,
                    "overlap": "drop",
                },
            }
        }
    )
    data = parser.instantiate_classes(parsed).data
    assert data.settings.reference == ReferenceSet(str(store.path), answer="last_word", max_examples=7)
    assert data.settings == ServingSettings(data.settings.reference, 3, validation="some/file.jsonl", overlap="drop")
    assert (data._source, data._num_workers, data.batch_size) == (str(store.path), 2, 3)


def test_yaml_can_wrap_a_datamodule_with_every_setting(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Mine(pl.LightningDataModule):\n"
        "    def __init__(self, colour: str = 'red'):\n        super().__init__()\n        self.colour = colour\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parsed = parser.parse_object(
        {
            "data": {
                "class_path": "liveselect.datamodules.SelectionDataModule.wrap",
                "init_args": {
                    "existing": {"class_path": "my_data.Mine", "init_args": {"colour": "green"}},
                    "reference": {"source": "some/file.jsonl", "max_examples": 7},
                    "overlap": "drop",
                },
            }
        }
    )
    data = parser.instantiate_classes(parsed).data
    assert isinstance(data, WrappingDataModule)
    assert data.wrapped.colour == "green"
    assert data.settings == ServingSettings(ReferenceSet("some/file.jsonl", max_examples=7), overlap="drop")
