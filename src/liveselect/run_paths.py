"""Where the records of a run lie, given what a person calls the run."""

import re
from pathlib import Path

_WANDB_RUN = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(\w+)")


def record_folder(path: Path) -> Path:
    """Return the folder to look into for the records of a run.

    That is ``path`` itself, but for the folder in which W&B keeps what it sends (``wandb/run-DATE-ID``, or the link
    ``wandb/latest-run``): the records of that run lie in ``PROJECT/ID`` beside ``wandb``.
    """
    found = _WANDB_RUN.fullmatch(path.resolve().name)
    if found is None or not path.is_dir():
        return path
    beside = sorted(path.resolve().parent.parent.glob(f"*/{found[1]}"))
    return beside[0] if len(beside) == 1 else path
