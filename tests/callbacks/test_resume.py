"""A run that is killed anywhere continues with the same batches and the same weights, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from ranks import forked
from sampling import chosen, mostly_slow
from small_run import ACCUMULATE, CASES, KILLS, STEPS, case, share_of_cases

from liveselect.decisions import read_about, rounds_in
from liveselect.decisions.files import read_rows
from liveselect.ledger import Ledger

pytestmark = pytest.mark.timeout(900)  # the first test pays for all runs

LEFT_OUT = ("first batch of a new epoch", "before the first checkpoint")  # other methods are killed there
SAMPLE = [  # every place, and every method
    *(("regression", 2 * (index % 2), kill) for index, kill in enumerate(KILLS) if kill not in LEFT_OUT),
    ("quad", 0, "inside the step that is listened to"),
    ("quad", 0, "first batch of a new epoch"),
    ("pds", 0, "before the first checkpoint"),
    ("pds", 2, "first batch of a new round"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    """Every run, killed and resumed, two at a time."""
    folder = tmp_path_factory.mktemp("runs")
    asked = chosen(request, "test_a_killed_run_continues_to_the_bit", "method", "workers", "kill")
    asked |= chosen(request, "test_a_killed_run_measures_and_pulls_the_same", "method", "workers", "kill")
    codes = {name: code for share in forked(share_of_cases, 2, folder, sorted(asked)) for name, code in share.items()}
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder


def trace(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


def name_of(value) -> str:
    return str(value).replace(" ", "_")


@pytest.mark.parametrize(("method", "workers", "kill"), mostly_slow(CASES, SAMPLE), ids=name_of)
def test_a_killed_run_continues_to_the_bit(runs, method, workers, kill):
    folder, untouched = case(runs, method, workers, kill), case(runs, method, workers, None)
    codes = json.loads((runs / "codes.json").read_text())[str(folder.relative_to(runs))]
    assert codes == [-9, 0]
    whole = {tuple(place): (step, ids, weights) for place, step, ids, weights in trace(untouched)}
    lines = trace(folder)
    for place, step, ids, weights in lines:
        assert whole[tuple(place)] == (step, ids, weights), f"batch {place} differs"
    assert {tuple(line[0]) for line in lines} == set(whole)
    final, expected = (torch.load(place / "optimizer.pt", weights_only=True) for place in (folder, untouched))
    for index, moments in expected["state"].items():
        for key, value in moments.items():
            assert torch.equal(final["state"][index][key], value)


COSTS = ["round_flops", "flops_before"]
"""What a resumed run may differ in: it does again what the checkpoint does not hold."""


@pytest.mark.parametrize(("method", "workers", "kill"), mostly_slow(CASES, SAMPLE), ids=name_of)
def test_a_killed_run_measures_and_pulls_the_same(runs, method, workers, kill):
    """And leaves the same decisions, under its own name."""
    places = [case(runs, method, workers, name) for name in (kill, None)]
    killed, whole = (Ledger.read(place / "selection" / "ledger.jsonl") for place in places)
    for record, expected in zip(killed.rounds, whole.rounds, strict=True):
        assert (record.plan, record.measured, record.influence) == (
            expected.plan,
            expected.measured,
            expected.influence,
        )
        assert record.groups == expected.groups
    assert killed.run_id != whole.run_id
    for mine, others in zip(*(rounds_in(place / "selection/decisions").items() for place in places), strict=True):
        decided, expected = (read_rows(path).drop_columns(COSTS) for path in (mine[1], others[1]))
        assert (mine[0], decided) == (others[0], expected)
        assert read_about(mine[1]) == {**read_about(others[1]), "run": killed.run_id}


def test_workers_do_not_change_what_is_trained_on(runs):
    for method in ("regression", "quad", "pds"):
        assert trace(case(runs, method, 0, None)) == trace(case(runs, method, 2, None))


def test_the_uninterrupted_run_trains_every_planned_batch_once(runs):
    lines = trace(case(runs, "regression", 0, None))
    assert len(lines) == STEPS * ACCUMULATE
    assert len({tuple(place) for place, *_ in lines}) == len(lines)
    assert lines[-1][1] == STEPS


def test_the_runs_did_what_their_methods_are_there_for(runs):
    quad, pds = (Ledger.read(case(runs, name, 0, None) / "selection" / "ledger.jsonl") for name in ("quad", "pds"))
    assert [record.metrics.get("arms/overheard", 0.0) > 0 for record in quad.rounds] == [False, False, True, True]
    temperatures = [record.metrics["temperature"] for record in pds.rounds[1:]]
    assert temperatures == pytest.approx([0.7, 0.4, 0.1])
