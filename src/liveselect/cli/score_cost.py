"""The cost of a scoring job, summed over interruptions."""

import json
from dataclasses import dataclass
from pathlib import Path

from liveselect import distributed
from liveselect.cost import Cost, CostMeter, added
from liveselect.json_lines import whole_file

FILES_PHASE = "keep files"


@dataclass
class SpentCost:
    """Keeps the cost of each process of a job in a file of the job's folder.

    Attributes:
        folder: of the job.
        meter: measures the cost of this process.
        earlier: cost before it was stopped, less the meter's at the beginning.
    """

    folder: Path
    meter: CostMeter
    earlier: Cost

    @classmethod
    def open(cls, folder: Path, meter: CostMeter) -> "SpentCost":
        """Continue from the cost before, if there is any."""
        shown = meter.spent()
        less = {kind: {phase: -amount for phase, amount in phases.items()} for kind, phases in shown.items()}
        return cls(folder, meter, added(_read(_file(folder, distributed.rank())), less))

    def keep(self) -> None:
        """Write the cost so far; a process that is killed loses the cost after that."""
        with self.meter.phase(FILES_PHASE):  # opening a phase charges the open one
            spent = added(self.earlier, self.meter.spent())
            with whole_file(_file(self.folder, distributed.rank())) as file:
                file.write(json.dumps(spent).encode())

    def total(self) -> Cost:
        """Return seconds of this process, and FLOPs of all processes of the job."""
        self.keep()
        total: Cost = {"seconds": _read(_file(self.folder, distributed.rank()))["seconds"]}
        for file in sorted(self.folder.glob("cost-*.json")):
            of_rank = _read(file)
            total = added(total, {kind: of_rank.get(kind, {}) for kind in ("flops", "uncounted")})
        return total


def _file(folder: Path, rank: int) -> Path:
    return folder / f"cost-{rank:04d}.json"


def _read(file: Path) -> Cost:
    try:
        found: Cost = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it; the cost in it is then missing") from error
    return found
