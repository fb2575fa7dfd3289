"""Places in which Python objects keep values: each is saved, and put back to the very same objects and contents."""

import array
import operator
import random
import types
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from liveselect.functional.sharding import local

Container = dict | list | deque | set
Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
Buffer = bytearray | array.array

_UNSET = object()  # in a slot or a cell that holds nothing


class Place(Protocol):
    """What holds values; its values are saved when it is made."""

    def restore(self) -> None:
        """Put back what was saved."""

    def values(self) -> Iterable[object]:
        """Return what was saved."""


class Entries:
    """The entries of a dict (also that of an object's attributes), a list, a deque or a set."""

    def __init__(self, live: Container) -> None:
        self._live = live
        self._was: dict | list = dict(live) if isinstance(live, dict) else list(live)

    def restore(self) -> None:
        """Put the entries back, in their order, where one is another object."""
        if not _same(self._live, self._was):
            refill(self._live, self._was)

    def values(self) -> Collection[object]:
        """Return the entries, of a dict without their keys."""
        return self._was.values() if isinstance(self._was, dict) else self._was


class Names(Entries):
    """The attributes of an object; they are never all gone, because hooks and properties may look at them."""

    def __init__(self, live: dict[str, object]) -> None:
        super().__init__(live)
        self._names = live

    def restore(self) -> None:
        """Bind every name to its former object, and delete new names."""
        if not _same(self._names, self._was):
            if list(self._names) != list(self._was):
                self._names.clear()
            self._names.update(self._was)


class Slot:
    """An attribute for which a class has declared a slot."""

    def __init__(self, owner: object, member: types.MemberDescriptorType) -> None:
        self._owner, self._member = owner, member
        self._was = self._now()

    def _now(self) -> object:
        try:
            return self._member.__get__(self._owner, type(self._owner))
        except AttributeError:
            return _UNSET

    def restore(self) -> None:
        """Bind the slot to its former object."""
        if self._now() is self._was:
            return
        if self._was is _UNSET:
            self._member.__delete__(self._owner)
        else:
            self._member.__set__(self._owner, self._was)

    def values(self) -> tuple[object, ...]:
        """Return what the slot held."""
        return (self._was,)


class Cell:
    """A variable of a function that functions inside of it use (``nonlocal``)."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell
        self._was = self._now()

    def _now(self) -> object:
        try:
            return self._cell.cell_contents
        except ValueError:
            return _UNSET

    def restore(self) -> None:
        """Bind the variable to its former object."""
        if self._now() is self._was:
            return
        if self._was is _UNSET:
            del self._cell.cell_contents
        else:
            self._cell.cell_contents = self._was

    def values(self) -> tuple[object, ...]:
        """Return what the variable was bound to."""
        return (self._was,)


class ClassNames:
    """The attributes of a class."""

    def __init__(self, owner: type) -> None:
        self._owner = owner
        self._was = dict(vars(owner))

    def restore(self) -> None:
        """Bind every name to its former object, and delete new names."""
        now = vars(self._owner)
        if _same(now, self._was):
            return
        for name in set(now) - set(self._was):
            delattr(self._owner, name)
        for name, value in self._was.items():
            if now.get(name, _UNSET) is not value:
                setattr(self._owner, name, value)

    def values(self) -> Collection[object]:
        """Return what the names were bound to."""
        return self._was.values()


class Bytes:
    """The contents of a bytearray or an ``array.array``."""

    def __init__(self, live: Buffer) -> None:
        self._live, self._was = live, live[:]

    def restore(self) -> None:
        """Put the contents back in place."""
        if self._live != self._was:
            self._live[:] = self._was  # type: ignore[assignment]

    def values(self) -> tuple[object, ...]:
        """Return the contents."""
        return (bytes(self._was),)


class Array:
    """The contents of a numpy array."""

    def __init__(self, live: np.ndarray) -> None:
        self._live, self._was = live, live.copy()

    def restore(self) -> None:
        """Put the contents back in place."""
        self._live[...] = self._was

    def values(self) -> tuple[object, ...]:
        """Return the contents."""
        return tuple(self._was.flat) if self._was.dtype == object else (self._was.tobytes(),)


class State:
    """The state of a random generator."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._was: Any
        if isinstance(generator, random.Random):
            self._was = generator.getstate()
        elif isinstance(generator, np.random.Generator):
            self._was = generator.bit_generator.state
        else:
            self._was = generator.get_state()

    def restore(self) -> None:
        """Put the state back."""
        if isinstance(self._generator, random.Random):
            self._generator.setstate(self._was)
        elif isinstance(self._generator, np.random.Generator):
            self._generator.bit_generator.state = self._was
        else:
            self._generator.set_state(self._was)

    def values(self) -> tuple[object, ...]:
        """Return the state as text."""
        return (repr(self._was.numpy().tobytes() if isinstance(self._was, Tensor) else self._was),)


class Memory:
    """The shape of a tensor and the memory that it lies in, which ``resize_``, ``set_`` and ``.data`` change."""

    def __init__(self, live: Tensor) -> None:
        self._live, self._memory = live, live.data

    def restore(self) -> None:
        """Put the tensor back to where it was."""
        now, was = self._live.data, self._memory
        has_moved = (now.shape, now.dtype, _address(now)) != (was.shape, was.dtype, _address(was))
        if has_moved or now.layout is not torch.strided:  # a sparse one has no one address
            self._live.data = was

    def values(self) -> tuple[object, ...]:
        """Return nothing: checksums read tensors themselves."""
        return ()


class Values:
    """The contents of a tensor that is no parameter."""

    def __init__(self, live: Tensor) -> None:
        self._live, self._memory = live, Memory(live)
        self._was = [without_overlap(part).clone() for part in strided_parts(local(live.detach()))]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the contents back in place."""
        # .data, because a later backward would refuse tensors that it saved and that were written to since
        with torch.inference_mode(self._live.is_inference()):
            self._memory.restore()
            for part, was in zip(strided_parts(local(self._live.data)), self._was, strict=True):
                without_overlap(part).copy_(was)

    def values(self) -> tuple[object, ...]:
        """Return nothing: checksums read tensors themselves."""
        return ()


class Frozen:
    """The contents of a parameter that no optimizer step changes, and the memory that it lies in."""

    def __init__(self, live: Tensor, copied: bool) -> None:
        self._live, self._memory = live, live.data
        self._was = self._memory.clone() if copied else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put the memory back, and the contents where they were copied."""
        if self._live.data.data_ptr() != self._memory.data_ptr():
            self._live.data = self._memory
        if self._was is not None:
            self._memory.copy_(self._was)

    def values(self) -> tuple[object, ...]:
        """Return nothing: checksums read parameters themselves."""
        return ()


def _address(tensor: Tensor) -> int:
    try:
        return local(tensor).data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or without memory
        return 0


def without_overlap(tensor: Tensor) -> Tensor:
    """Return a view of a tensor without repeated places."""
    # expanded dimensions repeat one memory location, into which copy_ refuses to write
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a sparse one consists of; of any other, itself."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def refill(container: Container, entries: dict | list) -> None:
    """Give a container the entries of its copy."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(entries)
    else:
        container.update(entries)


def _same(container: Collection[object], entries: Collection[object]) -> bool:
    """Return whether a container holds the very objects of ``entries``; equal ones may be of other types."""
    if len(container) != len(entries) or not all(map(operator.is_, container, entries)):
        return False
    if isinstance(container, dict | types.MappingProxyType) and isinstance(entries, dict):
        return all(map(operator.is_, container.values(), entries.values()))
    return True
