"""Looks at every round of selection, and raises an alarm where something is wrong."""

from liveselect.watch.watching import Scene, Watch

__all__ = ["Scene", "Watch"]
