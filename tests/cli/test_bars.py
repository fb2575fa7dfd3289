"""What a run shows without a terminal, and in one."""

import io
import logging
import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from small_run import SIMPLE, SmallLM, rows, small_data, small_trainer
from torch.utils.data import DataLoader

from liveselect.callbacks import DataSelection
from liveselect.cli import bars
from liveselect.cli.bars import PlainProgress, StepsProgressBar
from liveselect.selectors import UniformSelector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


def test_lines_say_how_far_a_run_is_and_nothing_is_drawn(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO, "liveselect")
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path / "s")
    settings = {**SIMPLE, "max_steps": 6, "enable_progress_bar": True}
    trainer = small_trainer(tmp_path, [selection, PlainProgress()], **settings)
    trainer.fit(SmallLM(), datamodule=small_data())
    steps = [line for line in caplog.messages if line.startswith("step ")]
    assert [re.match(r"step (\d) of 6, [\d.]+ steps/s, about .+ left$", line).group(1) for line in steps] == list(
        "123456"
    )
    written = "".join(capsys.readouterr())
    assert "\r" not in written
    assert "━" not in written


@pytest.mark.parametrize(
    ("terminal", "settings", "kind"),
    [
        (False, {"max_epochs": -1}, PlainProgress),
        (False, {}, PlainProgress),
        (True, {"max_epochs": -1}, StepsProgressBar),
        (True, {}, None),
        (False, {"enable_progress_bar": False}, None),
        (False, {"callbacks": [RichProgressBar()]}, None),
    ],
)
def test_a_bar_is_drawn_in_terminals_only(monkeypatch, terminal, settings, kind):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(bars, "Console", lambda: console)
    assert [type(each) for each in bars.bar_for(settings)] == ([] if kind is None else [kind])


def test_only_the_first_rank_speaks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO, "liveselect")
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    labelled = [{**row, "labels": row["input_ids"]} for row in rows(6, 0)]
    trainer = small_trainer(tmp_path, [PlainProgress()], **{**SIMPLE, "max_steps": 3, "enable_progress_bar": True})
    trainer.fit(SmallLM(), DataLoader(labelled, batch_size=2))
    assert not [line for line in caplog.messages if line.startswith("step")]
