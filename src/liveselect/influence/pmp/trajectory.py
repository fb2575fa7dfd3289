"""A stretch of training that can be walked backwards in bounded memory."""

from collections.abc import Callable, Iterator

import torch

from liveselect.functional.adjoint import Dynamics, State, Transition
from liveselect.functional.updates import Vector
from liveselect.influence.pmp.vault import Vault, to_device

GradientAt = Callable[[State, int], Vector]


class Trajectory:
    """Unrolls training forwards once, and hands out its transitions from the last to the first.

    States are kept every ``interval`` steps, and the steps between two of them are taken again on the way back, with
    the same result to the last bit where the gradients are reproducible. The last stretch is never taken twice: an
    ``interval`` of ``steps`` holds all states and repeats nothing; one of about the square root of ``steps`` holds the
    fewest, for almost one more forward pass.

    Args:
        dynamics: of the training.
        start: the state before the first step.
        gradient_at: the gradient of a step's loss at a state.
        steps: T.
        interval: steps between two kept states.
        vault: where the states are kept.
        device: where the training runs.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        start: State,
        gradient_at: GradientAt,
        steps: int,
        interval: int,
        vault: Vault,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self._dynamics, self._start, self._gradient_at = dynamics, start, gradient_at
        self._interval, self._vault, self._device = interval, vault, device
        self._last: list[Transition] = []

    def forward(self, advance: Callable[[int], None] = lambda steps: None) -> State:
        """Unroll all steps, or those after the last state that a durable vault still holds; return the final state.

        Args:
            advance: called with the number of steps done, every few steps.
        """
        begin = self.kept[-1] if self.kept else 0
        advance(begin)
        state = self._state_at(begin)
        while True:
            self._last = self._stretch(state, begin)
            state = self._last[-1].after
            advance(len(self._last))
            begin += self._interval
            if begin >= self.steps:
                return state
            self._last = []
            self._vault.put(self._name(begin), vars(state))

    @property
    def kept(self) -> list[int]:
        """The steps whose states the vault holds."""
        return [begin for begin in range(0, self.steps, self._interval) if self._name(begin) in self._vault]

    def backward(self, before: int) -> Iterator[tuple[int, list[Transition]]]:
        """Yield ``(begin, transitions)`` of each stretch, latest first; its transitions in their order.

        Take transitions off the end of the list as they are used: two stretches need then not be held at once.

        Args:
            before: walk only steps below this one; it must be where a stretch ends.
        """
        for begin in reversed(range(0, before, self._interval)):
            stretch = self._last if begin + self._interval >= self.steps and self._last else None
            self._last = []
            yield begin, stretch or self._stretch(self._state_at(begin), begin)

    def forget(self) -> None:
        """Drop the kept states."""
        self._last = []
        for begin in self.kept:
            self._vault.drop(self._name(begin))

    def _stretch(self, state: State, begin: int) -> list[Transition]:
        transitions = []
        for index in range(begin, min(begin + self._interval, self.steps)):
            gradient = self._gradient_at(state, index)
            after = self._dynamics.step(state, gradient, index)
            transitions.append(Transition(index, state, gradient, after))
            state = after
        return transitions

    def _state_at(self, begin: int) -> State:
        return self._start if begin == 0 else State(**to_device(self._vault.get(self._name(begin)), self._device))

    @staticmethod
    def _name(begin: int) -> str:
        return f"state-{begin}"
