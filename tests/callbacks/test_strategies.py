"""Every method under every strategy on two ranks: the numbers and the choices of one process."""

import json
import re

import pytest
import torch
from lightning_ranks import batches, data_of, fit, on_lightning_ranks
from sampling import chosen, mostly_slow
from small_run import POOL
from tiny_encoder import TINY, tiny_regressor

from liveselect.callbacks import PDS, DataSelection, LivePDS, Quad
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.scores import write_scores
from liveselect.selectors import RegressionSelector, UniformSelector

STRATEGIES = ("ddp", "fsdp", "fsdp2")
PULLS = {"pulls": 2, "at_once": 2, "probes": 3, "controls": 5, "arms": 2, "warmup_rounds": 1}


def by_regression(estimator, regressor=HashedRidgeRegressor, **settings):
    selector = RegressionSelector(regressor(), probes=13, ratio=0.5, min_spearman=None)
    return lambda **common: DataSelection(selector, estimator, **settings, **common)


def steady_encoder():
    # what it drops depends on the rank
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_regressor(encoder={**TINY, **still}, epochs=2, dropout=0.0)


def pds(**common):
    estimator = PMPInfluence(steps=2, score_every=1, hessian="central_difference")
    return LivePDS(estimator=estimator, regressor=HashedRidgeRegressor(), probes=9, min_spearman=None, **common)


def quad(**settings):
    return lambda **common: Quad(estimator=KFACInfluence(factor_examples=9), **PULLS, **settings, **common)


def methods():
    return {
        "uniform": lambda **common: DataSelection(UniformSelector(), **common),
        "one step, ridge": by_regression(OneStepInfluence(step="in_batch")),
        "one step, between training steps": by_regression(OneStepInfluence(), probes_between_steps=4),
        "first order, encoder": by_regression(FirstOrderInfluence(), steady_encoder),
        "optimizer steps, ridge": by_regression(FirstOrderInfluence(engine="optimizer_step")),
        "Quad": quad(),
        "Quad that does not listen": quad(overhear=False),
        "ready scores": lambda **common: PDS(str(common["dirpath"].parents[1] / "scores"), **common),
        "PDS on the live model": pds,
    }


METHODS = list(methods())
REFUSED = {
    ("PDS on the live model", "fsdp"): "PMPInfluence .*fully_shard .*, or measure with OneStepInfluence",
    ("first order, encoder", "fsdp"): "FirstOrderInfluence .*fully_shard .*, or measure with OneStepInfluence",
    ("optimizer steps, ridge", "fsdp"): "FirstOrderInfluence .*fully_shard .*, or measure with OneStepInfluence",
    ("Quad", "fsdp"): "KFACInfluence .*fully_shard .*, or measure with OneStepInfluence",
    ("Quad that does not listen", "fsdp"): "KFACInfluence .*fully_shard .*, or measure with OneStepInfluence",
}


def _run(folder, strategy, method) -> dict:
    selection = methods()[method](every_n_steps=2, dirpath=folder / str(strategy) / method)
    return fit(folder, selection, strategy, max_steps=6 if "Quad" in method or "between" in method else 4)


CASES = [(method, strategy) for method in METHODS for strategy in STRATEGIES if (method, strategy) not in REFUSED]
SAMPLE = [  # every method, and every strategy with what it does in a way of its own
    ("uniform", "fsdp"),
    ("one step, ridge", "fsdp"),
    ("one step, ridge", "fsdp2"),
    ("one step, between training steps", "ddp"),
    ("first order, encoder", "fsdp2"),
    ("optimizer steps, ridge", "fsdp2"),
    ("Quad", "ddp"),
    ("Quad", "fsdp2"),
    ("Quad that does not listen", "fsdp2"),
    ("ready scores", "ddp"),
    ("PDS on the live model", "fsdp2"),
]
TEST = "test_two_ranks_measure_choose_and_train_on_what_one_process_does"


def _all(folder, cases) -> list:
    """The runs of this rank, by strategy and method; what was raised where one is refused."""
    found = []
    for method, strategy in cases:
        try:
            found.append([strategy, method, _run(folder, strategy, method)])
        except TypeError as error:
            found.append([strategy, method, str(error)])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("strategies")
    torch.set_num_threads(1)
    data = data_of(1)
    data.setup("fit")
    write_scores(folder / "scores", torch.arange(POOL).float(), data.pool.fingerprint, {})
    alone = {method: _run(folder, None, method) for method in METHODS}
    cases = sorted(chosen(request, TEST, "method", "strategy") | set(REFUSED))
    ranks = [{(s, m): run for s, m, run in found} for found in on_lightning_ranks(_all, 2, folder, cases)]
    return json.loads(json.dumps(alone)), ranks


@pytest.mark.parametrize(("method", "strategy"), mostly_slow(CASES, SAMPLE))
def test_two_ranks_measure_choose_and_train_on_what_one_process_does(runs, method, strategy):
    alone, ranks = [runs[0][method]], [rank[strategy, method] for rank in runs[1]]
    if "between" in method:  # which candidate is measured after which step depends on the number of ranks
        alone = [rank["ddp", method] for rank in runs[1]]
    assert ranks[0]["rounds"] == ranks[1]["rounds"]
    assert batches(ranks) == batches(alone)
    for expected, found in zip(alone[0]["rounds"], ranks[0]["rounds"], strict=True):
        assert found[:2] == expected[:2]  # the plan, and what was measured
        torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(expected[2]), rtol=1e-5, atol=1e-6)


def test_every_method_that_measures_did_so_and_quad_listened(runs):
    for method, run in runs[0].items():
        measured = sum(len(ids) for _, ids, _ in run["rounds"])
        assert (measured > 0) == (method not in ("uniform", "ready scores"))
    on_ranks = [
        run for rank in runs[1] for (strategy, method), run in rank.items() if method == "Quad" and strategy != "fsdp"
    ]
    for found in (runs[0]["Quad"], *on_ranks):
        assert found["metrics"][-1]["arms/overheard"] > 0


@pytest.mark.parametrize(("method", "strategy"), REFUSED)
def test_what_a_strategy_cannot_do_is_refused_before_training_with_what_to_use_instead(runs, method, strategy):
    for rank in runs[1]:
        assert re.search(REFUSED[method, strategy], rank[strategy, method])
