"""Two ranks, mostly with a model that is sharded over them: checkpoints, and training as without measuring."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import fit, on_lightning_ranks
from sampling import chosen, mostly_slow
from small_run import ProbingUniform

from liveselect.callbacks import DataSelection
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

CHECKPOINTS = [("ddp", "full"), ("fsdp", "sharded"), ("fsdp2", "sharded"), ("fsdp2", "full")]
MIDDLE = 3  # a step inside a round of two
STRATEGIES = ("ddp", "fsdp", "fsdp2")
ESTIMATORS = {  # fsdp knows the first
    "one step": OneStepInfluence,
    "first order": FirstOrderInfluence,
    "K-FAC": lambda: KFACInfluence(factor_examples=9),
}


CASES = [("fsdp", "one step"), ("ddp", "one step"), ("ddp", "K-FAC"), *(("fsdp2", name) for name in ESTIMATORS)]


def trained(folder, strategy, selector, estimator=None, **settings):
    selection = DataSelection(selector, estimator, every_n_steps=2, dirpath=folder / "selection")
    return fit(folder, selection, strategy, **{"dropout": 0.1, "max_steps": 5, **settings})


def by_regression(folder, strategy, **settings):
    selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
    estimator = OneStepInfluence() if strategy == "fsdp" else KFACInfluence(factor_examples=9)
    return trained(folder, strategy, selector, estimator, **settings)


def _checkpointed(folder, strategy, **settings) -> dict:
    saver = ModelCheckpoint(folder, filename="middle", every_n_train_steps=MIDDLE, save_top_k=-1)
    path = folder / "middle.ckpt"
    return {
        "whole": by_regression(folder / "whole", strategy, callbacks=[saver], **settings),
        "resumed": by_regression(folder / "resumed", strategy, ckpt_path=path, **settings),
        "is folder": path.is_dir(),
    }


def _everything(folder, checkpoints, cases) -> dict:
    found = {}
    for strategy in STRATEGIES:
        place = folder / strategy
        precision = {} if strategy == "fsdp" else {"precision": "bf16-mixed"}
        found[strategy] = {
            kind: _checkpointed(place / kind, strategy, whole_checkpoint=kind == "full")
            for where, kind in checkpoints
            if where == strategy
        }
        found[strategy]["off"] = trained(
            place / "off", strategy, UniformSelector(), accumulate_grad_batches=3, **precision
        )
        for name in (name for where, name in cases if where == strategy):
            probing = ProbingUniform()
            run = trained(place / name, strategy, probing, ESTIMATORS[name](), accumulate_grad_batches=3, **precision)
            found[strategy][name] = {**run, "influence": torch.stack(probing.influence).tolist()}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    torch.set_num_threads(1)
    checkpoints = chosen(request, "test_a_run_resumed_inside_a_round_goes_on_bit_by_bit", "strategy", "kind")
    cases = chosen(request, "test_training_with_measuring_equals_training_without", "strategy", "name")
    return on_lightning_ranks(_everything, 2, tmp_path_factory.mktemp("sharded"), sorted(checkpoints), sorted(cases))


# in folders, ddp and fsdp2 are resumed to the bit in test_preempted_ranks.py
@pytest.mark.parametrize(("strategy", "kind"), mostly_slow(CHECKPOINTS, [("fsdp", "sharded"), ("fsdp2", "full")]))
def test_a_run_resumed_inside_a_round_goes_on_bit_by_bit(ranks, strategy, kind):
    for rank in ranks:
        saved = rank[strategy][kind]
        assert saved["is folder"] == (kind == "sharded")
        assert len(saved["whole"]["steps"]) == 5
        assert saved["resumed"]["steps"] == saved["whole"]["steps"][MIDDLE:]
        assert saved["resumed"]["rounds"] == saved["whole"]["rounds"]


@pytest.mark.parametrize(
    ("strategy", "name"), mostly_slow(CASES, [("fsdp", "one step"), ("ddp", "K-FAC"), ("fsdp2", "first order")])
)
def test_training_with_measuring_equals_training_without(ranks, strategy, name):
    for rank in ranks:
        assert rank[strategy][name]["steps"] == rank[strategy]["off"]["steps"]
        influence = torch.tensor(rank[strategy][name]["influence"])
        assert influence.isfinite().all()
        assert influence.std() > 0


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_the_ranks_hold_different_shards(ranks, strategy):
    first, second = (rank[strategy]["off"]["steps"] for rank in ranks)
    assert all(one[2] != other[2] for one, other in zip(first, second, strict=True))
