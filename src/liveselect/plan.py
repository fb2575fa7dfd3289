"""The plan: the candidates chosen in a round, in training order, and the number trained on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Plan:
    """The ids to train on until the next round.

    Attributes:
        round: index of the round that made the plan.
        ids: ``(k,)`` int64, in training order.
        cursor: number of ids trained on, over all ranks. It is the only truth about progress through the data.
    """

    round: int
    ids: Tensor
    cursor: int = 0

    @property
    def exhausted(self) -> bool:
        """Whether every id was trained on."""
        return self.cursor >= len(self.ids)

    @property
    def fingerprint(self) -> str:
        """A short hash of the ids and their order."""
        return hashlib.blake2b(self.ids.numpy().tobytes(), digest_size=8).hexdigest()

    def remaining(self, rank: int, world_size: int, batch_size: int) -> Tensor:
        """Return the remaining ids of one rank, ``(steps, batch_size)``.

        The global batch is cut into contiguous parts, rank 0 first, so R ranks with batches of B rows see the same
        global batches as one rank with batches of B * R rows, and a run may continue on another number of ranks.
        """
        todo = self.ids[self.cursor :]
        per_step = world_size * batch_size
        if len(todo) % per_step:
            raise ValueError(
                f"{len(todo)} ids remain in the plan of round {self.round}, which {world_size} ranks with batches of "
                f"{batch_size} cannot share evenly: continue with a number of ranks and a batch size whose product "
                f"divides {len(todo)}"
            )
        return todo.view(-1, world_size, batch_size)[:, rank]

    def advance(self, examples: int) -> None:
        """Record that ``examples`` more ids were trained on, all ranks together."""
        if self.cursor + examples > len(self.ids):
            raise ValueError(
                f"the plan of round {self.round} holds {len(self.ids)} ids, {self.cursor} of them consumed: "
                f"cannot consume {examples} more"
            )
        self.cursor += examples

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as tensors and builtins."""
        return {"round": self.round, "ids": self.ids.clone(), "cursor": self.cursor}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Plan":
        """Return the plan with this state."""
        return cls(round=state["round"], ids=state["ids"].to(torch.int64), cursor=state["cursor"])
