"""Bandit selection: groups of candidates are arms, pulled by upper confidence bounds on their influence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.cost import CostMeter
from liveselect.functional.bandit import allocate, neighbour_weights, top_arms
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import NO_IDS, CandidateSource, CostByPhase, Round, Selection, Selector, State
from liveselect.pool import CandidatePool, GroupGeometry
from liveselect.selectors.arms import Arms, OpenArms
from liveselect.selectors.cells import Cells, Division
from liveselect.selectors.rewards import CONTROL, Rewards
from liveselect.selectors.trial import warn_of_few
from liveselect.selectors.uniform import uniform_selection


@dataclass
class _Round:
    """One round in the making.

    Attributes:
        index: of the round.
        open: what may be taken from each arm.
        pulls_left: arms that may still be pulled.
        captured: ``(K,)`` bool, arms whose outcome training steps have shown already.
        given: ``(K,)`` int64, candidates of each arm that were proposed as its probes.
        proposed: ``(m,)`` the candidates that were proposed last.
        asked: ``(m,)`` the arm of each of them.
    """

    index: int
    open: OpenArms
    pulls_left: int
    captured: Tensor
    given: Tensor
    proposed: Tensor = field(default_factory=lambda: NO_IDS)
    asked: Tensor = field(default_factory=lambda: NO_IDS)


class UCBSelector(Selector):
    r"""Pulls the groups of the pool as arms of a bandit, and trains on those that promise most; the policy of Quad.

    A pull measures ``probes`` candidates of an arm. Its outcome is their mean influence, in standard errors above
    that of random candidates: ``controls`` of these are measured in every round, and with :math:`m` and :math:`s` the
    running mean and sd of their influence,

    .. math:: \rho = \frac{\bar I_\text{probes} - m}{s / \sqrt{n_\text{probes}}}

    Level and scale of influence change while the model learns; what ``alpha`` and ``tau`` mean does not: an outcome of
    0 is as good as random data, and one above 1 is what random data would show one time in six.

    Each round pulls ``pulls`` arms, by the largest

    .. math:: CS_i = \bar\rho_i + \alpha\sqrt{2 \ln(\textstyle\sum_j T_j) / T_i}

    first, ``at_once`` of them before their outcomes are looked at. Arms that were never credited come before all
    others, in a seeded order. Then the ``arms`` largest CS share the budget evenly, among arms whose mean reward is at
    least ``tau``; arms that were never credited fill up what these leave, so that the first good arm is not all there
    is.

    Where training itself shows the influence of what it trains on (:meth:`overhear`), arms of the mixture need no
    probes: pulls go to the others.

    An arm is walked in one seeded order, by probes and by training alike, and no candidate is trained on again before
    the pool is used up. An arm with nothing left is retired, and none is asked for a candidate twice in a round.

    Args:
        alpha: width of the confidence bound. Twice the sd of an outcome in theory, 0.3 to 0.5 in simulations; 0 never
            explores.
        pulls: arms pulled in each round.
        at_once: arms pulled before their outcomes are looked at; with several ranks, enough to keep them all busy.
        probes: candidates measured in a pull.
        controls: random candidates measured in each round. 0 measures none, and counts rewards in units of the running
            root mean square of outcomes: cheaper, and only for influence whose level is near zero.
        arms: how many arms share the budget; more take part when these hold too little.
        gamma: largest share of an arm that one round may train on, above 0 and up to 1.
        tau: mean reward below which an arm is not trained on while others suffice; None accepts all.
        discount: what remains of old rewards and pulls in each round. Below 1 it follows change, and explores again
            what it forgot; ``1 / (1 - discount)`` rounds must be many more than the arms divided by ``pulls``.
        cutoff: cosine distance up to which neighbours share outcomes, where the pool knows distances; None for no
            sharing.
        released: the bound and the neighbour counts of the released code of Quad.
        prior: scores that divide the groups into the cells of :class:`~liveselect.selectors.MixtureSelector`, which are
            the arms then, and share no outcomes with neighbours; None for groups as arms.
        parts: how many, of equal size.

    Source: Zhang et al. 2025, "Harnessing Diversity for Important Data Selection in Pretraining Large Language Models"
    (Quad), arXiv 2409.16986; the bound of Auer, Cesa-Bianchi and Fischer 2002.
    """

    needs_estimator = True
    uses_groups = True

    def __init__(
        self,
        alpha: float = 0.5,
        pulls: int = 8,
        at_once: int = 4,
        probes: int = 8,
        controls: int = 16,
        arms: int = 8,
        gamma: float = 1.0,
        tau: float | None = 0.0,
        discount: float = 1.0,
        cutoff: float | None = 0.2,
        released: bool = False,
        prior: Any = None,
        parts: int = 5,
    ) -> None:
        check_plain(UCBSelector, locals())
        if alpha < 0:
            raise ValueError(f"expected alpha, the width of the confidence bound, of at least 0, got {alpha}")
        for name, value in {"pulls": pulls, "at_once": at_once, "probes": probes, "arms": arms}.items():
            if value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if controls == 1 or controls < 0:
            raise ValueError(f"expected 0 controls, or at least 2 to see how influence varies, got {controls}")
        for name, share in {"gamma": gamma, "discount": discount}.items():
            if not 0.0 < share <= 1.0:
                raise ValueError(f"expected {name} above 0 and up to 1, got {share}")
        if cutoff is not None and cutoff <= 0:
            raise ValueError(f"expected a positive cutoff, or None to share nothing among neighbours, got {cutoff}")
        self.alpha = alpha
        self.pulls = pulls
        self.at_once = at_once
        self.probes = probes
        self.controls = controls
        self.arms = arms
        self.gamma = gamma
        self.tau = tau
        self.discount = discount
        self.cutoff = cutoff
        self.released = released
        self._division = Division(prior, parts)
        self._cells: Cells | None = None  # where a prior divides the groups
        self._arms: Arms | None = None
        self._round: _Round | None = None
        self._fingerprint: str | None = None
        self._rewards = Rewards(0, probes, controls > 0, released)
        self._cursors = torch.zeros(0, dtype=torch.int64)
        self._captured: list[tuple[Tensor, Tensor]] = []  # since the last round

    # ---- propose, observe, select --------------------------------------------------------------------------------

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores of the prior, where they are those of the run's own data."""
        self._division.prepare(source, meter)

    def cost_before_training(self) -> CostByPhase:
        """Return what making the scores of the prior cost."""
        return self._division.cost

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates have a score above -inf, ``(size,)`` bool; None for all."""
        return self._division.eligible(pool)

    def check(self, round: Round, budget: int) -> None:
        """Raise what the first round would of the arms, and of the state of a checkpoint; warn as of few candidates."""
        wanted = self.pulls * self.probes + self.controls
        warn_of_few(round.pool, wanted, f"pulls={self.pulls} of probes={self.probes} and controls={self.controls}")
        self._check_arms(self._arms_of(round))
        self._weigh_neighbours(round.pool)

    def propose(self, round: Round) -> Tensor:
        """Return the probes of the next arms, ``(m,)``, controls first; ``(0,)`` when the round's pulls are spent."""
        current = self._enter(round)
        number = min(self.at_once, current.pulls_left)
        ties = round.generator(f"pull {current.pulls_left}")
        left = current.open.room - current.given  # nothing is measured twice in a round
        arms = top_arms(self._scores(), number, ties, (left > 0) & ~current.captured).tolist()
        if not arms:
            return NO_IDS
        ids = [self._draw_controls(round) if current.pulls_left == self.pulls else NO_IDS]
        asked = [torch.full_like(ids[0], CONTROL)]
        for arm in arms:
            count = min(self.probes, int(left[arm]))
            probes, self._cursors[arm] = current.open.next_probes(arm, count, int(self._cursors[arm]))
            current.given[arm] += len(probes)
            ids.append(probes)
            asked.append(torch.full_like(probes, arm))
        current.pulls_left -= len(arms)
        current.proposed, current.asked = torch.cat(ids), torch.cat(asked)
        return current.proposed

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Credit the influence ``(m,)`` of proposed ``ids (m,)``.

        Raises:
            ValueError: these were not proposed.
        """
        current = self._round
        if current is None or not torch.isin(ids, current.proposed).all():
            raise ValueError(f"expected the influence of proposed candidates, got that of {len(ids)} others")
        answered = torch.isin(current.proposed, ids)  # a control may be a probe as well, and counts as both
        order = ids.argsort()
        place = order[torch.searchsorted(ids[order], current.proposed[answered])]
        self._rewards.credit(current.asked[answered], influence.double()[place])

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Keep the influence ``(m,)`` of candidates ``ids (m,)`` that were trained on since the last round.

        The next round credits their arms, each with one pull, against the level of the controls of the last round, and
        spends its own pulls on other arms. So they should be measured as that round measured: with its model, against
        its reference gradient.
        """
        self._captured.append((ids.cpu(), influence.double().cpu()))

    def select(self, round: Round, budget: int) -> Selection:
        """Share ``budget`` among the arms that promise most."""
        current = self._enter(round)
        room, means = current.open.room, self._rewards.means
        known = self._rewards.known & (room > 0)
        if not known.any():
            return uniform_selection(round, budget, because="no arm has a reward yet")
        notes: tuple[str, ...] = ()
        accepted = known & (means >= (-math.inf if self.tau is None else self.tau))
        counts, spilled = self._share_out(round, current, accepted, known, budget)
        if 2 * spilled > budget:
            notes = (
                f"{spilled} of {budget} candidates go beyond tau or gamma: the {int(accepted.sum())} arms with a mean "
                "reward of at least tau hold too few",
            )
        chosen = {arm: current.open.first(arm, int(counts[arm])) for arm in counts.nonzero().flatten().tolist()}
        scored = self._rewards.known.nonzero().flatten()
        return Selection(
            torch.cat(list(chosen.values())),
            scored=_shown(round.pool.geometry if self._cells is None else None, current.open.arms, chosen)[scored],
            scores=means[scored].float(),
            metrics={
                **self._metrics(room > 0, accepted, counts),
                "arms/overheard": float(current.captured.sum()),
                "spilled": float(spilled),
            },
            group_metrics=self._by_group(round.pool),
            notes=notes,
        )

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return rewards, pulls, units, cursors and what steps have shown; orders follow from the seed."""
        return {
            "fingerprint": self._fingerprint,
            "scores": None if self._fingerprint is None else self._division.digest,
            "unit": self._unit,
            "rewards": self._rewards.state_dict(),
            "cursors": self._cursors.clone(),
            "captured": [[ids.clone(), influence.clone()] for ids, influence in self._captured],
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`check` refuses arms that are not those of the state.

        Raises:
            ValueError: the rewards of the state are in another unit.
        """
        if state["fingerprint"] is not None and state.get("unit", self._unit) != self._unit:
            raise ValueError(
                f"the checkpoint holds rewards {state['unit']}, this run counts them {self._unit}, and the two cannot "
                "be added up: resume with the probes and controls that the run began with, or start a new run"
            )
        self._division.expect(state.get("scores"))
        self._arms = self._round = None
        self._captured = [(ids.clone(), influence.clone()) for ids, influence in state["captured"]]
        self._fingerprint = state["fingerprint"]
        self._rewards.load_state_dict(state["rewards"])
        self._cursors = state["cursors"].clone()

    @property
    def _unit(self) -> str:
        return f"in standard errors of {self.probes} probes" if self.controls else "in their root mean square"

    # ---- parts of a round --------------------------------------------------------------------------------------

    def _enter(self, round: Round) -> _Round:
        """Return the round in the making, begun when it is new."""
        if self._cells is not None and self._division.cells(round.pool) is not self._cells:
            self._arms = None  # the reference set has changed, and with it the prior
        if self._arms is None:
            self._arms = self._open_arms(round)
        if self._round is not None and self._round.index == round.index:
            if int(self._round.open.room.sum()) != len(round.candidates):  # a prior lets more through for the choice
                self._round.open = OpenArms(self._arms, round.candidates, round.pool.uses)
            return self._round
        self._rewards.forget(self.discount)
        is_open = OpenArms(self._arms, round.candidates, round.pool.uses)
        captured = self._credit_captured(self._arms)
        self._round = _Round(round.index, is_open, self.pulls, captured, torch.zeros_like(is_open.room))
        return self._round

    def _credit_captured(self, arms: Arms) -> Tensor:
        """Credit what training steps have shown of their arms; return which these are, ``(K,)`` bool."""
        shown = torch.zeros(len(arms), dtype=torch.bool)
        if self._captured and self._rewards.moments is not None:
            ids, influence = (torch.cat(parts) for parts in zip(*self._captured, strict=True))
            codes = arms.codes[ids].long()
            shown[codes] = True
            self._rewards.credit(codes, influence)
        self._captured.clear()
        return shown

    def _open_arms(self, round: Round) -> Arms:
        arms = self._arms_of(round)
        if self._fingerprint is None:
            self._fingerprint = arms.fingerprint
            self._rewards = Rewards(len(arms), self.probes, self.controls > 0, self.released)
            self._cursors = torch.zeros(len(arms), dtype=torch.int64)
        self._check_arms(arms)
        self._rewards.neighbours = self._weigh_neighbours(round.pool)
        return arms

    def _arms_of(self, round: Round) -> Arms:
        if not self._division.has_prior:
            return Arms.of(round.pool, round.seed)
        self._cells = self._division.cells(round.pool)
        return Arms.of_cells(self._cells, round.seed)

    def _by_group(self, pool: CandidatePool) -> dict[str, Tensor]:
        """Return what is known of each group, ``(G,)`` each; of one that is several arms, their mean and their sum."""
        rewards = self._rewards
        if self._cells is None:
            means = torch.where(rewards.known, rewards.means, torch.nan)
            return {"reward": means, "pulls": rewards.pulls, "bonus": rewards.bonus(self.alpha)}
        groups, count = self._cells.groups, len(pool.group_names)
        pulls = torch.bincount(groups, rewards.pulls, count)
        return {"reward": torch.bincount(groups, rewards.sums, count) / pulls, "pulls": pulls}

    def _check_arms(self, arms: Arms) -> None:
        """Refuse arms that are not those of the state."""
        if self._fingerprint not in (None, arms.fingerprint):
            raise ValueError(
                f"the checkpoint was made with the arms {self._fingerprint}, this run has {arms.fingerprint}: its "
                "rewards would mean other texts. Pass the groups (clusters) that the run began with, or start a new run"
            )

    def _weigh_neighbours(self, pool: CandidatePool) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return who learns from whom, see :func:`~liveselect.functional.bandit.credit_pulls`."""
        geometry = pool.geometry
        if geometry is None or self.cutoff is None or self._division.has_prior:
            return None
        if self.cutoff > geometry.reach:
            raise ValueError(
                f"neighbours up to the distance {self.cutoff} (cutoff) should share outcomes, but the clusters "
                f"list them only up to {geometry.reach}: lower the cutoff, or cluster again with a larger --reach"
            )
        return geometry.starts, geometry.columns, neighbour_weights(geometry.distances.double(), self.cutoff)

    def _draw_controls(self, round: Round) -> Tensor:
        number = min(self.controls, len(round.candidates))
        return round.candidates[uniform_subset(len(round.candidates), number, round.generator("controls"))]

    def _scores(self) -> Tensor:
        return self._rewards.means + self._rewards.bonus(self.alpha)

    def _share_out(
        self, round: Round, current: _Round, accepted: Tensor, known: Tensor, budget: int
    ) -> tuple[Tensor, int]:
        """Return how many candidates each arm gives, ``(K,)``, and how many of them are beyond what was meant."""
        room = current.open.room
        quota = torch.minimum(room, (self.gamma * current.open.arms.sizes).ceil().long())
        ties, scores = round.generator("mixture"), self._scores()
        if round.offset is not None:
            scores = scores + self._offset(round, len(room))
        order = top_arms(scores, len(room), ties, accepted)
        missing = max(0, self.arms - len(order))
        order = torch.cat([order, top_arms(scores, missing, ties, ~self._rewards.known & (room > 0))])
        enough = int((quota[order].cumsum(0) < budget).sum()) + 1
        weights = torch.zeros(len(room), dtype=torch.float64)
        weights[order[: max(self.arms, enough)]] = 1.0
        counts = allocate(weights, quota, budget)
        spilled = budget - int(counts.sum())
        for fallback in (accepted, known, room > 0):
            counts += allocate(fallback.double(), room - counts, budget - int(counts.sum()))
        return counts, spilled

    def _offset(self, round: Round, arms: int) -> Tensor:
        """Return what a prior adds to the reward of each arm, ``(K,)``: the mean over the arm's candidates."""
        if self._arms is None or round.offset is None:
            return torch.zeros(arms, dtype=torch.float64)
        codes, offset = self._arms.codes[round.candidates].long(), round.offset[round.candidates].double()
        sums, counts = torch.bincount(codes, offset, arms), torch.bincount(codes, minlength=arms)
        return sums / counts.clamp(min=1)

    def _metrics(self, open_arms: Tensor, accepted: Tensor, counts: Tensor) -> dict[str, float]:
        metrics = {
            "arms/open": float(open_arms.sum()),
            "arms/retired": float((~open_arms).sum()),
            "arms/known": float(self._rewards.known.sum()),
            "arms/accepted": float(accepted.sum()),
            "arms/trained": float((counts > 0).sum()),
            "arms/largest_share": float(counts.max() / counts.sum()),
            "pulls": float(self._rewards.pulls.sum()),
        }
        if self._rewards.moments is not None:
            level, variance = self._rewards.moments
            metrics |= {"influence/level": level, "influence/spread": math.sqrt(variance)}
        return metrics


def _shown(geometry: GroupGeometry | None, arms: Arms, chosen: Mapping[int, Tensor]) -> Tensor:
    """Return one candidate to show for each arm, ``(K,)``: a chosen one where there is any."""
    shown = arms.first_members() if geometry is None else geometry.typical.clone()
    for arm, ids in chosen.items():
        shown[arm] = ids[0 if geometry is None else int(geometry.offsets[ids].argmin())]
    return shown
