"""Texts of candidates, and what is marked in them as the reason of their scores."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from liveselect.examples import CHARACTERS_SHOWN, places
from liveselect.functional.ngram_ratio import count_ngrams, log_ratio, mean_log_ratio, token_log_ratios
from liveselect.functional.token_table import TokenTable
from liveselect.regressors import HashedRidgeRegressor

IDS = torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(20) < torch.tensor([20, 20, 3, 1, 0, 12])[:, None]


@pytest.mark.parametrize("mask", [None, MASK])
def test_what_tokens_add_to_a_log_ratio_is_the_log_ratio(mask):
    table = log_ratio(count_ngrams(IDS[:3], 64), count_ngrams(IDS, 64))
    parts = token_log_ratios(IDS, mask, table)
    torch.testing.assert_close(parts.sum(dim=1), mean_log_ratio(IDS, mask, table))
    if mask is not None:
        assert not parts[~mask].any()


@pytest.mark.parametrize("mask", [None, MASK])
def test_what_tokens_add_to_a_mean_of_the_table_is_the_mean(mask):
    table = TokenTable.empty(64)
    table.add(IDS, torch.randn(6, 20, generator=torch.Generator().manual_seed(1)))
    values = table.values(4.0)
    parts = values.parts(IDS, mask)
    torch.testing.assert_close(parts.sum(dim=1), values.mean(IDS, mask))
    assert not parts[:, 0].any()


@pytest.mark.parametrize("mask", [None, MASK])
def test_what_tokens_add_to_a_ridge_s_prediction_is_all_but_its_intercept(mask):
    regressor = HashedRidgeRegressor(buckets=64)
    regressor._weights, regressor._intercept = torch.randn(64, generator=torch.Generator().manual_seed(2)), 0.25
    batch = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    parts = regressor.predict_tokens(None, batch)
    torch.testing.assert_close(parts.sum(dim=1) + 0.25, regressor.predict(None, batch))


TEXT = "A plain start, naïve café, 漢字かな and 👩‍👩‍👧 then more plain words. " * 4


def byte_tokens():
    """A tokenizer whose tokens are parts of characters too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["plain words and more plain words"], trainer)
    return tokenizer


class Decoding:
    """A source that only decodes."""

    def __init__(self, decode):
        self.decode = lambda rows: [decode(row) for row in rows.tolist()]


def test_tokens_that_hold_parts_of_characters_lie_where_the_text_has_them():
    tokenizer = byte_tokens()
    row = torch.tensor(tokenizer.encode(TEXT).ids)
    source, text = Decoding(tokenizer.decode), TEXT[:100]
    ends = places(source, row, text)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    begins = [0, *ends[:-1]]
    for begin, end, token in zip(begins, ends, row.tolist(), strict=False):
        if (alone := tokenizer.decode([token])) and "\ufffd" not in alone:
            assert text[begin:end] == alone[: end - begin]


def test_rows_without_a_tokenizer_have_their_numbers_as_places():
    source = Decoding(lambda row: " ".join(map(str, row)))
    row = torch.tensor([12, 7, 345])
    ends = places(source, row, "12 7 345")
    assert ends == [2, 4, 8]


def test_a_text_that_is_cut_ends_inside_of_a_token():
    source = Decoding(lambda row: "".join("word "[: 5 if token else 1] for token in row))
    text = ("word " * 200)[:CHARACTERS_SHOWN]
    assert places(source, torch.ones(200, dtype=torch.int64), text)[-1] == CHARACTERS_SHOWN
