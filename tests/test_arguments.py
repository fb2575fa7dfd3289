"""Flags and numbers that are passed in each other's place are refused, in every preset and every part."""

import inspect
from types import UnionType
from typing import get_args

import numpy as np
import pytest

from liveselect import callbacks, influence, regressors, selectors
from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.settings import ServingSettings
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import UniformSelector
from liveselect.watch import Watch

NEEDED = {
    "MATES": {"regressor": HashedRidgeRegressor()},
    "LivePDS": {"regressor": HashedRidgeRegressor()},
    "PDS": {"scores": np.zeros(9)},
    "Replay": {"run": "a run", "every_n_steps": 1},
    "DataSelection": {"selector": UniformSelector()},
    "RegressionSelector": {"regressor": HashedRidgeRegressor()},
    "ScoredSelector": {"scores": np.zeros(9)},
    "CappedSelector": {"selector": UniformSelector()},
    "PortfolioSelector": {"policies": {"one": UniformSelector(), "other": UniformSelector()}},
    "PriorSelector": {"selector": UniformSelector(), "scores": np.zeros(9)},
    "ServingSettings": {"reference": [], "batch_size": 1},
    "SelectionDataModule": {"pool": [], "reference": [], "batch_size": 1},
}
EXPORTED = [
    getattr(module, name) for module in (callbacks, influence, regressors, selectors) for name in module.__all__
]
CLASSES = [*EXPORTED, Watch, ServingSettings, SelectionDataModule]


def plain_arguments(kind):
    """Name and annotated kinds of what is a flag or a number; presets also take arguments of every run, as **run."""
    taken = dict(inspect.signature(kind).parameters)
    if "run" in taken and taken["run"].kind == inspect.Parameter.VAR_KEYWORD:
        taken["seed"] = inspect.signature(callbacks.DataSelection).parameters["seed"]
    for name, parameter in taken.items():
        annotation = parameter.annotation
        kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
        if kinds <= {bool, int, float, type(None)}:
            yield name, kinds


FLAGS = [(kind, name) for kind in CLASSES for name, kinds in plain_arguments(kind) if bool in kinds]
NUMBERS = [(kind, name) for kind in CLASSES for name, kinds in plain_arguments(kind) if bool not in kinds]


def build(kind, **given):
    return kind(**{**NEEDED.get(kind.__name__, {}), **given})


def test_there_are_flags_and_numbers_to_look_at():
    assert (callbacks.Quad, "overhear") in FLAGS
    assert (callbacks.MATES, "seed") in NUMBERS
    assert (callbacks.DataSelection, "overhear") in NUMBERS
    assert len(FLAGS) > 15
    assert len(NUMBERS) > 60


def test_what_is_needed_suffices():
    for kind in {kind for kind, _ in FLAGS + NUMBERS}:
        build(kind)


@pytest.mark.parametrize(("kind", "name"), FLAGS)
@pytest.mark.parametrize("value", [5, 1, 0, 0.5, "true", "False"])
def test_what_is_no_flag_is_refused_where_one_is_expected(kind, name, value):
    with pytest.raises(TypeError, match=rf"expected {name} of \w+ to be True or False, got {value!r}$"):
        build(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
@pytest.mark.parametrize("value", [True, False, "8"])
def test_what_is_no_number_is_refused_where_one_is_expected(kind, name, value):
    with pytest.raises(TypeError, match=rf"expected {name} of \w+ to be a number, got {value!r}$"):
        build(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_nothing_and_fractions_are_refused_where_they_mean_nothing(kind, name):
    kinds = dict(plain_arguments(kind))[name]
    if type(None) not in kinds:
        with pytest.raises((TypeError, ValueError), match=rf"expected {name}.*(got None$|the rows in the training)"):
            build(kind, **{name: None})
    if float not in kinds:
        with pytest.raises(ValueError, match=rf"expected {name} of \w+ to be a whole number, got 2\.5$"):
            build(kind, **{name: 2.5})


def test_numbers_and_flags_of_numpy_are_taken_for_what_they_are():
    build(callbacks.Quad, overhear=np.bool_(False), alpha=np.float32(0.5), pulls=np.int64(2))
    with pytest.raises(TypeError, match="expected alpha of Quad to be a number"):
        build(callbacks.Quad, alpha=np.bool_(True))
