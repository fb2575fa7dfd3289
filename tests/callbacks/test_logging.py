"""What a module logs in its forward is that of training: neither rehearsal nor probes nor captured steps feed it."""

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from small_run import SIMPLE, ProbingUniform, SmallLM, rows, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.selectors import UniformSelector


class Part(pl.LightningModule):
    """A LightningModule inside of another, in a list where Lightning does not find it."""

    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, x):
        self.owner[0].log_dict({"dict": x.detach().square().mean()}, on_step=True, on_epoch=True)
        return x


class Logging(SmallLM):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.mean = torchmetrics.MeanMetric()
        self.parts = [Part(self)]

    def log(self, name, value, **settings):
        super().log(f"own/{name}", value, **settings)

    def forward(self, input_ids):
        logits = self.parts[0](self.model(input_ids, use_cache=False).logits)
        self.log("loud", logits.detach().abs().mean(), on_step=True, on_epoch=True)
        self.log("epoch", logits.detach().abs().mean(), on_step=False, on_epoch=True)
        self.mean(logits.detach().abs().mean())
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        return logits

    def training_step(self, batch, batch_index):
        logits = self(batch["input_ids"])
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Seen(Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_epoch_end = on_train_batch_end


def logged_in(folder, selector, estimator=None, **settings):
    """Return what was seen of logged metrics after every batch and epoch, and what a logger wrote of them."""
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, estimator, every_n_steps=3, warmup_rounds=0, dirpath=folder, **settings)
    data = SelectionDataModule(rows(24, seed=1), reference=rows(6, seed=2), batch_size=2, probe_batch_size=4)
    seen, logger = Seen(), CSVLogger(folder)
    limits = {"max_steps": -1, "max_epochs": 2, "precision": "32-true", "logger": logger, "log_every_n_steps": 1}
    small_trainer(folder, [selection, seen], **{**SIMPLE, **limits}).fit(Logging(), datamodule=data)
    return seen.logged, [{k: v for k, v in line.items() if "selection" not in k} for line in logger.experiment.metrics]


@pytest.fixture(scope="module")
def without_measuring(tmp_path_factory):
    return logged_in(tmp_path_factory.mktemp("off"), UniformSelector())


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (lambda: OneStepInfluence(step="in_batch"), {}),
        (FirstOrderInfluence, {"overhear": 1}),
        (FirstOrderInfluence, {"probes_between_steps": 2}),
    ],
    ids=["probes", "captured steps", "probes between steps"],
)
def test_metrics_logged_in_a_forward_are_those_of_training(tmp_path, estimator, settings, without_measuring):
    logged, written = logged_in(tmp_path, ProbingUniform(), estimator(), **settings)
    assert logged == without_measuring[0]
    assert len(logged) == 26
    assert {"own/loud_step", "own/epoch", "own/metric_epoch"} <= set(logged[-1])
    assert [line for line in written if line] == [line for line in without_measuring[1] if line]


def test_modules_log_again_after_a_measurement_that_failed(tmp_path):
    class Failing(OneStepInfluence):
        def fit(self, model, round):
            raise RuntimeError("no luck")

    log = pl.LightningModule.log
    with pytest.raises(RuntimeError, match="no luck"):
        logged_in(tmp_path, ProbingUniform(), Failing())
    assert pl.LightningModule.log is log
