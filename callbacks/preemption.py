"""Signals wait until a checkpoint would be right: nothing displaced, and every optimizer step counted."""

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy

from liveselect import distributed

log = logging.getLogger("liveselect")

Handler: TypeAlias = Callable[[int, FrameType | None], object]

HELD = frozenset(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCONT", "SIGXCPU", "SIGTSTP")
    if hasattr(signal, name)
)
"""Signals that ask a job to save, to stop, or to be requeued; others, such as alarms, are left alone."""

_OF_EACH_RANK = frozenset((signal.SIGTERM, signal.SIGINT))  # Lightning makes ranks agree about these itself


class SignalGate:
    """Holds signals back where their handlers would save or end a run that is not in order.

    Handlers run at any line. Lightning's for SLURM, submitit's and users' own write a checkpoint there: inside a
    measurement it would hold displaced weights, and between an optimizer step and the count of its batch it would train
    the step again. While the gate is closed a signal is noted; when it opens, the handler runs. Nothing is lost, and
    nothing is held for longer than a batch, or in a round on several ranks, the round. A second SIGINT is not held.

    Only handlers that are set when :meth:`install` is called are held; a process without any is left as it is.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._pending: list[int] = []
        self._closed = 0
        self._process = os.getpid()
        self._guarded: list[tuple[pl.Trainer | Strategy, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._measuring_thread: int | None = None
        self._savers: list[int] = []  # threads that write a checkpoint now

    def install(self, trainer: pl.Trainer | None = None, *others: int) -> None:
        """Stand before the handlers of :data:`HELD` and of ``others``; they are put back by :meth:`remove`.

        Every checkpoint that ``trainer`` writes, also one of weights only, waits until nothing is displaced.
        """
        self.remove()
        if trainer is not None:
            self._guard(trainer, trainer.strategy)  # the first also gathers what it saves
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers, and only it runs them
        self._process = os.getpid()
        for number in HELD | set(others):
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._arrive)

    def remove(self) -> None:
        """Put the handlers back, but for those that were replaced since.

        What still waits, after a failure in the middle of a step, is reported: its handler could only save a run that
        is not in order.
        """
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._arrive:
                signal.signal(number, handler)
        for number in self._pending:
            log.warning("the run ended before %s could be handled", signal.Signals(number).name)
        self._handlers, self._pending, self._closed = {}, [], 0
        for owner, own in self._guarded:
            del owner.save_checkpoint
            vars(owner).update(own)
        self._guarded = []

    def _guard(self, *owners: pl.Trainer | Strategy) -> None:
        for owner in owners:
            own = {name: value for name, value in vars(owner).items() if name == "save_checkpoint"}  # a user's
            self._guarded.append((owner, own))
            owner.save_checkpoint = self._in_order(owner.save_checkpoint)  # type: ignore[method-assign]

    def _in_order(self, save: Callable[..., None]) -> Callable[..., None]:
        """Return a way to save that begins when nothing is displaced, and while which nothing is."""

        @functools.wraps(save)
        def save_in_order(*arguments: Any, **settings: Any) -> None:
            own = threading.get_ident()
            with self._changed:
                self._wait()
                self._savers.append(own)
            try:
                save(*arguments, **settings)
            finally:
                with self._changed:
                    self._savers.remove(own)
                    self._changed.notify_all()

        return save_in_order

    def hold(self) -> None:
        """Hold signals until :meth:`release`."""
        self._closed += 1

    def release(self) -> None:
        """Run the handlers of what has come meanwhile, unless the gate was closed twice; a collective on ranks.

        Ranks agree about signals whose handlers save: saving is a collective.
        """
        self._closed = max(0, self._closed - 1)
        if self._closed:
            return
        if self._handlers.keys() - _OF_EACH_RANK:
            self._agree(_OF_EACH_RANK)
        self.deliver()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold signals in this block, in which weights may be displaced; all ranks get what one of them got."""
        self.hold()
        outer = self._measuring_thread
        self._displace(threading.get_ident())
        try:
            yield
        finally:
            self._displace(outer)
            self._closed = max(0, self._closed - 1)
        self._agree(frozenset())
        if not self._closed:
            self.deliver()

    @property
    def waits(self) -> bool:
        """Whether a signal waits."""
        return bool(self._pending)

    @property
    def waits_to_end(self) -> bool:
        """Whether a signal waits that ends a run."""
        return not _OF_EACH_RANK.isdisjoint(self._pending)

    def let_through(self) -> None:
        """Run the handlers of what has come; called inside of :meth:`measuring` where nothing is displaced."""
        if not self._pending:
            return
        thread = self._measuring_thread
        self._displace(None)
        try:
            self.deliver()
        finally:
            self._displace(thread)

    def wait_until_in_order(self) -> None:
        """Return when nothing is displaced; called before a checkpoint is written.

        Raises:
            RuntimeError: it is called by what measures, such as a loss function, which cannot wait for itself.
        """
        with self._changed:
            self._wait()

    def _displace(self, thread: int | None) -> None:
        """Note which thread measures from now on, None for none; not before the checkpoints of others are written."""
        with self._changed:
            if thread is not None:
                self._changed.wait_for(lambda: all(saver == thread for saver in self._savers))
            self._measuring_thread = thread
            self._changed.notify_all()

    def _wait(self) -> None:
        if self._measuring_thread == threading.get_ident():
            raise RuntimeError(
                "a checkpoint was to be written while influence is measured, when weights are displaced: save after "
                "an optimizer step, and not from the loss function or from hooks of the model"
            )
        self._changed.wait_for(lambda: self._measuring_thread is None)

    def deliver(self) -> None:
        """Run the handlers of the signals that wait."""
        while self._pending:
            number = self._pending.pop(0)
            if number in self._handlers:
                self._handlers[number](number, None)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        insists = number == signal.SIGINT and number in self._pending
        if not self._closed or os.getpid() != self._process or insists:  # a forked child has no gate to open
            self._handlers[number](number, frame)
        elif number not in self._pending:
            self._pending.append(number)

    def _agree(self, apart_from: frozenset[int]) -> None:
        """Let all ranks wait for what one of them waits for."""
        if distributed.world_size() == 1:
            return
        own = [number for number in self._pending if number in apart_from]
        shared = {n for pending in distributed.gather_objects(self._pending) for n in pending if n not in apart_from}
        self._pending = [*own, *sorted(shared)]
