"""Runs that are interrupted, repeated or set up askew: selection says so or goes on, and loses nothing."""

import json
import os
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_run import BATCH, POOL, SIMPLE, Place, ProbingUniform, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import MATES, DataSelection, Quad
from liveselect.callbacks.compatibility import run_folder
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UCBSelector, UniformSelector


def small_mates(folder, **arguments) -> MATES:
    defaults = {"every_n_steps": 4, "probes": 12, "ratio": 0.5, "regressor": HashedRidgeRegressor(), "dirpath": folder}
    return MATES(**{**defaults, **arguments})


def regression() -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)


class EndsAtZero(SmallLM):
    """Its learning rate is zero from step 8 on, as at the end of a schedule."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 8))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def broken_reference(module, batch):
    """Losses of candidates, which are differentiated; NaN for the reference set, which is only looked at."""
    losses = causal_lm_loss(module, batch)
    return losses if torch.is_grad_enabled() else losses * float("nan")


@pytest.mark.parametrize(
    ("module", "loss_fn", "unmeasured", "reason"),
    [
        (EndsAtZero, None, [8, 12], r"expected a positive learning rate.*got \[0\.0\]"),
        (SmallLM, broken_reference, [4, 8, 12], "the reference loss before any step is nan"),
    ],
    ids=["a learning rate of zero", "a reference loss that is not finite"],
)
def test_a_round_in_which_nothing_can_be_measured_is_drawn_uniformly(tmp_path, module, loss_fn, unmeasured, reason):
    mates = small_mates(tmp_path, loss_fn=loss_fn)
    trainer = small_trainer(tmp_path, [mates])
    with pytest.warns(SelectionWarning, match=rf"nothing could be measured: {reason}"):
        trainer.fit(module(), datamodule=small_data())
    assert trainer.global_step == 14
    notes = {record.step: record.notes for record in Ledger.read(tmp_path / "ledger.jsonl").rounds}
    assert [step for step in notes if any("nothing could be measured" in note for note in notes[step])] == unmeasured
    assert all(any("drawn uniformly" in note for note in notes[step]) for step in unmeasured)


def test_what_would_fail_after_the_warm_up_fails_before_the_first_step(tmp_path):
    class Stubborn(SmallLM):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    mates = small_mates(tmp_path, warmup_rounds=3)
    trainer = small_trainer(tmp_path, [mates], **SIMPLE, gradient_clip_val=None)
    with pytest.raises(TypeError, match=r"LBFGS.*step needs a closure"):
        trainer.fit(Stubborn(), datamodule=small_data())
    assert trainer.global_step == 0
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_second_fit_of_the_same_callback_begins_anew(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    plans = []
    for _ in range(2):
        small_trainer(tmp_path, [selection], max_steps=8).fit(SmallLM(), datamodule=small_data())
        plans.append([record.plan for record in selection.run.ledger.rounds])
    assert plans[0] == plans[1]
    assert len(plans[0]) == 2


@pytest.mark.parametrize("same", [True, False], ids=["the same datamodule", "another datamodule of the same pool"])
def test_a_trainer_that_fits_again_goes_on_with_candidates_that_were_not_used(tmp_path, same):
    def fit(folder, *steps):
        folder.mkdir()
        pl.seed_everything(1, verbose=False)
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder)
        callbacks = [Place(selection), selection, Trace(folder / "trace")]
        trainer, module, data = small_trainer(folder, callbacks, **SIMPLE), SmallLM(), small_data()
        for until in steps:
            trainer.fit_loop.epoch_loop.max_steps = until
            trainer.fit(module, datamodule=data)
            data = data if same else small_data()
        trace = map(json.loads, (folder / "trace").read_text().splitlines())
        return [ids for *_, ids, _ in trace]  # the weights differ: Lightning makes a new optimizer for each fit

    assert fit(tmp_path / "twice", 8, 13) == fit(tmp_path / "once", 13)


def test_the_ledger_of_an_earlier_run_is_kept(tmp_path):
    for steps in (4, 8, 12):
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
        small_trainer(tmp_path, [selection], max_steps=steps).fit(SmallLM(), datamodule=small_data())
    rounds = {path.name: len(Ledger.read(path).rounds) for path in tmp_path.glob("ledger*.jsonl")}
    assert rounds == {"ledger-1.jsonl": 1, "ledger-2.jsonl": 2, "ledger.jsonl": 3}


def test_resuming_continues_the_ledger_in_its_place(tmp_path):
    first = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [first], max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    small_trainer(tmp_path, [again], max_steps=12).fit(SmallLM(), small_data(), ckpt_path=tmp_path / "x.ckpt")
    assert [path.name for path in tmp_path.glob("ledger*.jsonl")] == ["ledger.jsonl"]
    assert len(Ledger.read(tmp_path / "ledger.jsonl").rounds) == 3


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise ConnectionError("the storage is gone")


def test_a_run_that_starts_over_beside_one_that_was_cut_off_says_so(tmp_path, recwarn):
    def fit(*more, folder):
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path / "selection")
        keep = ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)
        trainer = small_trainer(tmp_path, [selection, *more, keep], max_steps=8)
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path="last")

    def said():
        return [str(each.message) for each in recwarn if "starts over from step 0" in str(each.message)]

    with pytest.raises(ConnectionError):
        fit(Fails(), folder=tmp_path / "version_0")
    assert not said()
    fit(folder=tmp_path / "version_1")  # where no checkpoint is
    assert [f"{tmp_path / 'selection'} was cut off in round 1" in text for text in said()] == [True]
    fit(folder=tmp_path / "version_2")  # beside one that had come to its end
    assert len(said()) == 1


class Versioned(Logger):
    """A logger with a folder for all runs and a name for each, as W&B's has."""

    def __init__(self, folder, version) -> None:
        super().__init__()
        self.folder, self._version = folder, version

    name = "project"
    version = property(lambda self: self._version)
    save_dir = property(lambda self: str(self.folder))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.mark.parametrize(("version", "folder"), [("a1b2c3", "a1b2c3"), (3, "version_3")])
def test_every_run_of_a_logger_has_a_ledger_of_its_own_beside_its_checkpoints(tmp_path, version, folder):
    selection = DataSelection(UniformSelector(), every_n_steps=4)
    keep = ModelCheckpoint(every_n_train_steps=4)
    trainer = small_trainer(tmp_path, [selection, keep], logger=Versioned(tmp_path, version), max_steps=4)
    trainer.fit(SmallLM(), datamodule=small_data())
    assert run_folder(trainer) == tmp_path / "project" / folder
    assert (tmp_path / "project" / folder / "selection" / "ledger.jsonl").exists()
    assert (tmp_path / "project" / folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("steps", "every", "window", "message"),
    [
        (12, 4, 5, "12 candidates of round 1 left.*no whole steps of 10"),
        (6, 3, 4, r"stands after 18 batches of its epoch.*window of 4 \(accumulate_grad_batches\)"),
        (12, 4, 2, None),
    ],
    ids=["in the middle of a round", "at the end of a round", "where both are divided"],
)
def test_a_resume_with_steps_that_do_not_fit_its_place_is_refused_at_the_start(tmp_path, steps, every, window, message):
    first = DataSelection(UniformSelector(), every_n_steps=every, dirpath=tmp_path)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    small_trainer(tmp_path, [first, keep], max_steps=steps).fit(SmallLM(), datamodule=small_data())
    again = DataSelection(UniformSelector(), every_n_steps=every, dirpath=tmp_path)
    settings = {"max_steps": 14, "accumulate_grad_batches": window, "val_check_interval": 10 * window}
    trainer = small_trainer(tmp_path, [again], **settings, limit_train_batches=20)

    def resume():
        trainer.fit(SmallLM(), small_data(), ckpt_path=tmp_path / "step=6.ckpt")

    if message is None:
        resume()
        assert trainer.global_step == 14
    else:
        with pytest.raises(MisconfigurationException, match=message):
            resume()
        assert trainer.global_step == 6


class Interrupted(Callback):
    """Raises inside the second micro-batch of a step, before its backward."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 5:
            raise ConnectionError("the storage is gone")


def test_a_checkpoint_on_an_exception_resumes_to_the_bit(tmp_path):
    def fit(folder, *more, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder)
        callbacks = [Place(selection), selection, Trace(folder / "trace"), *more]
        settings = {**SIMPLE, "max_steps": 10}
        small_trainer(folder, callbacks, **settings).fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
        return (folder / "trace").read_text().splitlines()

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        fit(tmp_path / "broken", Interrupted(), OnExceptionCheckpoint(tmp_path, "saved"))
    assert fit(tmp_path / "broken", ckpt_path=tmp_path / "saved.ckpt") == whole


def test_a_checkpoint_on_an_exception_is_refused_where_it_could_fall_into_an_accumulation_window(tmp_path):
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [selection, OnExceptionCheckpoint(tmp_path, "saved")])
    with pytest.raises(MisconfigurationException, match=r"saves on an exception.*Use every_n_train_steps"):
        trainer.fit(SmallLM(), datamodule=small_data())


def test_a_callback_that_saves_before_selection_has_counted_the_step_is_refused(tmp_path):
    class Hasty(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.save_checkpoint(tmp_path / "hasty.ckpt")

    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    trainer = small_trainer(tmp_path, [Hasty(), selection], **SIMPLE)
    with pytest.raises(RuntimeError, match="put DataSelection before the callback that saves"):
        trainer.fit(SmallLM(), datamodule=small_data())
    assert not (tmp_path / "hasty.ckpt").exists()


def test_what_a_clipping_hook_logs_while_probing_stays_out_of_the_metrics(tmp_path):
    calls = []

    class Logs(SmallLM):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.log("clipped", 1.0)
            calls.append(gradient_clip_val)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    module = Logs()
    mates = small_mates(tmp_path, warmup_rounds=0)
    small_trainer(tmp_path, [mates], max_steps=2, **SIMPLE).fit(module, datamodule=small_data())
    assert len(calls) > 12  # every probe clips as training does, outside of any hook in which log is allowed


@pytest.mark.parametrize("arguments", [{"every_n_steps": 1.5}, {"every_n_steps": 0}, {"warmup_rounds": 0.5}])
def test_steps_and_rounds_are_whole_numbers(arguments):
    with pytest.raises(ValueError, match=rf"expected {next(iter(arguments))}"):
        DataSelection(UniformSelector(), **arguments)


def test_after_a_resume_nothing_is_saved_inside_an_accumulation_window(tmp_path):
    def fit(folder, steps, ckpt_path=None):
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder)
        keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer = small_trainer(folder, [selection, keep], max_steps=steps)
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
        return sorted(path.name for path in folder.glob("step=*"))

    assert fit(tmp_path / "first", 4) == ["step=2.ckpt", "step=4.ckpt"]
    assert fit(tmp_path / "second", 6, tmp_path / "first" / "step=2.ckpt") == ["step=4.ckpt", "step=6.ckpt"]


def test_a_checkpoint_inside_an_accumulation_window_is_warned_of_and_refused(tmp_path):
    class Hasty(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 6:
                trainer.save_checkpoint(tmp_path / "hasty.ckpt")

    def fit(*more, ckpt_path=None):
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
        small_trainer(tmp_path, [selection, *more]).fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)

    with pytest.warns(SelectionWarning, match="step 2 is written inside an accumulation window of 3"):
        fit(Hasty())
    with pytest.raises(MisconfigurationException, match="no whole steps"):
        fit(ckpt_path=tmp_path / "hasty.ckpt")


class Preempted(OneStepInfluence):
    """Gets SIGTERM, as from a scheduler, while it measures the second batch of round 2."""

    batches = 0

    def fit(self, model, round):
        self.round = round.index
        return super().fit(model, round)

    def score(self, model, batch):
        self.batches += self.round == 2
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().score(model, batch)


@pytest.mark.parametrize(("quad", "on_exception"), [(True, True), (False, False)])
def test_a_run_that_is_preempted_in_a_round_stops_at_once_and_continues_to_the_bit(tmp_path, on_exception, quad):
    def fit(folder, estimator, ckpt_path=None, *more):
        folder.mkdir(exist_ok=True)
        pl.seed_everything(1, verbose=False)
        selector = UCBSelector(pulls=4, at_once=1, probes=4, controls=4, arms=2) if quad else regression()
        selection = DataSelection(selector, estimator, every_n_steps=4, dirpath=folder)
        callbacks = [Place(selection), selection, Trace(folder / "trace"), *more]
        data = SelectionDataModule(
            pool=[{**row, "source": str(i % 3)} for i, row in enumerate(rows(POOL, seed=1))],
            groups="source",
            reference=rows(6, seed=2),
            batch_size=BATCH,
            probe_batch_size=4,
        )
        small_trainer(folder, callbacks, **SIMPLE).fit(SmallLM(), datamodule=data, ckpt_path=ckpt_path)
        return (folder / "trace").read_text().splitlines(), selection.run.ledger

    trace, ledger = fit(tmp_path / "whole", OneStepInfluence())
    keep = (
        OnExceptionCheckpoint(tmp_path, "saved")
        if on_exception
        else ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="saved")
    )
    preempted = Preempted()
    with pytest.raises(SystemExit):
        fit(tmp_path / "stopped", preempted, None, keep)
    assert preempted.batches == 2  # no batch more
    resumed, again = fit(tmp_path / "resumed", OneStepInfluence(), tmp_path / "saved.ckpt")
    assert resumed == trace[8 if on_exception else 6 :]
    assert [record.influence for record in again.rounds] == [record.influence for record in ledger.rounds]


class Remembers(SmallLM):
    """Clips by what it has seen, as published recipes do, and keeps it in ways that modules keep things."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.steps, self.average = [], 0, torch.zeros(())
        self.draws = np.random.default_rng(0)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.norms.append(float(norm))
        self.steps += 1
        self.average.mul_(0.9).add_(0.1 * norm)
        limit = sorted(self.norms)[len(self.norms) // 4] * (1 + 0.1 * self.draws.random())
        self.clip_gradients(optimizer, limit, "norm")


class Momentum(torch.optim.Optimizer):
    """Keeps its buffers in an attribute, and another optimizer inside."""

    def __init__(self, parameters) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 1e-2})
        self.buffers, self.inner = {}, torch.optim.AdamW(parameters, lr=1e-3)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                buffer = self.buffers.setdefault(parameter, torch.zeros_like(parameter))
                parameter.add_(buffer.mul_(0.9).add_(parameter.grad), alpha=-1e-2)
        self.inner.step()
        return loss


class Wrapped(SmallLM):
    def configure_optimizers(self):
        return Momentum(self.parameters())


@pytest.mark.parametrize("module", [Remembers, Wrapped])
def test_what_modules_and_optimizers_keep_in_attributes_is_kept_while_measuring(tmp_path, module):
    def fit(folder, selector, estimator):
        folder.mkdir()
        pl.seed_everything(1, verbose=False)
        selection = DataSelection(selector, estimator, every_n_steps=4, warmup_rounds=0, dirpath=folder)
        callbacks = [Place(selection), selection, Trace(folder / "trace")]
        settings = {**SIMPLE, "gradient_clip_val": None}
        small_trainer(folder, callbacks, **settings).fit(module(), datamodule=small_data())
        return (folder / "trace").read_text().splitlines()

    probing = ProbingUniform()
    assert fit(tmp_path / "on", probing, OneStepInfluence()) == fit(tmp_path / "off", UniformSelector(), None)
    assert len(probing.influence) == 4


class Scipy(HashedRidgeRegressor):
    """Returns the numbers of a library as they are."""

    def fit(self, round, ids, influence):
        return {**super().fit(round, ids, influence), "spearman": np.float64(0.3)}

    def state_dict(self):
        return {**super().state_dict(), "note": np.float32(1.0), "history": np.arange(3.0)}

    def load_state_dict(self, state):
        super().load_state_dict({name: value for name, value in state.items() if name not in ("note", "history")})


def test_numbers_of_other_libraries_do_not_make_a_checkpoint_unloadable(tmp_path):
    def fit(steps, ckpt_path=None):
        mates = small_mates(tmp_path, regressor=Scipy())
        trainer = small_trainer(tmp_path, [mates], max_steps=steps)
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
        return trainer

    fit(6).save_checkpoint(tmp_path / "x.ckpt")
    assert fit(8, tmp_path / "x.ckpt").global_step == 8


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([-1, 3]), "ids from -1 to 3; the pool's candidates are 0 to 59"),
        (torch.tensor([3, 10**6]), "ids from 3 to 1000000"),
        (torch.tensor([1, 2], dtype=torch.int32), r"\(m,\) int64 ids, got \(2,\) torch.int32"),
    ],
)
def test_questions_about_what_is_not_in_the_pool_are_refused(tmp_path, ids, message):
    class Wrong(ProbingUniform):
        def propose(self, round):
            return ids

    selection = DataSelection(Wrong(), OneStepInfluence(), every_n_steps=4, warmup_rounds=0, dirpath=tmp_path)
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, [selection]).fit(SmallLM(), datamodule=small_data())


def test_a_second_fit_of_a_bandit_knows_nothing_of_the_first(tmp_path):
    def fit(quad):
        pl.seed_everything(1, verbose=False)
        data = SelectionDataModule(
            pool=[{**row, "source": str(i % 3)} for i, row in enumerate(rows(POOL, seed=1))],
            groups="source",
            reference=rows(6, seed=2),
            batch_size=BATCH,
        )
        small_trainer(tmp_path, [quad], **SIMPLE, max_steps=12).fit(SmallLM(), datamodule=data)
        return [(record.plan, record.influence, record.metrics) for record in quad.run.ledger.rounds]

    def bandit():
        return Quad(
            every_n_steps=3, pulls=3, at_once=1, probes=3, controls=4, arms=2, warmup_rounds=1, dirpath=tmp_path
        )

    twice = bandit()
    fit(twice)
    assert fit(twice) == fit(bandit())


def test_the_time_of_training_outlives_a_resume(tmp_path):
    def fit(folder, steps, **options):
        selection = DataSelection(UniformSelector(), every_n_steps=100, dirpath=folder)
        files = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="x")
        trainer = small_trainer(tmp_path, [selection, files], max_steps=steps, **SIMPLE)
        trainer.fit(SmallLM(), datamodule=small_data(), **options)
        return selection.run.ledger.training_seconds

    spent = fit(tmp_path / "first", 4)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["DataSelection"]["run"]["ledger"]
    assert 0 < saved["training_seconds"] <= spent
    assert fit(tmp_path / "second", 5, ckpt_path=tmp_path / "x.ckpt") > saved["training_seconds"]


def test_a_selector_that_measures_needs_an_estimator_at_once():
    with pytest.raises(
        ValueError, match="RegressionSelector proposes candidates to measure, but there is no estimator"
    ):
        DataSelection(regression())
