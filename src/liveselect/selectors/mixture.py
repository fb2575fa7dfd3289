"""Selection by a mixture: weights of the pool's cells, which follow what their candidates are worth, softly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.cost import CostMeter
from liveselect.functional.correlation import rank_normal
from liveselect.functional.mixture import mirror_step, shrunken_means, within_bounds
from liveselect.grammar import NO_IDS, CandidateSource, CostByPhase, Round, Selection, Selector, State
from liveselect.pool import CandidatePool
from liveselect.selectors.arms import Arms, OpenArms
from liveselect.selectors.cells import Cells, Division, Row, as_csv, read_table, write_table
from liveselect.selectors.stratified import apportioned
from liveselect.selectors.trial import warn_of_few

FILE = "mixture.csv"
"""The name of the table in the folder of a run."""


class MixtureSelector(Selector):
    r"""Draws every round from a mixture of the pool's cells, whose weights follow what candidates of a cell are worth.

    Cells are the pairs of source and group that the pool has, divided by how a prior ranks their candidates, as far as
    these exist. Inside of a cell candidates are drawn uniformly, and none again before its cell is used up.

    **What a cell is worth.** In every round ``probes`` candidates are measured, most where least is known, and what
    training steps have shown of their own examples counts as well (:meth:`observe_step`). Of the influence of a round
    only its order counts: normal scores of the ranks, relative to random candidates of the pool, so that no unit, level
    or outlier matters. They are added up by cell, and count ``forgetting`` times as much with every round that passes.
    The mean of source, group and part, and at last that of the cell, are each shrunk towards 0, by at least
    ``shrinkage`` candidates, and altogether where the means differ no more than by chance.

    **Weights.** With the pool's mixture :math:`b` and the worth :math:`m`, a step of entropic mirror ascent takes the
    logarithms of the weights the share ``rate`` of the way to those of

    .. math:: w_c \propto b_c \, e^{\,\text{strength} \cdot m_c}

    and the nearest weights (in relative entropy) are taken that are at least ``floor`` and at most ``cap`` times the
    share of the cell in the pool. These bounds are of the weights; a cell that holds too few in a round gives all of
    them, and the others fill it in proportion, which ``weights/short`` among the metrics counts.

    **Tables.** ``weights`` begins with those of a table, and goes back to them in place of the pool's mixture where
    nothing is known; with ``probes=0`` and no captured steps they stay. The folder of a run holds the last ones as
    ``mixture.csv``, :meth:`export` writes them elsewhere. A table has columns ``source``, ``group`` and ``prior`` (the
    part, 1 for the lowest scores), as far as cells are divided so, and ``weight``; a line that leaves some of them out
    is about all cells of the others. Weights are scaled to sum to 1.

    Where a prior lies beneath (``PriorSelector(..., offset=1.0)``), the mean of what it adds to a cell's candidates
    is added to what the cell is worth.

    Args:
        weights: a ``.csv``, ``.json`` or ``.parquet`` file, or weights by name of the group; None for the pool's own.
        prior: scores that divide the pool into parts: True is the n-gram prior, or what
            :class:`~liveselect.selectors.ScoredSelector` takes; None for none. Scores of -inf are never drawn.
        parts: how many, of equal size.
        strength: how far weights follow: a cell whose candidates are one standard deviation better than the pool's is
            drawn ``exp(strength)`` times as often.
        rate: share of the way that weights go in a round, above 0 and up to 1.
        floor: least weight of a cell, as a multiple of its share in the pool, 0..1.
        cap: largest weight of a cell, as such a multiple, at least 1.
        probes: candidates measured in each round; 0 for none.
        shrinkage: candidates by which a mean is shrunk at least.
        forgetting: share of its weight that a measurement keeps from one round to the next, 0..1.
        column: name of the column of a Parquet file with scores.

    Sources: the update is exponentiated gradient, Kivinen and Warmuth 1997, as Xie et al. 2023 use it for domains
    (DoReMi, arXiv 2305.10429); the shrinkage that of James and Stein 1961.
    """

    uses_groups = True

    def __init__(
        self,
        weights: str | Path | Mapping[str, float] | None = None,
        prior: Any = None,
        parts: int = 5,
        strength: float = 2.0,
        rate: float = 0.5,
        floor: float = 0.1,
        cap: float = 4.0,
        probes: int = 64,
        shrinkage: float = 8.0,
        forgetting: float = 0.8,
        column: str = "score",
    ) -> None:
        check_plain(MixtureSelector, locals())
        if not 0.0 <= strength < float("inf"):
            raise ValueError(f"expected a finite strength of at least 0, got {strength}")
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"expected rate, the share of the way in a round, above 0 and up to 1, got {rate}")
        if not 0.0 <= floor <= 1.0 or not 1.0 <= cap < float("inf"):
            raise ValueError(
                "expected floor and cap as multiples of a cell's share in the pool, floor in 0..1 and cap of at least "
                f"1, got {floor} and {cap}"
            )
        if probes < 0:
            raise ValueError(f"expected probes of at least 0, got {probes}")
        if not 0.0 < shrinkage < float("inf"):
            raise ValueError(f"expected a positive shrinkage, got {shrinkage}")
        if not 0.0 <= forgetting <= 1.0:
            raise ValueError(f"expected forgetting, the share that is kept, in 0..1, got {forgetting}")
        self.strength = strength
        self.rate = rate
        self.floor = floor
        self.cap = cap
        self.probes = probes
        self.shrinkage = shrinkage
        self.forgetting = forgetting
        self.needs_estimator = probes > 0
        self._division = Division(prior, parts, column)
        self._start = None if weights is None else read_table(weights)
        self._cells: Cells | None = None
        self._arms: Arms | None = None
        self._fingerprint: str | None = None
        nothing = torch.zeros(0, dtype=torch.float64)
        self._share, self._base = nothing, nothing  # of each cell in the pool, and where nothing is known
        self._weights, self._sums, self._counts = nothing, nothing, nothing
        self._cursors = NO_IDS
        self._entered = -1
        self._measured: list[tuple[Tensor, Tensor]] = []
        self._captured: list[tuple[Tensor, Tensor]] = []  # since the last round

    # ---- propose, observe, select --------------------------------------------------------------------------------

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores of the prior, where they are those of the run's own data."""
        self._division.prepare(source, meter)

    def cost_before_training(self) -> CostByPhase:
        """Return what making the scores of the prior cost."""
        return self._division.cost

    def check(self, round: Round, budget: int) -> None:
        """See that prior and weights are of this pool, and the cells those of a checkpoint.

        Raises:
            ValueError: they are not, or the pool has a single cell.
        """
        if self.probes:
            warn_of_few(round.pool, self.probes, f"probes={self.probes}")
        self._divide(round.pool)

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates may be drawn, ``(size,)`` bool: of cells with a weight, with a score above -inf."""
        mine = self._division.eligible(pool)
        if self._start is None or self.floor > 0:
            return mine
        cells = self._divide(pool)
        drawn = (self._base > 0)[cells.codes.long()]
        return drawn if mine is None else drawn & mine

    def propose(self, round: Round) -> Tensor:
        """Return candidates to measure, ``(m,)``, once in a round: most of the cells of which least is known."""
        if self._entered == round.index:
            return NO_IDS
        open_ = self._enter(round)
        number = min(self.probes, int(open_.room.sum()))
        worth_knowing = self._share.sqrt() / (1 + self._counts)
        counts = apportioned(number, torch.where(open_.room > 0, worth_knowing.clamp(min=1e-12), 0.0), open_.room)
        ids = [NO_IDS]
        for cell in counts.nonzero().flatten().tolist():
            probes, self._cursors[cell] = open_.next_probes(cell, int(counts[cell]), int(self._cursors[cell]))
            ids.append(probes)
        return torch.cat(ids)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Keep the influence ``(m,)`` of ``ids (m,)`` until the round is chosen."""
        self._measured.append((ids.cpu(), influence.double().cpu()))

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Keep the influence ``(m,)`` of candidates ``ids (m,)`` that were trained on since the last round."""
        self._captured.append((ids.cpu(), influence.double().cpu()))

    def select(self, round: Round, budget: int) -> Selection:
        """Move the weights, and draw ``budget`` of the round's candidates by them."""
        open_ = self._enter(round)
        cells, before, measured = self._divide(round.pool), self._weights, sum(len(ids) for ids, _ in self._measured)
        self._learn(self._measured)
        worth = self._worth()
        self._weights = self._bounded(mirror_step(before, self._base, worth, self.strength, self.rate))
        weights = self._weights
        if round.offset is not None:
            weights = self._bounded(mirror_step(weights, weights, self._added(round), self.strength, 1.0))
        counts = self._counts_of(weights, open_.room, budget)
        ids = torch.cat(
            [NO_IDS, *(open_.first(cell, int(counts[cell])) for cell in counts.nonzero().flatten().tolist())]
        )
        short = (weights * budget - counts).clamp(min=0)[counts == open_.room].sum()
        times = (weights / self._share)[self._share > 0]
        groups, names = cells.groups, len(round.pool.group_names)
        return Selection(
            ids,
            metrics={
                "measured": float(measured),
                "weights/change": float((weights - before).abs().sum() / 2),
                "weights/most_over_pool": float(times.max()),
                "weights/least_over_pool": float(times.min()),
                "weights/worth": float(self._weights @ worth),
                "weights/short": float(short),
            },
            group_metrics={"weight": torch.bincount(groups, weights, names)},
            reasons={"drawn uniformly from its cell of the mixture": ids},
        )

    # ---- tables --------------------------------------------------------------------------------------------------

    def table(self) -> list[Row]:
        """Return a line for each cell: its levels, ``candidates``, ``weight``, ``share`` of the pool, and its worth.

        ``worth`` is in standard deviations of the influence of random candidates, ``evidence`` how many measurements
        it rests on.

        Raises:
            RuntimeError: no round was opened or restored, so there are no cells yet.
        """
        if self._cells is None:
            raise RuntimeError("there are no cells before the first round: export the mixture when training has begun")
        numbers = {"weight": self._weights, "share": self._share, "worth": self._worth(), "evidence": self._counts}
        return list(self._cells.rows(numbers))

    def export(self, path: str | Path) -> None:
        """Write :meth:`table` to a ``.csv``, ``.json`` or ``.parquet`` file, which ``weights=`` takes."""
        write_table(self.table(), path)

    def files(self) -> Mapping[str, str]:
        """Return the table for the folder of the run."""
        return {} if self._cells is None else {FILE: as_csv(self.table())}

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return weights, what they follow from, and where probing goes on; orders follow from the seed."""
        return {
            "fingerprint": self._fingerprint,
            "scores": None if self._fingerprint is None else self._division.digest,
            "weights": self._weights.clone(),
            "sums": self._sums.clone(),
            "counts": self._counts.clone(),
            "cursors": self._cursors.clone(),
            "captured": [[ids.clone(), influence.clone()] for ids, influence in self._captured],
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`check` refuses cells that are not those of the state."""
        self._division.expect(state["scores"])
        self._cells = self._arms = None
        self._entered, self._measured = -1, []
        self._fingerprint = state["fingerprint"]
        self._weights, self._sums = state["weights"].clone(), state["sums"].clone()
        self._counts, self._cursors = state["counts"].clone(), state["cursors"].clone()
        self._captured = [(ids.clone(), influence.clone()) for ids, influence in state["captured"]]

    # ---- parts of a round ------------------------------------------------------------------------------------------

    def _enter(self, round: Round) -> OpenArms:
        """Return what the round may take from each cell; what steps have shown is learned when the round is new."""
        cells = self._divide(round.pool)
        if self._arms is None:
            self._arms = Arms.of_cells(cells, round.seed)
        if self._entered != round.index:
            self._entered, self._measured = round.index, []
            self._sums, self._counts = self._sums * self.forgetting, self._counts * self.forgetting
            self._learn(self._captured)
            self._captured = []
        return OpenArms(self._arms, round.candidates, round.pool.uses)

    def _divide(self, pool: CandidatePool) -> Cells:
        """Return the cells of the pool, made when they are first needed and when the prior is another."""
        cells = self._division.cells(pool)
        if cells is self._cells:
            return cells
        if len(cells) < 2:
            raise ValueError(
                "a mixture needs several cells, and this pool has a single source and group: name several sources, "
                "cluster it (`liveselect cluster POOL`) and pass groups='clusters' to the datamodule, or divide it by "
                "a prior (prior=True)"
            )
        if self._fingerprint not in (None, cells.fingerprint):
            raise ValueError(
                f"the checkpoint was made with the cells {self._fingerprint}, this run has {cells.fingerprint}: its "
                "weights would mean other texts. Pass the groups and the parts that the run began with, or start a new "
                "run with its mixture.csv as weights"
            )
        self._cells, self._arms = cells, None
        drawn = self._division.eligible(pool)
        sizes = cells.sizes(None if drawn is None else drawn.nonzero().flatten()).double()
        self._share = sizes / sizes.sum()
        self._base = self._base_of(cells)
        if self._fingerprint is None:
            self._fingerprint = cells.fingerprint
            self._weights = self._bounded(self._base)
            self._sums, self._counts = torch.zeros(2, len(cells), dtype=torch.float64).unbind()
            self._cursors = torch.zeros(len(cells), dtype=torch.int64)
        return cells

    def _base_of(self, cells: Cells) -> Tensor:
        """Return the mixture where nothing is known, ``(K,)``."""
        return self._share if self._start is None else cells.weights(self._start, self._share)

    def _bounded(self, weights: Tensor) -> Tensor:
        return within_bounds(weights, self.floor * self._share, self.cap * self._share)

    def _worth(self) -> Tensor:
        """Return what candidates of each cell are worth above those of the pool, ``(K,)``."""
        if self._cells is None:
            return torch.zeros_like(self._sums)
        factors = [factor.of_cells for factor in self._cells.factors]
        worth = shrunken_means(self._sums, self._counts, factors, self.shrinkage)
        return worth - self._share @ worth

    def _learn(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Add the influence of some candidates, measured together, to what is known of their cells."""
        if not found or self._cells is None:
            return
        ids, influence = (torch.cat(parts) for parts in zip(*found, strict=True))
        codes, values = self._cells.codes[ids].long(), rank_normal(influence)
        sums = torch.bincount(codes, values, len(self._sums))
        counts = torch.bincount(codes, minlength=len(self._sums)).double()
        # random candidates of the pool would have a mean of 0: where cells are missing, what is known of the others
        seen = torch.where(counts > 0, self._share, 0.0)
        apart = sums / counts.clamp(min=1) - self._worth()
        level = float(seen @ apart) / max(float(seen.sum()), torch.finfo(seen.dtype).tiny)
        self._sums = self._sums + sums - level * counts
        self._counts = self._counts + counts

    def _added(self, round: Round) -> Tensor:
        """Return the mean of what a prior beneath adds to the candidates of each cell, ``(K,)``."""
        cells = self._divide(round.pool)
        if round.offset is None:
            return torch.zeros_like(self._sums)
        codes, offset = cells.codes[round.candidates].long(), round.offset[round.candidates].double()
        return torch.bincount(codes, offset, len(cells)) / cells.sizes(round.candidates).clamp(min=1)

    @staticmethod
    def _counts_of(weights: Tensor, room: Tensor, budget: int) -> Tensor:
        """Return how many candidates each cell gives, ``(K,)``; cells without a weight only what others lack."""
        able = min(budget, int(room[weights > 0].sum()))
        counts = apportioned(able, weights, room)
        rest = room - counts
        return counts + apportioned(budget - able, rest.double(), rest) if able < budget else counts
