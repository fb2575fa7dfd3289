"""Sketches: short vectors whose inner products are, on average, those of long ones."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

# odd multipliers of a 64-bit mixing function; products wrap around
_MIX = tuple(value - 2**64 if value >= 2**63 else value for value in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))

_ENTRIES = 1 << 22  # of a matrix of signs, made at once


class Projection(Protocol):
    """A random linear map of named tensors to one vector.

    Attributes:
        dimensions: length of the vector.
        flops: of one map.
    """

    dimensions: int
    flops: float

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the vector of all tensors together, ``(dimensions,)`` float32; a missing one counts as zero."""


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
        self.flops = float(sum(shape.numel() for shape in shapes.values()))
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted(shapes):
            bits = _bits(torch.arange(shapes[name].numel(), device=device), seed, name)
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


class DenseSketch:
    r"""A dense random matrix of signs, divided by :math:`\sqrt{d}`: the projection of the LESS paper.

    The matrix is made again in parts whenever it is used, so it takes no memory, but 2 d FLOPs for each coordinate and
    several times as many integer operations. It depends on the seed, on names and on places only.

    Args:
        shapes: shapes of the tensors, by name.
        dimensions: d.
        seed: of the map.
        device: where it is applied.

    Source: Johnson and Lindenstrauss 1984; Achlioptas 2003.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dimensions: int, seed: int, device: torch.device) -> None:
        if dimensions < 1:
            raise ValueError(f"expected at least one dimension to project to, got {dimensions}")
        self.dimensions = dimensions
        self.flops = 2.0 * dimensions * sum(shape.numel() for shape in shapes.values())
        self._seed, self._device = seed, device

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the projection of all tensors together, ``(dimensions,)`` float32; a missing one counts as zero."""
        d = self.dimensions
        sketch = torch.zeros(d, device=self._device)
        rows = max(1, _ENTRIES // d)
        for name, tensor in tensors.items():
            flat = tensor.flatten().float()
            for start in range(0, len(flat), rows):
                part = flat[start : start + rows]
                places = torch.arange(start * d, (start + len(part)) * d, device=self._device)
                signs = ((_bits(places, self._seed, name) & 1) * 2 - 1).view(len(part), d).float()
                sketch += part @ signs
        return sketch / d**0.5


class LowRankSketch:
    r"""Two-sided random maps of matrices, :math:`A G B^\top`, side by side.

    Each matrix becomes one of k times k numbers, each vector k numbers, k such that all of them are at most
    ``dimensions``; a side that is no longer than k stays as it is. That is what a random branch of rank k beside each
    layer sees of its gradient. It takes 2 k FLOPs for each coordinate. Inner products are right on average, with more
    noise than in a dense map of as many dimensions.

    Args:
        shapes: shapes of the tensors, by name; dimensions after the first count as one.
        dimensions: d, at most.
        seed: of the map.
        device: where it is applied.

    Raises:
        ValueError: there is no room for one dimension of each tensor.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dimensions: int, seed: int, device: torch.device) -> None:
        rank = int((dimensions / max(1, len(shapes))) ** 0.5)
        if rank < 1:
            raise ValueError(
                f"expected at least one dimension for each of {len(shapes)} parameters, got dimensions={dimensions}"
            )
        self.flops, self.dimensions = 0.0, 0
        self._sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._sizes: dict[str, int] = {}
        for name in sorted(shapes):
            height, width = _as_matrix(shapes[name])
            left, right = (
                _signs(size, rank, seed, f"{side} {name}", device)
                for side, size in (("left", height), ("right", width))
            )
            self._sides[name] = left, right
            self.flops += 0.0 if left is None else 2.0 * rank * height * width
            self.flops += 0.0 if right is None else 2.0 * rank * min(rank, height) * width
            self._sizes[name] = min(rank, height) * min(rank, width)
        self.dimensions = sum(self._sizes.values())
        self._device = device

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the parts of all tensors side by side, ``(dimensions,)`` float32; a missing one counts as zero."""
        parts = []
        for name, (left, right) in self._sides.items():
            if name not in tensors:
                parts.append(torch.zeros(self._sizes[name], device=self._device))
                continue
            found = tensors[name].float().reshape(_as_matrix(tensors[name].shape))
            found = found if left is None else left @ found
            parts.append((found if right is None else found @ right.T).flatten())
        return torch.cat(parts)


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    height = shape[0] if len(shape) else 1
    return height, shape.numel() // max(1, height)


def _signs(size: int, rank: int, seed: int, name: str, device: torch.device) -> Tensor | None:
    """Return signs ``(rank, size)`` over the root of the rank, None where there is nothing to shorten."""
    if size <= rank:
        return None
    bits = _bits(torch.arange(rank * size, device=device), seed, name)
    return (((bits & 1) * 2 - 1).float() / rank**0.5).view(rank, size)


def _bits(places: Tensor, seed: int, name: str) -> Tensor:
    """Return 64 random bits for each of ``places (n,)`` of a tensor of that name."""
    salt = int.from_bytes(f"{seed} {name}".encode(), "little") % (2**62 - 57)
    return _mixed(_mixed(places + salt) * _MIX[0] + seed)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ ((value >> 33) & 0x7FFFFFFF)) * _MIX[1]
    return value ^ ((value >> 29) & 0x7FFFFFFFF)
