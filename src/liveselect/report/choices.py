"""What one run chose: influence by round, sources, examples, and the table of all rounds."""

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

from liveselect.ledger import Example, RoundRecord
from liveselect.report import elements, pictures, words
from liveselect.report.runs import Run

ROUNDS_PICTURED = 12
ROUNDS_LISTED = 200
ROUNDS_IN_COLUMNS = 24
POINTS = 200
SOURCES_PICTURED = 12
SOURCES_LISTED = 40

TRUST = "regressor/spearman"

T = TypeVar("T")


def what_it_chose(run: Run) -> str:
    """Return the section about the choices of one run."""
    rounds = run.ledger.rounds
    if not rounds:
        return f"<section><h2>What {words.escaped(run.name)} chose</h2><p>No round was recorded.</p></section>"
    return (
        f"<section><h2>What {words.escaped(run.name)} chose</h2>"
        + _influence(rounds)
        + _sources(rounds)
        + _examples(rounds)
        + _rounds(rounds)
        + "</section>"
    )


def spread(items: Sequence[T], most: int = ROUNDS_PICTURED) -> list[T]:
    """Return at most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _influence(rounds: Sequence[RoundRecord]) -> str:
    scored = [record for record in rounds if record.histogram is not None or record.measured]
    if not scored:
        return "<h3>Influence</h3>" + elements.paragraph("No round measured or compared anything: the data were drawn.")
    figures = []
    for record in spread(scored):
        title = f"Round {record.round}, step {words.number(record.step)}"
        if record.measured:
            picture = pictures.value_histogram(record.influence, "nats per unit learning rate", f"{title}: measured")
            figures.append(elements.figure(picture, title, f"{words.number(len(record.measured))} measured"))
        if record.histogram is not None and not _has_arms(record):  # those have a section of their own
            chosen, compared = (sum(counts) for counts in (record.histogram.chosen, record.histogram.counts))
            picture = pictures.histogram(record.histogram, "score", f"{title}: compared")
            kept = f"{words.number(chosen)} of {words.number(compared)} chosen"
            figures.append(elements.figure(picture, title, kept))
    keys = {"measured": elements.AREA_KEY.format(colour="var(--series-1)", opacity=0.9)}
    if not any(record.measured for record in scored):
        keys = {}
    if any(record.histogram is not None and not _has_arms(record) for record in scored):
        keys["compared"] = elements.AREA_KEY.format(colour="var(--muted)", opacity=0.45)
        keys["chosen"] = elements.AREA_KEY.format(colour="var(--series-0)", opacity=0.9)
    left_out = f" {len(scored)} rounds did so; {ROUNDS_PICTURED} are drawn." if len(scored) > ROUNDS_PICTURED else ""
    return (
        "<h3>Influence by round</h3>"
        + elements.paragraph(
            "Influence is how much training on a candidate lowers the reference loss: right of zero it helps. Measured "
            "candidates were probed with the live model; compared ones carry the score that the choice was made by."
            + left_out,
            "note",
        )
        + elements.legend(keys)
        + elements.grid(figures, small=True)
    )


def _has_arms(record: RoundRecord) -> bool:
    return any("reward" in row for row in record.groups.values())


def _sources(rounds: Sequence[RoundRecord]) -> str:
    names = list(dict.fromkeys(name for record in rounds for name in record.groups))
    if len(names) < 2:
        return "<h3>Sources</h3>" + elements.paragraph("The pool has a single source, so there is no mixture to show.")
    chosen = {name: [_share(record, name, "chosen") for record in rounds] for name in names}
    available = {name: [_share(record, name, "available") for record in rounds] for name in names}
    names.sort(key=lambda name: -max(chosen[name] + available[name]))
    top = max(max(chosen[name] + available[name]) for name in names)
    places = spread(range(len(rounds)), POINTS)
    indices = [rounds[place].round for place in places]
    figures = []
    for name in names[:SOURCES_PICTURED]:
        taken, there = ([kind[name][place] for place in places] for kind in (chosen, available))
        drawn = pictures.shares(indices, taken, there, top, f"share of {name} over the rounds")
        before, now = words.percent(available[name][-1]), words.percent(chosen[name][-1])
        figures.append(elements.figure(drawn, name, f"{now} of the last choice, {before} of what was left"))
    columns_of = spread(range(len(rounds)), ROUNDS_IN_COLUMNS)
    rows = [
        [
            words.escaped(name),
            words.percent(available[name][-1]),
            *(words.percent(chosen[name][place]) for place in columns_of),
        ]
        for name in names[:SOURCES_LISTED]
    ]
    columns = ["source", "available", *(f"round {rounds[place].round}" for place in columns_of)]
    shown = elements.table(columns, rows, "Share of each source among the chosen")
    more = len(names) - SOURCES_LISTED
    return (
        "<h3>Share of each source</h3>"
        + elements.legend(
            {
                "share of the chosen": elements.LINE_KEY.format(colour="var(--series-0)", dash="none"),
                "share of what was available": elements.LINE_KEY.format(colour="var(--muted)", dash="4 4"),
            }
        )
        + elements.grid(figures, small=True)
        + elements.details(
            "The same as numbers",
            shown
            + (elements.paragraph(f"and {more} more") if more > 0 else "")
            + _known_about_sources(rounds[-1], names[:SOURCES_LISTED]),
        )
    )


def _share(record: RoundRecord, name: str, kind: str) -> float:
    # of very many groups a record holds only those that the round touched, so their sum is no total
    total = record.chosen if kind == "chosen" else record.candidates
    return record.groups.get(name, {}).get(kind, 0) / total if total else 0.0


def _known_about_sources(record: RoundRecord, names: Sequence[str]) -> str:
    """Return a table of what else the selector knows of each source, such as the reward of a bandit's arm."""
    counted = {"available", "measured", "chosen"}
    keys = list(dict.fromkeys(key for row in record.groups.values() for key in row if key not in counted))
    if not keys:
        return ""
    rows = [
        [words.escaped(name), *(words.number(record.groups[name].get(key)) for key in keys)]
        for name in names
        if name in record.groups
    ]
    return elements.paragraph(f"What the selector knew in round {record.round}:") + elements.table(
        ["source", *keys], rows, "What the selector knew of each source"
    )


def _examples(rounds: Sequence[RoundRecord]) -> str:
    with_examples = [record for record in rounds if record.examples]
    scored = [record for record in with_examples if any(example.score is not None for example in record.examples)]
    shown = spread(scored or with_examples[-1:])
    several = len({name for record in rounds for name in record.groups}) > 1
    if not shown:
        return ""
    parts = []
    for record in reversed(shown):
        columns = []
        ordered = sorted(record.examples, key=lambda example: not example.chosen)
        for chosen, examples in groupby(ordered, key=lambda example: example.chosen):
            title = "Chosen" if chosen else "Rejected"
            columns.append(
                f"<div><h3>{title}</h3>" + "".join(_example(example, several) for example in examples) + "</div>"
            )
        summary = f"Round {record.round}, step {words.number(record.step)}"
        html = '<div class="pair">' + "".join(columns) + "</div>"
        parts.append(elements.details(summary, html, is_open=record is shown[-1] and not _has_arms(record)))
    what = (
        "The highest scores among the chosen and the lowest among the rejected." if scored else "The first chosen ones."
    )
    return "<h3>Examples</h3>" + elements.paragraph(what, "note") + elements.search("Search in them") + "".join(parts)


def _example(example: Example, several: bool) -> str:
    score = "no score" if example.score is None else f"score {words.number(example.score)}"
    header = [example.group] if several else []
    return elements.article(
        [*header, score, f"candidate {example.id}"], example.text, "chosen" if example.chosen else "rejected"
    )


def _rounds(rounds: Sequence[RoundRecord]) -> str:
    """Return the table of all rounds: what every reader asks for, and folded away what the parts tell beside it."""
    metrics = list(dict.fromkeys(name for record in rounds for name in record.metrics))
    metrics.sort(key=lambda name: name != TRUST)  # how far the scores can be trusted comes first
    first = [name for name in metrics if name == TRUST]
    listed = spread(rounds, ROUNDS_LISTED)
    columns = ["round", "step", "selector", "candidates", "measured", "chosen", "time", "FLOPs"]
    rows = [
        [
            words.number(record.round),
            words.number(record.step),
            words.escaped(record.selector),
            words.number(record.candidates),
            words.number(len(record.measured)),
            words.number(record.chosen),
            words.duration(record.total_seconds),
            words.flops(record.total_flops) if record.total_flops else "–",
            *(words.number(record.metrics.get(name), 3) for name in first),
        ]
        for record in listed
    ]
    more = f" ({ROUNDS_LISTED} of {words.number(len(rounds))}, evenly spread)" if len(rounds) > ROUNDS_LISTED else ""
    shown = elements.table([*columns, *("rank correlation" for _ in first)], rows, "All rounds")
    if metrics:
        numbers = [
            [words.number(record.round), *(words.number(record.metrics.get(name)) for name in metrics)]
            for record in listed
        ]
        shown += elements.details("All metrics", elements.table(["round", *metrics], numbers, "All metrics"))
    return f"<h3>All rounds{more}</h3>{shown}"
