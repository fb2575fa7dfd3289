"""What the ledger says that training computed, against counts by hand."""

import pytest
import torch
from hand_flops import attention, forward, matrices, with_backward
from small_run import SIMPLE, TOKENS, ProbingUniform, SmallLM, rows, small_trainer

from liveselect.callbacks import DataSelection, session
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.selectors import UniformSelector

STEPS, BATCH = 4, 2


def fit(folder, model=None, selector=None, estimator=None, **arguments):
    chosen = DataSelection(
        selector or UniformSelector(), estimator, every_n_steps=2, warmup_rounds=0, dirpath=folder, **arguments
    )
    trainer = small_trainer(folder, [chosen], **{**SIMPLE, "max_steps": STEPS})
    data = SelectionDataModule(rows(40, 0), reference=rows(3, 1), batch_size=BATCH)
    trainer.fit(model or SmallLM(), datamodule=data)
    return chosen.run.ledger


def test_training_is_a_forward_and_a_backward_with_attention(tmp_path):
    ledger = fit(tmp_path)
    step = with_backward(SmallLM(), BATCH, TOKENS, fused=False)  # not with dropout
    assert ledger.training_flops == pytest.approx(STEPS * step, rel=1e-4)
    assert ledger.training_repeated_flops == 0
    assert ledger.around_flops["count FLOPs"] > 0
    assert ledger.uncounted == []


def test_activations_that_are_computed_again_are_training_s_but_no_use_of_the_device(tmp_path):
    model = SmallLM()
    model.model.gradient_checkpointing_enable()
    ledger, plain = fit(tmp_path / "again", model), fit(tmp_path / "kept")
    useful = ledger.training_flops - ledger.training_repeated_flops
    assert useful == pytest.approx(plain.training_flops, rel=1e-3)
    layers = forward(model, BATCH, TOKENS) - 2 * model.model.lm_head.weight.numel() * BATCH * TOKENS
    assert 0.5 * STEPS * layers < ledger.training_repeated_flops <= STEPS * layers


def test_frozen_layers_cost_less(tmp_path):
    model = SmallLM()
    model.model.requires_grad_(False)
    model.model.lm_head.requires_grad_(True)
    head = 2 * model.model.lm_head.weight.numel() * BATCH * TOKENS
    expected = STEPS * (forward(model, BATCH, TOKENS) + head)  # the head's input needs no gradient
    assert fit(tmp_path, model).training_flops == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_does_not_fit_leaves_the_linear_layers_and_says_so(tmp_path):
    def broken(model, batch):
        raise RuntimeError("no such loss")

    with pytest.warns(SelectionWarning, match="not counted in the FLOPs.*all but the linear layers.*no such loss"):
        ledger = fit(tmp_path, loss_fn=broken)
    step = with_backward(SmallLM(), BATCH, TOKENS, fused=False)
    missing = 3 * attention(SmallLM(), BATCH, TOKENS)
    assert ledger.training_flops == pytest.approx(STEPS * (step - missing), rel=1e-6)
    assert "no such loss" in Ledger.read(tmp_path / "ledger.jsonl").uncounted[0]


def test_the_rehearsal_is_selection_s(tmp_path):
    ledger = fit(tmp_path, selector=ProbingUniform(), estimator=OneStepInfluence())
    assert ledger.around_flops["rehearsal"] > 2 * matrices(SmallLM()) * TOKENS
    assert ledger.selection_flops > sum(ledger.around_flops.values())


def test_utilisation_is_logged_where_the_device_s_peak_is_known(tmp_path, monkeypatch):
    assert fit(tmp_path / "cpu").utilisation() == {}
    monkeypatch.setattr(session, "peak_flops", lambda trainer: 1e12)
    ledger = fit(tmp_path / "known", selector=ProbingUniform(), estimator=OneStepInfluence())
    used = ledger.utilisation()
    assert used["mfu_training"] == pytest.approx(ledger.training_flops / ledger.training_seconds / 1e12)
    seconds = ledger.training_seconds + ledger.selection_seconds
    whole = (ledger.training_flops + ledger.selection_flops) / seconds / 1e12
    assert used["mfu_whole"] == pytest.approx(whole)
    read = Ledger.read(tmp_path / "known" / "ledger.jsonl")
    assert read.utilisation() == pytest.approx(used)


def test_the_peak_of_an_h200_is_known(monkeypatch):
    from types import SimpleNamespace

    from liveselect.callbacks.training_flops import peak_flops

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def peak(precision):
        strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
        return peak_flops(SimpleNamespace(strategy=strategy, precision=precision, world_size=8))

    assert peak("bf16-mixed") == peak("16-true") == 8 * 9.895e14
    assert peak("32-true") == 8 * 6.7e13
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak("bf16-mixed") == 8 * 3.12e14
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other Device")
    assert peak("bf16-mixed") is None
