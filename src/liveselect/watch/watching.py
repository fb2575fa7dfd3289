"""The watch: looks at every round and raises an alarm where something is wrong with selection."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liveselect import distributed
from liveselect.decisions import rounds_in
from liveselect.decisions.diff import compare_rounds, spearman
from liveselect.ledger import Alarm, RoundRecord
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import InfluenceEstimator, RoundContext, Selection
from liveselect.snapshot import measuring
from liveselect.watch.canaries import Canaries
from liveselect.watch.duplicates import UNKNOWN, PassageSet, Shared

FEWEST_COMPARED = 30
"""Two rounds that share fewer scored candidates say nothing about each other."""
FEWEST_GROUPS = 8
FEWEST_CHOSEN = 20
LOOKED_THROUGH = 128
"""Chosen candidates of a round that are compared with the reference set."""


@dataclass(frozen=True)
class Scene:
    """One round as it was decided, before it becomes the run's plan.

    Attributes:
        record: the round's line in the ledger.
        earlier: the lines of the rounds before it.
        context: what the parts looked at.
        selection: what the selector returned.
        plan: what was made of it.
        pool: the candidates; ``uses`` do not count this round yet.
        estimator: what measured, None when nothing was measured in this round.
        restored: whether model and optimizer were the same, to the bit, after every measurement.
        decisions: folder of the decision ledger, where there is one.
    """

    record: RoundRecord
    earlier: Sequence[RoundRecord]
    context: RoundContext
    selection: Selection
    plan: Plan
    pool: CandidatePool
    estimator: InfluenceEstimator | None = None
    restored: bool = True
    decisions: Path | None = None


class Watch:
    """Finds what is wrong with a round. It decides nothing: a round with alarms is trained on like any other.

    What it looks at, beside what the round knows anyway: the file of the round before, the tokens of up to 128 chosen
    candidates, and now and then the influence of a few canaries. It adds to the record's metrics how the round differs
    from the one before (``drift/*``) and the influence of canaries (``canary/*``).

    Args:
        min_spearman: a regressor whose held-out rank correlation is not above this guesses.
        flip: scores whose rank correlation with those of the round before is below this have changed their sign.
        max_share: a group that fills more than this of a plan has taken over, unless it fills half of the pool.
        max_uses: a candidate that is trained on more often than this repeats too much.
        canaries: of each kind (from the reference set, its words in another order, one word again and again, random
            tokens); they are measured when they add no more than 1% to what was measured, 0 for never.
        passage: tokens in a row that chosen text must share with the reference set to be called a duplicate.
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
        found = [
            *_restore(scene),
            *_ranks(scene),
            *_constant(scene),
            *self._regressor(scene),
            *self._takeover(scene),
            *self._repeats(scene),
        ]
        with measuring(scene.context.model, scene.context.optimizer):
            found += self._canaries(scene)
            if distributed.rank() == 0:
                found += self._flipped(scene)
                found += self._duplicates(scene)
        record = scene.record
        return [Alarm(record.round, record.step, kind, text) for kind, text in found]

    # ---- rules: each returns (kind, text) ----------------------------------------------------------------------

    def _regressor(self, scene: Scene) -> list[tuple[str, str]]:
        found = scene.record.metrics.get("regressor/spearman")
        if found is None or found > self.min_spearman:
            return []
        return [
            (
                "regressor",
                f"the regressor's held-out rank correlation {found:.3f} is not above {self.min_spearman:g}: it "
                "guesses. Measure more candidates, or look at whether influence can be told from text at this stage",
            )
        ]

    def _takeover(self, scene: Scene) -> list[tuple[str, str]]:
        record = scene.record
        if len(scene.pool.group_names) < 2 or record.chosen < FEWEST_CHOSEN:
            return []
        alarms = []
        for name, row in record.groups.items():
            share = row["chosen"] / record.chosen
            available = row["available"] / max(1, record.candidates)
            if share > self.max_share and available < 0.5:
                alarms.append(
                    (
                        "takeover",
                        f"{name!r} fills {share:.0%} of the plan and {available:.0%} of the pool: raise the "
                        "temperature (or lower gamma), or check whether the reference set is what is meant",
                    )
                )
        return alarms

    def _repeats(self, scene: Scene) -> list[tuple[str, str]]:
        uses = scene.pool.uses[scene.plan.ids].long() + 1
        too_often = int((uses > self.max_uses).sum())
        if not too_often:
            return []
        return [
            (
                "repeats",
                f"{too_often} of {len(uses)} chosen candidates are trained on for the {int(uses.max())}th time, more "
                f"than {self.max_uses} times: enlarge the pool, or train for fewer steps",
            )
        ]

    def _flipped(self, scene: Scene) -> list[tuple[str, str]]:
        if not scene.earlier:
            return []
        self._add_drift(scene)
        known = scene.record.metrics
        correlation, compared = known.get("drift/rank_correlation", math.nan), known.get("drift/compared", 0.0)
        if compared < FEWEST_COMPARED:
            correlation, compared = _reward_correlation(scene.record, scene.earlier[-1])
            if compared < FEWEST_GROUPS:
                return []
        if not correlation < self.flip:
            return []
        return [
            (
                "flip",
                f"the scores of {int(compared)} candidates or groups that the round before compared too are turned "
                f"around, with a rank correlation of {correlation:.2f}: what was best is now worst. Look for a "
                "change of the reference set, the learning rate or the sign of a custom estimator",
            )
        ]

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

    def _duplicates(self, scene: Scene) -> list[tuple[str, str]]:
        if self._reference is None:
            self._reference = PassageSet(self.passage)
            for batch in scene.context.source.reference():
                self._reference.add(batch)
        alike: dict[int, Shared] = {}
        for batch in scene.context.source.candidates(scene.plan.ids[:LOOKED_THROUGH]):
            found = zip(batch["id"].tolist(), self._reference.shared(batch), strict=True)
            alike |= {number: shared for number, shared in found if shared is not None}
        if not alike:
            return []
        looked = min(LOOKED_THROUGH, len(scene.plan.ids))
        first = next(iter(alike.values()))
        (text,) = scene.context.source.decode(torch.from_numpy(first.tokens.copy())[None])
        records = sorted({shared.holder for shared in alike.values()} - {UNKNOWN})
        named = f"; reference records {_few(records)}" if records else ""
        return [
            (
                "duplicate",
                f"{len(alike)} of {looked} chosen candidates share a passage with the reference set (candidates "
                f"{_few(list(alike))}{named}; such as {_shortened(text)!r}): they are chosen because they hold the "
                "answers. Take these records out of the reference set, or the text out of the pool",
            )
        ]

    def _canaries(self, scene: Scene) -> list[tuple[str, str]]:
        record = scene.record
        done = [index for index, other in enumerate(scene.earlier) if "canary/reference" in other.metrics]
        since = [*scene.earlier[done[-1] + 1 if done else 0 :], record]
        if scene.estimator is None or not self.canaries.affordable(sum(len(other.measured) for other in since)):
            return []
        means = self.canaries.measure(scene.estimator, scene.context)
        record.metrics.update({f"canary/{kind}": value for kind, value in means.items()})
        worse = [kind for kind in ("repeated", "random") if means["reference"] < means[kind]]
        if not worse:
            return []
        told = ", ".join(f"{kind} {value:.3g}" for kind, value in means.items())
        return [
            (
                "canary",
                f"canaries of the kind {' and '.join(worse)} have more influence than pieces of the reference set "
                f"itself ({told}): the estimator does not measure what helps the reference",
            )
        ]


def _restore(scene: Scene) -> list[tuple[str, str]]:
    if scene.restored:
        return []
    text = (
        "parameters, optimizer state or attributes of modules are not what they were before influence was measured: "
        "training goes on with a model that measuring has changed. Report it, with the estimator and the optimizer"
    )
    return [("restore", text)]


def _ranks(scene: Scene) -> list[tuple[str, str]]:
    if distributed.world_size() == 1:
        return []
    digests = distributed.gather_objects(_digest(scene.selection.scores))
    if len(set(digests)) == 1:
        return []
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    text = (
        f"ranks {odd} hold other scores than rank 0, though they chose the same: the next round may end in a "
        "disagreement. All ranks need the same hardware and library versions"
    )
    return [("ranks", text)]


def _constant(scene: Scene) -> list[tuple[str, str]]:
    record = scene.record
    found = []
    for what, values in {
        "measured influences": torch.tensor(record.influence),
        "scores": None if scene.selection.group_metrics else scene.selection.scores,
    }.items():
        if values is None or len(values) < 2:
            continue
        finite = values[values.isfinite()]
        if not len(finite):
            found.append(("constant", f"none of the {len(values)} {what} is finite: nothing can be told apart"))
        elif bool((finite == finite[0]).all()) and len(finite) > 1:
            found.append(("constant", f"all {len(finite)} {what} are {float(finite[0]):g}: nothing can be told apart"))
    if record.metrics.get("predictions/std") == 0.0:
        found.append(("constant", "all predicted influences are equal: nothing can be told apart"))
    return found


def _digest(scores: Tensor | None) -> str:
    data = b"" if scores is None else scores.cpu().contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _reward_correlation(record: RoundRecord, before: RoundRecord) -> tuple[float, int]:
    """Return the rank correlation of the groups' rewards in two rounds, and of how many groups."""
    rewards = [{name: row["reward"] for name, row in one.groups.items() if "reward" in row} for one in (record, before)]
    both = [name for name in rewards[0] if name in rewards[1]]
    first, second = (np.array([known[name] for name in both]) for known in rewards)
    return spearman(first, second), len(both)


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
