"""Measuring leaves training as it was, to the bit."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from small_run import SIMPLE, Place, ProbingUniform, SmallLM, Trace, rows, small_data, small_trainer
from torch import Tensor

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import Batch, LiveModel
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.selectors import UniformSelector


class Leaky(OneStepInfluence):
    """A probe that forgets to put the weights back."""

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        result = super().score(model, batch)
        with torch.no_grad():
            next(model.module.parameters()).add_(1e-3)
        return result


def trained(folder, selector, estimator=None, workers=0, **settings) -> list[str]:
    """Train the small run and return what every batch trained on and the weights after it."""
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, estimator, every_n_steps=4, warmup_rounds=0, dirpath=folder)
    trace = folder / "trace"
    trainer = small_trainer(folder, [Place(selection), selection, Trace(trace)], **settings)
    trainer.fit(SmallLM(), datamodule=small_data(workers))
    return trace.read_text().splitlines()


@pytest.fixture(scope="module")
def without_measuring(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("off"), UniformSelector())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", ["published", "in_batch"])
def test_training_with_measuring_equals_training_without(tmp_path, workers, step, without_measuring):
    probing = ProbingUniform()
    assert trained(tmp_path, probing, OneStepInfluence(step=step), workers) == without_measuring
    assert len(probing.influence) == 4
    assert all(torch.isfinite(values).all() and values.std() > 0 for values in probing.influence)


@pytest.mark.parametrize(
    "estimator",
    [
        *(partial(FirstOrderInfluence, engine, sampled=2) for engine in ("hooks", "central_difference")),
        *(partial(FirstOrderInfluence, engine, sampled=2) for engine in ("forward_mode", "optimizer_step")),
        *(partial(KFACInfluence, kind, factor_examples=4) for kind in ("kfac", "ekfac", "output_only", "diagonal")),
        partial(KFACInfluence, "identity"),
        partial(KFACInfluence, labels="sampled", factor_examples=4),
        partial(PMPInfluence, 3, 2, batch_size=2),
        partial(PMPInfluence, 3, 2, batch_size=2, hessian="central_difference", products="central_difference"),
    ],
    ids=lambda made: f"{made.func.__name__} {' '.join(map(str, [*made.args, *made.keywords.values()]))}",
)
def test_no_estimator_changes_a_bit_of_the_training(tmp_path, estimator, without_measuring):
    probing = ProbingUniform()
    assert trained(tmp_path, probing, estimator()) == without_measuring
    assert all(torch.isfinite(values).all() and values.std() > 0 for values in probing.influence)


def test_the_comparison_sees_a_probe_that_does_not_restore(tmp_path, without_measuring):
    assert trained(tmp_path, ProbingUniform(), Leaky()) != without_measuring


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "32-true", **SIMPLE},
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01},
    ],
    ids=["fp32", "clip by value"],
)
def test_it_holds_under_other_settings(tmp_path, settings):
    (tmp_path / "on").mkdir()
    (tmp_path / "off").mkdir()
    on = trained(tmp_path / "on", ProbingUniform(), OneStepInfluence(), **settings)
    assert on == trained(tmp_path / "off", UniformSelector(), **settings)


def test_an_average_of_the_weights_sees_training_steps_only(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    def averaged(name, selector, estimator=None):
        pl.seed_everything(1, verbose=False)
        average = EMAWeightAveraging(decay=0.5)
        selection = DataSelection(selector, estimator, every_n_steps=4, warmup_rounds=0, dirpath=tmp_path / name)
        trainer = small_trainer(tmp_path / name, [average, selection])
        trainer.fit(SmallLM(), datamodule=small_data())
        return torch.cat([p.flatten() for p in average._average_model.parameters()])

    assert torch.equal(averaged("on", ProbingUniform(), OneStepInfluence()), averaged("off", UniformSelector()))


def test_a_wrapped_datamodule_trains_on_its_own_batches(tmp_path):
    class Plain(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(rows(24, seed=3), batch_size=4, shuffle=True)

    class Module(SmallLM):
        seen: list = []

        def training_step(self, batch, batch_index):
            assert set(batch) == {"input_ids"}
            self.seen.append(batch["input_ids"])
            return super().training_step({**batch, "labels": batch["input_ids"]}, batch_index)

    data = SelectionDataModule.wrap(Plain(), reference=rows(4, seed=2))
    selection = DataSelection(UniformSelector(), every_n_steps=2, dirpath=tmp_path)
    module = Module()
    small_trainer(tmp_path, [selection], max_steps=6, **SIMPLE).fit(module, data)
    pool = {tuple(row["input_ids"].tolist()) for row in rows(24, seed=3)}
    trained_rows = [tuple(row.tolist()) for batch in module.seen for row in batch]
    assert len(trained_rows) == 24
    assert set(trained_rows) == pool  # six steps of four rows: every candidate once before any is used twice
