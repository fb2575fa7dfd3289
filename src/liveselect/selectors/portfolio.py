"""Several policies that compete for a run: the next round follows the one that has gained most for its cost."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.arguments import check_plain
from liveselect.cost import CostMeter, added
from liveselect.functional.contests import Standing, fall_per_step, standing
from liveselect.grammar import (
    NO_IDS,
    CandidateSource,
    Contest,
    CostByPhase,
    Round,
    Selection,
    Selector,
    State,
)
from liveselect.parts import check_part, restore_part, save_part
from liveselect.pool import CandidatePool, split_by_use

_MOST_UNANSWERED = 2


class PortfolioSelector(Selector):
    r"""Finds out in the run which of several policies gains most for its cost, and follows it.

    **Contests.** When a round begins, copies of weights, optimizer and random states follow the other policies for as
    many steps and are thrown away; training itself, on the round's data, is one more. All begin at the same state and
    are judged on the half of the reference set that selection does not see, so that differences are paired. Rounds
    should have hundreds of steps: shorter ones favour what pays at once.

    **Worth.** Least squares takes the level of each contest off the losses; what is left is the worth of a policy,
    and its noise. From it is taken what its cost would buy: as many steps of training as it costs, in each of which the
    loss falls by its present slope.

    **Choice.** A round follows the policy of the largest worth less cost. One whose difference to it is, with one-sided
    95% confidence, below zero is dropped. Contests are held among those that are left, the most uncertain first, until
    one is left or their ``share`` is spent: it may be spent at once, for what is known late is of no use.

    Args:
        policies: selectors by name; the first one is followed until something is known.
        share: of the run's training steps that contests may cost, 0..1; of the steps so far in a run without an end.
        cost: what the cost of policies is counted in. With seconds, two runs may differ.
        confidence_after: contests of a policy before it may be dropped.

    Raises:
        ValueError: fewer than two policies, or one that cannot be compared.
    """

    has_contests = True

    def __init__(
        self,
        policies: Mapping[str, Selector],
        share: float = 0.1,
        cost: Literal["flops", "seconds"] = "flops",
        confidence_after: int = 2,
    ) -> None:
        check_plain(PortfolioSelector, locals())
        if not isinstance(policies, Mapping) or len(policies) < 2:
            raise ValueError(f"expected at least two selectors by name, got {policies!r}")
        for name, policy in policies.items():
            check_part(policy, Selector, f"the policy {name!r}")
            if not policy.engine_orders or policy.has_contests:
                raise ValueError(
                    f"the policy {name!r} is a {type(policy).__name__}, which cannot be one of several: leave it out"
                )
        if not 0 < share < 1:
            raise ValueError(f"expected share, what contests may cost of training, between 0 and 1, got {share}")
        if cost not in ("flops", "seconds"):
            raise ValueError(f"expected cost to be 'flops' or 'seconds', got {cost!r}")
        if confidence_after < 1:
            raise ValueError(f"expected confidence_after of at least 1 contest, got {confidence_after}")
        self.policies = dict(policies)
        self.share = share
        self.cost = cost
        self.confidence_after = confidence_after
        parts = self.policies.values()
        self.needs_estimator = any(policy.needs_estimator for policy in parts)
        self.uses_groups = any(policy.uses_groups for policy in parts)
        self.learns_tokens = any(policy.learns_tokens for policy in parts)
        self.has_share = any(policy.has_share for policy in parts)
        self.following = next(iter(self.policies))
        self.dropped: list[str] = []
        self._results: list[dict[str, float]] = []  # of each contest, the loss of each policy
        self._ends: list[int] = []
        self._prices: list[float] = []  # of each contest, the cost of training in it
        self._lengths: list[int] = []
        self._costs: dict[str, list[float]] = {name: [0.0, 0.0] for name in self.policies}  # sum, rounds
        self._spent = 0.0  # optimizer steps of contests
        self._unanswered = 0  # contests in a row of which nothing was observed
        self._round = -1  # for which it was decided who takes part
        self._entered: list[str] = []
        self._asking: list[str] = []
        self._contestants: dict[str, Tensor] = {}
        self._news: list[str] = []
        self._read = 0.0

    # ---- what the policies say together ------------------------------------------------------------------------------

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Let every policy prepare."""
        for policy in self.policies.values():
            policy.prepare(source, meter)

    def check(self, round: Round, budget: int) -> None:
        """Let every policy check."""
        for policy in self.policies.values():
            policy.check(round, budget)

    def warmup(self) -> Selector | None:
        """Return who chooses for the first policy before anything is measured; itself where it measures nothing."""
        first = next(iter(self.policies.values()))
        return first.warmup() if first.needs_estimator else first

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return what the policy that is followed may choose."""
        return self.policies[self.following].eligible(pool, budget)

    def distinct_share(self) -> float:
        """Return the share that the policy which is followed trains on."""
        return self.policies[self.following].distinct_share()

    def cost_before_training(self) -> CostByPhase:
        """Return the cost of all policies."""
        total: CostByPhase = {}
        for policy in self.policies.values():
            total = added(total, policy.cost_before_training())
        return total

    # ---- a round -----------------------------------------------------------------------------------------------------

    def propose(self, round: Round) -> Tensor:
        """Return what those who take part in this round want measured, one after the other."""
        self._enter(round)
        while self._asking:
            ids = self.policies[self._asking[0]].propose(self._seen_by(self._asking[0], round))
            if len(ids):
                return ids
            self._charge(self._asking.pop(0), round)
        return NO_IDS

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Pass the measurements on to the policy that asked for them."""
        self.policies[self._asking[0]].observe(ids, influence)

    def observe_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Pass the influence of tokens on, if the policy that asked learns from it."""
        if self.policies[self._asking[0]].learns_tokens:
            self.policies[self._asking[0]].observe_tokens(ids, tokens)

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Pass on what training steps have shown, to all."""
        for policy in self.policies.values():
            policy.observe_step(ids, influence)

    def select(self, round: Round, budget: int) -> Selection:
        """Let the policy that is followed choose, and those that compete with it in this round."""
        self._enter(round)
        for name in self._asking:  # what could not be measured
            self._charge(name, round)
        self._asking = []
        chosen = self.policies[self.following].select(round, budget)
        self._charge(self.following, round)
        for name in self._entered:
            self._contestants[name] = self._choose(name, round)
            self._charge(name, round)
        for name in (self.following, *self._entered):
            self._costs[name][1] += 1
        self._spent += len(self._entered) * round.steps
        self._unanswered += bool(self._entered)
        selection = Selection(chosen) if isinstance(chosen, Tensor) else chosen
        news, self._news = self._news, []
        if not self._results and self._entered:
            news.insert(0, f"follows {self.following}, and lets it compete with {', '.join(self._entered)}")
        metrics = {**selection.metrics, **self._metrics(round), "portfolio/contestants": float(len(self._entered))}
        return replace(selection, metrics=metrics, notes=(*selection.notes, *news))

    def contestants(self) -> Mapping[str, Tensor]:
        """Return what the policies that compete in this round would train on."""
        return self._contestants

    def observe_contest(self, contest: Contest) -> None:
        """Compare the policies, drop what is behind for certain, and follow the best."""
        self._unanswered = 0
        self._results.append({**contest.losses, self.following: contest.own})
        self._ends.append(contest.step + contest.steps)
        self._lengths.append(contest.steps)
        self._prices.append(contest.training_flops if self.cost == "flops" else contest.training_seconds)
        names, found = list(self.policies), self._standing()
        net = {name: self._net(name, found) for name in names if name not in self.dropped}
        known = {name: value for name, value in net.items() if not math.isnan(value)}
        best = max(known, key=lambda name: known[name])
        for name, value in known.items():
            took_part = sum(name in result for result in self._results)
            width = found.width(names.index(name), names.index(best))
            if name != best and took_part >= self.confidence_after and value + width < known[best]:
                self.dropped.append(name)
                self._news.append(f"drops {name}: {self._because(best, name, known, found)}")
        if best != self.following:
            self._news.append(
                f"follows {best} in place of {self.following}: {self._because(best, self.following, known, found)}"
            )
            self.following = best

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return what was found, and the state of every policy."""
        return {
            "policies": {name: save_part(policy) for name, policy in self.policies.items()},
            "following": self.following,
            "dropped": list(self.dropped),
            "results": [dict(result) for result in self._results],
            "ends": list(self._ends),
            "lengths": list(self._lengths),
            "prices": list(self._prices),
            "costs": {name: list(cost) for name, cost in self._costs.items()},
            "spent": self._spent,
            "unanswered": self._unanswered,
            "round": self._round,
            "entered": list(self._entered),
            "asking": list(self._asking),
            "contestants": {name: ids.clone() for name, ids in self._contestants.items()},
            "news": list(self._news),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore it; raise ValueError when the checkpoint's policies are others."""
        if list(state["policies"]) != list(self.policies):
            raise ValueError(
                f"the checkpoint's policies are {list(state['policies'])}, those of this run {list(self.policies)}: "
                "resume with the policies that the run began with"
            )
        for name, policy in self.policies.items():
            restore_part(policy, state["policies"][name], f"policy {name!r}")
        self.following, self.dropped = state["following"], list(state["dropped"])
        self._results, self._ends = [dict(each) for each in state["results"]], list(state["ends"])
        self._lengths, self._prices = list(state["lengths"]), list(state["prices"])
        self._costs = {name: list(cost) for name, cost in state["costs"].items()}
        self._spent, self._round, self._unanswered = state["spent"], state["round"], state["unanswered"]
        self._entered, self._asking = list(state["entered"]), list(state["asking"])
        self._contestants, self._news = dict(state["contestants"]), list(state["news"])

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _enter(self, round: Round) -> None:
        """Decide who takes part in a round, once."""
        if round.index == self._round:
            return
        self._round, self._contestants = round.index, {}
        # the FLOPs of a round begin at zero, also where a resumed run asks again for what was measured before
        self._read = 0.0 if self.cost == "flops" else self._reading(round)
        self._entered = self._contest(round)
        self._asking = [name for name in (self.following, *self._entered) if self.policies[name].needs_estimator]

    def _contest(self, round: Round) -> list[str]:
        """Return the policies that compete with the one that is followed, the most promising first."""
        # leftovers are trained on whoever is followed, so that training would not follow the policy
        if self._unanswered >= _MOST_UNANSWERED:
            return []  # this run cannot hold any, or they fail
        if not round.steps or len(round.leftovers) or round.step + round.steps > round.total_steps:
            return []
        allowed = self.share * (round.step if math.isinf(round.total_steps) else round.total_steps) - self._spent
        others = [name for name in self.policies if name not in (*self.dropped, self.following)]
        found, names = self._standing(), list(self.policies)

        def promise(name: str) -> float:
            width = found.width(names.index(name), names.index(self.following))
            net = self._net(name, found)
            return math.inf if math.isnan(net) or math.isinf(width) else net + width

        others.sort(key=promise, reverse=True)
        return others[: max(0, int(allowed // round.steps))]

    def _standing(self) -> Standing:
        losses = [[result.get(name, math.nan) for name in self.policies] for result in self._results]
        return standing(torch.tensor(losses, dtype=torch.float64).reshape(-1, len(self.policies)))

    def _net(self, name: str, found: Standing) -> float:
        """Return the worth of a policy in a round less what its cost would buy, nats; NaN where it is not known."""
        worth = float(found.worth[list(self.policies).index(name)])
        price = self._price(name)
        return worth - (0.0 if math.isnan(price) else price)

    def _price(self, name: str) -> float:
        """Return the nats that training would gain for the cost of a policy in a round; NaN before that is known."""
        total, rounds = self._costs[name]
        if not self._prices or not rounds or not self._prices[-1]:
            return math.nan
        means = [sum(result.values()) / len(result) for result in self._results]
        slope = fall_per_step(torch.tensor(self._ends), torch.tensor(means, dtype=torch.float64), self._ends[-1])
        return slope * self._lengths[-1] * total / rounds / self._prices[-1]

    def _because(self, better: str, worse: str, net: Mapping[str, float], found: Standing) -> str:
        names = list(self.policies)
        width = found.width(names.index(worse), names.index(better))
        behind = f"{net[better] - net[worse]:.4f} nats a round" if worse in net else "what is not known"
        sure = "" if math.isinf(width) else f" (± {width:.4f})"
        count = sum(worse in result for result in self._results)
        costs = f", cost included ({self._share_of_cost(better):.1%} and {self._share_of_cost(worse):.1%} of training)"
        return f"{better} gained {behind} more{sure} in {count} contests{costs}"

    def _share_of_cost(self, name: str) -> float:
        total, rounds = self._costs[name]
        return total / rounds / self._prices[-1] if rounds and self._prices and self._prices[-1] else 0.0

    def _metrics(self, round: Round) -> dict[str, float]:
        found = self._standing()
        metrics = {"portfolio/following": float(list(self.policies).index(self.following))}
        metrics["portfolio/spent_steps"] = self._spent
        for name in self.policies:
            net = self._net(name, found)
            if not math.isnan(net):
                metrics[f"portfolio/worth/{name}"] = net
        return metrics

    def _seen_by(self, name: str, round: Round) -> Round:
        """Return the round as a policy would see it if it were followed."""
        if name == self.following:
            return round
        pool, budget = round.pool, round.budget
        candidates = pool.available(budget, self.policies[name].eligible(pool, budget))
        leftovers, candidates = split_by_use(candidates, pool.uses[candidates], budget)
        return replace(round, candidates=candidates, leftovers=leftovers)

    def _choose(self, name: str, round: Round) -> Tensor:
        """Return what a copy that follows a policy trains on, in order."""
        own = self._seen_by(name, round)
        chosen = self.policies[name].select(own, round.budget - len(own.leftovers))
        ids = chosen if isinstance(chosen, Tensor) else chosen.ids
        ids = torch.cat([own.leftovers, ids.cpu()])
        return ids[torch.randperm(len(ids), generator=round.generator(f"the order of {name}"))]

    def _charge(self, name: str, round: Round) -> None:
        """Charge a policy for what was spent since the last one was charged."""
        now = self._reading(round)
        self._costs[name][0] += max(0.0, now - self._read)
        self._read = now

    def _reading(self, round: Round) -> float:
        """Return what was spent so far, the same on all ranks."""
        if self.cost == "seconds":
            return distributed.gather_objects(time.perf_counter())[0]
        return sum(distributed.gather_objects(sum(round.meter.flops.values())))
