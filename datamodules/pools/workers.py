"""Writes the parts of many units, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from liveselect.datamodules.pools.parts import Encoding, Unit, write_part
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.tokenizers import Encoder

_worker: dict[str, Any] = {}  # what a worker process keeps between its units


def _start_worker(encoding: Encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker.update(encoding=encoding, encoder=_encoder_of(encoding))


def _die_with_parent() -> None:
    """Leave when the parent is gone: a killed parent cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encoder_of(encoding: Encoding) -> Encoder | None:
    return Encoder(encoding.tokenizer) if encoding.tokenizer else None


def _work(path: Path, unit: Unit) -> None:
    write_part(path, unit, _worker["encoding"], _worker["encoder"])


def write_parts(
    units: Iterable[Unit], folder: Path, encoding: Encoding, workers: int
) -> Iterator[tuple[Path, int, bool]]:
    """Write the part of every unit that has none yet; a few units per worker are held in memory at a time.

    Yields:
        for each unit in order: its part, the bytes of all sources read up to its end, and whether the part was there.
    """
    jobs = ((folder / f"{unit.digest()}.arrow", unit) for unit in units)
    if workers == 1:
        encoder = _encoder_of(encoding)
        for path, unit in jobs:
            if not (exists := path.exists()):
                write_part(path, unit, encoding, encoder)
            yield path, unit.documents[-1].done, exists
        return
    yield from _write_in_processes(jobs, encoding, workers)


def _write_in_processes(
    jobs: Iterable[tuple[Path, Unit]], encoding: Encoding, workers: int
) -> Iterator[tuple[Path, int, bool]]:
    # Forking this process could copy locks that its other threads hold (Arrow, tokenizers).
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload([__name__])
    pending: deque[tuple[Path, int, Future[None] | None]] = deque()
    executor = ProcessPoolExecutor(workers, context, _start_worker, (encoding,))
    try:
        for path, unit in jobs:
            future = None if path.exists() else executor.submit(_work, path, unit)
            pending.append((path, unit.documents[-1].done, future))
            while len(pending) > 2 * workers or (pending and pending[0][2] is None):
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _finished(path: Path, done: int, future: "Future[None] | None") -> tuple[Path, int, bool]:
    if future is not None:
        try:
            future.result()
        except DataError as error:
            raise DataError(str(error)) from error  # a traceback of this process, for who looks where it was raised
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, perhaps for lack of memory: use fewer --workers. (A script that calls prepare "
                'needs `if __name__ == "__main__":` around the call, or workers=1)'
            ) from error
    return path, done, future is None
