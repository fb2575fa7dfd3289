"""Checkpoint files that are whole or not there, on every file system."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.grammar import SelectionWarning
from liveselect.json_lines import remove_unfinished, whole_file

REQUEUED = "hpc_ckpt_"
"""How Lightning names the checkpoint of a job that is requeued, which it looks for by itself."""


def install_whole_files(trainer: pl.Trainer) -> None:
    """Let the trainer write checkpoints with :class:`WholeFileIO`, unless it was given a ``CheckpointIO``.

    Lightning writes to the folder for temporary files and moves from there, which is a copy into the target wherever
    that is another file system. Strategies that save in parts (FSDP's sharded checkpoints) use no ``CheckpointIO``.
    """
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, WholeFileIO):
        trainer.strategy.checkpoint_io = WholeFileIO(_looked_for(trainer))


def _looked_for(trainer: pl.Trainer) -> set[Path]:
    """Return the files that ``ckpt_path="last"`` may have meant."""
    found: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found |= callback._find_last_checkpoints(trainer)
        elif isinstance(callback, OnExceptionCheckpoint):
            found.add(callback.ckpt_path)
    return {Path(path) for path in found}


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it, and renames it; reads the newest whole one.

    A process that is killed, or a disk that is full, leaves the target as it was. Where a checkpoint that Lightning
    found by itself (``ckpt_path="last"``, a requeued job) is damaged, the newest whole one beside it is read, with a
    warning; one that was named is refused. Other places than local file systems are written to as Lightning does.

    Args:
        looked_for: files that nobody has named.
    """

    def __init__(self, looked_for: Iterable[Path] = ()) -> None:
        super().__init__()
        self._looked_for = {Path(path).absolute() for path in looked_for}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` to ``path``; OSError leaves what was there."""
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = _local(path)
        remove_unfinished(target.parent)
        with whole_file(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Load the checkpoint at ``path``.

        Raises:
            ValueError: it is damaged, and there is no other, or it was named.
        """
        try:
            return super().load_checkpoint(path, *arguments, **settings)
        except FileNotFoundError:
            raise
        except Exception as error:
            if not isinstance(get_filesystem(path), LocalFileSystem) or is_whole(_local(path)):
                raise  # another reason, such as what weights_only refuses
            broken = _local(path)
            others = self._others(broken)
            by_itself = broken.absolute() in self._looked_for or broken.name.startswith(REQUEUED)
            whole = next((other for other in others if is_whole(other)), None)
            if whole is None or not by_itself:
                hint = "no other one beside it is whole" if whole is None else f"the newest whole one is {whole}"
                raise ValueError(f"{broken} is not a whole checkpoint: it was cut off or damaged; {hint}") from error
            rank_zero_warn(
                f"{broken} is not a whole checkpoint, it was cut off or damaged: the run goes on from the newest one "
                f"that is whole, {whole}",
                category=SelectionWarning,
            )
            return super().load_checkpoint(whole, *arguments, **settings)

    def _others(self, broken: Path) -> Iterator[Path]:
        """Yield the other checkpoints in the folders that were looked into, the newest first."""
        folders = {broken.absolute().parent, *(path.parent for path in self._looked_for)}
        found = {path: path.stat().st_mtime for folder in folders for path in folder.glob("*.ckpt") if path.is_file()}
        yield from (path for path in sorted(found, key=lambda path: -found[path]) if path != broken.absolute())


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint file is complete, with the check sums of its parts."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError):
        return False


def _local(path: str | Path) -> Path:
    return Path(str(get_filesystem(path)._strip_protocol(str(path))))
