"""The plan is what is trained on: in its order, on every number of workers and ranks, across swaps and resumes."""

import multiprocessing
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from plan_following import POOL, LoaderModule, PublishPlans, Remembering, Rows, global_batches, trainer_for

from liveselect.datamodules.loader import PlanLoader, ShardedBatches, candidate_batches, epoch_length
from liveselect.datamodules.rows.rows import DatasetRows
from liveselect.plan import Plan

torch.set_num_threads(1)


def loader_of(plan=None, batch_size=4, length=100, workers=0, dataset=None, **ranks):
    loader = PlanLoader(dataset or Rows(), batch_size, length, **ranks, options={"num_workers": workers})
    if plan is not None:
        loader.follow(plan)
    return loader


def plan_of(*ids, cursor=0, index=0):
    return Plan(index, torch.tensor(ids), cursor)


def ids_of(batch):
    return batch["id"].tolist()


# ---- walking a plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_plan_in_its_order(workers):
    ids = torch.randperm(POOL)[:24]
    loader = loader_of(Plan(0, ids), workers=workers)
    batches = iter(loader)
    assert [ids_of(next(batches)) for _ in range(6)] == ids.view(6, 4).tolist()
    loader.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plan_that_replaces_another_in_mid_walk_is_served_at_once(workers):
    first, second = Plan(0, torch.arange(40)), Plan(1, torch.arange(63, 43, -1), cursor=8)
    loader = loader_of(first, workers=workers)
    batches = iter(loader)
    assert ids_of(next(batches)) == [0, 1, 2, 3]  # by now the workers hold the next batches
    loader.follow(second)
    assert [ids_of(next(batches)) for _ in range(3)] == second.ids[8:].view(3, 4).tolist()
    loader.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_iterator_serves_again_what_was_fetched_but_not_trained_on(workers):
    plan = Plan(0, torch.arange(40))
    loader = loader_of(plan, workers=workers)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    plan.advance(8)
    assert ids_of(next(iter(loader))) == [8, 9, 10, 11]
    loader.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_iterator_at_the_cursor_goes_on_where_the_last_one_stopped(workers):
    plan = Plan(0, torch.arange(40))
    loader = loader_of(plan, length=5, workers=workers)
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append(ids_of(batch))
            plan.advance(4)
    assert seen == plan.ids.view(10, 4).tolist()
    loader.shutdown()


def test_an_iterator_ends_after_one_epoch():
    assert len(list(loader_of(Plan(0, torch.arange(40)), length=3))) == len(loader_of(length=3)) == 3


def test_nothing_is_decided_before_the_first_batch_is_asked_for():
    loader = loader_of()
    batches = iter(loader)
    loader.follow(plan_of(7, 8, 9, 10))
    assert ids_of(next(batches)) == [7, 8, 9, 10]


def test_without_a_plan_the_error_names_the_callback():
    with pytest.raises(RuntimeError, match="no plan to train on: add DataSelection"):
        next(iter(loader_of()))


def test_a_plan_at_its_end_without_a_successor_is_an_error():
    batches = iter(loader_of(plan_of(1, 2, 3, 4)))
    next(batches)
    with pytest.raises(RuntimeError, match=r"plan of round 0 was walked to its end \(4 examples\).*DataSelection"):
        next(batches)


def test_a_cursor_that_runs_ahead_of_the_batches_is_an_error():
    plan = Plan(0, torch.arange(40))
    batches = iter(loader_of(plan))
    next(batches)
    plan.advance(8)
    with pytest.raises(RuntimeError, match=r"stands at 8, but only 4 examples were served: advance it by 4"):
        next(batches)


def test_a_plan_that_the_ranks_cannot_share_is_refused_when_it_is_published():
    with pytest.raises(ValueError, match="cannot share evenly"):
        loader_of(Plan(0, torch.arange(12)), world_size=2)


def test_iterating_moves_no_global_random_state():
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    for workers in (0, 2):
        loader = loader_of(Plan(0, torch.arange(40)), workers=workers)
        before = states()
        batches = iter(loader)
        next(batches)
        loader.follow(Plan(1, torch.arange(40)))
        next(batches)
        after = states()
        loader.shutdown()
        assert torch.equal(before[0], after[0])
        assert (before[1] == after[1]).all()
        assert before[2] == after[2]


class WhoLoaded(Rows):
    def __getitem__(self, row):
        return os.getpid()


def test_the_workers_outlive_plans_and_end_at_shutdown():
    def children():
        return {child.pid for child in multiprocessing.active_children()}

    before = children()
    loader = loader_of(Plan(0, torch.arange(16)), dataset=WhoLoaded(), workers=2)
    batches = iter(loader)
    first = {pid for _ in range(4) for pid in next(batches).tolist()}
    loader.follow(Plan(1, torch.arange(16)))
    assert {pid for _ in range(4) for pid in next(batches).tolist()} == first == children() - before
    loader.shutdown()
    assert children() == before
    loader.follow(Plan(2, torch.arange(16)))
    assert not {*next(iter(loader)).tolist()} & first  # a second fit starts workers of its own
    loader.shutdown()


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_together_see_the_global_batches_of_one(ranks):
    plan = Plan(0, torch.randperm(60))
    iterators = [iter(loader_of(plan, batch_size=12 // ranks, rank=rank, world_size=ranks)) for rank in range(ranks)]
    together = [[i for batches in iterators for i in ids_of(next(batches))] for _ in range(5)]
    assert together == plan.ids.view(5, 12).tolist()


class Writing(Remembering):
    """Writes its ids to a file, since forked ranks cannot return them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.ids, self.folder / f"rank{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_two_gloo_ranks_train_on_the_global_batches_of_one(tmp_path, workers):
    trainer = trainer_for(
        tmp_path,
        devices=2,
        max_steps=5,
        accumulate_grad_batches=2,
        callbacks=[PublishPlans(2)],
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
    )
    trainer.fit(Writing(tmp_path), datamodule=LoaderModule(batch_size=2, workers=workers))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    alone, publisher = Remembering(), PublishPlans(2)
    trainer_for(tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[publisher]).fit(
        alone, datamodule=LoaderModule(batch_size=4)
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.ids


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (5, 1), (5, 2), (6, 3), (2, 4)])
def test_shares_of_ready_batches_are_equally_long_and_cover_all(count, ranks):
    batches = list(range(count))
    shares = [list(ShardedBatches(batches, rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(ShardedBatches(batches, 0, ranks))} == {-(-count // ranks)}
    assert set().union(*shares) == set(batches)
    in_order = [share[step] for step in range(len(shares[0])) for share in shares]
    assert in_order[:count] == batches


# ---- in a Lightning run --------------------------------------------------------------------------------------------


def run(folder, workers=0, checkpoint=None, every=None, at_epoch_end=False, **settings):
    """Train with dropout from another random state each time a run begins anew."""
    callbacks = [PublishPlans(2)]
    if every or at_epoch_end:
        when = (
            {"every_n_epochs": 1, "save_on_train_epoch_end": True} if at_epoch_end else {"every_n_train_steps": every}
        )
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when))
    torch.random.set_rng_state(torch.Generator().manual_seed(1 if checkpoint is None else 99).get_state())
    module = Remembering()
    trainer = trainer_for(
        folder, callbacks=callbacks, accumulate_grad_batches=3, enable_checkpointing=len(callbacks) > 1, **settings
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        # 12 batches, 4 optimizer steps: every second round begins inside an epoch
        trainer.fit(module, datamodule=LoaderModule(epoch_examples=50, workers=workers), ckpt_path=checkpoint)
    return module, callbacks[0], trainer


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_several_epochs_trains_on_its_plans(tmp_path, workers):
    module, publisher, trainer = run(tmp_path, workers, max_epochs=3)
    assert module.ids == global_batches(publisher.published, 36, 4)
    assert module.steps == [step for step in range(12) for _ in range(3)]
    assert trainer.current_epoch == 3
    assert multiprocessing.active_children() == []


LIMITS = [{"max_epochs": 3}, {"max_steps": 10, "max_epochs": -1}, {"max_steps": 10, "max_epochs": 3}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("when", [{"every": 1}, {"at_epoch_end": True}], ids=["at every step", "at epoch ends"])
def test_a_resumed_run_has_the_same_batches_steps_and_weights(tmp_path, limits, when):
    whole, _, whole_trainer = run(tmp_path / "whole", **when, **limits)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        resumed, _, trainer = run(tmp_path / checkpoint.stem, checkpoint=checkpoint, **limits)
        start = len(whole.ids) - len(resumed.ids)
        assert resumed.ids == whole.ids[start:], checkpoint
        assert resumed.steps == whole.steps[start:], checkpoint
        assert torch.equal(weights(resumed), weights(whole)), checkpoint
        if resumed.ids:
            assert trainer.current_epoch == whole_trainer.current_epoch


def test_a_resumed_run_with_workers_has_the_same_batches_and_weights(tmp_path):
    whole, *_ = run(tmp_path / "whole", every=3, max_epochs=3)
    for checkpoint in sorted((tmp_path / "whole").glob("*.ckpt")):
        resumed, *_ = run(tmp_path / checkpoint.stem, workers=2, checkpoint=checkpoint, max_epochs=3)
        assert resumed.ids == whole.ids[len(whole.ids) - len(resumed.ids) :]
        assert torch.equal(weights(resumed), weights(whole))


# ---- lengths and candidates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_is_the_longest_that_ends_with_an_accumulation_window(accumulate):
    for examples in range(8 * accumulate, 100):
        length = epoch_length(examples, 8, accumulate)
        assert length % accumulate == 0
        assert length * 8 <= examples < (length + accumulate) * 8


def test_an_epoch_below_one_optimizer_step_is_refused():
    with pytest.raises(ValueError, match=r"23 examples is less than one optimizer step of 24 examples .*enlarge"):
        epoch_length(23, 8, 3)


class Echo:
    source = None

    def candidates(self, ids):
        return {"id": torch.tensor(ids), "process": os.getpid()}


def test_candidates_come_in_their_order_whoever_loads_them():
    ids = torch.randperm(200)
    state = torch.get_rng_state()
    alone = list(candidate_batches(Echo(), ids, 8, {}))
    helped = list(candidate_batches(Echo(), ids, 8, {"num_workers": 2}))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([batch["id"] for batch in helped]), ids)
    assert torch.equal(torch.cat([batch["id"] for batch in alone]), ids)
    assert {batch["process"] for batch in alone} == {os.getpid()}
    assert os.getpid() not in {batch["process"] for batch in helped}


def test_no_workers_are_started_for_a_few_candidates():
    (batch,) = candidate_batches(Echo(), torch.arange(5), 8, {"num_workers": 2})
    assert batch["process"] == os.getpid()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "dataset",
    [Rows(), DatasetRows([{"input_ids": [i, i + 1]} for i in range(POOL)])],
    ids=["made by workers", "made here"],
)
def test_batches_are_pinned_for_a_gpu(workers, dataset):
    plan = Plan(0, torch.arange(40))
    loader = PlanLoader(dataset, 4, 10, pin_memory=True, options={"num_workers": workers})
    loader.follow(plan)
    batches = iter(loader)
    assert all(tensor.is_pinned() for _ in range(3) for tensor in next(batches).values())
    loader.follow(Plan(1, torch.arange(63, 43, -1)))
    assert next(batches)["id"].tolist() == [63, 62, 61, 60]
    loader.shutdown()
