"""Bandit selection: groups of candidates are arms, pulled by upper confidence bounds on their influence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liveselect.functional.bandit import allocate, neighbour_weights, top_arms
from liveselect.functional.sampling import uniform_subset
from liveselect.protocols import RoundContext, Selection
from liveselect.selectors.arms import Arms, OpenArms
from liveselect.selectors.leftovers import fill_up
from liveselect.selectors.rewards import CONTROL, Rewards
from liveselect.selectors.uniform import check_budget, training_order, uniform_selection


@dataclass
class _Round:
    """One round in the making.

    Attributes:
        index: of the round.
        open: what may be taken from each arm.
        pulls_left: arms that may still be pulled.
        heard: ``(K,)`` bool, arms whose outcome training has shown already.
        given: ``(K,)`` int64, candidates of each arm that were proposed as its probes.
        asked: ``(m,)`` the arm of each candidate that was proposed last.
        dropped: influences that were not finite.
    """

    index: int
    open: OpenArms
    pulls_left: int
    heard: Tensor
    given: Tensor
    asked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    dropped: int = 0


class UCBSelector:
    r"""Pulls the groups of the pool as arms of a bandit, and trains on those that promise most; the policy of Quad.

    A pull measures ``probes`` candidates of an arm. Its outcome is their mean influence, told in standard errors above
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
        controls: random candidates measured in each round. 0 measures none, and tells rewards in units of the running
            root mean square of outcomes: cheaper, and only for influence whose level is near zero.
        arms: how many arms share the budget; more take part when these hold too little.
        gamma: largest share of an arm that one round may train on, above 0 and up to 1.
        tau: mean reward below which an arm is not trained on while others suffice; None accepts all.
        discount: what remains of old rewards and pulls in each round. Below 1 it follows change, and explores again
            what it forgot; ``1 / (1 - discount)`` rounds must be many more than the arms divided by ``pulls``.
        cutoff: cosine distance up to which neighbours share outcomes, where the pool knows distances; None for no
            sharing.
        released: the bound and the neighbour counts of the released code of Quad.

    Source: Zhang et al. 2025, "Harnessing Diversity for Important Data Selection in Pretraining Large Language Models"
    (Quad), arXiv 2409.16986; the bound of Auer, Cesa-Bianchi and Fischer 2002.
    """

    measures = True
    """It proposes candidates, so a run of it needs an estimator."""

    uses_groups = True
    """It chooses by the groups of the pool, so what making them cost is a cost of its runs."""

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
    ) -> None:
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
        self._arms: Arms | None = None
        self._round: _Round | None = None
        self._fingerprint: str | None = None
        self._rewards = Rewards(0, probes, controls > 0, released)
        self._cursors = torch.zeros(0, dtype=torch.int64)
        self._overheard: list[tuple[Tensor, Tensor]] = []  # since the last round

    # ---- ask, tell, choose -------------------------------------------------------------------------------------

    def check(self, context: RoundContext) -> None:
        """Raise what the first round would of the arms, and of the state of a checkpoint."""
        self._check_arms(Arms.of(context.source, context.seed))
        self._weigh_neighbours(context)

    def propose(self, context: RoundContext) -> Tensor:
        """Return the probes of the next arms, ``(m,)``, controls first; ``(0,)`` when the round's pulls are spent."""
        current = self._enter(context)
        number = min(self.at_once, current.pulls_left)
        ties = context.generator(f"pull {current.pulls_left}")
        left = current.open.room - current.given  # nothing is measured twice in a round
        arms = top_arms(self._scores(), number, ties, (left > 0) & ~current.heard).tolist()
        if not arms:
            return torch.empty(0, dtype=torch.int64)
        ids = [self._draw_controls(context) if current.pulls_left == self.pulls else current.asked[:0]]
        asked = [torch.full_like(ids[0], CONTROL)]
        for arm in arms:
            count = min(self.probes, int(left[arm]))
            probes, self._cursors[arm] = current.open.next_probes(arm, count, int(self._cursors[arm]))
            current.given[arm] += len(probes)
            ids.append(probes)
            asked.append(torch.full_like(probes, arm))
        current.pulls_left -= len(arms)
        current.asked = torch.cat(asked)
        return torch.cat(ids)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Credit the influence ``(m,)`` of the proposed ``ids (m,)``; what is not finite is left out.

        Raises:
            ValueError: these are not as many as were proposed.
        """
        current = self._round
        asked = 0 if current is None else len(current.asked)
        if current is None or len(influence) != asked:
            raise ValueError(f"expected the influence of the {asked} proposed candidates, got {len(influence)}")
        finite = influence.isfinite()
        current.dropped += int((~finite).sum())
        self._rewards.credit(current.asked[finite], influence[finite].double())

    def overhear(self, ids: Tensor, influence: Tensor) -> None:
        """Take note of the influence ``(m,)`` of candidates ``ids (m,)`` that were trained on since the last round.

        The next round credits their arms, each with one pull, against the level of the controls of the last round, and
        spends its own pulls on other arms. So they should be measured as that round measured: with its model, against
        its reference gradient. What is not finite is left out.
        """
        finite = influence.isfinite()
        self._overheard.append((ids[finite].cpu(), influence[finite].double().cpu()))

    def select(self, context: RoundContext, budget: int) -> Selection:
        """Share ``budget`` among the arms that promise most, in random training order.

        Raises:
            ValueError: there are fewer candidates than the budget.
        """
        check_budget(context, budget)
        return fill_up(context, budget, self._choose)

    def _choose(self, context: RoundContext, budget: int) -> Selection:
        current = self._enter(context)
        room, means = current.open.room, self._rewards.means
        known = self._rewards.known & (room > 0)
        notes: tuple[str, ...] = ()
        if current.dropped:
            notes = (f"{current.dropped} measured influences are not finite and were left out",)
        if not known.any():
            return uniform_selection(context, budget, {}, (*notes, "drawn uniformly: no arm has a reward yet"))
        accepted = known & (means >= (-math.inf if self.tau is None else self.tau))
        counts, spilled = self._share_out(context, current, accepted, known, budget)
        if 2 * spilled > budget:
            notes += (
                f"{spilled} of {budget} candidates go beyond tau or gamma: the {int(accepted.sum())} arms with a mean "
                "reward of at least tau hold too few",
            )
        chosen = {arm: current.open.first(arm, int(counts[arm])) for arm in counts.nonzero().flatten().tolist()}
        scored = self._rewards.known.nonzero().flatten()
        return Selection(
            training_order(context, torch.cat(list(chosen.values()))),
            scored=_shown(context, current.open.arms, chosen)[scored],
            scores=means[scored].float(),
            metrics={
                **self._metrics(room > 0, accepted, counts),
                "arms/overheard": float(current.heard.sum()),
                "spilled": float(spilled),
            },
            group_metrics={
                "reward": torch.where(self._rewards.known, means, torch.nan),
                "pulls": self._rewards.pulls,
                "bonus": self._rewards.bonus(self.alpha),
            },
            notes=notes,
        )

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return rewards, pulls, units, cursors and what was overheard; the orders of the arms follow from the seed."""
        return {
            "fingerprint": self._fingerprint,
            "unit": self._unit,
            "rewards": self._rewards.state_dict(),
            "cursors": self._cursors.clone(),
            "overheard": [[ids.clone(), influence.clone()] for ids, influence in self._overheard],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`check` refuses arms that are not those of the state.

        Raises:
            ValueError: the rewards of the state were told in another unit.
        """
        if state["fingerprint"] is not None and state.get("unit", self._unit) != self._unit:
            raise ValueError(
                f"the checkpoint told rewards {state['unit']}, this run tells them {self._unit}, and the two cannot be "
                "added up: resume with the probes and controls that the run began with, or start a new run"
            )
        self._arms = self._round = None
        self._overheard = [(ids.clone(), influence.clone()) for ids, influence in state["overheard"]]
        self._fingerprint = state["fingerprint"]
        self._rewards.load_state_dict(state["rewards"])
        self._cursors = state["cursors"].clone()

    @property
    def _unit(self) -> str:
        return f"in standard errors of {self.probes} probes" if self.controls else "in their root mean square"

    # ---- parts of a round --------------------------------------------------------------------------------------

    def _enter(self, context: RoundContext) -> _Round:
        """Return the round of the context, begun when it is new."""
        if self._arms is None:
            self._arms = self._open_arms(context)
        if self._round is not None and self._round.index == context.round:
            if int(self._round.open.room.sum()) != len(context.candidates):  # a prior lets more through for the choice
                self._round.open = OpenArms(self._arms, context.candidates, context.source.pool.uses)
            return self._round
        self._rewards.forget(self.discount)
        is_open = OpenArms(self._arms, context.candidates, context.source.pool.uses)
        heard = self._credit_overheard(self._arms)
        self._round = _Round(context.round, is_open, self.pulls, heard, torch.zeros_like(is_open.room))
        return self._round

    def _credit_overheard(self, arms: Arms) -> Tensor:
        """Credit what training has shown of its arms; return which these are, ``(K,)`` bool."""
        heard = torch.zeros(len(arms), dtype=torch.bool)
        if self._overheard and self._rewards.moments is not None:
            ids, influence = (torch.cat(parts) for parts in zip(*self._overheard, strict=True))
            codes = arms.codes[ids].long()
            heard[codes] = True
            self._rewards.credit(codes, influence)
        self._overheard.clear()
        return heard

    def _open_arms(self, context: RoundContext) -> Arms:
        arms = Arms.of(context.source, context.seed)
        if self._fingerprint is None:
            self._fingerprint = arms.fingerprint
            self._rewards = Rewards(len(arms), self.probes, self.controls > 0, self.released)
            self._cursors = torch.zeros(len(arms), dtype=torch.int64)
        self._check_arms(arms)
        self._rewards.neighbours = self._weigh_neighbours(context)
        return arms

    def _check_arms(self, arms: Arms) -> None:
        """Refuse arms that are not those of the state."""
        if self._fingerprint not in (None, arms.fingerprint):
            raise ValueError(
                f"the checkpoint was made with the arms {self._fingerprint}, this run has {arms.fingerprint}: its "
                "rewards would mean other texts. Pass the groups (clusters) that the run began with, or start a new run"
            )

    def _weigh_neighbours(self, context: RoundContext) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return who learns from whom, see :func:`~liveselect.functional.bandit.credit_pulls`."""
        geometry = context.source.pool.geometry
        if geometry is None or self.cutoff is None:
            return None
        if self.cutoff > geometry.reach:
            raise ValueError(
                f"neighbours up to the distance {self.cutoff} (cutoff) should share outcomes, but the clusters "
                f"list them only up to {geometry.reach}: lower the cutoff, or cluster again with a larger --reach"
            )
        return geometry.starts, geometry.columns, neighbour_weights(geometry.distances.double(), self.cutoff)

    def _draw_controls(self, context: RoundContext) -> Tensor:
        number = min(self.controls, len(context.candidates))
        return context.candidates[uniform_subset(len(context.candidates), number, context.generator("controls"))]

    def _scores(self) -> Tensor:
        return self._rewards.means + self._rewards.bonus(self.alpha)

    def _share_out(
        self, context: RoundContext, current: _Round, accepted: Tensor, known: Tensor, budget: int
    ) -> tuple[Tensor, int]:
        """Return how many candidates each arm gives, ``(K,)``, and how many of them are beyond what was meant."""
        room = current.open.room
        quota = torch.minimum(room, (self.gamma * current.open.arms.sizes).ceil().long())
        ties = context.generator("mixture")
        order = top_arms(self._scores(), len(room), ties, accepted)
        missing = max(0, self.arms - len(order))
        order = torch.cat([order, top_arms(self._scores(), missing, ties, ~self._rewards.known & (room > 0))])
        enough = int((quota[order].cumsum(0) < budget).sum()) + 1
        weights = torch.zeros(len(room), dtype=torch.float64)
        weights[order[: max(self.arms, enough)]] = 1.0
        counts = allocate(weights, quota, budget)
        spilled = budget - int(counts.sum())
        for fallback in (accepted, known, room > 0):
            counts += allocate(fallback.double(), room - counts, budget - int(counts.sum()))
        return counts, spilled

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


def _shown(context: RoundContext, arms: Arms, chosen: Mapping[int, Tensor]) -> Tensor:
    """Return one candidate to show for each arm, ``(K,)``: a chosen one where there is any."""
    geometry = context.source.pool.geometry
    shown = arms.first_members() if geometry is None else geometry.typical.clone()
    for arm, ids in chosen.items():
        shown[arm] = ids[0 if geometry is None else int(geometry.offsets[ids].argmin())]
    return shown
