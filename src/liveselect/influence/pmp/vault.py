"""Keeps the large intermediate results of a fit: in memory, or on disk, from where an interrupted fit goes on."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SUFFIX = ".vault.pt"
_OWNER = "owner"


Value = Any
"""Nested dicts, tuples and lists of tensors, numbers and strings."""


class Vault:
    """Named values, in the memory of the host."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def put(self, name: str, value: Value) -> None:
        """Keep a value under a name; tensors on CPU are not copied."""
        self._values[name] = to_device(value, torch.device("cpu"))

    def get(self, name: str) -> Value:
        """Return the value; its tensors are on CPU and must not be written to."""
        return self._values[name]

    def drop(self, name: str) -> None:
        """Forget the value, if there is one."""
        self._values.pop(name, None)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()


class DiskVault(Vault):
    """Keeps every value in a file of a folder, whole or not at all; reading maps the file into memory.

    Args:
        folder: made if need be.
        owner: names the computation. Values of another one in the folder are deleted.

    Raises:
        RuntimeError: by every use, once another computation has taken the folder.
        OSError: a value could not be written; earlier ones stay.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: str | Path, owner: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._owner = owner
        for unfinished in self._folder.glob("*.vault.*.tmp"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        if _OWNER not in self or self._read(_OWNER) != owner:
            self.clear()

    def __contains__(self, name: object) -> bool:
        return self._file(str(name)).exists()

    def put(self, name: str, value: Value) -> None:
        """Write a value."""
        if name != _OWNER:
            self._check_owner()
        file = self._file(name)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            torch.save(to_device(value, torch.device("cpu")), temporary)
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        except (OSError, RuntimeError) as error:  # torch.save has no error of its own for a full disk
            raise OSError(
                f"cannot write {file} ({error}): make room, or choose another directory. The other files stay, and "
                "the same fit goes on from them"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, name: str) -> Value:
        """Return the value, its tensors read from the file when they are used."""
        self._check_owner()
        return self._read(name)

    def drop(self, name: str) -> None:
        """Delete the value."""
        self._file(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all values; the folder stays this owner's."""
        for file in self._folder.glob(f"*{_SUFFIX}"):
            file.unlink()
        self.put(_OWNER, self._owner)

    def _check_owner(self) -> None:
        if _OWNER not in self or self._read(_OWNER) != self._owner:
            raise RuntimeError(
                f"the results in {self._folder} were deleted by another fit (another run, model, data or settings): "
                "give each run a directory of its own"
            )

    def _read(self, name: str) -> Value:
        file = self._file(name)
        try:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete {self._folder}, and fit again") from error

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def to_device(value: Value, device: torch.device) -> Value:
    """Return a nested value with its tensors on ``device``; those that are there already are not copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
