"""Plain attributes of modules: numbers, histories, generators, helpers; they are in no ``state_dict``."""

import inspect
import operator
import random
import types
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liveselect.functional.sharding import is_sharded, local
from liveselect.grammar import SelectionWarning

MAX_COPIED_ENTRIES = 2**22
"""Entries of tensors and arrays of one model that are copied, in the order of its modules; larger ones are taken for
data that no forward changes."""

MAX_LIST_ENTRIES = 2**16
"""Entries up to which a list or dict is copied, so that a copy at every measurement costs little."""

MAX_INSPECTED_ENTRIES = 1000
"""Entries up to which the values of a list or dict are looked into, which takes a loop in Python."""

Container = dict | list | deque | set
Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_MAX_NESTING = 3  # containers and helpers inside of each other: a helper with a dict of lists, and no object graph
_PLAIN_TYPES = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_MODULE_ATTRIBUTES = set(vars(nn.Module()))
_HOOK_DICTS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]
# objects of these set themselves up at first use and move weights about, or belong to the machinery of training
_LIBRARY_PACKAGES = {
    *("torch", "lightning", "pytorch_lightning", "liveselect", "transformers", "datasets", "accelerate", "peft"),
    *("bitsandbytes", "torchao", "deepspeed", "enum", "logging", "threading", "multiprocessing", "queue"),
}


class Attributes:
    """The plain attributes of all modules of a model, as they are now.

    That is every name in the instance's ``__dict__`` and the object it is bound to, and the contents of tensors and
    arrays (up to :data:`MAX_COPIED_ENTRIES` together), lists, dicts, sets, deques, random generators, hooks, and helper
    objects of the user's own classes. Parameters, buffers and tensors that share their storage are left out. Of larger
    tensors only the version is known, which writes change, except those through ``.data``. Attributes of classes and
    the places of iterators are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._room = MAX_COPIED_ENTRIES
        self._owned: set[int] | None = None
        self._model = model
        self._seen: set[int] = set()
        self._names: list[tuple[dict[str, object], dict[str, object]]] = []  # (live, copy)
        self._containers: list[tuple[Container, dict | list]] = []  # (live, copy)
        self._arrays: list[np.ndarray] = []
        self._generators: list[Generator] = []
        self._large: list[tuple[str, Sized, int]] = []  # (path, value, version)
        for name, module in model.named_modules():
            self._take_module(name or type(module).__name__, vars(module))

    def _take_module(self, path: str, attributes: dict[str, object]) -> None:
        names = dict(attributes)
        self._names.append((attributes, names))
        for name in _HOOK_DICTS:
            if names.get(name):
                self._take(f"{path}.{name}", names[name], _MAX_NESTING)
        for name, value in names.items():
            if name not in _MODULE_ATTRIBUTES and type(value) not in _PLAIN_TYPES:
                self._take(f"{path}.{name}", value, _MAX_NESTING)

    def _take(self, path: str, value: object, depth: int) -> None:
        """Note a value and its contents."""
        if type(value) in _PLAIN_TYPES or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._take_tensor(path, value)
        elif type(value) is np.ndarray:
            if value.size <= self._room and value.flags.writeable:
                self._room -= value.size
                self._arrays.append(value)
        elif isinstance(value, Container):
            if len(value) > MAX_LIST_ENTRIES:
                self._large.append((path, value, len(value)))
                return
            self._containers.append((value, dict(value) if isinstance(value, dict) else list(value)))
            self._take_all(path, value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, tuple):
            self._take_all(path, value, depth)
        elif isinstance(value, Generator) and not isinstance(value, random.SystemRandom):
            self._generators.append(value)
        elif depth and _is_helper(value):
            attributes = vars(value)
            self._names.append((attributes, dict(attributes)))
            for name, item in attributes.items():
                self._take(f"{path}.{name}", item, depth - 1)

    def _take_all(self, path: str, items: Collection[object], depth: int) -> None:
        if depth and len(items) <= MAX_INSPECTED_ENTRIES:
            for item in items:
                self._take(path, item, depth - 1)

    def _take_tensor(self, path: str, tensor: Tensor) -> None:
        if self._owned is None:
            owned = [*self._model.parameters(), *self._model.buffers()]
            self._owned = {place for each in owned if (place := _storage(each))}
        if isinstance(tensor, nn.Parameter) or _storage(tensor) in self._owned:
            return
        if tensor.numel() <= self._room:
            self._room -= tensor.numel()
            self.tensors.append(tensor)
        else:
            self._large.append((path, tensor, _version(tensor)))

    @torch.no_grad()
    def save(self) -> None:
        """Copy the contents."""
        self._copies = [without_overlap(local(tensor.detach())).clone() for tensor in self.tensors]
        self._array_copies = [array.copy() for array in self._arrays]
        self._states = [_state(generator) for generator in self._generators]

    @torch.no_grad()
    def restore(self) -> None:
        """Bind every name to its former object, with the contents of :meth:`save`, and delete new names.

        A :class:`SelectionWarning` names values that have changed and were not copied.
        """
        hooked = {id(container) for container, _ in self._containers}
        for _, was in self._names:
            for name in _HOOK_DICTS:
                hooks = was.get(name)
                if hooks and isinstance(hooks, dict) and id(hooks) not in hooked:
                    hooks.clear()
        for live, was in self._names:
            if not _same(live, was):
                if list(live) != list(was):
                    live.clear()
                live.update(was)
        for container, entries in self._containers:
            if not _same(container, entries):
                refill(container, entries)
        for tensor, copy in zip(self.tensors, self._copies, strict=True):
            # .data, because a later backward would refuse tensors that it saved and that were written to since
            with torch.inference_mode(tensor.is_inference()):
                without_overlap(local(tensor.data)).copy_(copy)
        for array, values in zip(self._arrays, self._array_copies, strict=True):
            array[...] = values
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)
        self._warn_of_changes()

    def fingerprint(self) -> int:
        """Return a hash of all but the contents of ``tensors``, to be compared within this process only."""
        names = [(name, value) for _, was in self._names for name, value in was.items() if type(value) in _PLAIN_TYPES]
        contents = [entries.values() if isinstance(entries, dict) else entries for _, entries in self._containers]
        held = [item for items in contents for item in items if type(item) in _PLAIN_TYPES]
        arrays = [array.tobytes() if array.dtype != object else b"" for array in self._arrays]
        states = [_state(generator) for generator in self._generators]
        plain = [repr(state.numpy().tobytes() if isinstance(state, Tensor) else state) for state in states]
        large = [version for _, _, version in self._large]
        return hash((tuple(names), tuple(held), tuple(arrays), tuple(plain), tuple(large)))

    def _warn_of_changes(self) -> None:
        changed = [path for path, value, was in self._large if _version(value) != was]
        if changed:
            warnings.warn(
                f"the model changes {', '.join(changed)} in its forward or in its hooks, also while influence is "
                f"measured, and this is not put back: tensors of modules are, up to {MAX_COPIED_ENTRIES} entries "
                f"together, and lists up to {MAX_LIST_ENTRIES}. Register the tensor as a buffer, or change it in "
                "training mode only",
                SelectionWarning,
                stacklevel=3,
            )


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Open a block that leaves the plain attributes of a model as they were; of a sharded model they are not touched.

    Its wrappers set themselves up in attributes.
    """
    if is_sharded(model):
        yield
        return
    kept = Attributes(model)
    kept.save()
    try:
        yield
    finally:
        kept.restore()


def without_overlap(tensor: Tensor) -> Tensor:
    """Return a view of a tensor without repeated places."""
    # expanded dimensions repeat one memory location, into which copy_ refuses to write
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


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
    if isinstance(container, dict) and isinstance(entries, dict):
        return all(map(operator.is_, container.values(), entries.values()))
    return True


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor; 0 for those without one (sparse, or without memory)."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _version(value: Sized) -> int:
    if not isinstance(value, Tensor):
        return len(value)
    return 0 if value.is_inference() else value._version


def _state(generator: Generator) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _is_helper(value: object) -> bool:
    """Return whether an object is one that the author of a module made to keep something in."""
    if not hasattr(value, "__dict__") or inspect.isroutine(value):
        return False
    if isinstance(value, type | types.ModuleType):
        return False
    return not any(base.__module__.partition(".")[0] in _LIBRARY_PACKAGES for base in type(value).__mro__)
