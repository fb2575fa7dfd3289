"""Data and tokenizers of other libraries: litgpt, litdata, MDS, tiktoken, SentencePiece."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cases import VOCABULARY
from small_run import SmallLM, rows
from torch.utils.data import DataLoader

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule, write_store
from liveselect.datamodules.checks import check_tokenizer
from liveselect.datamodules.opening import open_source, open_tokenizer
from liveselect.datamodules.pools.foreign_tokenizers import adapted
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.reference import ReferenceSet, load_reference
from liveselect.datamodules.rows.by_position import ByPosition
from liveselect.datamodules.rows.rows import DatasetRows, StoreRows
from liveselect.grammar import IGNORE_INDEX, SelectionWarning
from liveselect.selectors import UniformSelector

TEXTS = [f"the {animal} by the river said good morning to the {other}" for animal in ("fox", "hen", "old wolf")
         for other in ("goose", "lamb", "hedgehog")] * 3  # fmt: skip


@pytest.fixture(scope="module")
def own():
    return train_bpe(TEXTS, 300)


class LikeLitgpt:
    """Encodes to tensors and puts a first token before them unless it is told not to, as litgpt's does."""

    bos_id, eos_id = 0, 0

    def __init__(self, own):
        self._own = own

    @property
    def vocab_size(self):
        return len(self._own)

    def encode(self, string, device=None, bos=True, eos=False, max_length=-1):
        ids = self._own(string, add_special_tokens=False)["input_ids"]
        return torch.tensor([self.bos_id] * bos + ids + [self.eos_id] * eos)

    def decode(self, tensor):
        return self._own.decode(tensor.tolist())


class LikeTiktoken:
    """Refuses special tokens in a text unless it is asked for the ordinary ones, as tiktoken's does."""

    n_vocab, eot_token = 300, 0

    def __init__(self, own):
        self._own = own

    def encode(self, text):
        raise AssertionError("encode_ordinary is meant for text")

    def encode_ordinary(self, text):
        return self._own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, tokens):
        assert isinstance(tokens, list)
        return self._own.decode(tokens)


KINDS = [LikeLitgpt, LikeTiktoken, lambda own: own.backend_tokenizer]


@pytest.fixture(scope="module")
def pool(own):
    return DatasetRows([{"input_ids": own(text)["input_ids"]} for text in TEXTS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_tokenizer_makes_the_same_reference(kind, own, pool):
    records = [
        {"text": TEXTS[0]},
        {"prompt": "the fox by the", "answer": " river said"},
        {"prompt": "the\n", "answer": "hen"},
    ]
    foreign = open_tokenizer(kind(own), pool)
    for one, other in zip(*(load_reference(ReferenceSet(records), t, 64).items for t in (own, foreign)), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
    assert foreign.batch_decode([own(TEXTS[1])["input_ids"]], skip_special_tokens=True) == [TEXTS[1]]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_foreign_tokenizer_of_other_ids_is_refused_where_it_is_passed(kind, own, pool, tmp_path):
    other = train_bpe(["completely different words are merged elsewhere"] * 9, 290)
    with pytest.raises(ValueError, match="does not look like the one that made the pool"):
        open_tokenizer(kind(other), pool)
    store = write_store(tmp_path / "pool", np.resize([own(" ".join(TEXTS))["input_ids"]], (8, 32)), block_size=32,
                        vocab_size=300, tokenizer=own)  # fmt: skip
    check_tokenizer(adapted(kind(own)), StoreRows(store), "tokenizer=")
    with pytest.raises(ValueError, match="not the tokenizer that"):
        check_tokenizer(adapted(kind(other)), StoreRows(store), "tokenizer=")
    with pytest.raises(TypeError, match="one that encodes and decodes"):
        open_tokenizer(object(), pool)


class Module(pl.LightningDataModule):
    def __init__(self, dataset, tokenizer):
        super().__init__()
        self.dataset, self.tokenizer = dataset, tokenizer

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=4)


def opened(data):
    data.trainer = None
    data.setup("fit")
    return data.served.opened


def test_the_foreign_tokenizer_of_a_wrapped_module_is_used_or_left_alone(own):
    texts = [(own(text)["input_ids"] * 2)[:12] for text in TEXTS]
    module = Module([{"input_ids": torch.tensor(ids)} for ids in texts], LikeLitgpt(own))
    reference = [{"text": "a text that nobody has seen by the river"}]
    assert opened(SelectionDataModule.wrap(module, reference)).tokenizer.name == "LikeLitgpt"
    module.tokenizer = LikeLitgpt(train_bpe(["completely different words are merged elsewhere"] * 9, 290))
    with pytest.warns(SelectionWarning, match="is left alone"):
        assert opened(SelectionDataModule.wrap(module, [{"input_ids": [1, 2, 3]}])).tokenizer is None
    with (
        pytest.warns(SelectionWarning, match="pass the one that made the ids"),
        pytest.raises(ValueError, match="holds text"),
    ):
        opened(SelectionDataModule.wrap(module, reference))
    module.tokenizer = object()
    with pytest.warns(SelectionWarning, match="is left alone"):
        assert opened(SelectionDataModule.wrap(module, [{"input_ids": [1, 2, 3]}])).tokenizer is None


def test_tiktokens_own_encoding_is_adapted():
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})  # fmt: skip
    pool = DatasetRows([{"input_ids": encoding.encode(text)} for text in TEXTS])
    loaded = load_reference(
        ReferenceSet([{"prompt": "the fox", "answer": " ran<|endoftext|>"}]), open_tokenizer(encoding, pool)
    )
    assert bytes(loaded.items[0].input_ids[loaded.items[0].labels != IGNORE_INDEX].tolist()) == b" ran<|endoftext|>"


def test_sentencepieces_own_processor_is_adapted(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=model, vocab_size=60, hard_vocab_limit=False, minloglevel=9
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=model + ".model")
    pool = DatasetRows([{"input_ids": processor.encode(text)} for text in TEXTS])
    loaded = load_reference(
        ReferenceSet([{"prompt": "the fox by", "answer": " the river"}]), open_tokenizer(processor, pool)
    )
    (item,) = loaded.items
    assert item.input_ids.tolist() == processor.encode("the fox by the river")
    assert processor.decode(item.input_ids[item.labels != IGNORE_INDEX].tolist()) == "the river"


# ---- streams of other libraries --------------------------------------------------------------------------------------

TABLE = torch.randint(1, VOCABULARY, (40, 12), generator=torch.Generator().manual_seed(3), dtype=torch.int32)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """TABLE as litdata's optimized chunks of tokens."""
    pytest.importorskip("litdata")
    from litdata.streaming import Cache
    from litdata.streaming.item_loader import TokensLoader

    folder = tmp_path_factory.mktemp("chunks")
    cache = Cache(str(folder), chunk_size=12 * 16, item_loader=TokensLoader(block_size=12))
    for i, row in enumerate(TABLE):
        cache[i] = row
    cache.done()
    cache.merge()
    return folder


def streamed(chunks, **settings):
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    return litdata.StreamingDataset(str(chunks), item_loader=TokensLoader(block_size=12), **settings)


@pytest.mark.parametrize("shuffle", [False, True])
def test_litdatas_chunks_are_a_pool_in_their_order(chunks, shuffle):
    found = open_source(streamed(chunks, shuffle=shuffle), None)
    assert found.fingerprint == DatasetRows(TABLE).fingerprint
    assert found.candidates([39, 0, 17])["input_ids"].tolist() == TABLE[[39, 0, 17]].tolist()


def test_of_litdata_every_rank_sees_all_rows(chunks):
    dataset = streamed(chunks)
    dataset.distributed_env.world_size, dataset.distributed_env.global_rank = 2, 1
    assert len(dataset) < 40
    assert len(ByPosition(dataset)) == 40
    assert (dataset.distributed_env.world_size, len(dataset) < 40) == (2, True)


class OfTokens(SmallLM):
    """Trains on bare rows, as litgpt's pretraining does."""

    def training_step(self, batch, batch_index):
        tokens = batch.long()
        logits = self.model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(module, data, folder):
    trainer = pl.Trainer(
        max_steps=4, callbacks=[DataSelection(UniformSelector(), every_n_steps=2)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer.global_step


def test_litgpts_module_of_chunks_trains(chunks, tmp_path, recwarn):
    data = pytest.importorskip("litgpt.data")
    module = data.LitData(data_path=chunks, num_workers=0)
    module.connect(LikeLitgpt(None), batch_size=4, max_seq_length=11)
    assert trained(OfTokens(), SelectionDataModule.wrap(module, rows(6, seed=50)), tmp_path) == 4
    assert not [str(w.message) for w in recwarn if w.category is SelectionWarning]


def test_litgpts_module_of_instructions_trains_with_its_own_tokenizer(own, tmp_path):
    data = pytest.importorskip("litgpt.data")
    records = [{"instruction": text, "input": "", "output": f"number {i}"} for i, text in enumerate(TEXTS)]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    module = data.JSON(tmp_path / "sft.json", val_split_fraction=0.1, num_workers=0)
    module.connect(LikeLitgpt(own), batch_size=4, max_seq_length=64)

    class OfInstructions(SmallLM):
        def __init__(self):
            super().__init__()
            from cases import tiny_neox

            self.model = tiny_neox(vocab_size=300, max_position_embeddings=64)

    assert (
        trained(OfInstructions(), SelectionDataModule.wrap(module, [{"text": "nobody has seen this text"}]), tmp_path)
        == 4
    )


def test_mosaics_shards_are_a_pool_by_the_name_of_their_column(tmp_path):
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns={"tokens": "ndarray:uint16:12"}) as writer:
        for row in TABLE:
            writer.write({"tokens": row.numpy().astype(np.uint16)})
    dataset = streaming.StreamingDataset(local=str(tmp_path / "mds"), shuffle=False, batch_size=4)
    assert open_source(dataset, None, {"input_ids": "tokens"}).fingerprint == DatasetRows(TABLE).fingerprint
