"""Why a candidate was chosen, or not, in each round of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.dataset as ds

from liveselect.decisions.files import find_decisions, read_about, read_rows, rounds_in
from liveselect.decisions.resumed import MissingRounds, rounds_as_text
from liveselect.decisions.table import Row
from liveselect.ledger import Ledger

NO_GROUPS = "pool"
"""The name of the only group of a pool without groups."""


@dataclass(frozen=True)
class Fate:
    """What one round decided about a candidate.

    Attributes:
        round: index of the round.
        step: optimizer steps done when it ran.
        selector: class name of the selector.
        row: the candidate's row of the decision ledger, None when the round neither compared nor measured it.
        chosen: number of candidates that the round chose.
        left_out: number of rejected candidates without a row; this may be one of them.
        ready: its score, where an earlier round's file holds it, and this round rejected it or did not compare it.
        group: what the ledger records of the candidate's group in the round.
    """

    round: int
    step: int
    selector: str
    row: Row | None
    chosen: int
    left_out: int
    ready: float | None = None
    group: Mapping[str, float] = field(default_factory=dict)


def explain(run: str | Path, candidate: int) -> list[Fate]:
    """Return what every round of ``run`` decided about the candidate, in order.

    Raises:
        FileNotFoundError: there are no recorded decisions.
        ValueError: there is no such candidate, or a file is damaged.
    """
    folder = find_decisions(run)
    file = folder.parent / "ledger.jsonl"
    groups = {record.round: record.groups for record in Ledger.read(file).rounds} if file.is_file() else {}
    fates = []
    for index, path in rounds_in(folder).items():
        about = read_about(path)
        size = int(about.get("pool_size", candidate + 1))  # not in older files
        if not 0 <= candidate < size:
            raise ValueError(f"there is no candidate {candidate}: the pool of this run holds 0..{size - 1}")
        row = next(iter(read_rows(path, where=ds.field("id") == candidate).to_pylist()), None)
        known = groups.get(index, {}).get(row["group"], {}) if row else {}
        fates.append(
            Fate(
                index,
                int(about["step"]),
                about["selector"],
                row,
                int(about["chosen"]),
                int(about["left_out"]),
                _ready_score(path, about, candidate) if row is None else None,
                known,
            )
        )
    return fates


def _ready_score(path: Path, about: Mapping[str, str], candidate: int) -> float | None:
    earlier = path.with_name(about.get("scores_in", path.name))
    if earlier == path or not earlier.is_file():
        return None
    rows = read_rows(earlier, ["score"], ds.field("id") == candidate)["score"].to_pylist()
    return rows[0] if rows else None


def lines_about(candidate: int, fates: list[Fate], missing: MissingRounds | None = None) -> list[str]:
    """Return the fates as lines for a person; rounds without the candidate, and ``missing`` ones, are summed up."""
    rows = [(fate, fate.row) for fate in fates if fate.row is not None]
    names = sorted({row["group"] for _, row in rows} - {NO_GROUPS})
    lines = [f"candidate {candidate}" + (f", group {', '.join(names)}" if names else "")]
    for fate, row in rows:
        verdict = f"chosen, {row['place'] + 1} of {fate.chosen} in training order" if row["chosen"] else "not chosen"
        lines.append(f"round {fate.round}, step {fate.step}, {fate.selector}: {verdict}: {row['reason']}")
        lines += [f"    {text}" for text in _details(row, fate.group)]
    ready = [fate for fate in fates if fate.ready is not None]
    if ready:
        rounds = rounds_as_text(fate.round for fate in ready)
        lines.append(f"in {rounds} it was not chosen, by the same score as before ({ready[0].ready:.6g}), or used up")
    without_row = [fate for fate in fates if fate.row is None and fate.ready is None]
    if without_row:
        cut = sum(fate.left_out > 0 for fate in without_row)
        why = f" ({cut} of them did not record their lowest candidates)" if cut else ""
        lines.append(f"in {len(without_row)} of {len(fates)} rounds it was neither compared nor measured{why}")
    if not any(row["chosen"] for _, row in rows):
        seen = rounds_as_text(fate.round for fate in fates)
        lines.append(f"it was not chosen in {seen}" if missing and missing.rounds else "it was never chosen")
    if missing and missing.rounds:
        lines.append(f"not recorded here are {missing}")
    return lines


def _details(row: Row, group: Mapping[str, float]) -> list[str]:
    lines = []
    if row["influence"] is not None:
        lines.append(f"measured influence {row['influence']:.6g} nats per unit learning rate")
    if row["score"] is not None:
        added = {name: row[name] for name in ("bonus", "noise") if row[name] is not None}
        key = row["score"] + sum(added.values())
        text = " ".join([f"score {row['score']:.6g}", *(f"{name} {value:+.6g}" for name, value in added.items())])
        text += f" = {key:.6g}" if added else ""
        if row["threshold"] is not None:
            side = "above" if key >= row["threshold"] else "below"
            text += f", threshold {row['threshold']:.6g}: {abs(key - row['threshold']):.3g} {side}"
        if row["rank"] is not None:
            text += f"; rank {row['rank'] + 1}"
        lines.append(("its group's " if "reward" in group else "") + text)
    elif row["threshold"] is not None:
        lines.append(f"it has no score; the smallest that passed is {row['threshold']:.6g}")
    if group and row["group"] != NO_GROUPS:
        known = (f"{name} {value:g}" for name, value in group.items() if name not in ("reward", "bonus"))
        lines.append(f"its group {row['group']}: " + ", ".join(known))
    return lines
