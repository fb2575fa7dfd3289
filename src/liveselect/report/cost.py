"""Where the cost of the runs went: a bar for each run on one scale, and a table of its phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from liveselect.report import elements, pictures, words
from liveselect.report.runs import Run

TRAINING, REST = "training", "other selection"
PHASES_DRAWN = 4
SMALL = 0.01
"""Of the time of a run; phases below it are told together."""
_TRAINING_COLOUR, _REST_COLOUR = "var(--faint)", "var(--muted)"

NO_TRAINING_TIME = (
    "Training time is written down at the end of each round and at each validation, and the record of this run stops "
    "before the first: what follows is selection alone."
)


@dataclass(frozen=True)
class Cost:
    """What a run spent, by phase; training is one of them.

    Attributes:
        seconds: wall-clock.
        flops: over all ranks; phases without a count are missing.
    """

    seconds: Mapping[str, float]
    flops: dict[str, float]


def cost_of(run: Run) -> Cost:
    """Return what a run spent, training first, then the phases from the longest to the shortest."""
    ledger = run.ledger
    seconds, flops = {TRAINING: ledger.training_seconds}, {TRAINING: ledger.training_flops}
    spent: list[tuple[Mapping[str, float], Mapping[str, float]]] = [
        (_before(ledger.before_seconds), _before(ledger.before_flops)),
        (ledger.around_seconds, {}),
        *((record.seconds, record.flops) for record in ledger.rounds),
    ]
    for of_seconds, of_flops in spent:
        for phase, amount in of_seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + amount
        for phase, amount in of_flops.items():
            seconds.setdefault(phase, 0.0)
            flops[phase] = flops.get(phase, 0.0) + amount
    order = sorted(seconds, key=lambda phase: (phase != TRAINING, -seconds[phase]))
    return Cost({phase: seconds[phase] for phase in order}, flops)


def where_the_cost_went(runs: Sequence[Run]) -> str:
    """Return the section about cost."""
    costs = [cost_of(run) for run in runs]
    colours = _colours(costs)
    longest = max(sum(cost.seconds.values()) for cost in costs)
    bars = "".join(_bar(run, cost, colours, longest) for run, cost in zip(runs, costs, strict=True))
    tables = "".join(f"<div>{_table(run, cost)}</div>" for run, cost in zip(runs, costs, strict=True))
    keys = {phase: elements.AREA_KEY.format(colour=colour, opacity=1) for phase, colour in colours.items()}
    return (
        '<section id="cost"><h2>Where the cost went</h2>'
        + elements.paragraph("Validation is not counted: it is neither training nor selection.", "note")
        + elements.legend(keys)
        + f'<div class="stacks">{bars}</div><div class="pair tables">{tables}</div></section>'
    )


def _before(spent: Mapping[str, float]) -> dict[str, float]:
    return {f"before training: {phase}": amount for phase, amount in spent.items()}


def _colours(costs: Sequence[Cost]) -> dict[str, str]:
    """Return a colour for training, for the longest phases of all runs together, and for the rest."""
    totals: dict[str, float] = {}
    for cost in costs:
        for phase, amount in cost.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + amount
    selection = {phase: amount for phase, amount in totals.items() if phase != TRAINING and amount > 0}
    drawn = sorted(selection, key=lambda phase: -selection[phase])[:PHASES_DRAWN]
    # the first colours belong to the runs, in the legend of the losses
    colours = {phase: f"var(--series-{(index + 1) % pictures.SERIES_COLOURS})" for index, phase in enumerate(drawn)}
    rest = {REST: _REST_COLOUR} if len(selection) > len(drawn) else {}
    return {TRAINING: _TRAINING_COLOUR, **colours, **rest}


def _bar(run: Run, cost: Cost, colours: Mapping[str, str], longest: float) -> str:
    drawn = [(cost.seconds[phase], colour) for phase, colour in colours.items() if phase in cost.seconds]
    rest = sum(amount for phase, amount in cost.seconds.items() if phase not in colours)
    share = f", {words.percent(run.ledger.selection_share)} of it selection" if run.knows_its_cost else ""
    text = words.escaped(words.duration(sum(cost.seconds.values())) + share)
    return f"<p><b>{words.escaped(run.name)}</b> {text}</p>" + elements.stack([*drawn, (rest, _REST_COLOUR)], longest)


def _table(run: Run, cost: Cost) -> str:
    """Return the table of the phases that matter, and folded away that of all."""
    total = sum(cost.seconds.values())
    small = [phase for phase, amount in cost.seconds.items() if phase != TRAINING and amount < SMALL * total]
    if len(small) > 2:
        name = f"{len(small)} phases below {words.percent(SMALL)}"
        merged = Cost(
            {p: amount for p, amount in cost.seconds.items() if p not in small}
            | {name: sum(cost.seconds[phase] for phase in small)},
            cost.flops | {name: sum(cost.flops.get(phase, 0.0) for phase in small)},
        )
        shown = _rows(merged, cost, f"Cost of {run.name}")
        shown += elements.details("All phases", _rows(cost, cost, f"Cost of {run.name}, all phases"))
    else:
        shown = _rows(cost, cost, f"Cost of {run.name}")
    note = "" if run.knows_its_cost else elements.paragraph(NO_TRAINING_TIME, "note")
    return f"<h3>{words.escaped(run.name)}</h3>{note}{shown}"


def _rows(cost: Cost, whole: Cost, caption: str) -> str:
    total = sum(whole.seconds.values())
    shares = [amount / total if total else 0.0 for amount in cost.seconds.values()]
    rows = [
        [
            words.escaped(phase),
            words.duration(amount),
            words.percent(share),
            words.flops(cost.flops[phase]) if cost.flops.get(phase) else "–",
        ]
        for (phase, amount), share in zip(cost.seconds.items(), shares, strict=True)
    ]
    rows.append(["total", words.duration(total), "", words.flops(sum(whole.flops.values()))])
    return elements.table(["phase", "time", "share", "FLOPs"], rows, caption, total=True, bars=(2, shares))
