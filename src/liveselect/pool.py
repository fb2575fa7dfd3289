"""The pool: the candidates, their groups, and their uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupGeometry:
    """Where the groups of a pool lie in the space that they were made in.

    Attributes:
        starts: ``(G + 1,)`` int64; group i's neighbours stand at ``starts[i]:starts[i + 1]`` of ``columns``.
        columns: ``(nnz,)`` int64 groups.
        distances: ``(nnz,)`` float32, their cosine distances.
        reach: neighbours farther away than this are not listed.
        typical: ``(G,)`` int64, the candidate nearest to each group's centre.
        offsets: ``(size,)`` floating point, the distance of each candidate to its group's centre.
    """

    starts: Tensor
    columns: Tensor
    distances: Tensor
    reach: float
    typical: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Grouping:
    """Another way in which candidates belong together than the groups that selection chooses by.

    Attributes:
        codes: ``(size,)`` integer, which one each candidate belongs to.
        names: a name for each code.
    """

    codes: Tensor
    names: tuple[str, ...]


class CandidatePool:
    """All candidates of a run, addressed by the row ids ``0 .. size - 1``.

    Args:
        size: number of candidates.
        fingerprint: identifies the content; a resumed run refuses a pool whose fingerprint changed.
        groups: ``(size,)`` integer group (source, cluster) of every candidate, or None for a single group.
        group_names: a name for each group code.
        geometry: which groups are near each other, where that is known.
        groups_fingerprint: identifies the groups where ``fingerprint`` does not; a resumed run refuses others.
        sources_of: returns where candidates come from, when it is first needed; None where the groups say it, or it is
            not known.
        documents_of: returns the document of every candidate, ``(size,)`` int64, when it is first needed; None where
            documents are not known.

    Attributes:
        uses: ``(size,)`` int32, the number of plans that held each candidate.
    """

    def __init__(
        self,
        size: int,
        fingerprint: str,
        groups: Tensor | None = None,
        group_names: Sequence[str] | None = None,
        geometry: GroupGeometry | None = None,
        groups_fingerprint: str | None = None,
        sources_of: Callable[[], Grouping] | None = None,
        documents_of: Callable[[], Tensor] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"expected a pool of at least one candidate, got {size}")
        if groups is None:
            group_names = tuple(group_names or ("pool",))
        elif groups.shape != (size,):
            raise ValueError(f"expected one group for each of the {size} candidates, got shape {tuple(groups.shape)}")
        elif group_names is None or int(groups.max()) >= len(group_names) or int(groups.min()) < 0:
            raise ValueError(
                f"expected a name for every group code 0..{int(groups.max())}, got {group_names!r}; "
                "pass group_names with one entry for each code"
            )
        self.size = size
        self.fingerprint = fingerprint
        self.groups = groups
        self.group_names = tuple(group_names or ())
        self.geometry = geometry
        self.groups_fingerprint = groups_fingerprint
        self._sources_of = sources_of
        self._documents_of = documents_of
        self.uses = torch.zeros(size, dtype=torch.int32)

    @cached_property
    def sources(self) -> Grouping | None:
        """Where candidates come from, where the groups are something else; None where that is not known."""
        return None if self._sources_of is None else self._sources_of()

    @cached_property
    def documents(self) -> Tensor | None:
        """The document that most tokens of each candidate are of, ``(size,)`` int64; None where that is not known."""
        return None if self._documents_of is None else self._documents_of()

    @property
    def identity(self) -> tuple[str, str | None]:
        """What identifies the candidates and their groups."""
        return self.fingerprint, self.groups_fingerprint

    def available(self, at_least: int = 1, among: Tensor | None = None) -> Tensor:
        """Return the ids of the least used candidates, ``(n,)`` ascending, at least ``at_least`` of them.

        Candidates that were never used come first; repeats are admitted, one level of use at a time, only when there
        are not enough of them.

        Args:
            at_least: candidates that a round needs.
            among: ``(size,)`` bool, the eligible candidates; only their uses are compared. None for all.

        Raises:
            ValueError: there are fewer.
        """
        count = self.size if among is None else int(among.sum())
        if at_least > count or not count:
            few = f"the pool holds {self.size}"
            remedy = "enlarge the pool"
            if among is not None:
                few += f", of which {count} may be chosen (by their scores, -inf for never, and their groups)"
                remedy = "let more of them through (more groups, scores above -inf)"
            raise ValueError(
                f"a round needs {at_least} distinct candidates but {few}: shorten the rounds (every_n_steps), lower "
                f"the batch size, or {remedy}"
            )
        level = int((self.uses if among is None else self.uses[among]).min())
        while True:
            least = self.uses <= level
            ids = (least if among is None else least & among).nonzero().flatten()
            if len(ids) >= at_least:
                return ids
            level += 1

    def mask(self, ids: Tensor) -> Tensor:
        """Return which candidates are among ``ids (k,)``, ``(size,)`` bool; ``isin`` would sort the pool for it."""
        found = torch.zeros(self.size, dtype=torch.bool)
        found[ids] = True
        return found

    def record_use(self, ids: Tensor) -> None:
        """Count one use of each id in ``ids (k,)``; ids must be distinct."""
        self.uses[ids] += 1

    def group_counts(self, ids: Tensor) -> dict[str, int]:
        """Return the number of ``ids (k,)`` in each group, by name."""
        if self.groups is None:
            return {self.group_names[0]: len(ids)}
        counts = torch.bincount(self.groups[ids].long(), minlength=len(self.group_names))
        return dict(zip(self.group_names, counts.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the uses, and the fingerprints of the pool that they belong to."""
        return {"fingerprint": self.fingerprint, "groups": self.groups_fingerprint, "uses": self.uses.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the uses; raise ValueError when the checkpoint belongs to another pool."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was made with pool {state['fingerprint']!r} but this run was given pool "
                f"{self.fingerprint!r}: its row ids would mean other texts. Point the run at the original pool, or "
                "start a new run (without ckpt_path) on the new one"
            )
        groups = state.get("groups", self.groups_fingerprint)  # not in older checkpoints
        if groups != self.groups_fingerprint:
            raise ValueError(
                f"the checkpoint was made with the clusters {groups!r} of the pool as its groups (None for its "
                f"sources), this run has {self.groups_fingerprint!r}: names, members or distances differ. Put the "
                "clusters back, group as before, or start a new run (without ckpt_path)"
            )
        self.uses = state["uses"].to(torch.int32, copy=True)  # older checkpoints hold int16


def split_by_use(candidates: Tensor, uses: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Split ``candidates (n,)`` into leftovers, which a round of ``budget`` takes in any case, and the others.

    ``uses (n,)`` of the others are all equal, and larger than those of the leftovers. Both together hold at least
    ``budget`` candidates, the leftovers alone fewer, or none when ``budget`` is 0.
    """
    if not len(uses) or bool((uses == uses[0]).all()):
        return candidates[:0], candidates
    levels, counts = uses.unique(return_counts=True)  # ascending
    level = levels[min(int((counts.cumsum(0) < budget).sum()), len(levels) - 1)]
    return candidates[uses < level], candidates[uses == level]
