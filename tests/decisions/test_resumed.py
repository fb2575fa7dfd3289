"""A run that goes on in another folder keeps its decisions together, or says where the others lie."""

import shutil

import pytest
import torch
from fakes import fake_context, play, random_source

from liveselect.cli import main
from liveselect.decisions import DecisionLedger, carry_decisions, lacking_rounds, rounds_in
from liveselect.decisions.resumed import rounds_as_text
from liveselect.rounds import SelectionRun
from liveselect.selectors import ReplaySelector, UniformSelector


def train(folder, rounds, state=None, seed=0):
    """Run rounds up to ``rounds`` in ``folder``, as the callback does; return the states after each round."""
    source = random_source(64)
    decisions = DecisionLedger(folder / "selection" / "decisions")
    run = SelectionRun(UniformSelector(), None, UniformSelector(), 0, source, seed=seed, decisions=decisions)
    if state is not None:
        run.load_state_dict(state)
    carry_decisions(decisions, run.ledger, source.pool.fingerprint)
    states = [run.state_dict()]
    for _ in range(run.next_round, rounds):
        play(run, 8)
        states.append(run.state_dict())
    run.ledger.write(folder / "selection" / "ledger.jsonl")
    return states


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "selection" / "decisions").iterdir()}


def test_a_run_that_goes_on_elsewhere_has_the_decisions_of_one_that_never_stopped(tmp_path):
    train(tmp_path / "whole", 5)
    states = train(tmp_path / "first", 4)
    before = contents(tmp_path / "first")
    train(tmp_path / "second", 5, states[3])
    assert contents(tmp_path / "second") == contents(tmp_path / "whole")
    assert contents(tmp_path / "first") == before
    assert lacking_rounds(tmp_path / "second" / "selection" / "decisions").rounds == []


def test_decisions_come_along_where_no_link_is_possible(tmp_path, monkeypatch):
    states = train(tmp_path / "first", 2)

    def refuse(*paths):
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    train(tmp_path / "second", 2, states[2])
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_decisions_of_another_run_do_not_come_along(tmp_path):
    states = train(tmp_path / "first", 3)
    shutil.rmtree(tmp_path / "first")
    train(tmp_path / "first", 3, seed=7)
    train(tmp_path / "second", 4, states[3])
    assert list(rounds_in(tmp_path / "second" / "selection" / "decisions")) == [3]


def test_a_run_that_goes_on_where_another_has_begun_gets_its_own_back(tmp_path):
    states = train(tmp_path, 3)
    own = contents(tmp_path)
    train(tmp_path, 4, seed=7)
    train(tmp_path, 3, states[3])
    assert contents(tmp_path) == own
    assert len(list((tmp_path / "selection").glob("decisions-*"))) == 2


@pytest.fixture
def split(tmp_path):
    """Rounds 3 and 4 of a run whose first folder is gone when it goes on, and the folder of the first three."""
    states = train(tmp_path / "first", 3)
    (tmp_path / "first").rename(tmp_path / "away")
    train(tmp_path / "second", 5, states[3])
    return tmp_path / "second", tmp_path / "away", str(tmp_path / "first" / "selection" / "decisions")


def test_explain_claims_nothing_of_rounds_that_it_cannot_see(split, capsys):
    second, away, first = split
    chosen = rounds_in(away / "selection" / "decisions")[0]
    from liveselect.decisions import read_plan

    candidate = int(read_plan(chosen).ids[0])
    assert main(["explain", str(second), str(candidate)]) == 0
    said = capsys.readouterr().out
    assert "never" not in said
    assert "it was not chosen in rounds 3-4" in said
    assert f"not recorded here are rounds 0-2: the run wrote to {first} before" in said


def test_replay_names_the_folder_of_what_it_lacks(split):
    second, _, first = split
    source = random_source(64)
    with pytest.raises(ValueError, match=f"lacks rounds 0-2: the run wrote to {first} before"):
        ReplaySelector(second).check(fake_context(source).round, 8)


def test_diff_of_runs_without_a_common_round_says_so(split, capsys):
    second, away, first = split
    assert main(["diff", str(away), str(second)]) == 2
    said = capsys.readouterr().out
    assert "No round is recorded of both: one has rounds 0-2, the other rounds 3-4." in said
    assert "the same" not in said
    assert first in said


def test_what_lacked_comes_along_when_it_is_there_again(tmp_path, split):
    second, away, _ = split
    state = train(tmp_path / "away2", 5)[5]
    state["ledger"]["decision_folders"] = [str(place / "selection" / "decisions") for place in (away, second)]
    train(tmp_path / "third", 5, state)
    assert contents(tmp_path / "third") == contents(tmp_path / "away2")


def test_rounds_are_named_as_spans():
    assert rounds_as_text([0, 1, 2, 5, 7, 8]) == "rounds 0-2, 5, 7-8"
    assert rounds_as_text([4]) == "round 4"
    assert rounds_as_text(torch.arange(3).tolist()) == "rounds 0-2"
