"""What a dataset draws depends on the place of a row in the plan, and on nothing else."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from plan_following import PublishPlans, trainer_for
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.loader import PlanLoader
from liveselect.datamodules.rows.draws import fetch, private_draws
from liveselect.datamodules.rows.rows import DatasetRows
from liveselect.plan import Plan

torch.set_num_threads(1)

SIZE, WIDTH = 64, 5
REFERENCE = [{"input_ids": [3, 3, 3]}]


class Drawing(Dataset):
    """Each row holds its number, and a draw from each of the global generators."""

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        drawn = [int(torch.randint(50, ())), int(np.random.randint(50)), random.randrange(50)]  # noqa: NPY002
        return {"input_ids": torch.tensor([row, *drawn, 1])}


class DrawingTogether(Drawing):
    """Reads all rows of a batch at once."""

    def __getitems__(self, rows):
        return [super(DrawingTogether, self).__getitem__(row) for row in rows]


def hide_some(rows):
    tokens = torch.stack([row["input_ids"] for row in rows])
    hidden = torch.rand(tokens.shape) < 0.2
    return {"input_ids": tokens.masked_fill(hidden, 60), "labels": tokens}


class Existing(LightningDataModule):
    def __init__(self, dataset, workers):
        super().__init__()
        self.dataset, self.workers = dataset, workers

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=4, shuffle=True, collate_fn=hide_some, num_workers=self.workers)


class Net(LightningModule):
    """Draws in training, and keeps what it was trained on."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 2)
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(128.0).view(64, 2) / 128)
        self.seen, self.drawn = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].clone())
        self.drawn.append(torch.rand(()))
        return self.embed(batch["input_ids"]).square().mean() * self.drawn[-1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


MAKES = {
    "rows": lambda workers: SelectionDataModule(Drawing(), REFERENCE, batch_size=4, num_workers=workers),
    "rows together": lambda workers: SelectionDataModule(
        DrawingTogether(), REFERENCE, batch_size=4, num_workers=workers
    ),
    "subset": lambda workers: SelectionDataModule(
        Subset(Drawing(), range(2, 60)), REFERENCE, batch_size=4, num_workers=workers
    ),
    "collated": lambda workers: SelectionDataModule.wrap(Existing(Drawing(), workers), REFERENCE),
}


def run(folder, make, workers, checkpoint=None, seed=0):
    seed_everything(seed, verbose=False)
    module, publisher = Net(), PublishPlans(4)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = trainer_for(
        folder, max_steps=12, callbacks=[publisher, saving], enable_checkpointing=True, limit_val_batches=0
    )
    trainer.fit(module, datamodule=make(workers), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize("kind", MAKES)
def test_runs_and_resumed_runs_see_the_same_rows_bit_for_bit_with_any_number_of_workers(tmp_path, kind):
    whole = run(tmp_path / "0", MAKES[kind], workers=0)
    drawn = torch.cat(whole.seen)
    assert len({tuple(row[1:4].tolist()) for row in drawn}) > len(drawn) // 2  # something is drawn
    helped = run(tmp_path / "2", MAKES[kind], workers=2, seed=5)  # training starts elsewhere, its data do not
    assert torch.equal(torch.cat(helped.seen), drawn)
    for workers in (0, 2):
        checkpoint = tmp_path / f"{workers}" / "step=6.ckpt"
        resumed = run(tmp_path / f"again {workers}", MAKES[kind], workers, checkpoint, seed=9)
        assert torch.equal(torch.cat(resumed.seen), drawn[6 * 4 :])
    assert torch.equal(torch.tensor(run(tmp_path / "3", MAKES[kind], workers=2).drawn), torch.tensor(whole.drawn))


def test_loading_leaves_the_random_states_of_training_alone():
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    loader = PlanLoader(Drawing(), 4, 5, options={"collate_fn": hide_some})
    loader.follow(Plan(0, torch.arange(20)))
    list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1][1]).all()  # noqa: NPY002
    assert np.random.get_state()[2] == before[1][2]  # noqa: NPY002
    assert random.getstate() == before[2]


def first_tokens(dataset, plan, seed=0, batch_size=4, **ranks):
    loader = PlanLoader(dataset, batch_size, 4, seed=seed, **ranks)
    loader.follow(plan)
    return [batch["input_ids"] for _, batch in zip(range(2), loader, strict=False)]


def test_a_row_draws_the_same_on_any_number_of_ranks_and_in_batches_of_any_size():
    plan = Plan(3, torch.arange(40, 8, -1), cursor=8)
    together = first_tokens(Drawing(), plan, batch_size=8)
    ranks = [first_tokens(Drawing(), plan, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert all(torch.equal(torch.cat(parts), one) for one, *parts in zip(together, *ranks, strict=True))


def test_draws_differ_between_rounds_places_and_seeds():
    def drawn(plan, seed=0):
        return torch.cat(first_tokens(Drawing(), plan, seed))[:, 1:4]

    same = torch.full((16,), 7)  # one row, again and again
    rows = drawn(Plan(0, same))
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert torch.equal(drawn(Plan(0, same)), rows)
    assert not (drawn(Plan(1, same)) == rows).all(dim=1).any()
    assert not (drawn(Plan(0, same), seed=1) == rows).all(dim=1).any()
    assert torch.equal(drawn(Plan(0, same, cursor=4))[:4], rows[4:])


def test_a_candidate_is_the_same_whenever_it_is_looked_at():
    rows = DatasetRows(Drawing())
    together = rows.candidates([5, 6, 7])["input_ids"]
    torch.rand(3), random.random()
    assert torch.equal(rows.candidates([6])["input_ids"][0], together[1])


def test_the_states_come_back_after_an_error_too():
    def fail():
        with private_draws() as seed:
            seed(3)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_sets_all_three_generators():
    def draw():
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    with private_draws() as seed:
        drawn = []
        for number in (2**63 - 1, 2**63 - 1, 5):
            seed(number)
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_nested_subsets_are_read_through():
    inner = Subset(Subset(list(range(100, 200)), range(10, 90)), [5, 0, 79])
    assert fetch(inner, [2, 0, 1], [None] * 3, lambda seed: None) == [189, 115, 110]
