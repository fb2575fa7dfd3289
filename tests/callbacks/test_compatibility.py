"""Settings under which selection could not be exact are refused before training starts."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_run import SIMPLE, SmallLM, rows, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.callbacks.compatibility import callable_model, check_setup
from liveselect.losses import causal_lm_loss
from liveselect.selectors import UniformSelector


class Manual(SmallLM):
    automatic_optimization = False


class Windowed(Manual):
    batches_per_step = 2


def fit(tmp_path, module=None, callbacks=(), data=None, **settings):
    selection = DataSelection(UniformSelector(), every_n_steps=2, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection, *callbacks], **settings)
    trainer.fit(module or SmallLM(), datamodule=data or small_data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_check_interval": 7}, r"val_check_interval is 7 batches.*accumulation window of 3.*multiple of 3"),
        ({"limit_train_batches": 10, "limit_val_batches": 0}, r"number of batches in an epoch.*10 batches"),
        (
            {"plugins": [MixedPrecision("16-mixed", "cpu")], "precision": None},
            "does not work with precision='16-mixed'.*bf16-mixed",
        ),
        ({"precision": "16-true"}, "does not work with precision='16-true'.*bf16-true"),
        ({"overfit_batches": 1, **SIMPLE}, "overfit_batches replaces the training data"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1})], "accumulate_grad_batches": 1}, "fixed numbers"),
        (
            {"callbacks": [StochasticWeightAveraging(1e-3, swa_epoch_start=1)]},
            "resumed inside.*use EMAWeight",
        ),
        (
            {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(hours=1))]},
            "every_n_train",
        ),
        ({"module": Manual(), **SIMPLE, "gradient_clip_val": None}, "Manual optimizes manually.*batches_per_step = 1"),
        ({"module": Windowed(), **SIMPLE, "gradient_clip_val": None}, "Windowed declares batches_per_step = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_cannot_be_exact_are_refused(tmp_path, settings, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, **settings)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_datamodule_without_candidates_is_refused(tmp_path):
    import lightning.pytorch as pl

    class Plain(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(rows(8, 0), batch_size=2)

    with pytest.raises(MisconfigurationException, match=r"got Plain: use .*SelectionDataModule\.wrap"):
        fit(tmp_path, data=Plain())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every_n_steps": 0}, "at least one optimizer step, got 0"), ({"warmup_rounds": -1}, "zero or more, got -1")],
)
def test_impossible_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataSelection(UniformSelector(), **arguments)


def test_a_round_longer_than_the_pool_is_refused_at_the_start(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=11, dirpath=tmp_path)
    with pytest.raises(ValueError, match="needs 66 distinct candidates but the pool holds 60"):
        small_trainer(tmp_path, [selection]).fit(SmallLM(), datamodule=small_data())


def test_a_strategy_that_nobody_tried_is_refused():
    with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy.*not with SimpleNamespace"):
        check_setup(SimpleNamespace(strategy=SimpleNamespace()), SmallLM())


def test_tensor_parallelism_is_refused():
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(MisconfigurationException, match=r"tensor_parallel_size=2 .*tensor_parallel_size=1"):
        check_setup(SimpleNamespace(strategy=strategy), SmallLM())


def test_parameters_that_wait_elsewhere_are_refused():
    strategy = SimpleNamespace(root_device=torch.device("cuda"), model=None)
    with pytest.raises(MisconfigurationException, match=r"kept on cpu .* computes on cuda.*leave out the offloading"):
        callable_model(SimpleNamespace(strategy=strategy), SmallLM(), causal_lm_loss)


class PlateauLM(SmallLM):
    """Lowers its rate when the validation loss stands still."""

    interval = "step"

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        config = {"scheduler": schedule, "interval": self.interval, "monitor": "val_loss", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_that_a_checkpoint_misses_is_told(tmp_path, interval, recwarn):
    model = PlateauLM()
    model.interval = interval
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    small_trainer(tmp_path, [selection], max_steps=2).fit(model, datamodule=small_data())
    assert any("after the checkpoints" in str(each.message) for each in recwarn) == (interval == "step")
