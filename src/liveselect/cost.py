"""The cost of selection: seconds and FLOPs of every phase, measured where they are spent."""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from liveselect.functional.flops import Flops, flops_counted, flops_set_aside

Cost = dict[str, dict[str, float]]
"""Amounts by kind (``seconds``, ``flops``, ``uncounted``) and phase; of ``uncounted`` how often something of a name ran
whose FLOPs are not known."""

_MOST_REMEMBERED = 10_000

_remembered: WeakKeyDictionary[nn.Module, dict[Hashable, Flops]] = WeakKeyDictionary()
"""What the pieces of work with a module cost."""


class Progress(Protocol):
    """Shows a person the work of a round."""

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of ``total`` units."""

    def advance(self, amount: int) -> None:
        """Report that ``amount`` more units of the current phase are done."""

    def stop(self) -> None:
        """End the current phase."""


class SilentProgress:
    """A progress display that shows nothing."""

    def start(self, phase: str, total: int, unit: str) -> None:
        """Show nothing."""

    def advance(self, amount: int) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


@dataclass
class CostMeter:
    """Adds up seconds and FLOPs by phase.

    Phases may nest: a second belongs to the innermost open phase only, so the sums never count it twice.

    Attributes:
        seconds: wall-clock seconds of this rank by phase.
        flops: floating point operations of this rank by phase (one multiply-add = 2), as they ran.
        uncounted: by name, how often something ran whose FLOPs are not known.
        progress: the display.
    """

    progress: Progress = field(default_factory=SilentProgress)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    uncounted: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside the block to ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @contextmanager
    def tracked(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Open a phase of ``total`` units here and on the display; yields the function that advances the display."""
        self.progress.start(name, total, unit)
        try:
            with self.phase(name):
                yield self.progress.advance
        finally:
            self.progress.stop()

    def add_flops(self, flops: float) -> None:
        """Charge ``flops`` to the innermost open phase."""
        self.flops[self._open[-1] if self._open else "other"] += flops

    @contextmanager
    def counting(
        self, model: nn.Module | None = None, *work: Hashable, trial: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Charge the FLOPs of the block to the innermost open phase.

        They are counted the first time that this ``work`` (what is done, and the shapes of what it is done with) is
        done with ``model``, and remembered. Without a model they are counted every time, which is for rare work:
        counting passes every operation through Python.

        Where the block runs a backward, give a ``trial`` that does the same and leaves no trace: counting changes how a
        backward rounds, so a result that is counted would differ from one whose cost is remembered.
        """
        known = {} if model is None else _remembered.setdefault(model, {})
        if work not in known and trial is None:
            with flops_counted(model) as flops:
                yield
            _remember(known, work, flops)
        else:
            if work not in known and trial is not None:
                self.learn(model, *work, trial=trial)
            with flops_set_aside():
                yield
        self.charge(known[work])

    @contextmanager
    def forwards(self, *modules: nn.Module) -> Iterator[None]:
        """Charge the FLOPs of all forwards of ``modules`` in the block, whoever calls them, whatever their batches.

        For networks that another library runs, such as an encoder. Inputs of equal shapes are counted once.
        """
        with ExitStack() as stack:
            for module in modules:
                before = vars(module).get("forward")
                module.forward = partial(self._forward, module, module.forward)  # libraries call it by name too
                stack.callback(_put_back, module, before)
            yield

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self.counting(module, "forward", _shapes(arguments), _shapes(named)):
            return forward(*arguments, **named)

    @staticmethod
    def learn(model: nn.Module | None, *work: Hashable, trial: Callable[[], object]) -> Flops:
        """Count the work of a trial, and remember it for :meth:`counting`; random states stay as they are."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        with torch.random.fork_rng(devices=None if cuda else [], device_type="cuda"), flops_counted(model) as flops:
            trial()
        _remember({} if model is None else _remembered.setdefault(model, {}), work, flops)
        return flops

    @staticmethod
    def recall(model: nn.Module, *work: Hashable) -> Flops | None:
        """Return the cost of some work, None where it is not remembered."""
        return _remembered.get(model, {}).get(work)

    def charge(self, flops: Flops) -> None:
        """Charge what was counted to the innermost open phase."""
        self.add_flops(flops.total)
        for name, times in flops.uncounted.items():
            self.uncounted[name] += times

    def spent(self) -> Cost:
        """Return a copy of all amounts of this rank."""
        return {"seconds": dict(self.seconds), "flops": dict(self.flops), "uncounted": dict(self.uncounted)}

    def _charge(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels are asynchronous: without this the next phase would pay for this one
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _shapes(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((name, _shapes(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shapes(each) for each in value)
    return type(value).__qualname__


def _remember(known: dict[Hashable, Flops], work: Hashable, flops: Flops) -> None:
    if len(known) >= _MOST_REMEMBERED:
        known.clear()
    known[work] = flops


@dataclass
class Stopwatch:
    """Adds up the seconds of short pieces of work inside of other work, without waiting for a GPU."""

    _seconds: float = 0.0
    _laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def lap(self, device: torch.device) -> Iterator[None]:
        """Add the time that ``device`` takes for the work started inside the block."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._laps.append((begin, end))
            try:
                yield
            finally:
                end.record()
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began

    def read(self) -> float:
        """Return the seconds so far; waits until a GPU has finished them."""
        laps, self._laps = self._laps, []
        for begin, end in laps:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds


def added(first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]) -> Cost:
    """Return the sum of two costs."""
    total = {kind: dict(phases) for kind, phases in first.items()}
    for kind, phases in second.items():
        of_kind = total.setdefault(kind, {})
        for phase, amount in phases.items():
            of_kind[phase] = of_kind.get(phase, 0.0) + amount
    return total
