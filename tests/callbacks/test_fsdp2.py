"""Selection with a model whose parameters are sharded over two ranks (FSDP2)."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import fit, on_lightning_ranks
from small_run import ProbingUniform

from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

MIDDLE = 3  # a step inside a round of two


def regression():
    return RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)


def _checkpointed(folder, ranks, whole):
    saver = ModelCheckpoint(folder, filename="middle", every_n_train_steps=MIDDLE, save_top_k=-1)
    settings = {"whole_checkpoint": whole, "dropout": 0.1}
    seen, _, _ = fit(folder, ranks, regression(), OneStepInfluence(), callbacks=[saver], max_steps=5, **settings)
    path = folder / "middle.ckpt"
    resumed, _, _ = fit(
        folder / "resumed", ranks, regression(), OneStepInfluence(), ckpt_path=path, max_steps=5, **settings
    )
    return {"whole": seen, "resumed": resumed, "is folder": path.is_dir()}


def _everything(ranks, folder):
    found = {}
    found["steps"], found["rounds"], _ = fit(folder / "run", ranks, regression(), OneStepInfluence())
    found["sharded checkpoint"] = _checkpointed(folder / "sharded", ranks, False)
    found["full checkpoint"] = _checkpointed(folder / "full", ranks, True)
    settings = {"dropout": 0.1, "precision": "bf16-mixed", "accumulate_grad_batches": 3, "max_steps": 5}
    probing = ProbingUniform()
    found["on"], _, _ = fit(folder / "on", ranks, probing, OneStepInfluence(), **settings)
    found["off"], _, _ = fit(folder / "off", ranks, UniformSelector(), **settings)
    found["influence"] = torch.stack(probing.influence).tolist()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    torch.set_num_threads(1)
    return fit(folder / "one", 1, regression(), OneStepInfluence())[:2], on_lightning_ranks(_everything, 2, folder)


def test_both_ranks_hold_the_same_plans_and_measurements(runs):
    _, (first, second) = runs
    assert first["rounds"] == second["rounds"]


def test_sharded_ranks_choose_and_train_on_what_one_process_does(runs):
    (steps, rounds), (first, second) = runs
    for (plan, measured, influence), (plan2, measured2, influence2) in zip(rounds, first["rounds"], strict=True):
        assert plan == plan2
        assert measured == measured2
        torch.testing.assert_close(torch.tensor(influence), torch.tensor(influence2), rtol=1e-3, atol=1e-4)
    together = [a[1] + b[1] for a, b in zip(first["steps"], second["steps"], strict=True)]
    assert together == [ids for _, ids, _ in steps]


@pytest.mark.parametrize("kind", ["sharded checkpoint", "full checkpoint"])
def test_a_run_resumed_inside_a_round_goes_on_bit_by_bit(runs, kind):
    for rank in runs[1]:
        saved = rank[kind]
        assert saved["is folder"] == (kind == "sharded checkpoint")
        assert len(saved["whole"]) == 5
        assert saved["resumed"] == saved["whole"][MIDDLE:]


def test_training_with_measuring_equals_training_without(runs):
    for rank in runs[1]:
        assert rank["on"] == rank["off"]
        assert torch.tensor(rank["influence"]).std() > 0


def test_the_ranks_train_on_different_shards(runs):
    _, (first, second) = runs
    assert json.dumps(first["steps"]) != json.dumps(second["steps"])
