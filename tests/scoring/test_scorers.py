"""Scores of cheap methods equal what was computed by hand, what other libraries compute, and what their papers say."""

import pickle
from itertools import pairwise

import bm25s
import numpy as np
import pytest
import torch
from rank_bm25 import BM25Okapi
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from liveselect.functional.ngram_ratio import count_ngrams, log_ratio, mean_log_ratio
from liveselect.scoring import BM25, DSIR, EmbeddingSimilarity, NearDuplicates, NgramRatio, SemanticDuplicates
from liveselect.scoring.bm25 import hashed_terms
from liveselect.scoring.ngrams import hashed_words

A, B, C, D = 1, 2, 3, 4
TEXTS = [
    "The cat sat on the mat.",
    "A dog, a cat and a bird!",
    "Stocks fell on Monday; bonds rose.",
    "the mat and the dog on the mat",
    "Rates rose: stocks and bonds fell, and fell again.",
]
QUERIES = ["stocks and bonds", "the market fell"]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def text(texts):
    return {"text": list(texts)}


# ---- BM25 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [([C], [0, 0.7297509, 0]), ([C, A, A], [-0.0607990, 0.6780717, -0.0449384])],
)
def test_bm25_is_the_one_computed_by_hand(query, expected):
    pool = padded([[A, B], [A, C, C], [A, D, D, D]])
    scorer = BM25()
    scorer.fit([padded([query])], [pool])
    assert scorer(pool).tolist() == pytest.approx(expected, abs=1e-6)
    halves = [{name: value[part] for name, value in pool.items()} for part in (slice(0, 1), slice(1, 3))]
    again = BM25()
    again.fit([padded([query])], halves)
    assert torch.equal(torch.cat([again(half) for half in halves]), scorer(pool))


def words(texts):
    from liveselect.scoring.bm25 import _PUNCTUATION

    return [each.lower().translate(_PUNCTUATION).split(" ") for each in texts]


def test_bm25_of_words_is_that_of_rank_bm25_averaged_over_queries():
    scorer = BM25(terms="words")
    scorer.fit([text(QUERIES)], [text(TEXTS)])
    other = BM25Okapi(words(TEXTS))
    expected = np.mean([other.get_scores(query) for query in words(QUERIES)], axis=0)
    np.testing.assert_allclose(scorer(text(TEXTS)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_bm25_in_its_other_form_is_that_of_bm25s():
    scorer = BM25(terms="words", variant="lucene")
    scorer.fit([text(QUERIES)], [text(TEXTS)])
    other = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    other.index(words(TEXTS), show_progress=False)
    expected = np.mean([other.get_scores(query) for query in words(QUERIES)], axis=0)
    np.testing.assert_allclose(scorer(text(TEXTS)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_published_normalisation_keeps_empty_words():
    assert hashed_terms("One,  two\nthree!") == hashed_terms("one  two three")
    assert len(hashed_terms("one  two")) == 3


# ---- n-grams -----------------------------------------------------------------------------------------------------


def test_dsir_hashes_words_into_the_published_buckets():
    assert hashed_words("Data selection") == [1943, 2822, 6152]
    assert hashed_words("hello") == [7620]


@pytest.mark.parametrize("terms", ["words", "ids"])
def test_dsir_weights_are_the_published_sum_of_log_ratios(terms):
    buckets = 10_000 if terms == "words" else 2**14
    ids = {"data": 1, "selection": 2, "hello": 3}
    reference, pool = ["data selection"], ["hello hello", "hello data", "data selection"]

    def rows(texts):
        return text(texts) if terms == "words" else padded([[ids[word] for word in each.split()] for each in texts])

    def grams(each):
        parts = each.split()
        return [*parts, *pairwise(parts)]

    scorer = DSIR(terms, buckets)
    scorer.fit([rows(reference)], [rows(pool)])
    target, raw = ([gram for each in texts for gram in grams(each)] for texts in (reference, pool))
    expected = [
        sum(np.log(target.count(g) / len(target) + 1e-8) - np.log(raw.count(g) / len(raw) + 1e-8) for g in grams(each))
        for each in pool
    ]
    assert scorer(rows(pool)).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_ratio_scorer_is_the_function_over_batches_and_can_be_pickled():
    generator = torch.Generator().manual_seed(0)
    pool, reference = (torch.randint(0, 30, shape, generator=generator) for shape in ((40, 9), (5, 9)))
    scorer = NgramRatio(smoothing=50.0, buckets=2**12)
    scorer.fit([{"input_ids": reference}], [{"input_ids": part} for part in pool.split(7)])
    table = log_ratio(count_ngrams(reference, 2**12), count_ngrams(pool, 2**12), 50.0)
    sent = pickle.loads(pickle.dumps(scorer))
    assert torch.equal(sent({"input_ids": pool}), mean_log_ratio(pool, None, table))


def test_what_processes_counted_in_their_shares_is_added_up():
    pool, reference = {"input_ids": torch.arange(60).view(6, 10) % 7}, {"input_ids": torch.arange(10).view(1, 10) % 3}
    for kind in (NgramRatio, DSIR, BM25):
        whole, shared = kind(buckets=2**10), kind(buckets=2**10)
        whole.fit([reference], [pool, pool])
        shared.fit([reference], [pool], total=lambda counts: 2 * counts)
        assert torch.equal(whole(pool), shared(pool))


# ---- vectors -----------------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_cosine_with_the_reference_examples():
    count = HashingVectorizer(n_features=64, token_pattern=r"\S+", norm=None)

    def embed(tokens):
        return count.transform([" ".join(map(str, row)) for row in tokens.tolist()]).toarray()

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 20, (8, 6), generator=generator)
    reference = padded([[1, 2, 3], [4, 5, 6, 7, 8]])
    scorer = EmbeddingSimilarity(embed)
    scorer.fit([reference], [{"input_ids": rows}])
    vectors = np.concatenate([embed(torch.tensor([[1, 2, 3]])), embed(torch.tensor([[4, 5, 6, 7, 8]]))])
    np.testing.assert_allclose(
        scorer({"input_ids": rows}).numpy(), cosine_similarity(embed(rows), vectors).mean(axis=1), rtol=1e-5
    )


# ---- near-duplicates ---------------------------------------------------------------------------------------------


def test_near_duplicates_of_an_earlier_row_are_never_drawn():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 1000, (60, 200), generator=generator)
    rows[50:] = rows[:10]
    rows[50:, 195:] = 7  # 191 of 200 n-grams are the same
    rows[0] = rows[20]
    scorer = NearDuplicates(threshold=0.8)
    scores = scorer.finished(torch.cat([scorer({"input_ids": part}) for part in rows.split(16)]))
    dropped = torch.isneginf(scores).nonzero()[:, 0].tolist()
    assert dropped == [20, *range(51, 60)]  # row 50 was like the row 0 that was replaced
    assert set(scores.tolist()) == {0.0, -float("inf")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: DSIR("letters"),
        lambda: DSIR(buckets=0),
        lambda: BM25(b=2.0),
        lambda: BM25(buckets=0),
        lambda: NearDuplicates(threshold=2.0),
        lambda: NearDuplicates(permutations=0),
        lambda: NearDuplicates(width=0),
        lambda: SemanticDuplicates(lambda ids: ids.numpy(), threshold=3.0),
        lambda: SemanticDuplicates(lambda ids: ids.numpy(), clusters=0),
    ],
)
def test_settings_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize("scorer", [NgramRatio(), DSIR(), BM25()])
def test_a_scorer_that_was_not_fitted_says_so(scorer):
    with pytest.raises(RuntimeError, match="called before fit"):
        scorer({"input_ids": torch.ones(1, 3, dtype=torch.int64)})
