"""The demo on a small scale: it runs offline, tells what came out, stops and goes on."""

import contextlib
import io
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from report.ledgers import ledger_of

from liveselect import cli
from liveselect.callbacks import DataSelection
from liveselect.cli import corpus, demo_runs, score_job
from liveselect.cli.compare_runs import config_path
from liveselect.cli.demo import METHODS
from liveselect.cli.demo_runs import Demo, WritesPage, use_one_thread_on_busy_cores
from liveselect.datamodules.clusters.cluster import Clusters
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.ledger import Ledger
from liveselect.scores import read_scores

STEPS = 8


@pytest.fixture(scope="module")
def _shrunk(tmp_path_factory):
    """Shrink texts and networks, keep everything else."""
    folder, find = tmp_path_factory.mktemp("configs"), corpus.find_corpus
    changed = {"demo.yaml": smaller_demo, "demo_pds_proxy.yaml": smaller_network, "demo_pds_score.yaml": shorter_unroll}
    for name, change in changed.items():
        settings = yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
        change(settings)
        (folder / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "find_corpus", lambda: find(sizes=dict.fromkeys(corpus.POOL, 20_000), least=1))
        patch.setattr(demo_runs, "CLUSTERS", 5)
        patch.setattr(demo_runs, "config_path", lambda name: folder / name if name in changed else config_path(name))
        yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it once it was interrupted


@pytest.fixture
def small(_shrunk, tmp_path):
    """The folder of a small demo."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def done(_shrunk, tmp_path_factory):
    """A demo that has run; returns its folder and what it printed."""
    folder = tmp_path_factory.mktemp("done") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run(folder) == 0
    return folder, said.getvalue()


def smaller_demo(settings) -> None:
    settings["trainer"] |= {"enable_progress_bar": False}
    data = settings["data"]["init_args"]
    data |= {"batch_size": 4}
    data["reference"]["max_examples"] = 4
    data["validation"]["max_examples"] = 8
    smaller_network(settings)


def smaller_network(settings) -> None:
    network = settings["model"]["init_args"]["config"]
    network |= {"vocab_size": 400, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 32}


def shorter_unroll(settings) -> None:
    settings["estimator"]["init_args"] |= {"steps": 2, "score_every": 1}


def run(folder: Path, *options: str) -> int:
    return cli.main(["demo", "--out", str(folder), "--steps", str(STEPS), *options])


def ledgers(folder: Path, *methods: str) -> dict[str, Ledger]:
    names = ("random", *(methods or ("prior", "live")))
    return {name: Ledger.read(folder / "runs" / f"{name}-0" / "selection" / "ledger.jsonl") for name in names}


def what_was_done(ledger: Ledger) -> list[tuple]:
    """Return plans, measurements and losses: all that does not depend on the clock."""
    rounds = [(record.step, record.plan, record.measured, record.influence) for record in ledger.rounds]
    return rounds + [(entry.step, entry.metrics["val_loss"]) for entry in ledger.evaluations]


def test_the_demo_trains_all_runs_on_equal_terms_and_tells_what_came_out(done):
    folder, said = done
    found = ledgers(folder)
    random, prior, live = found.values()
    assert {record.selector for record in random.rounds} == {"UniformSelector"}
    assert {record.selector for record in prior.rounds} == {"ScoredSelector"}
    assert [record.selector for record in live.rounds] == ["ScoredSelector"] + 3 * ["PriorSelector"]
    assert [record.step for record in random.rounds] == [record.step for record in live.rounds] == [0, 2, 4, 6]
    assert prior.rounds[0].plan != random.rounds[0].plan
    ends = {name: ledger.evaluations[-1].metrics["averaged_val_loss"] for name, ledger in found.items()}
    assert re.search(rf"random\s+{ends['random']:.3f}", said)
    assert "with one seed, so how much of that is chance is not known" in said
    for name in ("prior", "live"):
        assert re.search(rf"{name} has a (lower|higher) loss by [\d.]+ nats per token than random", said)
    page = (folder / "report.html").read_text(encoding="utf-8")
    raw = [f"{ledger.evaluations[-1].metrics['val_loss']:.3f}" for ledger in found.values()]
    assert all(loss in page for loss in raw)
    assert (folder / "report.html").resolve().as_uri() in said


def test_mates_starts_from_the_weights_and_the_data_of_random(small):
    assert run(small, "--method", "mates") == 0
    random, mates = ledgers(small, "mates").values()
    assert [record.selector for record in mates.rounds] == ["UniformSelector"] + 3 * ["RegressionSelector"]
    assert random.rounds[0].plan == mates.rounds[0].plan
    assert random.evaluations[0].metrics == mates.evaluations[0].metrics  # same weights, same first data


def test_quad_pulls_the_clusters_of_the_pool(small, capsys):
    assert run(small, "--method", "quad") == 0
    random, quad = ledgers(small, "quad").values()
    assert [record.selector for record in quad.rounds] == 2 * ["UniformSelector"] + 6 * ["UCBSelector"]
    assert (
        set(quad.rounds[-1].groups) == set(random.rounds[-1].groups) == set(Clusters(TokenStore(small / "pool")).names)
    )
    assert all(row["reward"] is not None for row in quad.rounds[-1].groups.values() if row.get("pulls"))
    assert any(record.metrics["arms/overheard"] for record in quad.rounds[3:])
    clusters = Clusters(TokenStore(small / "pool"))
    assert (random.before_seconds, quad.before_seconds) == ({}, clusters.cost["seconds"])
    said = capsys.readouterr().out
    assert "quad has a" in said
    assert "5 clusters" in said


def test_pds_scores_the_pool_on_a_proxy_and_its_cost_is_part_of_the_verdict(small, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(score_job.ScoreJob, "_predicted", stop)
        assert run(small, "--method", "pds") == 130
    assert not (small / "runs").exists()
    assert run(small, "--method", "pds", "--resume") == 0
    said = capsys.readouterr().out
    scores = read_scores(small / "scores")
    assert f"held-out Spearman of the scorer: {scores.about['metrics']['spearman']:.3f}" in said
    random, pds = ledgers(small, "pds").values()
    assert {record.selector for record in pds.rounds} == {"ScoredSelector"}
    proxy = Ledger.read(small / "proxy" / "runs" / "proxy-0" / "selection" / "ledger.jsonl")
    assert [entry.step for entry in proxy.evaluations] == [2, 4]  # every 80 of 400 steps, of 8
    assert 0 < pds.before_seconds["train the proxy"] <= proxy.training_seconds + proxy.selection_seconds
    assert {"unroll training", "pull back", "measure influence"} <= set(pds.before_seconds)
    assert pds.selection_seconds >= sum(pds.before_seconds.values())
    assert not random.before_seconds
    assert "before training: train the proxy" in (small / "report.html").read_text(encoding="utf-8")


def test_a_demo_that_was_stopped_continues_with_the_same_numbers(done, small, monkeypatch, capsys):
    whole = {name: what_was_done(ledger) for name, ledger in ledgers(done[0]).items()}
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


def test_fit_repeats_a_run_of_the_demo(done, tmp_path):
    folder, _ = done
    expected = what_was_done(ledgers(folder)["live"])
    config = f"--config={folder / 'runs' / 'live-0' / 'run.yaml'}"
    again = [f"--trainer.default_root_dir={tmp_path / 'again'}", f"--select.init_args.dirpath={tmp_path / 'again'}"]
    assert cli.main(["fit", config, *again]) == 0
    assert what_was_done(Ledger.read(tmp_path / "again" / "ledger.jsonl")) == expected


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
    settings = yaml.safe_load(config_path("demo_mates.yaml").read_text(encoding="utf-8"))
    common = yaml.safe_load(config_path("demo.yaml").read_text(encoding="utf-8"))
    whole, select = settings["trainer"]["max_steps"], settings["select"]["init_args"]
    half = Demo(Path("x"), METHODS["mates"], "mates", whole // 2).comparison().runs()[-1].config
    assert half["select"]["init_args"]["every_n_steps"] == select["every_n_steps"] // 2
    assert half["select"]["init_args"]["probes"] == select["probes"] // 2
    assert half["trainer"]["val_check_interval"] == common["trainer"]["val_check_interval"] // 2


def test_the_page_is_written_while_runs_go_on_and_leaves_out_what_has_not_begun(tmp_path):
    ledger_of("UniformSelector", [6.0]).write(tmp_path / "random/selection/ledger.jsonl")
    look = WritesPage([tmp_path / "random", tmp_path / "live"], tmp_path)
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False)
    look.on_validation_start(trainer, None)
    assert "<title>random: liveselect report</title>" in (tmp_path / "report.html").read_text()
    begun = ledger_of("RegressionSelector", [5.0])
    begun.evaluations.clear()
    begun.finished = False
    begun.write(tmp_path / "live/selection/ledger.jsonl")
    look.on_train_end(trainer, None)
    assert "live is at step 0: there is nothing to compare yet." in (tmp_path / "report.html").read_text()


def test_busy_cores_get_one_thread_and_idle_ones_or_set_ones_are_left_alone(monkeypatch):
    import torch

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (0.2, 0.0, 0.0))
    use_one_thread_on_busy_cores()
    assert threads == []
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0.0, 0.0))
    use_one_thread_on_busy_cores()
    assert threads == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    use_one_thread_on_busy_cores()
    assert threads == [1]
