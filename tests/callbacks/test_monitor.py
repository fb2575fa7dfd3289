"""What the loggers hold after a run, read back from their files."""

import csv
import json
import logging
import sys
from itertools import pairwise
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from small_run import BATCH, POOL, SIMPLE, SmallLM, rows, small_data, small_trainer, weights_hash
from wandb_files import OfflineRun, close_wandb

from liveselect.callbacks import MATES, DataSelection, OfflineFallbackWandbLogger, SelectionMonitor
from liveselect.datamodules import SelectionDataModule
from liveselect.decisions import read_plan, rounds_in
from liveselect.grammar import SelectionWarning
from liveselect.ledger import Ledger
from liveselect.monitoring.workspace import SECTIONS, _full
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import UniformSelector
from liveselect.watch import Watch

STEPS, ROUND = 12, 4


def mates(folder, **settings):
    defaults = {"every_n_steps": ROUND, "probes": 12, "ratio": 0.25, "dirpath": folder / "selection"}
    return MATES(regressor=HashedRidgeRegressor(), min_spearman=None, **{**defaults, **settings})


SOURCES = ("books", "web/<b>crawl</b>", "code")


def sourced_data():
    pool = [{"input_ids": row["input_ids"], "source": SOURCES[i % 3]} for i, row in enumerate(rows(POOL, 1))]
    return SelectionDataModule(pool=pool, reference=rows(6, 2), batch_size=BATCH, groups="source", num_workers=0)


def monitored(folder, loggers, selection=None, monitor=None, callbacks=(), data=None, **settings):
    selection = selection or mates(folder)
    pl.seed_everything(1, verbose=False)
    defaults = {**SIMPLE, "max_steps": STEPS, "limit_val_batches": 1, "val_check_interval": 6, "logger": loggers}
    defaults["check_val_every_n_epoch"] = None
    module = SmallLM()
    trainer = small_trainer(folder, [selection, monitor or SelectionMonitor(), *callbacks], **{**defaults, **settings})
    trainer.fit(module, datamodule=data or small_data())
    return selection, module


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One run with three loggers, and what W&B wrote of it."""
    folder = tmp_path_factory.mktemp("shown")
    loggers = [
        CSVLogger(folder, "csv"),
        TensorBoardLogger(folder, "tb"),
        WandbLogger(project="liveselect", save_dir=folder, offline=True),
    ]
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=4, save_last=True)
    selection, module = monitored(folder, loggers, callbacks=[keep], data=sourced_data())
    close_wandb()
    return SimpleNamespace(folder=folder, selection=selection, run=OfflineRun(folder), module=module)


def test_wandb_has_every_scalar_of_every_round_with_its_value(shown):
    ledger, run = shown.selection.run.ledger, shown.run
    assert run.series("selection/round") == [0, 1, 2]
    assert run.series("selection/step") == [record.step for record in ledger.rounds] == [0, 4, 8]
    spearman = [record.metrics["regressor/spearman"] for record in ledger.rounds[1:]]
    assert run.series("selection_regressor/spearman") == pytest.approx(spearman)
    assert run.series("selection/measured") == [0, 12, 12]
    shares = run.series("selection/time_share")
    assert all(0 < share < 1 for share in shares[1:])
    flops = run.series("selection/total_flops")
    assert flops == sorted(flops)
    spent = [entry.training_flops + entry.selection_flops for entry in ledger.evaluations]
    assert set(spent) <= set(flops)
    for name in SOURCES:
        shares = [record.groups.get(name, {}).get("chosen", 0) / record.chosen for record in ledger.rounds]
        assert run.series(f"selection_mixture/{name}") == pytest.approx(shares)
    for phase, seconds in ledger.rounds[1].seconds.items():
        assert seconds in run.series(f"selection_cost/{phase}")


def test_the_axes_of_wandb_are_those_of_selection(shown):
    metrics = shown.run.metrics
    assert metrics["selection/*"] == "selection/step"
    assert metrics["selection_mixture/*"] == "selection/round"
    assert metrics["selection_by_flops/*"] == "selection/total_flops"


def test_the_loss_stands_against_the_total_flops(shown):
    pairs = [
        (row["selection/total_flops"], row["selection_by_flops/val_loss"])
        for row in shown.run.history
        if "selection_by_flops/val_loss" in row
    ]
    ledger = shown.selection.run.ledger
    assert pairs == [(e.training_flops + e.selection_flops, e.metrics["val_loss"]) for e in ledger.evaluations]
    assert len(pairs) == 2


def test_drift_is_that_of_consecutive_plans(shown):
    plans = [set(read_plan(path).ids.tolist()) for path in rounds_in(shown.folder / "selection/decisions").values()]
    overlap = [len(a & b) / len(a) for a, b in pairwise(plans)]
    assert shown.run.series("selection_drift/overlap") == overlap
    assert len(shown.run.series("selection_drift/rank_correlation")) == 1  # the first round compared nothing


def test_histograms_are_those_of_the_ledger(shown):
    records = shown.selection.run.ledger.rounds[1:]
    for key, kind in (("selection_histograms/scores", "counts"), ("selection_histograms/scores_of_chosen", "chosen")):
        found = [row["values"] for row in shown.run.series(key)]
        assert found == [getattr(record.histogram, kind) for record in records]
    assert [sum(row["values"]) for row in shown.run.series("selection_histograms/influence")] == [12, 12]


def test_tables_hold_chosen_and_rejected_texts(shown):
    tables = shown.run.tables("liveselect/examples")
    records = shown.selection.run.ledger.rounds
    assert len(tables) == len(records)
    for table, record in zip(tables, records, strict=True):
        assert table["columns"] == ["round", "step", "chosen", "score", "group", "id", "text"]
        assert [row[5] for row in table["data"]] == [example.id for example in record.examples]
        assert [row[6] for row in table["data"]] == [example.text for example in record.examples]
    assert {row[2] for row in tables[1]["data"]} == {True, False}
    for table, record in zip(shown.run.tables("liveselect/groups"), records, strict=True):
        known = {row[1]: dict(zip(table["columns"][2:], row[2:], strict=True)) for row in table["data"]}
        assert known == record.groups
        assert {row[0] for row in table["data"]} == {record.round}


def test_charts_stand_there_without_a_click(shown):
    assert {f"liveselect/{name}" for name in ("loss", "cost", "mixture", "rank correlation")} <= shown.run.charts


def test_the_configuration_of_wandb_tells_the_settings_of_selection_and_where_its_records_lie(shown):
    told = shown.run.config["selection"]
    assert told["folder"] == str((shown.folder / "selection").resolve())
    assert (told["preset"], told["every_n_steps"]) == ("MATES", ROUND)
    assert told.items() >= shown.selection.run.ledger.about.items()


def test_every_panel_of_the_saved_view_finds_its_numbers_in_a_run(shown):
    logged = {key for row in shown.run.history for key in row}
    missing = [
        key
        for panels in SECTIONS.values()
        for panel in panels
        for key in map(_full, panel.keys)
        if not any(each == key or (key.endswith("*") and each.startswith(key[:-1])) for each in logged)
    ]
    # too small a pool to hold a sample out, no bandit, too few probes for canaries, and a CPU
    assert missing == [
        "selection/mixture_loss",
        "selection_canary/*",
        *(f"selection_arms/{what}/*" for what in ("reward", "pulls", "bonus")),
        *(f"selection/mfu_{what}" for what in ("training", "whole")),
    ]


def test_artifacts_tell_their_lineage_and_hold_plan_and_scores(shown):
    run = shown.run
    (pool,), scores, plans = run.of_type("pool"), run.of_type("scores"), run.of_type("plan")
    assert json.loads(pool.metadata)["fingerprint"] == shown.selection.run.pool.fingerprint
    files = list(rounds_in(shown.folder / "selection/decisions").values())
    for index, (score, plan) in enumerate(zip(scores, plans, strict=True)):
        about = json.loads(plan.metadata)
        assert (about["pool"], about["scores"], about["round"]) == (pool.name, score.name, index)
        assert about["fingerprint"] == shown.selection.run.ledger.rounds[index].plan
        assert score.manifest.contents[0].size == files[index].stat().st_size
        ids = np.load(plan.manifest.contents[0].local_path)
        assert ids.tolist() == read_plan(files[index]).ids.tolist()
    (model,) = run.of_type("model")
    assert json.loads(model.metadata)["plan"] == shown.selection.run.ledger.rounds[-1].plan
    assert model.manifest.contents[0].path.endswith(".ckpt")


def test_csv_has_the_same_numbers(shown):
    with (shown.folder / "csv/version_0/metrics.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["selection/round"]]
    assert [float(row["selection/round"]) for row in table] == [0, 1, 2]
    assert [int(row["step"]) for row in table] == [0, 4, 8]
    mine = [float(row["selection/round_flops"]) for row in table]
    assert mine == [record.total_flops for record in shown.selection.run.ledger.rounds]


def test_tensorboard_has_scalars_histograms_and_texts(shown):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"histograms": 0, "tensors": 0, "scalars": 0}
    events = EventAccumulator(str(shown.folder / "tb/version_0"), size_guidance=everything)
    events.Reload()
    assert [event.value for event in events.Scalars("selection/round")] == [0, 1, 2]
    (first, second) = events.Histograms("selection/scores")
    record = shown.selection.run.ledger.rounds[1]
    assert (first.step, second.step) == (4, 8)
    assert first.histogram_value.num == sum(record.histogram.counts)
    assert events.Histograms("selection/influence")[0].histogram_value.num == 12
    texts = events.Tensors("selection/examples/text_summary")
    assert record.examples[0].text[:20].encode() in texts[1].tensor_proto.string_val[0]


def test_monitoring_changes_nothing_in_the_training(tmp_path, shown):
    selection, module = monitored(tmp_path, False, data=sourced_data())
    assert weights_hash(module) == weights_hash(shown.module)
    plans = [record.plan for record in shown.selection.run.ledger.rounds]
    assert [record.plan for record in selection.run.ledger.rounds] == plans


def test_an_alarm_is_an_alert_a_text_a_log_line_and_a_line_of_the_ledger(tmp_path, caplog, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("liveselect.watch.watching.FEWEST_HELD_OUT", 1)  # rounds are tiny here

    loggers = [WandbLogger(project="x", save_dir=tmp_path, offline=True), TensorBoardLogger(tmp_path, "tb")]
    with caplog.at_level(logging.WARNING, "liveselect"):
        monitored(tmp_path, loggers, monitor=SelectionMonitor(watch=Watch(min_spearman=1.0)))
    close_wandb()
    run = OfflineRun(tmp_path)
    rounds = Ledger.read(tmp_path / "selection/ledger.jsonl").rounds
    texts = [alarm.text for record in rounds for alarm in record.alarms if alarm.kind == "regressor"]
    assert len(texts) == 2  # not in the warm-up
    # told when it begins, and not again in every round
    assert [alert.title for alert in run.alerts].count("Selection: regressor") == 1
    assert sum(texts[0] in alert.text for alert in run.alerts) == 1
    assert sum("ALARM (regressor)" in line for line in caplog.messages) == 1
    assert any(texts[0] in line for line in caplog.messages)
    assert run.series("selection/alarms") == [len(record.alarms) for record in rounds]
    events = EventAccumulator(str(tmp_path / "tb/version_0"), size_guidance={"tensors": 0})
    events.Reload()
    shown = b"".join(event.tensor_proto.string_val[0] for event in events.Tensors("selection/alarms/text_summary"))
    assert texts[0].encode() in shown


def test_a_line_at_every_validation_tells_where_the_run_stands(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "liveselect"):
        selection, _ = monitored(tmp_path, False)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    entries = selection.run.ledger.evaluations
    assert len(lines) == len(entries) == 2
    for line, entry, round_index in zip(lines, entries, (1, 2), strict=True):
        expected = (
            f"step {entry.step} of 12, val_loss {entry.metrics['val_loss']:.4f}, round {round_index}, selection took "
        )
        assert line.startswith(expected)
        assert line.endswith("% of the time")
        assert 0 < float(line.removeprefix(expected).split("%")[0]) < 100


class Broken(Logger):
    name, version = "broken", 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("selection") for key in metrics):
            self.calls += 1
            raise ConnectionError("the network is down")

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_that_fails_costs_one_warning_and_is_then_left_alone(tmp_path):
    broken = Broken()
    other = CSVLogger(tmp_path, "csv")
    with pytest.warns(SelectionWarning, match="Broken failed to show selection.*the network is down") as warned:
        monitored(tmp_path, [broken, other])
    assert sum("Broken" in str(each.message) for each in warned) == 1
    assert broken.calls == 3
    assert "selection/round" in (tmp_path / "csv/version_0/metrics.csv").read_text()


def test_wandb_that_breaks_in_the_middle_costs_one_warning(tmp_path, monkeypatch):
    import wandb

    logger = WandbLogger(project="x", save_dir=tmp_path, offline=True)

    def dead(data, *arguments, **keywords):
        if any(key.startswith("selection") for key in data):
            raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(logger.experiment, "log", dead)
    with pytest.warns(SelectionWarning, match="WandbLogger failed to show selection.*no route to host") as warned:
        monitored(tmp_path, logger)
    close_wandb()
    assert sum("WandbLogger" in str(each.message) for each in warned) == 1
    assert len(Ledger.read(tmp_path / "selection/ledger.jsonl").rounds) == 3


def test_wandb_that_cannot_be_imported_when_it_is_shown_costs_one_warning(tmp_path, monkeypatch):
    logger = WandbLogger(project="x", save_dir=tmp_path, offline=True)
    assert logger.experiment  # it could be imported then

    def broken(self, run):
        raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr("liveselect.monitoring.wandb_sink.WandbSink.__init__", broken)
    with pytest.warns(SelectionWarning, match=r"WandbLogger failed to show selection.*libfoo") as warned:
        monitored(tmp_path, [logger, CSVLogger(tmp_path, "csv")], max_steps=4)
    close_wandb()
    assert sum("WandbLogger" in str(each.message) for each in warned) == 1
    assert "selection/round" in (tmp_path / "csv/version_0/metrics.csv").read_text()


@pytest.mark.parametrize("key", ["a" * 40, None])
def test_a_dead_network_or_a_missing_key_makes_the_run_an_offline_one(tmp_path, monkeypatch, key):
    close_wandb()  # it remembers the environment
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    settings = {"x_graphql_retry_max": 0}
    logger = OfflineFallbackWandbLogger(project="x", save_dir=tmp_path, patience=1, settings=settings, log_model=True)
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4)
    with pytest.warns(SelectionWarning, match=r"(?s)W&B cannot be reached.*wandb sync .*/wandb/offline-run-\*"):
        monitored(tmp_path, logger, max_steps=4, callbacks=[keep])
    close_wandb()
    run = OfflineRun(tmp_path)
    assert run.series("selection/round") == [0]
    (model,) = run.of_type("model")
    assert model.name.startswith("model-")  # Lightning's checkpoint: what was asked of the logger still holds


def test_without_wandb_and_tensorboard_the_others_work(tmp_path, monkeypatch):
    for name in ("wandb", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monitored(tmp_path, CSVLogger(tmp_path, "csv"), max_steps=4)
    assert "selection/round" in (tmp_path / "csv/version_0/metrics.csv").read_text()


def test_tables_are_bounded_in_rows_and_characters(tmp_path):
    class Kept(Broken):
        pass

    monitor = SelectionMonitor(examples=2, characters=5, rich_rounds=1)
    selection = mates(tmp_path)
    views = []
    monitor._show_round = lambda logger, view, rich: views.append((view, rich))
    monitored(tmp_path, Kept(), selection, monitor)
    assert [rich for _, rich in views] == [True, False, False]
    assert [len(view.examples) for view, _ in views] == [2, 4, 4]
    assert all(len(example.text) <= 5 for view, _ in views for example in view.examples)


def test_many_groups_are_shown_as_a_few_and_the_rest(tmp_path):
    groups = [{"input_ids": row["input_ids"], "source": f"s{i % 6}"} for i, row in enumerate(rows(POOL, 1))]
    data = SelectionDataModule(pool=groups, reference=rows(6, 2), batch_size=BATCH, groups="source")
    selection = DataSelection(UniformSelector(), every_n_steps=ROUND, dirpath=tmp_path)
    logger = CSVLogger(tmp_path, "csv")
    small_trainer(tmp_path, [selection, SelectionMonitor(groups=2)], max_steps=4, logger=logger, **SIMPLE).fit(
        SmallLM(), datamodule=data
    )
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["selection/round"])
    shares = {key.removeprefix("selection/mixture/"): float(value) for key, value in row.items() if "/mixture/" in key}
    assert len(shares) == 3
    assert shares["(others)"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_a_resumed_run_shows_each_round_once(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_last=True)
    monitored(tmp_path, CSVLogger(tmp_path, "first"), callbacks=[keep], max_steps=6)
    trainer = small_trainer(
        tmp_path, [mates(tmp_path), SelectionMonitor()], max_steps=STEPS, logger=CSVLogger(tmp_path, "second"), **SIMPLE
    )
    trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=tmp_path / "last.ckpt")
    with (tmp_path / "second/version_0/metrics.csv").open() as file:
        shown = [row["selection/round"] for row in csv.DictReader(file) if row["selection/round"]]
    assert [float(value) for value in shown] == [2]  # the second one goes on where the first run ended inside it


def test_a_resumed_run_goes_on_in_the_w_and_b_run_of_the_same_id(tmp_path):
    def logger(part):
        return WandbLogger(
            project="liveselect", save_dir=tmp_path / part, offline=True, id="brisk-river-7", resume="allow"
        )

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_last=True)
    monitored(tmp_path, logger("first"), callbacks=[keep], max_steps=6)
    close_wandb()
    trainer = small_trainer(
        tmp_path, [mates(tmp_path), SelectionMonitor()], max_steps=STEPS, logger=logger("second"), **SIMPLE
    )
    trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=tmp_path / "last.ckpt")
    close_wandb()
    parts = [OfflineRun(tmp_path / part) for part in ("first", "second")]
    assert all(part.folder.name.endswith("-brisk-river-7") for part in parts)
    assert [part.series("selection/round") for part in parts] == [[0, 1], [2]]


def test_a_monitor_without_selection_says_so(tmp_path):
    trainer = pl.Trainer(
        max_steps=1,
        logger=False,
        callbacks=[SelectionMonitor()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    from torch.utils.data import DataLoader

    with pytest.warns(SelectionWarning, match="nothing to show"):
        trainer.fit(SmallLM(), DataLoader([{**row, "labels": row["input_ids"]} for row in rows(4, 1)]))
