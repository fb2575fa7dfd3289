"""Arms: the groups of a pool, or its cells, each in a seeded order of its own."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from liveselect.pool import CandidatePool
from liveselect.seeding import generator_for
from liveselect.selectors.cells import Cells


@dataclass(frozen=True)
class Arms:
    """The members of every arm, in the order in which they are probed and trained on.

    The orders follow from a seed and the arms alone, so a resumed run finds the same ones and no checkpoint holds
    them.

    Attributes:
        starts: ``(K + 1,)`` int64, where each arm begins in ``members``.
        members: ``(n,)`` all candidates, arm after arm; int32 where that suffices, for there may be a billion.
        codes: ``(n,)`` the arm of each candidate; where arms are groups, those of the pool themselves.
        fingerprint: names the assignment of candidates to arms.
    """

    starts: Tensor
    members: Tensor
    codes: Tensor
    fingerprint: str

    @classmethod
    def of(cls, pool: CandidatePool, seed: int) -> "Arms":
        """Return the groups of the pool as arms.

        Raises:
            ValueError: the pool has a single group.
        """
        count = len(pool.group_names)
        if pool.groups is None or count < 2:
            raise ValueError(
                "the arms of a bandit are the groups of the pool, and this pool has a single one: cluster it "
                "(`liveselect cluster POOL`) and pass groups='clusters' to the datamodule, or name several sources"
            )
        digest = hashlib.blake2b(pool.groups.numpy().tobytes(), digest_size=8).hexdigest()
        return cls._in_order(pool.groups, count, seed, f"{count}/{digest}")

    @classmethod
    def of_cells(cls, cells: Cells, seed: int) -> "Arms":
        """Return the cells of a pool as arms."""
        return cls._in_order(cells.codes, len(cells), seed, cells.fingerprint)

    @classmethod
    def _in_order(cls, codes: Tensor, count: int, seed: int, fingerprint: str) -> "Arms":
        members = codes.argsort(stable=True)
        if len(codes) < 2**31:
            members = members.int()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), codes.bincount(minlength=count).cumsum(0)])
        for arm in range(count):
            part = members[int(starts[arm]) : int(starts[arm + 1])]
            order = torch.randperm(len(part), generator=generator_for(seed, 0, f"order of arm {arm}"))
            members[int(starts[arm]) : int(starts[arm + 1])] = part[order]
        return cls(starts, members, codes, fingerprint)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Tensor:
        """How many candidates belong to each arm, ``(K,)`` int64."""
        return self.starts.diff()

    def members_of(self, arm: int) -> Tensor:
        """Return the candidates of an arm in its order."""
        return self.members[int(self.starts[arm]) : int(self.starts[arm + 1])].long()

    def first_members(self) -> Tensor:
        """Return the first candidate of each arm, ``(K,)``; of an empty arm, any."""
        return self.members[self.starts[:-1].clamp(max=len(self.members) - 1)].long()


class OpenArms:
    """What a round may take from each arm.

    Args:
        arms: all arms.
        candidates: ``(n,)`` ids that may be chosen in the round.
        uses: ``(size,)`` how often each candidate of the pool was trained on.

    Attributes:
        arms: all arms.
        room: ``(K,)`` int64, candidates left in each arm; an arm without any is retired.
    """

    def __init__(self, arms: Arms, candidates: Tensor, uses: Tensor) -> None:
        self.arms = arms
        self._uses = uses
        self._is_candidate = torch.zeros(len(arms.codes), dtype=torch.bool)
        self._is_candidate[candidates] = True
        self.room = arms.codes[candidates].bincount(minlength=len(arms))

    def first(self, arm: int, count: int) -> Tensor:
        """Return the first ``count`` candidates of an arm, those used less often before others: what is trained on."""
        members = self.arms.members_of(arm)
        members = members[self._is_candidate[members]]
        return members[self._uses[members].argsort(stable=True)][:count]

    def next_probes(self, arm: int, count: int, cursor: int) -> tuple[Tensor, int]:
        """Return up to ``count`` candidates from ``cursor`` on in the arm's order, and the cursor behind them.

        What was probed lies in front of what training takes next, so a probe is seldom wasted. At the end of the order
        the cursor goes back to the beginning, where earlier probes may still wait to be trained on.
        """
        members = self.arms.members_of(arm)
        (positions,) = self._is_candidate[members].nonzero(as_tuple=True)
        ahead = int(torch.searchsorted(positions, cursor))
        taken = torch.cat([positions[ahead:], positions[:ahead]])[:count]
        return members[taken], (int(taken[-1]) + 1) % len(members) if len(taken) else cursor
