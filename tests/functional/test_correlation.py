import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from liveselect.functional.correlation import spearman

few_values = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=40)


@given(few_values, st.sampled_from([torch.float32, torch.float64, torch.int64]))
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_spearman_is_that_of_scipy_with_many_ties(pairs, dtype):
    a, b = torch.tensor(pairs).to(dtype).unbind(1)
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("values", [2, 100, 40_000])
def test_many_equal_values_among_eighty_thousand_keep_size_and_sign(values):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, values, (80_000,), generator=generator)
    b = (a + values * torch.rand(80_000, generator=generator)).round()
    assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)


def test_only_order_counts_and_equal_order_is_exactly_one():
    a = torch.randn(200, generator=torch.Generator().manual_seed(0))
    assert spearman(a, a.exp()) == pytest.approx(1.0, abs=1e-15)
    assert spearman(a, -(a.double() ** 3)) == pytest.approx(-1.0, abs=1e-15)
    assert spearman(torch.tensor([1.0, 2.0, math.inf]), torch.tensor([-math.inf, 0.0, 1.0])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0], [2.0, 3.0]),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        ([1.0, 2.0, math.nan, 4.0], [1.0, 2.0, 3.0, 4.0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_where_it_says_nothing_it_is_nan_without_a_warning(a, b):
    assert math.isnan(spearman(torch.tensor(a), torch.tensor(b)))


def test_samples_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"samples \(n,\) of equal length, got \(3,\) and \(4,\)"):
        spearman(torch.ones(3), torch.ones(4))
