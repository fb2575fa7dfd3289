import io
import math
from dataclasses import replace

import pytest
import torch
from fakes import fake_context, planted_source, random_source
from ranks import on_ranks
from tiny_encoder import tiny_regressor

from liveselect.distributed import rank
from liveselect.functional.sampling import gumbel_topk, released_bottomk
from liveselect.grammar import InfluenceRegressor
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

torch.set_num_threads(1)


class KnownRegressor(InfluenceRegressor):
    """Predicts ``values[id]`` and claims a held-out correlation."""

    def __init__(self, values, spearman=0.9):
        self.values = values
        self.spearman = spearman
        self.fitted = None

    def fit(self, round, ids, influence):
        self.fitted = ids, influence
        return {"spearman": self.spearman, "r2": 0.5}

    def predict(self, round, batch):
        return self.values[batch["id"]]


def measured(selector, context, influence):
    """Measure what the selector proposes; ``influence (n,)`` is known for every id."""
    while len(ids := selector.propose(context.round)):
        known = influence[ids].isfinite()  # as the engine does
        selector.observe(ids[known], influence[ids[known]])
    return selector


def ramp(n=64):
    return torch.linspace(-2.0, 2.0, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def test_a_round_asks_once_and_the_next_asks_for_others():
    source, selector = random_source(candidates=200), RegressionSelector(KnownRegressor(ramp(200)), probes=20)
    asked = []
    for r in range(3):
        context = fake_context(source, index=r)
        ids = selector.propose(context.round)
        assert len(ids.unique()) == 20
        selector.observe(ids, torch.randn(20))
        assert selector.propose(context.round).tolist() == []
        asked.append(set(ids.tolist()))
    assert asked[0] != asked[1] != asked[2]


def test_only_the_rounds_candidates_are_proposed_and_chosen():
    candidates = torch.arange(30, 54)
    context = fake_context(random_source(), candidates=candidates)
    selector = RegressionSelector(KnownRegressor(ramp()), probes=100, ratio=0.5)
    assert torch.equal(selector.propose(context.round), candidates)
    selection = measured(selector, context, ramp()).select(context.round, 10)
    assert torch.isin(selection.ids, candidates).all()
    assert len(selection.ids.unique()) == 10


def test_observations_of_the_last_round_are_forgotten():
    regressor = KnownRegressor(ramp())
    selector = RegressionSelector(regressor, probes=8)
    for r in range(2):
        context = fake_context(random_source(), index=r)
        asked = selector.propose(context.round)
        selector.observe(asked, ramp()[asked])
        selector.select(context.round, 4)
        assert torch.equal(regressor.fitted[0], asked)
        assert torch.equal(regressor.fitted[1], ramp()[asked])


def test_temperature_zero_takes_the_best_of_the_window():
    context = fake_context(random_source())
    selector = RegressionSelector(KnownRegressor(ramp()), probes=8, ratio=0.25, temperature=0.0)
    selection = measured(selector, context, ramp()).select(context.round, 10)
    assert len(selection.scored) == 40
    assert torch.equal(selection.scores, ramp()[selection.scored])
    best = selection.scored[selection.scores.topk(10).indices]
    assert torch.equal(selection.ids.sort().values, best.sort().values)


def test_the_window_is_another_random_part_of_the_candidates_in_each_round():
    source, regressor = random_source(candidates=400), KnownRegressor(ramp(400))
    appeared = torch.zeros(400)
    for r in range(50):
        selector = RegressionSelector(regressor, probes=8, ratio=0.2)
        window = (
            measured(selector, context := fake_context(source, index=r), ramp(400)).select(context.round, 20).scored
        )
        assert len(window.unique()) == 100
        appeared[window] += 1
    assert appeared.min() > 0
    assert appeared.max() < 50


@pytest.mark.parametrize(("noise", "draw"), [("gumbel_topk", gumbel_topk), ("released_bottomk", released_bottomk)])
def test_each_form_of_noise_is_the_draw_of_its_name(noise, draw):
    context = fake_context(random_source())
    selector = RegressionSelector(KnownRegressor(ramp()), probes=8, ratio=0.25, temperature=0.7, noise=noise)
    selection = measured(selector, context, ramp()).select(context.round, 10)
    expected = selection.scored[draw(selection.scores, 10, 0.7, context.round.generator("select"))]
    assert torch.equal(selection.ids, expected)


def test_standardising_makes_the_draw_independent_of_the_scale_of_predictions():
    context, chosen = fake_context(random_source()), {}
    for standardize in (True, False):
        for scale in (1.0, 100.0):
            regressor = KnownRegressor(scale * ramp())
            selector = RegressionSelector(regressor, probes=8, ratio=0.25, temperature=2.0, standardize=standardize)
            selection = measured(selector, context, ramp()).select(context.round, 10)
            chosen[standardize, scale] = selection.ids
            std = float(selection.scores.double().std(correction=0))
            expected = 2.0 if standardize else 2.0 / std
            assert selection.metrics["temperature_over_std"] == pytest.approx(expected)
    assert torch.equal(chosen[True, 1.0], chosen[True, 100.0])
    assert not torch.equal(chosen[False, 1.0].sort().values, chosen[False, 100.0].sort().values)


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [lambda: HashedRidgeRegressor(2**12), lambda: tiny_regressor(epochs=20, evaluations=4)],
    ids=["hashed", "encoder"],
)
def test_a_planted_tenth_is_enriched_threefold_after_one_round_and_avoided_when_the_sign_turns(make):
    source, planted = planted_source(candidates=1000)
    noise = 0.3 * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    context, chosen = fake_context(source), {}
    for sign in (1.0, -1.0):
        selector = measured(RegressionSelector(make(), probes=200), context, sign * planted.float() + noise)
        chosen[sign] = selector.select(context.round, 200)
        assert chosen[sign].metrics["regressor/spearman"] > 0
    enrichment = {sign: float(planted[selection.ids].float().mean()) / 0.1 for sign, selection in chosen.items()}
    assert enrichment[1.0] >= 3.0
    assert enrichment[-1.0] <= 0.5


def test_only_the_probes_and_the_window_are_read():
    source = random_source(candidates=500)
    context = fake_context(source)
    selector = measured(
        RegressionSelector(HashedRidgeRegressor(2**8), probes=16, min_spearman=None), context, ramp(500)
    )
    selector.select(context.round, 10)
    assert source.read == 16 + 50


def test_with_too_few_candidates_all_are_compared_and_the_ratio_is_told():
    context = fake_context(random_source())
    selector = measured(RegressionSelector(KnownRegressor(ramp()), probes=8), context, ramp())
    selection = selector.select(context.round, 32)
    assert torch.equal(selection.scored, torch.arange(64))
    assert selection.metrics["ratio"] == 0.5
    assert selection.notes == (
        "32 of all 64 candidates are chosen, a ratio of 0.500 instead of 0.2, which would need 160 candidates",
    )


def test_what_was_measured_is_described():
    influence = ramp()
    influence[:5] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 0.0])
    context, regressor = fake_context(random_source()), KnownRegressor(ramp())
    selection = measured(RegressionSelector(regressor, probes=64), context, influence).select(context.round, 8)
    finite = influence[3:].double()
    assert regressor.fitted[0].tolist() == list(range(3, 64))
    assert selection.metrics["measured"] == 61
    assert selection.metrics["influence/mean"] == pytest.approx(float(finite.mean()))
    assert selection.metrics["influence/std"] == pytest.approx(float(finite.std(correction=0)))
    assert selection.metrics["regressor/spearman"] == 0.9
    assert selection.metrics["regressor/r2"] == 0.5


def uniform(selection, budget, reason):
    """Whether a selection is a uniform fallback that gives its reason."""
    assert selection.scores is None
    assert selection.scored is None
    assert len(selection.ids.unique()) == budget
    return selection.notes[-1] == f"drawn uniformly: {reason}"


@pytest.mark.parametrize("finite", [0, 1, 7, 8])
def test_fewer_than_eight_finite_measurements_lead_to_a_uniform_draw(finite):
    influence = torch.full((64,), math.nan)
    context, selector = fake_context(random_source()), RegressionSelector(KnownRegressor(ramp()), probes=12)
    asked = selector.propose(context.round)
    influence[asked[:finite]] = torch.arange(float(finite))
    selector.observe(asked[:finite], influence[asked[:finite]])
    selection = selector.select(context.round, 8)
    if finite == 8:
        assert selection.scores is not None
    else:
        assert uniform(selection, 8, f"{finite} finite measurements are fewer than the 8 that a regressor needs")


def test_equal_influence_or_equal_predictions_lead_to_a_uniform_draw():
    context = fake_context(random_source())
    same = torch.full((64,), 0.5)
    selection = measured(RegressionSelector(KnownRegressor(ramp()), probes=8), context, same).select(context.round, 8)
    assert uniform(selection, 8, "all measured influences are equal")
    selection = measured(RegressionSelector(KnownRegressor(same), probes=8), context, ramp()).select(context.round, 8)
    assert uniform(selection, 8, "all predictions are equal")


def test_over_a_prior_a_fallback_draws_by_the_prior_and_says_so():
    context = fake_context(random_source())
    prior = torch.zeros(64)
    prior[5:13] = 1e6
    selector = measured(RegressionSelector(KnownRegressor(ramp()), probes=8), context, torch.full((64,), 0.5))
    selection = selector.select(replace(context.round, offset=prior), 8)
    assert sorted(selection.ids.tolist()) == list(range(5, 13))
    assert selection.notes[-1] == "drawn by the prior alone: all measured influences are equal"
    assert list(selection.reasons) == ["drawn by the prior alone"]


def test_predictions_that_are_not_finite_lead_to_a_uniform_draw():
    context, values = fake_context(random_source()), ramp()
    values[[3, 9]] = torch.tensor([math.nan, math.inf])
    selector = measured(RegressionSelector(KnownRegressor(values), probes=8, ratio=0.1), context, ramp())
    assert uniform(selector.select(context.round, 8), 8, "2 of 64 predictions are not finite")


@pytest.mark.parametrize(
    ("spearman", "least", "trusted"),
    [
        (0.1, 0.0, True),
        (0.0, 0.0, False),
        (-0.2, 0.0, False),
        (math.nan, 0.0, False),
        (math.nan, None, True),
        (0.2, 0.3, False),
    ],
)
def test_a_regressor_is_trusted_above_the_asked_correlation(spearman, least, trusted):
    context = fake_context(random_source())
    selector = RegressionSelector(KnownRegressor(ramp(), spearman), probes=8, min_spearman=least)
    selection = measured(selector, context, ramp()).select(context.round, 8)
    assert (selection.scores is not None) == trusted
    if not trusted:
        assert uniform(selection, 8, f"the regressor's held-out Spearman {spearman:.3f} is not above {least}")


def test_a_regressor_that_skips_candidates_is_refused():
    class Short(KnownRegressor):
        def predict(self, round, batch):
            return self.values[batch["id"]][:-1]

    context = fake_context(random_source())
    selector = measured(RegressionSelector(Short(ramp()), probes=8), context, ramp())
    with pytest.raises(
        ValueError, match=r"Short.predict to return one number for each of \d+ candidates, \(\d+,\), got \(\d+,\)"
    ):
        selector.select(context.round, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 7}, "expected at least 8 probes"),
        ({"ratio": 0.0}, "expected ratio"),
        ({"ratio": 1.1}, "expected ratio"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"noise": "none"}, r"expected noise to be one of \('gumbel_topk', 'released_bottomk'\), got 'none'"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegressionSelector(KnownRegressor(ramp()), **arguments)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "make", [lambda: HashedRidgeRegressor(2**8), lambda: tiny_regressor(epochs=1)], ids=["hashed", "encoder"]
)
def test_a_run_resumed_between_measuring_and_choosing_chooses_bit_for_bit_alike(make):
    source = random_source(candidates=200, length=10)
    influence = (source.tokens < 20).float().mean(dim=1)
    first, resumed = (RegressionSelector(make(), probes=64, min_spearman=None) for _ in range(2))
    measured(first, context := fake_context(source), influence).select(context.round, 8)
    measured(first, context := fake_context(source, index=1), influence)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    assert resumed.propose(context.round).tolist() == []
    chosen = [selector.select(context.round, 8) for selector in (first, resumed)]
    assert torch.equal(chosen[0].ids, chosen[1].ids)
    assert torch.equal(chosen[0].scores, chosen[1].scores)
    assert chosen[0].metrics == chosen[1].metrics


def test_what_steps_have_shown_is_learned_from_once_and_what_is_measured_now_counts_before_it():
    context, regressor = fake_context(random_source()), KnownRegressor(ramp())
    selector = RegressionSelector(regressor, probes=8)
    asked = selector.propose(context.round)
    others = [i for i in range(64) if i not in asked.tolist()][:3]
    captured = torch.tensor([*others, int(asked[0])])
    selector.observe_step(captured, torch.tensor([7.0, 8.0, 9.0, 10.0]))
    selector.observe(asked, ramp()[asked])
    resumed = RegressionSelector(second := KnownRegressor(ramp()), probes=8)
    resumed.load_state_dict(through_a_file(selector.state_dict()))
    for each, learned in ((selector, regressor), (resumed, second)):
        assert each.select(context.round, 8).metrics["overheard"] == 3
        ids, influence = learned.fitted
        assert ids.tolist() == [*asked.tolist(), *others]
        assert influence.tolist() == [*ramp()[asked].tolist(), 7.0, 8.0, 9.0]
        later = measured(each, fake_context(random_source(), index=1), ramp())
        assert "overheard" not in later.select(fake_context(random_source(), index=1).round, 8).metrics


def test_a_checkpoint_of_another_kind_of_regressor_is_refused():
    stateful, stateless = RegressionSelector(HashedRidgeRegressor()), RegressionSelector(KnownRegressor(ramp()))
    stateless.load_state_dict(through_a_file(stateless.state_dict()))
    with pytest.raises(ValueError, match="state of the regressor HashedRidgeRegressor, but this run uses KnownRegr"):
        stateless.load_state_dict(stateful.state_dict())
    with pytest.raises(ValueError, match="state of the regressor KnownRegressor, but this run uses HashedRidgeRegr"):
        stateful.load_state_dict(stateless.state_dict())


def _round_on_a_rank(kind):
    source = random_source(candidates=203, length=10)
    influence = (source.tokens < 20).float().mean(dim=1)
    regressors = {
        "hashed": lambda: HashedRidgeRegressor(2**8),
        "encoder": lambda: tiny_regressor(epochs=2, dropout=0.0, batch_size=7, encoder=NO_DROPOUT),
        "opinionated": lambda: KnownRegressor(influence, spearman=[0.5, -0.5][rank()]),
    }
    context = fake_context(source)
    regressor = regressors[kind]()
    selection = measured(RegressionSelector(regressor, probes=61), context, influence).select(context.round, 21)
    weights = regressor.state_dict()["weights"] if isinstance(regressor, EncoderRegressor) else {}
    return selection.ids.tolist(), selection.scores.tolist(), {k: v.tolist() for k, v in weights.items()}, source.read


NO_DROPOUT = {
    **{"model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 16, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0},
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["hashed", "encoder", "opinionated"])
def test_two_ranks_share_the_work_and_choose_what_one_rank_chooses(kind):
    alone, (first, second) = _round_on_a_rank(kind), on_ranks(_round_on_a_rank, 2, kind)
    assert first[:3] == second[:3]
    assert first[0] == alone[0]
    assert first[1] == pytest.approx(alone[1], abs=1e-4)
    if kind != "opinionated":
        assert first[3] == 61 + 53
        assert second[3] == 61 + 52
