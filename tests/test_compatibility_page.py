"""Holds docs/compatibility.md to what comes out when each of its cells is run."""

import compatibility
import pytest
import torch

PAGE = compatibility.written()
QUICK_MODELS = ["Llama", "Mixtral", "T5"]
QUICK_OPTIMIZERS = ["AdamW", "Muon and AdamW", "Adafactor without a rate"]
QUICK_FEATURES = ["gradient_clip_val, by norm", "overfit_batches", "StochasticWeightAveraging"]


def test_the_page_has_a_row_for_all_that_is_tried_and_no_other():
    assert list(PAGE["Models"]) == compatibility.MODELS
    assert list(PAGE["Optimizers"]) == list(compatibility.OPTIMIZERS)
    for title, rows in (
        ("Features of the Trainer", compatibility.FEATURES),
        ("Several ranks", compatibility.STRATEGIES),
    ):
        assert title not in PAGE or list(PAGE[title]) == list(rows)
    assert compatibility.PAGE.read_text() == compatibility.page_of(PAGE)


def _rows(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _rows(compatibility.MODELS, QUICK_MODELS))
def test_models_do_what_the_page_says(name):
    if "LoRA" in name:
        pytest.importorskip("peft")
    assert compatibility.models([name])[name] == PAGE["Models"][name]


@pytest.mark.parametrize("name", _rows(compatibility.OPTIMIZERS, QUICK_OPTIMIZERS))
def test_optimizers_do_what_the_page_says(name):
    assert compatibility.optimizers([name])[name] == PAGE["Optimizers"][name]


@pytest.mark.parametrize("name", _rows(PAGE.get("Features of the Trainer", {}), QUICK_FEATURES))
def test_features_of_the_trainer_do_what_the_page_says(name):
    assert compatibility.features([name])[name] == PAGE["Features of the Trainer"][name]


@pytest.mark.slow
@pytest.mark.skipif("Several ranks" not in PAGE, reason="the page has no such table yet")
def test_strategies_do_what_the_page_says():
    for name, row in compatibility.strategies().items():
        assert row == PAGE["Several ranks"][name], name


def test_what_is_exact_is_told_from_what_is_not():
    """The grades themselves: a number beside the definition is not exact."""
    expected = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert compatibility.graded(expected, expected, 1e-6) == "exact"
    assert compatibility.graded(2 * expected, expected, 1e-2) == "close"
    assert compatibility.graded(expected.roll(1), expected, 1e-2) == "weak"
    assert compatibility.graded(expected * torch.nan, expected, 1e-2) == "not finite"
