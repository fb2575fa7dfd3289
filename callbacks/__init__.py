"""Lightning callbacks: they say when to select, and hand over the live model."""

from liveselect.callbacks.mates import MATES
from liveselect.callbacks.pds import PDS
from liveselect.callbacks.quad import Quad
from liveselect.callbacks.replay import Replay
from liveselect.callbacks.selection import DataSelection

__all__ = ["MATES", "PDS", "DataSelection", "Quad", "Replay"]
