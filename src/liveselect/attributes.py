"""What modules keep in plain attributes: numbers, histories, generators, helpers; no ``state_dict`` knows of them."""

import inspect
import operator
import random
import types
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liveselect.functional.sharding import is_sharded, local
from liveselect.protocols import SelectionWarning

COPIED = 2**22
"""Entries of tensors and arrays of one model that are copied, in the order of its modules; beyond, data is assumed."""

LONG = 2**16
"""Entries up to which a list or dict is copied."""

FOLLOWED = 1000
"""Entries up to which what a list or dict holds is looked into."""

_DEPTH = 3  # containers and helpers inside of each other
_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_OF_EVERY_MODULE = set(vars(nn.Module()))
_HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]
# their objects set themselves up at first use and move weights about, or belong to the machinery of training
_NOT_FOLLOWED = {
    *("torch", "lightning", "pytorch_lightning", "liveselect", "transformers", "datasets", "accelerate", "peft"),
    *("bitsandbytes", "torchao", "deepspeed", "enum", "logging", "threading", "multiprocessing", "queue"),
}


class Attributes:
    """The plain attributes of all modules of a model, as they are now.

    That is every name in the instance's ``__dict__``, with what it is bound to, and the contents of what can be copied:
    tensors and arrays (up to :data:`COPIED` entries together), lists, dicts, sets and deques, random generators, hooks,
    and the attributes of helper objects that are no library's. Parameters, buffers and what shares their storage are
    left out. Of larger tensors only the version is known, which changes when they are written to, though not through
    ``.data``. What classes keep, and what iterators have gone through, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._room = COPIED
        self._owned: set[int] | None = None
        self._model = model
        self._seen: set[int] = set()
        self._names: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[np.ndarray] = []
        self._generators: list[Any] = []
        self._large: list[tuple[str, Any, Any]] = []
        for name, module in model.named_modules():
            self._take_module(name or type(module).__name__, vars(module))

    def _take_module(self, path: str, attributes: dict[str, Any]) -> None:
        names = dict(attributes)
        self._names.append((attributes, names))
        for name in _HOOKS:
            if names.get(name):
                self._take(f"{path}.{name}", names[name], _DEPTH)
        for name, value in names.items():
            if name not in _OF_EVERY_MODULE and type(value) not in _ATOMS:
                self._take(f"{path}.{name}", value, _DEPTH)

    def _take(self, path: str, value: Any, depth: int) -> None:
        """Note a value, and what it holds."""
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._take_tensor(path, value)
        elif type(value) is np.ndarray:
            if value.size <= self._room and value.flags.writeable:
                self._room -= value.size
                self._arrays.append(value)
        elif isinstance(value, dict | list | deque | set):
            if len(value) > LONG:
                self._large.append((path, value, len(value)))
                return
            self._containers.append((value, _copy_of(value)))
            self._take_all(path, value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, tuple):
            self._take_all(path, value, depth)
        elif _is_generator(value):
            self._generators.append(value)
        elif depth and _is_helper(value):
            attributes = vars(value)
            self._names.append((attributes, dict(attributes)))
            for name, item in attributes.items():
                self._take(f"{path}.{name}", item, depth - 1)

    def _take_all(self, path: str, items: Any, depth: int) -> None:
        if depth and len(items) <= FOLLOWED:
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
        """Bind every name to what it was bound to, with the contents of :meth:`save`; names that are new are deleted.

        What is known to have changed, and was not copied, is told in a :class:`SelectionWarning`.
        """
        hooked = {id(container) for container, _ in self._containers}
        for _, was in self._names:
            for name in _HOOKS:
                if was.get(name) and id(was[name]) not in hooked:
                    was[name].clear()
        for live, was in self._names:
            if not _same(live, was):
                if list(live) != list(was):
                    live.clear()
                live.update(was)
        for container, entries in self._containers:
            if not _same(container, entries):
                container.clear()
                container.extend(entries) if isinstance(container, list | deque) else container.update(entries)
        for tensor, copy in zip(self.tensors, self._copies, strict=True):
            # .data, because a backward to come would refuse tensors that it saved and that were written to since
            with torch.inference_mode(tensor.is_inference()):
                without_overlap(local(tensor.data)).copy_(copy)
        for array, values in zip(self._arrays, self._array_copies, strict=True):
            array[...] = values
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)
        self._warn_of_changes()

    def fingerprint(self) -> int:
        """Return a hash of all but the contents of ``tensors``; it means something in this process only."""
        names = [(name, value) for _, was in self._names for name, value in was.items() if type(value) in _ATOMS]
        contents = [entries.values() if isinstance(entries, dict) else entries for _, entries in self._containers]
        held = [item for items in contents for item in items if type(item) in _ATOMS]
        arrays = [array.tobytes() if array.dtype != object else b"" for array in self._arrays]
        states = [repr(_plain(_state(generator))) for generator in self._generators]
        large = [version for _, _, version in self._large]
        return hash((tuple(names), tuple(held), tuple(arrays), tuple(states), tuple(large)))

    def _warn_of_changes(self) -> None:
        changed = [path for path, value, was in self._large if _version(value) != was]
        if changed:
            warnings.warn(
                f"the model changes {', '.join(changed)} in its forward or in its hooks, also while influence is "
                f"measured, and this is not put back: tensors of modules are, up to {COPIED} entries together, and "
                f"lists up to {LONG}. Register the tensor as a buffer, or change it in training mode only",
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


def _copy_of(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _same(container: Any, entries: Any) -> bool:
    """Return whether a container holds the very objects of ``entries``; equal ones may be of other types."""
    if len(container) != len(entries) or not all(map(operator.is_, container, entries)):
        return False
    return not isinstance(entries, dict) or all(map(operator.is_, container.values(), entries.values()))


def _storage(tensor: Tensor) -> int:
    """Return where a tensor lies; 0 for those that lie nowhere (sparse, or without memory)."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _version(value: Any) -> int:
    if not isinstance(value, Tensor):
        return len(value)
    return 0 if value.is_inference() else value._version


def _is_generator(value: Any) -> bool:
    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _plain(state: Any) -> Any:
    return state.numpy().tobytes() if isinstance(state, Tensor) else state


def _is_helper(value: Any) -> bool:
    """Return whether an object is one that the author of a module made to keep something in."""
    if not hasattr(value, "__dict__") or inspect.isroutine(value):
        return False
    if isinstance(value, type | types.ModuleType):
        return False
    return not any(base.__module__.partition(".")[0] in _NOT_FOLLOWED for base in type(value).__mro__)
