"""Bandit selection: groups of candidates are arms, pulled by upper confidence bounds on their influence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liveselect.functional.bandit import (
    allocate,
    arm_means,
    credit_pulls,
    exploration_bonus,
    follow_moments,
    neighbour_weights,
    top_arms,
    ucb_scores,
)
from liveselect.functional.sampling import uniform_subset
from liveselect.protocols import RoundContext, Selection
from liveselect.selectors.arms import Arms, OpenArms
from liveselect.selectors.uniform import check_budget, training_order, uniform_selection

CONTROL = -1
"""Stands for the arm of a candidate that was measured as a control."""


@dataclass
class _Round:
    """One round in the making.

    Attributes:
        index: of the round.
        open: what may be taken from each arm.
        pulls_left: arms that may still be pulled.
        asked: ``(m,)`` the arm of each candidate that was proposed last.
        dropped: influences that were not finite.
    """

    index: int
    open: OpenArms
    pulls_left: int
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
    least ``tau``.

    An arm is walked in one seeded order, by probes and by training alike, and no candidate is trained on again before
    the pool is used up. An arm with nothing left is retired.

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
        self._neighbours: tuple[Tensor, Tensor, Tensor] | None = None
        self._round: _Round | None = None
        self._fingerprint: str | None = None
        self._rewards = self._pulls = torch.zeros(0, dtype=torch.float64)
        self._cursors = torch.zeros(0, dtype=torch.int64)
        self._moments: tuple[float, float] | None = None

    # ---- ask, tell, choose -------------------------------------------------------------------------------------

    def propose(self, context: RoundContext) -> Tensor:
        """Return the probes of the next arms, ``(m,)``, controls first; ``(0,)`` when the round's pulls are spent."""
        current = self._enter(context)
        scores = ucb_scores(self._rewards, self._pulls, self.alpha, self.released)
        number = min(self.at_once, current.pulls_left)
        ties = context.generator(f"pull {current.pulls_left}")
        arms = top_arms(scores, number, ties, current.open.room > 0).tolist()
        if not arms:
            return torch.empty(0, dtype=torch.int64)
        ids = [self._draw_controls(context) if current.pulls_left == self.pulls else current.asked[:0]]
        asked = [torch.full_like(ids[0], CONTROL)]
        for arm in arms:
            probes, self._cursors[arm] = current.open.next_probes(arm, self.probes, int(self._cursors[arm]))
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
        self._credit(current.asked[finite], influence[finite].double())

    def select(self, context: RoundContext, budget: int) -> Selection:
        """Share ``budget`` among the arms that promise most, in random training order.

        Raises:
            ValueError: there are fewer candidates than the budget.
        """
        check_budget(context, budget)
        current = self._enter(context)
        room, means = current.open.room, arm_means(self._rewards, self._pulls)
        known = (self._pulls > 0) & (room > 0)
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
        scored = (self._pulls > 0).nonzero().flatten()
        return Selection(
            training_order(context, torch.cat(list(chosen.values()))),
            scored=_shown(context, current.open.arms, chosen)[scored],
            scores=means[scored].float(),
            metrics={**self._metrics(room > 0, accepted, counts), "spilled": float(spilled)},
            group_metrics={
                "reward": torch.where(self._pulls > 0, means, torch.nan),
                "pulls": self._pulls,
                "bonus": exploration_bonus(self._pulls, self.alpha, self.released),
            },
            notes=notes,
        )

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return rewards, pulls, cursors and units; the orders of the arms follow from the seed."""
        return {
            "fingerprint": self._fingerprint,
            "rewards": self._rewards.clone(),
            "pulls": self._pulls.clone(),
            "cursors": self._cursors.clone(),
            "moments": None if self._moments is None else list(self._moments),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the next round refuses arms that are not those of the state."""
        self._arms = self._round = None
        self._fingerprint = state["fingerprint"]
        self._rewards, self._pulls = state["rewards"].clone(), state["pulls"].clone()
        self._cursors = state["cursors"].clone()
        self._moments = None if state["moments"] is None else (state["moments"][0], state["moments"][1])

    # ---- parts of a round --------------------------------------------------------------------------------------

    def _enter(self, context: RoundContext) -> _Round:
        """Return the round of the context, begun when it is new."""
        if self._round is not None and self._round.index == context.round:
            return self._round
        if self._arms is None:
            self._arms = self._open_arms(context)
        self._rewards = self._rewards * self.discount
        self._pulls = self._pulls * self.discount
        is_open = OpenArms(self._arms, context.candidates, context.source.pool.uses)
        self._round = _Round(context.round, is_open, self.pulls)
        return self._round

    def _open_arms(self, context: RoundContext) -> Arms:
        arms = Arms.of(context.source, context.seed)
        if self._fingerprint is None:
            self._fingerprint = arms.fingerprint
            self._rewards = self._pulls = torch.zeros(len(arms), dtype=torch.float64)
            self._cursors = torch.zeros(len(arms), dtype=torch.int64)
        elif self._fingerprint != arms.fingerprint:
            raise ValueError(
                f"the checkpoint was made with the arms {self._fingerprint}, this run has {arms.fingerprint}: its "
                "rewards would mean other texts. Pass the groups (clusters) that the run began with, or start a new run"
            )
        geometry = context.source.pool.geometry
        if geometry is not None and self.cutoff is not None:
            if self.cutoff > geometry.reach:
                raise ValueError(
                    f"neighbours up to the distance {self.cutoff} (cutoff) should share outcomes, but the clusters "
                    f"list them only up to {geometry.reach}: lower the cutoff, or cluster again with a larger --reach"
                )
            weights = neighbour_weights(geometry.distances.double(), self.cutoff)
            self._neighbours = (geometry.starts, geometry.columns, weights)
        return arms

    def _draw_controls(self, context: RoundContext) -> Tensor:
        number = min(self.controls, len(context.candidates))
        return context.candidates[uniform_subset(len(context.candidates), number, context.generator("controls"))]

    def _credit(self, asked: Tensor, influence: Tensor) -> None:
        """Turn influence ``(m,)`` of candidates of the arms ``asked (m,)`` into rewards."""
        controls, probes = influence[asked == CONTROL], asked != CONTROL
        arms, place = asked[probes].unique(return_inverse=True)
        outcomes = torch.zeros(len(arms), dtype=torch.float64).index_add_(0, place, influence[probes])
        outcomes /= place.bincount(minlength=len(arms))
        if self.controls and len(controls):
            self._moments = follow_moments(self._moments, controls)
        elif not self.controls and len(outcomes):
            self._moments = follow_moments(self._moments, outcomes, center=0.0)
        if self._moments is None:
            return
        level, variance = self._moments
        unit = math.sqrt(variance / self.probes if self.controls else variance)
        credit_pulls(
            self._rewards, self._pulls, arms, (outcomes - level) / (unit or 1.0), self._neighbours, self.released
        )

    def _share_out(
        self, context: RoundContext, current: _Round, accepted: Tensor, known: Tensor, budget: int
    ) -> tuple[Tensor, int]:
        """Return how many candidates each arm gives, ``(K,)``, and how many of them are beyond what was meant."""
        room = current.open.room
        quota = torch.minimum(room, (self.gamma * current.open.arms.sizes).ceil().long())
        scores = ucb_scores(self._rewards, self._pulls, self.alpha, self.released)
        order = top_arms(scores, len(scores), context.generator("mixture"), accepted)
        enough = int((quota[order].cumsum(0) < budget).sum()) + 1
        weights = torch.zeros(len(scores), dtype=torch.float64)
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
            "arms/known": float((self._pulls > 0).sum()),
            "arms/accepted": float(accepted.sum()),
            "arms/trained": float((counts > 0).sum()),
            "arms/largest_share": float(counts.max() / counts.sum()),
            "pulls": float(self._pulls.sum()),
        }
        if self._moments is not None:
            metrics["influence/level"] = self._moments[0]
            metrics["influence/spread"] = math.sqrt(self._moments[1])
        return metrics


def _shown(context: RoundContext, arms: Arms, chosen: Mapping[int, Tensor]) -> Tensor:
    """Return one candidate to show for each arm, ``(K,)``: a chosen one where there is any."""
    geometry = context.source.pool.geometry
    shown = arms.first_members() if geometry is None else geometry.typical.clone()
    for arm, ids in chosen.items():
        shown[arm] = ids[0 if geometry is None else int(geometry.offsets[ids].argmin())]
    return shown
