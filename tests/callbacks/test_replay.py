"""A recorded run is followed by another model, another batch size, another number of steps in a round."""

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import spearmanr
from small_run import BATCH, POOL, SIMPLE, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import DataSelection, Replay
from liveselect.cli import main
from liveselect.datamodules import SelectionDataModule
from liveselect.decisions import read_plan, read_round, rounds_in
from liveselect.decisions.explain import explain, lines_about
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, ReplaySelector, UniformSelector

STEPS = 12


def trained(folder, selection, steps=STEPS, dropout=0.1, data=None, callbacks=(), **settings):
    pl.seed_everything(1, verbose=False)
    trace = Trace(folder / "trace")
    folder.mkdir(exist_ok=True)
    trainer = small_trainer(folder, [selection, trace, *callbacks], max_steps=steps, **{**SIMPLE, **settings})
    trainer.fit(SmallLM(dropout), datamodule=data or small_data())
    return [index for line in (folder / "trace").read_text().splitlines() for index in json.loads(line)[2]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    order = trained(folder, DataSelection(selector, OneStepInfluence(), every_n_steps=4, dirpath=folder / "selection"))
    return folder, order


def test_another_model_sees_the_same_examples_in_the_same_order(tmp_path, recorded):
    folder, order = recorded
    replay = Replay(folder, dirpath=tmp_path / "selection")
    assert replay.every_n_steps == 4
    assert trained(tmp_path, replay, dropout=0.0) == order
    assert [record.plan for record in replay.run.ledger.rounds] == [
        read_plan(path).fingerprint for path in rounds_in(folder / "selection" / "decisions").values()
    ]
    assert all(not record.measured and not record.notes for record in replay.run.ledger.rounds)
    assert set(read_round(rounds_in(tmp_path / "selection" / "decisions")[0])["reason"]) == {"recorded plan"}


def test_with_another_batch_size_the_order_stays(tmp_path, recorded):
    folder, order = recorded
    data = SelectionDataModule(pool=rows(POOL, 1), reference=rows(6, 2), batch_size=2 * BATCH, num_workers=0)
    assert trained(tmp_path, Replay(folder, every_n_steps=2, dirpath=tmp_path), STEPS // 2, data=data) == order
    other = tmp_path / "other"
    replay = Replay(folder, every_n_steps=3, dirpath=other)
    assert trained(other, replay) == order
    assert any("cut otherwise" in note for record in replay.run.ledger.rounds for note in record.notes)


def test_a_replay_that_was_stopped_goes_on(tmp_path, recorded):
    folder, order = recorded
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_last=True)
    first = trained(tmp_path, Replay(folder, dirpath=tmp_path / "selection"), steps=6, callbacks=[keep])
    assert first == order[: 6 * BATCH]
    replay = Replay(folder, dirpath=tmp_path / "selection")
    trainer = small_trainer(tmp_path, [replay, Trace(tmp_path / "rest")], max_steps=STEPS, **SIMPLE)
    trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=tmp_path / "last.ckpt")
    rest = [index for line in (tmp_path / "rest").read_text().splitlines() for index in json.loads(line)[2]]
    # the first part ended inside the recorded second round
    assert first + rest == order


def test_a_replay_longer_than_the_record_says_so_before_it_trains(tmp_path, recorded):
    message = rf"recorded {STEPS * BATCH} choices, and this run needs {(STEPS + 4) * BATCH}: train for fewer steps"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, Replay(recorded[0], dirpath=tmp_path), steps=STEPS + 4)
    assert not (tmp_path / "trace").exists()


def test_a_longer_replay_that_is_resumed_says_so_before_it_trains(tmp_path, recorded):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="x")
    trained(tmp_path / "first", Replay(recorded[0], dirpath=tmp_path), steps=6, callbacks=[keep])
    trainer = small_trainer(tmp_path, [Replay(recorded[0], dirpath=tmp_path)], max_steps=STEPS + 1, **SIMPLE)
    with pytest.raises(ValueError, match=f"this run needs {(STEPS + 1) * BATCH}: train for fewer steps"):
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 6


def test_plans_of_another_pool_are_refused(tmp_path, recorded):
    data = SelectionDataModule(pool=rows(POOL + 2, 1), reference=rows(6, 2), batch_size=BATCH)
    with pytest.raises(ValueError, match="would mean other texts"):
        trained(tmp_path, Replay(recorded[0], dirpath=tmp_path), data=data)


def test_a_single_round_does_not_tell_its_steps(tmp_path):
    trained(tmp_path, DataSelection(UniformSelector(), every_n_steps=9, dirpath=tmp_path), steps=3)
    with pytest.raises(ValueError, match="pass every_n_steps"):
        Replay(tmp_path)
    assert isinstance(Replay(tmp_path, every_n_steps=3).selector, ReplaySelector)


def test_explain_names_the_true_numbers_of_a_chosen_and_of_a_rejected_candidate(recorded, capsys):
    folder, _ = recorded
    path = rounds_in(folder / "selection" / "decisions")[1]
    table = read_round(path)
    chosen = table["chosen"].astype(bool)
    for mask, word in ((chosen, "chosen, "), (~chosen & (table["rank"] >= 0), "not chosen: below the threshold")):
        row = int(mask.nonzero()[0][0])
        candidate = int(table["id"][row])
        fate = explain(folder, candidate)[1]
        assert fate.row["score"] == table["score"][row]
        text = "\n".join(lines_about(candidate, explain(folder, candidate)))
        assert word in text
        assert f"score {table['score'][row]:.6g} noise {table['noise'][row]:+.6g}" in text
        assert f"threshold {table['threshold'][row]:.6g}" in text
        assert main(["explain", str(folder), str(candidate)]) == 0
        assert capsys.readouterr().out.startswith(text + "\n")


def test_explain_lists_the_highest_scores_that_the_last_round_chose(recorded, capsys):
    folder, _ = recorded
    table = read_round(list(rounds_in(folder / "selection" / "decisions").values())[-1])
    chosen = table["chosen"].astype(bool) & ~np.isnan(table["score"])
    best = table["id"][chosen][np.argsort(-table["score"][chosen], kind="stable")][:3]
    assert main(["explain", str(folder), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [int(line.split()[0]) for line in lines if line.split() and line.split()[0].isdigit()]
    assert sorted(listed) == sorted(best.tolist())


def test_explain_finds_a_candidate_by_a_part_of_its_text_and_says_when_there_is_none(recorded, capsys):
    folder, _ = recorded
    (example, *_) = [
        each for each in Ledger.read(folder / "selection" / "ledger.jsonl").rounds[-1].examples if each.text
    ]
    assert main(["explain", str(folder), "--text", example.text[:40]]) == 0
    assert "candidate " in capsys.readouterr().out
    assert main(["explain", str(folder), "--text", "words that no text has"]) == 1
    assert "no text with" in "".join(capsys.readouterr())


def test_explain_of_a_candidate_that_was_measured_but_not_compared_says_so_and_names_what_it_missed(recorded):
    folder, _ = recorded
    table = read_round(rounds_in(folder / "selection" / "decisions")[1])
    alone = ~np.isnan(table["influence"]) & np.isnan(table["score"]) & ~table["chosen"].astype(bool)
    assert alone.any()
    row = int(alone.nonzero()[0][0])
    text = "\n".join(lines_about(int(table["id"][row]), explain(folder, int(table["id"][row]))))
    assert "not chosen: measured, but not among the candidates that were compared" in text
    assert f"measured influence {table['influence'][row]:.6g} nats" in text
    assert f"it has no score; the smallest that passed is {table['threshold'][row]:.6g}" in text
    assert "group" not in text  # the pool has none


def test_explain_of_a_candidate_that_nobody_looked_at_or_that_is_none(recorded, capsys):
    folder = recorded[0] / "selection" / "decisions"
    touched = {index for path in rounds_in(folder).values() for index in read_round(path, ["id"])["id"]}
    untouched = min(set(range(POOL)) - touched, default=None)
    if untouched is not None:
        assert main(["explain", str(recorded[0]), str(untouched)]) == 0
        out = capsys.readouterr().out
        assert "in 3 of 3 rounds it was neither compared nor measured" in out
        assert "it was never chosen" in out
    for none in (POOL, 99999999, -1):
        assert main(["explain", str(recorded[0]), "--", str(none)]) == 1
        assert f"there is no candidate {none}: the pool of this run holds 0..{POOL - 1}" in capsys.readouterr().err
    assert main(["explain", str(recorded[0] / "nowhere"), "1"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_diff_finds_where_two_runs_part(tmp_path, recorded, capsys):
    folder, _ = recorded
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None, temperature=5.0)
    trained(tmp_path, DataSelection(selector, OneStepInfluence(), every_n_steps=4, dirpath=tmp_path))
    assert main(["diff", str(folder), str(folder)]) == 0
    assert "All 3 plans are the same." in capsys.readouterr().out
    assert main(["diff", str(folder), str(tmp_path)]) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()[1:4]]
    plans = [
        [read_plan(path).fingerprint for path in rounds_in(where / "decisions").values()]
        for where in (folder / "selection", tmp_path)
    ]
    same = [first == second for first, second in zip(*plans, strict=True)]
    assert [line[1] == "same" for line in lines] == same
    assert f"The plans first differ in round {same.index(False)}." in out
    ids = [
        set(read_plan(rounds_in(where)[1]).ids.tolist())
        for where in (folder / "selection/decisions", tmp_path / "decisions")
    ]
    assert lines[1][5] == str(len(ids[0] & ids[1]))
    parts = [read_round(rounds_in(where)[1]) for where in (folder / "selection/decisions", tmp_path / "decisions")]
    scores = [dict(zip(part["id"], part["score"], strict=True)) for part in parts]
    both = [index for index in scores[0] if index in scores[1] and scores[0][index] == scores[0][index]]
    both = [index for index in both if scores[1][index] == scores[1][index]]
    expected = spearmanr(*([part[index] for index in both] for part in scores)).statistic
    assert lines[1][7:] == [f"{expected:.3f}", str(len(both))]


def test_the_command_trains_another_model_on_the_recorded_plans(tmp_path, recorded, monkeypatch):
    folder, _ = recorded
    calls = []

    def fit(argv):
        calls.append([*argv, Path(argv[0].removeprefix("--config=")).read_text()])
        return 0

    monkeypatch.setattr("liveselect.cli.fit.main", fit)
    assert main(["replay", str(folder), "--out", str(tmp_path / "new"), "--config", "mine.yaml"]) == 0
    _, flag, mine, text = calls[0]
    settings = json.loads(text)
    assert (flag, mine) == ("--config", "mine.yaml")
    assert settings["trainer"] == {"default_root_dir": str(tmp_path / "new")}
    assert settings["select"]["class_path"] == "liveselect.callbacks.Replay"


def test_the_command_without_a_config_says_what_to_do(tmp_path, recorded, capsys):
    assert main(["replay", str(recorded[0]), "--out", str(tmp_path)]) == 1
    assert "say with --config what to train" in capsys.readouterr().err


def test_a_replay_writes_nothing_into_the_folders_of_the_run_that_it_repeats():
    from liveselect.cli.replay import redirected

    settings = {
        "ckpt_path": "last",
        "trainer": {
            "max_steps": 3,
            "logger": {"class_path": "WandbLogger", "init_args": {"save_dir": "runs/a", "project": "p"}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "runs/a/checkpoints", "save_last": True}},
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": None}},
                {"class_path": "LearningRateMonitor"},
            ],
        },
    }
    found = redirected(settings, Path("out"))
    assert "ckpt_path" not in found
    assert found["trainer"]["logger"]["init_args"] == {"save_dir": "out", "project": "p"}
    assert found["trainer"]["callbacks"][0]["init_args"] == {"dirpath": "out/checkpoints", "save_last": True}
    assert found["trainer"]["callbacks"][1]["init_args"] == {"dirpath": None}
    assert redirected({"trainer": {"logger": False}}, Path("out")) == {"trainer": {"logger": False}}
