"""Driver: runs selection rounds inside a loop that the user writes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from liveselect import distributed
from liveselect.callbacks import DataSelection
from liveselect.callbacks.ahead import Ahead
from liveselect.callbacks.lines import say_price, show_lines
from liveselect.callbacks.progress import round_progress
from liveselect.callbacks.random_state import RandomState, random_state, set_random_state
from liveselect.callbacks.records import round_numbers, say_round
from liveselect.callbacks.session import Session
from liveselect.callbacks.settings import DIGEST, as_text, check_digest, check_saved, damage_reported
from liveselect.functional.several_optimizers import as_one
from liveselect.functional.sharding import ThroughRoot, is_flat
from liveselect.grammar import CandidateSource, LiveModel, State
from liveselect.looking import only_looking
from liveselect.parts import digest_of
from liveselect.plan import Plan

STATE_VERSION = 1
"""Version of the state of a driver."""


class Driver:
    """Chooses the training data of a loop that is not Lightning's, with the same rounds, for the same candidates.

    The loop says where its optimizer steps begin and end, and trains on the batches that it is given::

        for step in range(driver.global_step, 400):
            for batch in driver.before_step():
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.after_step()

    The first :meth:`before_step` rehearses and makes the first plan, the :meth:`after_step` of a round's last step the
    next one; a checkpoint that is written after :meth:`after_step` resumes to the bit. All ranks call both.

    Args:
        selection: who measures, who chooses and how often: a preset such as
            :class:`~liveselect.callbacks.LiveSelection`, or a :class:`~liveselect.callbacks.DataSelection`.
        source: the data, a :class:`~liveselect.datamodules.SelectionDataModule` for example. It is set up here.
        model: the model; wrappers of DDP and Fabric are looked through.
        optimizer: its optimizer, or several that step together.
        max_steps: optimizer steps of the training; None where they are not known.
        accumulate: batches of an optimizer step of each rank, over which gradients are accumulated.
        clip_gradients: clips the ``.grad`` of the given parameters in place, as the loop does before a step.
        autocast: opens the precision context of the loop's forwards, such as ``fabric.autocast``.
        log: is given the numbers of a round and its step, ``fabric.log_dict`` for example; called on rank 0.

    Attributes:
        global_step: optimizer steps done.
        session: the run, its data and its records.
        loader: the source's loader of training batches, which :meth:`next_batch` walks.

    Raises:
        ValueError: the selection needs what only Lightning's hooks can give.
    """

    def __init__(
        self,
        selection: DataSelection,
        source: CandidateSource,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        max_steps: int | None = None,
        accumulate: int = 1,
        clip_gradients: Callable[[list[nn.Parameter]], object] | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        log: Callable[[Mapping[str, float], int], object] | None = None,
    ) -> None:
        _check(selection, source, max_steps, accumulate)
        show_lines()
        self.global_step = 0
        self.world_size = distributed.world_size()
        self.accumulate_grad_batches = accumulate
        self.estimated_stepping_batches = math.inf if max_steps is None else max_steps
        self.received_sigterm = False
        self.loader = source.begin_loop(accumulate)
        self._walk: Iterator[object] = iter(())
        self._batches: list[Any] = []  # of the step under way
        self._selection, self._ahead, self._log = selection, Ahead(selection.ahead.pace), log
        source.pool.uses.zero_()  # what another run has used is unused in this one
        self.session = Session(selection.selector, selection.estimator, selection.about(), source)
        self.session.hold_out(selection.mixture_sample)
        self.session.write_to(
            selection.dirpath or Path("selection"), selection.dirpath is None, selection.most_rejected
        )
        module, loss_fn = _unwrapped(model), selection.loss_fn
        self._model = LiveModel(
            module=module,
            optimizer=as_one(
                [_inner(each) for each in ([optimizer] if isinstance(optimizer, Optimizer) else optimizer)]
            ),
            loss_fn=ThroughRoot(loss_fn) if is_flat(module) else loss_fn,
            global_batch=self.session.global_batch(self),
            clip_gradients=lambda parameters: _call(clip_gradients, parameters),
            autocast=autocast,
        )
        self._begun = False
        self._random_states: list[RandomState] = []  # of a checkpoint, until training begins

    @property
    def plan(self) -> Plan | None:
        """What is being trained on, None before the first step."""
        return self.session.run.plan

    def before_step(self) -> list[Any]:
        """Return this rank's batches of the step to come, tensors on the model's device; a collective."""
        self.begin()
        if self._batches:
            raise RuntimeError("before_step() was called twice: call after_step() after each optimizer step")
        return [self.next_batch() for _ in range(self.accumulate_grad_batches)]

    def next_batch(self) -> Any:
        """Return the next batch of the step under way, for loops that fetch them one by one."""
        if len(self._batches) == self.accumulate_grad_batches:
            raise RuntimeError(
                f"{len(self._batches)} batches were served for step {self.global_step}, and one more is asked for: "
                "call after_step() after each optimizer step, and pass accumulate, the batches of one"
            )
        batch = next(self._walk, None)
        if batch is None:  # an epoch of the loader is over
            self._walk = iter(self.loader)
            batch = next(self._walk)
        if isinstance(batch, Mapping):
            batch = self._model.to_device(batch)
            self.session.begin_batch(batch)
        self._batches.append(batch)
        return batch

    def after_step(self) -> None:
        """Count the step, and at the end of a round make the next plan; a collective.

        Call it when the step is complete, the learning rate's too, and before a checkpoint of the step is written.
        """
        session, served = self.session, len(self._batches)
        if served != self.accumulate_grad_batches:
            raise RuntimeError(
                f"expected a step of {self.accumulate_grad_batches} batches of before_step(), and {served} were served"
            )
        self.global_step += 1
        for batch in self._batches:
            session.count_batch(self, batch)
        self._batches = []
        ends = self.global_step >= self.estimated_stepping_batches
        if not session.plan.exhausted:
            self._ahead.after_step(session, self)
        session.end_step()
        if ends:
            self.close()
        elif session.plan.exhausted:
            session.stop_training()
            self._select()
            session.clock.start()

    def evaluated(self, metrics: Mapping[str, float], seconds: float = 0.0) -> None:
        """Note what a validation has found beside what was spent so far, with the loss on what is held out.

        The ``seconds`` that it took are no training.
        """
        session = self.session
        session.clock.discount(seconds)
        session.stop_training()
        with session.measuring():
            mixture = session.mixture_loss()
        found = dict(metrics) if mixture is None else {**metrics, "mixture_loss": mixture}
        session.run.ledger.evaluate(self.global_step, found)
        session.write_ledger()
        session.clock.start()

    def close(self) -> None:
        """Write the final ledger and let go of its folder; the last step of ``max_steps`` does it by itself."""
        session = self.session
        session.stop_training()
        session.run.ledger.finished = True
        session.write_ledger()
        session.release()

    def state_dict(self) -> dict[str, object]:
        """Return the state as tensors and builtins, the random states of all ranks too; a collective."""
        if self._batches:
            raise RuntimeError("a state inside of an optimizer step could not be resumed: save after after_step()")
        session = self.session
        session.charge_training()
        state = {
            "version": STATE_VERSION,
            "seed": self._selection.seed,
            "settings": as_text(self._settings()),
            "step": self.global_step,
            "global_batch": session.batch_of_round(),
            "run": session.run.state_dict(),
            "random_states": self._random_states or distributed.gather_objects(random_state()),
        }
        return {**state, DIGEST: digest_of(state)}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned, before the first :meth:`before_step`.

        Raises:
            ValueError: it is of another version, or belongs to another pool or other parts.
            RuntimeError: training has begun.
        """
        if self._begun:
            raise RuntimeError("a state was loaded after before_step(): load it before training begins")
        keys = {"step", "global_batch", "run", "random_states"}
        changed = check_saved(state, STATE_VERSION, self._selection.seed, as_text(self._settings()), keys)
        session = self.session
        with damage_reported(state):
            session.run.load_state_dict(state["run"])
        check_digest(state)
        if changed:
            session.run.ahead = None
        self.global_step, self._random_states = state["step"], state["random_states"]
        session.resumed, session.saved_batch = True, state["global_batch"]

    def begin(self) -> None:
        """Rehearse, and make the first plan or go on with that of a state; nothing when that was done."""
        if self._begun:
            return
        session, run = self.session, self.session.run
        run.source.check_model(self._model.module)
        session.begin_loop(self, self._model)
        self._begun = True
        with only_looking("the settings of selection could not be recorded"):
            session.describe({**self._settings(), **self._facts()})
        with session.measuring():
            run.prepare()
            with session.charged("rehearsal"):
                price = session.rehearse(self)
        if price is not None:
            say_price(price, self._selection.every_n_steps, self._ahead.pace.max_overhead)
        self._ahead.begin_round(session)
        if run.plan is None or run.plan.exhausted:
            self._select()
        else:
            run.source.follow(run.plan)
        if distributed.rank() < len(self._random_states):
            set_random_state(self._random_states[distributed.rank()])
        self._random_states = []
        session.clock.start()

    def _select(self) -> None:
        """Run a round and publish its plan."""
        session, run = self.session, self.session.run
        began = time.perf_counter()
        before = sum(run.preparing.seconds.values())
        before += 0.0 if run.ahead is None else sum(run.ahead.meter.seconds.values())
        budget = session.budget(self, self.global_step)
        round = session.open_round(self, budget)
        progress = round_progress(f"round {run.next_round} (step {self.global_step})")
        with session.measuring():
            plan = self._ahead.finish(session, round, budget, progress)
        run.source.follow(plan)
        if self._log is not None and distributed.rank() == 0:
            with only_looking("the numbers of a round could not be logged"):
                numbers = {f"selection/{name}": value for name, value in round_numbers(run.ledger).items()}
                self._log(numbers, self.global_step)
        say_round(run.ledger)
        counted = sum(run.ledger.rounds[-1].seconds.values()) - before
        session.charge("bookkeeping", max(0.0, time.perf_counter() - began - counted))
        session.write_ledger()
        self._ahead.begin_round(session)

    def _settings(self) -> dict[str, object]:
        return self._selection.settings_with(self.session.run.source.reference_fingerprint)

    def _facts(self) -> dict[str, object]:
        source, module = self.session.run.source, self._model.module
        return {
            "pool": source.pool.fingerprint,
            "pool.candidates": source.pool.size,
            "reference": source.reference_fingerprint,
            "batch_size": source.batch_size,
            "ranks": self.world_size,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "global_batch": self._model.global_batch,
            "model": type(module).__qualname__,
            "model.parameters": sum(parameter.numel() for parameter in module.parameters()),
            "optimizer": type(self._model.optimizer).__qualname__,
        }


def _check(selection: object, source: object, max_steps: int | None, accumulate: int) -> None:
    if not isinstance(selection, DataSelection):
        raise TypeError(
            f"expected selection to be a preset such as LiveSelection(...), or DataSelection(...), got {selection!r}"
        )
    if not isinstance(source, CandidateSource):
        raise TypeError(
            f"expected source to be a SelectionDataModule or another CandidateSource, got {type(source).__name__}"
        )
    if accumulate < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"expected accumulate and max_steps of at least 1, got {accumulate} and {max_steps}")
    for name, asked in {"overhear": selection.overhearing.steps, "verdict": selection.verdict}.items():
        if asked:
            raise ValueError(
                f"{type(selection).__name__} has {name}={asked}, which needs the hooks of a Lightning Trainer: leave "
                f"it out ({name}={'None' if name == 'verdict' else 'False or 0'})"
            )


def _inner(optimizer: Optimizer) -> Optimizer:
    inner: object = optimizer.optimizer if isinstance(optimizer, _FabricOptimizer) else optimizer
    return inner if isinstance(inner, Optimizer) else optimizer


def _call(function: Callable[[list[nn.Parameter]], object] | None, parameters: list[nn.Parameter]) -> None:
    if function is not None:
        function(parameters)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of the wrappers of Fabric, DDP and torch.compile."""
    if isinstance(model, (_FabricModule, DistributedDataParallel)):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # of a compiled module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model
