"""Any estimator drives any selector that measures, made in Python or from YAML."""

import pytest
import torch
import yaml
from fakes import FakeSource, play, random_source
from probing import VOCAB, warm_context

from liveselect.callbacks import DataSelection
from liveselect.cli.fit import SelectionCLI
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import MixtureSelector, PriorSelector, RegressionSelector, UCBSelector, UniformSelector

torch.set_num_threads(1)
CANDIDATES, BUDGET = 40, 8
ESTIMATORS = {
    "one step, published": (OneStepInfluence, {"step": "published"}),
    "one step, in batch": (OneStepInfluence, {"step": "in_batch"}),
    "hooks": (FirstOrderInfluence, {"engine": "hooks", "sampled": 2}),
    "central difference": (FirstOrderInfluence, {"engine": "central_difference", "sampled": 2}),
    "forward mode": (FirstOrderInfluence, {"engine": "forward_mode", "sampled": 2}),
    "optimizer step": (FirstOrderInfluence, {"engine": "optimizer_step"}),
    "kfac": (KFACInfluence, {"factor_examples": 8}),
    "ekfac": (KFACInfluence, {"curvature": "ekfac", "factor_examples": 8}),
    "pmp": (PMPInfluence, {"steps": 2, "batch_size": 4}),
}
REGRESSION = {"probes": 10, "ratio": 0.5, "min_spearman": None}
ARMS = {"pulls": 2, "at_once": 2, "probes": 3, "controls": 4, "arms": 2}


def selector_of(kind):
    if kind == "arms":
        return UCBSelector(**ARMS)
    if kind == "mixture":
        return MixtureSelector(probes=10)
    regression = RegressionSelector(HashedRidgeRegressor(2**6), **REGRESSION)
    return regression if kind == "regression" else PriorSelector(regression, torch.arange(float(CANDIDATES)), 0.6)


def in_yaml(kind):
    """The same selector, as a file writes it."""
    if kind == "arms":
        return {"class_path": "liveselect.selectors.UCBSelector", "init_args": ARMS}
    regressor = {"class_path": "liveselect.regressors.HashedRidgeRegressor", "init_args": {"buckets": 2**6}}
    return {
        "class_path": "liveselect.selectors.RegressionSelector",
        "init_args": {"regressor": regressor, **REGRESSION},
    }


def choices(selector, estimator, rounds=2):
    """Plans and measurements of some rounds on one small model."""
    tokens = random_source(CANDIDATES, 10, VOCAB).tokens
    source = FakeSource(tokens, tokens[:3], groups=torch.arange(CANDIDATES) % 4, group_names=tuple("abcd"))
    context = warm_context(source=source)
    run = SelectionRun(selector, estimator, UniformSelector(), 0, source)
    found = []
    for _ in range(rounds):
        plan = play(run, BUDGET, context)
        record = run.ledger.rounds[-1]
        found.append((plan.ids.tolist(), record.measured, record.influence))
    return found


@pytest.mark.parametrize("kind", ["regression", "arms", "prior", "mixture"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_drives_every_selector(name, kind):
    made, settings = ESTIMATORS[name]
    DataSelection(selector_of(kind), made(**settings))  # is willing
    for plan, measured, influence in choices(selector_of(kind), made(**settings)):
        assert len(set(plan)) == BUDGET
        assert len(measured) == len(influence) >= 6
        assert torch.tensor(influence).isfinite().all()
        assert torch.tensor(influence).std() > 0


@pytest.mark.parametrize(
    ("name", "kind"), [(name, ["regression", "arms"][index % 2]) for index, name in enumerate(ESTIMATORS)]
)
def test_a_pair_from_a_file_chooses_what_the_same_pair_from_python_does(tmp_path, name, kind):
    made, settings = ESTIMATORS[name]
    estimator = {"class_path": f"liveselect.influence.{made.__name__}", "init_args": settings}
    data = {"pool": "pool", "reference": "reference", "batch_size": 4}
    file = {
        "model": {"class_path": "small_run.SmallLM"},
        "data": {"class_path": "liveselect.datamodules.SelectionDataModule", "init_args": data},
        "select": {
            "class_path": "liveselect.callbacks.DataSelection",
            "init_args": {"selector": in_yaml(kind), "estimator": estimator},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    trainer = SelectionCLI([f"--config={tmp_path / 'run.yaml'}"], run=False).trainer
    (chosen,) = [each for each in trainer.callbacks if isinstance(each, DataSelection)]
    assert choices(chosen.selector, chosen.estimator, 1) == choices(selector_of(kind), made(**settings), 1)
