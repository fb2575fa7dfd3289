"""A resumed run says what it was set to differently."""

import warnings

import pytest
import torch
from small_run import BATCH, POOL, SmallLM, rows, small_data, small_trainer

from liveselect.callbacks import MATES
from liveselect.callbacks.settings import changes, settings_of
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import InfluenceRegressor, SelectionWarning, Selector
from liveselect.influence import FirstOrderInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor


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
    names = {"selector", "selector.inner", "selector.inner.rate", "selector.share", "steps"}
    assert set(found) == names
    again = settings_of({"selector": Outer(Inner(0.2), 0.5, data=object()), "steps": 4})
    assert changes(found, again) == ["selector.inner.rate was 0.1 and is 0.2"]


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
