"""One scoring job at a time in a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from liveselect import distributed

LOCK = "lock"


@contextmanager
def alone_in(work: Path, begun: str) -> Iterator[None]:
    """Hold the folder ``work``, which is made if need be, for this job; another would take its files away.

    A folder in which there is no file ``begun`` at the end goes away again.

    Raises:
        FileExistsError: it holds files, and no job.
        ValueError: another process holds it.
    """
    if distributed.rank() != 0:
        yield
        return
    if work.exists() and any(work.iterdir()) and not {begun, LOCK} & {file.name for file in work.iterdir()}:
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
        if work.exists() and not (work / begun).exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()
