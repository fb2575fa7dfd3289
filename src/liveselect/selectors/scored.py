"""Selection by precomputed scores, drawn live, and scores as a prior of another selector."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.cost import CostMeter, added
from liveselect.functional.sampling import Noise, gumbel_topk, uniform_subset
from liveselect.grammar import Around, Batch, CandidateSource, CostByPhase, Round, Selection, Selector, State
from liveselect.parts import check_part, restore_part, save_part
from liveselect.pool import CandidatePool
from liveselect.selectors.score_table import BetterPart, ScoreTable
from liveselect.selectors.width import Width

NOISE_REACH = 5.0
"""Temperatures below the threshold at which a candidate is still drawn once in 150 times."""


class ScoredSelector(Selector):
    """Draws by scores that were made before training; measures nothing. The policy of PDS.

    In every round the share ``ratio`` of the pool is drawn with fresh noise, with weights ``exp(score / temperature)``
    and without replacement, and the round's budget is taken at random from what is left of it. Candidates that were
    trained on do not come again before the share was, so a run that consumes it trains on it once, as a pool that was
    filtered before training would be; the noise near its edge is drawn afresh in each round. A run that
    consumes more trains on the same candidates again and again, and says so; with ``repeat=False`` it goes on with the
    next best, down to the worst.

    Args:
        scores: a folder made by ``liveselect score``; a ``.npy`` or ``.parquet`` file with one number for each
            candidate; or an array. Larger is better, -inf is never drawn. See :mod:`liveselect.scores`. Or True, or a
            :class:`NGramPrior`: scores that are made of the run's own pool and reference set, and need no file.
        ratio: share of the pool that is drawn, above 0 and up to 1; None for the width that the n-gram prior finds.
        temperature: strength of the noise, in units of the scores; 0 draws the best. By default 0.1, and with the
            n-gram prior 0.3 of its standard deviation.
        final_temperature: where the temperature arrives after ``anneal_rounds``, changing by equal steps; by default it
            stays.
        anneal_rounds: rounds until then.
        groups: names of the groups that may be chosen; all by default.
        random_share: share of the budget that is drawn uniformly instead, 0..1, from the same groups.
        standardize: divide the scores by their standard deviation, for scores on scales of their own.
        column: name of the column of a Parquet file.
        repeat: whether a share that was trained on is trained on again, rather than what is below it.

    The file is read when it is first needed.

    Source: Gu et al. 2024, "Data Selection via Optimal Control", arXiv 2410.07064 (ratio 0.4, temperature 0.1 on scores
    of unit variance).
    """

    has_share = True

    def __init__(
        self,
        scores: Any,
        ratio: float | None = 0.4,
        temperature: float | None = None,
        final_temperature: float | None = None,
        anneal_rounds: int | None = None,
        groups: Sequence[str] | None = None,
        random_share: float = 0.0,
        standardize: bool = False,
        column: str = "score",
        repeat: bool = True,
    ) -> None:
        check_plain(ScoredSelector, locals())
        self._table = ScoreTable(scores, column, groups, standardize)
        temperature = self._table.temperature(temperature, 0.1)
        for value in (temperature, temperature if final_temperature is None else final_temperature):
            self._table.check(ratio, value)
        if (final_temperature is None) != (anneal_rounds is None) or (anneal_rounds is not None and anneal_rounds < 1):
            raise ValueError(
                "expected final_temperature together with anneal_rounds of at least 1, or neither, got "
                f"{final_temperature} and {anneal_rounds}"
            )
        if not 0.0 <= random_share <= 1.0:
            raise ValueError(f"expected random_share in 0..1, got {random_share}")
        self.ratio = ratio
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.anneal_rounds = anneal_rounds
        self.random_share = random_share
        self.repeat = repeat
        self.uses_groups = groups is not None

    @classmethod
    def over(cls, table: ScoreTable, ratio: float, temperature: float, random_share: float = 0.0) -> "ScoredSelector":
        """Return a selector that draws from a table of scores that another one holds."""
        selector = cls([0.0], ratio, temperature, random_share=random_share)
        selector._table, selector.uses_groups = table, table.groups is not None
        return selector

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores, where they are those of the run's own data."""
        self._table.prepare(source, meter)

    def check(self, round: Round, budget: int) -> None:
        """Read the scores, and see that they are of this pool.

        Raises:
            FileNotFoundError: there are no scores.
            ValueError: the file is not what it should be, or belongs to another pool.
        """
        self._table.values(round.pool)

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates may be drawn, ``(size,)`` bool: those of the groups with a score above -inf.

        Once the share was trained on, only what was.
        """
        mine = self._table.eligible(pool)
        used = self._used(pool, mine, budget)
        return mine if used is None else used

    def _used(self, pool: CandidatePool, eligible: Tensor | None, budget: int = 1) -> Tensor | None:
        """Return the share that was trained on, ``(size,)`` bool; None as long as it was not all."""
        if not self.repeat:
            return None
        if self.random_share:  # what was drawn uniformly belongs to it
            return _used_up(pool, eligible, self.distinct_share(), budget)
        noise = max(self.temperature, self.final_temperature or 0.0)
        return _used_up(pool, eligible, self._table.share(self.ratio), budget, self._table.values(pool), noise)

    def distinct_share(self) -> float:
        """Return the share of the pool that is trained on before any of it comes again, what is drawn uniformly too."""
        share = self._table.share(self.ratio)
        return share / (1 - self.random_share + self.random_share * share) if self.repeat else 1.0

    def cost_before_training(self) -> CostByPhase:
        """Return what making the scores cost, ``seconds`` and ``flops`` by phase; empty where they do not say."""
        return self._table.cost

    def select(self, round: Round, budget: int) -> Selection:
        """Draw ``budget`` of the round's candidates.

        Raises:
            ValueError: the scores are not of this pool, or too few candidates may be chosen.
        """
        temperature = self.temperature_in(round.index)
        by_score = budget - _part_of(self.random_share, budget)
        again = _all_in(round, self._used(round.pool, self._table.eligible(round.pool)))
        share = self._table.share(self.ratio)
        better = _all_of(round) if again else self._table.better_part(round, share, temperature, by_score)
        values = self._table.values(round.pool)
        if round.offset is None:
            drawn = better.ids[uniform_subset(len(better.ids), by_score, round.generator("select"))]
        else:
            drawn = better.ids[gumbel_topk(round.offset[better.ids], by_score, 1.0, round.generator("select"))]
        scored = round.candidates
        rest = scored[~round.pool.mask(drawn)[scored]]
        others = rest[uniform_subset(len(rest), budget - by_score, round.generator("random share"))]
        metrics = {
            "temperature": temperature,
            "prior/ratio": share,
            "scores/std": float(values[scored].double().std(correction=0)),
            "left_in_ratio": float(len(better.ids) - better.beyond),
            "beyond_ratio": float(better.beyond),
        }
        noise = Noise(temperature, round.generator("scores"))  # of all candidates of the pool, used ones too
        return Selection(
            torch.cat([drawn, others]),
            scored,
            values[scored].float(),
            metrics,
            _notes(round, share, better.beyond, again),
            noise=lambda start, stop: _at(noise, scored[start:stop]),
            eligible=better.ids,
            reasons={"drawn uniformly": others, "the share that is drawn from is used up": better.from_below},
            scores_id=self._table.scores.digest,
        )

    def token_scores(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what an n-gram prior says of tokens; other scores are of whole candidates."""
        return self._table.token_scores(batch)

    def temperature_in(self, round_index: int) -> float:
        """Return the temperature of a round."""
        if self.final_temperature is None or self.anneal_rounds is None:
            return self.temperature
        done = min(1.0, round_index / self.anneal_rounds)
        return self.temperature + done * (self.final_temperature - self.temperature)

    def state_dict(self) -> State:
        """Return which scores are drawn from."""
        return {"scores": self._table.digest}

    def load_state_dict(self, state: State) -> None:
        """Raise ValueError when the checkpoint was made with other scores."""
        self._table.expect(state["scores"])


class PriorSelector(Around):
    """Lets another selector choose from the better part of the pool, by scores that were made before training.

    A cheap quality score narrows the pool; a method that measures the live model, or arms, chooses from what is left.
    Each round draws its part afresh, with noise, as :class:`ScoredSelector` does, and a part that was trained on is
    trained on again.

    Args:
        selector: sees only the candidates that the prior kept.
        scores: as in :class:`ScoredSelector`; True is the n-gram prior.
        ratio: share of the pool that is kept, above 0 and up to 1; 1 is no gate. None for ``gate`` times the width that
            the n-gram prior finds.
        temperature: strength of the noise, in units of the scores; 0 keeps the best. By default 0, and with the n-gram
            prior 0.3 of its standard deviation.
        groups: names of the groups that may be chosen; all by default.
        standardize: divide the scores by their standard deviation.
        column: name of the column of a Parquet file.
        repeat: as in :class:`ScoredSelector`.
        offset: weight with which the scores, in their standard deviations among the kept candidates, are added to what
            the other selector compares candidates by.
        keep_general: share of the budget that is drawn uniformly from the whole pool, 0..1. A narrow choice ruins what
            the model knows of the rest. Where the scores would choose more than one of ``gate`` candidates of the whole
            pool, more is drawn so, up to all of it.
        max_uses: how often the kept share is trained on before what is below it comes in; None for as often as need be.
        gate: how many times as much is kept as the scores alone would choose, at least 1, where the selector chooses
            among them. Scores alone would choose the ratio over this: rounds before anything is measured do, and when
            as much was trained on, it comes again.
        find_width: find the ratio in the run, from ``ratio`` on: where better scores among what was measured are worth
            more, less of the pool is kept, where they are worth less, more, see
            :class:`~liveselect.selectors.width.Width`. For a selector that measures.
    """

    has_share = True

    def __init__(
        self,
        selector: Selector,
        scores: Any,
        ratio: float | None = 0.5,
        temperature: float | None = None,
        groups: Sequence[str] | None = None,
        standardize: bool = False,
        column: str = "score",
        repeat: bool = True,
        offset: float = 0.0,
        keep_general: float = 0.0,
        max_uses: int | None = None,
        gate: float = 1.0,
        find_width: bool = False,
    ) -> None:
        check_plain(PriorSelector, locals())
        super().__init__(check_part(selector, Selector, "selector"))
        self._table = ScoreTable(scores, column, groups, standardize)
        temperature = self._table.temperature(temperature, 0.0)
        self._table.check(ratio, temperature)
        if not 0.0 <= keep_general < 1.0:
            raise ValueError(f"expected keep_general, a share of the budget, from 0 to below 1, got {keep_general}")
        if not 0.0 <= offset < math.inf:
            raise ValueError(f"expected offset, the weight of the scores, of at least 0, got {offset}")
        if max_uses is not None and max_uses < 1:
            raise ValueError(f"expected max_uses of at least 1, or None, got {max_uses}")
        if not 1.0 <= gate < math.inf:
            raise ValueError(
                f"expected gate, how much is kept of what the prior would choose, of at least 1, got {gate}"
            )
        self.ratio = ratio
        self.gate = gate
        self.temperature = temperature
        self.repeat = repeat
        self.offset = offset
        self.keep_general = keep_general
        self.max_uses = max_uses
        self.uses_groups |= groups is not None
        self._warmup = ScoredSelector.over(self._table, self._first_share(), temperature, keep_general)
        if find_width and not self.needs_estimator:
            raise ValueError(
                f"find_width finds the ratio from what is measured, and {type(selector).__name__} measures nothing: "
                "pass a selector that does, such as RegressionSelector, or find_width=False"
            )
        self._width = Width(self._first_share()) if find_width else None

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores, where they are those of the run's own data, and let the selector prepare."""
        self._table.prepare(source, meter)
        self._warmup.ratio = self._first_share()
        if self._width is not None:
            self._width.first = self._first_share()
        super().prepare(source, meter)

    def warmup(self) -> Selector:
        """Return who draws by the scores alone in rounds before anything is measured."""
        return self._warmup

    def check(self, round: Round, budget: int) -> None:
        """See that the scores are of this pool, and let the selector check."""
        self._table.values(round.pool)
        super().check(round, budget)

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates may be chosen, ``(size,)`` bool: what prior and selector let through.

        Once the share of them was trained on, only what was.
        """
        both = self._let_through(pool, budget)
        used = self._used(pool, both, budget)
        return both if used is None else used

    def _used(self, pool: CandidatePool, eligible: Tensor | None, budget: int) -> Tensor | None:
        if not self.repeat:
            return None
        share = self._share_used()
        if self.keep_general:  # what was drawn uniformly belongs to it
            used = _used_up(pool, eligible, share, budget)
        else:
            values, kept = self._table.values(pool), self._kept_share()
            used = _used_up(pool, eligible, share, budget, values, self.temperature, kept)
        if used is None or self.max_uses is None or int(pool.uses[used].min()) < self.max_uses:
            return used
        return None

    def _share_used(self) -> float:
        """Return which share of the pool is trained on when what the scores alone would choose is."""
        ratio, general = self._share(), self._general_share()
        return ratio / (1 - general + general * ratio)

    def _kept_share(self) -> float:
        return min(1.0, self.gate * self._share())

    def _share(self) -> float:
        """Return which share of the pool the scores alone would choose."""
        return self._first_share() if self._width is None else self._width.share

    def _first_share(self) -> float:
        return self._table.share(None) if self.ratio is None else self.ratio / self.gate

    def _general_share(self) -> float:
        """Return which share of the budget is drawn uniformly.

        An open gate cannot be wider, and inside of it one of ``gate`` candidates is chosen. So the more of the pool the
        scores would choose beyond that, the more is drawn uniformly: all of it where they would choose the whole pool.
        """
        share = self._share()
        if self.gate * share <= 1:
            return self.keep_general
        return 1 - (1 - self.keep_general) * (1 - share) / (1 - 1 / self.gate)

    def distinct_share(self) -> float:
        """Return the share of the pool that is trained on before any of it comes again."""
        return min(self._share_used() if self.repeat else 1.0, super().distinct_share())

    def _let_through(self, pool: CandidatePool, budget: int) -> Tensor | None:
        mine, other = self._table.eligible(pool), super().eligible(pool, budget)
        return other if mine is None else mine if other is None else mine & other

    def cost_before_training(self) -> CostByPhase:
        """Return what making the scores cost, and the selector's own cost."""
        return added(self._table.cost, super().cost_before_training())

    def propose(self, round: Round) -> Tensor:
        """Return what the selector wants measured among the kept candidates."""
        return super().propose(self._narrowed(round, 1)[0])

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Pass the measurements on, and keep them for the width."""
        super().observe(ids, influence)
        if self._width is not None:
            self._width.observe(ids, influence)

    def select(self, round: Round, budget: int) -> Selection:
        """Let the selector choose ``budget`` of the kept candidates.

        Raises:
            ValueError: the scores are not of this pool, or too few candidates may be chosen.
        """
        if self._width is not None:
            self._width.move(round.candidates, self._table.values(round.pool))
        general = min(budget - 1, _part_of(self._general_share(), budget))
        narrowed, beyond, again = self._narrowed(round, budget - general)
        chosen = super().select(narrowed, budget - general)
        selection = Selection(chosen) if isinstance(chosen, Tensor) else chosen
        metrics = {
            **selection.metrics,
            "prior/candidates": float(len(narrowed.candidates)),
            "prior/ratio": self._kept_share(),
            "prior/uniform": general / budget,
            "prior/strength": self._table.strength,
        }
        if self._width is not None:
            metrics["prior/evidence"] = self._width.evidence
        notes = selection.notes + _notes(round, self._kept_share(), beyond, again)
        if not general:
            return replace(selection, metrics=metrics, notes=notes)
        rest = round.candidates[~round.pool.mask(selection.ids)[round.candidates]]
        others = rest[uniform_subset(len(rest), general, round.generator("keep general"))]
        reasons = {"kept general: drawn uniformly from the whole pool": others, **selection.reasons}
        ids = torch.cat([selection.ids, others])
        return replace(selection, ids=ids, metrics=metrics, notes=notes, reasons=reasons)

    def token_scores(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what the selector says of tokens, or else the prior."""
        inner = super().token_scores(round, batch)
        return self._table.token_scores(batch) if inner is None else inner

    def state_dict(self) -> State:
        """Return which scores are the prior, and the selector's state."""
        state = {"scores": self._table.digest, "selector": save_part(self.selector)}
        return state if self._width is None else {**state, "width": self._width.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore the selector's state.

        Raises:
            ValueError: the checkpoint was made with other scores, or with another kind of selector.
        """
        self._table.expect(state["scores"])
        restore_part(self.selector, state["selector"], "selector inside the prior")
        if self._width is not None and "width" in state:
            self._width.load_state_dict(state["width"])

    def _narrowed(self, round: Round, at_least: int) -> tuple[Round, int, bool]:
        """Return the round with the kept candidates, how many of them are from below, and whether all come again."""
        if _all_in(round, self._used(round.pool, self._let_through(round.pool, at_least), at_least)):
            return replace(round, offset=self._offset(round, round.candidates)), 0, True
        better = self._table.better_part(round, self._kept_share(), self.temperature, at_least)
        narrowed = replace(round, candidates=better.ids, offset=self._offset(round, better.ids))
        return narrowed, better.beyond, False

    def _offset(self, round: Round, kept: Tensor) -> Tensor | None:
        """Return what is added to the scores that candidates are compared by, ``(size,)``; zero outside of ``kept``."""
        if not self.offset:
            return round.offset
        values = self._table.values(round.pool)
        among = values[kept].double()
        finite = among[among.isfinite()]
        spread = float(finite.std(correction=0)) if len(finite) else 0.0
        offset = torch.zeros(round.pool.size) if round.offset is None else round.offset.clone()
        strength = self._table.strength
        added = strength * (among - finite.mean()) / (spread or 1.0)
        if strength < 1:  # chance takes the place of what the scores do not know
            added += (1 - strength) * Noise(1.0, round.generator("in place of the prior"))(0, len(kept))
        offset[kept] += (self.offset * added).float()
        return offset


def _part_of(share: float, budget: int) -> int:
    return round(share * budget)


def _at(noise: Noise, ids: Tensor) -> Tensor:
    """Return the noise of the ascending ``ids (n,)``, float64."""
    if not len(ids):
        return torch.empty(0, dtype=torch.float64)
    first = int(ids[0])
    return noise(first, int(ids[-1]) + 1)[ids - first]


def _used_up(
    pool: CandidatePool,
    eligible: Tensor | None,
    share: float,
    budget: int,
    values: Tensor | None = None,
    temperature: float = 0.0,
    kept: float = 0.0,
) -> Tensor | None:
    """Return which of the ``eligible (size,)`` were trained on, ``(size,)`` bool, if these are the share; else None.

    With ``values (size,)`` only those count that a draw of the share, or of what is ``kept``, takes at this
    temperature, which warm-up rounds do not look at.
    """
    used = pool.uses > 0 if eligible is None else (pool.uses > 0) & eligible
    size = pool.size if eligible is None else int(eligible.sum())
    count = max(budget, round(share * size))
    if int(used.sum()) < count:
        return None
    if values is not None:
        among = values if eligible is None else values[eligible]
        drawn = min(size, max(count, round(kept * size)))
        used &= values >= float(among.topk(drawn).values[-1]) - NOISE_REACH * temperature
    return used if int(used.sum()) >= count else None


def _all_in(round: Round, used: Tensor | None) -> bool:
    return used is not None and bool(used[round.candidates].all())


def _all_of(round: Round) -> BetterPart:
    return BetterPart(round.candidates, 0, round.candidates[:0])


def _notes(round: Round, ratio: float, beyond: int, again: bool) -> tuple[str, ...]:
    if again and int(round.pool.uses.max()) == 1:  # said once
        return (f"the best {ratio:.0%} of the pool were trained on: from now on they are trained on again",)
    if not beyond:
        return ()
    return (f"too few of the best {ratio:.0%} of the pool are left: {beyond} candidates come from below",)
