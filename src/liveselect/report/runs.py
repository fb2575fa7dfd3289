"""Runs as the report sees them: ledgers found on disk, their names and their loss curves."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from liveselect.decisions import check_one_run
from liveselect.ledger import Evaluation, Ledger, RoundRecord, record_folder

LEDGER_NAME = "ledger.jsonl"
CONFIG_NAME = "config.yaml"
DEFAULT_FOLDER = "selection"
"""Where DataSelection puts the ledger inside the run's folder; the name says nothing about the run."""
PREFERRED_METRIC = "val_loss"
NO_SETTINGS = ("started", "name", "folder")

Axis = Literal["step", "seconds", "flops"]
Point = tuple[float, float]


class Section(NamedTuple):
    """A part of the page: its title, the name of its template, and what that shows as ``about``."""

    title: str
    template: str
    about: Mapping[str, object]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its name in the report, distinct among the runs.
        ledger: its record.
        config: the configuration file that LightningCLI left beside it, empty when there is none.
        folder: where its record was found, None when it was not read from a file.
    """

    name: str
    ledger: Ledger
    config: str = ""
    folder: Path | None = None

    @property
    def method(self) -> str:
        """How it chose: the preset, or else the selector that its ledger names."""
        names = [str(self.ledger.about[key]) for key in ("preset", "selector") if self.ledger.about.get(key)]
        name = next((name for name in names if name != "DataSelection"), self.name)
        return "random" if name == "UniformSelector" else name

    @property
    def is_random(self) -> bool:
        """Whether no round compared scores or measured anything, which makes it a baseline.

        A warm-up is drawn by another selector than the run's own, and a replay follows what another run chose.
        """
        about, rounds = self.ledger.about, self.ledger.rounds
        own = all(record.selector == about.get("selector", record.selector) for record in rounds)
        return bool(rounds) and own and about.get("preset") != "Replay" and all(map(_is_drawn, rounds))

    @property
    def knows_its_cost(self) -> bool:
        """Whether the cost of training was recorded at least once; shares mean nothing before."""
        return self.ledger.training_seconds > 0

    @property
    def is_under_way(self) -> bool:
        """Whether training has not come to its end, or was stopped before it."""
        return self.ledger.finished is False

    @property
    def settings(self) -> Mapping[str, object]:
        """What the run was set to, without what is no setting: when it began, and how it is called."""
        return {name: value for name, value in self.ledger.about.items() if name not in NO_SETTINGS}

    @property
    def last_step(self) -> int:
        """The last optimizer step of the record."""
        ledger = self.ledger
        return max([0, *(entry.step for entry in ledger.evaluations), *(record.step for record in ledger.rounds)])

    @property
    def total_seconds(self) -> float:
        """Seconds of training and selection, with what came before it."""
        return self.ledger.training_seconds + self.ledger.selection_seconds

    @property
    def total_flops(self) -> float:
        """FLOPs of training and selection, with what came before it."""
        return self.ledger.training_flops + self.ledger.selection_flops

    def curve(self, metric: str, axis: Axis) -> list[Point]:
        """Return ``metric`` against steps or total cost, ascending; values that are not finite are left out.

        The cost of a loss is what was spent to get that model, without a round at the same step, which serves the steps
        after it. The loss does not change while such a round runs, so the curve has a level piece there.
        """
        points: dict[float, float] = {}
        costs = _Costs(self.ledger, axis)
        for entry in self.ledger.evaluations:
            y = entry.metrics.get(metric, math.nan)
            for x in costs.of(entry):
                if math.isfinite(x) and math.isfinite(y):
                    points[x] = y
        return sorted(points.items())


class _Costs:
    """Computes what had been spent when a metric was evaluated."""

    def __init__(self, ledger: Ledger, axis: Axis) -> None:
        self._axis = axis
        rounds = sorted(ledger.rounds, key=lambda record: record.step)
        self._steps = [record.step for record in rounds]
        before = sum((ledger.before_seconds if axis == "seconds" else ledger.before_flops).values())
        self._spent = list(accumulate((_cost(record, axis) for record in rounds), initial=before))
        # a round that was measured between earlier steps makes no pause, so its cost is in what was spent by then
        pauses = (_cost(record, axis) if "staleness/max" not in record.metrics else 0.0 for record in rounds)
        self._pauses = list(accumulate(pauses, initial=0.0))

    def of(self, entry: Evaluation) -> tuple[float, ...]:
        """Return what was spent before a pause for a round at the evaluation's step, and after it."""
        if self._axis == "step":
            return (float(entry.step),)
        first, end = bisect_left(self._steps, entry.step), bisect_right(self._steps, entry.step)
        pause = self._pauses[end] - self._pauses[first]
        seconds = self._axis == "seconds"
        training = entry.training_seconds if seconds else entry.training_flops
        spent = entry.selection_seconds if seconds else entry.selection_flops
        selection = max(self._spent[first], spent - pause)
        return training + selection, training + selection + pause


def load_runs(paths: Iterable[Path], names: Sequence[str] = ()) -> list[Run]:
    """Read the ledgers in ``paths``, each a ledger file or a folder that holds some at any depth.

    A run has the name that is given here, or else the one that its logger gave it, or else that of its folder.

    Raises:
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, the decisions beside it are of another run, or the names are not one for
            each run, all different.
    """
    files: dict[Path, None] = {}
    for path in paths:
        files.update(dict.fromkeys(_ledgers_in(path)))
    for file in files:
        if file.name == LEDGER_NAME:
            check_one_run(file.parent / "decisions")
    folders = [file.parent.resolve() for file in files]
    if names and (len(names) != len(files) or len(set(names)) < len(names)):
        raise ValueError(
            f"expected a name for each of the {len(files)} runs ({', '.join(map(str, files))}), all different, got "
            f"{', '.join(names)}"
        )
    ledgers = [Ledger.read(file) for file in files]
    names = names or _names_of(ledgers, folders)
    return [
        Run(name, ledger, _config_of(file), folder)
        for name, ledger, file, folder in zip(
            names or _names_of(ledgers, folders), ledgers, files, folders, strict=True
        )
    ]


def choose_metric(runs: Sequence[Run]) -> str | None:
    """Return the loss to compare the runs by: the validation loss, or another one that every run evaluated."""
    evaluated = [entry.metrics for run in runs for entry in run.ledger.evaluations[:1]]
    shared = [name for name in (evaluated[0] if evaluated else {}) if all(name in metrics for metrics in evaluated)]
    losses = [name for name in shared if "loss" in name and not name.startswith("train")]
    return PREFERRED_METRIC if PREFERRED_METRIC in shared else next(iter([*losses, *shared]), None)


def value_at(curve: Sequence[Point], x: float) -> float | None:
    """Return the value of a curve at ``x``, linear between its points; None outside of them."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return next((y for x0, y in curve if x0 == x), None)


def reaches(curve: Sequence[Point], level: float) -> float | None:
    """Return where a curve is first at or below ``level``, linear between its points; None when it never is."""
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= level:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def has_arms(record: RoundRecord) -> bool:
    """Return whether the round compared groups by their rewards."""
    return any("reward" in row for row in record.groups.values())


def _is_drawn(record: RoundRecord) -> bool:
    return record.histogram is None and not (record.measured or record.captured or has_arms(record))


def _cost(record: RoundRecord, axis: Axis) -> float:
    return record.total_seconds if axis == "seconds" else record.total_flops


def _ledgers_in(path: Path) -> list[Path]:
    path = record_folder(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a {LEDGER_NAME} or a folder that holds one")
    found = sorted(path.rglob(LEDGER_NAME))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no {LEDGER_NAME}: expected the folder that a run with the DataSelection callback wrote to; "
            "the file appears after the first round"
        )
    return found


def _config_of(ledger: Path) -> str:
    above = ledger.parent.parent if ledger.parent.name == DEFAULT_FOLDER else ledger.parent
    found = next((place / CONFIG_NAME for place in (ledger.parent, above) if (place / CONFIG_NAME).is_file()), None)
    return "" if found is None else found.read_text(encoding="utf-8", errors="replace")


def _names_of(ledgers: Sequence[Ledger], folders: Sequence[Path]) -> list[str]:
    """Return the names that loggers gave the runs, as far as no two have the same; for the others those of folders."""
    of_folders = _distinct_names([folder.parent if folder.name == DEFAULT_FOLDER else folder for folder in folders])
    given = [str(ledger.about.get("name") or "") for ledger in ledgers]
    return [
        mine if mine and given.count(mine) == 1 and mine not in of_folders else folder
        for mine, folder in zip(given, of_folders, strict=True)
    ]


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by as few of its last parts as make all names distinct."""
    for depth in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({index})" for index, folder in enumerate(folders)]
