"""The folder of a run's records: every run has one of its own, and no other process writes to it meanwhile."""

import logging
import os
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import lightning.pytorch as pl
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.grammar import SelectionWarning
from liveselect.ledger import Ledger, run_id_of
from liveselect.looking import only_looking

log = logging.getLogger("liveselect")

LEDGER_FILE = "ledger.jsonl"
LOCK_FILE = ".lock"
PATIENCE = 10.0
"""Seconds that a resumed run waits for its own folder: what is left of a killed process lets go soon."""


def local_folder(dirpath: str | Path) -> Path:
    """Return a folder that a user has named; raise TypeError or ValueError where nothing can be locked and renamed."""
    if not isinstance(dirpath, str | os.PathLike):
        raise TypeError(f"expected dirpath to be a folder, got {dirpath!r}")
    if is_remote(dirpath):
        raise ValueError(
            f"expected dirpath on a local or mounted file system, got {str(dirpath)!r}: the records of a run are "
            "locked and renamed, so write them to a local folder and copy it"
        )
    return Path(dirpath).expanduser()


def is_remote(path: object) -> bool:
    """Return whether a path is a URL, such as loggers and checkpoints may be given."""
    return "://" in str(path)


def logger_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of a run where its logger gives every run a local one, or None.

    A logger that keeps nothing on the disk (MLflow with a server) still names its runs. One that cannot say where it
    writes costs a warning.
    """
    with only_looking("a logger could not say where it writes"):
        return _folder_of(trainer)
    return None


def _folder_of(trainer: pl.Trainer) -> Path | None:
    logger = trainer.logger
    if logger is None or is_remote(logger.save_dir or trainer.default_root_dir):
        return None
    if getattr(logger, "log_dir", None) is not None:
        return Path(trainer.log_dir or trainer.default_root_dir)
    name, version = logger.name, logger.version
    if not name or version in (None, ""):
        return None
    place = Path(logger.save_dir or trainer.default_root_dir)
    return place / str(name) / (version if isinstance(version, str) else f"version_{version}")


class RunFolder:
    """Holds the folder of a run while it is fitted; a lock of a process that was killed is gone with it."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def claim(self, wanted: Path, run_id: str, goes_on: bool, apart: bool) -> Path:
        """Return the folder that the records of a run go to, which is now this process's own.

        A run that goes on finds the folder that it wrote to. Where another run holds the folder, the next free one of
        ``wanted-1``, ``wanted-2`` is taken. The ledger of an earlier run is kept under another name.

        Args:
            wanted: the folder, if nobody else has it.
            run_id: of the run.
            goes_on: whether the run has been fitted before.
            apart: whether even a folder that an earlier run has left is another's.
        """
        self.release()
        folder = wanted
        with only_looking(f"{wanted} could not be locked for this run"):
            folder = self._find(wanted, run_id, goes_on, apart)
        with only_looking(f"the ledger of an earlier run in {folder} could not be kept under another name"):
            _keep_older_ledger(folder / LEDGER_FILE, run_id)
        return folder

    def release(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _find(self, wanted: Path, run_id: str, goes_on: bool, apart: bool) -> Path:
        ledgers = {folder: run_id_of(folder / LEDGER_FILE) for folder in (wanted, *_numbered(wanted))}
        if goes_on:
            own = next((folder for folder, found in ledgers.items() if found == run_id), None)
            if own is not None and self._locks(own, PATIENCE):
                return own
        elif apart:
            _warn_of_a_run_cut_off([folder for folder, found in ledgers.items() if found is not None])
        busy = None
        for folder in chain((wanted,), (wanted.with_name(f"{wanted.name}-{i}") for i in count(1))):
            if ledgers.get(folder) is not None and (apart or folder != wanted):
                continue
            if self._locks(folder, 0):
                break
            busy = busy or folder
        if busy is not None:
            log.warning("another run is writing to %s: the records of this run are in %s", busy, folder)
        elif folder != wanted:
            log.info("%s holds the records of an earlier run: those of this run are in %s", wanted, folder)
        return folder

    def _locks(self, folder: Path, patience: float) -> bool:
        """Return whether nobody else holds the folder; where nothing can be locked, nobody is known to."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK_FILE, thread_local=False)
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        except (OSError, NotImplementedError):  # read-only, or a network file system without locks: writing will tell
            return True
        self._lock = lock
        return True


def _numbered(wanted: Path) -> Iterator[Path]:
    """Yield the folders beside ``wanted`` that other runs have taken, in order."""
    found = {path.name.removeprefix(f"{wanted.name}-"): path for path in wanted.parent.glob(f"{wanted.name}-*")}
    yield from (found[name] for name in sorted((name for name in found if name.isdecimal()), key=int))


def _warn_of_a_run_cut_off(folders: list[Path]) -> None:
    """Say that this run does not continue the last one, where that was cut off and is not running any more."""
    if not folders:
        return
    try:
        with FileLock(folders[-1] / LOCK_FILE, timeout=0):
            _warn_if_cut_off(folders[-1] / LEDGER_FILE)
    except (Timeout, OSError, NotImplementedError):
        return


def _warn_if_cut_off(ledger: Path) -> None:
    try:
        earlier = Ledger.read(ledger)
    except (OSError, ValueError):
        return  # damaged, or of another version
    if earlier.finished is False and earlier.rounds:
        rank_zero_warn(
            f"training starts over from step 0, although a run that wrote to {ledger.parent} was cut off in round "
            f"{earlier.rounds[-1].round}: no checkpoint was loaded. To continue that run, pass its checkpoint as "
            "ckpt_path; 'last' finds one only in the folder of a ModelCheckpoint(dirpath=..., save_last=True), and a "
            "logger may give every run a new folder",
            category=SelectionWarning,
        )


def _keep_older_ledger(path: Path, run_id: str) -> None:
    """Give the ledger of an earlier run in the same folder another name; it is the only record of that run."""
    if not path.exists() or run_id_of(path) == run_id:
        return
    _warn_if_cut_off(path)
    free = next(name for i in count(1) if not (name := path.with_stem(f"{path.stem}-{i}")).exists())
    path.rename(free)
    log.info("the ledger of an earlier run in this folder is now %s", free)
