"""A run that goes on from a checkpoint under other conditions says what differs, and otherwise nothing differs."""

import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import BATCH, POOL, SIMPLE, SmallLM, Trace, pds, quad, regression, rows, small_trainer, trace_of

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.decisions import rounds_in
from liveselect.decisions.files import read_rows
from liveselect.grammar import SelectionWarning
from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.parts import digest_of
from liveselect.selectors import UniformSelector

ROUND, LONG = 4, 16
ESTIMATORS = {
    "regression": lambda: {"estimator": OneStepInfluence(step="in_batch")},
    "quad": lambda: {"estimator": KFACInfluence(factor_examples=8, factors_every=2)},
    "pds": dict,
    "uniform": dict,
}


def uniform(folder, **settings):
    return DataSelection(UniformSelector(), **settings)


METHODS = {"regression": regression, "quad": quad, "pds": pds, "uniform": uniform}


def data(pool=POOL, batch=BATCH):
    candidates = [{**row, "cluster": f"cluster {i % 4}"} for i, row in enumerate(rows(pool, seed=1))]
    return SelectionDataModule(
        pool=candidates, reference=rows(6, seed=2), batch_size=batch, probe_batch_size=4, groups="cluster"
    )


def fit(folder: Path, method: str, max_steps: int, ckpt_path=None, source=None, every=2, settings=None, **trainer):
    """Train, and return what was said."""
    pl.seed_everything(1, verbose=False)
    given = {"every_n_steps": ROUND, "warmup_rounds": 1, "dirpath": folder / "selection", **ESTIMATORS[method]()}
    chosen = METHODS[method](folder, **{**given, **(settings or {})})
    save = ModelCheckpoint(folder / "ck", every_n_train_steps=every, save_top_k=-1, filename="{step}")
    options = {**SIMPLE, "precision": "32-true", "max_steps": max_steps, **trainer}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        small_trainer(folder, [chosen, Trace(folder / "trace"), save], **options).fit(
            SmallLM(), datamodule=source or data(), ckpt_path=ckpt_path
        )
    return [str(each.message) for each in said if issubclass(each.category, SelectionWarning)]


def resumed_lines(said):
    return [text for text in said if "resumed" in text or "goes on" in text]


def decisions(folder):
    """Return what was decided in each round; each file also names its run."""
    return {number: read_rows(path) for number, path in rounds_in(folder / "selection/decisions").items()}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of each method that ended inside its third round."""
    folder = tmp_path_factory.mktemp("short")
    for method in METHODS:
        (folder / method).mkdir()
        fit(folder / method, method, 10)
    return folder


@pytest.mark.parametrize("method", ["regression", "quad", "uniform"])
def test_a_later_end_trains_what_one_long_run_trains_to_the_bit(tmp_path, short, method, caplog):
    fit(tmp_path, method, LONG)
    at_once = short / method
    with caplog.at_level(logging.INFO, logger="liveselect"):
        said = fit(at_once, method, LONG, ckpt_path=at_once / "ck/step=10.ckpt")
    assert trace_of(at_once) == trace_of(tmp_path)
    ledgers = [Ledger.read(place / "selection/ledger.jsonl").rounds for place in (at_once, tmp_path)]
    for record, expected in zip(*ledgers, strict=True):
        assert (record.step, record.plan, record.measured, record.influence, record.chosen, record.groups) == (
            expected.step,
            expected.plan,
            expected.measured,
            expected.influence,
            expected.chosen,
            expected.groups,
        )
    assert decisions(at_once) == decisions(tmp_path)
    assert resumed_lines(said) == []
    assert "the run is resumed to train until step 16 (max_steps), the checkpoint was written to end at step 10: " in (
        caplog.text
    )


def test_what_was_planned_and_not_trained_on_is_kept_and_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="liveselect"):
        fit(tmp_path, "uniform", 10)
    saved = torch.load(tmp_path / "ck/step=10.ckpt", weights_only=True)["callbacks"]["DataSelection"]["run"]["plan"]
    assert (len(saved["ids"]), saved["cursor"]) == (ROUND * BATCH, 2 * BATCH)
    assert f"{2 * BATCH} of the {ROUND * BATCH} candidates of round 2 were not trained on" in caplog.text


def test_no_candidate_is_trained_on_twice_before_all_were_once_where_training_ends_with_the_pass(tmp_path):
    """Then the last round is as long as training: a whole one would begin the next pass."""
    fit(tmp_path, "uniform", 10, source=data(pool=10 * BATCH))
    trained = [each for line in trace_of(tmp_path) for each in line[2]]
    assert sorted(trained) == list(range(10 * BATCH))
    said = fit(tmp_path, "uniform", 14, ckpt_path=tmp_path / "ck/step=10.ckpt", source=data(pool=10 * BATCH))
    (line,) = resumed_lines(said)
    assert "until step 14 (max_steps), the checkpoint was written to end at step 10: round 2 was planned" in line
    assert f"with {2 * BATCH} candidates instead of {ROUND * BATCH}" in line


def test_a_share_is_not_left_for_steps_that_are_not_trained(short):
    """Where only the best of the pool are meant to be trained on, the last round is as long as training."""
    rounds = Ledger.read(short / "pds/selection/ledger.jsonl").rounds
    assert [record.chosen for record in rounds] == [ROUND * BATCH, ROUND * BATCH, 2 * BATCH]
    (line,) = resumed_lines(fit(short / "pds", "pds", 12, ckpt_path=short / "pds/ck/step=10.ckpt"))
    assert "round 2 was planned for that end" in line


def test_a_round_longer_than_the_pool_is_cut_to_what_is_trained_on(tmp_path):
    fit(tmp_path, "uniform", 10, settings={"every_n_steps": 1000})
    (record,) = Ledger.read(tmp_path / "selection/ledger.jsonl").rounds
    assert record.chosen == 10 * BATCH


def test_a_later_end_is_said_where_nothing_was_measured_ahead(tmp_path):
    spread = {"probes_between_steps": 3}
    fit(tmp_path, "regression", 10, settings=spread)
    (line,) = resumed_lines(fit(tmp_path, "regression", 13, tmp_path / "ck/step=10.ckpt", settings=spread))
    assert "nothing was measured ahead in round 2" in line
    earlier = fit(tmp_path, "regression", 13, tmp_path / "ck/step=6.ckpt", settings=spread)
    assert resumed_lines(earlier) == []


@pytest.mark.parametrize(
    ("batch", "trainer", "line"),
    [
        (2 * BATCH, {}, f"resumed with {2 * BATCH} examples in an optimizer step (batch_size was {BATCH} and is "),
        (
            BATCH,
            {"accumulate_grad_batches": 2},
            "(accumulate_grad_batches was 1 and is 2), the checkpoint was written ",
        ),
        (BATCH // 2, {"accumulate_grad_batches": 2}, "with as many: the same candidates are trained on"),
        (
            BATCH,
            {"gradient_clip_val": 0.5},
            "other clipping than that of the checkpoint (gradient_clip_val 1.0, now 0.5)",
        ),
        (BATCH, {"precision": "bf16-mixed"}, "with precision bf16-mixed, the checkpoint was written with 32-true: "),
        (BATCH, {"max_steps": 9}, None),
        (BATCH, {}, None),
    ],
)
def test_other_conditions_are_said_in_a_line(tmp_path, short, batch, trainer, line):
    options = {"max_steps": 10, **trainer}
    said = fit(tmp_path, "uniform", source=data(batch=batch), ckpt_path=short / "uniform/ck/step=8.ckpt", **options)
    found = resumed_lines(said)
    assert len(found) == (line is not None)
    assert line is None or line in found[0]


def test_another_number_of_ranks_is_said_in_a_line(tmp_path, short):
    saved = torch.load(short / "uniform/ck/step=8.ckpt", weights_only=True)
    conditions = saved["callbacks"]["DataSelection"]["conditions"]
    conditions.update(ranks=2, batch_size=BATCH // 2)  # as two ranks would have written it
    entry = saved["callbacks"]["DataSelection"]
    entry["digest"] = digest_of({key: value for key, value in entry.items() if key != "digest"})
    torch.save(saved, tmp_path / "two.ckpt")
    (line,) = resumed_lines(fit(tmp_path, "uniform", 10, ckpt_path=tmp_path / "two.ckpt"))
    assert f"(batch_size was {BATCH // 2} and is {BATCH}; ranks was 2 and is 1)" in line


def test_a_checkpoint_without_selection_is_said_in_a_line(tmp_path, short):
    saved = torch.load(short / "uniform/ck/step=8.ckpt", weights_only=True)
    del saved["callbacks"]["DataSelection"]
    torch.save(saved, tmp_path / "without.ckpt")
    (line,) = resumed_lines(fit(tmp_path, "uniform", 10, ckpt_path=tmp_path / "without.ckpt"))
    assert "training goes on from step 8, and the checkpoint holds no state of selection: selection begins here" in line
    assert "with 1 warm-up round," in line
