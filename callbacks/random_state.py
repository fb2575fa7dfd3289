"""The global random states of a process, which belong to the user's model and data: kept in checkpoints, put back."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from liveselect import distributed
from liveselect.grammar import SelectionWarning

RandomState = dict[str, Any]
"""The random states of one process, as tensors and builtins."""


def random_state() -> RandomState:
    """Return the random states of this process as tensors and builtins (checkpoints load with weights_only)."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the state of the user's draws
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: RandomState) -> None:
    """Put back what :func:`random_state` returned."""
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    random.setstate((version, tuple(words), gauss))


class RandomStates:
    """The random states with which the next batch begins: as the last one left them, and after a resume no others.

    Between two batches hooks of other callbacks, of the module and of loggers may draw. A run that is resumed from a
    checkpoint does not run those that came after it, so what they drew is put back; after a batch without a checkpoint,
    nothing is. Data that a dataset draws has random states of its own.
    """

    def __init__(self) -> None:
        self._next: RandomState | None = None  # with which the batch begins that comes next, or is under way
        self._loaded: list[RandomState] | None = None
        self._begun = self._saved = self._warned = False

    def begin_run(self) -> None:
        """Forget the batches of an earlier fit, but not what a checkpoint has brought."""
        self._next, self._begun, self._saved = None, False, False

    def begin_batch(self) -> None:
        """Put back what has to be; call it before the batch is fetched, because hooks draw while it is moved, too."""
        if self._loaded is not None:
            states, self._loaded = self._loaded, None
            if distributed.rank() < len(states):
                set_random_state(states[distributed.rank()])
        elif self._saved:
            self._take_back()
        self._next, self._begun, self._saved = random_state(), True, False

    def ensure_begun(self) -> None:
        """Begin the batch that is there already, unless that was done before."""
        if not self._begun:
            self.begin_batch()

    def set_as_next_batch(self) -> None:
        """Set the random states to those with which the next batch will begin; the caller puts back what there was."""
        loaded = self._loaded or []
        state = loaded[distributed.rank()] if distributed.rank() < len(loaded) else self._next
        if state is not None:
            set_random_state(state)

    def end_batch(self) -> None:
        """Note what the batch has left."""
        self._next, self._begun, self._saved = random_state(), False, False

    def put_back(self) -> None:
        """Put back what the last batch has left; nothing before the first one."""
        if self._next is not None and self._loaded is None:
            set_random_state(self._next)

    def state_dict(self) -> list[RandomState]:
        """Return the states of all ranks with which the batch begins that a resumed run trains first; a collective."""
        self._saved = True
        loaded = self._loaded or []
        if distributed.rank() < len(loaded):
            own = loaded[distributed.rank()]
        else:
            own = random_state() if self._next is None else self._next
            self._next = own
        return distributed.gather_objects(own)

    def load_state_dict(self, states: list[RandomState]) -> None:
        """Put these back when the next batch begins."""
        self._loaded = states

    def _take_back(self) -> None:
        if self._next is None or _equal(self._next, random_state()):
            return
        set_random_state(self._next)
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "a hook drew random numbers between a checkpoint and the next batch. A run that is resumed from it "
                "does not draw them, so the random states are put back to those in the checkpoint, here and after "
                "every checkpoint to come: let hooks draw from a generator of their own",
                category=SelectionWarning,
            )


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list) and any(isinstance(each, torch.Tensor) for each in one):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
