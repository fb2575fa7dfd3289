"""Runs that are killed at random moments: a sample on every run of the tests, the whole matrix with ``-m slow``."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_matrix.py"


def killed(*options: str, limit: float) -> str:
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_a_sample_of_killed_runs_trains_on_the_same_candidates():
    assert " 0 failures" in killed("--kills", "8", "--ranks", "11", "21", "12", "--seed", "3", limit=580)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_runs_killed_at_any_moment_train_on_the_same_candidates():
    assert " 0 failures" in killed("--kills", "120", limit=7000)
