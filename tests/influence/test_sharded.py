"""Influence of a model that is sharded over ranks is that of the whole model on one process."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from fakes import fake_context, random_source
from probing import VOCAB
from ranks import on_ranks
from sharded import CANDIDATES, by_layers, kept_whole, local_sizes, measured, warm, without_root
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from liveselect import distributed
from liveselect.functional.sharding import is_part, local
from liveselect.influence import (
    FirstOrderInfluence,
    KFACInfluence,
    LESSInfluence,
    LossDropInfluence,
    OneStepInfluence,
    PerplexityInfluence,
    PMPInfluence,
    ReducibleLossInfluence,
)
from liveselect.influence.training_step import TrainingStepScores, mean_weights
from liveselect.losses import causal_lm_loss
from liveselect.preserve import measuring

pytestmark = pytest.mark.long

RANKS = 3
BAD = 6  # a candidate without a finite loss; no reference example has this id
ESTIMATORS = {
    "one step": OneStepInfluence,
    "one step in a batch": lambda: OneStepInfluence(step="in_batch"),
    "hooks": FirstOrderInfluence,
    "hooks, at zero": lambda: FirstOrderInfluence(slope_over="zero", gradient_at="current", exclude=("*norm*",)),
    "central difference": lambda: FirstOrderInfluence(engine="central_difference"),
    "optimizer step": lambda: FirstOrderInfluence(engine="optimizer_step"),
    "K-FAC": lambda: KFACInfluence(factor_examples=13),
    "EK-FAC": lambda: KFACInfluence(curvature="ekfac", factor_examples=13),
    "diagonal": lambda: KFACInfluence(curvature="diagonal", factor_examples=13),
    "loss drop": lambda: LossDropInfluence(steps=3, learning_rate=1e-2, step_rows=4),
    "reducible loss": lambda: ReducibleLossInfluence(steps=3, learning_rate=1e-2),
    "perplexity": lambda: PerplexityInfluence(sampled=7),
    "PMP": lambda: pmp(batch_size=4),
    "PMP by plain SGD": lambda: pmp(dynamics="sgd", learning_rate=0.02, reference_weighting="examples"),
    "PMP, products by differences": lambda: pmp(products="central_difference", denominator_floor=0.0),
}
LAYOUTS = {
    "a tied head": {"layout": by_layers, "tie_word_embeddings": True},
    "layers kept whole": {"layout": kept_whole},
    "no root": {"layout": without_root},
}
REFUSED = {
    "LESS": LESSInfluence,
    "forward mode": lambda: FirstOrderInfluence(engine="forward_mode"),
    "double backward": lambda: PMPInfluence(steps=2, hessian="double_backward"),
}


def pmp(**settings):
    # batches of 5 and of 1: on three ranks the shares are uneven, and some are empty
    return PMPInfluence(**{"steps": 4, "score_every": 3, "batch_size": 5, "hessian": "central_difference", **settings})


class HiddenUse(nn.Module):
    """A head whose weight is used without a call of the head, where no hook can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB, bias=False)

    def forward(self, input_ids):
        return F.linear(self.embed(input_ids), self.head.weight)


def _message(function) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def _refusals(context) -> dict:
    found = {name: _message(lambda make=make: context.fit(make())) for name, make in REFUSED.items()}
    found["double backward before training"] = _message(lambda: context.check(REFUSED["double backward"]()))
    model = fully_shard(HiddenUse().double())
    hidden = fake_context(
        random_source(8, vocab=VOCAB), model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    short = warm(False)
    fully_shard(short.model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["16 bits"] = _message(lambda: short.check(pmp()))
    found["hidden use"] = _message(lambda: measured(FirstOrderInfluence(), hidden))
    return found


def _without_a_loss(model, batch):
    return causal_lm_loss(model, batch).where(batch.get("id", torch.tensor(-1)) != BAD, math.inf)


def _overheard(context) -> list:
    """Gradients of a training step with and without scores attached, the scores, and the estimator's own numbers."""
    estimator = FirstOrderInfluence(slope_over="zero")
    context.fit(estimator)
    batch = next(context.round.batches(torch.arange(2) + 2 * distributed.rank()))
    found = [context.score(estimator, batch)]
    scores = TrainingStepScores(context.model, estimator.direction())
    with measuring(context.model, context.optimizer):
        for listens in (True, False):
            if listens:
                scores.attach(batch)
            loss = context.model(batch["input_ids"], labels=batch["input_ids"]).loss
            loss.backward()
            if listens:
                found.append(scores.collect(mean_weights(batch)))
            found.append([local(parameter.grad) for parameter in context.model.parameters()])
            context.optimizer.zero_grad()
    return found


def _state_round_trip(context) -> tuple:
    """Influence before and after the estimator was saved and loaded, and whether the state is free of parts."""
    estimator, resumed = KFACInfluence(factor_examples=13), KFACInfluence(factor_examples=13)
    context.fit(estimator)
    state = estimator.state_dict()
    resumed.load_state_dict(state)
    batch = next(context.round.batches(torch.arange(2)))
    plain = not any(is_part(value) for value in state["direction"].values())
    return context.score(estimator, batch), context.score(resumed, batch), plain


def _all_at_once(context) -> torch.Tensor:
    """The scores of candidates of which this rank has a share."""
    estimator = pmp(steps=2, score_every=2, products="central_difference")
    context.fit(estimator)
    mine = torch.arange(CANDIDATES)[distributed.shard(CANDIDATES)]
    return distributed.gather_shards(context.score_ids(estimator, mine), CANDIDATES)


def _all_measured(sharded: bool) -> dict:
    context = warm(sharded)
    found = {name: measured(make(), context) for name, make in ESTIMATORS.items()}
    for name, settings in LAYOUTS.items():
        other = warm(sharded, **settings)
        estimators = (OneStepInfluence(), FirstOrderInfluence(), pmp(steps=2, score_every=2))
        found[name] = [measured(estimator, other) for estimator in estimators]
    found["PMP, all at once"] = [_all_at_once(context)]
    found["single precision"] = measured(OneStepInfluence(), warm(sharded, torch.float32))
    found["not finite"] = measured(OneStepInfluence(), context.but(loss_fn=_without_a_loss))
    found["sizes"] = local_sizes(context)
    if sharded:
        found |= {"refusals": _refusals(context), "overheard": _overheard(context), "state": _state_round_trip(context)}
    return found


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    together = on_ranks(_all_measured, RANKS, True)
    for result in together:
        if isinstance(result, Exception):
            raise result
    return _all_measured(False), together


def test_ranks_hold_unequal_shares(results):
    sizes = [result["sizes"] for result in results[1]]
    assert sizes[0] != sizes[-1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sharded_influence_is_that_of_one_process(results, name):
    alone, together = results
    influence, metrics, _ = alone[name]
    assert influence.std() > 0
    for rank in together:
        torch.testing.assert_close(rank[name][0], influence, rtol=1e-5, atol=1e-7)
        assert rank[name][1] == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_modules_are_sharded_changes_nothing(results, name):
    alone, together = results
    for rank in together:
        for (influence, *_), (expected, *_) in zip(rank[name], alone[name], strict=True):
            torch.testing.assert_close(influence, expected, rtol=1e-5, atol=1e-7)
        assert all(unchanged for *_, unchanged in rank[name])


def test_ranks_that_score_unequal_shares_at_once_find_what_one_process_does(results):
    alone, together = results
    for rank in together:
        for found, expected in zip(rank["PMP, all at once"], alone["PMP, all at once"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_in_single_precision_the_numbers_differ_by_rounding_only(results):
    alone, together = results
    influence = alone["single precision"][0]
    for rank in together:
        assert (rank["single precision"][0] - influence).abs().max() < 1e-3 * influence.abs().max()


@pytest.mark.parametrize("name", [*ESTIMATORS, "single precision", "not finite"])
def test_measuring_leaves_every_shard_and_moment_bitwise_unchanged(results, name):
    assert all(rank[name][2] for rank in results[1])


def test_a_candidate_without_a_loss_is_nan_on_every_rank_and_no_other_is(results):
    for result in (results[0], *results[1]):
        assert result["not finite"][0].isnan().tolist() == [index == BAD for index in range(CANDIDATES)]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("forward mode", r'"forward_mode" does not work with parameters that are sharded.*engine="hooks"'),
        ("LESS", "takes whole gradients, but ranks hold parts of the parameters"),
        ("double backward", 'cannot be differentiated twice: use hessian="central_difference"'),
        ("double backward before training", 'cannot be differentiated twice: use hessian="central_difference"'),
        ("16 bits", r"compute in torch.bfloat16 \(MixedPrecisionPolicy\).*leave param_dtype out of fully_shard"),
        ("hidden use", r"the loss uses parameters \['head.weight'\] past the layers"),
    ],
)
def test_what_cannot_be_measured_is_refused_on_every_rank(results, what, message):
    for rank in results[1]:
        assert re.search(message, rank["refusals"][what]), rank["refusals"][what]


def test_a_training_step_tells_the_influence_of_its_own_examples_and_trains_as_without(results):
    for rank in results[1]:
        influence, heard, gradients, without = rank["overheard"]
        torch.testing.assert_close(heard, influence, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(one, other) for one, other in zip(gradients, without, strict=True))


def test_factors_and_direction_survive_a_checkpoint(results):
    for rank in results[1]:
        before, after, plain = rank["state"]
        assert plain
        assert torch.equal(before, after)
