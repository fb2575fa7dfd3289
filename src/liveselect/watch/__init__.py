"""Checks every round of selection, and raises alarms."""

from liveselect.watch.watching import RESTORE, Scene, Watch

__all__ = ["RESTORE", "Scene", "Watch"]
