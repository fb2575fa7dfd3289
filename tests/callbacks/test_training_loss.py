"""A training loss that is no mean of what selection measures is refused before the first step, with the cause."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_run import SIMPLE, VOCABULARY, ProbingUniform, SmallLM, rows, small_trainer, weights_hash

from liveselect.callbacks import MATES, DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import UniformSelector


class Training(SmallLM):
    """Trains on what ``loss(logits, batch)`` makes of the logits."""

    def __init__(self, loss, dropout=0.0):
        super().__init__(dropout)
        self.loss = loss

    def training_step(self, batch, batch_index):
        logits = self.model(batch["input_ids"], use_cache=False).logits
        loss = self.loss(logits, batch)
        return {"loss": loss, "more": 1} if batch_index % 2 else loss


def tokens(logits, batch, shift=1, labels=None, **settings):
    labels = batch["labels"] if labels is None else labels
    before = logits[:, : logits.shape[1] - shift]
    return F.cross_entropy(before.flatten(0, 1), labels[:, shift:].flatten(), **settings)


def examples(logits, batch):
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return (each.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).mean()


def answers(count=24):
    """Return rows of which parts of several lengths carry loss."""
    made = []
    for index, row in enumerate(rows(count, seed=1)):
        ids = row["input_ids"]
        hidden = torch.arange(len(ids)) < 2 + index % 5
        made.append({"input_ids": ids, "labels": ids.masked_fill(hidden, -100)})
    return made


def train(folder, model, pool=None, selection=None, **settings):
    pl.seed_everything(1, verbose=False)
    if selection is None:
        selection = DataSelection(ProbingUniform(), OneStepInfluence(), every_n_steps=3, dirpath=folder, **settings)
    data = SelectionDataModule(pool or answers(), reference=rows(6, seed=2), batch_size=4, probe_batch_size=4)
    limits = {"precision": "32-true", "max_steps": 4, "accumulate_grad_batches": 2}
    trainer = small_trainer(folder, [selection], **{**SIMPLE, **limits})
    trainer.fit(model, datamodule=data)
    return trainer


RIGHT = {
    "mean over tokens": tokens,
    "mean over examples": examples,
    "sum over tokens": lambda logits, batch: tokens(logits, batch, reduction="sum"),
    "sum over tokens, by example": lambda logits, batch: tokens(logits, batch, reduction="sum") / len(logits),
    "mean over all positions": lambda logits, batch: tokens(logits, batch, reduction="sum") / logits[..., 0].numel(),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("loss", RIGHT.values(), ids=RIGHT)
def test_means_and_sums_are_trained_on(tmp_path, loss, dropout):
    assert train(tmp_path, Training(loss, dropout)).global_step == 4


def unshifted(logits, batch):
    return tokens(logits, batch, shift=0)


WRONG = {
    "shifted labels": (unshifted, "labels of the same position: labels in the batch are shifted already"),
    "other labels": (lambda logits, batch: tokens(logits, batch, labels=batch["input_ids"]), "label is -100 as well"),
    "last position": (
        lambda logits, batch: F.cross_entropy(logits[:, -2], batch["labels"][:, -1]),
        "the last position only",
    ),
    "smoothing": (lambda logits, batch: tokens(logits, batch, label_smoothing=0.1), r"label_smoothing=0.1\)"),
    "z-loss": (
        lambda logits, batch: tokens(logits, batch) + 1e-2 * logits.logsumexp(-1).square().mean(),
        "adds a term of 0.1",
    ),
    "padding": (
        lambda logits, batch: tokens(
            logits, batch, labels=batch["labels"].masked_fill(batch["input_ids"] == batch["input_ids"][0, -1], -100)
        ),
        "ignores the token .* give them -100",
    ),
    "bits": (lambda logits, batch: tokens(logits, batch) / math.log(2), "returns bits"),
    "divided twice": (lambda logits, batch: tokens(logits, batch) / 2, "divides by accumulate_grad_batches"),
    "a factor": (lambda logits, batch: 0.3 * tokens(logits, batch), "other positions or labels.*or a factor"),
}


@pytest.mark.parametrize(("loss", "message"), WRONG.values(), ids=WRONG)
def test_another_loss_is_refused_before_the_first_step(tmp_path, loss, message):
    model = Training(loss)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(5)  # else all labels are alike to it
    before = weights_hash(model)
    with pytest.raises(
        MisconfigurationException, match=rf"training_step returned the loss(?s:.*){message}.*pass loss_fn"
    ):
        train(tmp_path, model)
    assert weights_hash(model) == before


def test_a_gross_difference_is_seen_with_dropout(tmp_path):
    model = Training(WRONG["a factor"][0], dropout=0.1)
    with pytest.raises(MisconfigurationException, match="no mean or sum"):
        train(tmp_path, model)


class DrawsFirst(Training):
    """Draws a number before its forward, so that its dropout is not that of a forward alone."""

    def training_step(self, batch, batch_index):
        torch.rand(1)
        return super().training_step(batch, batch_index)


def test_dropout_that_is_drawn_at_another_moment_is_no_other_loss(tmp_path):
    assert train(tmp_path, DrawsFirst(tokens, dropout=0.1)).global_step == 4
    with pytest.raises(MisconfigurationException, match="no mean or sum"):
        train(tmp_path / "wrong", DrawsFirst(WRONG["a factor"][0], dropout=0.1))


def test_what_is_meant_is_trained_on(tmp_path):
    smoothed = WRONG["smoothing"][0]
    assert train(tmp_path / "said", Training(smoothed), training_loss_differs=True).global_step == 4
    preset = MATES(
        3, 8, regressor=HashedRidgeRegressor(), min_spearman=None, dirpath=tmp_path, training_loss_differs=True
    )
    assert train(tmp_path / "preset", Training(smoothed), selection=preset).global_step == 4

    def own(module, batch):
        logits = module.model(batch["input_ids"], use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none", label_smoothing=0.1
        )
        return losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)

    assert train(tmp_path / "own", Training(smoothed), loss_fn=own).global_step == 4


def test_selections_that_measure_nothing_take_any_loss(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=3, dirpath=tmp_path)
    assert train(tmp_path, Training(WRONG["a factor"][0]), selection=selection).global_step == 4


def test_the_comparison_leaves_training_as_it_was(tmp_path):
    compared, alone = (Training(tokens, dropout=0.1) for _ in range(2))
    alone.load_state_dict(compared.state_dict())
    calls = []

    def counted(module, batch):
        calls.append(module.training)
        return causal_lm_loss(module, batch)

    train(tmp_path / "compared", compared, loss_fn=counted)
    train(tmp_path / "alone", alone, selection=DataSelection(UniformSelector(), every_n_steps=3, dirpath=tmp_path))
    assert weights_hash(compared) == weights_hash(alone)
    assert calls.count(True) >= 4


def test_batches_that_only_training_step_knows_are_trained_on(tmp_path):
    def own(module, batch):
        if module.training:
            raise KeyError("what training batches lack")
        return causal_lm_loss(module, batch)

    assert train(tmp_path, Training(WRONG["a factor"][0]), loss_fn=own).global_step == 4


def test_the_vocabulary_before_time_is_seen_where_both_are_as_long(tmp_path):
    square = torch.stack([row["input_ids"] for row in rows(24, seed=1)])
    pool = [
        {"input_ids": ids} for ids in torch.cat([square] * math.ceil(VOCABULARY / square.shape[1]), 1)[:, :VOCABULARY]
    ]

    class Transposed(Training):
        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits.transpose(1, 2)

    model = Transposed(lambda logits, batch: tokens(logits, batch))
    model.model.config.max_position_embeddings = VOCABULARY
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(5)
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(ProbingUniform(), OneStepInfluence(), every_n_steps=3, dirpath=tmp_path)
    data = SelectionDataModule(pool, reference=pool[:4], batch_size=4, probe_batch_size=4, overlap="allow")
    settings = {**SIMPLE, "precision": "32-true", "max_steps": 2}
    with pytest.raises(MisconfigurationException, match="training_step returned the loss"):
        small_trainer(tmp_path, [selection], **settings).fit(model, datamodule=data)


class Untaught(pl.LightningModule):
    """Answers with zeros at first, as models whose head begins at zero do: every label is as likely to it."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift
        self.embedding, self.head = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

    def training_step(self, batch, batch_index):
        return tokens(self(batch["input_ids"]), batch, shift=self.shift)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("shift", [0, 1])
def test_what_the_first_batch_cannot_show_is_seen_before_the_first_round_that_measures(tmp_path, shift):
    """And training goes on, on what is drawn uniformly."""
    pool = rows(24, seed=1)
    selection = DataSelection(ProbingUniform(), OneStepInfluence(), every_n_steps=3, warmup_rounds=1, dirpath=tmp_path)
    if shift:
        trainer = train(tmp_path, Untaught(shift), pool, selection)
    else:
        with pytest.warns(SelectionWarning, match="of the last step of a round.*labels of the same position"):
            trainer = train(tmp_path, Untaught(shift), pool, selection)
    assert trainer.global_step == 4
    influence = torch.tensor(selection.run.ledger.rounds[1].influence)
    assert len(influence) == 6
    assert bool(influence.isfinite().all()) == bool(shift)
