"""What one run chose: influence by round, sources, examples, all rounds as a table, and the drift between rounds."""

from collections.abc import Sequence

from liveselect.ledger import RoundRecord, spread
from liveselect.report import charts, words
from liveselect.report.marks import strongest
from liveselect.report.runs import Run, Section, has_arms

# limits of the page, which stays readable and small however long the run was
ROUNDS_PICTURED = 12
ROUNDS_LISTED = 200
ROUNDS_IN_COLUMNS = 24
POINTS_DRAWN = 200
SOURCES_PICTURED = 12
SOURCES_LISTED = 40

REGRESSOR_SPEARMAN, REGRESSOR_HELD_OUT = "regressor/spearman", "regressor/held_out"
COUNT_COLUMNS = {"available", "measured", "chosen"}

DRIFT = {
    "drift/rank_correlation": ("Scores", "rank correlation: 1 is the same order, 0 unrelated, −1 reversed"),
    "drift/mixture": ("Mixture", "distance between the groups' shares: 0 is the same, 1 no group in common"),
    "drift/overlap": ("Candidates", "share of the plan that was also in the previous plan"),
    REGRESSOR_SPEARMAN: ("Regressor", "rank correlation of predicted and measured influence, held out"),
    "regressor/top_fifth": ("Choice", "influence of the fifth predicted best over that of all held out, in sd"),
    REGRESSOR_HELD_OUT: ("Held out", "measured candidates that the two before are of"),
}


def choices_section(run: Run) -> Section:
    """Return the section about the choices of one run."""
    rounds = run.ledger.rounds
    metrics = list(dict.fromkeys(name for record in rounds for name in record.metrics))
    with_examples = [record for record in rounds if record.examples]
    scored = [record for record in with_examples if any(example.score is not None for example in record.examples)]
    about = {
        "rounds": rounds,
        "listed": spread(rounds, ROUNDS_LISTED),
        # whether scores can be trusted comes first
        "metrics": sorted(metrics, key=lambda name: name != REGRESSOR_SPEARMAN),
        "trust": REGRESSOR_SPEARMAN if REGRESSOR_SPEARMAN in metrics else "",
        "held_out": REGRESSOR_HELD_OUT,
        "influence": _influence(rounds),
        "sources": _sources(rounds),
        "examples": [
            {"record": record, "strongest": strongest([example.marks for example in record.examples])}
            for record in spread(scored or with_examples[-1:], ROUNDS_PICTURED)
        ],
        "has_marks": any(example.marks for record in with_examples for example in record.examples),
        "examples_are_scored": bool(scored),
        "has_arms": has_arms,
    }
    return Section(f"What {run.name} chose", "choices", about)


def drift_section(run: Run) -> Section | None:
    """Return the section about consecutive rounds of one run; None when nothing was recorded of them."""
    rounds = run.ledger.rounds
    several = len({name for record in rounds for name in record.groups}) > 1
    figures = []
    for name, (title, text) in DRIFT.items():
        points = [(float(record.round), record.metrics[name]) for record in rounds if name in record.metrics]
        if len(points) > 1 and (several or name != "drift/mixture"):
            chart = charts.bounded_chart(spread(points, POINTS_DRAWN), f"{title} of {run.name}: {text}")
            figures.append((chart, title, text))
    return Section(f"How the preferences of {run.name} moved", "drift", {"figures": figures}) if figures else None


def _influence(rounds: Sequence[RoundRecord]) -> dict[str, object]:
    scored = [record for record in rounds if record.histogram is not None or record.measured]
    figures = []
    for record in spread(scored, ROUNDS_PICTURED):
        title = f"Round {record.round}, step {words.number(record.step)}"
        if record.measured:
            picture = charts.value_histogram(record.influence, "nats per unit learning rate", f"{title}: measured")
            figures.append((picture, title, f"{words.number(len(record.measured))} measured"))
        if record.histogram is not None and not has_arms(record):
            chosen, compared = (sum(counts) for counts in (record.histogram.chosen, record.histogram.counts))
            picture = charts.histogram(record.histogram, "score", f"{title}: compared")
            figures.append((picture, title, f"{words.number(chosen)} of {words.number(compared)} chosen"))
    return {
        "figures": figures,
        "rounds": len(scored),
        "limit": ROUNDS_PICTURED,
        "measured": any(record.measured for record in scored),
        "compared": any(record.histogram is not None and not has_arms(record) for record in scored),
    }


def _sources(rounds: Sequence[RoundRecord]) -> dict[str, object] | None:
    """Return the contents of the part about the mixture; None where the pool has a single source."""
    names = list(dict.fromkeys(name for record in rounds for name in record.groups))
    if len(names) < 2:
        return None
    chosen = {name: [record.share(name, "chosen") for record in rounds] for name in names}
    available = {name: [record.share(name, "available") for record in rounds] for name in names}
    names.sort(key=lambda name: -max(chosen[name] + available[name]))
    top = max(max(chosen[name] + available[name]) for name in names)
    places = spread(range(len(rounds)), POINTS_DRAWN)
    figures = []
    for name in names[:SOURCES_PICTURED]:
        taken, there = ([kind[name][place] for place in places] for kind in (chosen, available))
        drawn = charts.shares(
            [rounds[place].round for place in places], taken, there, top, f"share of {name} over the rounds"
        )
        before, now = words.percent(available[name][-1]), words.percent(chosen[name][-1])
        figures.append((drawn, name, f"{now} of the last choice, {before} of what was available"))
    in_columns, listed = spread(range(len(rounds)), ROUNDS_IN_COLUMNS), names[:SOURCES_LISTED]
    known = rounds[-1].groups
    return {
        "figures": figures,
        "columns": [rounds[place].round for place in in_columns],
        "rows": [(name, available[name][-1], [chosen[name][place] for place in in_columns]) for name in listed],
        "more": len(names) - len(listed),
        # what else the selector knows of each source, such as the reward of a bandit's arm
        "known_keys": list(dict.fromkeys(key for row in known.values() for key in row if key not in COUNT_COLUMNS)),
        "known": [(name, known[name]) for name in listed if name in known],
    }
