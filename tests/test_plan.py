import io

import pytest
import torch

from liveselect.plan import Plan


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_ranks_together_see_the_global_batches_of_one_rank(ranks):
    plan = Plan(0, torch.randperm(48, generator=torch.Generator().manual_seed(0)), cursor=12)
    alone = plan.remaining(0, 1, 12)
    shares = [plan.remaining(rank, ranks, 12 // ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares, dim=1), alone)
    assert torch.equal(alone.flatten(), plan.ids[12:])


def test_an_exhausted_plan_has_no_batches():
    plan = Plan(0, torch.arange(8))
    plan.advance(8)
    assert plan.exhausted
    assert plan.remaining(0, 2, 2).shape == (0, 2)


def test_a_batch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="8 ids remain in the plan of round 3, which 3 ranks with batches of 2"):
        Plan(3, torch.arange(8)).remaining(0, 3, 2)


def test_a_plan_cannot_be_consumed_twice():
    plan = Plan(0, torch.arange(4), cursor=3)
    with pytest.raises(ValueError, match="cannot consume 2 more"):
        plan.advance(2)
    assert plan.cursor == 3


def test_a_plan_survives_a_checkpoint():
    plan = Plan(2, torch.tensor([5, 3, 9]), cursor=1)
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    file.seek(0)
    restored = Plan.from_state_dict(torch.load(file, weights_only=True))
    assert (restored.round, restored.cursor, restored.fingerprint) == (2, 1, plan.fingerprint)


def test_the_fingerprint_depends_on_ids_and_order():
    prints = {Plan(0, torch.tensor(ids)).fingerprint for ids in ([1, 2], [2, 1], [1, 3])}
    assert len(prints) == 3
