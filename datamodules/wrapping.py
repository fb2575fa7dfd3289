"""What SelectionDataModule takes from a LightningDataModule that it wraps."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from liveselect.protocols import SelectionWarning

HOOKS = (
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("test_dataloader", "predict_dataloader", "state_dict", "load_state_dict"),
)
"""Methods of the wrapped module that are called in its place."""

SETTINGS = ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")
LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
)


def adopt_hooks(module: pl.LightningDataModule, existing: pl.LightningDataModule, names: Sequence[str]) -> None:
    """Let Lightning find the methods ``names`` of ``existing`` on ``module``.

    Bound methods are taken, not forwarded to: Lightning compares a hook's code with its own to see whether a datamodule
    overrides it, and asks the LightningModule where it does not. A method that merely forwards would hide those.
    """
    for name in (*names, *SETTINGS):
        setattr(module, name, getattr(existing, name))


def training_loader(existing: pl.LightningDataModule) -> DataLoader:
    """Return the training ``DataLoader`` of a datamodule that has been set up.

    Raises:
        TypeError: it is no single ``DataLoader``, or it streams.
    """
    name = type(existing).__name__
    loader = existing.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"expected {name}.train_dataloader() to return one torch DataLoader, got {type(loader).__name__}: join "
            "several datasets into one (torch.utils.data.ConcatDataset), or pass the dataset itself as the pool"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"{name} trains on an iterable dataset ({type(loader.dataset).__name__}): selection asks for rows by "
            "their position, which a stream cannot give. Write it to disk with `liveselect prepare`, or use a "
            "map-style dataset"
        )
    if loader.batch_sampler is None:
        raise TypeError(
            f"{name} loads with batch_size=None, so its dataset yields whole batches: selection chooses single rows. "
            "Let the DataLoader make the batches"
        )
    known = (RandomSampler, SequentialSampler, DistributedSampler)
    for sampler in (loader.sampler, loader.batch_sampler):
        if not isinstance(sampler, known) and type(sampler) is not BatchSampler:
            warnings.warn(
                f"the {type(sampler).__name__} of {name} is not used: every row of its dataset is a candidate, and the "
                "plan says which rows make a batch. If rows were left out on purpose, wrap a torch.utils.data.Subset",
                SelectionWarning,
                stacklevel=2,
            )
    if type(loader).__iter__ not in (DataLoader.__iter__, getattr(_stateful_loader(), "__iter__", None)):
        warnings.warn(
            f"{type(loader).__name__} iterates in a way of its own, which is not used: batches are what its collate "
            f"function makes of the rows of its dataset. If {name} changes batches after that, do it in the collate "
            "function or in on_after_batch_transfer",
            SelectionWarning,
            stacklevel=2,
        )
    return loader


def _stateful_loader() -> type | None:
    """Return the ``StatefulDataLoader`` of torchdata, where that was imported; it makes the same batches."""
    return getattr(sys.modules.get("torchdata.stateful_dataloader"), "StatefulDataLoader", None)


def loader_batch_size(loader: DataLoader) -> int | None:
    """Return the rows of a batch, None where only a custom batch sampler knows."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def loader_options(loader: DataLoader) -> dict[str, Any]:
    """Return the settings of a ``DataLoader`` that another one over the same dataset should have."""
    return {name: getattr(loader, name) for name in LOADER_OPTIONS}
