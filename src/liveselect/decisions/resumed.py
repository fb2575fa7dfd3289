"""A run that goes on in another folder: decisions of its earlier rounds come along, or it is told where they lie."""

import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from liveselect.decisions.files import FOLDER, DecisionLedger, read_about, replacing, rounds_in
from liveselect.ledger import Ledger, RoundRecord


class Lacking(NamedTuple):
    """What a folder of decisions does not hold.

    Attributes:
        rounds: of the run, ascending, that have no file in the folder.
        folders: where the run wrote before, and may have left them.
    """

    rounds: Sequence[int] = ()
    folders: Sequence[str] = ()

    def told(self) -> str:
        """Return the rounds and where to look for them, as the end of a sentence."""
        if not self.folders:
            return f"{told_rounds(self.rounds)}, and the ledger names no other folder that could hold them"
        return f"{told_rounds(self.rounds)}: the run wrote to {', '.join(self.folders)} before"


NOTHING_LACKS = Lacking()


def carry_decisions(decisions: DecisionLedger, ledger: Ledger, pool: str) -> None:
    """Bring the files of the ledger's rounds into the folder of ``decisions`` from where the run wrote them before.

    Files are linked where the disk can, and copied elsewhere; a file counts as the run's own when round, step, selector
    and plan are those of the ledger. What is of another run is kept beside the folder. The ledger notes the folder, and
    as long as rounds lack also the earlier ones.

    Args:
        decisions: of the run that goes on.
        ledger: of the run; its ``decision_folders`` change.
        pool: fingerprint of the pool.

    Raises:
        OSError: the disk does not take the files.
    """
    here = str(decisions.folder.resolve())
    earlier = [folder for folder in ledger.decision_folders if folder != here]
    records = {record.round: record for record in ledger.rounds}
    found = {index: path for index, path in rounds_in(decisions.folder).items() if index in records}
    if not all(_is_of(path, records[index], pool) for index, path in found.items()):
        decisions.keep_older()
        found = {}
    lacking = {index: record for index, record in records.items() if index not in found}
    # the latest folder first, then what was kept beside the run's own
    kept = sorted(decisions.folder.parent.glob(f"{decisions.folder.name}-*"), reverse=True)
    for place in [*(Path(folder) for folder in reversed(earlier)), *kept]:
        for index, path in rounds_in(place).items():
            if index in lacking and _is_of(path, lacking[index], pool):
                _take(path, decisions.folder / path.name)
                del lacking[index]
    ledger.decision_folders = [*(earlier if lacking else ()), here]


def lacking_rounds(folder: Path) -> Lacking:
    """Return which rounds of its run ``folder`` does not hold; what is to come after the last one known cannot lack.

    Raises:
        ValueError: the ledger beside the folder is damaged.
    """
    found = rounds_in(folder)
    file = folder.parent / "ledger.jsonl"
    ledger = Ledger.read(file) if folder.name == FOLDER and file.is_file() else Ledger()
    last = max([*found, *(record.round for record in ledger.rounds)], default=-1)
    rounds = [index for index in range(last + 1) if index not in found]
    here = str(folder.resolve())
    return Lacking(rounds, [place for place in ledger.decision_folders if place != here] if rounds else [])


def told_rounds(rounds: Iterable[int]) -> str:
    """Return ascending rounds as text, such as ``rounds 0-2, 5``."""
    ordered = list(rounds)
    # what follows one another keeps its distance from its place in the list
    runs = [[index for _, index in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"round{'' if len(ordered) == 1 else 's'} {', '.join(spans) or 'none'}"


def _is_of(path: Path, record: RoundRecord, pool: str) -> bool:
    try:
        about = read_about(path)
    except ValueError:
        return False
    expected = {"step": record.step, "selector": record.selector, "plan": record.plan, "pool": pool}
    return all(about.get(name) == str(value) for name, value in expected.items())


def _take(source: Path, target: Path) -> None:
    """Link or copy a file; files of rounds are replaced as a whole and never changed, so a link is as good."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
