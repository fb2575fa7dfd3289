import math

import pytest
import torch

from liveselect.functional.ngram_ratio import count_ngrams, log_ratio, mean_log_ratio

BUCKETS = 2**20  # so many that the few n-grams of a test share none
POOL = torch.tensor([[1, 1, 2, 3], [2, 3, 1, 1]])  # tokens: 1 x 4, 2 x 2, 3 x 2; pairs: 11 x 2, 12, 23 x 2, 31
REFERENCE = torch.tensor([[2, 3, 2]])  # tokens: 2 x 2, 3; pairs: 23, 32


def table(smoothing: float = 10.0) -> torch.Tensor:
    return log_ratio(count_ngrams(REFERENCE, BUCKETS), count_ngrams(POOL, BUCKETS), smoothing)


def test_the_ratio_of_a_row_is_the_one_computed_by_hand():
    def token(count, pool):
        return math.log((count + 10 * pool / 8) / 13 / (pool / 8))

    def pair(count, pool):
        return math.log((count + 10 * pool / 6) / 12 / (pool / 6))

    # 2 3 1: its tokens, and the pairs 23 and 31
    expected = (token(2, 2) + token(1, 2) + token(0, 4) + pair(1, 2) + pair(0, 1)) / 3
    assert mean_log_ratio(torch.tensor([[2, 3, 1]]), None, table()).item() == pytest.approx(expected, rel=1e-5)


def test_a_reference_like_the_pool_and_infinite_smoothing_say_nothing():
    pool = count_ngrams(POOL, BUCKETS)
    assert mean_log_ratio(POOL, None, log_ratio(pool * 7, pool)).abs().max() < 1e-6
    assert mean_log_ratio(POOL, None, table(1e12)).abs().max() < 1e-6
    unseen = mean_log_ratio(torch.tensor([[1, 1, 1]]), None, table())  # only the total of the reference counts
    assert unseen.item() == pytest.approx((3 * math.log(10 / 13) + 2 * math.log(10 / 12)) / 3, rel=1e-5)


def test_counts_add_over_batches_and_tokens_never_meet_pairs():
    assert torch.equal(count_ngrams(POOL, 16), count_ngrams(POOL[:1], 16) + count_ngrams(POOL[1:], 16))
    assert count_ngrams(POOL, 4).sum(dim=1).tolist() == [8, 6]


def test_what_the_mask_hides_neither_counts_nor_is_scored():
    row, mask = torch.tensor([[9, 2, 3, 1, 9]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert torch.equal(count_ngrams(row, 64, mask), count_ngrams(row[:, 1:4], 64))
    assert mean_log_ratio(row, mask, table()).item() == pytest.approx(
        mean_log_ratio(row[:, 1:4], None, table()).item(), rel=1e-6
    )
    assert mean_log_ratio(row, torch.zeros_like(mask), table()).item() == 0


@pytest.mark.parametrize(
    ("reference", "pool", "smoothing", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 8), 1.0, "equal tables"),
        (torch.ones(2, 4), torch.zeros(2, 4), 1.0, "at least one token of the pool"),
        (torch.ones(2, 4), torch.ones(2, 4), 0.0, "smoothing above 0"),
    ],
)
def test_tables_that_give_no_ratio_are_refused(reference, pool, smoothing, message):
    with pytest.raises(ValueError, match=message):
        log_ratio(reference, pool, smoothing)
