"""The demo on a small scale: it runs offline, tells what came out, stops and goes on."""

import json
import re
import signal
from pathlib import Path

import pytest
import yaml

from liveselect import cli
from liveselect.callbacks import DataSelection
from liveselect.cli import corpus, demo_runs
from liveselect.cli.demo_runs import Demo, config_path
from liveselect.ledger import Ledger

STEPS = 8


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Shrink texts and network, keep everything else; returns the folder of the demo."""
    places = {source: corpus.Place(place.find, 20_000) for source, place in corpus.PLACES.items()}
    find = corpus.find_corpus
    monkeypatch.setattr(corpus, "find_corpus", lambda: find(places, least=1))
    settings = yaml.safe_load(config_path("demo.yaml").read_text(encoding="utf-8"))
    settings["trainer"] |= {"enable_progress_bar": False}
    network = settings["model"]["init_args"]["config"]
    network |= {"vocab_size": 400, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 32}
    data = settings["data"]["init_args"]
    data |= {"batch_size": 4}
    data["reference"]["max_examples"] = 4
    data["validation"]["max_examples"] = 8
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(
        demo_runs, "config_path", lambda name: tmp_path / name if name == "demo.yaml" else config_path(name)
    )
    yield tmp_path / "out"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it once it was interrupted


def run(folder: Path, *options: str) -> int:
    return cli.main(["demo", "--out", str(folder), "--steps", str(STEPS), *options])


def ledgers(folder: Path) -> dict[str, Ledger]:
    return {name: Ledger.read(folder / name / "selection" / "ledger.jsonl") for name in ("random", "mates")}


def what_was_done(ledger: Ledger) -> list[tuple]:
    """Return plans, measurements and losses: all that does not depend on the clock."""
    rounds = [(record.step, record.plan, record.measured, record.influence) for record in ledger.rounds]
    return rounds + [(entry.step, entry.metrics["val_loss"]) for entry in ledger.evaluations]


def test_the_demo_trains_both_runs_on_equal_terms_and_tells_what_came_out(small, capsys):
    assert run(small) == 0
    said = capsys.readouterr().out
    random, mates = ledgers(small)["random"], ledgers(small)["mates"]
    assert {record.selector for record in random.rounds} == {"UniformSelector"}
    assert [record.selector for record in mates.rounds] == ["UniformSelector"] + 3 * ["RegressionSelector"]
    assert [record.step for record in random.rounds] == [record.step for record in mates.rounds] == [0, 2, 4, 6]
    assert random.rounds[0].plan == mates.rounds[0].plan
    assert random.evaluations[0].metrics == mates.evaluations[0].metrics  # same weights, same first data
    final = [f"{run.evaluations[-1].metrics['val_loss']:.3f}" for run in (random, mates)]
    assert re.search(rf"after {STEPS} steps\W+{final[0]}\W+{final[1]}\b", said)
    assert "There is one seed of each" in said
    page = (small / "report.html").read_text(encoding="utf-8")
    assert all(loss in page for loss in final)
    assert (small / "report.html").resolve().as_uri() in said


def test_a_demo_that_was_stopped_continues_with_the_same_numbers(small, monkeypatch, capsys):
    assert run(small) == 0
    whole = {name: what_was_done(ledger) for name, ledger in ledgers(small).items()}

    end = DataSelection.on_train_batch_end

    def stop_in_step_5(self, trainer, *rest):
        if trainer.global_step == 5 and self.estimator is not None:
            raise KeyboardInterrupt
        end(self, trainer, *rest)

    with monkeypatch.context() as context:
        context.setattr(DataSelection, "on_train_batch_end", stop_in_step_5)
        assert run(small) == 130
    assert re.search(r"to continue from here: \S+ demo .*--resume$", capsys.readouterr().err, re.MULTILINE)
    assert run(small, "--resume") == 0
    assert {name: what_was_done(ledger) for name, ledger in ledgers(small).items()} == whole


def test_fit_repeats_a_run_of_the_demo(small, tmp_path):
    assert run(small) == 0
    expected = what_was_done(ledgers(small)["mates"])
    demo = Demo(small, ("demo.yaml",), "mates", STEPS)
    assert cli.main(["fit", *demo.arguments("mates"), f"--trainer.default_root_dir={tmp_path / 'again'}"]) == 0
    assert what_was_done(Ledger.read(tmp_path / "again" / "selection" / "ledger.jsonl")) == expected


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "precious").write_text("")
    assert run(tmp_path) == 1
    assert "holds other files: choose a new folder with --out" in capsys.readouterr().err
    assert (tmp_path / "random" / "precious").exists()


@pytest.mark.parametrize(("made_with", "message"), [(None, "there is none"), ({"steps": 3}, "it was made with")])
def test_only_the_same_demo_can_be_resumed(tmp_path, capsys, made_with, message):
    if made_with:
        (tmp_path / "demo.json").write_text(json.dumps(made_with))
    assert run(tmp_path, "--resume") == 1
    assert message in capsys.readouterr().err


def test_fewer_steps_keep_the_proportions_of_the_config():
    settings = yaml.safe_load(config_path("demo.yaml").read_text(encoding="utf-8"))
    whole = settings["trainer"]["max_steps"]
    half = dict(
        option.split("=", 1) for option in Demo(Path("x"), ("demo.yaml",), "mates", whole // 2).arguments("mates")
    )
    select = settings["select"]["init_args"]
    assert int(half["--select.init_args.every_n_steps"]) == select["every_n_steps"] // 2
    assert int(half["--select.init_args.probes"]) == select["probes"] // 2
    assert int(half["--trainer.val_check_interval"]) == settings["trainer"]["val_check_interval"] // 2
