"""A model whose parameters are sharded over ranks (FSDP2): checkpoints, and training as without measuring."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import batches, fit, on_lightning_ranks
from small_run import ProbingUniform

from liveselect.callbacks import DataSelection
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

MIDDLE = 3  # a step inside a round of two
ESTIMATORS = {
    "one step": OneStepInfluence,
    "first order": FirstOrderInfluence,
    "central difference": lambda: FirstOrderInfluence(engine="central_difference"),
    "K-FAC": lambda: KFACInfluence(factor_examples=9),
}


def trained(folder, selector, estimator=None, **settings):
    selection = DataSelection(selector, estimator, every_n_steps=2, dirpath=folder / "selection")
    return fit(folder, selection, "fsdp2", **{"dropout": 0.1, "max_steps": 5, **settings})


def by_regression(folder, **settings):
    selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
    return trained(folder, selector, KFACInfluence(factor_examples=9), **settings)


def _checkpointed(folder, **settings) -> dict:
    saver = ModelCheckpoint(folder, filename="middle", every_n_train_steps=MIDDLE, save_top_k=-1)
    path = folder / "middle.ckpt"
    return {
        "whole": by_regression(folder / "whole", callbacks=[saver], **settings),
        "resumed": by_regression(folder / "resumed", ckpt_path=path, **settings),
        "is folder": path.is_dir(),
    }


def _everything(folder) -> dict:
    found = {kind: _checkpointed(folder / kind, whole_checkpoint=kind == "full") for kind in ("sharded", "full")}
    found["steady"] = _checkpointed(folder / "steady", dropout=0.0)
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 3}
    found["off"] = trained(folder / "off", UniformSelector(), **settings)
    for name, make in ESTIMATORS.items():
        probing = ProbingUniform()
        found[name] = trained(folder / name, probing, make(), **settings)
        found[name]["influence"] = torch.stack(probing.influence).tolist()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def ranks(folder):
    torch.set_num_threads(1)
    return on_lightning_ranks(_everything, 2, folder)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_run_resumed_inside_a_round_goes_on_bit_by_bit(ranks, kind):
    for rank in ranks:
        saved = rank[kind]
        assert saved["is folder"] == (kind == "sharded")
        assert len(saved["whole"]["steps"]) == 5
        assert saved["resumed"]["steps"] == saved["whole"]["steps"][MIDDLE:]
        assert saved["resumed"]["rounds"] == saved["whole"]["rounds"]


def _on_one_rank(folder) -> dict:
    path = folder / "steady" / "middle.ckpt"
    return by_regression(folder / "one rank", ckpt_path=path, dropout=0.0, ranks=1)


def test_a_sharded_checkpoint_of_two_ranks_goes_on_on_one_with_the_same_choices(ranks, folder):
    (alone,) = on_lightning_ranks(_on_one_rank, 1, folder)
    both = [rank["steady"]["whole"] for rank in ranks]
    assert batches([alone]) == batches(both)[MIDDLE:]
    assert [plan for plan, *_ in alone["rounds"]] == [plan for plan, *_ in both[0]["rounds"]]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_with_measuring_equals_training_without(ranks, name):
    for rank in ranks:
        assert rank[name]["steps"] == rank["off"]["steps"]
        influence = torch.tensor(rank[name]["influence"])
        assert influence.isfinite().all()
        assert influence.std() > 0


def test_the_ranks_hold_different_shards(ranks):
    first, second = (rank["off"]["steps"] for rank in ranks)
    assert all(one[2] != other[2] for one, other in zip(first, second, strict=True))
