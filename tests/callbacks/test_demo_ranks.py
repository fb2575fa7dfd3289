"""The demo's runs on four processes decide alike."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "demo_ranks.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_ranks_of_every_demo_run_decide_alike_and_train_on_their_plans(tmp_path):
    command = [sys.executable, str(SCRIPT), "--ranks", "4", "--steps", "60", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count(": equal") == 5
