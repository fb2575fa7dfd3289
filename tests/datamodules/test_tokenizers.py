"""What a pool keeps of a tokenizer gives the tokens that the tokenizer itself gives."""

import os

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from liveselect.datamodules.pools import tokenizers as module
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.tokenizers import (
    END_OF_TEXT,
    Encoder,
    end_of_text_id,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    train_bpe,
    vocabulary_size,
)

TEXTS = ["The quick brown fox\n\tjumps over 12 lazy dogs.", "Übergröße, 漢字 and 😀!", "", "  spaces   inside  "]


def words_with_everything_on():
    """A tokenizer that would add special tokens, truncate and pad, which a pool does not want."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "quick", "brown", "fox", "dogs"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]"
    )


@pytest.mark.parametrize("make", [lambda: train_bpe(TEXTS * 3, 320), words_with_everything_on])
def test_the_encoder_gives_the_tokens_of_the_tokenizer_and_nothing_more(tmp_path, make):
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    expected = tokenizer(TEXTS, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(tmp_path / "tokenizer")(TEXTS)] == expected
    assert sum(map(len, expected)) > 0


def test_a_long_text_is_encoded_in_pieces_as_if_it_were_whole(tmp_path, monkeypatch):
    tokenizer = train_bpe(TEXTS * 3, 320)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    encoder = Encoder(tmp_path / "tokenizer")
    long = "\n".join(TEXTS) * 300
    (whole,) = encoder([long])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 5000)
    long_enough = encoder([long, "x"])
    assert long_enough[0].tolist() == whole.tolist()
    assert [len(ids) for ids in long_enough[1:]] == [1]


def like_sentencepiece(prefix):
    """A tokenizer that puts a space before every text: by its normalizer (Llama 2) or pre-tokenizer (T5)."""
    letters = {letter: i for i, letter in enumerate(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    merges = [("a", "b"), ("▁", "a"), ("b", "c"), ("c", "a")]
    letters |= {one + other: len(letters) + i for i, (one, other) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(letters, merges, unk_token="<unk>"))
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("prefix", ["normalizer", "pre_tokenizer"])
@pytest.mark.parametrize("text", ["abc" * 3000, "abc bca cab " * 700, "a" * 2500 + " " * 600 + "bc" * 2500])
def test_no_space_is_invented_where_a_long_text_is_cut(tmp_path, monkeypatch, prefix, text):
    save_tokenizer(like_sentencepiece(prefix), tmp_path / "tokenizer")
    encoder = Encoder(tmp_path / "tokenizer")
    (whole,) = encoder([text])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1024)
    assert encoder([text])[0].tolist() == whole.tolist()


def test_a_word_that_is_one_token_from_end_to_end_is_not_cut(tmp_path, monkeypatch):
    save_tokenizer(words_with_everything_on(), tmp_path / "tokenizer")
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    encoder = Encoder(tmp_path / "tokenizer")
    assert encoder(["x" * 1000])[0].tolist() == [0]


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (ids,) = Encoder(tmp_path / "tokenizer")([f"a{END_OF_TEXT}b"])
    assert end_of_text_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_training_twice_gives_the_same_tokenizer_and_decodes_what_it_encodes():
    one, two = (train_bpe(TEXTS * 5, 310) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) == vocabulary_size(one) == 310
    for text in TEXTS:
        assert one.decode(one(text)["input_ids"]) == text
    assert vocabulary_size(train_bpe(["a"], 5000)) < 5000


def test_the_vocabulary_reaches_to_the_largest_id_over_gaps():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a"))
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == 901


def test_a_trained_tokenizer_is_trained_once_for_the_same_text(tmp_path, monkeypatch):
    said = []
    sample = lambda characters: ["some words and some more"]  # noqa: E731
    path, _ = make_tokenizer("bpe:300", tmp_path, sample, said.append)
    again, tokenizer = make_tokenizer("bpe:300", tmp_path, sample, said.append)
    assert path == again
    assert len(said) == 1
    other, _ = make_tokenizer("bpe:300", tmp_path, lambda characters: ["other words"], said.append)
    assert other != path
    assert len(said) == 2
    assert tokenizer.eos_token == END_OF_TEXT


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
    save_tokenizer(train_bpe(TEXTS, 300), tmp_path / "tokenizer")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    Encoder(tmp_path / "tokenizer")(TEXTS)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    Encoder(tmp_path / "tokenizer")(TEXTS)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"the tokenizer '.*' could not be loaded .* or train one on the sources with bpe:N"
    ):
        load_tokenizer(tmp_path)
