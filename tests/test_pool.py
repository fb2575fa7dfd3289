import io

import pytest
import torch

from liveselect.pool import CandidatePool


def test_every_candidate_is_available_once_before_any_is_available_twice():
    pool = CandidatePool(10, "a")
    seen: list[int] = []
    for _ in range(4):
        ids = pool.available(5)[:5]
        pool.record_use(ids)
        seen += ids.tolist()
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen) == sorted(list(range(10)) * 2)


def test_repeats_are_admitted_only_when_too_few_candidates_are_left():
    pool = CandidatePool(10, "a")
    pool.record_use(torch.arange(7))
    assert pool.available(3).tolist() == [7, 8, 9]
    assert pool.available(4).tolist() == list(range(10))


def test_a_round_larger_than_the_pool_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"needs 11 distinct candidates but the pool holds 10.*every_n_steps"):
        CandidatePool(10, "a").available(11)


def test_a_second_pass_over_the_eligible_begins_while_others_were_never_used():
    pool = CandidatePool(10, "a")
    eligible = torch.arange(10) < 6
    seen: list[int] = []
    for _ in range(4):
        ids = pool.available(3, eligible)[:3]
        pool.record_use(ids)
        seen += ids.tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    pool.record_use(torch.arange(4))
    assert pool.available(2, eligible).tolist() == [4, 5]
    assert pool.available(3, eligible).tolist() == list(range(6))


def test_a_round_larger_than_what_is_eligible_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"needs 4 .* the pool holds 10, of which 3 may be chosen .*more groups"):
        CandidatePool(10, "a").available(4, torch.arange(10) < 3)


def test_group_counts_partition_the_ids():
    pool = CandidatePool(6, "a", torch.tensor([0, 1, 2, 0, 1, 2]), ["x", "y", "z"])
    assert pool.group_counts(torch.tensor([0, 3, 4])) == {"x": 2, "y": 1, "z": 0}
    assert CandidatePool(3, "a").group_counts(torch.arange(2)) == {"pool": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "at least one candidate"),
        ({"size": 3, "groups": torch.zeros(2, dtype=torch.int64), "group_names": ["a"]}, "one group for each of the 3"),
        ({"size": 2, "groups": torch.tensor([0, 1]), "group_names": ["a"]}, "a name for every group code 0..1"),
    ],
)
def test_impossible_pools_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CandidatePool(fingerprint="a", **arguments)


def test_uses_survive_a_checkpoint_and_another_pool_is_refused():
    pool = CandidatePool(4, "a")
    pool.record_use(torch.tensor([1, 2]))
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    restored = CandidatePool(4, "a")
    restored.load_state_dict(state)
    assert torch.equal(restored.uses, pool.uses)
    with pytest.raises(ValueError, match="made with pool 'a' but this run was given pool 'b'"):
        CandidatePool(4, "b").load_state_dict(state)


def test_uses_are_counted_beyond_sixteen_bits_also_from_an_older_checkpoint():
    pool = CandidatePool(2, "a")
    pool.load_state_dict({"fingerprint": "a", "uses": torch.full((2,), 2**15 - 1, dtype=torch.int16)})
    pool.record_use(torch.tensor([1]))
    assert pool.uses.tolist() == [2**15 - 1, 2**15]
    assert pool.available(1).tolist() == [0]
