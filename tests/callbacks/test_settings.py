"""A resumed run says what it was set to differently."""

import inspect
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from small_run import BATCH, POOL, SmallLM, rows, small_data, small_trainer

from liveselect.callbacks import MATES
from liveselect.callbacks.settings import as_text, changes, settings_of
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import InfluenceRegressor, SelectionWarning, Selector
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.ledger import Ledger
from liveselect.losses import causal_lm_loss
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor
from liveselect.report import build_page, load_runs
from liveselect.selectors import PriorSelector, RegressionSelector, ScoredSelector, UCBSelector, UniformSelector


def mates(folder, **arguments) -> MATES:
    given = {"every_n_steps": 4, "probes": 12, "ratio": 0.5, "regressor": HashedRidgeRegressor(), "dirpath": folder}
    return MATES(**{**given, **arguments})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = small_trainer(folder, [mates(folder)], max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def resume(folder, checkpoint, selection, data=None) -> list[str]:
    """Return what is said about settings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = small_trainer(folder, [selection], max_steps=10)
        trainer.fit(SmallLM(), datamodule=data or small_data(), ckpt_path=checkpoint)
    texts = [str(each.message) for each in said if issubclass(each.category, SelectionWarning)]
    return [text for text in texts if "other settings" in text]


def other_loss(model, batch):
    return causal_lm_loss(model, batch)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratio": 0.4}, "selector.ratio was 0.5 and is 0.4"),
        ({"every_n_steps": 5}, "every_n_steps was 4 and is 5"),
        ({"warmup_rounds": 0}, "warmup_rounds was 1 and is 0"),
        ({"probes_between_steps": 2}, "probes_between_steps was None and is 2"),
        ({"loss_fn": other_loss}, "loss_fn was causal_lm_loss and is other_loss"),
        ({"step": "in_batch"}, "estimator.step was 'published' and is 'in_batch'"),
    ],
)
def test_changed_settings_are_said_at_a_resume(tmp_path, checkpoint, changed, message):
    said = resume(tmp_path, checkpoint, mates(tmp_path, **changed))
    assert len(said) == 1
    assert message in said[0]


def test_another_estimator_is_said_at_a_resume(tmp_path, checkpoint):
    selection = mates(tmp_path)
    selection.estimator = FirstOrderInfluence()
    said = resume(tmp_path, checkpoint, selection)
    assert "estimator was OneStepInfluence and is FirstOrderInfluence" in said[0]


def test_another_reference_set_is_said_at_a_resume(tmp_path, checkpoint):
    data = SelectionDataModule(pool=rows(POOL, seed=1), reference=rows(5, seed=7), batch_size=BATCH)
    said = resume(tmp_path, checkpoint, mates(tmp_path), data)
    assert len(said) == 1
    assert "reference set was" in said[0]


def test_nothing_is_said_where_nothing_has_changed(tmp_path, checkpoint):
    assert resume(tmp_path, checkpoint, mates(tmp_path)) == []


def test_a_checkpoint_of_another_version_is_refused_with_a_sentence_that_names_it(tmp_path, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["callbacks"]["DataSelection"]["version"]  # as liveselect 0.1 wrote it
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"version 1 \(1 is that of liveselect 0.1\), and this is version 2"):
        resume(tmp_path, tmp_path / "old.ckpt", mates(tmp_path))


def test_settings_tell_parts_inside_of_parts_and_nothing_that_was_learnt():
    class Inner(InfluenceRegressor):
        def __init__(self, rate):
            self.rate, self.weights = rate, [1.0]

        def fit(self, round, ids, influence):
            return {}

        def predict(self, round, batch):
            return batch

    class Outer(Selector):
        def __init__(self, inner, share, data):
            self.inner, self.share, self.data, self.seen = inner, share, data, 3

        def select(self, round, budget):
            return round.candidates[:budget]

    found = settings_of({"selector": Outer(Inner(0.1), 0.5, data=object()), "steps": 4})
    assert found == {
        "selector": found["selector"],
        "selector.inner": found["selector.inner"],
        "selector.inner.rate": 0.1,
        "selector.share": 0.5,
        "selector.data": "object",
        "steps": 4,
    }
    again = settings_of({"selector": Outer(Inner(0.2), 0.5, data=object()), "steps": 4})
    assert changes(as_text(found), as_text(again)) == ["selector.inner.rate was 0.1 and is 0.2"]


def test_what_was_measured_ahead_with_other_settings_is_measured_again(tmp_path):
    trainer = small_trainer(tmp_path, [mates(tmp_path, probes_between_steps=2)], max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "ahead.ckpt")
    for changed in ({"probes": 10}, {"seed": 5}):
        selection = mates(tmp_path, probes_between_steps=2, **changed)
        resume(tmp_path, tmp_path / "ahead.ckpt", selection)
        assert len(selection.run.ledger.rounds[2].measured) == changed.get("probes", 12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 1, "max_overhead": 0.1}, ValueError, "no steps between which a round could be measured"),
        ({"loss_fn": 3}, TypeError, "expected loss_fn to be a function"),
        ({"loss_fn": HashedRidgeRegressor}, TypeError, r"pass HashedRidgeRegressor\(...\)"),
        ({"every_n_steps": True}, TypeError, "expected every_n_steps of MATES to be a number, got True"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps of at least one"),
        ({"seed": None}, TypeError, r"expected seed of \w+ to be a number, got None"),
        ({"seed": 1.5}, ValueError, r"expected seed of \w+ to be a whole number, got 1.5"),
        ({"mixture_sample": 0.1}, ValueError, r"expected mixture_sample of \w+ to be a whole number, got 0.1"),
        ({"min_spearman": 5}, ValueError, "expected min_spearman, a rank correlation"),
        ({"dirpath": 5}, TypeError, "expected dirpath to be a folder, got 5"),
        ({"dirpath": "s3://bucket/run"}, ValueError, "dirpath on a local or mounted file system, got 's3://bucket"),
        ({"regressor": 0}, TypeError, "regressor to inherit from"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        mates(tmp_path, **arguments)


def test_a_part_that_is_falsy_is_used(tmp_path):
    class Empty(HashedRidgeRegressor):
        def __len__(self):
            return 0

    regressor = Empty()
    assert mates(tmp_path, regressor=regressor).selector.regressor is regressor


class Kept(Selector):
    """Keeps nothing under the names of its arguments."""

    def __init__(self, share: float, *, table: torch.Tensor, name: str = "x") -> None:
        self._half = share / 2

    def select(self, round, budget):
        return round.candidates[:budget]


def test_everything_that_a_constructor_got_is_a_setting_whatever_the_part_keeps_of_it():
    found = settings_of({"selector": Kept(0.5, table=torch.zeros(3))})
    assert found == {
        "selector": "Kept",
        "selector.share": 0.5,
        "selector.table": "Tensor (3,) torch.float32",
        "selector.name": "x",
    }


@pytest.mark.parametrize(
    "part",
    [
        UniformSelector(),
        RegressionSelector(HashedRidgeRegressor(), probes=30),
        UCBSelector(),
        ScoredSelector(torch.zeros(4).numpy()),
        PriorSelector(UniformSelector(), torch.zeros(3).numpy()),
        OneStepInfluence(),
        FirstOrderInfluence(),
        KFACInfluence(),
        PMPInfluence(),
        HashedRidgeRegressor(),
        EncoderRegressor("x"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_all_arguments_of_the_parts_of_the_library_are_settings(part):
    found = settings_of({"part": part})
    assert {f"part.{name}" for name in inspect.signature(type(part)).parameters} <= set(found)
    json.dumps(found)


class Noted(Logger):
    """Notes what it is told about the run."""

    def __init__(self):
        super().__init__()
        self.told = {}

    name, version, save_dir = "n", "v", None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        self.told |= dict(params)


def test_settings_of_a_script_are_in_the_ledger_the_loggers_and_first_in_the_report_where_they_differ(tmp_path):
    told = []
    for name, probes in (("a", 12), ("b", 14)):
        noted = Noted()
        loggers = [noted, CSVLogger(tmp_path / name / "csv"), TensorBoardLogger(tmp_path / name / "tb")]
        selection = mates(tmp_path / name / "selection", probes=probes)
        trainer = small_trainer(tmp_path / name, [selection], max_steps=6, logger=loggers)
        trainer.fit(SmallLM(), datamodule=small_data())
        told.append(noted.told["selection"])
        for logger in loggers[1:]:
            assert f"probes: {probes}" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    runs = load_runs([tmp_path / "a" / "selection", tmp_path / "b" / "selection"])
    for about, run in zip(told, runs, strict=True):
        assert {**about, "folder": run.ledger.about["folder"]} == run.ledger.about
    about = told[0]
    expected = {
        "preset": "MATES",
        "selector": "RegressionSelector",
        "selector.probes": 12,
        "selector.ratio": 0.5,
        "selector.temperature": 0.5,
        "selector.regressor": "HashedRidgeRegressor",
        "selector.regressor.buckets": 1 << 14,
        "estimator": "OneStepInfluence",
        "estimator.step": "published",
        "every_n_steps": 4,
        "loss_fn": "causal_lm_loss",
        "pool.candidates": POOL,
        "reference.examples": 6,
        "global_batch": 6,
        "precision": "bf16-mixed",
        "versions.torch": torch.__version__,
    }
    assert expected.items() <= about.items()
    page = build_page(runs)
    differing = page[page.index("What differs") : page.index("What is the same")]
    assert "selector.probes" in differing
    assert "selector.ratio" not in differing
    assert "selector.ratio" in page[page.index("What is the same") :]


def test_a_resumed_run_notes_what_it_is_set_to_now(tmp_path, checkpoint):
    resume(tmp_path, checkpoint, mates(tmp_path, ratio=0.4))
    assert Ledger.read(tmp_path / "ledger.jsonl").about["selector.ratio"] == 0.4


def test_numbers_of_numpy_are_kept_as_those_of_python(tmp_path):
    numbers = {"every_n_steps": np.int64(4), "seed": np.int64(3), "probes": np.int32(12), "ratio": np.float32(0.5)}
    data = SelectionDataModule(
        rows(POOL, seed=1), reference=rows(6, seed=2), batch_size=np.int64(2), probe_batch_size=np.int64(4)
    )
    selection = mates(tmp_path / "numpy", **numbers)
    trainer = small_trainer(tmp_path, [selection], max_steps=6)
    trainer.fit(SmallLM(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["DataSelection"]
    assert state["settings"]["selector.probes"] == "12"
    about = Ledger.read(tmp_path / "numpy" / "ledger.jsonl").about
    assert (about["seed"], about["batch_size"], about["selector.ratio"]) == (3, 2, 0.5)
