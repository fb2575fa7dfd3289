"""Checks every round of selection, and raises alarms."""

from liveselect.watch.watching import Scene, Watch

__all__ = ["Scene", "Watch"]
