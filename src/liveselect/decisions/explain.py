"""Why a candidate was chosen, or not, in each round of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liveselect.decisions.files import find_decisions, read_about, read_round, rounds_in
from liveselect.decisions.resumed import NOTHING_LACKS, Lacking, told_rounds
from liveselect.ledger import Ledger

NO_GROUPS = "pool"
"""What the only group of a pool without groups is called."""


@dataclass(frozen=True)
class Fate:
    """What one round did with a candidate.

    Attributes:
        round: index of the round.
        step: optimizer steps done when it ran.
        selector: who chose.
        row: the candidate's row of the decision ledger, None when the round neither compared nor measured it.
        chosen: how many candidates the round chose.
        left_out: rejected candidates that the round does not tell; this may be one of them.
        group: what the ledger knows of the candidate's group in the round.
    """

    round: int
    step: int
    selector: str
    row: Mapping[str, Any] | None
    chosen: int
    left_out: int
    group: Mapping[str, float] = field(default_factory=dict)


def explain(run: str | Path, candidate: int) -> list[Fate]:
    """Return what every round of ``run`` did with the candidate, in order.

    Raises:
        FileNotFoundError: there are no recorded decisions.
        ValueError: there is no such candidate, or a file is damaged.
    """
    folder = find_decisions(run)
    groups = _groups_of_rounds(folder)
    fates = []
    for index, path in rounds_in(folder).items():
        about = read_about(path)
        size = int(about.get("pool_size", candidate + 1))  # not in older files
        if not 0 <= candidate < size:
            raise ValueError(f"there is no candidate {candidate}: the pool of this run holds 0..{size - 1}")
        columns = read_round(path, ids=[candidate])
        row = {name: values[0] for name, values in columns.items()} if len(columns["id"]) else None
        known = {} if row is None else groups.get(index, {}).get(str(row["group"]), {})
        fates.append(
            Fate(index, int(about["step"]), about["selector"], row, int(about["chosen"]), int(about["left_out"]), known)
        )
    return fates


def tell(candidate: int, fates: list[Fate], lacking: Lacking = NOTHING_LACKS) -> list[str]:
    """Return the fates as lines for a person; rounds in which nothing happened to the candidate are summed up.

    Of the rounds that are ``lacking`` nothing is known, and that is said too.
    """
    told = [fate for fate in fates if fate.row is not None]
    names = sorted({str(fate.row["group"]) for fate in told if fate.row is not None} - {NO_GROUPS})
    lines = [f"candidate {candidate}" + (f", group {', '.join(names)}" if names else "")]
    for fate in told:
        lines += [f"round {fate.round}, step {fate.step}, {fate.selector}: {_verdict(fate)}"]
        lines += [f"    {text}" for text in _details(fate)]
    silent = [fate for fate in fates if fate.row is None]
    if silent:
        lines.append(f"in {len(silent)} of {len(fates)} rounds it was neither compared nor measured{_why(silent)}")
    if not any(fate.row["chosen"] for fate in told if fate.row is not None):
        where = f" in {told_rounds(fate.round for fate in fates)}" if lacking.rounds else ""
        lines.append(f"it was not chosen{where}" if where else "it was never chosen")
    if lacking.rounds:
        lines.append(f"not recorded here are {lacking.told()}")
    return lines


def _verdict(fate: Fate) -> str:
    row = fate.row or {}
    reason = row["reason"]
    if not row["chosen"]:
        return f"not chosen: {reason}"
    return f"chosen, {int(row['place']) + 1} of {fate.chosen} in training order: {reason}"


def _details(fate: Fate) -> list[str]:
    row = fate.row or {}
    lines = []
    if not math.isnan(row["influence"]):
        lines.append(f"measured influence {row['influence']:.6g} nats per unit learning rate")
    if not math.isnan(row["score"]):
        parts = [f"score {row['score']:.6g}"]
        parts += [f"{name} {row[name]:+.6g}" for name in ("bonus", "noise") if not math.isnan(row[name])]
        key = row["score"] + sum(row[name] for name in ("bonus", "noise") if not math.isnan(row[name]))
        text = " ".join(parts) + (f" = {key:.6g}" if len(parts) > 1 else "")
        if not math.isnan(row["threshold"]):
            text += f", threshold {row['threshold']:.6g}: {abs(key - row['threshold']):.3g} "
            text += "above" if key >= row["threshold"] else "below"
        lines.append(
            ("its group's " if "reward" in fate.group else "")
            + text
            + (f"; rank {int(row['rank']) + 1}" if not math.isnan(row["rank"]) else "")
        )
    elif not math.isnan(row["threshold"]):
        lines.append(f"it has no score; the smallest that was let through is {row['threshold']:.6g}")
    known = {name: value for name, value in fate.group.items() if name not in ("reward", "bonus")}
    if fate.group and row["group"] != NO_GROUPS:
        lines.append(f"its group {row['group']}: " + ", ".join(f"{name} {value:g}" for name, value in known.items()))
    return lines


def _why(silent: list[Fate]) -> str:
    left_out = sum(fate.left_out > 0 for fate in silent)
    return f" ({left_out} of them do not tell their lowest candidates)" if left_out else ""


def _groups_of_rounds(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    path = folder.parent / "ledger.jsonl"
    return {record.round: record.groups for record in Ledger.read(path).rounds} if path.is_file() else {}
