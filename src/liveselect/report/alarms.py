"""What the watch found wrong with the runs."""

from collections.abc import Sequence

from liveselect.report import elements, words
from liveselect.report.runs import Run


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
            parts.append(elements.details(title, elements.bullets(texts, "caveats"), is_open=len(texts) <= 3))
    said = "".join(parts) or elements.paragraph("No alarm was raised.")
    return f'<section id="alarms"><h2>Alarms</h2>{said}</section>'
