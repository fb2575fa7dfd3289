"""Lightning callbacks: they say when to select, and hand over the live model."""

from liveselect.callbacks.live import LiveSelection
from liveselect.callbacks.loggers import OfflineFallbackWandbLogger
from liveselect.callbacks.mates import MATES
from liveselect.callbacks.monitor import SelectionMonitor
from liveselect.callbacks.pds import PDS, LivePDS
from liveselect.callbacks.portfolio import Portfolio
from liveselect.callbacks.quad import Quad
from liveselect.callbacks.replay import Replay
from liveselect.callbacks.selection import DataSelection

__all__ = [
    "MATES",
    "PDS",
    "DataSelection",
    "LivePDS",
    "LiveSelection",
    "OfflineFallbackWandbLogger",
    "Portfolio",
    "Quad",
    "Replay",
    "SelectionMonitor",
]
