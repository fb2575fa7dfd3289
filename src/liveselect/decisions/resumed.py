"""A run that resumes in another folder: it takes the decisions of its earlier rounds along, or says where they are."""

import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from liveselect.decisions.files import FOLDER, DecisionLedger, read_about, rounds_in
from liveselect.json_lines import whole_file
from liveselect.ledger import Ledger, RoundRecord


class MissingRounds(NamedTuple):
    """Rounds without a file in a folder of decisions; as text, the end of a sentence that says where to look for them.

    Attributes:
        rounds: of the run, ascending.
        folders: where the run wrote before, and may have left their files.
    """

    rounds: Sequence[int]
    folders: Sequence[str]

    def __str__(self) -> str:
        if not self.folders:
            return f"{rounds_as_text(self.rounds)}, and the ledger names no other folder that could hold them"
        return f"{rounds_as_text(self.rounds)}: the run wrote to {', '.join(self.folders)} before"


def carry_decisions(decisions: DecisionLedger, ledger: Ledger, pool: str) -> None:
    """Bring the files of the ledger's rounds into the folder of ``decisions`` from where the run wrote them before.

    Files are linked if the file system can, and copied otherwise. A file belongs to the run if its round, step,
    selector, plan, run and pool are those of the ledger and of ``pool``, a fingerprint. Files of another run are kept
    beside the folder. ``ledger.decision_folders`` becomes the folder, and as long as rounds are missing, the earlier
    ones too.

    Raises:
        OSError: the files cannot be written.
    """
    here = str(decisions.folder.resolve())
    earlier = [folder for folder in ledger.decision_folders if folder != here]
    records = {record.round: record for record in ledger.rounds}
    found = {index: path for index, path in rounds_in(decisions.folder).items() if index in records}
    if not all(_is_of(path, records[index], pool, ledger.run_id) for index, path in found.items()):
        decisions.keep_older()
        found = {}
    missing = {index: record for index, record in records.items() if index not in found}
    # the latest folder first, then those kept beside the run's own
    kept = sorted(decisions.folder.parent.glob(f"{decisions.folder.name}-*"), reverse=True)
    for place in [*(Path(folder) for folder in reversed(earlier)), *kept]:
        for index, path in rounds_in(place).items():
            if index in missing and _is_of(path, missing[index], pool, ledger.run_id):
                _take(path, decisions.folder / path.name)
                del missing[index]
    ledger.decision_folders = [*(earlier if missing else ()), here]


def lacking_rounds(folder: Path) -> MissingRounds:
    """Return the rounds up to the last known one that ``folder`` does not hold; ValueError for a damaged ledger."""
    found = rounds_in(folder)
    file = folder.parent / "ledger.jsonl"
    ledger = Ledger.read(file) if folder.name == FOLDER and file.is_file() else Ledger()
    last = max([*found, *(record.round for record in ledger.rounds)], default=-1)
    rounds = [index for index in range(last + 1) if index not in found]
    here = str(folder.resolve())
    return MissingRounds(rounds, [place for place in ledger.decision_folders if place != here] if rounds else [])


def rounds_as_text(rounds: Iterable[int]) -> str:
    """Return ascending rounds as text, such as ``rounds 0-2, 5``."""
    ordered = list(rounds)
    # consecutive numbers have the same difference from their place in the list
    runs = [[index for _, index in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"round{'' if len(ordered) == 1 else 's'} {', '.join(spans) or 'none'}"


def _is_of(path: Path, record: RoundRecord, pool: str, run_id: str) -> bool:
    try:
        about = read_about(path)
    except ValueError:
        return False
    expected = {"step": record.step, "selector": record.selector, "plan": record.plan, "pool": pool, "run": run_id}
    return all(about.get(name) == str(value) for name, value in expected.items())


def _take(source: Path, target: Path) -> None:
    """Link or copy a file; files of rounds are replaced as a whole and never changed, so a link is enough."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as original, whole_file(target) as copy:
            shutil.copyfileobj(original, copy)
