"""Runs that are killed at random moments: a sample on every run of the tests, the whole matrix with ``-m slow``."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import kill_matrix
import pytest
from ranks import forked


def _printed(rank, ranks, folder, options):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = kill_matrix.main(options)
    return code, printed.getvalue()


def killed(*options: str) -> str:
    ((code, printed),) = forked(_printed, 1, options)
    assert code == 0, printed[-4000:]
    return printed


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_sample_of_killed_runs_trains_on_the_same_candidates():
    assert " 0 failures" in killed("--kills", "3", "--ranks", "11", "--seed", "3")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_runs_killed_at_any_moment_train_on_the_same_candidates():
    assert " 0 failures" in killed("--kills", "120")


def elsewhere() -> list[str]:
    """Return the options of runs on another file system than that of temporary files; skip where there is none."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is one file system only")
    return ["--folder", str(memory), "--signals", *kill_matrix.SIGNALS]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_on_another_file_system_that_are_asked_to_stop_or_killed_train_on_the_same():
    options = ("--kills", "4", "--ranks", "11", "--methods", "mates", "--workers", "0", "--seed", "5")
    assert " 0 failures" in killed(*options, *elsewhere())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_runs_on_another_file_system_ended_by_any_signal_at_any_moment_train_on_the_same():
    assert " 0 failures" in killed("--kills", "120", "--seed", "11", *elsewhere())
