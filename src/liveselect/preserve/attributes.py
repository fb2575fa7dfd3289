"""What modules keep outside of their parameters: numbers, histories, helpers; no ``state_dict`` has them."""

import functools
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from liveselect.functional.sharding import is_sharded, local
from liveselect.grammar import SelectionWarning
from liveselect.preserve.places import (
    Array,
    Buffer,
    Bytes,
    Cell,
    ClassNames,
    Container,
    Entries,
    Frozen,
    Generator,
    Names,
    Place,
    Slot,
    State,
    Values,
)

MAX_COPIED_ENTRIES = 2**22
"""Entries of tensors and arrays of one model that are copied, in the order in which they are found; larger ones are
taken for data that no forward changes."""

MAX_FROZEN_ENTRIES = 2**24
"""Entries of frozen parameters that are copied, the smallest first."""

MAX_FOLLOWED = 2**14
"""Objects that are looked into, what lies nearest to the modules first: a module may hold on to all of its data."""

_LONG = 1000  # entries from which on a container is taken for data, and what it holds is looked into last
_PLAIN_TYPES = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_MODULE_ATTRIBUTES = set(vars(nn.Module()))
_HOOK_DICTS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]
_GLOBAL_HOOK_DICTS: list[dict] = [
    value for name, value in vars(torch_module).items() if name.startswith("_global_") and isinstance(value, dict)
]
# objects of these set themselves up at first use and move weights about, belong to the machinery of training, or have
# threads of their own
_LIBRARIES = {
    *("torch", "lightning", "pytorch_lightning", "liveselect", "transformers", "datasets", "accelerate", "peft"),
    *("bitsandbytes", "torchao", "deepspeed", "numpy", "wandb", "mlflow", "tensorboard", "tensorboardX", "comet_ml"),
    *("neptune", "aim", "clearml", "tqdm", "rich", "enum", "logging", "threading", "multiprocessing", "queue"),
}
_STANDARD = set(sys.stdlib_module_names) - {"collections", "types", "argparse", "__main__"}
_CALLBACKS = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")  # users' own keep what their hooks count


class Attributes:
    """The plain attributes of all modules of a model, as they are now.

    That is every name in the instance's ``__dict__`` and the object it is bound to, and the contents of tensors and
    arrays (up to :data:`MAX_COPIED_ENTRIES` together), byte buffers, lists, dicts, sets and deques of any size, random
    generators, helper objects of the user's own classes, with or without ``__slots__``, and the attributes of these
    classes. It goes on through the hooks of modules and parameters, the objects that their methods are bound to, and
    the variables that functions share. Modules that a list, a dict or a helper hides are looked into like the others,
    with their parameters and buffers; so are frozen parameters (up to :data:`MAX_FROZEN_ENTRIES` together).

    Parameters that are trained, buffers, and tensors that share their storage are left out. Of larger tensors only the
    version is known, which writes change, except those through ``.data``. Global variables, variables that methods of
    classes share, the places of iterators, and what lies behind the first :data:`MAX_FOLLOWED` objects are not seen.

    Attributes:
        tensors: those that are no parameters or buffers of the model itself.
        hidden: modules that ``model.modules()`` does not know.
        frozen: parameters that no optimizer step changes, and those of hidden modules, by their ``id``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self.hidden: list[nn.Module] = []
        self._room = MAX_COPIED_ENTRIES
        self._model = model
        self.frozen: dict[int, Tensor] = {}
        self._places: list[Place] = []
        self._arrays: list[np.ndarray] = []
        self._generators: list[Generator] = []
        self._bytes: list[Buffer] = []
        self._no_hooks: list[dict] = [hooks for hooks in _GLOBAL_HOOK_DICTS if not hooks]
        self._large: list[tuple[str, Tensor, object]] = []  # (path, value, version)
        self._next: deque[tuple[str, object]] = deque()
        self._last: deque[tuple[str, object]] = deque()
        self._seen = {id(module) for module in model.modules()}
        for name, module in model.named_modules():
            self._take_module(name or type(module).__name__, module)
            for part, parameter in module._parameters.items():
                if parameter is not None:
                    self._take_hooks_of(f"{name}.{part}", parameter)
                    if not parameter.requires_grad:
                        self.frozen[id(parameter)] = parameter
        self._next.extend(("a hook of all modules", hooks) for hooks in _GLOBAL_HOOK_DICTS if hooks)
        for _ in range(MAX_FOLLOWED):
            if not self._next:
                self._next, self._last = self._last, self._next
            if not self._next:
                break
            self._look_into(*self._next.popleft())

    @functools.cached_property
    def _owned(self) -> set[int]:
        """The addresses of the model's own parameters and buffers."""
        owned = chain(self._model.parameters(), self._model.buffers())
        return {place for each in owned if (place := _storage(each))}

    # ---- finding -----------------------------------------------------------------------------------------------

    def _take_module(self, path: str, module: nn.Module) -> None:
        attributes = vars(module)
        self._places += [Names(attributes), Entries(module._modules)]
        for name in _HOOK_DICTS:
            hooks = attributes.get(name)
            if hooks:
                self._note(f"{path}.{name}", hooks)
            elif isinstance(hooks, dict):
                self._no_hooks.append(hooks)
        for name, value in attributes.items():
            if name not in _MODULE_ATTRIBUTES:
                self._note(f"{path}.{name}", value)
        self._note(type(module).__name__, type(module))

    def _take_hidden(self, path: str, found: nn.Module) -> None:
        if is_sharded(found):
            self.hidden += found.modules()
            return
        for name, module in found.named_modules():
            if id(module) in self._seen and module is not found:
                continue
            self._seen.add(id(module))
            self.hidden.append(module)
            self._take_module(f"{path}.{name}" if name else path, module)
            self._places += [Entries(module._parameters), Entries(module._buffers)]
            for part, value in module._buffers.items():
                self._note(f"{path}.{name}.{part}", value)
            for part, parameter in module._parameters.items():
                if parameter is not None and _storage(parameter) not in self._owned:
                    self.frozen.setdefault(id(parameter), parameter)
                    self._take_hooks_of(f"{path}.{name}.{part}", parameter)

    def _take_hooks_of(self, path: str, parameter: Tensor) -> None:
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if hooks:
                self._note(path, hooks)

    def _note(self, path: str, value: object, last: bool = False) -> None:
        """Remember to look into a value, unless there is nothing to see."""
        if type(value) not in _PLAIN_TYPES and id(value) not in self._seen:
            self._seen.add(id(value))
            (self._last if last else self._next).append((path, value))

    def _note_all(self, path: str, values: Collection[object]) -> None:
        if not set(map(type, values)) <= _PLAIN_TYPES:  # in C: long lists of numbers cost little
            for value in values:
                self._note(path, value, last=len(values) > _LONG)

    def _look_into(self, path: str, value: object) -> None:
        if isinstance(value, Tensor):
            self._take_tensor(path, value)
        elif isinstance(value, np.ndarray):
            if value.size <= self._room and value.flags.writeable:
                self._room -= value.size
                self._arrays.append(value)
                if value.dtype == object:
                    self._note_all(path, list(value.flat))
        elif isinstance(value, Buffer):
            self._bytes.append(value)
        elif isinstance(value, Container):
            place = Entries(value)
            self._places.append(place)
            self._note_all(path, place.values())
        elif isinstance(value, tuple | frozenset):
            self._note_all(path, value)
        elif isinstance(value, Generator) and not isinstance(value, random.SystemRandom):
            self._generators.append(value)
        elif isinstance(value, nn.Module):
            self._take_hidden(path, value)
        elif isinstance(value, type):
            self._take_class(path, value)
        else:
            self._take_callable(path, value)
            if _is_helper(value):
                self._take_helper(path, value)

    def _take_callable(self, path: str, value: object) -> None:
        """Note what a function, a method or a property keeps."""
        if isinstance(value, types.MethodType):
            self._note(path, value.__self__)
            self._note(path, value.__func__)
        elif isinstance(value, functools.partial):
            self._note_all(path, (value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, types.FunctionType) and not _is_of(value.__module__, _LIBRARIES | _STANDARD):
            cells = [Cell(cell) for cell in value.__closure__ or ()]
            self._places += [*cells, Names(vars(value))]
            held = [*(item for cell in cells for item in cell.values()), *vars(value).values()]
            self._note_all(path, [*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()])

    def _take_helper(self, path: str, value: object) -> None:
        if hasattr(value, "__dict__"):
            self._places.append(Names(vars(value)))
            for name, item in vars(value).items():
                self._note(f"{path}.{name}", item)
        for member in _slots(value):
            place = Slot(value, member)
            self._places.append(place)
            self._note_all(f"{path}.{member.__name__}", place.values())
        self._note(type(value).__name__, type(value))

    def _take_class(self, path: str, value: type) -> None:
        if _is_library(value):
            return
        self._places.append(ClassNames(value))
        for name, item in vars(value).items():
            if not hasattr(item, "__get__"):  # what methods share is left alone: loggers and counters of calls do it
                self._note(f"{path}.{name}", item)
        for base in value.__bases__:
            self._note(base.__name__, base)

    def _take_tensor(self, path: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or _storage(tensor) in self._owned:
            return
        if tensor.numel() <= self._room:
            self._room -= tensor.numel()
            self.tensors.append(tensor)
        else:
            self._large.append((path, tensor, _version(tensor)))

    # ---- keeping -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Copy the contents."""
        makers: list[tuple[Callable[[Any], Place], Collection[object]]] = [
            (Values, self.tensors),
            (Array, self._arrays),
            (Bytes, self._bytes),
            (State, self._generators),
        ]
        for make, found in makers:
            self._places += map(make, found)
        room = MAX_FROZEN_ENTRIES
        for parameter in sorted(self.frozen.values(), key=Tensor.numel):
            if type(parameter.data) is not Tensor or not _storage(parameter):
                continue  # packed by a library, or not there
            room -= parameter.numel()
            self._places.append(Frozen(parameter, copied=room >= 0))
            if room < 0:
                self._large.append(("a frozen parameter", parameter, _version(parameter)))

    def restore(self) -> None:
        """Bind every name to its former object, with the contents of :meth:`save`, and delete new names.

        A :class:`SelectionWarning` names values that have changed and were not copied.
        """
        for hooks in self._no_hooks:
            if hooks:
                hooks.clear()
        for place in self._places:
            place.restore()
        self._warn_of_changes()

    def fingerprint(self) -> int:
        """Return a hash of all but the contents of ``tensors``, to be compared within this process only."""
        places = [*self._places, *map(Array, self._arrays), *map(Bytes, self._bytes), *map(State, self._generators)]
        held = [tuple(value for value in place.values() if type(value) in _PLAIN_TYPES) for place in places]
        return hash((tuple(held), tuple(version for _, _, version in self._large)))

    def _warn_of_changes(self) -> None:
        changed = [path for path, value, was in self._large if _version(value) != was]
        if changed:
            warnings.warn(
                f"the model changes {', '.join(dict.fromkeys(changed))} in its forward or in its hooks, also while "
                f"influence is measured, and this is not put back: tensors of modules are, up to {MAX_COPIED_ENTRIES} "
                f"entries together, and frozen parameters up to {MAX_FROZEN_ENTRIES}. Register the tensor as a buffer, "
                "or change it in training mode only",
                SelectionWarning,
                stacklevel=3,
            )


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Open a block that leaves the plain attributes of a model as they were; yields its hidden modules.

    Those of a sharded model are not touched: its wrappers set themselves up in attributes.
    """
    kept = Attributes(model)
    if is_sharded(model):
        yield kept.hidden
        return
    kept.save()
    try:
        yield kept.hidden
    finally:
        kept.restore()


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor; 0 for those without one (sparse, or without memory)."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _version(value: Tensor) -> object:
    return 0 if value.is_inference() else value._version


def _is_of(module: str | None, names: Collection[str]) -> bool:
    return (module or "").partition(".")[0] in names


def _is_library(owner: type) -> bool:
    return _is_of(owner.__module__, _LIBRARIES | _STANDARD)


def _slots(value: object) -> Iterator[types.MemberDescriptorType]:
    for base in type(value).__mro__:
        if not _is_library(base):
            yield from (item for item in vars(base).values() if isinstance(item, types.MemberDescriptorType))


def _is_helper(value: object) -> bool:
    """Return whether an object is one that the author of a module made to keep something in."""
    if isinstance(value, types.ModuleType) or callable(getattr(type(value), "__get__", None)):
        return False
    if _is_of(type(value).__module__, _LIBRARIES | _STANDARD):
        return False
    bases = [base.__module__ for base in type(value).__mro__]
    return not any(_is_of(name, _LIBRARIES) and not name.startswith(_CALLBACKS) for name in bases)
