"""Estimators on two ranks that hold the whole model (DDP): the numbers and choices of one process.

Other curvatures of K-FAC are compared in ``tests/influence/test_kfac.py``.
"""

import json

import pytest
import torch
from lightning_ranks import batches, fit, on_lightning_ranks
from sampling import chosen, mostly_slow

from liveselect.callbacks import DataSelection
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

ESTIMATORS = {
    "one step, published": lambda: OneStepInfluence(step="published"),
    "central difference": lambda: FirstOrderInfluence("central_difference"),
    "forward mode": lambda: FirstOrderInfluence("forward_mode"),
    "K-FAC": lambda: KFACInfluence(factor_examples=9),
    "PMP by differences": lambda: PMPInfluence(
        3, 2, batch_size=2, hessian="central_difference", products="central_difference"
    ),
}

TEST = "test_two_ranks_measure_choose_and_train_on_what_one_process_does"


def _all(folder, strategy, names) -> dict:
    found = {}
    for name in names:
        selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
        dirpath = folder / str(strategy) / name
        selection = DataSelection(selector, ESTIMATORS[name](), every_n_steps=2, warmup_rounds=1, dirpath=dirpath)
        found[name] = fit(folder, selection, strategy, max_steps=4)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("engines")
    torch.set_num_threads(1)
    names = sorted(name for (name,) in chosen(request, TEST, "name"))
    return json.loads(json.dumps(_all(folder, None, names))), on_lightning_ranks(_all, 2, folder, "ddp", names)


# K-FAC on ranks with the whole model is compared in test_strategies.py, too
@pytest.mark.parametrize(
    "name", mostly_slow([*ESTIMATORS], ["central difference", "forward mode", "PMP by differences"])
)
def test_two_ranks_measure_choose_and_train_on_what_one_process_does(runs, name):
    alone, ranks = runs[0][name], [rank[name] for rank in runs[1]]
    assert batches(ranks) == batches([alone])
    for rank in ranks:
        for (plan, measured, influence), expected in zip(rank["rounds"], alone["rounds"], strict=True):
            assert [plan, measured] == expected[:2]
            torch.testing.assert_close(torch.tensor(influence), torch.tensor(expected[2]), rtol=1e-5, atol=1e-6)
