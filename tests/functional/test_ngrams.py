import itertools
import math
from collections import Counter

import pytest
import torch

from liveselect.functional.ngrams import hashed_ngrams


def dense(input_ids, buckets, mask=None):
    bucket, weight = hashed_ngrams(input_ids, buckets, mask)
    return torch.zeros(len(input_ids), buckets).scatter_add_(1, bucket, weight)


def test_a_row_is_the_normalised_log_count_of_its_tokens_and_pairs():
    row = [3, 7, 3, 7, 3, 9]
    counts = Counter([(t,) for t in row] + list(itertools.pairwise(row)))
    norm = math.sqrt(sum(math.log1p(c) ** 2 for c in counts.values()))
    expected = sorted(math.log1p(c) / norm for c in counts.values())
    features = dense(torch.tensor([row]), 2**20)  # so many buckets that none is shared
    assert features[features > 0].sort().values.tolist() == pytest.approx(expected, rel=1e-6)


def test_features_have_unit_norm_and_depend_on_order_only_through_pairs():
    row = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    assert dense(row, 2**16).norm().item() == pytest.approx(1.0, rel=1e-6)
    back = row.flip(1)
    assert not torch.equal(dense(row, 2**16), dense(back, 2**16))
    single = torch.tensor([[5]])
    assert dense(single, 2**8).count_nonzero() == 1


def test_what_the_mask_hides_does_not_count():
    row = torch.tensor([[4, 8, 15, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert torch.equal(dense(row, 2**12, mask), dense(row[:, :3], 2**12))
    assert torch.equal(dense(row.flip(1), 2**12, mask.flip(1)), dense(row[:, :3].flip(1), 2**12))
    assert dense(row, 2**12, torch.zeros_like(mask)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_the_integer_type_of_the_tokens_does_not_matter(dtype):
    row = torch.randint(0, 30_000, (2, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(dense(row.to(dtype), 2**12), dense(row, 2**12))


@pytest.mark.parametrize("buckets", [2**8, 2**14])
def test_consecutive_tokens_and_pairs_fall_evenly_into_all_buckets(buckets):
    tokens = torch.arange(50_000).view(1, -1)
    bucket, _ = hashed_ngrams(tokens, buckets)
    assert bucket.min() >= 0
    assert bucket.max() < buckets
    for part in (bucket[:, :50_000], bucket[:, 50_000:]):
        loads = torch.bincount(part.flatten(), minlength=buckets).double()
        # random buckets have a variance equal to the mean; multiplicative hashing of a sequence spreads more evenly
        assert loads.var() < 1.5 * loads.mean()


@pytest.mark.parametrize("buckets", [0, 1, 3, 1000, -8])
def test_only_powers_of_two_are_taken(buckets):
    with pytest.raises(ValueError, match="power of two"):
        hashed_ngrams(torch.zeros(1, 2, dtype=torch.int64), buckets)
