"""Measuring leaves no trace: everything that it disturbs is put back to the bit, which a checksum verifies."""

from liveselect.preserve.bits import bit_sum
from liveselect.preserve.measuring import measuring
from liveselect.preserve.snapshot import Snapshot, checksum, refuse_closure
from liveselect.preserve.state_check import changed_since, response_to

__all__ = ["Snapshot", "bit_sum", "changed_since", "checksum", "measuring", "refuse_closure", "response_to"]
