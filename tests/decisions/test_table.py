"""The decision ledger tells the truth: every number in it against recomputation."""

import numpy as np
import pytest
import torch
from fakes import fake_context, planted_source, play, random_source

from liveselect.decisions import DecisionLedger, files, read_about, read_plan, read_round, rounds_in
from liveselect.decisions.table import BELOW, BY_SCORE, BY_SELECTOR, GROUP_BELOW, GROUP_PASSED, ONLY_MEASURED, PASSED
from liveselect.functional.sampling import Noise, gumbel_topk, released_bottomk
from liveselect.grammar import InfluenceEstimator, Selection, SelectionWarning, Selector
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, ScoredSelector, UCBSelector, UniformSelector


class TokenCount(InfluenceEstimator):
    """Influence of a candidate: how many of its tokens are in the lower third of the vocabulary."""

    def score(self, model, batch):
        return (batch["input_ids"] < 20).float().mean(-1)


def one_round(folder, selector, source=None, estimator=None, budget=40, rounds=1, **settings):
    source = source or planted_source()[0]
    run = SelectionRun(selector, estimator, UniformSelector(), 0, source)
    run.decisions = DecisionLedger(folder, **settings)
    for _ in range(rounds):
        play(run, budget)
    return run, read_round(rounds_in(folder)[rounds - 1])


def regression(**settings):
    return RegressionSelector(HashedRidgeRegressor(), **{"probes": 60, "ratio": 0.2, "min_spearman": None, **settings})


@pytest.mark.parametrize(("draw", "sign"), [(gumbel_topk, 1.0), (released_bottomk, -1.0)])
@pytest.mark.parametrize("n", [50, 70_000])
def test_what_a_draw_takes_are_the_largest_sums_of_score_and_noise(draw, sign, n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(1))
    drawn = draw(scores, n // 5, 0.7, torch.Generator().manual_seed(2))
    noise = Noise(0.7, torch.Generator().manual_seed(2), sign)
    keys = scores.double() + noise(0, n)
    assert torch.equal(keys.topk(n // 5).indices.sort().values, drawn)
    middle = n // 3
    assert torch.equal(torch.cat([noise(0, middle), noise(middle, n)]), noise(0, n))


@pytest.mark.parametrize("form", ["gumbel_topk", "released_bottomk"])
def test_score_noise_rank_and_threshold_decide_who_is_chosen(tmp_path, form):
    _, rows = one_round(tmp_path, regression(noise=form), estimator=TokenCount())
    compared = ~np.isnan(rows["score"])
    keys = (rows["score"] + rows["noise"])[compared]
    chosen = rows["chosen"][compared].astype(bool)
    assert compared.sum() == 40 / 0.2
    assert chosen.sum() == 40
    assert keys[chosen].min() == rows["threshold"][0] > keys[~chosen].max()
    brute = [(keys > key).sum() for key in keys]
    assert rows["rank"][compared].tolist() == brute
    assert set(rows["reason"][compared]) == {BY_SCORE, BELOW}
    assert len(set(rows["id"])) == len(rows["id"])


def test_the_scores_are_the_predictions_and_the_influence_what_was_measured(tmp_path):
    source, _ = planted_source()
    selector = regression()
    run, rows = one_round(tmp_path, selector, source, TokenCount())
    predictions = selector.regressor.predict(
        fake_context(source).round, {"input_ids": source.tokens, "labels": source.labels}
    )
    compared = ~np.isnan(rows["score"])
    np.testing.assert_allclose(rows["score"][compared], predictions[rows["id"][compared]].numpy(), rtol=1e-5, atol=1e-6)
    measured = {int(i): v for i, v in zip(rows["id"], rows["influence"], strict=True) if not np.isnan(v)}
    record = run.ledger.rounds[0]
    assert measured == dict(zip(record.measured, record.influence, strict=True))
    truth = (source.tokens < 20).float().mean(-1)
    assert all(value == pytest.approx(float(truth[index])) for index, value in measured.items())
    alone = ~compared & ~rows["chosen"].astype(bool)
    assert set(rows["reason"][alone]) <= {ONLY_MEASURED}


def test_places_are_the_training_order(tmp_path):
    run, _ = one_round(tmp_path, regression(), estimator=TokenCount())
    plan = read_plan(rounds_in(tmp_path)[0])
    assert torch.equal(plan.ids, run.plan.ids)
    assert plan.fingerprint == run.plan.fingerprint
    assert plan.pool == run.pool.fingerprint


def test_the_cost_of_a_round_and_of_the_run_before_it_stands_in_every_row(tmp_path):
    run, rows = one_round(tmp_path, UniformSelector(), rounds=3)
    assert set(rows["round_flops"]) == {run.ledger.rounds[-1].total_flops}
    assert set(rows["flops_before"]) == {sum(record.total_flops for record in run.ledger.rounds[:-1])}
    assert "write decisions" in run.ledger.rounds[-1].seconds


def test_pieces_of_any_size_hold_the_same_rows(tmp_path, monkeypatch):
    _, whole = one_round(tmp_path / "whole", regression(), estimator=TokenCount())
    monkeypatch.setattr(files, "ROWS_PER_WRITE", 7)
    _, pieces = one_round(tmp_path / "pieces", regression(), estimator=TokenCount())
    for name in whole:
        assert np.array_equal(whole[name], pieces[name], equal_nan=whole[name].dtype.kind == "f"), name


def test_a_bound_keeps_the_chosen_the_measured_and_the_nearest_rejected(tmp_path):
    _, whole = one_round(tmp_path / "whole", regression(), estimator=TokenCount())
    _, bounded = one_round(tmp_path / "bounded", regression(), estimator=TokenCount(), most_rejected=25)
    must = whole["chosen"].astype(bool) | ~np.isnan(whole["influence"])
    assert set(whole["id"][must]) <= set(bounded["id"])
    nearest = whole["rank"] < 65
    assert set(whole["id"][nearest]) <= set(bounded["id"])
    assert set(bounded["id"]) == set(whole["id"][must | nearest])
    assert read_about(rounds_in(tmp_path / "bounded")[0])["left_out"] == str(200 - 65)


def test_a_draw_from_scores_of_the_whole_pool_tells_who_passed_but_was_not_drawn(tmp_path):
    source = random_source(300)
    scores = torch.randn(300, generator=torch.Generator().manual_seed(3))
    selector = ScoredSelector(scores, ratio=0.4, temperature=0.3, random_share=0.25)
    with pytest.warns(SelectionWarning, match="does not say"):
        _, rows = one_round(tmp_path, selector, source, rounds=2)
    keys = rows["score"] + rows["noise"]
    by_score = rows["reason"] == BY_SCORE
    assert by_score.sum() == 30
    assert (rows["reason"] == "drawn uniformly").sum() == 10
    assert (rows["reason"] == PASSED).sum() > 0
    assert keys[by_score].min() >= rows["threshold"][0]
    assert keys[rows["reason"] == PASSED].min() >= rows["threshold"][0]
    assert keys[rows["reason"] == BELOW].max() < rows["threshold"][0]
    # the noise is that of a draw from the whole pool, used candidates included
    context = fake_context(source, index=1)
    kept = gumbel_topk(scores, 120, 0.3, context.round.generator("scores"))
    assert set(rows["id"][by_score | (rows["reason"] == PASSED)]) <= set(kept.tolist())
    assert not set(rows["id"][rows["reason"] == BELOW]) & set(kept.tolist())


def test_a_bandit_tells_reward_and_bonus_of_the_arm(tmp_path):
    groups = torch.arange(300) % 6
    source = random_source(300, groups=groups, group_names=tuple("abcdef"))
    selector = UCBSelector(pulls=6, at_once=3, probes=4, controls=6, arms=2, tau=None)
    run, rows = one_round(tmp_path, selector, source, TokenCount(), budget=20, rounds=2)
    known = run.ledger.rounds[-1].groups
    for row in range(len(rows["id"])):
        name = rows["group"][row]
        assert name == "abcdef"[rows["id"][row] % 6]
        assert rows["score"][row] == pytest.approx(known[name]["reward"])
        assert rows["bonus"][row] == pytest.approx(known[name]["bonus"])
        better = [
            k for k, v in known.items() if v["reward"] + v["bonus"] > known[name]["reward"] + known[name]["bonus"]
        ]
        assert rows["rank"][row] == len(better)
    chosen = rows["chosen"].astype(bool)
    assert set(rows["reason"][chosen]) == {BY_SCORE}
    above = rows["score"] + rows["bonus"] >= rows["threshold"]
    assert set(rows["reason"][~chosen & above]) == {GROUP_PASSED}
    assert set(rows["reason"][~chosen & ~above]) == {GROUP_BELOW}


def test_a_selector_without_noise_and_with_choices_beyond_its_scores_is_told_as_it_is(tmp_path):
    class Half(Selector):
        def select(self, round, budget):
            scored = round.candidates[:10]
            scores = torch.arange(10.0)
            scores[9] = torch.nan
            return Selection(round.candidates[5:25], scored=scored, scores=scores)

    _, rows = one_round(tmp_path, Half(), budget=20)
    reasons = dict(zip(rows["id"].tolist(), rows["reason"], strict=True))
    assert [reasons[index] for index in (0, 5, 9, 20)] == [BELOW, BY_SCORE, BY_SELECTOR, BY_SELECTOR]
    assert rows["rank"][:9].tolist() == list(range(8, -1, -1))
    assert np.isnan(rows["rank"][9:]).all()  # without a score there is none
    assert rows["threshold"][0] == 5.0


def test_a_disk_that_fills_costs_a_warning_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    source = random_source()
    run = SelectionRun(UniformSelector(), None, UniformSelector(), 0, source, decisions=DecisionLedger(tmp_path))
    with pytest.warns(SelectionWarning, match=r"decisions of round 0 could not be written.*No space left"):
        play(run, 8)
    assert run.plan is not None
    assert list(tmp_path.iterdir()) == []
