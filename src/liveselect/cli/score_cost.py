"""What a scoring job costs, over all the times that it was stopped and continued."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from liveselect import distributed
from liveselect.cost import Cost, CostMeter, added

KEEPING = "keep files"


@dataclass
class SpentCost:
    """Keeps what each process of a job has spent in a file of the job's folder.

    Attributes:
        folder: of the job.
        meter: tells what this process spends.
        earlier: what it had spent when it was stopped, less what the meter shows at the beginning.
    """

    folder: Path
    meter: CostMeter
    earlier: Cost

    @classmethod
    def open(cls, folder: Path, meter: CostMeter) -> "SpentCost":
        """Continue with what was spent before, if anything was."""
        shown = {"seconds": meter.seconds, "flops": meter.flops}
        less = {kind: {phase: -amount for phase, amount in phases.items()} for kind, phases in shown.items()}
        return cls(folder, meter, added(_read(_file(folder, distributed.rank())), less))

    def keep(self) -> None:
        """Write down what was spent so far; a process that is killed loses what came after."""
        with self.meter.phase(KEEPING):  # opening a phase charges the open one
            spent = added(self.earlier, {"seconds": self.meter.seconds, "flops": self.meter.flops})
            file = _file(self.folder, distributed.rank())
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(spent))
            temporary.replace(file)

    def total(self) -> Cost:
        """Return seconds of this process, and FLOPs of all that had a part in the job."""
        self.keep()
        total: Cost = {"seconds": _read(_file(self.folder, distributed.rank()))["seconds"]}
        for file in sorted(self.folder.glob("cost-*.json")):
            total = added(total, {"flops": _read(file).get("flops", {})})
        return total


def _file(folder: Path, rank: int) -> Path:
    return folder / f"cost-{rank:04d}.json"


def _read(file: Path) -> Cost:
    try:
        found: Cost = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it; what it counted is then missing") from error
    return found
