"""Replay: train on recorded plans, without measuring anything."""

from pathlib import Path

import torch
from torch import Tensor

from liveselect.decisions import RecordedPlan, find_decisions, lacking_rounds, read_about, read_plan, rounds_in
from liveselect.grammar import Round, Selection, Selector, State
from liveselect.pool import CandidatePool


class ReplaySelector(Selector):
    """Follows the plans that another run recorded, in their order; measures nothing.

    The recorded plans are one long list of candidates, from which every round takes the next ones: with rounds of the
    recorded sizes each plan comes back as it was, for any model; with others the order stays the same and only the
    borders move. The plans are read when they are first needed, 8 bytes for each choice.

    Args:
        run: folder of the run whose plans are followed, or its ledger.
    """

    engine_orders = False

    def __init__(self, run: str | Path) -> None:
        self.run = run
        self._plans: list[RecordedPlan] | None = None
        self._ids = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def check(self, round: Round, budget: int) -> None:
        """Read the plans, and see that they are of this pool.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, or of another pool.
        """
        self._read(round.pool)

    def _read(self, pool: CandidatePool) -> None:
        if self._plans is not None:
            return
        folder = find_decisions(self.run)
        plans = [read_plan(path) for path in rounds_in(folder).values()]
        if [plan.round for plan in plans] != list(range(len(plans))):
            raise ValueError(f"{folder} cannot be followed from the start, it lacks {lacking_rounds(folder)}")
        if pool.fingerprint != plans[0].pool:
            raise ValueError(
                f"the plans in {folder} are of the pool {plans[0].pool!r}, this run has the pool {pool.fingerprint!r}: "
                "their ids would mean other texts. Point the run at the pool that was recorded"
            )
        self._plans, self._ids = plans, torch.cat([plan.ids for plan in plans])

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return the recorded choices of a round, ``(size,)`` bool, where they are not the least used of the pool.

        The recorded run may have passed over candidates that have no score, and come back to others.
        """
        self._read(pool)
        planned = self._ids[self._position : self._position + budget]
        if len(planned.unique()) < budget:  # reported when it is chosen
            return None
        if int(pool.uses[planned].max()) <= int(pool.uses[pool.available(budget)].max()):
            return None
        recorded = torch.zeros(pool.size, dtype=torch.bool)
        recorded[planned] = True
        return recorded

    def check_length(self, needed: int) -> None:
        """Raise ValueError when fewer than ``needed`` recorded candidates are left."""
        if self._position + needed > len(self._ids):
            raise ValueError(
                f"{self.run} recorded {len(self._ids)} choices, and this run needs {self._position + needed}: train "
                "for fewer steps (max_steps), or with a smaller global batch"
            )

    def select(self, round: Round, budget: int) -> Selection:
        """Return the next ``budget`` recorded candidates, in their order.

        Raises:
            FileNotFoundError: there are no plans.
            ValueError: they are damaged, of another pool, or used up, or a round would hold a candidate twice.
        """
        self._read(round.pool)
        if round.index == 0:  # another run of the same selector
            self._position = 0
        ids = self._ids[self._position : self._position + budget].clone()
        if len(ids) < budget:
            self.check_length(budget)
        if len(ids.unique()) < budget:
            raise ValueError(
                f"round {round.index} would hold {budget - len(ids.unique())} candidates twice, because its border "
                f"is none of the recorded ones: choose every_n_steps so that a round takes {self._sizes()} candidates"
            )
        borders = [0, *torch.tensor([len(plan.ids) for plan in self._plans or []]).cumsum(0).tolist()]
        # the last round may end with training inside the last plan, as the recorded one may have
        fits = self._position in borders and (self._position + budget in borders or self._position == borders[-2])
        self._position += budget
        notes = (
            () if fits else (f"the recorded plans are cut otherwise here: {self._sizes()} candidates a round there",)
        )
        return Selection(ids, notes=notes, reasons={"recorded plan": ids})

    def state_dict(self) -> State:
        """Return how many of the recorded choices were taken."""
        return {"position": self._position}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._position = state["position"]

    def _sizes(self) -> int:
        return len(self._plans[0].ids) if self._plans else 0


def recorded_interval(run: str | Path) -> int:
    """Return the optimizer steps of a recorded round.

    Raises:
        FileNotFoundError: there are no plans.
        ValueError: there is a single round, whose length nobody has recorded.
    """
    folder = find_decisions(run)
    files = list(rounds_in(folder).values())
    if len(files) < 2:
        raise ValueError(f"{folder} holds a single round, so its number of steps is not known: pass every_n_steps")
    first, second = (int(read_about(path)["step"]) for path in files[:2])
    return second - first
