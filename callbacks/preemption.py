"""SIGTERM while ranks measure together."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from liveselect import distributed


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Hold SIGTERM back in this block; at its end all ranks get it, at the same place, if one of them did.

    Lightning's handler is a collective operation. In the middle of others, which ranks do at different times, it would
    be taken for one of them, and the run would hang. One process alone, and one without a handler, is left as it is.
    """
    handler = signal.getsignal(signal.SIGTERM)
    alone = distributed.world_size() == 1 or threading.current_thread() is not threading.main_thread()
    if alone or not callable(handler):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield
        asked = distributed.any_rank(bool(came))
    except BaseException:
        asked = bool(came)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
