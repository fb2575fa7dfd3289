"""The ledger: what every round measured, chose and cost, and what training cost beside it."""

import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from liveselect.json_lines import Line, append_lines, json_line, read_lines, whole_file

T = TypeVar("T")

_CAPTURED = ("overheard", "overheard_influence")
_WANDB_RUN = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(\w+)")


@dataclass(frozen=True)
class Example:
    """One candidate as a person would read it.

    Attributes:
        id: row id in the pool.
        group: name of its group.
        score: the score it was compared by, None when the choice used no scores.
        chosen: whether it is in the plan.
        text: the beginning of its text.
        marks: parts of the text that made the score what it is: first character, the one after the last, and what the
            part adds to the score.
    """

    id: int
    group: str
    score: float | None
    chosen: bool
    text: str
    marks: list[tuple[int, int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Alarm:
    """A sign that something is wrong with selection.

    Attributes:
        round: index of the round.
        step: optimizer steps done when it ran.
        kind: one word for all alarms of the same cause.
        text: what was seen, and what to do.
    """

    round: int
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Histogram:
    """Scores of a round: ``counts[i]`` of all and ``chosen[i]`` of the chosen lie in ``edges[i] .. edges[i + 1]``."""

    edges: list[float]
    counts: list[int]
    chosen: list[int]

    @classmethod
    def of(cls, scores: Tensor, chosen: Tensor, bins: int = 40) -> "Histogram":
        """Bin finite ``scores (n,)``; ``chosen (n,)`` is a mask of the same candidates."""
        finite = torch.isfinite(scores)
        scores, chosen = scores[finite].float(), chosen[finite]
        low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
        if low == high:  # histc of a single value needs a range of its own
            low, high = low - 0.5, high + 0.5
        edges = torch.linspace(low, high, bins + 1).tolist()
        count = torch.histc(scores, bins, low, high).long().tolist()
        return cls(edges, count, torch.histc(scores[chosen], bins, low, high).long().tolist())


@dataclass(frozen=True)
class RoundRecord:
    """One round of selection.

    Attributes:
        round: index of the round.
        step: optimizer steps done when it ran.
        selector: class name of the selector that chose.
        candidates: number of candidates that could be chosen.
        chosen: number of candidates in the plan.
        plan: fingerprint of the plan.
        measured: ids whose influence was measured.
        influence: their influence, nats per unit learning rate.
        groups: for each group, how many candidates were ``available``, ``measured`` and ``chosen``, and what else the
            selector knows of it. Of many groups only those that the round measured or chose from.
        histogram: scores of all compared candidates and of the chosen, None when the choice used no scores.
        examples: a few chosen and rejected candidates.
        metrics: scalars from the estimator, the regressor and the selector.
        seconds: wall-clock seconds by phase, on rank 0.
        flops: floating point operations by phase, summed over ranks.
        notes: what a person should know, such as the reason of a fallback.
        alarms: what is wrong.
        overheard: ids whose influence was captured from the round's own training steps.
        overheard_influence: that influence, nats per unit learning rate.
        overheard_count: how many they were, where a checkpoint kept no more of them than this and their mean.
        overheard_mean: mean of that influence.
    """

    round: int
    step: int
    selector: str
    candidates: int
    chosen: int
    plan: str
    measured: list[int] = field(default_factory=list)
    influence: list[float] = field(default_factory=list)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    histogram: Histogram | None = None
    examples: list[Example] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    overheard: list[int] = field(default_factory=list)
    overheard_influence: list[float] = field(default_factory=list)
    overheard_count: int = 0
    overheard_mean: float = 0.0

    @property
    def captured(self) -> int:
        """How many examples showed their influence in the round's own training steps."""
        return len(self.overheard) or self.overheard_count

    @property
    def total_seconds(self) -> float:
        """Seconds of the whole round."""
        return sum(self.seconds.values())

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole round."""
        return sum(self.flops.values())

    def share(self, group: str, kind: str = "chosen") -> float:
        """Return a group's share of what the round chose, or of the candidates that were ``available``."""
        # of many groups only those are recorded that the round measured or chose from, so their sum is no total
        total = self.chosen if kind == "chosen" else self.candidates
        return self.groups.get(group, {}).get(kind, 0) / max(1, total)

    def scalars(self) -> dict[str, float]:
        """Return the numbers of this round for a logger, without a prefix."""
        shares = {f"chosen_share/{name}": self.share(name) for name in self.groups}
        return {
            "round": float(self.round),
            "candidates": float(self.candidates),
            "measured": float(len(self.measured)),
            "chosen": float(self.chosen),
            "round_seconds": self.total_seconds,
            "round_flops": self.total_flops,
            **self.metrics,
            **shares,
        }


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the model at one point of training, with what had been spent by then.

    Seconds are wall-clock, FLOPs are summed over ranks; selection is not part of training.
    """

    step: int
    metrics: dict[str, float]
    training_seconds: float
    selection_seconds: float
    training_flops: float
    selection_flops: float


@dataclass
class Ledger:
    """All rounds and evaluations of a run, and the cost of its training.

    Attributes:
        run_id: tells the run from all others; that of a resumed run is the one it began with.
        about: what kind of run it is, for a reader of the file (selector, seed, interval).
        rounds: one record for each round.
        evaluations: one entry for each validation.
        training_seconds: wall-clock seconds spent between rounds, outside validation.
        training_flops: floating point operations of the training steps, over all ranks.
        training_repeated_flops: of these, what was computed again because activations had not been kept.
        training_tokens: tokens of the batches that were trained on, over all ranks; 0 in records that do not say.
        finished: whether training came to its end; None in records that do not say.
        ahead_seconds: seconds spent so far for the round to come, which has no record yet.
        ahead_flops: FLOPs likewise.
        before_seconds: by phase, seconds spent before training on what the selector draws from (a proxy, its scores),
            as far as that is known.
        before_flops: FLOPs likewise.
        around_seconds: by name, seconds spent around the rounds: loggers, monitor, records, opening and checking the
            data, the rehearsal at the start.
        around_flops: FLOPs likewise.
        uncounted: what ran without its FLOPs being known, so that they are in none of the numbers.
        peak_flops: what all devices together could do in a second in the run's precision; None where not known.
        decision_folders: where the decisions are written; before it, where a resumed run wrote them earlier and may
            have left what the last folder lacks.
        verdict: whether selection pays, with the numbers behind it; empty where the run does not find out.
    """

    run_id: str = ""
    about: Line = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    training_seconds: float = 0.0
    training_flops: float = 0.0
    training_repeated_flops: float = 0.0
    training_tokens: int = 0
    ahead_seconds: float = 0.0
    ahead_flops: float = 0.0
    finished: bool | None = None
    before_seconds: dict[str, float] = field(default_factory=dict)
    before_flops: dict[str, float] = field(default_factory=dict)
    around_seconds: dict[str, float] = field(default_factory=dict)
    around_flops: dict[str, float] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)
    peak_flops: float | None = None
    decision_folders: list[str] = field(default_factory=list)
    verdict: Line = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file: _LedgerFile | None = None
        self._means: dict[int, float] = {}

    @property
    def selection_seconds(self) -> float:
        """Seconds spent in rounds, around them, and before training for them."""
        before = sum(self.before_seconds.values()) + sum(self.around_seconds.values())
        return before + self.ahead_seconds + sum(record.total_seconds for record in self.rounds)

    @property
    def selection_flops(self) -> float:
        """FLOPs spent in rounds, around them, and before training for them."""
        before = sum(self.before_flops.values()) + sum(self.around_flops.values())
        return before + self.ahead_flops + sum(record.total_flops for record in self.rounds)

    @property
    def selection_share(self) -> float:
        """Share of selection in the time of training and selection together."""
        return self.selection_seconds / max(1e-9, self.selection_seconds + self.training_seconds)

    @property
    def selection_flops_share(self) -> float:
        """Share of selection in the FLOPs of training and selection together."""
        return self.selection_flops / max(1.0, self.selection_flops + self.training_flops)

    def utilisation(self) -> dict[str, float]:
        """Return the shares of the devices' peak that training and the whole run used, empty where that is not known.

        ``mfu_training`` is FLOPs over time of training, ``mfu_whole`` those of training and selection together. What
        is computed again to save memory, and what was spent before the run, do not count.
        """
        if not self.peak_flops or not self.training_seconds:
            return {}
        training = self.training_flops - self.training_repeated_flops
        selection = self.selection_flops - sum(self.before_flops.values())
        seconds = self.selection_seconds - sum(self.before_seconds.values())
        return {
            "mfu_training": training / (self.training_seconds * self.peak_flops),
            "mfu_whole": (training + selection) / ((self.training_seconds + seconds) * self.peak_flops),
        }

    def new_alarms(self, record: RoundRecord) -> list[Alarm]:
        """Return the alarms of a round whose kind the previous round did not raise: those reported to a person."""
        known = {alarm.kind for other in self.rounds if other.round == record.round - 1 for alarm in other.alarms}
        return [alarm for alarm in record.alarms if alarm.kind not in known]

    def charge_before(self, spent: Mapping[str, Mapping[str, float]]) -> None:
        """Add what was spent before training: ``seconds`` and ``flops`` by phase."""
        self.before_seconds.update(spent.get("seconds", {}))
        self.before_flops.update(spent.get("flops", {}))
        self.uncounted.extend(name for name in spent.get("uncounted", {}) if name not in self.uncounted)

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the model's metrics at ``step`` beside what was spent so far."""
        self.evaluations.append(
            Evaluation(
                step,
                dict(metrics),
                self.training_seconds,
                self.selection_seconds,
                self.training_flops,
                self.selection_flops,
            )
        )

    def state_dict(self) -> Line:
        """Return the ledger as builtins and tensors, so that checkpoints load with ``weights_only=True``.

        What training steps have shown can be millions of numbers. Of rounds that are over it holds number and mean, of
        the last one tensors; the file has the rest.
        """
        state: Line = {each.name: _builtins(getattr(self, each.name)) for each in fields(self) if each.name != "rounds"}
        rounds = [_builtins(self._without_overheard(record)) for record in self.rounds[:-1]]
        return {**state, "rounds": [*rounds, *map(_compact, self.rounds[-1:])]}

    def _without_overheard(self, record: RoundRecord) -> RoundRecord:
        if not record.overheard:
            return record
        if record.round not in self._means:  # a round that is over does not change
            self._means[record.round] = sum(record.overheard_influence) / len(record.overheard)
        count, mean = len(record.overheard), self._means[record.round]
        return replace(record, overheard=[], overheard_influence=[], overheard_count=count, overheard_mean=mean)

    def recall(self, paths: Iterable[Path]) -> None:
        """Take back from files of this run what checkpoints left out of its rounds, as far as it is there.

        Raises:
            ValueError: a file is damaged.
        """
        for path in paths:
            lacking = {r.round: i for i, r in enumerate(self.rounds) if r.overheard_count and not r.overheard}
            if not lacking or run_id_of(path) != self.run_id:
                continue
            for other in Ledger.read(path).rounds:
                index = lacking.get(other.round)
                if index is not None and _same_round(self.rounds[index], other):
                    self.rounds[index] = replace(
                        self.rounds[index],
                        overheard=other.overheard,
                        overheard_influence=other.overheard_influence,
                        overheard_count=0,
                        overheard_mean=0.0,
                    )

    def load_state_dict(self, state: Line) -> None:
        """Restore the ledger that :meth:`state_dict` described."""
        restored = _ledger_from(state)
        for entry in fields(self):
            setattr(self, entry.name, getattr(restored, entry.name))
        self._file, self._means = None, {}

    def write(self, path: Path) -> None:
        """Write the ledger as JSON lines: one that describes the run, one for each round and evaluation.

        A file that this ledger has written is added to, which costs what is new; the last line about the run and about
        a round are what counts. Any other file is replaced when the new one is complete, and so is that of a run that
        has finished: in it the run comes first, then the rounds and the evaluations in order.

        Raises:
            OSError: the disk does not take it; the file is as it was.
        """
        file = self._file
        if file is not None and not self.finished and file.continues(self, path):
            file.add(self)
        else:
            self._file = None  # if the disk is full, the next call starts over
            with whole_file(path) as whole:
                whole.writelines(line.encode("utf-8") for line in _lines_of(self, 0, 0))
            self._file = _LedgerFile(path, self)

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Read a ledger file, without a last line that is incomplete; raise ValueError for a file that is no ledger."""
        lines, is_torn = read_lines(path)
        kinds = [line.pop("kind") for line in lines]
        if "run" not in kinds:
            raise ValueError(f"{path} is not a ledger: expected JSON lines that begin with a run")
        try:
            state: Line = {"evaluations": []}
            rounds: dict[int, Line] = {}
            for line, kind in zip(lines, kinds, strict=True):
                if kind == "run":
                    state |= line
                elif kind == "round":
                    rounds[line["round"]] = line
                elif kind == "evaluation":
                    state["evaluations"].append(line)
            state["rounds"] = [*rounds.values()]
            if is_torn and state.get("finished"):
                state["finished"] = False
            return _ledger_from(state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a ledger that this version of liveselect can read ({error!r}): did another write it?"
            ) from error


def new_run_id() -> str:
    """Return a name that no other run has; it decides nothing that is computed."""
    return uuid.uuid4().hex[:16]


def run_id_of(path: Path) -> str | None:
    """Return the name of the run that a ledger file is of, "" in files of older versions; None for no such file."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return "" if path.is_file() else None  # damaged, and still the only record of a run
    return str(first.get("run_id", "")) if isinstance(first, dict) else ""


def writable(text: object) -> str:
    """Return a text without halves of surrogate pairs, as cut emoji leave them, which no file or logger takes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def record_folder(path: Path) -> Path:
    """Return the folder to look into for the records of a run.

    This is ``path`` itself, except for the folder of files that W&B sends (``wandb/run-DATE-ID``, or the link
    ``wandb/latest-run``): the records of such a run are in ``PROJECT/ID`` beside ``wandb``.
    """
    found = _WANDB_RUN.fullmatch(path.resolve().name)
    if found is None or not path.is_dir():
        return path
    beside = sorted(path.resolve().parent.parent.glob(f"*/{found[1]}"))
    return beside[0] if len(beside) == 1 else path


class _LedgerFile:
    """What a ledger has written so far, so that it can add what is new."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path = path
        self._remember(ledger)

    def continues(self, ledger: Ledger, path: Path) -> bool:
        """Whether the file is still what was written, and the ledger only went on since."""
        if path != self._path or len(ledger.rounds) < self._rounds or len(ledger.evaluations) < self._evaluations:
            return False
        try:
            return path.stat().st_size == self._size
        except OSError:
            return False

    def add(self, ledger: Ledger) -> None:
        """Add what is new; the last round may have changed since it was written."""
        first = max(0, self._rounds - 1)
        lines = [*_lines_of(ledger, first, self._evaluations)]
        if self._rounds and lines[1] == self._last_round:
            del lines[1]
        append_lines(self._path, self._size, lines)
        self._remember(ledger)

    def _remember(self, ledger: Ledger) -> None:
        self._size = self._path.stat().st_size
        self._rounds, self._evaluations = len(ledger.rounds), len(ledger.evaluations)
        self._last_round = json_line("round", ledger.rounds[-1]) if ledger.rounds else ""


def _lines_of(ledger: Ledger, first_round: int, first_evaluation: int) -> Iterator[str]:
    """Yield the line about the run, then those of the rounds and evaluations from the given ones on."""
    about = {
        name: value for name, value in vars(ledger).items() if name not in ("rounds", "evaluations", "_file", "_means")
    }
    yield json_line("run", about)
    for record in ledger.rounds[first_round:]:
        yield json_line("round", record)
    for entry in ledger.evaluations[first_evaluation:]:
        yield json_line("evaluation", entry)


def _builtins(value: object) -> object:
    """Return a copy in which dataclasses are dictionaries.

    Unlike ``dataclasses.asdict`` it does not look at every number of a list, of which a ledger holds millions.
    """
    if is_dataclass(value):
        return {each.name: _builtins(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {name: _builtins(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(value) if value and isinstance(value[0], (int, float, str)) else [_builtins(each) for each in value]
    return value


def _compact(record: RoundRecord) -> object:
    if not record.overheard:
        return _builtins(record)
    captured = {"overheard": torch.tensor(record.overheard, dtype=torch.int64)}
    influence = torch.tensor(record.overheard_influence, dtype=torch.float64)
    rest = _builtins(replace(record, overheard=[], overheard_influence=[]))
    return {**cast(Line, rest), **captured, "overheard_influence": influence}


def _same_round(record: RoundRecord, other: RoundRecord) -> bool:
    return (record.plan, record.overheard_count) == (other.plan, len(other.overheard))


def _ledger_from(state: Line) -> Ledger:
    return Ledger(
        **{
            **state,
            "rounds": [_record_from(record) for record in state["rounds"]],
            "evaluations": [
                Evaluation(**{**entry, "metrics": _numbers(entry["metrics"])}) for entry in state["evaluations"]
            ],
        }
    )


def _example_from(state: Line) -> Example:
    return Example(**{**state, "marks": [(begin, end, weight) for begin, end, weight in state.get("marks", [])]})


def _numbers(named: Mapping[str, float | None]) -> dict[str, float]:
    """Return numbers, NaN for those that JSON has no word for."""
    return {name: math.nan if value is None else value for name, value in named.items()}


def _record_from(state: Line) -> RoundRecord:
    histogram = state["histogram"]
    influence = state["influence"]
    return RoundRecord(
        **{
            **state,
            **{name: state[name].tolist() for name in _CAPTURED if isinstance(state[name], Tensor)},
            "influence": [math.nan if each is None else each for each in influence] if None in influence else influence,
            "metrics": _numbers(state["metrics"]),
            "groups": {name: _numbers(row) for name, row in state["groups"].items()},
            "histogram": Histogram(**histogram) if histogram else None,
            "examples": [_example_from(example) for example in state["examples"]],
            "alarms": [Alarm(**alarm) for alarm in state.get("alarms", [])],
        }
    )
