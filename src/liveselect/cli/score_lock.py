"""One scoring job at a time in a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from liveselect import distributed

LOCK = "lock"


@contextmanager
def locked_folder(work: Path, marker: str) -> Iterator[None]:
    """Lock the folder ``work`` for this job, and delete it at the end if the file ``marker`` was not made in it.

    Raises:
        FileExistsError: it holds files that are not of a job.
        ValueError: another process holds the lock.
    """
    if distributed.rank() != 0:  # the first rank locks for all
        yield
        return
    if work.exists() and any(work.iterdir()) and not {marker, LOCK} & {file.name for file in work.iterdir()}:
        raise FileExistsError(f"{work} holds files that no scoring job made: choose another folder, or move them")
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is scoring into {work.parent} (it holds {work / LOCK}): wait for it, or end it"
        ) from None
    except NotImplementedError:  # some network file systems cannot lock
        pass
    try:
        yield
    finally:
        if work.exists() and not (work / marker).exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()
