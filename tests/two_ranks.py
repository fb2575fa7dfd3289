"""The small run on one rank or two, for tests that compare them."""

import json

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from small_run import BATCH, POOL, SmallLM, rows, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

STEPS, ROUND = 6, 2


class Seen(Callback):
    """Writes down what each rank trained on, and at the end what selection did."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / f"seen-{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(batch["id"].tolist()) + "\n")

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "end.ckpt")  # here: the forked ranks do not come back to the caller
        run = trainer.callbacks[0].run
        rounds = [(record.plan, record.measured, record.influence) for record in run.ledger.rounds]
        (self.folder / f"rounds-{trainer.global_rank}").write_text(json.dumps([rounds, run.plan.ids.tolist()]))


def trained(folder, ranks, ckpt_path=None, steps=STEPS, selector=None, estimator=None, callbacks=(), **pace):
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(
        selector or RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None),
        estimator or OneStepInfluence(),
        every_n_steps=ROUND,
        dirpath=folder,
        **pace,
    )
    data = SelectionDataModule(pool=rows(POOL, 1), reference=rows(6, 2), batch_size=BATCH // ranks, probe_batch_size=4)
    settings = {"precision": "32-true", "max_steps": steps, "devices": ranks, "limit_val_batches": 0}
    if ranks > 1:
        settings["strategy"] = DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer = small_trainer(folder, [selection, Seen(folder), *callbacks], val_check_interval=3, **settings)
    trainer.fit(SmallLM(dropout=0.0), datamodule=data, ckpt_path=ckpt_path)
    return [json.loads((folder / f"rounds-{rank}").read_text()) for rank in range(ranks)]


def batches(folder, ranks):
    """Return the global batches in order."""
    per_rank = [
        [json.loads(line) for line in (folder / f"seen-{rank}").read_text().splitlines()] for rank in range(ranks)
    ]
    return [[i for part in parts for i in part] for parts in zip(*per_rank, strict=True)]
