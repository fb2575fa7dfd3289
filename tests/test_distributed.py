"""Collectives on real processes over gloo."""

import pytest
import torch
from ranks import on_ranks

from liveselect import distributed


@pytest.mark.parametrize("total", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_partition_the_rows_in_order(total, ranks):
    rows = torch.arange(total)
    parts = [rows[distributed.shard(total, rank, ranks)] for rank in range(ranks)]
    assert torch.cat(parts).tolist() == rows.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _gather(total: int) -> list:
    rows = torch.arange(total * 2.0).view(total, 2)
    return distributed.gather_shards(rows[distributed.shard(total)], total).tolist()


@pytest.mark.parametrize("total", [1, 5, 6])
def test_uneven_shards_come_back_whole_on_every_rank(total):
    expected = torch.arange(total * 2.0).view(total, 2).tolist()
    assert on_ranks(_gather, 2, total) == [expected, expected]


def _agree(differ: bool) -> str:
    value = torch.tensor([1, 2, 3 + (differ and distributed.rank())])
    distributed.check_agreement("the plan of round 7", value)
    return "agreed"


def test_ranks_that_agree_go_on_and_ranks_that_differ_all_fail_naming_the_odd_one():
    assert on_ranks(_agree, 2, False) == ["agreed", "agreed"]
    for error in on_ranks(_agree, 2, True):
        assert isinstance(error, RuntimeError)
        assert "ranks disagree about the plan of round 7" in str(error)
        assert "ranks [1]" in str(error)


def _a_round() -> tuple:
    from fakes import play
    from test_rounds import TokenSum, a_run

    run, source = a_run(estimator=TokenSum())
    plan = play(run, 5)
    record = run.ledger.rounds[0]
    return plan.ids.tolist(), record.measured, record.influence, source.read


def test_a_round_on_two_ranks_decides_as_on_one_and_shares_the_work():
    *alone, read_alone = _a_round()
    (*first, read_first), (*second, read_second) = on_ranks(_a_round, 2)
    assert first == second == alone
    shown = len(first[0]) + 6 + 1  # every rank decodes the examples of the record, and checks its state on a row
    assert max(read_first, read_second) < read_alone <= read_first + read_second <= read_alone + shown


def test_a_single_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_objects("x") == ["x"]
    distributed.check_agreement("anything", torch.arange(3))


def _sum_at() -> list:
    value = torch.full((3,), 10.0 ** distributed.rank())
    return [distributed.sum_at(value, 1).tolist(), value.tolist()]


def test_a_sum_arrives_at_its_owner_and_leaves_the_values_alone():
    first, second = on_ranks(_sum_at, 2)
    assert first == [[1.0] * 3, [1.0] * 3]
    assert second == [[11.0] * 3, [10.0] * 3]


def _copy_from() -> list:
    value = torch.arange(6, dtype=torch.float64).view(2, 3) if distributed.rank() == 1 else None
    turned = torch.arange(4.0).view(2, 2).t() if distributed.rank() == 1 else None
    return [distributed.copy_from(value, 1).tolist(), distributed.copy_from(turned, 1).tolist()]


def test_what_one_rank_owns_reaches_all_of_them():
    expected = [torch.arange(6, dtype=torch.float64).view(2, 3).tolist(), [[0.0, 2.0], [1.0, 3.0]]]
    assert on_ranks(_copy_from, 2) == [expected, expected]


def _sums_of_turned() -> list:
    value = torch.arange(4.0).view(2, 2)
    value = value if distributed.rank() == 0 else value.t().contiguous().t()  # the same entries, columns first
    return [distributed.sum_over_ranks(value).tolist(), distributed.sum_at(value, 0).tolist()]


def test_sums_are_over_entries_whatever_their_order_in_memory():
    assert on_ranks(_sums_of_turned, 2)[0] == [[[0.0, 2.0], [4.0, 6.0]]] * 2


def test_one_process_keeps_what_it_sums_and_copies():
    value = torch.arange(3.0)
    assert distributed.sum_at(value, 0) is value
    assert distributed.copy_from(value, 0) is value
    with pytest.raises(ValueError, match="rank 0 owns a tensor that it does not pass"):
        distributed.copy_from(None, 0)
