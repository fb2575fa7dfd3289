"""Every YAML file is loaded against the real signatures, and says the same as its Python form."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

import liveselect.cli.model
from liveselect.callbacks import MATES, DataSelection, LiveSelection, SelectionMonitor
from liveselect.cli import bars
from liveselect.cli.bars import StepsProgressBar
from liveselect.cli.demo import METHODS
from liveselect.cli.demo_runs import Demo
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.model import CausalLM
from liveselect.datamodules import ReferenceSet, SelectionDataModule
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor
from liveselect.selectors import UniformSelector

CONFIGS = Path(__file__).parents[1] / "configs"
ON_THIS_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
BELOW = {"random.yaml": "mates.yaml", "prior.yaml": "default.yaml", "pds_proxy.yaml": "pds.yaml"}
BELOW |= dict.fromkeys(["demo_mates.yaml", "demo_quad.yaml", "demo_pds.yaml", "demo_pds_proxy.yaml"], "demo.yaml")
"""Files that go on top of another one."""

SCORING = "demo_pds_score.yaml"
"""It is for `liveselect score`, and `liveselect fit` cannot read it."""

DEMO_NETWORK = {
    "model_type": "gpt_neox",
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch, tmp_path):
    """Build a small network in place of one of the hub or of full size, and leave the working directory alone."""
    build = liveselect.cli.model.build_model
    small = {**DEMO_NETWORK, "vocab_size": 32, "hidden_size": 8}
    monkeypatch.setattr(
        liveselect.cli.model,
        "build_model",
        lambda config, *rest: build(config if config == DEMO_NETWORK else small, *rest),
    )
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def in_a_terminal(monkeypatch):
    """Elsewhere lines take the place of bars."""
    monkeypatch.setattr(bars, "Console", lambda: Console(file=io.StringIO(), force_terminal=True))


def from_yaml(*names: str, options: tuple[str, ...] = ()) -> SelectionCLI:
    return SelectionCLI([*(f"--config={CONFIGS / name}" for name in names), *ON_THIS_MACHINE, *options], run=False)


def callback_of(cli: SelectionCLI) -> DataSelection:
    [found] = [callback for callback in cli.trainer.callbacks if isinstance(callback, DataSelection)]
    return found


def told(thing: Any) -> Any:
    """Return all that makes up an object, as builtins that can be compared."""
    if isinstance(thing, torch.Tensor):
        return (thing.dtype, tuple(thing.shape), thing.numpy().tobytes())
    if isinstance(thing, nn.Module):
        weights = {name: told(value) for name, value in thing.state_dict().items()}
        settings = {
            k: told(v) for k, v in vars(thing).items() if not k.startswith("_") and k != "prepare_data_per_node"
        }
        return {"class": type(thing), "weights": weights, **settings}
    if isinstance(thing, Mapping):
        return {key: told(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set)):
        return [told(value) for value in thing]
    if callable(thing) or isinstance(thing, (str, int, float, bool, type(None), torch.dtype, torch.device)):
        return thing
    if isinstance(thing, Path):
        return str(thing)
    return {"class": type(thing), **{key: told(value) for key, value in vars(thing).items()}}


def schedule_of(trainer: pl.Trainer) -> dict[str, Any]:
    names = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "val_check_interval")
    names += ("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "precision", "default_root_dir")
    found = {name: getattr(trainer, name) for name in names}
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    found["checkpoints"] = [(c._every_n_train_steps, c._save_on_train_epoch_end, c.save_last) for c in checkpoints]
    found["callbacks"] = sorted({type(callback).__name__ for callback in trainer.callbacks} - {"RunConfig"})
    return found


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / SCORING}), ids=lambda path: path.name)
def test_every_file_loads_against_the_real_signatures(path):
    below = [BELOW[path.name]] if path.name in BELOW else []
    cli = from_yaml(*below, path.name)
    assert isinstance(cli.model, CausalLM)
    assert isinstance(cli.datamodule, SelectionDataModule)
    assert callback_of(cli).every_n_steps > 0


def test_a_mistyped_setting_is_refused_on_one_screen(capsys):
    with pytest.raises(SystemExit):
        SelectionCLI(["fit", f"--config={CONFIGS / 'demo.yaml'}", "--select.init_args.every_n_step=3"])
    said = capsys.readouterr().err
    assert "'every_n_step' is not accepted" in said
    assert len(said.splitlines()) < 20


def test_what_cannot_work_is_refused_before_a_logger_opens_a_run():
    logger = "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger"
    where = "--trainer.logger.init_args.save_dir=logs"
    with pytest.raises(MisconfigurationException, match="overfit_batches"):
        SelectionCLI(["fit", f"--config={CONFIGS / 'demo.yaml'}", logger, where, "--trainer.overfit_batches=2"])
    assert not Path("logs").exists()


def test_the_demo_in_python_is_the_demo_in_yaml():
    cli = from_yaml("demo.yaml")
    model = CausalLM(DEMO_NETWORK, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup_steps=20, seed=0)
    data = SelectionDataModule(
        pool="liveselect-demo/pool",
        batch_size=16,
        reference=ReferenceSet("liveselect-demo/texts/held_out_reference.jsonl", max_examples=256),
        validation=ReferenceSet("liveselect-demo/texts/held_out_validation.jsonl", max_examples=96),
    )
    select = LiveSelection(every_n_steps=40, seed=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=200,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=40,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        logger=False,
        enable_model_summary=False,
        default_root_dir="liveselect-demo/live",
        callbacks=[
            ModelCheckpoint(save_last=True, save_on_train_epoch_end=False),
            SelectionMonitor(),
            StepsProgressBar(),
            select,
        ],
    )
    assert told(cli.model) == told(model)
    assert told(cli.datamodule) == told(data)
    assert told(callback_of(cli)) == told(select)
    assert schedule_of(cli.trainer) == schedule_of(trainer)


def test_the_demo_of_mates_in_python_is_that_in_yaml():
    select = MATES(
        every_n_steps=80,
        warmup_rounds=1,
        probes=64,
        ratio=0.2,
        temperature=0.5,
        step="in_batch",
        regressor=HashedRidgeRegressor(),
        seed=0,
    )
    assert told(callback_of(from_yaml("demo.yaml", "demo_mates.yaml"))) == told(select)


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_does_what_its_files_say(method):
    """A comparison adds where runs are written, what judges them, and what is held out of the pool for that."""
    runs = {run.method: run for run in Demo(Path("liveselect-demo"), METHODS[method], method).comparison().runs()}
    on_top = {method: (), "random": ("random.yaml",)} | ({"prior": ("prior.yaml",)} if method == "live" else {})
    for name, files in on_top.items():
        run = runs[name]
        Path("run.yaml").write_text(yaml.safe_dump(run.config), encoding="utf-8")
        added = [
            f"--select.init_args.{key}={run.config['select']['init_args'][key]}"
            for key in ("dirpath", "mixture_sample")
        ]
        added += [f"--trainer.default_root_dir={run.folder}"]
        done, said = (
            SelectionCLI(["--config=run.yaml"], run=False),
            from_yaml(*METHODS[method], *files, options=tuple(added)),
        )
        assert told(done.model) == told(said.model)
        assert told(done.datamodule) == told(said.datamodule)
        select, expected = told(callback_of(done)), told(callback_of(said))
        if name == "random":  # a comparison keeps the interval and the seed; `fit` leaves it an estimator without use
            for each in (select, expected):
                del each["estimator"], each["warmup_rounds"], each["overhearing"]
        assert select == expected
        schedule, expected = schedule_of(done.trainer), schedule_of(said.trainer)
        assert set(schedule["callbacks"]) - set(expected["callbacks"]) == {"Judges"}
        assert {**schedule, "callbacks": []} == {**expected, "callbacks": []}


def test_mates_in_python_is_mates_in_yaml():
    cli = from_yaml("mates.yaml")
    model = CausalLM(
        "EleutherAI/pythia-410m",
        overrides={"max_position_embeddings": 1024},
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        warmup_steps=2000,
    )
    lambada = ReferenceSet(
        "hub:EleutherAI/lambada_openai:default:test", answer="last_word", max_examples=1024, seed=1234
    )
    data = SelectionDataModule(pool="pools/dsdm-candidate-c4", reference=lambada, batch_size=16, num_workers=2)
    select = MATES(
        noise="released_bottomk", regressor=EncoderRegressor(targets="standardized", forgetting=0.0, damping=1.0)
    )
    assert told(cli.model) == told(model)
    assert told(cli.datamodule) == told(data)
    assert told(callback_of(cli)) == told(select)
    assert {type(callback) for callback in cli.trainer.callbacks} >= {LearningRateMonitor, ModelCheckpoint}
    settings = yaml.safe_load((CONFIGS / "mates.yaml").read_text(encoding="utf-8"))["trainer"]
    rows = cli.datamodule.batch_size * settings["accumulate_grad_batches"] * settings["devices"]
    assert rows == 512
    assert settings["max_steps"] == 5 * select.every_n_steps
    assert settings["val_check_interval"] % settings["accumulate_grad_batches"] == 0


@pytest.mark.parametrize("below", ["demo.yaml", "mates.yaml"])
def test_the_random_baseline_differs_in_the_selector_alone(below):
    cli, random = from_yaml(below), from_yaml(below, "random.yaml")
    assert told(random.model) == told(cli.model)
    assert told(random.datamodule) == told(cli.datamodule)
    assert schedule_of(random.trainer)["max_steps"] == schedule_of(cli.trainer)["max_steps"]
    select = callback_of(cli)
    expected = DataSelection(UniformSelector(), every_n_steps=select.every_n_steps, warmup_rounds=1, seed=select.seed)
    assert told(callback_of(random)) == told(expected)


def test_one_setting_of_the_selection_can_be_changed_on_the_command_line():
    changed = callback_of(from_yaml("demo.yaml", "demo_mates.yaml", options=("--select.init_args.ratio=0.5",)))
    assert changed.selector.ratio == 0.5
    assert changed.selector.probes == 64


@pytest.mark.parametrize(
    ("option", "shown"), [("", True), ("--trainer.enable_progress_bar=false", False), ("--trainer.max_epochs=2", False)]
)
def test_a_run_that_is_measured_in_steps_has_a_bar_that_counts_no_epochs(option, shown):
    cli = from_yaml("demo.yaml", options=(option,) if option else ())
    assert any(isinstance(callback, StepsProgressBar) for callback in cli.trainer.callbacks) == shown


@pytest.mark.parametrize(("steps", "batches", "expected"), [(0, 0, 1200), (161, 483, 1200), (300, 100, 400)])
def test_the_bar_of_a_resumed_run_ends_where_the_run_does(steps, batches, expected):
    """The epochs are long, and in the last case the second one has begun after 800 batches."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=batches))
    trainer = SimpleNamespace(
        max_steps=400,
        global_step=steps,
        accumulate_grad_batches=3,
        num_training_batches=5000,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    bar = StepsProgressBar()
    bar._trainer = trainer
    assert bar.total_train_batches == expected


def test_the_callback_may_stand_among_the_trainer_s_instead():
    settings = yaml.safe_load((CONFIGS / "demo.yaml").read_text(encoding="utf-8"))
    settings["trainer"]["callbacks"] = [settings.pop("select")]
    Path("moved.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    cli = SelectionCLI(["--config=moved.yaml"], run=False)
    assert told(callback_of(cli)) == told(callback_of(from_yaml("demo.yaml")))


def test_the_whole_configuration_can_be_printed_and_read_again(capsys):
    with pytest.raises(SystemExit) as end:
        SelectionCLI(["fit", f"--config={CONFIGS / 'demo.yaml'}", "--print_config"])
    assert end.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    settings = {key: value for key, value in settings.items() if key not in ("ckpt_path", "weights_only")}  # fit's own
    Path("printed.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    again = SelectionCLI(["--config=printed.yaml"], run=False)
    assert told(callback_of(again)) == told(callback_of(from_yaml("demo.yaml")))
