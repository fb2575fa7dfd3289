"""Sketches: short vectors whose inner products are, on average, those of long ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

# odd multipliers of a 64-bit mixing function; products wrap around
_MIX = tuple(value - 2**64 if value >= 2**63 else value for value in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))


class CountSketch:
    r"""A random linear map of named tensors to ``dimensions`` numbers.

    Every coordinate is added to one of the numbers with a random sign. Inner products are right on average, with a
    standard deviation of about :math:`|a||b| / \sqrt{d}`, as for a dense matrix of signs, which would take d times as
    much work and memory. The map depends on the seed, on names and on places only: it is the same in every process.

    Args:
        shapes: shapes of the tensors, by name.
        dimensions: d.
        seed: of the map.
        device: where it is applied.

    Source: Charikar et al. 2002; Weinberger et al. 2009, arXiv 0902.2206.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dimensions: int, seed: int, device: torch.device) -> None:
        if dimensions < 1:
            raise ValueError(f"expected at least one dimension to project to, got {dimensions}")
        self.dimensions = dimensions
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted(shapes):
            salt = int.from_bytes(f"{seed} {name}".encode(), "little") % (2**62 - 57)
            bits = _mixed(_mixed(torch.arange(shapes[name].numel(), device=device) + salt) * _MIX[0] + seed)
            place = ((bits >> 2) & (2**60 - 1)) % dimensions
            self._places[name] = place.int(), ((bits & 1) * 2 - 1).to(torch.int8)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of all tensors together, ``(dimensions,)`` float32; a missing one counts as zero."""
        first = next(iter(self._places.values()))[0]
        sketch = torch.zeros(self.dimensions, device=first.device)
        for name, tensor in tensors.items():
            place, sign = self._places[name]
            sketch.index_add_(0, place, tensor.flatten().float() * sign)
        return sketch


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ ((value >> 33) & 0x7FFFFFFF)) * _MIX[1]
    return value ^ ((value >> 29) & 0x7FFFFFFFF)
