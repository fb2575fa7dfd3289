"""Every run has a folder of its own, also beside another run, and goes on in it."""

import logging
import os
import signal
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from filelock import FileLock
from lightning.pytorch.loggers import CSVLogger, Logger
from small_run import SIMPLE, SmallLM, forked, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.callbacks.folder import LOCK_FILE
from liveselect.cli.fit import RunConfig
from liveselect.decisions import find_decisions, read_about, read_plan, rounds_in
from liveselect.decisions.diff import compare_runs
from liveselect.decisions.explain import explain
from liveselect.ledger import Ledger
from liveselect.report import load_runs
from liveselect.selectors import ReplaySelector, UniformSelector


def fit(root: Path, seed=0, steps=8, dirpath=None, ckpt_path=None, **settings) -> pl.Trainer:
    selection = DataSelection(UniformSelector(), every_n_steps=4, seed=seed, dirpath=dirpath)
    trainer = small_trainer(root, [selection], **{**SIMPLE, "max_steps": steps, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
    return trainer


def plans(folder: Path) -> dict[str, list[str]]:
    """Return the plans that ledger and decisions of a folder tell of."""
    files = rounds_in(folder / "decisions").values()
    ledger = Ledger.read(folder / "ledger.jsonl")
    assert {read_about(path)["run"] for path in files} == {ledger.run_id}
    return {"ledger": [record.plan for record in ledger.rounds], "files": [read_plan(p).fingerprint for p in files]}


def held(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK_FILE)


@pytest.mark.parametrize("dirpath", [False, True])
def test_a_second_run_in_a_folder_that_is_written_to_takes_one_of_its_own(tmp_path, caplog, dirpath):
    place = tmp_path / "selection"
    given = place if dirpath else None
    fit(tmp_path, seed=0, dirpath=given)
    first = plans(place)
    with held(place), caplog.at_level(logging.INFO, "liveselect"):
        fit(tmp_path, seed=1, dirpath=given)
        fit(tmp_path, seed=2, dirpath=given)
    lines = [record.getMessage() for record in caplog.records if "of this run are in" in record.getMessage()]
    assert [str(tmp_path / f"selection-{i}") in line for i, line in enumerate(lines, 1)] == [True, True]
    assert plans(place) == first
    assert len({str(plans(tmp_path / name)) for name in ("selection", "selection-1", "selection-2")}) == 3
    for name in ("selection-1", "selection-2"):
        found = plans(tmp_path / name)
        assert found["ledger"] == found["files"]


def test_two_processes_that_begin_at_once_mix_nothing(tmp_path):
    began = time.time() + 1.0

    def child(seed):
        time.sleep(max(0.0, began - time.time()))
        fit(tmp_path, seed=seed, dirpath=tmp_path / "selection")

    children = []
    for seed in (0, 1, 2):
        pid = os.fork()
        if pid == 0:
            os._exit(forked(child, seed))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    found = [plans(folder) for folder in sorted(tmp_path.glob("selection*"))]
    ledgers = [Ledger.read(path) for path in tmp_path.glob("selection*/ledger*.jsonl")]
    assert {ledger.about["seed"] for ledger in ledgers} == {0, 1, 2}
    assert all(each["ledger"] == each["files"] for each in found)


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    place = tmp_path / "selection"

    class Dies(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=place)
        data = small_data(workers=2)
        small_trainer(tmp_path, [selection, Dies()], **{**SIMPLE, "max_steps": 4}).fit(SmallLM(), datamodule=data)

    assert forked(killed) == -signal.SIGKILL
    fit(tmp_path, dirpath=place)
    assert sorted(path.name for path in tmp_path.glob("selection*")) == ["selection"]
    assert plans(place)["ledger"] == plans(place)["files"]


def test_a_run_that_failed_lets_go_of_its_folder(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            raise RuntimeError("out of memory")

    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path / "selection")
    with pytest.raises(RuntimeError, match="out of memory"):
        small_trainer(tmp_path, [selection, Fails()], **SIMPLE).fit(SmallLM(), datamodule=small_data())
    fit(tmp_path, dirpath=tmp_path / "selection")
    assert sorted(path.name for path in tmp_path.glob("selection*")) == ["selection"]


def test_a_resumed_run_goes_on_in_its_own_folder(tmp_path):
    with held(tmp_path / "selection"):
        trainer = fit(tmp_path, seed=1, steps=6, dirpath=tmp_path / "selection")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, seed=0, dirpath=tmp_path / "selection")  # another one, meanwhile
    other = plans(tmp_path / "selection")
    fit(tmp_path, seed=1, steps=12, dirpath=tmp_path / "selection", ckpt_path=tmp_path / "x.ckpt")
    assert plans(tmp_path / "selection") == other
    found = plans(tmp_path / "selection-1")
    assert found["ledger"] == found["files"]
    assert len(found["ledger"]) == 3  # the second was planned whole, and ends after the resume


def test_a_run_that_resumes_where_another_wrote_keeps_the_others_ledger(tmp_path):
    trainer = fit(tmp_path / "a", steps=6)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path / "b", seed=1, dirpath=tmp_path / "b" / "selection")
    other = Ledger.read(tmp_path / "b" / "selection" / "ledger.jsonl")
    fit(tmp_path / "b", steps=12, dirpath=tmp_path / "b" / "selection", ckpt_path=tmp_path / "x.ckpt")
    assert Ledger.read(tmp_path / "b" / "selection" / "ledger-1.jsonl").run_id == other.run_id
    assert len(plans(tmp_path / "b" / "selection")["files"]) == 3


def test_without_a_logger_every_run_has_a_folder(tmp_path):
    first = fit(tmp_path, seed=0, steps=6)
    first.save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, seed=1)
    fit(tmp_path, seed=0, steps=12, ckpt_path=tmp_path / "x.ckpt")
    assert sorted(path.name for path in tmp_path.glob("selection*")) == ["selection", "selection-1"]
    assert Ledger.read(tmp_path / "selection" / "ledger.jsonl").about["seed"] == 0
    assert len(plans(tmp_path / "selection")["files"]) == 3
    assert len({run.ledger.run_id for run in load_runs([tmp_path])}) == 2


class Remote(Logger):
    """As MLflow's with a server: it names its runs, and keeps nothing here."""

    def __init__(self, version):
        super().__init__()
        self._version = version

    @property
    def name(self):
        return "experiment"

    @property
    def version(self):
        return self._version

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_without_a_folder_gives_every_run_one(tmp_path):
    for version in ("abc", "def"):
        fit(tmp_path, logger=Remote(version))
    for version in ("abc", "def"):
        assert len(plans(tmp_path / "experiment" / version / "selection")["files"]) == 2
    for _ in range(2):
        fit(tmp_path / "unnamed", logger=Remote(None))
    assert sorted(path.name for path in (tmp_path / "unnamed").glob("sel*")) == ["selection", "selection-1"]


def test_readers_refuse_the_records_of_several_runs(tmp_path):
    fit(tmp_path / "a", seed=0)
    fit(tmp_path / "b", seed=1)
    a, b = (tmp_path / name / "selection" for name in "ab")
    assert len(explain(a, 3)) == 2
    swapped = (b / "decisions" / "round-000001.parquet").read_bytes()
    own = (a / "decisions" / "round-000001.parquet").read_bytes()
    (a / "decisions" / "round-000001.parquet").write_bytes(swapped)
    pool = small_data()
    pool.setup("fit")
    for reader in (
        lambda: explain(a, 3),
        lambda: compare_runs(a, b),
        lambda: find_decisions(a),
        lambda: load_runs([a]),
        lambda: ReplaySelector(a)._read(pool.pool),
    ):
        with pytest.raises(ValueError, match="decisions of several runs, which nobody trained on together: round 0"):
            reader()
    (a / "decisions" / "round-000001.parquet").write_bytes(own)
    (a / "ledger.jsonl").write_bytes((b / "ledger.jsonl").read_bytes())
    for reader in (lambda: explain(a, 3), lambda: load_runs([a])):
        with pytest.raises(ValueError, match="the ledger beside it is of run"):
            reader()


def test_the_settings_of_a_run_from_a_file_are_kept_beside_its_own_records(tmp_path):
    class Parser:
        def save(self, config, path, **settings):
            Path(path).write_text(config)

    for seed in (0, 1):
        selection = DataSelection(UniformSelector(), every_n_steps=4, seed=seed)
        config = RunConfig(Parser(), f"seed: {seed}", save_to_log_dir=False, overwrite=True)
        trainer = small_trainer(tmp_path, [selection, config], **{**SIMPLE, "max_steps": 4})
        trainer.fit(SmallLM(), datamodule=small_data())
    assert {run.name: run.config for run in load_runs([tmp_path])} == {
        tmp_path.name: "seed: 0",
        "selection-1": "seed: 1",
    }


def test_records_stay_on_local_file_systems(tmp_path, monkeypatch):
    """Loggers and the Trainer may write to a store of objects; nothing can be locked or renamed there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fit("memory://bucket/run", steps=4)
    fit(tmp_path / "run", steps=4, logger=CSVLogger("memory://bucket/logs"))
    fit(tmp_path / "run", steps=4, dirpath="~/mine")
    folders = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("ledger.jsonl")}
    assert folders == {Path("selection"), Path("run/selection"), Path("home/mine")}
