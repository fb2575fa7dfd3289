"""State that nothing puts back shows in what the model answers to a fixed row; checking changes nothing."""

import copy
import itertools
import math

import lightning.pytorch as pl
import pytest
import torch
from cases import VOCABULARY, Bigrams
from fakes import fake_context, random_source
from small_run import SIMPLE, ProbingUniform, SmallLM, rows, small_trainer, weights_hash
from torch import nn

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.preserve import changed_since, response_to
from liveselect.selectors import UniformSelector

GLOBAL = {"calls": 0}


def count() -> float:
    GLOBAL["calls"] += 1
    return 1 + 0.001 * (GLOBAL["calls"] % 7)


class Counting(nn.Module):
    def forward(self, x):
        return x * count()


class CountingBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1

    @staticmethod
    def backward(context, gradient):
        return gradient * count()


class InBackward(nn.Module):
    def forward(self, x):
        return CountingBackward.apply(x)


class Iterating(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()

    def forward(self, x):
        return x * (1 + 0.001 * next(self.numbers))


class Whole(Bigrams):
    """Applies ``inner`` between its layers, or counts in its own code."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.drop = nn.Dropout(0.3)

    def forward(self, input_ids):
        x = self.drop(self.embed(input_ids))
        if self.inner is None:
            x = x * count()
        elif not isinstance(self.inner, str):
            x = self.inner(x)
        return self.head(x)


def answered(model, **arguments):
    """Return the live model of a context, a row, and its response."""
    source = random_source(candidates=8, vocab=VOCABULARY)
    context = fake_context(source, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), **arguments)
    row = {name: value[:1] for name, value in next(context.round.batches(context.candidates)).items()}
    return context, row, response_to(context.live, row)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Counting, r"first in 'inner' \(Counting\)"),
        (Iterating, r"first in 'inner' \(Iterating\)"),
        (InBackward, "first in the backward, at the gradient of 'embed"),
        (lambda: None, "first in the forward of 'Whole', before it calls 'head'"),
    ],
)
def test_what_has_changed_is_named(inner, message):
    context, row, response = answered(Whole(inner()))
    found = changed_since(response, context.live, row)
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


class Circling(nn.Module):
    """Scales by numbers that come round again, kept where nothing can put them back."""

    def __init__(self, period):
        super().__init__()
        self.numbers = itertools.cycle([1 + 0.01 * number for number in range(period)])

    def forward(self, x):
        return x * next(self.numbers)


@pytest.mark.parametrize("period", range(2, 10))
def test_state_that_comes_round_again_is_found_before_training(tmp_path, period):
    """A measurement of a multiple of the period would hide it from one response before and one after."""
    model = SmallLM(dropout=0.0)
    model.model.gpt_neox.final_layer_norm = nn.Sequential(model.model.gpt_neox.final_layer_norm, Circling(period))
    selection = DataSelection(
        ProbingUniform(), OneStepInfluence(), every_n_steps=2, dirpath=tmp_path, training_loss_differs=True
    )
    data = SelectionDataModule(rows(24, seed=1), reference=rows(6, seed=2), batch_size=2, probe_batch_size=4)
    with pytest.warns(SelectionWarning, match="answers the same row otherwise"):
        small_trainer(tmp_path, [selection], **{**SIMPLE, "max_steps": 1}).fit(model, datamodule=data)
    assert "answers the same row otherwise" in selection.run.disabled


def test_a_loss_that_changes_is_named():
    def loss(model, batch):
        return model(batch["input_ids"]).square().mean((1, 2)) * count()

    context, row, response = answered(Whole("nothing"), loss_fn=loss)
    assert "first in loss_fn, after the model" in changed_since(response, context.live, row)


def test_a_model_with_dropout_answers_alike_and_the_check_leaves_no_trace():
    model = Whole("nothing").train()
    model.norm = nn.BatchNorm1d(VOCABULARY)
    model.register_forward_hook(lambda module, inputs, output: module.norm(output.flatten(0, 1)).view_as(output))
    model.head.weight.grad = gradient = torch.ones_like(model.head.weight)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    context, row, response = answered(model)
    assert response is not None
    assert changed_since(response, context.live, row) is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.head.weight.grad is gradient
    assert (gradient == 1).all()
    assert model.training
    assert not model.head._forward_hooks
    with torch.no_grad():
        model.head.bias[3] += 1e-6
    assert changed_since(response, context.live, row) is not None


def test_optimizers_that_step_in_the_backward_do_not_step_for_an_echo():
    model = Whole("nothing")
    inner = torch.optim.Adam([model.head.weight], lr=1e-2)

    def step(parameter):
        inner.step()
        parameter.grad = None

    model.head.weight.register_post_accumulate_grad_hook(step)
    before = model.head.weight.detach().clone()
    context, row, response = answered(model)
    assert response is not None
    assert changed_since(response, context.live, row) is None
    assert torch.equal(model.head.weight, before)
    assert not inner.state


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_without_a_finite_loss_is_not_checked(loss):
    context, row, response = answered(
        Whole("nothing"), loss_fn=lambda model, batch: model(batch["input_ids"]).sum((1, 2)) * loss
    )
    assert response is None
    assert changed_since(response, context.live, row) is None


class Stateful(SmallLM):
    """Counts in a global variable, from its ``since``-th forward on."""

    def __init__(self, since=0):
        super().__init__(dropout=0.1)
        self.since = since

    def forward(self, input_ids):
        logits = self.model(input_ids, use_cache=False).logits
        scale = count()
        return logits * scale if GLOBAL["calls"] > self.since else logits

    def training_step(self, batch, batch_index):
        logits = self(batch["input_ids"])
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def a_run(folder, model, selector, estimator, **settings):
    GLOBAL["calls"] = 0
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, estimator, every_n_steps=3, dirpath=folder, **{"warmup_rounds": 0, **settings})
    data = SelectionDataModule(rows(24, seed=1), reference=rows(6, seed=2), batch_size=2, probe_batch_size=4)
    small_trainer(folder, [selection], **{**SIMPLE, "max_steps": 12, "precision": "32-true"}).fit(
        model, datamodule=data
    )
    return selection


def restore_alarms(selection):
    """Return the rounds that raised one."""
    ledger = selection.run.ledger
    return [record.round for record in ledger.rounds for alarm in record.alarms if alarm.kind == "restore"]


@pytest.mark.parametrize("warmup_rounds", [0, 1])
def test_a_run_whose_model_keeps_state_elsewhere_measures_nothing(tmp_path, warmup_rounds):
    probing = ProbingUniform()
    with pytest.warns(SelectionWarning, match="answers the same row otherwise.*Nothing is measured"):
        selection = a_run(tmp_path, Stateful(), probing, OneStepInfluence(), warmup_rounds=warmup_rounds)
    rounds = selection.run.ledger.rounds
    assert restore_alarms(selection) == [0]
    assert rounds[0].alarms[0].text == selection.run.disabled
    assert not any(len(influence) for influence in probing.influence)
    assert "nothing could be measured: after a measurement the model answers" in rounds[-1].notes[0]
    assert [record.chosen for record in rounds] == [6] * 4


def test_state_that_begins_to_count_later_is_noticed_in_the_run_and_after_a_resume(tmp_path):
    probing = ProbingUniform()
    selection = a_run(tmp_path, Stateful(since=75), probing, FirstOrderInfluence(), probes_between_steps=2)
    (found,) = restore_alarms(selection)
    assert 0 < found < 3
    assert len(probing.influence[0])
    assert not len(probing.influence[-1])
    state = copy.deepcopy(selection.run.state_dict())
    selection.run.disabled = None
    selection.run.load_state_dict(state)
    assert "answers the same row otherwise" in selection.run.disabled


def test_few_rounds_are_checked_and_training_does_not_notice(tmp_path, monkeypatch):
    asked = []
    original = response_to
    for module in ("rehearsal", "measurement"):
        monkeypatch.setattr(f"liveselect.{module}.response_to", lambda *which: asked.append(1) or original(*which))
    models = SmallLM(), SmallLM()
    pl.seed_everything(1, verbose=False)
    models[0].load_state_dict(models[1].state_dict())
    measured = a_run(tmp_path / "on", models[0], ProbingUniform(), OneStepInfluence())
    assert len(asked) == 4  # the rehearsal; rounds 0, 1 and 3 of 4
    a_run(tmp_path / "off", models[1], UniformSelector(), None)
    assert weights_hash(models[0]) == weights_hash(models[1])
    assert measured.run.disabled is None
    assert not any(record.alarms for record in measured.run.ledger.rounds)
