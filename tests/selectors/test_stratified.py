import pytest
import torch
from fakes import fake_context, random_source

from liveselect.selectors import StratifiedSelector
from liveselect.selectors.stratified import apportioned

GROUPS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def context(**options):
    return fake_context(random_source(candidates=100, groups=GROUPS, group_names=("a", "b", "c")), **options)


def counts(selector, budget, **options):
    ids = selector.select(context(**options).round, budget).ids
    assert len(ids.unique()) == budget
    return torch.bincount(GROUPS[ids], minlength=3).tolist()


def test_every_round_has_the_mixture_of_what_may_be_chosen():
    for index in range(5):
        assert counts(StratifiedSelector(), 20, index=index) == [12, 6, 2]
    assert counts(StratifiedSelector(), 100) == [60, 30, 10]
    assert counts(StratifiedSelector(), 7) == [4, 2, 1]


def test_shares_are_kept_until_a_group_has_no_more():
    assert counts(StratifiedSelector({"a": 1, "b": 1}), 20) == [10, 10, 0]
    assert counts(StratifiedSelector({"a": 0.2, "b": 0.2, "c": 0.6}), 20) == [5, 5, 10]
    left = torch.arange(55, 100)
    assert counts(StratifiedSelector({"a": 1, "b": 1}), 20, candidates=left) == [5, 15, 0]


def test_all_of_a_group_are_equally_likely():
    drawn = torch.zeros(100)
    for seed in range(400):
        drawn[StratifiedSelector().select(context(seed=seed).round, 20).ids] += 1
    assert ((drawn / 400 - 0.2).abs() < 4.5 * (0.2 * 0.8 / 400) ** 0.5).all()


def test_groups_without_a_share_are_never_eligible():
    pool = context().source.pool
    assert torch.equal(StratifiedSelector({"a": 1, "c": 2}).eligible(pool, 10), GROUPS != 1)
    assert StratifiedSelector().eligible(pool, 10) is None


@pytest.mark.parametrize("seed", range(20))
def test_what_is_apportioned_is_all_and_within_one_of_the_proportion(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    limits = torch.randint(0, 40, (7,), generator=generator)
    total = int(limits.sum()) // 2
    found = apportioned(total, weights, limits)
    assert int(found.sum()) == total
    assert bool((found <= limits).all())
    open_ = found < limits  # these have equal quotas for their weights, but for rounding
    quota = (found / weights)[open_]
    assert quota.max() - quota.min() <= (1 / weights[open_]).max() * 2


def test_pools_and_shares_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="positive sum"):
        StratifiedSelector({"a": 0})
    with pytest.raises(ValueError, match=r"groups of the pool, \['a', 'b', 'c'\], got \['d'\]"):
        StratifiedSelector({"d": 1}).check(context().round, 4)
    with pytest.raises(ValueError, match="expected a pool with groups"):
        StratifiedSelector().check(fake_context(random_source()).round, 4)
    with pytest.raises(ValueError, match="at most 10"):
        StratifiedSelector({"c": 1}).select(context().round, 11)
