"""What a short trial of a run says about the whole of it: time, memory, overhead, passes, and when it can pay."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from liveselect.functional.confidence import MIN_BLOCKS
from liveselect.functional.curves import PUBLISHED_SIZE_RATIOS, break_even_share, rate_gain_needed
from liveselect.verdict import Verdict

MOST_EPOCHS = 4.0
"""Passes over the same text up to which another one is worth about as much as new text (arXiv 2305.16264)."""

LARGEST_GAIN = 2.6
"""Times as fast as random data: the most that a comparison of docs/benchmarks.md has shown."""

LIVE_GAIN = 0.05
"""What live influence may cost, as a share of training's time, to be recommended over the prior alone."""

BLIND = 0.2
"""Strength of the n-gram prior below which words tell next to nothing of the reference set."""

WIDE = 0.5
"""Share of the pool from which on what is like the reference set is too much of it for leaving out the rest to pay."""

SMALLEST_PROXY = 15e6
"""Parameters below which proxies were seen to rank data unlike a large model (arXiv 2602.12237: 0.73, against 0.89)."""

_SCORING = {"perplexity": 1 / 3, "gradient": 1.0}
"""What scoring the whole pool takes, as a share of training on it with a model of the scorer's size."""

_LOOKS_FOR_AN_ANSWER = 3 * MIN_BLOCKS


@dataclass(frozen=True)
class Trial:
    """What a trial of a run has found.

    Attributes:
        method: preset or selector.
        parameters: of the model.
        total_steps: optimizer steps of the run, which may be infinite.
        every_n_steps: of a round.
        warmup_rounds: rounds that measure nothing.
        global_batch: examples of an optimizer step.
        pool: candidates.
        ratio: share of the pool that may be trained on.
        strength: of the n-gram prior; None where there is none.
        width: likewise, the share of the pool that is like the reference set.
        step_seconds: of an optimizer step.
        step_flops: likewise, over all ranks.
        once_seconds: of what is done once: opening and checking the data, priors, the rehearsal.
        once_flops: likewise.
        before_seconds: of what was done before the run for it: scores, clusters.
        before_flops: likewise.
        plain_seconds: of a round that measures nothing, with its records.
        fixed_seconds: of a round that measures, without the candidates it measures.
        candidate_seconds: of measuring one.
        round_flops: of a round that measures, all of its candidates.
        asked: candidates that a round measures.
        measured: of them in the trial.
        max_overhead: that was set.
        copies_share: of the training steps that copies take: look-aheads of a verdict, contests of policies.
        training_memory: bytes at the peak of training.
        memory: bytes at the peak of all.
        device: what the bytes are of.
    """

    method: str
    parameters: int
    total_steps: float
    every_n_steps: int
    warmup_rounds: int
    global_batch: int
    pool: int
    ratio: float
    step_seconds: float
    step_flops: float
    once_seconds: float
    once_flops: float
    plain_seconds: float
    fixed_seconds: float
    training_memory: int
    memory: int
    device: str
    strength: float | None = None
    width: float | None = None
    before_seconds: float = 0.0
    before_flops: float = 0.0
    candidate_seconds: float = 0.0
    round_flops: float = 0.0
    asked: int = 0
    measured: int = 0
    max_overhead: float | None = None
    copies_share: float = 0.0

    @property
    def training_seconds(self) -> float:
        """Seconds of training of a round."""
        return self.step_seconds * self.every_n_steps

    @property
    def round_seconds(self) -> float:
        """Seconds of choosing for a round that measures, within ``max_overhead`` where that is set."""
        if not self.asked:
            return self.plain_seconds
        whole = self.fixed_seconds + self.candidate_seconds * self.asked
        if self.max_overhead is None:
            return whole
        return min(whole, max(self.fixed_seconds, self.max_overhead * self.training_seconds))

    @property
    def overhead(self) -> float:
        """Selection that recurs, for each second of training."""
        return self.round_seconds / max(1e-9, self.training_seconds) + self.copies_share

    @property
    def rounds(self) -> float:
        """Rounds of the run."""
        return math.inf if math.isinf(self.total_steps) else math.ceil(self.total_steps / self.every_n_steps)

    @property
    def selection_seconds(self) -> float:
        """Seconds of selection in the run, what is done once included."""
        warm = min(self.rounds, self.warmup_rounds)
        choosing = warm * self.plain_seconds + (self.rounds - warm) * self.round_seconds
        return self.once_seconds + choosing + self.copies_share * self.total_steps * self.step_seconds

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.total_steps * self.step_seconds + self.selection_seconds

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        measuring = max(0.0, self.rounds - self.warmup_rounds) * self.round_flops
        return self.total_steps * (1 + self.copies_share) * self.step_flops + self.once_flops + measuring

    @property
    def once_share(self) -> float:
        """What is spent once, before the run too, as a share of training's time; 0 in a run without an end."""
        return (self.once_seconds + self.before_seconds) / (self.total_steps * self.step_seconds)

    @property
    def gain_needed(self) -> float:
        """How many times as fast as random data the chosen ones must teach, for the run to pay."""
        once = self.once_share
        return rate_gain_needed(self.overhead, once / (1 + once + self.overhead))

    @property
    def passes(self) -> float:
        """How often the whole pool would be trained on."""
        return self.total_steps * self.global_batch / self.pool

    @property
    def epochs(self) -> float:
        """How often what is chosen is trained on."""
        return self.passes / self.ratio


@dataclass(frozen=True)
class MethodCost:
    """What a method costs at the sizes of a run.

    Attributes:
        name: of the method.
        seconds: of a round, None where it was not timed.
        candidates: measured in a round.
        note: why it was not timed, or what it is.
    """

    name: str
    seconds: float | None
    candidates: int = 0
    note: str = ""


@dataclass(frozen=True)
class AnswerExpected:
    """When a verdict can be expected.

    Attributes:
        length: optimizer steps of a look-ahead.
        looks: that the run affords.
        step: by which an effect as large as its noise is found; None where the run ends before.
        share: of the run that look-aheads may cost.
        share_needed: with which the run would afford an answer.
    """

    length: int
    looks: float
    step: int | None
    share: float
    share_needed: float


def answer_expected(trial: Trial, verdict: Verdict, judged_rows: int) -> AnswerExpected:
    """Return when a verdict can be expected; both arms are judged on ``judged_rows``."""
    length = verdict.length(trial.total_steps)
    price = length + 2 * judged_rows / (3 * trial.global_batch)
    first = trial.warmup_rounds * trial.every_n_steps
    step = max(first, _LOOKS_FOR_AN_ANSWER * price / verdict.share) + length
    needed = _LOOKS_FOR_AN_ANSWER * price / max(1.0, trial.total_steps - length)
    looks = verdict.share * trial.total_steps / price
    return AnswerExpected(length, looks, int(step) if step <= trial.total_steps else None, verdict.share, needed)


def scoring_gain_needed(trial: Trial, method: str, scorer_parameters: float) -> float:
    """Return how many times as fast a run on scores must learn, when a scorer reads the whole pool before it."""
    passes = trial.passes
    share = _SCORING[method] * scorer_parameters / trial.parameters / passes  # of training
    return rate_gain_needed(0.0, share / (1 + share))


def check_proxy(proxy: float, model: float) -> None:
    """Refuse a proxy that is too small to rank data for a model; both in parameters.

    Raises:
        ValueError: it has fewer than 15 million parameters, and the model has more than it.
    """
    if proxy < min(SMALLEST_PROXY, model):
        raise ValueError(
            f"expected a proxy of at least {SMALLEST_PROXY:.0f} parameters, or as large as the model, got one of "
            f"{proxy:.3g} for a model of {model:.3g}: smaller ones rank data differently (a rank correlation of 0.73 "
            "at a million parameters, arXiv 2602.12237). Take a larger proxy, or selection that needs none"
        )


@dataclass(frozen=True)
class Recommendation:
    """A method, why, and what cannot pay."""

    method: str
    because: str
    warnings: list[str] = field(default_factory=list)


def recommend(trial: Trial, methods: Sequence[MethodCost]) -> Recommendation:
    """Return the method that the numbers speak for, and where selection cannot pay back."""
    warnings = _warnings(trial)
    costs = {each.name: each.seconds for each in methods if each.seconds is not None}
    strength = trial.strength
    if strength is not None and strength < BLIND:
        because = (
            f"the reference set does not differ from the pool by its words (strength of the prior {strength:.2f}), "
            "and where it is the pool's own mixture there is nothing to select"
        )
        return Recommendation("random", because, warnings)
    if trial.width is not None and trial.width >= WIDE:
        because = f"{trial.width:.0%} of the pool is like the reference set, and leaving out the rest gains little"
        return Recommendation("random", because, warnings)
    if trial.passes > MOST_EPOCHS:
        because = f"the run trains {trial.passes:.1f} times on the whole pool: leaving parts of it out repeats the rest"
        return Recommendation("random", because, warnings)
    apart = "a prior of words tells the reference set apart"
    apart += "" if strength is None else f" (strength {strength:.2f})"
    apart += "" if trial.width is None else f", and {trial.width:.0%} of the pool is like it"
    live = costs.get("LiveSelection", math.inf) / max(1e-9, trial.training_seconds)
    if live <= LIVE_GAIN:
        because = f"{apart}, and live influence inside of it takes {live:.1%} of training's time"
        return Recommendation("LiveSelection", because, warnings)
    if math.isinf(live):
        because = f"{apart}, and what live influence costs is not known"
    else:
        because = f"{apart}; live influence would take {live:.1%} of training's time, more than {LIVE_GAIN:.0%}"
    return Recommendation("prior", because, warnings)


def _warnings(trial: Trial) -> list[str]:
    found = []
    if trial.gain_needed > LARGEST_GAIN:
        found.append(
            f"{trial.method} cannot be expected to pay: at its cost chosen data must teach "
            f"{trial.gain_needed:.2f} times as fast as random ones, and {LARGEST_GAIN} times is the most that was "
            "measured. Lower it with max_overhead, fewer probes, or longer rounds"
        )
    if trial.ratio < 1 and MOST_EPOCHS < trial.epochs < math.inf:
        enough = math.ceil(100 * trial.passes / MOST_EPOCHS) / 100
        cure = f"a ratio of at least {enough:g}" if enough < 1 else "a larger pool"
        found.append(
            f"what is chosen would be trained on {trial.epochs:.1f} times, and after {MOST_EPOCHS:g} repetition is "
            f"worth little: take {cure}"
        )
    return found


def scoring_lines(trial: Trial) -> list[str]:
    """Return what scoring the pool before training would take, and how small its scorer must be to pay."""
    lines = []
    for method, share in _SCORING.items():
        own = scoring_gain_needed(trial, method, trial.parameters)
        within = min(1.0, trial.passes)
        ratio = PUBLISHED_SIZE_RATIOS[method]
        least = break_even_share(share, ratio, LARGEST_GAIN)
        verdict = f"pays from {least:.1%} of a pass over the pool on" if least < within else "does not pay in this run"
        lines.append(
            f"{method} of every candidate by a model as large as yours: must teach {own:.2f} times as fast as random "
            f"data; by one {ratio:g} times smaller, at {LARGEST_GAIN} times as fast, it {verdict}"
        )
    return lines


def builtins(trial: Trial) -> dict[str, object]:
    """Return the numbers of a trial and what follows from them, for JSON; None for what is not finite."""
    names = ("training_seconds", "round_seconds", "overhead", "selection_seconds", "seconds", "flops", "gain_needed")
    found = {**asdict(trial), **{name: getattr(trial, name) for name in (*names, "passes", "epochs")}}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()
    }
