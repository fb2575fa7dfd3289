"""A run that is resumed on another number of ranks goes on with the same candidates: none lost, none repeated."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import batches, fit, on_lightning_ranks
from sampling import chosen, mostly_slow

from liveselect.callbacks import DataSelection
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

GLOBAL_BATCH, STEPS, MIDDLE = 6, 5, 3  # the checkpoint lies inside a round of two steps
STRATEGIES = ("fsdp", "fsdp2")  # ddp is tested in test_ddp.py
ALONE = ("fsdp2",)  # one rank has nothing to share, and torch's FSDP1 then leaves whole parameters
PAIRS = [(2, 1), (1, 2), (2, 3)]
CASES = [(*pair, strategy) for pair in PAIRS for strategy in (STRATEGIES if min(pair) > 1 else ALONE)]
TEST = "test_a_run_goes_on_on_another_number_of_ranks_with_the_same_candidates"


def _trained(folder, strategy, ranks, ckpt_path=None, callbacks=()) -> dict:
    selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
    selection = DataSelection(selector, OneStepInfluence(), every_n_steps=2, dirpath=folder / "selection")
    settings = {"ranks": ranks, "batch": GLOBAL_BATCH, "max_steps": STEPS, "callbacks": [*callbacks]}
    return fit(folder, selection, strategy, ckpt_path=ckpt_path, **settings)


def _whole(folder, ranks, strategies) -> dict:
    found = {}
    for strategy in strategies:
        place = folder / f"{strategy}-{ranks}"
        saver = ModelCheckpoint(place, filename="middle", every_n_train_steps=MIDDLE, save_top_k=-1)
        found[strategy] = _trained(place, strategy, ranks, callbacks=[saver])
    return found


def _resumed(folder, first, then, strategies) -> dict:
    return {
        strategy: _trained(
            folder / f"{strategy}-{first}-{then}", strategy, then, folder / f"{strategy}-{first}" / "middle.ckpt"
        )
        for strategy in strategies
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("elastic")
    torch.set_num_threads(1)
    asked = chosen(request, TEST, "first", "then", "strategy")
    whole, resumed = {}, {}
    for ranks in (1, 2):
        if strategies := sorted({strategy for first, _, strategy in asked if first == ranks}):
            whole[ranks] = on_lightning_ranks(_whole, ranks, folder, ranks, strategies)
    for pair in PAIRS:
        if strategies := sorted(strategy for *each, strategy in asked if tuple(each) == pair):
            resumed[pair] = on_lightning_ranks(_resumed, pair[1], folder, *pair, strategies)
    return whole, resumed


@pytest.mark.parametrize(("first", "then", "strategy"), mostly_slow(CASES, [(2, 1, "fsdp2"), (2, 3, "fsdp")]))
def test_a_run_goes_on_on_another_number_of_ranks_with_the_same_candidates(runs, first, then, strategy):
    whole = [rank[strategy] for rank in runs[0][first]]
    resumed = [rank[strategy] for rank in runs[1][first, then]]
    assert batches(resumed) == batches(whole)[MIDDLE:]
    for rank in resumed:
        for (plan, measured, influence), expected in zip(rank["rounds"], whole[0]["rounds"], strict=True):
            assert [plan, measured] == expected[:2]
            torch.testing.assert_close(torch.tensor(influence), torch.tensor(expected[2]), rtol=1e-5, atol=1e-6)
