"""Caps on how much of one document a round, or a pass over the pool, may take, whatever selector chooses."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.grammar import Around, Round, Selection, Selector
from liveselect.parts import check_part
from liveselect.pool import CandidatePool

Over = Literal["round", "pass"]


class CappedSelector(Around):
    """Lets another selector choose from a few candidates of each document only.

    A long document fills many blocks, which are much alike: a choice of the best takes all of them, and trains on one
    text in place of many. The selector sees at most ``per_document`` candidates of each document, drawn uniformly in
    each round. What the last pass over the pool left over is trained on in any case, and counts. Where the documents do
    not hold enough for a round, the cap is raised by as much as the round needs, and the round says so.

    A candidate belongs to the document that most of its tokens are of. Documents are known where ``liveselect prepare``
    made the pool.

    Args:
        selector: sees what the cap lets through.
        per_document: most candidates of one document, at least 1.
        over: a ``round``, or a whole ``pass`` over the pool, in which all candidates come once: then what was trained
            on in the pass counts as well, and the rest of long documents comes at its end.
    """

    def __init__(self, selector: Selector, per_document: int = 4, over: Over = "round") -> None:
        check_plain(CappedSelector, locals())
        super().__init__(check_part(selector, Selector, "selector"))
        if per_document < 1:
            raise ValueError(f"expected per_document of at least 1 candidate, got {per_document}")
        if over not in get_args(Over):
            raise ValueError(f"expected over to be one of {get_args(Over)}, got {over!r}")
        self.per_document = per_document
        self.over: Over = over

    def check(self, round: Round, budget: int) -> None:
        """See that the documents are known, and let the selector check.

        Raises:
            ValueError: they are not.
        """
        _documents(round.pool)
        super().check(round, budget)

    def propose(self, round: Round) -> Tensor:
        """Return what the selector wants measured of what the cap lets through."""
        return super().propose(self._narrowed(round, 1)[0])

    def select(self, round: Round, budget: int) -> Selection:
        """Let the selector choose ``budget`` candidates of what the cap lets through."""
        narrowed, most = self._narrowed(round, budget)
        chosen = super().select(narrowed, budget)
        selection = Selection(chosen) if isinstance(chosen, Tensor) else chosen
        documents = _documents(round.pool)
        counts = documents[torch.cat([round.leftovers, selection.ids])].unique(return_counts=True)[1]
        metrics = {
            **selection.metrics,
            "documents/chosen": float(len(counts)),
            "documents/most_of_one": float(counts.max()) if len(counts) else 0.0,
        }
        notes = selection.notes
        if most > self.per_document:
            notes += (
                f"{self.per_document} candidates of each document do not fill a {self.over}: up to {most} were let "
                "through",
            )
        return replace(selection, metrics=metrics, notes=notes)

    def _narrowed(self, round: Round, at_least: int) -> tuple[Round, int]:
        """Return the round with what the cap lets through, and the cap that lets through ``at_least`` candidates."""
        documents, ids = _documents(round.pool), round.candidates
        if not len(ids):
            return round, self.per_document
        taken = torch.bincount(documents[round.leftovers], minlength=int(documents.max()) + 1)
        if self.over == "pass":
            uses = round.pool.uses
            used = (uses > uses[ids].min()).nonzero().flatten()
            taken += torch.bincount(documents[used], minlength=len(taken))
        place = taken[documents[ids]] + _place_in(documents[ids], round.generator("within documents"))
        most = self.per_document
        if at_least:
            most = max(most, 1 + int(place.kthvalue(min(at_least, len(place))).values))
        return replace(round, candidates=ids[place < most]), most


def _place_in(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Return the place of each candidate in a random order of its own group, ``(n,)`` int64 from 0."""
    order = torch.randperm(len(groups), generator=generator)
    by_group = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    first = (sizes.cumsum(0) - sizes)[groups[by_group]]
    place = torch.empty_like(order)
    place[by_group] = torch.arange(len(groups)) - first
    return place


def _documents(pool: CandidatePool) -> Tensor:
    """Return the document of every candidate, ``(size,)`` int64."""
    if pool.documents is None:
        raise ValueError(
            "expected a pool whose documents are known, to cap how much of each is taken: prepare it with `liveselect "
            "prepare`, or leave the cap out"
        )
    return pool.documents.long()
