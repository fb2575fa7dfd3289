"""A mixture of reference sets: its loss is the weighted mean of theirs, and so is its influence, in every estimator."""

import pytest
import torch
from fakes import FakeSource
from probing import VOCAB, candidate_batch, warm_context

from liveselect.cli.score_method import _refuse_weights
from liveselect.datamodules.opening import OpenedRows, fingerprint_of, mixture_of, open_mixture
from liveselect.datamodules.reference import ReferenceSet
from liveselect.datamodules.rows.rows import DatasetRows
from liveselect.datamodules.settings import ServingSettings
from liveselect.influence import FirstOrderInfluence, KFACInfluence, LESSInfluence, OneStepInfluence, PMPInfluence

POOL = torch.randint(0, VOCAB, (32, 12), generator=torch.Generator().manual_seed(0))
OPENED = OpenedRows(DatasetRows(POOL), 4)
SETS = {  # of unequal sizes and lengths, so that a mean over all tokens would be another
    "short": torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1)),
    "long": torch.randint(0, VOCAB, (7, 12), generator=torch.Generator().manual_seed(2)),
}
WEIGHTS = {"short": 3.0, "long": 1.0}


class Served(FakeSource):
    """Serves a reference set as a datamodule opens it."""

    def __init__(self, reference):
        super().__init__(POOL)
        settings = ServingSettings(reference, 4, overlap="allow")
        self.batches = open_mixture(reference, OPENED, settings, "allow")
        self.reference_names = tuple(mixture_of(reference))

    def reference(self):
        return iter(self.batches)


def mixture(**weights):
    return {name: ReferenceSet(SETS[name], weight=weight) for name, weight in weights.items()}


def measured(estimator, reference):
    context = warm_context(source=Served(reference))
    metrics = context.fit(estimator)
    return context.score(estimator, candidate_batch(context)).double(), metrics


@pytest.mark.parametrize("make", [OneStepInfluence, FirstOrderInfluence, lambda: KFACInfluence(damping=1e-3)])
def test_loss_and_influence_of_a_mixture_are_the_weighted_means_of_those_of_its_sets(make):
    alone = {name: measured(make(), SETS[name]) for name in SETS}
    influence, metrics = measured(make(), mixture(**WEIGHTS))
    expected = sum(WEIGHTS[name] * alone[name][0] for name in SETS) / 4
    torch.testing.assert_close(influence, expected, rtol=1e-4, atol=1e-6)
    key = "reference_loss" if "reference_loss" in metrics else "reference_loss_zero_step"
    assert metrics[key] == pytest.approx(sum(WEIGHTS[name] * alone[name][1][key] for name in SETS) / 4, rel=1e-6)
    for name in SETS:
        assert metrics[f"reference_loss/{name}"] == pytest.approx(alone[name][1][key], rel=1e-6)
    assert metrics["reference_tokens"] == 3 * 4 + 7 * 11
    assert not [key for key in alone["short"][1] if "/" in key]


def test_equal_weights_are_equal_sets_whatever_their_size():
    even, _ = measured(OneStepInfluence(), mixture(short=2.0, long=2.0))
    apart = [measured(OneStepInfluence(), SETS[name])[0] for name in SETS]
    torch.testing.assert_close(even, sum(apart) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["tokens", "examples"])
def test_pmp_pulls_back_the_weighted_mean_of_the_sets(weighting):
    def make():
        # one step, from which influence is linear in the gradient of the reference loss
        return PMPInfluence(1, 1, dynamics="sgd", batch_size=4, reference_weighting=weighting)

    def of(reference):
        context, estimator = warm_context(source=Served(reference)), make()
        context.fit(estimator)
        return context.score_ids(estimator, torch.arange(4)).double()

    alone = {name: of(SETS[name]) for name in SETS}
    expected = sum(WEIGHTS[name] * alone[name] for name in SETS) / 4
    torch.testing.assert_close(of(mixture(**WEIGHTS)), expected, rtol=1e-4, atol=1e-6)


def test_less_takes_the_weighted_mean_of_the_sets():
    def make():
        return LESSInfluence(dimensions=None, features="gradient")

    alone = {name: measured(make(), SETS[name])[0] for name in SETS}
    found, _ = measured(make(), mixture(**WEIGHTS))
    expected = sum(WEIGHTS[name] * alone[name] for name in SETS) / 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_cheap_methods_refuse_weights_and_take_equal_sets():
    source = Served(mixture(**WEIGHTS))
    with pytest.raises(ValueError, match=r"short: 0.75, long: 0.25.*leave the weights out"):
        _refuse_weights(source.batches, source.reference_names)
    even = Served(mixture(short=2.0, long=2.0))
    _refuse_weights(even.batches, even.reference_names)
    alone = Served(SETS["long"])
    _refuse_weights(alone.batches, alone.reference_names)


def test_the_forms_of_a_mixture():
    assert mixture_of(SETS["long"]) == mixture_of([{"text": "x"}]) == {}
    assert [*mixture_of([ReferenceSet("a"), ReferenceSet("b")])] == ["set 0", "set 1"]
    found = mixture_of({"arc": "arc.jsonl", "lambada": {"source": "l.jsonl", "answer": "last_word", "weight": 2}})
    assert (found["arc"].weight, found["lambada"].weight, found["lambada"].answer) == (1.0, 2, "last_word")
    with pytest.raises(TypeError, match="names and sources"):
        mixture_of({"arc": 3})
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive number"):
            ReferenceSet("a", weight=weight)


def test_another_weight_is_another_reference():
    def opened(**weights):
        return fingerprint_of(open_mixture(mixture(**weights), OPENED, ServingSettings("x", 4), "allow"))

    assert opened(short=1.0, long=1.0) == opened(short=2.0, long=2.0) != opened(short=2.0, long=1.0)
