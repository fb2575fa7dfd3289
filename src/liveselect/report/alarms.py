"""What the watch found wrong with the runs."""

from collections.abc import Sequence

from liveselect.report import elements, words
from liveselect.report.choices import spread
from liveselect.report.runs import Run

LISTED = 100


def what_was_wrong(runs: Sequence[Run]) -> str:
    """Return the section about alarms: those of the same kind and run together, the rounds in order."""
    parts = []
    for run in runs:
        kinds: dict[str, list[str]] = {}
        for record in run.ledger.rounds:
            for alarm in record.alarms:
                kinds.setdefault(alarm.kind, []).append(
                    f"Round {alarm.round}, step {words.number(alarm.step)}: {alarm.text}."
                )
        if not kinds:
            continue
        parts.append(f"<h3>{words.escaped(run.name)}</h3>")
        for kind, texts in kinds.items():
            title = f"{kind}: {len(texts)} alarm{'s' if len(texts) > 1 else ''}"
            title += f", {LISTED} of them, evenly spread" if len(texts) > LISTED else ""
            listed = elements.bullets(spread(texts, LISTED), "caveats")
            parts.append(elements.details(title, listed, is_open=len(texts) <= 3))
    said = "".join(parts) or elements.paragraph("No alarm was raised.")
    return f'<section id="alarms"><h2>Alarms</h2>{said}</section>'
