"""What tests of the loader share: a pool, a model that remembers its batches, a callback that publishes plans."""

import lightning.pytorch as pl
import torch
from torch import nn

from liveselect.datamodules.loader import PlanLoader, epoch_length
from liveselect.plan import Plan
from liveselect.seeding import generator_for

POOL = 64


class Rows(torch.utils.data.Dataset):
    """Row i holds its id and a feature that depends on it."""

    def __len__(self):
        return POOL

    def __getitem__(self, row):
        return {"id": torch.tensor(row), "x": torch.tensor([row / POOL, 1.0])}


class LoaderModule(pl.LightningDataModule):
    """The least datamodule around a PlanLoader."""

    def __init__(self, batch_size=4, epoch_examples=POOL, workers=0):
        super().__init__()
        self.batch_size, self.epoch_examples, self.workers = batch_size, epoch_examples, workers
        self.loader = None

    def train_dataloader(self):
        world = self.trainer.world_size
        length = epoch_length(self.epoch_examples, self.batch_size * world, self.trainer.accumulate_grad_batches)
        self.loader = PlanLoader(
            Rows(), self.batch_size, length, self.trainer.global_rank, world, options={"num_workers": self.workers}
        )
        return self.loader

    def follow(self, plan):
        self.loader.follow(plan)

    def teardown(self, stage):
        if self.loader is not None:
            self.loader.shutdown()


class Remembering(pl.LightningModule):
    """A linear model with dropout that keeps the ids of its batches and the number of its optimizer steps."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(1, 2, generator=generator))
            self.layer.bias.zero_()
        self.ids, self.steps = [], []

    def training_step(self, batch, batch_idx):
        self.ids.append(batch["id"].tolist())
        self.steps.append(self.trainer.global_step)
        return self.layer(self.dropout(batch["x"])).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class PublishPlans(pl.Callback):
    """Publishes plans of ``steps`` optimizer steps as DataSelection does, and keeps them in ``published``."""

    def __init__(self, steps, seed=0):
        self.steps, self.seed = steps, seed
        self.plan, self.published = None, []
        self.rng = None

    def state_dict(self):
        return {"plan": self.plan.state_dict(), "rng": torch.get_rng_state()}

    def load_state_dict(self, state):
        self.plan, self.rng = Plan.from_state_dict(state["plan"]), state["rng"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        """Let a run that continues after the end of an epoch begin the next epoch.

        With ``max_steps`` set, Lightning takes up the epoch that had ended: it trains one more batch in it and, as on
        every last batch of an epoch, makes an optimizer step, complete accumulation window or not.
        """
        loop = checkpoint["loops"]["fit_loop"]
        epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        now = epoch["current"]
        if now["processed"] == now["ready"] and now["completed"] == now["processed"] - 1:
            now["completed"] += 1
            epoch["total"]["completed"] += 1
            batch["current"] = dict.fromkeys(batch["current"], 0)
            batch["is_last_batch"] = False

    def on_train_start(self, trainer, pl_module):
        if self.plan is None or self.plan.exhausted:
            self.publish(trainer)
        else:
            trainer.datamodule.follow(self.plan)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.rng is not None:
            torch.set_rng_state(self.rng)
            self.rng = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.plan.advance(trainer.datamodule.batch_size * trainer.world_size)
        if self.plan.exhausted:
            self.publish(trainer)

    def publish(self, trainer):
        index = 0 if self.plan is None else self.plan.round + 1
        count = self.steps * trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        size = trainer.datamodule.pool.size if hasattr(trainer.datamodule, "pool") else POOL
        ids = torch.randperm(size, generator=generator_for(self.seed, index, "test"))[:count]
        self.plan = Plan(index, ids)
        self.published.append(self.plan)
        trainer.datamodule.follow(self.plan)


def trainer_for(folder, **settings):
    """Return a quiet CPU trainer that writes under ``folder``."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**{**defaults, **settings})


def global_batches(plans, count, size):
    """Return the first ``count`` global batches of ``size`` ids that the plans prescribe."""
    ids = torch.cat([plan.ids for plan in plans]).tolist()
    return [ids[start : start + size] for start in range(0, count * size, size)]
