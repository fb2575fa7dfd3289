"""A reference set says the same whatever form it comes in, and only what should count counts."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.auto import AutoModelForCausalLM

from liveselect.datamodules.batching import Item, bucket, pack
from liveselect.datamodules.pools.encoding import encode_answers
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.pools.tokens import write_store
from liveselect.datamodules.reference import ReferenceSet, load_reference, loader_batches
from liveselect.grammar import IGNORE_INDEX, SelectionWarning
from liveselect.losses import causal_lm_loss, target_counts

torch.set_num_threads(1)

TEXTS = [f"the {animal} by the river said good morning to the {other}" for animal in ("fox", "hen", "old wolf")
         for other in ("goose", "lamb", "hedgehog")]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, 320)


def counted_text(tokenizer, item):
    """The text of the tokens that carry loss."""
    return tokenizer.decode(item.input_ids[item.labels != IGNORE_INDEX])


def texts(tokenizer, loaded):
    return [tokenizer.decode(item.input_ids) for item in loaded.items]


# ---- forms ---------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["jsonl", "jsonl.gz", "parquet", "text folder", "dataset", "dicts", "ids", "pool"]
)
def same_set(request, tokenizer, tmp_path_factory):
    """TEXTS in one of the forms that a reference set may have."""
    folder = tmp_path_factory.mktemp("reference")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    if request.param == "jsonl":
        (folder / "a.jsonl").write_text(lines)
        return str(folder / "a.jsonl")
    if request.param == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        return str(folder / "a.jsonl.gz")
    if request.param == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
        return folder / "a.parquet"
    if request.param == "text folder":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
        return folder
    if request.param == "pool":  # blocks of one length only: each text is cut to the shortest
        shortest = min(len(row["input_ids"]) for row in rows)
        blocks = [row["input_ids"][:shortest] for row in rows]
        return write_store(folder / "pool", blocks, block_size=shortest, vocab_size=320).path
    return {"dataset": datasets.Dataset.from_dict({"text": TEXTS}), "dicts": [{"text": text} for text in TEXTS]}.get(
        request.param, rows
    )


def test_every_form_gives_the_same_examples(same_set, tokenizer):
    loaded = load_reference(ReferenceSet.of(same_set), tokenizer)
    expected = load_reference(ReferenceSet(TEXTS), tokenizer)
    assert len(loaded.items) == len(TEXTS)
    for item, other in zip(loaded.items, expected.items, strict=True):
        assert item.input_ids.tolist() == other.input_ids[: len(item)].tolist()
        assert (item.labels == item.input_ids).all()


def test_of_text_every_token_counts(tokenizer):
    loaded = load_reference(ReferenceSet(TEXTS), tokenizer)
    assert [counted_text(tokenizer, item) for item in loaded.items] == TEXTS == texts(tokenizer, loaded)


def test_columns_of_other_names_can_be_named(tokenizer):
    loaded = load_reference(ReferenceSet([{"content": "good morning"}], columns={"text": "content"}), tokenizer)
    assert texts(tokenizer, loaded) == ["good morning"]


def test_labels_and_masks_of_ready_ids_are_kept():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [0, 8, 9], "attention_mask": [0, 1, 1]}]
    first, second = load_reference(ReferenceSet(rows)).items
    assert first.labels.tolist() == [-100, -100, 7]
    assert second.input_ids.tolist() == second.labels.tolist() == [8, 9]


# ---- answers -------------------------------------------------------------------------------------------------------

PAIRS = [
    ("the fox by the river said", " good morning"),
    ("the fox by the river said ", "good morning"),
    ("the fox by the river said\n", "\n good morning"),
    ("the fox by the ri", "ver said"),
    ("naïve café 東京 said", " good 東京"),
    ("   the fox", "  said   good"),
    ("the fox said good", "."),
]


@pytest.mark.filterwarnings("ignore:prompts and answers join")
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_only_the_answer_counts_and_no_text_is_lost(tokenizer, prompt, answer):
    (encoded,) = encode_answers(tokenizer, [(prompt, answer)])
    assert tokenizer.decode(encoded.input_ids) == prompt + answer
    assert tokenizer.decode(encoded.input_ids[encoded.counts]).strip() == answer.strip()
    assert not encoded.counts[: len(encoded.counts) - encoded.counts.sum()].any()  # the answer stands at the end


@pytest.mark.parametrize("split", [("the fox said", " good morning"), ("the fox said ", "good morning")])
def test_white_space_at_the_border_is_read_as_in_running_text(tokenizer, split):
    (encoded,) = encode_answers(tokenizer, [split])
    assert encoded.input_ids.tolist() == tokenizer("the fox said good morning")["input_ids"]
    assert encoded.counts.sum() == len(tokenizer(" good morning")["input_ids"])


@pytest.mark.filterwarnings("ignore:prompts and answers join")
def test_no_token_mixes_letters_of_prompt_and_answer(tokenizer):
    whole = tokenizer("the river")["input_ids"]
    (encoded,) = encode_answers(tokenizer, [("the ri", "ver")])
    assert len(encoded.input_ids) > len(whole)
    assert tokenizer.decode(encoded.input_ids[encoded.counts]) == "ver"


class WithoutOffsets:
    """A tokenizer that knows no character offsets, as those written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, return_offsets_mapping=None, **settings):
        assert return_offsets_mapping is None
        return self.tokenizer(texts, **settings)


@pytest.mark.filterwarnings("ignore:prompts and answers join")
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_a_tokenizer_without_offsets_counts_the_same_text(tokenizer, prompt, answer):
    (encoded,) = encode_answers(WithoutOffsets(tokenizer), [(prompt, answer)])
    assert tokenizer.decode(encoded.input_ids) == prompt + answer
    assert tokenizer.decode(encoded.input_ids[encoded.counts]).strip() == answer.strip()


def test_words_that_are_glued_together_are_warned_of(tokenizer):
    with pytest.warns(SelectionWarning, match="join without a space, as in 'the fox saidgood'.*separator=' '"):
        load_reference(ReferenceSet([{"prompt": "the fox said", "answer": "good"}]), tokenizer)
    loaded = load_reference(ReferenceSet([{"prompt": "the fox said", "answer": "good"}], separator=" "), tokenizer)
    assert texts(tokenizer, loaded) == ["the fox said good"]


@pytest.mark.parametrize("text", ["the hen said good morning", "the hen said good  morning \n"])
def test_the_last_word_is_the_answer(tokenizer, text):
    (item,) = load_reference(ReferenceSet([text], answer="last_word"), tokenizer).items
    assert counted_text(tokenizer, item).strip() == "morning"
    assert tokenizer.decode(item.input_ids) == text.rstrip()


# ---- lengths and draws ---------------------------------------------------------------------------------------------


def test_of_a_long_prompt_the_end_is_kept(tokenizer):
    prompt = " ".join(TEXTS)
    (item,) = load_reference(ReferenceSet([{"prompt": prompt, "answer": " good"}]), tokenizer, max_length=10).items
    assert len(item) == 10
    assert counted_text(tokenizer, item) == " good"
    assert (prompt + " good").endswith(tokenizer.decode(item.input_ids))


def test_a_long_text_is_cut_and_all_of_it_is_kept(tokenizer):
    text = " ".join(TEXTS)
    loaded = load_reference(ReferenceSet([text, TEXTS[0]]), tokenizer, max_length=10)
    pieces = [item for item in loaded.items if item.record == 0]
    assert "".join(tokenizer.decode(item.input_ids) for item in pieces) == text
    assert max(map(len, loaded.items)) == 10


def test_the_reference_set_may_be_longer_than_the_blocks_of_the_pool(tokenizer):
    (item,) = load_reference(ReferenceSet([" ".join(TEXTS)], max_length=5000), tokenizer, max_length=10).items
    assert len(item) > 10


def test_examples_are_drawn_by_the_seed_alone(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for source in (TEXTS, str(path)):
        draws = [
            texts(tokenizer, load_reference(ReferenceSet(source, max_examples=3, seed=seed), tokenizer))
            for seed in (0, 0, *range(1, 30))
        ]
        assert draws[0] == draws[1]
        assert {len(set(draw)) for draw in draws} == {3}
        assert set().union(*draws) == set(TEXTS)
        assert all(draw == sorted(draw, key=TEXTS.index) for draw in draws)  # in their order


def test_max_examples_counts_the_pieces_of_a_long_text(tokenizer):
    reference = ReferenceSet([" ".join(TEXTS)], max_examples=2)
    assert len(load_reference(reference, tokenizer, max_length=10).items) == 2


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        ([], {}, ValueError, "the reference set is empty: list has no rows"),
        (["", "a"], {}, ValueError, "the reference set is empty: of its 2 records none has a token that could count"),
        (["word"], {"answer": "last_word"}, ValueError, "an answer needs a prompt before it"),
        ([{"txt": "a"}], {}, ValueError, r"record 0 .* to have 'text', .* got the columns \['txt'\]: name yours"),
        ([{"text": 3}], {}, TypeError, "expected text in column 'text' of record 0 .* got int"),
        ([3], {}, TypeError, "expected record 0 .* as a string or a dict, got int"),
        (iter(["a b"]), {}, TypeError, "expected the reference set as a map-style dataset .* got list_iterator"),
        ("no/such/file.jsonl", {}, ValueError, "no such file or folder: 'no/such/file.jsonl'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_reference_set_is_said(tokenizer, source, settings, error, message):
    with pytest.raises(error, match=message):
        load_reference(ReferenceSet(source, **settings), tokenizer)


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"holds text, but the tokenizer that made the pool is not known.*SelectionDataModule.wrap, as tokenizer=",
    ):
        load_reference(ReferenceSet(TEXTS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": "first"}, "expected answer='all' or 'last_word', got 'first'"),
        ({"max_examples": 0}, "expected max_examples of at least 1, got 0"),
        ({"max_length": 1}, "expected max_length of at least 2, got 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        ReferenceSet(TEXTS, **settings)


def test_records_without_a_target_are_counted(tokenizer):
    loaded = load_reference(ReferenceSet(["", TEXTS[0], "a"]), tokenizer)
    assert (len(loaded.items), loaded.left_out, loaded.items[0].record) == (1, 2, 1)


def test_a_shuffling_data_loader_is_refused():
    rows = [{"input_ids": torch.tensor([1, 2])}] * 4
    with pytest.raises(ValueError, match=r"shuffles.*shuffle=False"):
        loader_batches(DataLoader(rows, batch_size=2, shuffle=True))
    with pytest.raises(ValueError, match="empty"):
        loader_batches(DataLoader([], batch_size=2))
    assert len(loader_batches(DataLoader(rows, batch_size=2))) == 2


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TEXTS)

    with pytest.raises(TypeError, match=r"map-style dataset .* got Stream.*into a list, list\(stream\)"):
        load_reference(ReferenceSet(Stream()))


# ---- batches -------------------------------------------------------------------------------------------------------


def random_items(seed, count=40, longest=30, vocab=90):
    rng = np.random.default_rng(seed)
    items = []
    for record in range(count):
        ids = rng.integers(0, vocab, rng.integers(2, longest + 1))
        labels = np.where(rng.random(len(ids)) < 0.5, ids, IGNORE_INDEX)
        labels[-1] = ids[-1]
        items.append(Item(ids, labels, record))
    return items


@pytest.mark.parametrize("budget", [1, 40, 100, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_bucketed_batches_hold_every_item_once_within_the_budget(seed, budget):
    items = random_items(seed)
    batches = bucket(items, budget, pad_id=3)
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(len(items)))
    for batch in batches:
        width = batch["input_ids"].shape[1]
        assert len(batch["id"]) * width <= budget or len(batch["id"]) == 1
        for i, tokens, labels in zip(batch["id"], batch["input_ids"], batch["labels"], strict=True):
            item = items[int(i)]
            assert tokens.tolist() == item.input_ids.tolist() + [3] * (width - len(item))
            assert labels.tolist() == item.labels.tolist() + [IGNORE_INDEX] * (width - len(item))
            assert len(item) >= 7 / 8 * width
    assert batches[0]["input_ids"].shape[1] == max(map(len, items))  # the largest first: too much shows at once


@pytest.mark.parametrize("budget", [30, 90, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_packed_batches_hold_every_item_once_with_its_own_positions(seed, budget):
    items = random_items(seed)
    batches = pack(items, 30, budget)
    found = []
    for batch in batches:
        assert len(batch["id"]) <= max(1, budget // 30)
        for tokens, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                assert positions[start:end].tolist() == list(range(end - start))
                assert labels[start] == IGNORE_INDEX
                if (labels[start:end] != IGNORE_INDEX).any():
                    found.append((tokens[start:end].tolist(), labels[start + 1 : end].tolist()))
    assert sorted(found) == sorted((item.input_ids.tolist(), item.labels[1:].tolist()) for item in items)
    assert torch.equal(torch.cat([batch["id"] for batch in batches]), torch.arange(sum(len(b["id"]) for b in batches)))


MODELS = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ),
    "llama": LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    ),
    "gpt2": GPT2Config(
        vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    ),
}  # fmt: skip


def total_loss(model, batches):
    """Sum of the losses of all targets, and their number; float64 all the way."""
    losses = [(causal_lm_loss(model, batch).double() * target_counts(batch)).sum() for batch in batches]
    return float(sum(losses)), int(sum(target_counts(batch).sum() for batch in batches))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_packed_bucketed_and_single_items_have_the_same_loss(kind, attention):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - the weights
        model = AutoModelForCausalLM.from_config(MODELS[kind], attn_implementation=attention, dtype=torch.float64)
    model.eval()
    items = random_items(0)
    single, count = total_loss(model, [batch for item in items for batch in bucket([item], 1)])
    for batches in (bucket(items, 100), pack(items, 64, 200)):
        loss, targets = total_loss(model, batches)
        assert targets == count == sum(item.targets for item in items)
        assert loss == pytest.approx(single, rel=1e-9)
    seen = [
        {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]} for batch in pack(items, 64, 200)
    ]
    assert abs(total_loss(model, seen)[0] - single) > 1e-6 * single  # without its positions each sees those before it


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (
            {"input_ids": [1.5, 2.0]},
            TypeError,
            "input_ids of record 0 of the reference set .* as integers, got float64",
        ),
        ({"input_ids": [3, -1, 4]}, ValueError, "record 0 .* token ids of 0 or more, got -1: .*in labels, by -100"),
        ({"input_ids": [3, 4, 5], "labels": [3, -1, 5]}, ValueError, "to be its input_ids, or -100 .*, got -1"),
        ({"input_ids": [3, 4, 5], "labels": [4, 5, -100]}, ValueError, "losses shift labels themselves"),
        ({"input_ids": [3, 4, 5], "attention_mask": [1]}, ValueError, "attention_mask of record 0 .* 3 entries, got"),
    ],
)
def test_ready_ids_that_cannot_be_are_refused(record, error, message):
    with pytest.raises(error, match=message):
        load_reference(ReferenceSet([record]))


def test_an_answer_that_is_glued_to_its_prompt_gets_no_invented_space():
    letters = {letter: i for i, letter in enumerate(["<unk>", "▁", *"newto"])}
    letters |= {"wt": 7}  # a token of both
    made = Tokenizer(models.BPE(letters, [("w", "t")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    (encoded,) = encode_answers(tokenizer, [("new", "ton")])
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()) == ["▁", *"new", *"ton"]
    assert encoded.counts.tolist() == [False] * 4 + [True] * 3


def test_records_may_name_their_subtask_and_then_all_must():
    records = [{"input_ids": [1, 2, 3], "subject": name} for name in ("law", "art", "law")]
    loaded = load_reference(ReferenceSet(records, columns={"subtask": "subject"}))
    assert [item.subtask for item in loaded.items] == [0, 1, 0]
    (batch,) = bucket(loaded.items, 100)
    assert batch["subtask"].tolist() == [0, 1, 0]
    assert "subtask" not in bucket(load_reference(ReferenceSet(records)).items, 100)[0]
    named = [{"input_ids": [1, 2], "subtask": 3}]
    assert not load_reference(ReferenceSet(named)).remarks
    bare = [{"input_ids": [1, 2]}]
    for mixed in (named + bare, bare + named):
        with pytest.raises(ValueError, match="name all or none"):
            load_reference(ReferenceSet(mixed))
    with pytest.raises(ValueError, match="has no effect"):
        load_reference(ReferenceSet(bare, columns={"subtask": "subject"}))
