"""A plan of a small run: what it predicts, what it recommends and refuses, and that it keeps nothing."""

import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
import two_vocabularies
import yaml
from two_vocabularies import COMMON, RARE, config_of, write_texts

from liveselect import cli
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.plan_forecast import (
    MethodCost,
    Trial,
    answer_expected,
    check_proxy,
    recommend,
    scoring_gain_needed,
)
from liveselect.functional.curves import Curve, break_even
from liveselect.verdict import Verdict

NETWORK = {**two_vocabularies.NETWORK, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
STEPS, EVERY = 80, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool, a reference set, and a configuration of `liveselect fit`."""
    folder = tmp_path_factory.mktemp("plan")
    write_texts(folder, {"pool": [COMMON] * 150 + [RARE] * 60, "reference": [RARE] * 12})
    trainer = {
        "max_steps": STEPS,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        ],
        "default_root_dir": str(folder / "runs"),
    }
    select = {"every_n_steps": EVERY, "ratio": 0.25, "keep_general": 0.0, "probes": 24}
    config = config_of(folder, NETWORK, trainer, {}, select)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def planned(folder):
    """The printed plan and its numbers, of a trial of seconds."""
    said = StringIO()
    with redirect_stdout(said):
        options = ["--config", str(folder / "run.yaml"), "--seconds", "6", "--json", str(folder / "plan.json")]
        assert cli.main(["plan", *options]) == 0
    return said.getvalue(), json.loads((folder / "plan.json").read_text())


def test_a_plan_knows_the_sizes_of_the_run(planned):
    _, found = planned
    trial = found["trial"]
    assert (trial["total_steps"], trial["every_n_steps"], trial["global_batch"]) == (STEPS, EVERY, 4)
    assert (trial["asked"], trial["measured"]) == (24, 24)
    assert trial["ratio"] == pytest.approx(0.25)  # the gate keeps twice as much, of which half is chosen
    assert trial["passes"] == pytest.approx(STEPS * 4 / trial["pool"])
    assert trial["epochs"] == pytest.approx(4 * trial["passes"])
    assert trial["strength"] > 0.5
    assert 0.05 <= trial["width"] < 0.5


def test_a_plan_keeps_nothing(planned, folder):
    assert not (folder / "runs").exists()
    assert not (folder / "logs").exists()


def test_every_method_is_timed_or_says_why_not(planned):
    said, found = planned
    methods = {each["name"]: each for each in found["methods"]}
    assert list(methods) == ["random", "prior", "LiveSelection", "MATES", "LivePDS", "Quad"]
    if methods["MATES"]["seconds"] is None:  # a machine that is too busy
        assert "seconds of the plan were over" in methods["MATES"]["note"]
    else:
        assert methods["MATES"]["candidates"] == 8 * EVERY
        assert methods["MATES"]["seconds"] > methods["random"]["seconds"]
    assert "no groups" in methods["Quad"]["note"]
    assert "| MATES |" in said
    assert "recommended: " in said


def test_what_was_predicted_is_what_happens(planned, folder):
    _, found = planned
    trial = found["trial"]
    off = ["--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"]
    off += ["--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"]
    run = SelectionCLI(["fit", "--config", str(folder / "run.yaml"), *off])
    ledger = next(each for each in run.trainer.callbacks if hasattr(each, "run")).run.ledger
    # what is counted is near; times of a second say how busy the machine is, so here they only hold the units
    assert trial["flops"] == pytest.approx(ledger.training_flops + ledger.selection_flops, rel=0.25)
    assert 1 / 60 < trial["training_seconds"] * 4 / ledger.training_seconds < 60
    assert 1 / 60 < trial["selection_seconds"] / ledger.selection_seconds < 60


TRIAL = Trial(
    method="MATES",
    parameters=100_000_000,
    total_steps=10_000,
    every_n_steps=1000,
    warmup_rounds=1,
    global_batch=100,
    pool=2_000_000,
    ratio=0.5,
    step_seconds=1.0,
    step_flops=1e12,
    once_seconds=100.0,
    once_flops=0.0,
    plain_seconds=2.0,
    fixed_seconds=10.0,
    candidate_seconds=0.5,
    asked=400,
    measured=40,
    training_memory=0,
    memory=0,
    device="cpu",
)


def test_the_run_is_the_sum_of_its_parts():
    assert TRIAL.round_seconds == 210
    assert TRIAL.seconds == 10_000 + 100 + 2 + 9 * 210
    assert TRIAL.overhead == 0.21
    assert replace(TRIAL, max_overhead=0.05).overhead == 0.05
    assert replace(TRIAL, max_overhead=0.001).overhead == 0.01  # the end of a round cannot be left out
    assert TRIAL.epochs == 1.0
    assert replace(TRIAL, copies_share=0.1).seconds == TRIAL.seconds + 0.1 * 10_000


def test_the_gain_that_is_needed_breaks_even_at_the_end_of_the_run():
    # in units of a step: both methods begin and end alike, one learns faster and is charged for selection
    full, once = 10_000.0, TRIAL.once_seconds
    budget = full * (1 + TRIAL.overhead) + once
    baseline = Curve(0.0, 1.0, 1.0, full)
    method = replace(baseline, rate=TRIAL.gain_needed, selection_flops=once, overhead=TRIAL.overhead)
    assert break_even(method, baseline).flops == pytest.approx(budget, rel=1e-3)


def test_an_answer_comes_when_its_look_aheads_are_paid_for():
    found = answer_expected(TRIAL, Verdict(share=0.1, steps=50), 150)
    price = 50 + 2 * 150 / 300
    assert found.looks == pytest.approx(0.1 * 10_000 / price)
    assert found.step == int(18 * price / 0.1) + 50
    short = answer_expected(TRIAL, Verdict(), 150)
    assert short.step is None
    again = answer_expected(TRIAL, Verdict(share=short.share_needed, steps=short.length), 150)
    assert again.step == pytest.approx(10_000, abs=1)


@pytest.mark.parametrize(
    ("changed", "live", "method"),
    [
        ({"strength": 1.0}, 20.0, "LiveSelection"),
        ({"strength": 1.0}, 200.0, "prior"),
        ({"strength": 0.0}, 20.0, "random"),
        ({"strength": 1.0, "width": 0.06}, 20.0, "LiveSelection"),
        ({"strength": 1.0, "width": 0.7}, 20.0, "random"),
        ({"strength": 1.0, "pool": 100_000}, 20.0, "random"),
    ],
)
def test_what_is_recommended_follows_from_the_numbers(changed, live, method):
    found = recommend(replace(TRIAL, **changed), [MethodCost("LiveSelection", live)])
    assert found.method == method


def test_what_cannot_pay_is_said():
    dear = recommend(replace(TRIAL, candidate_seconds=30.0), [])
    assert any("cannot be expected to pay" in text for text in dear.warnings)
    narrow = recommend(replace(TRIAL, ratio=0.05), [])
    assert any("10.0 times" in text and "at least 0.13" in text for text in narrow.warnings)
    assert not recommend(TRIAL, []).warnings


def test_scoring_before_training_must_pay_for_the_whole_pool():
    # a gradient of each candidate is one training pass over the pool, and half of the pool is trained on
    assert scoring_gain_needed(TRIAL, "gradient", TRIAL.parameters) == pytest.approx(3.0)
    assert math.isfinite(scoring_gain_needed(TRIAL, "perplexity", 1e9))


def test_a_proxy_that_is_too_small_to_rank_is_refused(folder, capsys):
    check_proxy(20e6, 1e9)
    check_proxy(1e6, 1e6)
    with pytest.raises(ValueError, match="proxy of at least 15000000 parameters"):
        check_proxy(1e6, 1e9)
    small = {"model": {"init_args": {"config": {**NETWORK, "hidden_size": 8, "intermediate_size": 16}}}}
    (folder / "proxy.yaml").write_text(yaml.safe_dump(small))
    options = ["--config", str(folder / "run.yaml"), "--proxy", str(folder / "proxy.yaml")]
    assert cli.main(["plan", *options]) == 1
    assert "expected a proxy of at least 15000000 parameters, or as large as the model" in capsys.readouterr().err


def test_a_configuration_without_selection_is_refused(folder, capsys):
    config = yaml.safe_load((folder / "run.yaml").read_text())
    del config["select"]
    (folder / "bare.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["plan", "--config", str(folder / "bare.yaml")]) == 1
    assert "without one: name it under `select`" in capsys.readouterr().err
