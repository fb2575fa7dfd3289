"""What DataSelection does inside a run."""

import io
import logging
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from small_run import BATCH, POOL, SIMPLE, Place, SmallLM, Trace, rows, small_data, small_trainer, weights_hash

from liveselect.callbacks import MATES, DataSelection
from liveselect.callbacks.progress import RoundProgress
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector


def small_mates(folder, **arguments) -> MATES:
    defaults = {"every_n_steps": 4, "probes": 12, "ratio": 0.5, "regressor": HashedRidgeRegressor(), "dirpath": folder}
    return MATES(**{**defaults, **arguments})


def test_the_rounds_cover_the_run_and_the_last_is_as_short_as_what_is_left(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    small_trainer(tmp_path, [selection], max_steps=10).fit(SmallLM(), datamodule=small_data())
    ledger = Ledger.read(tmp_path / "ledger.jsonl")
    per_step = 3 * BATCH
    assert [(record.step, record.chosen) for record in ledger.rounds] == [
        (0, 4 * per_step),
        (4, 4 * per_step),
        (8, 2 * per_step),
    ]
    assert selection.plan.exhausted


def test_epochs_keep_their_meaning(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=7, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection], max_steps=-1, max_epochs=2)
    trainer.fit(SmallLM(), datamodule=small_data())
    assert trainer.current_epoch == 2
    assert trainer.global_step == 2 * POOL // (3 * BATCH)
    assert sum(record.chosen for record in selection.run.ledger.rounds) == 2 * POOL
    assert (selection.run.pool.uses == 2).all()


def test_warm_up_rounds_are_random_and_measure_nothing(tmp_path):
    mates = small_mates(tmp_path, warmup_rounds=2)
    small_trainer(tmp_path, [mates]).fit(SmallLM(), datamodule=small_data())
    rounds = mates.run.ledger.rounds
    assert [record.selector for record in rounds] == ["UniformSelector"] * 2 + ["RegressionSelector"] * 2
    assert [len(record.measured) for record in rounds] == [0, 0, 12, 12]


def test_the_ledger_counts_what_training_and_selection_cost(tmp_path):
    mates = small_mates(tmp_path, warmup_rounds=0)
    module = SmallLM()
    small_trainer(tmp_path, [mates]).fit(module, datamodule=small_data())
    ledger = mates.run.ledger
    width, layers, vocabulary, tokens = 16, 2, 50, 12
    weights = layers * (3 * width * width + width * width + 2 * width * 32) + width * vocabulary
    attention = layers * 2 * tokens * width  # scores, and what they weigh, for each token
    assert ledger.training_flops == 6 * (weights + attention) * tokens * BATCH * 3 * 14
    assert ledger.training_seconds > 0
    assert 0 < ledger.selection_share < 1
    assert ledger.selection_flops > 12 * 2 * weights * 6 * tokens  # twelve probes, six reference rows, per round


def test_every_logger_gets_the_scalars_of_every_round(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    mates = small_mates(tmp_path)
    small_trainer(tmp_path, [mates], logger=loggers, log_every_n_steps=1).fit(SmallLM(), datamodule=small_data())
    text = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "selection/regressor/spearman" in text
    assert "selection/chosen_share/" in text
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    assert [event.value for event in events.Scalars("selection/round")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("selection/round")] == [0, 4, 8, 12]


class Broken(Logger):
    name, version = "broken", 0

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("selection/") for key in metrics):
            raise ConnectionError("the network is down")

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_that_fails_costs_a_warning(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection], logger=Broken())
    with pytest.warns(SelectionWarning, match="Broken failed on selection metrics: the network is down"):
        trainer.fit(SmallLM(), datamodule=small_data())
    assert trainer.global_step == 14


def test_a_disk_that_fills_costs_a_warning(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "write", full)
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    with pytest.warns(SelectionWarning, match=r"could not write .*ledger\.jsonl: .*No space left"):
        small_trainer(tmp_path, [selection]).fit(SmallLM(), datamodule=small_data())
    assert len(selection.run.ledger.rounds) == 4


def test_validation_metrics_stand_beside_the_cost_by_then(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    small_trainer(tmp_path, [selection]).fit(SmallLM(), datamodule=small_data())
    entries = Ledger.read(tmp_path / "ledger.jsonl").evaluations
    assert [entry.step for entry in entries] == [3, 6, 9, 12]
    assert all("val_loss" in entry.metrics for entry in entries)
    assert [e.training_seconds for e in entries] == sorted(e.training_seconds for e in entries)
    assert entries[-1].training_flops == pytest.approx(12 / 14 * selection.run.ledger.training_flops)


def test_the_checkpoint_entry_is_the_whole_state_and_loads_with_weights_only(tmp_path):
    mates = small_mates(tmp_path)
    trainer = small_trainer(tmp_path, [mates], max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    entry = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["DataSelection"]
    assert entry["run"]["plan"]["cursor"] == mates.plan.cursor
    assert torch.equal(entry["run"]["pool"]["uses"], mates.run.pool.uses)


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    first = small_mates(tmp_path)
    trainer = small_trainer(tmp_path, [first], max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = small_mates(tmp_path)
    small_trainer(tmp_path, [second], max_steps=10).fit(
        SmallLM(), datamodule=small_data(), ckpt_path=tmp_path / "x.ckpt"
    )
    assert [record.step for record in second.run.ledger.rounds] == [0, 4, 8]  # the rest of a whole round is kept


def test_resuming_on_another_pool_is_refused(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection], max_steps=4)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = SelectionDataModule(pool=rows(POOL, seed=9), reference=rows(6, seed=2), batch_size=BATCH)
    resumed = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    with pytest.raises(ValueError, match="its row ids would mean other texts"):
        small_trainer(tmp_path, [resumed]).fit(SmallLM(), datamodule=other, ckpt_path=tmp_path / "x.ckpt")


def test_another_seed_on_resume_is_said(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection], max_steps=4)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = DataSelection(UniformSelector(), every_n_steps=4, seed=5, dirpath=tmp_path)
    with pytest.warns(SelectionWarning, match="selection seed 0, this run uses 5"):
        small_trainer(tmp_path, [resumed], max_steps=6).fit(SmallLM(), small_data(), ckpt_path=tmp_path / "x.ckpt")


class LogitsLM(pl.LightningModule):
    """A module that is no Hugging Face model: forward returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).cumsum(dim=1))

    def training_step(self, batch, batch_index):
        logits = self(batch["input_ids"])[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_returns_logits_needs_no_loss_function(tmp_path):
    mates = small_mates(tmp_path, warmup_rounds=0)
    small_trainer(tmp_path, [mates], **SIMPLE).fit(LogitsLM(), datamodule=small_data())
    assert len(mates.run.ledger.rounds[0].measured) == 12


def test_a_loss_function_of_ones_own_is_what_is_measured(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(batch)
        return module(batch["input_ids"]).square().mean(dim=(1, 2))

    mates = small_mates(tmp_path, warmup_rounds=0, loss_fn=loss, training_loss_differs=True)
    small_trainer(tmp_path, [mates], max_steps=2, **SIMPLE).fit(LogitsLM(), datamodule=small_data())
    assert calls


def test_the_probe_clips_as_the_trainer_does(tmp_path):
    def influence(**settings):
        pl.seed_everything(0, verbose=False)
        mates = small_mates(tmp_path, warmup_rounds=0, step="published")
        small_trainer(tmp_path, [mates], **{**SIMPLE, "max_steps": 1, "precision": "64-true", **settings}).fit(
            LogitsLM(), datamodule=small_data()
        )
        return torch.tensor(mates.run.ledger.rounds[0].influence)

    # clipped to almost nothing, an SGD step moves in proportion to the limit
    tiny = influence(gradient_clip_val=1e-3)
    double = influence(gradient_clip_val=2e-3)
    assert torch.allclose(double / tiny, torch.full_like(tiny, 2.0), rtol=0.05)
    assert influence(gradient_clip_val=None).abs().mean() > 10 * tiny.abs().mean()


def test_a_round_tells_what_it_does_in_plain_lines_without_a_terminal(caplog, monkeypatch):
    clock = iter([0.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("liveselect.callbacks.progress.time.monotonic", lambda: next(clock))
    display = RoundProgress("round 3", live=False)
    with caplog.at_level(logging.INFO, logger="liveselect"):
        display.start("measure influence", 30, "candidates")
        for amount in (10, 10, 5):
            display.advance(amount)
        display.stop()
    assert caplog.messages == [
        "round 3: measure influence, 10 of 30 candidates, about 22 s left",
        "round 3: measure influence, 25 of 30 candidates, about 6 s left",
    ]


def test_a_round_draws_a_bar_in_a_terminal(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=100)
    monkeypatch.setattr("liveselect.callbacks.progress.Console", lambda stderr: terminal)
    display = RoundProgress("round 3", live=True)
    display.start("measure influence", 30, "candidates")
    display.advance(30)
    display.stop()
    assert "round 3: measure influence" in screen.getvalue()
    assert "30/30 candidates" in " ".join(screen.getvalue().split())


def test_beside_the_bar_of_the_trainer_a_round_is_a_line_of_it_and_goes_when_it_ends(tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import RichProgressBar

    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=120)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: terminal)
    bar, left = RichProgressBar(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            left.append(len(bar.progress.tasks))

    def advanced(self, amount):
        advance(self, amount)
        bar.progress.refresh()

    advance = RoundProgress.advance
    monkeypatch.setattr(RoundProgress, "advance", advanced)
    settings = {**SIMPLE, "max_steps": 6, "enable_progress_bar": True}
    small_trainer(tmp_path, [small_mates(tmp_path), bar, Look()], **settings).fit(SmallLM(), datamodule=small_data())
    shown = screen.getvalue()
    assert re.search(r"round 1 \(.*\): measure influence\s+━+ +\d+/12", shown)
    assert set(left) == {1}  # the bar of the training alone


def test_presets_are_the_parts_they_name(tmp_path):
    mates = small_mates(tmp_path, temperature=0.3, noise="released_bottomk", step="in_batch", seed=4)
    assert isinstance(mates.selector, RegressionSelector)
    assert isinstance(mates.estimator, OneStepInfluence)
    assert (mates.selector.temperature, mates.selector.noise, mates.estimator.step) == (
        0.3,
        "released_bottomk",
        "in_batch",
    )
    assert mates.state_key == DataSelection(UniformSelector()).state_key == "DataSelection"


@pytest.mark.parametrize("epochs", [{"max_steps": 24, "max_epochs": -1}, {"max_steps": -1, "max_epochs": 3}])
def test_a_checkpoint_of_an_epochs_end_resumes_exactly(tmp_path, epochs):
    def fit(folder, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        selection = DataSelection(UniformSelector(), every_n_steps=7, dirpath=folder)
        keep = ModelCheckpoint(folder / "checkpoints", save_on_train_epoch_end=True, save_top_k=-1, filename="{epoch}")
        callbacks = [Place(selection), selection, Trace(folder / "trace"), keep]
        settings = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "limit_val_batches": 0, **epochs}
        small_trainer(folder, callbacks, **settings).fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
        return (folder / "trace").read_text().splitlines()

    for name in ("whole", "epoch=0", "epoch=1"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole")
    for epoch in (0, 1):
        name = f"epoch={epoch}"
        resumed = fit(tmp_path / name, tmp_path / "whole" / "checkpoints" / f"{name}.ckpt")
        assert resumed == whole[POOL // BATCH * (epoch + 1) :]


def test_a_validation_loader_that_draws_random_numbers_does_not_disturb_a_resume(tmp_path):
    class Plain(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(rows(24, seed=3), batch_size=2)

        def val_dataloader(self):
            return torch.utils.data.DataLoader(rows(4, seed=4), batch_size=2)  # seeds its workers from the global state

    class Module(SmallLM):
        def training_step(self, batch, batch_index):
            return super().training_step({**batch, "labels": batch["input_ids"]}, batch_index)

        def validation_step(self, batch, batch_index):
            return super().validation_step({**batch, "labels": batch["input_ids"]}, batch_index)

    def fit(folder, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        selection = DataSelection(UniformSelector(), every_n_steps=2, dirpath=folder)
        keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = Module()
        settings = {"accumulate_grad_batches": 1, "val_check_interval": 2, "max_steps": 6}
        data = SelectionDataModule.wrap(Plain(), reference=rows(4, seed=2))
        small_trainer(folder, [selection, keep], **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
        return weights_hash(module)

    whole = fit(tmp_path / "whole")
    for step in (2, 4):
        assert fit(tmp_path / str(step), tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt") == whole


def test_a_stop_that_min_steps_delays_finds_a_plan_to_go_on_with(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, *arguments):
            trainer.should_stop = True

    selection = DataSelection(UniformSelector(), every_n_steps=2, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [Stop(), selection], max_steps=12, min_steps=7)
    trainer.fit(SmallLM(), datamodule=small_data())
    assert trainer.global_step >= 7
