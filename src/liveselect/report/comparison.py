"""Several methods, tasks and seeds: what each method is worth beside the baseline, with intervals over pairs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

from liveselect.report import verdict, words
from liveselect.report.runs import Axis, Run

CONFIDENCE = 0.95
IN_TIME, AT_END, SHARE = "in equal time", "at its own end", "selection's share"
"""Columns of the table."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison: its task, method and seed, and its record."""

    task: str
    method: str
    seed: int
    run: Run


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, half the width of its 95% interval (None with one seed), and the number of seeds."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        """Return the interval of a normal mean by Student's distribution; None without values."""
        if not values:
            return None
        n = len(values)
        if n == 1:
            return cls(values[0], None, 1)
        spread = statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.fmean(values), spread * float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)), n)

    @property
    def clear(self) -> bool:
        """Whether it leaves zero out; never with one seed."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {words.decimals(self.half, 3)}"
        return words.decimals(self.mean, 3) + half


@dataclass(frozen=True)
class Row:
    """What a method is worth on a task.

    Attributes:
        task: name.
        method: name.
        loss: at equal total FLOPs, of the first metric.
        end: the same metric where its own training ended.
        differences: from the baseline of the same seed at equal total FLOPs, by metric; negative is better.
        in_time: the same of the first metric at equal total time; None where times cannot be compared.
        share: of the baseline's total FLOPs, and of its time, at which its final loss was reached; None where it was
            not in every seed, or not comparable.
        cost: selection's share of FLOPs and of time.
    """

    task: str
    method: str
    loss: Interval | None
    end: Interval | None
    differences: dict[str, Interval]
    in_time: Interval | None
    share: dict[Axis, float | None]
    cost: dict[Axis, float]

    def builtins(self) -> dict[str, object]:
        """Return it for JSON."""

        def plain(value: Interval | None) -> dict[str, float | int | None] | None:
            return None if value is None else {"mean": value.mean, "half": value.half, "seeds": value.seeds}

        return {
            "task": self.task,
            "method": self.method,
            "loss": plain(self.loss),
            "end": plain(self.end),
            "differences": {name: plain(value) for name, value in self.differences.items()},
            "in_time": plain(self.in_time),
            "share_of_baseline": dict(self.share),
            "selection_share": dict(self.cost),
        }


def rows_of(trials: Sequence[Trial], baseline: str, metrics: Sequence[str]) -> list[Row]:
    """Return a row for each task and method, in the order in which they come; those of the baseline too."""
    tasks = dict.fromkeys(trial.task for trial in trials)
    methods = dict.fromkeys(trial.method for trial in trials)
    return [
        _row(task, method, _pairs(trials, task, method, baseline), metrics)
        for task in tasks
        for method in methods
        if any((trial.task, trial.method) == (task, method) for trial in trials)
    ]


def table(rows: Sequence[Row], baseline: str, labels: dict[str, str]) -> list[list[str]]:
    """Return the table as texts, its head first."""
    first, *others = labels
    others = [name for name in others if any(name in row.differences for row in rows)]
    timed = any(row.in_time for row in rows if row.method != baseline)
    named = any(row.task for row in rows)
    head = ["method", labels[first], f"less {baseline}'s", *([IN_TIME] if timed else [])]
    head += [*(labels[name] for name in others), AT_END, f"as good as {baseline} at", SHARE]
    body = []
    for row in rows:
        differences = [row.differences.get(first), *([row.in_time] if timed else []), *map(row.differences.get, others)]
        body.append(_cells(row, row.method == baseline, differences))
    if not named:
        return [head, *body]
    return [["task", *head], *([row.task, *cells] for row, cells in zip(rows, body, strict=True))]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]]) + "\n"


def sentences(rows: Sequence[Row], baseline: str, metric: str) -> list[str]:
    """Return what came out of each method, for or against it."""
    said = []
    for row in rows:
        found = row.differences.get(metric)
        if row.method == baseline or found is None:
            continue
        place = f"On {row.task}, {row.method}" if row.task else row.method
        how = "lower" if found.mean < 0 else "higher"
        loss = f"loss by {words.decimals(abs(found.mean), 3)} nats per token"
        if found.half is None:
            doubt = ", with one seed, so how much of that is chance is not known"
        elif found.clear:
            doubt = f" (± {words.decimals(found.half, 3)}, {found.seeds} seeds)"
        else:
            doubt = f", which is no more than chance (± {words.decimals(found.half, 3)}, {found.seeds} seeds)"
        share = row.share.get("flops")
        reached = f"; it reached {baseline}'s final loss at {words.percent(share)} of its FLOPs" if share else ""
        said.append(f"{place} has a {how} {loss} than {baseline} at equal total FLOPs{doubt}{reached}.")
    return said


def over_seeds(runs: Sequence[Run], metric: str | None) -> list[str]:
    """Return what came out of each method over several seeds; nothing about methods with one.

    The same interval over pairs of seeds as in a comparison: a run's seed is that of its selection.
    """
    baseline = verdict.baseline_of(runs)
    if baseline is None or metric is None:
        return []
    trials = [Trial("", run.method, int(run.ledger.about.get("seed", 0)), run) for run in runs]
    rows = rows_of(trials, baseline.method, [metric])
    return sentences(
        [row for row in rows if row.differences and row.differences[metric].seeds > 1], baseline.method, metric
    )


def _pairs(trials: Sequence[Trial], task: str, method: str, baseline: str) -> list[tuple[Run, Run]]:
    """Return the runs of a method with those of the baseline of the same seed."""
    mine = {trial.seed: trial.run for trial in trials if (trial.task, trial.method) == (task, method)}
    base = {trial.seed: trial.run for trial in trials if (trial.task, trial.method) == (task, baseline)}
    return [(base[seed], run) for seed, run in mine.items() if seed in base]


def _row(task: str, method: str, pairs: Sequence[tuple[Run, Run]], metrics: Sequence[str]) -> Row:
    losses: list[float] = []
    differences: dict[str, Interval] = {}
    ends = [curve[-1][1] for _, run in pairs if (curve := run.curve(metrics[0], "step"))]
    for metric in metrics:
        found = [verdict.compare(base, run, metric, "flops") for base, run in pairs]
        there = [each for each in found if each is not None]
        if metric == metrics[0]:
            losses = [each.other for each in there]
        interval = Interval.of([each.other - each.baseline for each in there])
        if interval is not None:
            differences[metric] = interval
    times = [verdict.compare(base, run, metrics[0], "seconds") for base, run in pairs]
    in_time = [each.other - each.baseline for each in times if each is not None]
    saved: list[dict[Axis, float]] = [
        {axis: there / end for axis, end, there in verdict.savings(base, run, metrics[0])} for base, run in pairs
    ]
    axes: tuple[Axis, ...] = ("flops", "seconds")
    return Row(
        task,
        method,
        Interval.of(losses),
        Interval.of(ends),
        differences,
        Interval.of(in_time) if len(in_time) == len(pairs) else None,
        {axis: _mean([each.get(axis) for each in saved]) for axis in axes},
        {
            "flops": statistics.fmean([run.ledger.selection_flops_share for _, run in pairs] or [0.0]),
            "seconds": statistics.fmean([run.ledger.selection_share for _, run in pairs] or [0.0]),
        },
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def _cells(row: Row, is_baseline: bool, differences: Sequence[Interval | None]) -> list[str]:
    share = " / ".join(words.percent(value) for value in row.share.values() if value is not None)
    return [
        row.method,
        "–" if row.loss is None else str(row.loss),
        *("–" if value is None or is_baseline else str(value) for value in differences),
        "–" if row.end is None else str(row.end),
        "–" if is_baseline else share or "never",
        f"{words.percent(row.cost['flops'])} / {words.percent(row.cost['seconds'])}",
    ]
