"""A comparison of small runs: equal terms, judges that change nothing, interruptions, several processes."""

import json
import multiprocessing
import signal

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from two_vocabularies import COMMON, NETWORK, RARE, config_of, write_texts

from liveselect import cli
from liveselect.callbacks import DataSelection
from liveselect.cli import compare_runs
from liveselect.cli.compare_runs import CONFIG, LEDGER, Comparison, Method, Planned, Task, shorten
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.judges import Judges
from liveselect.ledger import Ledger

STEPS = 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A pool, held-out texts, and a configuration of `liveselect fit`; returns their folder."""
    folder = tmp_path_factory.mktemp("texts")
    kinds = {"pool": [COMMON] * 150 + [RARE] * 30, "reference": [RARE] * 12, "validation": [RARE] * 8}
    write_texts(folder, {**kinds, "elsewhere": [COMMON + RARE] * 8})
    off = dict.fromkeys(("enable_model_summary", "enable_progress_bar", "logger"), False)
    trainer = {"max_steps": STEPS, "num_sanity_val_steps": 0, **off}
    data = {"validation": str(folder / "validation.jsonl")}
    config = config_of(folder, NETWORK, trainer, data, {"every_n_steps": 2, "ratio": 0.5, "probes": 9})
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    yield folder
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it once it was interrupted


class Witness(Callback):
    """Notes all weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights.append(torch.cat([each.detach().flatten() for each in pl_module.parameters()]).clone())


def comparison(texts, folder, methods=("random", "prior"), **settings):
    tasks = [Task("rare", elsewhere=str(texts / "elsewhere.jsonl"))]
    return Comparison(folder, [texts / "run.yaml"], [Method.of(each) for each in methods], tasks, **settings)


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """A comparison from a file that has run; returns its folder."""
    folder = tmp_path_factory.mktemp("done")
    tasks = {"rare": {"elsewhere": str(texts / "elsewhere.jsonl")}}
    file = {"configs": ["run.yaml"], "methods": {"random": "random", "prior": "prior"}, "tasks": tasks}
    (texts / "comparison.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    assert cli.main(["compare", str(texts / "comparison.yaml"), "--seeds", "0", "1", "--out", str(folder)]) == 0
    return folder


def losses(folder, name):
    found = Ledger.read(folder / "runs" / "rare" / name / LEDGER).evaluations
    return [(entry.step, entry.metrics, entry.training_flops) for entry in found]


def test_every_run_is_judged_on_three_sets_at_both_kinds_of_weights(done):
    names = {f"{average}{name}_loss" for average in ("", "averaged_") for name in ("val", "mixture", "elsewhere")}
    for step, metrics, _ in losses(done, "prior-1"):
        assert names <= set(metrics), step
    raw = [metrics["val_loss"] for _, metrics, _ in losses(done, "prior-1")]
    averaged = [metrics["averaged_val_loss"] for _, metrics, _ in losses(done, "prior-1")]
    assert averaged[-1] > raw[-1]  # it lags behind a loss that falls
    assert [step for step, *_ in losses(done, "prior-1")] == [2, 4, 6]


def test_the_results_are_a_table_a_figure_and_numbers(done):
    rows = json.loads((done / "comparison.json").read_text())
    assert [(row["task"], row["method"]) for row in rows] == [("rare", "random"), ("rare", "prior")]
    ends = [[losses(done, f"{name}-{seed}")[-1][1] for seed in (0, 1)] for name in ("random", "prior")]
    table = (done / "comparison.md").read_text()
    for row, found in zip(rows, ends, strict=True):
        mean = sum(metrics["averaged_val_loss"] for metrics in found) / 2
        assert row["end"]["mean"] == pytest.approx(mean)
        assert f"{mean:.3f} ± " in table
    assert (done / "comparison.png").stat().st_size > 1000


def test_runs_of_one_seed_start_alike_and_hold_out_the_same_mixture(texts, tmp_path):
    random_, prior, live = comparison(texts, tmp_path, ("random", "prior", "configured"), seeds=[3]).runs()
    for run in (random_, prior, live):
        arguments = run.config["select"]["init_args"]
        assert (arguments["every_n_steps"], arguments["seed"], arguments["mixture_sample"]) == (2, 3, 64)
        assert run.config["model"]["init_args"]["seed"] == run.config["seed_everything"] == 3
    assert "ratio" not in random_.config["select"]["init_args"]
    assert live.config["select"]["init_args"]["ratio"] == 0.5


def test_a_finished_comparison_trains_nothing_and_says_the_same(texts, done, monkeypatch, capsys):
    before = (done / "comparison.md").read_text()
    monkeypatch.setattr(Planned, "train", None)
    assert cli.main(["compare", str(texts / "comparison.yaml"), "--seeds", "0", "1", "--out", str(done)]) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    assert (done / "comparison.md").read_text() == before


def test_a_comparison_that_was_killed_goes_on_and_ends_with_the_same_losses(texts, done, tmp_path, monkeypatch):
    end = DataSelection.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step == 3 and "prior" in str(trainer.default_root_dir):
            raise KeyboardInterrupt
        end(self, trainer, *rest)

    again = comparison(texts, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(DataSelection, "on_train_batch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            again.train()
    assert [run.finished for run in again.runs()] == [True, False]
    assert again.train() == {}
    for name in ("random-0", "prior-0"):
        assert losses(tmp_path, name) == losses(done, name)


@pytest.mark.long
def test_several_processes_train_what_one_does(texts, done, tmp_path, monkeypatch):
    # forked: what is spawned imports everything again, which takes longer than these runs
    monkeypatch.setattr(compare_runs, "get_context", lambda kind: multiprocessing.get_context("fork"))
    assert comparison(texts, tmp_path).train(processes=2) == {}
    for name in ("random-0", "prior-0"):
        found, expected = losses(tmp_path, name), losses(done, name)
        assert [metrics for _, metrics, _ in found] == [pytest.approx(metrics, rel=1e-5) for _, metrics, _ in expected]


def test_judges_leave_training_as_it_was_and_average_the_weights_of_all_steps(texts, done, tmp_path):
    """Weights after each step, of a run with judges and of one without, and their average by its formula."""

    def trained(judges):
        config = yaml.safe_load((done / "runs" / "rare" / "random-0" / CONFIG).read_text())
        name = "judged" if judges else "alone"
        config["trainer"] |= {"callbacks": [], "default_root_dir": str(tmp_path)}
        config["select"]["init_args"]["dirpath"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run = SelectionCLI([f"--config={tmp_path / name}.yaml"], run=False)
        witness = Witness()
        run.trainer.callbacks += [*judges, witness]
        run.trainer.fit(run.model, datamodule=run.datamodule)
        return witness.weights

    judges = Judges(str(texts / "elsewhere.jsonl"), decay=0.5)
    weights = trained([judges])
    assert [torch.equal(one, two) for one, two in zip(weights, trained([]), strict=True)] == STEPS * [True]
    average = weights[0]
    for step, now in enumerate(weights, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * now
    found = torch.cat([each.flatten() for each in judges.state_dict()["average"]])
    torch.testing.assert_close(found, average)


def test_a_method_that_fails_lets_the_others_go_on(texts, tmp_path, capsys):
    folder = tmp_path / "out"
    options = ["--config", str(texts / "run.yaml"), "--methods", "random", "bad=PDS:scores=nowhere.npy", "--steps", "2"]
    assert cli.main(["compare", *options, "--out", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "bad, seed 0 has failed" in said
    assert "nowhere.npy" in said
    assert json.loads((folder / "comparison.json").read_text())[0]["method"] == "random"


def test_runs_of_other_settings_are_not_taken_for_those_of_this_comparison(texts, done):
    with pytest.raises(ValueError, match="other settings than this comparison has"):
        comparison(texts, done, ("random", "prior=prior:ratio=0.1")).train()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("random", Method("random", "random")),
        ("prior:ratio=0.1", Method("prior ratio=0.1", "prior", {"ratio": 0.1})),
        ("mine=LiveSelection:prior=null,cost=0.01", Method("mine", "LiveSelection", {"prior": None, "cost": 0.01})),
        ("methods/mine.yaml", Method("mine", "methods/mine.yaml")),
        ("long=prior:steps=1.5", Method("long", "prior", {}, 1.5)),
    ],
)
def test_a_method_on_the_command_line(text, expected):
    assert Method.of(text) == expected


def test_settings_reach_the_part_that_they_are_of(texts, tmp_path):
    methods = ("prior:ratio=0.1,every_n_steps=3", "x=prior:selector.init_args.temperature=0.6,steps=1.3")
    one, two = (run.config for run in comparison(texts, tmp_path, methods).runs())
    assert one["select"]["init_args"]["selector"]["init_args"]["ratio"] == 0.1
    assert one["select"]["init_args"]["every_n_steps"] == 3
    assert two["select"]["init_args"]["selector"]["init_args"]["temperature"] == 0.6
    assert two["trainer"]["max_steps"] == 8  # 1.3 x 6, up to where it is judged


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("random", "random"), "random twice"),
        (("random", "Nonsense"), "expected a method as random, prior, configured"),
        (("random", "prior:ratio"), "expected settings of a method as KEY=VALUE"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(texts, tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        comparison(texts, tmp_path, methods).runs()


def test_a_comparison_file_with_another_key_is_refused(texts, tmp_path, capsys):
    (tmp_path / "comparison.yaml").write_text("configs: []\nmethod: {}\n")
    assert cli.main(["compare", str(tmp_path / "comparison.yaml")]) == 1
    assert "got ['method']" in capsys.readouterr().err


def test_a_shorter_run_keeps_the_proportions_of_its_rounds():
    config = {
        "trainer": {"max_steps": 400, "val_check_interval": 40},
        "model": {"init_args": {"warmup_steps": 20}},
        "select": {"class_path": "liveselect.callbacks.MATES", "init_args": {"every_n_steps": 80, "probes": 64}},
    }
    shorten(config, 100)
    assert config["trainer"] == {"max_steps": 100, "val_check_interval": 10}
    assert config["model"]["init_args"] == {"warmup_steps": 5}
    assert config["select"]["init_args"] == {"every_n_steps": 20, "probes": 16}
