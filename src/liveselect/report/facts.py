"""What the runs of a report are: when they ran, on what, with which model and versions."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from liveselect.report import words
from liveselect.report.runs import Run

RUNS_NAMED = 4
"""Runs whose own value is shown where they differ; the settings have those of all."""
_VERSIONS = ("liveselect", "torch", "lightning")
_SIZES = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def facts_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return facts by name: one value where all runs agree, else one for each run; what no record says is left out."""
    of_runs = [_facts(run) for run in runs]
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for facts in of_runs for name in facts):
        values = [facts.get(name, "not recorded") for facts in of_runs]
        if len(set(values)) == 1:
            found[name] = values[:1]
        else:
            lines = [f"{run.name}: {value}" for run, value in zip(runs, values, strict=True)]
            left = len(lines) - RUNS_NAMED
            found[name] = [*lines[:RUNS_NAMED], *([f"and {left} more runs"] if left > 0 else [])]
    return found


def _facts(run: Run) -> dict[str, str]:
    about = run.ledger.about
    found = {
        "Started": _day(about.get("started")),
        "Duration": _duration(run),
        "Model": _model(about),
        "Training": _training(run),
        "Device": _device(about),
        "Versions": ", ".join(f"{name} {about[key]}" for name in _VERSIONS if (key := f"versions.{name}") in about),
    }
    return {name: value for name, value in found.items() if value}


def _day(started: object) -> str:
    try:
        return datetime.fromisoformat(str(started)).strftime("%d %B %Y, %H:%M UTC").lstrip("0") if started else ""
    except ValueError:
        return str(started)


def _duration(run: Run) -> str:
    if not run.knows_its_cost:
        return ""
    under_way = " so far" if run.is_under_way else ""
    return f"{words.duration(run.total_seconds)}{under_way}, without validation"


def _model(about: Mapping[str, object]) -> str:
    name, size = about.get("model"), about.get("model.parameters")
    if not isinstance(size, int | float):
        return str(name or "")
    return f"{name}, {short(size)} parameters"


def _training(run: Run) -> str:
    about, parts = run.ledger.about, []
    steps, whole = run.last_step, about.get("max_steps")
    of = f" of {words.number(whole)}" if isinstance(whole, int) and whole > 0 and steps < whole else ""
    if steps:
        parts.append(f"{words.number(steps)}{of} steps")
    if isinstance(batch := about.get("global_batch"), int):
        parts.append(f"{words.number(batch)} sequences a step")
    if run.ledger.training_tokens:
        parts.append(f"{short(run.ledger.training_tokens)} tokens")
    return ", ".join(parts)


def _device(about: Mapping[str, object]) -> str:
    if "device" not in about:
        return ""
    ranks, kind = about.get("ranks", 1), str(about["device"])
    name = str(about.get("device.name") or kind)
    return f"{f'{ranks} × ' if ranks != 1 else ''}{name}{f', {about[key]}' if (key := 'precision') in about else ''}"


def short(amount: float) -> str:
    """Return a large number with three digits and k, M or B."""
    unit, letter = next(((unit, letter) for unit, letter in _SIZES if amount >= unit), (1.0, ""))
    return f"{amount / unit:.3g}{letter}"
