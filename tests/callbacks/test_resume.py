"""A run that is killed anywhere continues with the same batches and the same weights, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import ACCUMULATE, KILLS, STEPS

pytestmark = pytest.mark.timeout(900)  # the first test pays for all runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every run, killed and resumed, in one process that forks: importing costs more than running."""
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).parents[1] / "small_run.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def trace(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


def case(runs: Path, workers: int, name: str | None) -> Path:
    return runs / f"{workers}" / str(name).replace(" ", "_")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_continues_to_the_bit(runs, kill, workers):
    codes = json.loads((runs / "codes.json").read_text())[f"{workers}/{kill}"]
    assert codes == [-9, 0], (runs / "log").read_text()[-4000:]
    whole = {tuple(place): (step, ids, weights) for place, step, ids, weights in trace(case(runs, workers, None))}
    lines = trace(case(runs, workers, kill))
    for place, step, ids, weights in lines:
        assert whole[tuple(place)] == (step, ids, weights), f"batch {place} differs"
    assert {tuple(line[0]) for line in lines} == set(whole)
    final, expected = (
        torch.load(case(runs, workers, name) / "optimizer.pt", weights_only=True) for name in (kill, None)
    )
    for index, moments in expected["state"].items():
        for key, value in moments.items():
            assert torch.equal(final["state"][index][key], value)


def test_workers_do_not_change_what_is_trained_on(runs):
    assert trace(case(runs, 0, None)) == trace(case(runs, 2, None))


def test_the_uninterrupted_run_trains_every_planned_batch_once(runs):
    lines = trace(case(runs, 0, None))
    assert len(lines) == STEPS * ACCUMULATE
    assert len({tuple(place) for place, *_ in lines}) == len(lines)
    assert lines[-1][1] == STEPS


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_leaves_the_same_decisions_to_the_byte(runs, kill):
    whole, killed = (
        {path.name: path.read_bytes() for path in (case(runs, 0, name) / "selection/decisions").iterdir()}
        for name in (None, kill)
    )
    assert killed == whole
