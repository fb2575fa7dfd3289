"""One round as numbers and tables, the same for every logger."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liveselect.ledger import Evaluation, Example, Ledger, RoundRecord

PREFIX = "selection/"
BY_FLOPS = "selection_by_flops/"
SCREEN = "liveselect/"
"""The section of charts and texts in W&B, one screen of them."""
CORE: tuple[str, ...] = (
    "step",
    "round",
    "total_flops",
    "total_seconds",
    "time_share",
    "flops_share",
    "mfu_training",
    "mfu_whole",
)
CORE += ("candidates", "measured", "chosen", "alarms", "notes", "reference_loss", "mixture_loss")
"""Numbers that stay below ``selection/`` in W&B, which makes a page of panels of each section."""
OTHER_GROUPS = "(others)"
MAX_KEY_CHARACTERS = 80
"""Of a group's name in a key: loggers cut long keys or refuse them."""
EXAMPLE_COLUMNS = ["round", "step", "chosen", "score", "group", "id", "text"]

Cell = int | float | str | bool | None


@dataclass(frozen=True)
class RoundView:
    """One round, prepared for loggers.

    Attributes:
        record: the round's line in the ledger.
        ledger: the run so far.
        scalars: names with ``selection/`` in front, and numbers.
        decisions: file of every decision, where there is one.
        pool: fingerprint of the pool.
        examples: chosen and rejected candidates, within the limits of the monitor.
    """

    record: RoundRecord
    ledger: Ledger
    scalars: Mapping[str, float]
    decisions: Path | None
    pool: str
    examples: Sequence[Example] = ()


def round_scalars(record: RoundRecord, ledger: Ledger, names: Sequence[str]) -> dict[str, float]:
    """Return the numbers of a round for a logger; groups that are not in ``names`` are added up."""
    found = {name: value for name, value in record.scalars().items() if not name.startswith("chosen_share/")}
    found |= {
        "step": float(record.step),
        "total_flops": ledger.training_flops + ledger.selection_flops,
        "total_seconds": ledger.training_seconds + ledger.selection_seconds,
        "time_share": ledger.selection_share,
        "flops_share": ledger.selection_flops_share,
        **ledger.utilisation(),
        "notes": float(len(record.notes)),
        "alarms": float(len(record.alarms)),
    }
    found |= {f"cost/{phase}": seconds for phase, seconds in record.seconds.items()}
    found |= _group_scalars(record, names)
    return {PREFIX + name: value for name, value in found.items() if not math.isnan(value)}


def sectioned(name: str) -> str:
    """Return the key of a number in W&B, which makes a section of what stands before the first slash.

    A few stay in ``selection/``; ``selection/cost/choose`` becomes ``selection_cost/choose``, and what has no part of
    its own, such as ``selection/ratio``, stands in ``selection_round/``.
    """
    inside = name.removeprefix(PREFIX)
    if inside == name or inside in CORE:
        return name
    part, slash, rest = inside.partition("/")
    return f"selection_{part}/{rest}" if slash else f"selection_round/{part}"


def evaluation_scalars(entry: Evaluation) -> dict[str, float]:
    """Return the metrics of a validation, and the total cost by then."""
    total = entry.training_flops + entry.selection_flops
    shown = {BY_FLOPS + name: value for name, value in entry.metrics.items() if is_of_validation(name)}
    return {f"{PREFIX}total_flops": total, **shown}


def is_of_validation(name: str) -> bool:
    """Return whether a metric that was known at a validation is one of it, and not of training or of a schedule."""
    plain = name.lower().removesuffix("_epoch")
    return not (
        plain.startswith(("train", "lr-", "lr/")) or plain.endswith("_step") or plain in ("lr", "epoch", "step")
    )


def names_to_show(known: Sequence[str], record: RoundRecord, most: int) -> list[str]:
    """Return the groups with numbers of their own: those of earlier rounds, then the largest new ones."""
    new = [name for name in record.groups if name not in known]
    new.sort(key=lambda name: -record.groups[name].get("chosen", 0))
    return [*known, *new][:most]


def shortened(examples: Sequence[Example], rows: int, characters: int) -> list[Example]:
    """Return at most ``rows`` of the chosen and of the rejected examples, their texts cut."""
    kept = [example for example in examples if example.chosen][:rows]
    kept += [example for example in examples if not example.chosen][:rows]
    return [Example(one.id, one.group, one.score, one.chosen, one.text[:characters]) for one in kept]


def example_rows(view: RoundView) -> list[list[Cell]]:
    """Return the rows of the table of examples, of the columns ``EXAMPLE_COLUMNS``."""
    record = view.record
    return [[record.round, record.step, one.chosen, one.score, one.group, one.id, one.text] for one in view.examples]


def key_of(name: str) -> str:
    """Return a group's name as part of a logger's key: one line of limited length."""
    printable = "".join(letter if letter.isprintable() else " " for letter in name).strip()
    if len(printable) > MAX_KEY_CHARACTERS:
        printable = f"{printable[: MAX_KEY_CHARACTERS - 1]}…"
    return printable or "(no name)"


def _group_scalars(record: RoundRecord, names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    shown = 0.0
    if len({*names, *record.groups}) < 2:  # no mixture
        return found
    for name in names:
        row = record.groups.get(name, {})
        share = record.share(name)
        shown += share
        found[f"mixture/{key_of(name)}"] = share
        found |= {f"arms/{key}/{key_of(name)}": row[key] for key in ("reward", "pulls", "bonus") if key in row}
    if set(record.groups) - set(names):
        found[f"mixture/{OTHER_GROUPS}"] = max(0.0, 1.0 - shown)
    return found
