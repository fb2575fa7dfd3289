"""What people see of a run who have set up no logging, and what those who have."""

import logging
import re

import pytest
from small_run import SIMPLE, SmallLM, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.callbacks.lines import LOGGER, show_lines
from liveselect.selectors import UniformSelector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@pytest.fixture
def unset(monkeypatch):
    """The logger as it is in a fresh process, where nobody has set up anything."""
    logger = logging.getLogger(LOGGER)
    for name, value in {"handlers": [], "level": logging.NOTSET, "propagate": True}.items():
        monkeypatch.setattr(logger, name, value)
    logger.manager._clear_cache()
    yield logger
    logger.manager._clear_cache()


def without_pytest(monkeypatch, *handlers):
    """Take away what pytest adds to the root when a test begins."""
    monkeypatch.setattr(logging.getLogger(), "handlers", list(handlers))


def fit(folder):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder / "s")
    small_trainer(folder, [selection], **{**SIMPLE, "max_steps": 8}).fit(SmallLM(), datamodule=small_data())


def test_every_round_is_a_line_on_standard_error_without_any_setting_up(tmp_path, unset, capsys, monkeypatch):
    without_pytest(monkeypatch)
    fit(tmp_path)
    said = capsys.readouterr().err
    rounds = re.findall(r"^round (\d+), step (\d+): UniformSelector chose 8 of \d+, in", said, re.MULTILINE)
    assert rounds == [("0", "0"), ("1", "4")]
    assert len(re.findall(r"^selection: 2 rounds", said, re.MULTILINE)) == 1


def test_whoever_sets_the_level_is_obeyed(tmp_path, unset, capsys, monkeypatch):
    without_pytest(monkeypatch)
    unset.setLevel(logging.WARNING)
    fit(tmp_path)
    assert "round 0" not in capsys.readouterr().err


def test_logging_that_was_set_up_is_left_alone(tmp_path, unset, capsys, monkeypatch):
    class Kept(logging.Handler):
        lines: list = []

        def emit(self, record):
            self.lines.append(record.getMessage())

    without_pytest(monkeypatch, Kept())
    show_lines()
    assert not unset.handlers
    assert unset.propagate
    unset.setLevel(logging.INFO)
    fit(tmp_path)
    assert "round 0" not in capsys.readouterr().err
    assert any(line.startswith("round 1, step 4") for line in Kept.lines)


def test_being_called_again_says_nothing_twice(unset, capsys, monkeypatch):
    without_pytest(monkeypatch)
    show_lines()
    show_lines()
    unset.info("once")
    assert capsys.readouterr().err == "once\n"


def test_a_command_shows_the_lines_even_where_a_library_set_up_logging(unset, capsys, monkeypatch):
    without_pytest(monkeypatch, logging.NullHandler())
    show_lines(always=True)
    show_lines()
    unset.info("once")
    assert capsys.readouterr().err == "once\n"
