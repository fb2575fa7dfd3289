"""Measuring leaves no trace: everything that it disturbs is put back to the bit, which a checksum verifies."""

from liveselect.preserve.bits import bit_sum
from liveselect.preserve.echo import changed_since, listen
from liveselect.preserve.measuring import measuring
from liveselect.preserve.snapshot import Snapshot, checksum, refuse_closure

__all__ = ["Snapshot", "bit_sum", "changed_since", "checksum", "listen", "measuring", "refuse_closure"]
