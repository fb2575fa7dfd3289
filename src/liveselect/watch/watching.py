"""The watch: checks every round, and raises an alarm if something is wrong with selection."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.arguments import check_plain
from liveselect.decisions import rounds_in
from liveselect.decisions.diff import compare_rounds
from liveselect.functional.correlation import spearman
from liveselect.grammar import InfluenceEstimator, LiveModel, Round, Selection
from liveselect.ledger import Alarm, RoundRecord
from liveselect.plan import Plan
from liveselect.preserve import measuring
from liveselect.watch.canaries import Canaries
from liveselect.watch.duplicates import UNKNOWN, PassageSet, Shared

MIN_SHARED_SCORES, MIN_SHARED_GROUPS = 30, 8
"""Scores or rewards that two rounds must share: the rank correlation of fewer varies too much by chance."""
TURN = 0.7
"""Change of the mixture, 0..1, from one round to the next that is more than following the model."""
CLEAR = 2.0
"""Standard errors from which on a difference of two means is no chance."""
EXAMPLES_PER_GROUP = 4
"""Of a plan: with fewer, two draws from one mixture differ by chance."""
MIN_CHOSEN = 20
FEWEST_HELD_OUT, ENOUGH_HELD_OUT = 50, 100
"""Held-out measurements: fewer say nothing of a regressor, and of more the latest count."""
"""Candidates of a plan from which on the share of a group is not chance."""
COMPARED_CANDIDATES = 128
"""Chosen candidates of a round that are compared with the reference set: reading more would delay the round."""

RESTORE = "restore"
"""The kind of the alarm after which nothing is measured any more."""

Alarms = Iterator[tuple[str, str]]
"""Pairs of kind and text."""


@dataclass(frozen=True)
class Scene:
    """One round as it was decided, before it becomes the run's plan.

    Attributes:
        record: the round's line in the ledger.
        earlier: the lines of the rounds before it.
        model: the live model.
        round: the round as the selector saw it; the uses in its pool do not count this plan yet.
        selection: what the selector returned.
        plan: the plan made from it.
        estimator: None if the round measured nothing.
        changed: a sentence on what measuring has changed in the model or optimizer, None for nothing that is new.
        decisions: folder of the decision ledger, where there is one.
    """

    record: RoundRecord
    earlier: Sequence[RoundRecord]
    model: LiveModel
    round: Round
    selection: Selection
    plan: Plan
    estimator: InfluenceEstimator | None = None
    changed: str | None = None
    decisions: Path | None = None


class Watch:
    """Raises alarms about rounds. It decides nothing: a round with alarms is trained on like any other.

    Beside the record of the round it reads the decisions of the round before and the tokens of up to 128 chosen
    candidates, and measures a few canaries in some rounds. It adds to the record's metrics the differences from the
    round before (``drift/*``) and the influence of canaries (``canary/*``).

    Args:
        min_spearman: alarm if the regressor's held-out rank correlation is not above this; over as many of the last
            rounds as hold 100 held-out measurements, because that of a few is chance.
        flip: alarm if the rank correlation of the scores with those of the round before is below this.
        max_share: alarm if a group fills more than this share of a plan, and less than half of the pool.
        max_uses: alarm if a candidate is trained on more often than this.
        canaries: number of each kind (from the reference set, its words in another order, one word repeated, random
            tokens); measured when they add no more than 1% to the measurements, 0 for never.
        passage: tokens in a row that chosen text must share with the reference set for an alarm about duplicates.
    """

    def __init__(
        self,
        min_spearman: float = 0.0,
        flip: float = -0.5,
        max_share: float = 0.9,
        max_uses: int = 4,
        canaries: int = 2,
        passage: int = 32,
    ) -> None:
        check_plain(Watch, locals())
        if not -1.0 <= flip <= 0.0:
            raise ValueError(f"expected flip, a rank correlation, in -1..0, got {flip}")
        if not 0.0 < max_share <= 1.0:
            raise ValueError(f"expected max_share above 0 and up to 1, got {max_share}")
        if max_uses < 1:
            raise ValueError(f"expected max_uses of at least 1, got {max_uses}")
        self.min_spearman = min_spearman
        self.flip = flip
        self.max_share = max_share
        self.max_uses = max_uses
        self.canaries = Canaries(canaries)
        self.passage = passage
        self._reference: PassageSet | None = None

    def look(self, scene: Scene) -> list[Alarm]:
        """Return the alarms of a round; to be called on all ranks, complete on rank 0."""
        rules = (_restore, _ranks, _constant, _oscillates, self._regressor, self._takeover, self._repeats)
        found = [alarm for rule in rules for alarm in rule(scene)]
        with measuring(scene.model.module, scene.model.optimizer):
            found += self._canaries(scene)
            if distributed.rank() == 0:
                found += self._flipped(scene)
                found += self._duplicates(scene)
        record = scene.record
        return [Alarm(record.round, record.step, kind, text) for kind, text in found]

    # ---- rules -------------------------------------------------------------------------------------------------

    def _regressor(self, scene: Scene) -> Alarms:
        found, over = _recent_spearman([*scene.earlier, scene.record])
        if found is not None and not found > self.min_spearman:
            rounds = "" if over == 1 else f", over the last {over} rounds,"
            yield (
                "regressor",
                f"the regressor's held-out rank correlation {found:.3f}{rounds} is not above {self.min_spearman:g}: it "
                "guesses. Measure more candidates, or check whether influence can be predicted from text at this stage",
            )

    def _takeover(self, scene: Scene) -> Alarms:
        record = scene.record
        if len(scene.round.pool.group_names) < 2 or record.chosen < MIN_CHOSEN:
            return
        for name in record.groups:
            share, available = record.share(name), record.share(name, "available")
            if share > self.max_share and available < 0.5:
                yield (
                    "takeover",
                    f"{name!r} fills {share:.0%} of the plan and {available:.0%} of the pool: raise the temperature "
                    "(or lower gamma), or check whether the reference set is what is meant",
                )

    def _repeats(self, scene: Scene) -> Alarms:
        uses = scene.round.pool.uses[scene.plan.ids].long() + 1
        if too_often := int((uses > self.max_uses).sum()):
            yield (
                "repeats",
                f"{too_often} of {len(uses)} chosen candidates are trained on for the {int(uses.max())}th time, more "
                f"than {self.max_uses} times: enlarge the pool, or train for fewer steps",
            )

    def _flipped(self, scene: Scene) -> Alarms:
        if not scene.earlier:
            return
        self._add_drift(scene)
        known = scene.record.metrics
        correlation, compared = known.get("drift/rank_correlation", math.nan), known.get("drift/compared", 0.0)
        if compared < MIN_SHARED_SCORES:
            correlation, compared = _reward_correlation(scene.record, scene.earlier[-1])
            if compared < MIN_SHARED_GROUPS:
                return
        if correlation < self.flip:
            yield (
                "flip",
                f"the scores of {int(compared)} candidates or groups are reversed since the round before, with a rank "
                f"correlation of {correlation:.2f}: what was best is now worst. Look for a change of the reference "
                "set, the learning rate or the sign of a custom estimator",
            )

    def _add_drift(self, scene: Scene) -> None:
        index = scene.record.round
        files = {} if scene.decisions is None else rounds_in(scene.decisions)
        if index not in files or index - 1 not in files:
            return
        drift = compare_rounds(files[index - 1], files[index])
        found = {
            "drift/overlap": drift.shared / max(1, min(drift.chosen)),
            "drift/mixture": drift.mixture,
            "drift/compared": float(drift.scored),
            "drift/rank_correlation": drift.correlation,
        }
        scene.record.metrics.update({name: value for name, value in found.items() if not math.isnan(value)})

    def _duplicates(self, scene: Scene) -> Alarms:
        if self._reference is None:
            self._reference = PassageSet(self.passage)
            for batch in scene.round.source.reference():
                self._reference.add(batch)
        alike: dict[int, Shared] = {}
        for batch in scene.round.source.candidates(scene.plan.ids[:COMPARED_CANDIDATES]):
            found = zip(batch["id"].tolist(), self._reference.shared(batch), strict=True)
            alike |= {number: shared for number, shared in found if shared is not None}
        if not alike:
            return
        compared = min(COMPARED_CANDIDATES, len(scene.plan.ids))
        first = next(iter(alike.values()))
        (text,) = scene.round.source.decode(torch.from_numpy(first.tokens.copy())[None])
        records = sorted({shared.holder for shared in alike.values()} - {UNKNOWN})
        named = f"; reference records {_first_five(records)}" if records else ""
        yield (
            "duplicate",
            f"{len(alike)} of {compared} chosen candidates share a passage with the reference set (candidates "
            f"{_first_five(list(alike))}{named}; such as {_shortened(text)!r}): they are chosen because they hold the "
            "answers. Take these records out of the reference set, or the text out of the pool",
        )

    def _canaries(self, scene: Scene) -> Alarms:
        record = scene.record
        done = [index for index, other in enumerate(scene.earlier) if "canary/reference" in other.metrics]
        since = [*scene.earlier[done[-1] + 1 if done else 0 :], record]
        if scene.estimator is None or not self.canaries.affordable(sum(len(other.measured) for other in since)):
            return
        means = self.canaries.measure(scene.estimator, scene.model, scene.round)
        record.metrics.update({f"canary/{kind}": value for kind, value in means.items()})
        if worse := [kind for kind in ("repeated", "random") if means["reference"] < means[kind]]:
            numbers = ", ".join(f"{kind} {value:.3g}" for kind, value in means.items())
            yield (
                "canary",
                f"canaries of the kind {' and '.join(worse)} have more influence than pieces of the reference set "
                f"itself ({numbers}): the estimator does not measure what helps the reference",
            )


def _recent_spearman(records: Sequence[RoundRecord]) -> tuple[float | None, int]:
    """Return the held-out rank correlation of the last rounds, weighted by their measurements, and of how many rounds.

    None where the last round has none, or where all of them are too few to say anything. A regressor that does not say
    how many it held out is taken at its word.
    """
    last = records[-1].metrics.get("regressor/spearman")
    if last is None or math.isnan(last):
        return last, 1
    total = weight = 0.0
    rounds = 0
    for record in reversed(records):
        found, held_out = (record.metrics.get(f"regressor/{name}") for name in ("spearman", "held_out"))
        if found is None or math.isnan(found):
            continue
        count = ENOUGH_HELD_OUT if held_out is None else held_out
        total, weight, rounds = total + found * count, weight + count, rounds + 1
        if weight >= ENOUGH_HELD_OUT:
            break
    return (total / weight, rounds) if weight >= FEWEST_HELD_OUT else (None, rounds)


def _restore(scene: Scene) -> Alarms:
    if scene.changed is not None:
        yield RESTORE, scene.changed


def _ranks(scene: Scene) -> Alarms:
    if distributed.world_size() == 1:
        return
    digests = distributed.gather_objects(_digest(scene.selection.scores))
    if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        yield (
            "ranks",
            f"ranks {odd} hold other scores than rank 0, though they chose the same: the next round may end in a "
            "disagreement. All ranks need the same hardware and library versions",
        )


def _constant(scene: Scene) -> Alarms:
    record = scene.record
    for what, values in {
        "measured influences": torch.tensor(record.influence),
        "scores": None if scene.selection.group_metrics else scene.selection.scores,
    }.items():
        if values is None or len(values) < 2:
            continue
        finite = values[values.isfinite()]
        if not len(finite):
            yield "constant", f"none of the {len(values)} {what} is finite: candidates cannot be compared"
        elif bool((finite == finite[0]).all()) and len(finite) > 1:
            yield "constant", f"all {len(finite)} {what} are {float(finite[0]):g}: candidates cannot be compared"
    if record.metrics.get("predictions/std") == 0.0:
        yield "constant", "all predicted influences are equal: candidates cannot be compared"


def _oscillates(scene: Scene) -> Alarms:
    """What one round takes the next one flees: its mixture turns, and random text is worth more than what it took."""
    if not scene.earlier:
        return
    record, before = scene.record, scene.earlier[-1]
    if len(scene.earlier) > 1:
        changes = [_mixture_change(record, before), _mixture_change(before, scene.earlier[-2])]
        if min(changes) > TURN:
            yield (
                "oscillation",
                f"the mixture has changed by {changes[1]:.2f} and {changes[0]:.2f} in two rounds running: what one "
                "round takes the next one flees. Let the regressor remember (forgetting=0.8), choose more softly, or "
                "give the selector a prior",
            )
            return
    excess = [one.metrics.get("influence/excess", math.nan) for one in (record, before)]
    if min(excess) > CLEAR:
        yield (
            "oscillation",
            f"random candidates are worth more than what was trained on, by {excess[1]:.1f} and {excess[0]:.1f} "
            "standard errors in two rounds running: the choice went too far. Choose more softly or more widely (ratio, "
            "temperature), or in shorter rounds",
        )


def _mixture_change(record: RoundRecord, before: RoundRecord) -> float:
    """Return half the sum of the differences of the groups' shares, 0..1; NaN where chance alone makes them differ."""
    names = {name for one in (record, before) for name in one.groups}
    if len(names) < 2 or min(record.chosen, before.chosen) < max(MIN_CHOSEN, EXAMPLES_PER_GROUP * len(names)):
        return math.nan
    shares = [{name: one.share(name) for name in one.groups} for one in (record, before)]
    return sum(abs(shares[0].get(name, 0.0) - shares[1].get(name, 0.0)) for name in names) / 2


def _digest(scores: Tensor | None) -> str:
    data = b"" if scores is None else scores.cpu().contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _reward_correlation(record: RoundRecord, before: RoundRecord) -> tuple[float, int]:
    """Return the rank correlation of the groups' rewards in two rounds, and the number of these groups."""
    rewards = [{name: row["reward"] for name, row in one.groups.items() if "reward" in row} for one in (record, before)]
    both = [name for name in rewards[0] if name in rewards[1]]
    first, second = (torch.tensor([known[name] for name in both]) for known in rewards)
    return spearman(first, second), len(both)


def _first_five(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
