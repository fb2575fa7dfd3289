"""The published numbers stand in tests/data/ccds_curves.csv: scores, FLOPs and fits of "Compute-Constrained Data
Selection" (arXiv 2410.16208), recovered from the coordinates of its figures, and refits of them in the other reading.
"""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from liveselect.functional.curves import (
    PUBLISHED_SIZE_RATIOS,
    Curve,
    advantage,
    break_even,
    break_even_interval,
    break_even_share,
    fit_curve,
    frontier,
    frontier_line,
    recurring_selection_pays,
    resampled,
    runs_needed,
    size_ratio_needed,
)

with (Path(__file__).parents[1] / "data" / "ccds_curves.csv").open() as file:
    ROWS = list(csv.DictReader(file))

FREE = ("Random", "BM25", "Embed")


def named(row):
    return row["task"], row["model"], row["method"]


def points(task, model, method):
    found = [row for row in ROWS if row["record"] == "point" and named(row) == (task, model, method)]
    return {
        column: np.array([float(row[column]) for row in found])
        for column in ("fraction", "train_flops", "select_flops", "total_flops", "score")
    }


def published(record):
    return [row for row in ROWS if row["record"] == record]


def published_curve(task, model, method, record="fit_published"):
    row = next(row for row in published(record) if named(row) == (task, model, method))
    selection = points(task, model, method)["select_flops"][0]
    start, ceiling, rate, full = (float(row[name]) for name in ("p0", "pbar", "lam", "c_full"))
    return Curve(start, ceiling, rate, full, selection, reading="total" if record == "fit_published" else "offset")


@pytest.mark.parametrize("row", published("fit_published"), ids=lambda row: "-".join(named(row)))
def test_every_published_curve_is_found_again(row):
    seen, full = points(*named(row)), float(row["c_full"])
    fit = fit_curve(seen["total_flops"], seen["score"], full, float(row["pbar"]), reading="total")
    assert fit.curve.rate == pytest.approx(float(row["lam"]), rel=1e-3)
    assert fit.squared_error == pytest.approx(float(row["sse"]), abs=1e-3)
    flops = np.linspace(seen["total_flops"].min(), seen["total_flops"].max(), 100)
    assert np.abs(fit.curve.score(flops) - published_curve(*named(row)).score(flops)).max() < 1e-3
    assert fit.at_bound == (float(row["p0"]) == 0)


def test_there_are_35_published_curves_and_nine_lie_at_the_bound():
    assert len(published("fit_published")) == 35
    assert sum(float(row["p0"]) == 0 for row in published("fit_published")) == 9


def test_the_offset_reading_finds_its_refits_and_explains_what_the_published_one_cannot():
    for row in published("fit_offset"):
        seen, full = points(*named(row)), float(row["c_full"])
        selection = seen["select_flops"][0]
        flops = seen["fraction"] * full + selection
        fit = fit_curve(flops, seen["score"], full, float(row["pbar"]), selection_flops=selection)
        assert fit.curve.rate == pytest.approx(float(row["lam"]), rel=2e-3), named(row)
        assert fit.squared_error == pytest.approx(float(row["sse"]), abs=2e-3), named(row)
    less = points("bbh", "llama2-13b", "LESS")
    selection = less["select_flops"][0]
    total = fit_curve(less["total_flops"], less["score"], 8.638e18, 52.78, reading="total")
    offset = fit_curve(less["total_flops"], less["score"], 8.638e18, 52.78, selection_flops=0.99 * selection)
    assert total.at_bound
    assert total.r2 < 0.6 < 0.9 < offset.r2
    assert total.doubts()
    assert not offset.doubts()


def test_two_points_are_met_exactly():
    fit = fit_curve([0.1, 0.3], [0.2, 0.5], 1.0, 1.0, lowest_start=None)
    assert fit.curve.rate == pytest.approx(math.log(0.8 / 0.5) / 0.2, rel=1e-9)
    assert fit.curve.start == pytest.approx(1 - 0.8 * math.exp(0.1 * fit.curve.rate), abs=1e-9)
    assert fit.curve.start == pytest.approx(-0.011929, abs=1e-6)
    assert fit.squared_error < 1e-18


@pytest.mark.parametrize("shape", ["exponential", "power"])
def test_a_curve_is_found_from_its_points_with_an_unknown_ceiling(shape):
    truth = Curve(-4.0, -2.5, 0.6, 2.0, shape=shape)
    flops = np.geomspace(0.5, 20, 9)
    fit = fit_curve(flops, truth.score(flops), 2.0, None, lowest_start=None, shape=shape)
    assert (fit.curve.rate, fit.curve.ceiling, fit.curve.start) == pytest.approx((0.6, -2.5, -4.0), rel=1e-6)
    other = fit_curve(
        flops,
        truth.score(flops),
        2.0,
        None,
        lowest_start=None,
        shape="power" if shape == "exponential" else "exponential",
    )
    assert fit.aicc < other.aicc


def test_parameters_are_doubted_for_few_points_a_short_span_noise_and_a_bound():
    truth = Curve(10.0, 50.0, 3.0, 1.0)
    flops = np.linspace(0.05, 1, 12)
    assert fit_curve(flops, truth.score(flops), 1.0, 50.0).doubts() == ()
    assert "4 of 5" in fit_curve(flops[::3], truth.score(flops[::3]), 1.0, 50.0).doubts()[0]
    short = np.linspace(0.5, 0.52, 8)
    assert "time constants" in fit_curve(short, truth.score(short), 1.0, 50.0).doubts()[0]
    noise = 40 * np.random.default_rng(0).standard_normal(12)
    assert any("variance" in why for why in fit_curve(flops, truth.score(flops) + noise, 1.0, 90.0).doubts())


def test_resampled_curves_cover_the_truth_about_as_often_as_they_say():
    truth, flops, inside = Curve(10.0, 50.0, 3.0, 1.0), np.linspace(0.1, 1, 10), 0
    noise = np.random.default_rng(0)
    for trial in range(60):
        fit = fit_curve(flops, truth.score(flops) + noise.standard_normal(10), 1.0, 50.0)
        rates = sorted(curve.rate for curve in resampled(fit, 200, torch.Generator().manual_seed(trial)))
        inside += rates[20] <= truth.rate <= rates[179]
    assert 38 <= inside <= 58  # of 60 intervals of 80 %: three standard errors


def test_the_interval_of_a_break_even_is_infinite_where_one_method_may_never_pay():
    flops = np.linspace(0.3, 2, 10)
    baseline, method = Curve(0.0, 1.0, 2.0, 1.0), Curve(0.0, 1.0, 4.0, 1.0, selection_flops=0.1)
    generator = torch.Generator().manual_seed(0)
    noise = np.random.default_rng(1).standard_normal((2, 10))

    def interval(method, size):
        fits = [
            fit_curve(flops, curve.score(flops) + size * own, 1.0, 1.0, selection_flops=curve.selection_flops)
            for curve, own in zip((method, baseline), noise, strict=True)
        ]
        return break_even_interval(*(resampled(fit, 200, generator) for fit in fits))

    low, high = interval(method, 1e-4)
    assert low < break_even(method, baseline).flops < high < 0.25
    assert interval(replace(method, rate=2.02), 0.02)[1] == math.inf


def test_the_break_evens_of_the_simulation_figure():
    for panel in ("small", "medium", "large"):
        simulated = {row["method"]: row for row in ROWS if row["record"] == "sim" and row["task"] == panel}
        curve = {
            name: Curve(0.0, 100.0, float(row["kappa"]), 1.0, float(row["select_flops"]))
            for name, row in simulated.items()
        }
        for method, baseline, flops in (
            ("Perplexity", "Random", 1.7142857e18),
            ("Perplexity", "Lexicon", 2.0e18),
            ("Gradient", "Random", 4.8e18),
            ("Gradient", "Lexicon", 5.142857e18),
            ("Gradient", "Perplexity", 7.5e18),
        ):
            found = break_even(curve[method], curve[baseline])
            assert (found.kind, found.flops) == ("crosses", pytest.approx(flops, rel=1e-6)), panel
        score = {"small": 98.820, "medium": 35.853, "large": 2.196}[panel]
        assert break_even(curve["Perplexity"], curve["Lexicon"]).score == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize(
    ("task", "model", "method", "shares"),
    [
        ("mmlu", "llama2-7b", "PPL", (0.477, 0.684, 1.146)),
        ("mmlu", "llama2-13b", "PPL", (0.250, 0.398, 0.342)),
        ("bbh", "llama2-7b", "PPL", (0.442, 0.705, 0.850)),
        ("bbh", "llama2-70b", "PPL", (0.063, 0.067, 0.075)),
        ("ifeval", "llama2-7b", "PPL", (2.28, 1.43, 1.05)),
        ("mmlu", "llama2-70b", "LESS", (0.214, 0.221, 0.237)),
        ("bbh", "llama2-70b", "LESS", (0.208, 0.212, 0.221)),
    ],
)
def test_the_break_evens_of_the_published_fits(task, model, method, shares):
    ours = published_curve(task, model, method)
    for name, share in zip(FREE, shares, strict=True):
        found = break_even(ours, published_curve(task, model, name))
        assert found.flops / ours.full_flops == pytest.approx(share, abs=0.006), name


def test_where_a_method_falls_behind_is_no_break_even():
    assert (
        break_even(published_curve("mmlu", "llama2-7b", "LESS"), published_curve("mmlu", "llama2-7b", "Embed")).kind
        == "never"
    )
    slower, faster = Curve(20.0, 50.0, 1.0, 1.0), Curve(10.0, 50.0, 3.0, 1.0)  # ahead at first, overtaken later
    assert break_even(slower, faster).kind == "ahead"
    assert break_even(replace(slower, selection_flops=1.0), faster).kind == "never"
    ahead = published_curve("mmlu", "llama2-70b", "PPL")
    assert break_even(ahead, published_curve("mmlu", "llama2-70b", "BM25")).kind == "ahead"
    assert break_even(ahead, faster, budget=ahead.selection_flops / 2).kind == "never"


def test_an_equal_ceiling_gives_the_closed_form_and_a_lower_one_a_later_crossing():
    method, baseline = Curve(12.0, 50.0, 5.0, 2.0, 0.3), Curve(20.0, 50.0, 2.0, 2.0)
    closed = (2.0 * math.log((50 - 12) / (50 - 20)) + 5.0 * 0.3) / (5.0 - 2.0)
    assert break_even(method, baseline).flops == pytest.approx(closed, rel=1e-9)
    assert break_even(replace(method, ceiling=49.0), baseline).flops > closed
    assert break_even(method, baseline, budget=0.9 * closed).kind == "never"


def test_recurring_selection_pays_only_if_its_rate_outgrows_its_overhead():
    baseline = Curve(0.0, 1.0, 2.0, 1.0)
    for overhead, share in ((0.0, 0.2), (0.5, 0.4), (1.0, None), (1.5, None)):
        method = Curve(0.0, 1.0, 4.0, 1.0, selection_flops=0.1, overhead=overhead)
        found = break_even(method, baseline).flops
        assert found is None if share is None else found == pytest.approx(share, rel=1e-9)
        assert recurring_selection_pays(4.0, 2.0, overhead) == (share is not None)


def test_a_scorer_pays_at_the_published_size_ratios_within_about_a_tenth_of_a_full_training():
    assert break_even_share(1 / 3, PUBLISHED_SIZE_RATIOS["perplexity"], 8 / 2) == pytest.approx(0.0889, abs=1e-4)
    assert break_even_share(1.0, PUBLISHED_SIZE_RATIOS["gradient"], 16 / 2) == pytest.approx(0.1143, abs=1e-4)
    assert break_even_share(1.8, 1.0, 16 / 2) == pytest.approx(2.057, abs=1e-3)
    assert break_even_share(1.0, 10.0, 1.0) == math.inf
    # the rule is the crossing of two curves: a scorer of the ratio's size breaks even at this share
    ratio = size_ratio_needed(1 / 3, 0.1, 4.0)
    method, baseline = Curve(0.0, 1.0, 8.0, 1.0, selection_flops=1 / 3 / ratio), Curve(0.0, 1.0, 2.0, 1.0)
    assert break_even(method, baseline).flops == pytest.approx(0.1, rel=1e-9)


def test_runs_that_share_scores_share_their_cost_and_enough_of_them_break_even():
    seen = points("mmlu", "llama2-7b", "LESS")
    for row in published("amortised"):
        curve = Curve(0.0, 1.0, 1.0, 4.5931e18, seen["select_flops"][0]).shared(float(row["n_tasks"]))
        total = curve.selection_flops + float(row["fraction"]) * curve.full_flops
        assert total == pytest.approx(float(row["total_flops"]), rel=1e-3)
    method, baseline = Curve(0.0, 1.0, 4.0, 1.0, selection_flops=0.5), Curve(0.0, 1.0, 2.0, 1.0)
    runs = runs_needed(method, baseline, within=0.1)
    assert runs == 10
    assert break_even(method.shared(runs), baseline).flops == pytest.approx(0.1, rel=1e-9)
    assert break_even(method.shared(runs - 1), baseline).flops > 0.1
    assert runs_needed(baseline, method, within=0.1) is None


def test_the_cost_ratios_of_the_published_ledger():
    full, ppl, less = 4.5931e18, points("mmlu", "llama2-7b", "PPL"), points("mmlu", "llama2-7b", "LESS")
    assert ppl["select_flops"][-2] / full == pytest.approx(1 / 3, rel=1e-3)
    assert less["select_flops"][-2] / full == pytest.approx(1.80035, rel=1e-3)
    assert less["select_flops"][-2] / ppl["select_flops"][-2] == pytest.approx(5.4, rel=1e-3)
    assert ppl["total_flops"][2] == pytest.approx(0.1 * full + 1.5313e18, rel=1e-4)
    assert less["total_flops"][3] == pytest.approx(0.25 * full + 8.2692e18, rel=1e-4)


def test_the_frontier_is_strict_and_its_line_that_of_the_figures():
    assert frontier([1, 2, 2, 3, 4], [1.0, 3.0, 2.0, 3.0, 4.0]).tolist() == [0, 1, 4]
    assert frontier([2, 1, 1], [5.0, 5.0, 5.0]).tolist() == [1, 2]
    for task, model in (("mmlu", "llama2-13b"), ("bbh", "llama2-7b")):
        front = next(r for r in ROWS if r["record"] == "front" and (r["task"], r["model"]) == (task, model))
        runs = [r for r in ROWS if r["record"] == "point" and (r["task"], r["model"]) == (task, model)]
        fractions = sorted({float(r["fraction"]) for r in runs if float(r["fraction"]) <= 1})
        flops = [float(front_row["train_flops"]) for front_row in runs if front_row["method"] == "Random"][
            : len(fractions)
        ]
        best = [max(float(r["score"]) for r in runs if float(r["total_flops"]) <= cost * 1.0001) for cost in flops]
        slope, intercept = frontier_line(flops, best)
        assert slope == pytest.approx(float(front["slope"]), abs=2e-4), (task, model)
        assert intercept == pytest.approx(float(front["intercept"]), abs=5e-3)


def test_the_advantage_over_the_best_cheap_run_of_equal_cost():
    expected = {
        ("mmlu", "llama2-70b", "PPL"): (-0.10, 0.18, 0.34, 0.32, 0.21, 0),
        ("mmlu", "llama2-70b", "LESS"): (-0.82, -0.16, 0.39, 0.46, 0.36, 0),
        ("bbh", "llama2-13b", "LESS"): (-7.63, -3.32, -1.73, -0.65, -0.37, 0),
        ("ifeval", "llama2-7b", "PPL"): (-5.83, -4.05, -2.32, -0.87, 0.92, 0),
        ("mmlu", "llama2-7b", "LESS"): (-1.19, -0.87, -0.76, -0.49, -0.25, -0.10),
    }
    for (task, model, method), gains in expected.items():
        cheap = [points(task, model, name) for name in FREE]
        flops, scores = (np.concatenate([each[name] for each in cheap]) for name in ("total_flops", "score"))
        seen = points(task, model, method)
        found = advantage(seen["total_flops"], seen["score"], flops, scores)
        assert found[: len(gains)] == pytest.approx(gains, abs=0.006), (task, model, method)
    assert np.isnan(advantage([1.0], [5.0], [2.0], [4.0])).all()


@pytest.mark.parametrize(
    ("flops", "scores", "message"),
    [
        ([1.0], [2.0], "at least 2 points"),
        ([1.0, 2.0], [2.0, math.nan], "finite"),
        ([0.1, 2.0], [2.0, 3.0], "flops of training and selection, at least 0.5"),
    ],
)
def test_points_that_no_curve_goes_through_are_refused(flops, scores, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(flops, scores, 1.0, 5.0, selection_flops=0.5)
