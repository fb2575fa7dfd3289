"""Signals whose handlers save or stop: no checkpoint holds displaced weights, and no signal is lost."""

import os
import signal
import threading
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sampling import mostly_slow
from small_run import SIMPLE, SmallLM, small_data, small_trainer, weights_hash

from liveselect import distributed
from liveselect.callbacks import DataSelection
from liveselect.callbacks.preemption import SignalGate
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

STEPS, ROUND = 9, 3
SETTINGS = {**SIMPLE, "max_steps": STEPS, "limit_val_batches": 0, "accumulate_grad_batches": 2}
ESTIMATORS = {
    "one step": OneStepInfluence,
    "first order": FirstOrderInfluence,
    "k-fac": lambda: KFACInfluence(factor_examples=4),
}


class Weights(Callback):
    """Notes the weights and what was trained on after every batch."""

    def __init__(self) -> None:
        self.after, self.ids = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step] = weights_hash(pl_module)
        self.ids.append((trainer.global_step, batch["id"].tolist()))


class SignallingLoss:
    """Sends a signal to its own process at every call, or at one."""

    def __init__(self, at=None, number=signal.SIGUSR1) -> None:
        self._at, self._number, self.calls = at, number, 0  # no settings of the run, which a resume compares

    def __call__(self, module, batch):
        losses = causal_lm_loss(module, batch)
        self.calls += 1
        if self._at in (None, self.calls):
            os.kill(os.getpid(), self._number)
        return losses


def run(folder, loss_fn=causal_lm_loss, estimator="one step", callbacks=(), ckpt_path=None, module=None, **settings):
    pl.seed_everything(1, verbose=False)
    selector = RegressionSelector(HashedRidgeRegressor(2**6), probes=9, ratio=0.5, min_spearman=None)
    selection = DataSelection(
        selector, ESTIMATORS[estimator](), every_n_steps=ROUND, loss_fn=loss_fn, dirpath=folder / "s", **settings
    )
    weights = Weights()
    trainer = small_trainer(folder, [weights, selection, *callbacks], **SETTINGS)
    module = module or SmallLM()
    trainer.fit(module, datamodule=small_data(), ckpt_path=ckpt_path)
    return trainer, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs without a signal, each made once: how often they call the loss, and what they trained."""

    @cache
    def made(estimator, **settings):
        count = SignallingLoss(at=0)
        _, whole = run(tmp_path_factory.mktemp("whole"), count, estimator, **settings)
        return count.calls, whole

    return made


@pytest.fixture
def saving(tmp_path):
    """A user's handler of SIGUSR1 that saves a checkpoint, as submitit's and SLURM's do; yields what it saved."""
    saved, holder = [], {}

    class Holder(Callback):
        def setup(self, trainer, pl_module, stage):
            holder["trainer"] = trainer

    def save(number, frame):
        path = tmp_path / f"signal-{len(saved)}.ckpt"
        holder["trainer"].save_checkpoint(path)
        saved.append(path)

    before = signal.signal(signal.SIGUSR1, save)
    yield Holder(), saved
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which workers of the tests may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def digest_of(path):
    state = torch.load(path, weights_only=True)
    module = SmallLM()
    module.load_state_dict(state["state_dict"])
    return state["global_step"], weights_hash(module)


@pytest.mark.parametrize(
    "settings", [{}, {"probes_between_steps": 2}, {"overhear": 2}], ids=["pause", "ahead", "overhear"]
)
def test_a_signal_at_any_call_of_the_loss_saves_the_weights_of_training_and_changes_nothing(
    tmp_path, saving, undisturbed, settings
):
    holder, saved = saving
    estimator = "first order" if settings.get("overhear") else "one step"
    _, whole = undisturbed(estimator, **settings)
    loss = SignallingLoss()
    _, signalled = run(tmp_path / "signalled", loss, estimator, [holder], **settings)
    assert loss.calls > 20
    assert len(saved) > 5
    digests = {digest_of(path) for path in saved}
    start = weights_hash(SmallLM())
    assert digests <= {*whole.after.items(), (0, start)}
    assert len(digests) > 2
    assert signalled.after == whole.after
    assert signalled.ids == whole.ids
    _, resumed = run(
        tmp_path / "resumed", SignallingLoss(at=0), estimator, ckpt_path=saved[len(saved) // 2], **settings
    )
    assert resumed.ids == whole.ids[-len(resumed.ids) :]
    assert resumed.after[STEPS] == whole.after[STEPS]


@pytest.mark.parametrize("estimator", mostly_slow([*ESTIMATORS], ["one step", "k-fac"]))
def test_a_run_goes_on_to_the_bit_from_what_a_signal_has_saved_inside_a_round(tmp_path, saving, undisturbed, estimator):
    holder, saved = saving
    calls, whole = undisturbed(estimator)
    run(tmp_path / "signalled", SignallingLoss(at=calls // 2), estimator, [holder])
    (path,) = saved
    _, resumed = run(tmp_path / "resumed", SignallingLoss(at=0), estimator, ckpt_path=path)
    first = resumed.ids[0][0]
    assert resumed.after == {step: digest for step, digest in whole.after.items() if step >= first}
    assert resumed.ids == whole.ids[-len(resumed.ids) :]


class SignalsAfterItsStep(SmallLM):
    """Sends a signal between the sixth optimizer step and the count of its batch."""

    def optimizer_step(self, *arguments, **settings):
        super().optimizer_step(*arguments, **settings)
        if self.trainer.global_step == 5:  # Lightning counts after this hook
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_between_an_optimizer_step_and_the_count_of_its_batch_saves_a_whole_step(
    tmp_path, saving, undisturbed
):
    holder, saved = saving
    _, whole = undisturbed("one step")
    run(tmp_path / "signalled", callbacks=[holder], module=SignalsAfterItsStep())
    (path,) = saved
    assert digest_of(path) == (6, whole.after[6])
    _, resumed = run(tmp_path / "resumed", ckpt_path=path)
    assert resumed.ids == whole.ids[12:]
    assert resumed.after[STEPS] == whole.after[STEPS]


def test_a_job_that_slurm_requeues_in_a_round_continues_to_the_bit(tmp_path, monkeypatch, undisturbed):
    names = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "42", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**names, "NODELIST": "localhost", "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    folder = tmp_path / "job"
    calls, whole = undisturbed("one step")
    run(folder, SignallingLoss(at=calls - 4))
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    (path,) = folder.glob("hpc_ckpt_*.ckpt")
    step, digest = digest_of(path)
    assert digest == whole.after[step]
    _, resumed = run(folder, SignallingLoss(at=0))  # Lightning finds the checkpoint by itself
    assert resumed.ids[0][0] >= step > 0
    assert resumed.ids == whole.ids[-len(resumed.ids) :]
    assert resumed.after[STEPS] == whole.after[STEPS]


def test_a_signal_to_stop_ends_the_run_after_a_counted_step(tmp_path, interruptible):
    class Stops(SignalsAfterItsStep):
        def optimizer_step(self, *arguments, **settings):
            SmallLM.optimizer_step(self, *arguments, **settings)
            if self.trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):  # what Lightning makes of it
        run(tmp_path, module=Stops())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def nested(gate):
    with gate.measuring(), gate.measuring():
        pass


@pytest.mark.parametrize("before", [lambda gate: None, nested], ids=["one", "another inside of it"])
def test_a_thread_that_saves_waits_until_nothing_is_displaced(before):
    gate, order = SignalGate(), []

    def save():
        gate.wait_until_in_order()
        order.append("saved")

    with gate.measuring():
        before(gate)
        thread = threading.Thread(target=save)
        thread.start()
        thread.join(0.1)
        order.append("measured")
    thread.join()
    assert order == ["measured", "saved"]


@pytest.mark.parametrize("owner", ["trainer", "strategy"])
def test_nothing_is_displaced_before_a_checkpoint_of_a_thread_is_written(owner):
    trainer, gate, order = pl.Trainer(logger=False), SignalGate(), []
    begun, may_end = threading.Event(), threading.Event()
    saves = trainer if owner == "trainer" else trainer.strategy

    def write(*arguments, **settings):
        order.append("begins")
        begun.set()
        may_end.wait(10)
        order.append("ends")

    saves.save_checkpoint = write
    gate.install(trainer)
    thread = threading.Thread(target=saves.save_checkpoint)
    thread.start()
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()
    with gate.measuring():
        order.append("measured")
    thread.join()
    gate.remove()
    assert order == ["begins", "ends", "measured"]
    assert saves.save_checkpoint is write


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_loss_function_that_saves_is_refused(tmp_path, weights_only):
    holder = {}

    class Holder(Callback):
        def setup(self, trainer, pl_module, stage):
            holder["trainer"] = trainer

    def loss(module, batch):
        if holder["trainer"].global_step == ROUND:
            holder["trainer"].save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        return causal_lm_loss(module, batch)

    with pytest.raises(RuntimeError, match="a checkpoint was to be written while influence is measured"):
        run(tmp_path, loss, callbacks=[Holder()])
    assert not (tmp_path / "x.ckpt").exists()


def test_a_gate_holds_what_comes_runs_it_once_and_puts_the_handlers_back():
    came = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: came.append(number))
    try:
        gate = SignalGate()
        gate.install()
        gate.hold()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR2)
        assert came == []
        gate.release()
        assert came == [signal.SIGUSR2]
        os.kill(os.getpid(), signal.SIGUSR2)
        assert len(came) == 2
        own = signal.getsignal(signal.SIGUSR2)
        gate.remove()
        assert signal.getsignal(signal.SIGUSR2) is not own
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_interrupt_is_not_held(interruptible):
    gate = SignalGate()
    gate.install()
    try:
        gate.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        gate.remove()


class SavesOnSignal(Callback):
    """Saves a checkpoint on SIGUSR1, and sends one to rank 1 in the middle of a step."""

    def __init__(self, folder) -> None:
        self.folder, self.saved, self.sent = folder, 0, False

    def setup(self, trainer, pl_module, stage):
        signal.signal(signal.SIGUSR1, lambda number, frame: self.save(trainer))

    def save(self, trainer):
        trainer.save_checkpoint(self.folder / f"signal-{self.saved}.ckpt")
        self.saved += 1

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 3 and trainer.global_rank == 1 and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGUSR1)


class SignalledOnOneRank(OneStepInfluence):
    """Rank 1 gets SIGUSR1 while round 2 is measured."""

    def fit(self, model, round):
        self.round = round.index
        return super().fit(model, round)

    def score(self, model, batch):
        if self.round == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().score(model, batch)


@pytest.mark.long
def test_two_ranks_save_together_what_one_of_them_was_asked_to_save(tmp_path):
    from two_ranks import batches, trained

    whole = trained(tmp_path / "whole", 2)
    saving = SavesOnSignal(tmp_path)
    assert trained(tmp_path / "signalled", 2, estimator=SignalledOnOneRank(), callbacks=[saving]) == whole
    assert batches(tmp_path / "signalled", 2) == batches(tmp_path / "whole", 2)
    for name in ("signal-0.ckpt", "signal-1.ckpt"):  # after the step, and after the round
        assert trained(tmp_path / name.removesuffix(".ckpt"), 2, tmp_path / name) == whole
    assert not (tmp_path / "signal-2.ckpt").exists()
