"""What only looks at a run can cost a warning, and never the run nor its data."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_run import BATCH, POOL, SIMPLE, SmallLM, rows, small_trainer, weights_hash

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.callbacks.folder import logger_folder
from liveselect.callbacks.progress import RoundProgress
from liveselect.datamodules import SelectionDataModule
from liveselect.decisions import rounds_in
from liveselect.decisions.explain import explain
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.looking import CarefulProgress, only_looking
from liveselect.regressors import HashedRidgeRegressor
from liveselect.report import write_report
from liveselect.selectors import RegressionSelector

HALF = "b\ud83d"  # as JSON Lines with a cut emoji give it


class Panic(BaseException):
    """As errors of compiled tokenizers are."""


def fit(folder: Path, names=("a", "b"), callbacks=(), data_class=SelectionDataModule, first=(), **settings):
    """Train 8 steps in 2 rounds, one of which measures; returns the hash of the weights and what was warned of."""
    pl.seed_everything(1, verbose=False)
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    estimator = OneStepInfluence(step="in_batch")
    selection = DataSelection(selector, estimator, every_n_steps=4, dirpath=folder / "selection")
    pool = [{**row, "source": names[index % len(names)]} for index, row in enumerate(rows(POOL, seed=1))]
    data = data_class(pool=pool, reference=rows(6, seed=2), batch_size=BATCH, probe_batch_size=4, groups="source")
    module = SmallLM()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = small_trainer(folder, [*first, selection, *callbacks], **{**SIMPLE, "max_steps": 8, **settings})
        trainer.fit(module, datamodule=data)
    texts = [str(each.message) for each in said if issubclass(each.category, SelectionWarning)]
    texts = [text for text in texts if "are measured: about" not in text]  # what a round of so small a run costs
    return weights_hash(module), " ".join(texts)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run"))[0]


def strict_lines(path: Path) -> list[dict]:
    """Parse as a browser does, to which NaN is no number."""

    def refused(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refused) for line in path.read_text(encoding="utf-8").splitlines()]


def test_half_a_surrogate_pair_in_a_group_is_escaped_wherever_it_is_shown(tmp_path, undisturbed):
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    weights, said = fit(tmp_path, ("a", HALF), [SelectionMonitor()], logger=loggers)
    assert (weights, said) == (undisturbed, "")
    folder = tmp_path / "selection"
    assert set(Ledger.read(folder / "ledger.jsonl").rounds[1].groups) == {"a", "b\\ud83d"}
    files = rounds_in(folder / "decisions")
    assert len(files) == 2
    chosen = {row.row["group"] for number in range(POOL) for row in explain(folder, number) if row.row}
    assert chosen == {"a", "b\\ud83d"}
    assert "b\\ud83d" in write_report([folder], tmp_path / "report.html").read_text()


@pytest.mark.parametrize("error", [OverflowError("too large"), Panic("index out of range"), KeyError("id")])
def test_a_tokenizer_that_raises_costs_the_texts_alone(tmp_path, undisturbed, error):
    class Data(SelectionDataModule):
        def decode(self, input_ids):
            raise error

    weights, said = fit(tmp_path, data_class=Data)
    assert weights == undisturbed
    assert "the examples of a round could not be decoded" in said
    (example, *_) = Ledger.read(tmp_path / "selection" / "ledger.jsonl").rounds[1].examples
    assert example.text == "(could not be decoded)"
    assert example.score is not None


def test_a_tokenizer_that_returns_something_else_than_texts_costs_a_warning(tmp_path, undisturbed):
    class Data(SelectionDataModule):
        def decode(self, input_ids):
            return [None, b"bytes"]  # neither the right kind nor the right number

    weights, _ = fit(tmp_path, data_class=Data)
    assert weights == undisturbed
    assert (tmp_path / "selection" / "ledger.jsonl").exists()


class Logs(Callback):
    def __init__(self, value):
        self.value = value

    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics["odd_loss"] = self.value


VALIDATED = {"limit_val_batches": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}


def test_numbers_that_json_does_not_know_are_null_in_the_ledger_and_nan_when_read(tmp_path):
    fit(tmp_path, callbacks=[SelectionMonitor()], **VALIDATED)
    book = Ledger.read(tmp_path / "selection" / "ledger.jsonl")
    book.rounds[1].influence[2] = float("inf")
    book.rounds[1].metrics["x"] = float("nan")
    book.evaluate(9, {"val_loss": float("nan"), "other": 1.0})
    book.write(tmp_path / "nan.jsonl")
    lines = strict_lines(tmp_path / "nan.jsonl")
    assert [line["influence"][2] for line in lines if line["kind"] == "round" and line["measured"]] == [None]
    read = Ledger.read(tmp_path / "nan.jsonl")
    assert torch.tensor(read.rounds[1].influence).isnan().sum() == 1
    assert read.rounds[1].metrics["x"] != read.rounds[1].metrics["x"]
    assert read.evaluations[-1].metrics["other"] == 1.0
    assert write_report([tmp_path / "nan.jsonl"], tmp_path / "report.html").exists()
    # as versions before wrote it
    (tmp_path / "old.jsonl").write_text((tmp_path / "nan.jsonl").read_text().replace('"x": null', '"x": NaN'))
    old = Ledger.read(tmp_path / "old.jsonl").rounds[1].metrics["x"]
    assert old != old


def test_a_metric_that_is_a_vector_is_left_out_of_the_ledger(tmp_path, undisturbed):
    _, said = fit(tmp_path, callbacks=[SelectionMonitor()], first=[Logs(torch.zeros(3))], **VALIDATED)
    assert "the metric odd_loss is no number" in said
    (entry, *_) = Ledger.read(tmp_path / "selection" / "ledger.jsonl").evaluations
    assert "val_loss" in entry.metrics
    assert "odd_loss" not in entry.metrics


def test_a_nan_among_the_metrics_keeps_the_ledger_json(tmp_path):
    fit(tmp_path, first=[Logs(torch.tensor(float("nan")))], **VALIDATED)
    lines = strict_lines(tmp_path / "selection" / "ledger.jsonl")
    assert any(line["kind"] == "evaluation" and line["metrics"]["odd_loss"] is None for line in lines)


@pytest.mark.parametrize(
    "place",
    [
        "liveselect.rounds._groups",
        "liveselect.rounds.Histogram.of",
        "liveselect.decisions.files.DecisionLedger.write",
        "liveselect.ledger.Ledger.write",
        "liveselect.callbacks.records.round_line",
        "liveselect.callbacks.records.carry_decisions",
        "liveselect.callbacks.monitor.SelectionMonitor._view",
        "liveselect.callbacks.progress.RoundProgress.start",
        "liveselect.callbacks.progress.RoundProgress.advance",
        "liveselect.callbacks.progress._progress",
        "liveselect.ledger.RoundRecord.scalars",
        "liveselect.ledger.Ledger.new_alarms",
    ],
)
def test_whatever_only_looks_may_fail_in_any_way(tmp_path, undisturbed, monkeypatch, place):
    def fails(*arguments, **settings):
        raise Panic("no")

    monkeypatch.setattr(place, fails)
    weights, said = fit(tmp_path, callbacks=[] if place.endswith("scalars") else [SelectionMonitor()])
    assert weights == undisturbed
    assert "no" in said


def test_a_read_only_folder_with_an_older_ledger_costs_a_warning(tmp_path, undisturbed, monkeypatch):
    fit(tmp_path)
    before = (tmp_path / "selection" / "ledger.jsonl").read_bytes()

    def read_only(self, *arguments, **settings):
        raise OSError(30, "Read-only file system")

    for name in ("rename", "replace", "mkdir", "touch"):
        monkeypatch.setattr(Path, name, read_only)
    weights, said = fit(tmp_path)
    assert weights == undisturbed
    assert "Read-only file system" in said
    assert (tmp_path / "selection" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["log_dir", "save_dir"])
def test_a_logger_that_cannot_say_where_it_writes_costs_a_warning(tmp_path, name):
    def fail(logger):
        raise ConnectionError("the server is gone")

    logger = type("Lost", (CSVLogger,), {name: property(fail)})(tmp_path)
    trainer = SimpleNamespace(logger=logger, default_root_dir=str(tmp_path), log_dir=None)
    with pytest.warns(SelectionWarning, match="a logger could not say where it writes: the server is gone"):
        assert logger_folder(trainer) is None


def test_who_ends_the_process_is_let_through():
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), only_looking("a block"):
            raise error


def test_a_display_that_fails_is_given_up_after_one_warning():
    class Broken(RoundProgress):
        def advance(self, amount):
            raise Panic("no terminal")

    display = CarefulProgress(Broken("round", live=False))
    display.start("measure", 3, "candidates")
    with pytest.warns(SelectionWarning, match="no terminal"):
        display.advance(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        display.advance(1)
        display.stop()


@pytest.mark.parametrize("damage", [{"rounds": None}, {"evaluations": float("nan")}, {"names": 3}, None])
def test_a_damaged_state_of_the_monitor_costs_a_warning(damage):
    whole = {"rounds": 2, "evaluations": 1, "verdict": "", "names": ["one"]}
    monitor = SelectionMonitor()
    with pytest.warns(SelectionWarning, match="is shown again"):
        monitor.load_state_dict({} if damage is None else {**whole, **damage})
    assert monitor.state_dict() == SelectionMonitor().state_dict()
    monitor.load_state_dict(whole)
    assert monitor.state_dict() == whole
