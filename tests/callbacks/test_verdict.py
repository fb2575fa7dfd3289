"""The verdict inside a run: look-aheads leave training as it was, and say what is planted."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_ranks import fit, on_lightning_ranks
from sampling import mostly_slow
from small_run import BigramLM, Place, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import MATES, DataSelection, SelectionMonitor
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning, Selector
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.monitoring.wandb_sink import WandbSink
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector
from liveselect.verdict import Verdict

OFTEN = Verdict(share=0.99, steps=3, cost="flops", rows=4)
STEPS = 18


class Busy(SmallLM):
    """Counts its training steps in Python and in a buffer, and logs, as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []
        self.register_buffer("count", torch.zeros(1))

    def training_step(self, batch, batch_index):
        self.seen.append(len(self.seen))
        self.count += 1
        loss = super().training_step(batch, batch_index)
        self.log("train_loss", loss)
        return loss


def trained(folder, verdict, selector=None, estimator=None, ckpt_path=None, callbacks=(), module=None, **settings):
    """Train the small run; returns its trace, its ledger and the selection."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(
        selector or UniformSelector(), estimator, every_n_steps=4, dirpath=folder, verdict=verdict
    )
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    stack = [Place(selection), selection, Trace(folder / "trace"), *callbacks, keep]
    trainer = small_trainer(folder, stack, **{"max_steps": STEPS, **settings})
    trainer.fit(module or Busy(), datamodule=small_data(), ckpt_path=ckpt_path)
    return (folder / "trace").read_text().splitlines(), Ledger.read(folder / "ledger.jsonl"), selection


def looks(selection):
    return selection._judging._look.looks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder, OFTEN)


def test_look_aheads_leave_training_as_it_was_to_the_bit(whole, tmp_path):
    _, trace, ledger, selection = whole
    assert trace == trained(tmp_path, None)[0]
    assert len(looks(selection)) >= 2
    assert ledger.verdict["looks"] == len(looks(selection))
    assert ledger.verdict["said"] == "cannot tell yet"


def test_the_cost_stands_in_the_ledger_in_its_own_phase_and_within_its_share(whole):
    _, _, ledger, _ = whole
    spent = [record.flops.get("look-ahead", 0.0) for record in ledger.rounds]
    assert spent[0] == 0  # nothing is compared in the warm-up
    assert 0 < sum(spent) <= 0.99 * ledger.training_flops
    assert sum(record.seconds.get("look-ahead", 0.0) for record in ledger.rounds) > 0


def test_look_aheads_count_in_what_the_gain_is_set_against(whole):
    _, _, ledger, selection = whole
    answer = selection._judging._look.answer
    # nothing else of this run takes as many FLOPs
    spent = sum(record.flops.get("look-ahead", 0.0) for record in ledger.rounds)
    assert answer.overhead >= 0.5 * spent / ledger.training_flops


# around the first arm, which begins at step 4 and ends at 7
@pytest.mark.parametrize("step", mostly_slow([3, 4, 5, 6, 7, 8], [3, 5, 7]))
def test_a_run_that_is_resumed_anywhere_finds_the_same(whole, tmp_path, step):
    folder, trace, _, selection = whole
    resumed, _, again = trained(tmp_path, OFTEN, ckpt_path=folder / f"step={step}.ckpt")
    assert resumed == trace[3 * step :]
    assert looks(again) == looks(selection)


def test_an_arm_on_the_chosen_data_takes_the_very_steps_of_training(tmp_path, monkeypatch):
    # with dropout, accumulation, clipping, a warm-up of the learning rate and bf16-mixed
    holder = []

    class Hold(Callback):
        def on_fit_start(self, trainer, pl_module):
            holder.append(trainer.callbacks[1])

    def chosen(candidates, count, seed, round_index):
        return holder[0].plan.ids[:count]

    monkeypatch.setattr("liveselect.verdict.looking.random_ids", chosen)
    _, _, selection = trained(tmp_path, OFTEN, callbacks=[Hold()])
    assert len(looks(selection)) >= 2
    for look in looks(selection):
        assert look.chosen == look.random


def test_only_one_half_of_the_reference_set_is_shown_to_estimators(tmp_path):
    class Looking(OneStepInfluence):
        def fit(self, model, round):
            Looking.shown = [int(i) for batch in round.source.reference() for i in batch["id"]]
            return super().fit(model, round)

    Looking.__name__ = "OneStepInfluence"
    selector = RegressionSelector(HashedRidgeRegressor(), probes=9, ratio=0.5, min_spearman=None)
    _, _, selection = trained(tmp_path, OFTEN, selector, Looking(step="in_batch"), max_steps=9)
    held_out = [
        int(i) for batch in selection._judging._look.sets(selection.run.source)["reference"] for i in batch["id"]
    ]
    assert sorted(Looking.shown + held_out) == list(range(6))
    assert len(held_out) == 3


class Knowing(Selector):
    """Chooses what is planted, or what is not."""

    def __init__(self, planted: torch.Tensor, wanted: bool) -> None:
        self.planted, self.wanted = planted, wanted

    def select(self, round, budget):
        worth = torch.rand(len(round.candidates), generator=round.generator("knowing"))
        worth += (self.planted[round.candidates] == self.wanted).float()
        return round.candidates[worth.topk(budget).indices]


def planted_run(folder, wanted, **verdict):
    """Half of the pool repeats two tokens, as the reference does."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(2400) % 2 == 0
    pool = rows(2400, seed=1)
    pattern = torch.tensor([7, 9] * 6)

    def like_reference(row):
        return torch.where(torch.rand(12, generator=generator) < 0.5, pattern, row)

    for i in planted.nonzero().flatten().tolist():
        pool[i] = {"input_ids": like_reference(pool[i]["input_ids"])}
    reference = [{"input_ids": like_reference(row["input_ids"])} for row in rows(32, 5)]
    data = SelectionDataModule(pool=pool, reference=reference, batch_size=4, further_sets={"noise": rows(8, 6)})
    pl.seed_everything(1, verbose=False)
    settings = {"share": 0.9, "steps": 3, "cost": "flops", "rows": 8, **verdict}
    selection = DataSelection(Knowing(planted, wanted), every_n_steps=4, dirpath=folder, verdict=Verdict(**settings))
    trainer = small_trainer(
        folder,
        [selection],
        accumulate_grad_batches=1,
        max_steps=200,
        val_check_interval=1.0,
        precision="32-true",
        check_val_every_n_epoch=1,
        limit_val_batches=0,
    )
    trainer.fit(BigramLM(), datamodule=data)
    return trainer, Ledger.read(folder / "ledger.jsonl")


def test_a_planted_pool_gains_and_must_pay_for_its_look_aheads_too(tmp_path):
    _, ledger = planted_run(tmp_path, True)
    verdict = ledger.verdict
    assert verdict["low"] > 0
    assert verdict["overhead"] > 0.3  # look-aheads take most of it, so that more than a gain is needed
    assert verdict["said"] == ("paying" if verdict["low"] > verdict["price"] else "cannot tell yet")
    assert {"reference", "pool", "noise"} == set(verdict["gains"])
    assert verdict["sentence"].startswith(f"{verdict['said']}: chosen data gained +")


@pytest.mark.parametrize("action", ["random", "stop"])
def test_selection_that_does_harm_is_acted_on(tmp_path, action):
    with pytest.warns(SelectionWarning, match="selection does not pay"):
        trainer, ledger = planted_run(tmp_path, False, on_not_paying=action)
    assert ledger.verdict["said"] == "not paying"
    assert (trainer.global_step < 200) == (action == "stop")
    assert (ledger.rounds[-1].selector == "UniformSelector") == (action == "random")


SENT: list[int] = []
"""Signals that were sent; measuring puts back what classes hold."""


class Signalling(Busy):
    """Sends a signal in a training step of the random arm."""

    def training_step(self, batch, batch_index):
        if self.trainer.global_step == 4 and len(self.seen) == 17 and not SENT:
            SENT.append(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_index)


def test_a_signal_inside_of_the_random_arm_saves_the_weights_of_training(whole, tmp_path):
    _, trace, _, selection = whole
    saved, held = [], []
    SENT.clear()

    class Hold(Callback):
        def on_fit_start(self, trainer, pl_module):
            held.append(trainer)

    def save(number, frame):
        held[0].save_checkpoint(tmp_path / "signal.ckpt")
        saved.append(held[0].global_step)

    before = signal.signal(signal.SIGUSR1, save)
    try:
        signalled, _, goes_on = trained(tmp_path / "signalled", OFTEN, callbacks=[Hold()], module=Signalling())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert saved == [4]
    assert signalled == trace
    assert looks(goes_on) == looks(selection)
    resumed, _, again = trained(tmp_path / "resumed", OFTEN, ckpt_path=tmp_path / "signal.ckpt")
    assert resumed == trace[12:]
    assert looks(again) == looks(selection)


class Insisting(Busy):
    """Sends a signal in every training step of the random arm, as one that comes again and again would."""

    def training_step(self, batch, batch_index):
        if self.trainer.global_step == 4 and len(self.seen) >= 17:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_index)


def test_signals_that_come_all_the_time_do_not_keep_a_look_ahead_from_its_end(whole, tmp_path):
    _, trace, _, selection = whole
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        signalled, _, goes_on = trained(tmp_path, OFTEN, module=Insisting())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(got) > 3
    assert signalled == trace
    assert looks(goes_on) == looks(selection)


def test_a_run_whose_look_ahead_fails_goes_on(tmp_path):
    class Failing(SmallLM):
        def training_step(self, batch, batch_index):
            if "log" in self.__dict__:  # the copy logs nothing
                raise RuntimeError("no room")
            return super().training_step(batch, batch_index)

    with pytest.warns(SelectionWarning, match="a look-ahead failed: no room"):
        trace, ledger, _ = trained(tmp_path, OFTEN, module=Failing(), max_steps=9)
    assert len(trace) == 27
    assert "no room" in ledger.verdict["sentence"]


def test_what_is_no_verdict_is_refused():
    with pytest.raises(TypeError, match=r"verdict to be a liveselect\.verdict\.Verdict"):
        DataSelection(UniformSelector(), verdict=0.01)
    assert MATES(regressor=HashedRidgeRegressor(), verdict=OFTEN).verdict == OFTEN


def on_ranks(folder, strategy, ranks):
    selection = DataSelection(
        UniformSelector(), every_n_steps=2, warmup_rounds=0, dirpath=folder, verdict=replace(OFTEN, steps=2)
    )
    found = fit(folder, selection, strategy, ranks=ranks, max_steps=12)
    verdict = selection.run.ledger.verdict
    return {**found, "looks": [[look.chosen, look.random] for look in looks(selection)], "verdict": verdict}


@pytest.mark.long
def test_two_ranks_find_what_one_finds(tmp_path):
    first, second = on_lightning_ranks(on_ranks, 2, tmp_path / "two", "ddp", 2)
    alone = json.loads(json.dumps(on_ranks(tmp_path / "one", None, 1)))
    assert first["looks"] == second["looks"]
    assert first["verdict"]["said"] == second["verdict"]["said"]
    assert len(first["looks"]) == len(alone["looks"]) >= 2
    for ours, theirs in zip(first["looks"], alone["looks"], strict=True):
        for arm, other in zip(ours, theirs, strict=True):
            assert arm == pytest.approx(other, abs=1e-9)


@pytest.mark.long
def test_sharded_parameters_select_without_a_verdict(tmp_path):
    found = on_lightning_ranks(on_ranks, 2, tmp_path, "fsdp2", 2)
    assert found[0]["looks"] == []
    assert "ranks hold parts of the parameters (FSDP)" in found[0]["verdict"]["sentence"]
    assert len(found[0]["rounds"]) == 6


def test_the_summary_of_a_wandb_run_holds_the_verdict_and_an_answer_is_an_alert(tmp_path):
    shown, alerts = {}, []
    run = SimpleNamespace(summary=shown, alert=lambda **alert: alerts.append(alert["title"]))
    monitor = SelectionMonitor()
    monitor._sinks[id(run)], monitor._opened = WandbSink(run), True
    trainer = SimpleNamespace(loggers=[run], is_global_zero=True)
    ledger = Ledger()
    selection = SimpleNamespace(run=SimpleNamespace(ledger=ledger), plan=())
    for said, alerted in [("cannot tell yet", 0), ("paying", 1), ("paying", 1), ("not paying", 2)]:
        ledger.verdict = {"said": said, "sentence": f"{said}: {len(alerts)}"}
        monitor._show_new(trainer, selection)
        assert shown["selection/verdict"] == said
        assert shown["selection/verdict_because"] == ledger.verdict["sentence"]
        assert len(alerts) == alerted
    assert alerts == ["Selection: paying", "Selection: not paying"]
