"""WrappingDataModule: selection from the training data of an existing LightningDataModule."""

import sys
import warnings
from typing import TYPE_CHECKING, Any, Never

import lightning.pytorch as pl
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from liveselect.datamodules.datamodule import ServedDataModule
from liveselect.datamodules.opening import OpenedRows, adopt_tokenizer, open_tokenizer
from liveselect.datamodules.reference import ReferenceSet
from liveselect.datamodules.rows.by_position import is_readable_by_position
from liveselect.datamodules.rows.draws import Collate
from liveselect.datamodules.rows.rows import CollatedRows
from liveselect.datamodules.settings import ServingSettings
from liveselect.grammar import SelectionWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADOPTED_ATTRIBUTES = (
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("test_dataloader", "predict_dataloader", "state_dict", "load_state_dict"),
    *("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"),
)
"""Attributes of the wrapped module that Lightning finds in place of the wrapper's own."""

LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
)


class WrappingDataModule(ServedDataModule):
    """A datamodule that selects from the training data of another one, and leaves everything else to it.

    Made by :meth:`SelectionDataModule.wrap <liveselect.datamodules.SelectionDataModule.wrap>`.

    Args:
        existing: has a map-style training dataset whose batches hold ``input_ids``.
        reference: what selection aims to improve.
        num_workers: in place of those of its training ``DataLoader``.
        collate_fn: in place of that of its training ``DataLoader``.
        settings: further arguments of :class:`~liveselect.datamodules.ServingSettings`.

    Attributes:
        wrapped: the other datamodule.
    """

    validates_on_reference = False

    def __init__(
        self,
        existing: pl.LightningDataModule,
        reference: str | ReferenceSet | Any,
        *,
        num_workers: int | None = None,
        collate_fn: Collate | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(existing, type):
            raise TypeError(
                f"expected the datamodule to wrap to be an object, got the class {existing.__name__}: pass "
                f"{existing.__name__}(...)"
            )
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"expected num_workers of 0 or more, got {num_workers}")
        super().__init__(ServingSettings(reference, **settings))
        self.wrapped = existing
        self._num_workers, self._collate_fn = num_workers, collate_fn
        # bound methods are copied rather than called by methods here: Lightning compares a hook's code with its own to
        # see whether a datamodule overrides it, and calls the LightningModule's hook where it does not
        for name in (*ADOPTED_ATTRIBUTES, *([] if self._serves_validation else ["val_dataloader"])):
            setattr(self, name, getattr(existing, name))

    def __getattr__(self, name: str) -> Never:
        """Raise AttributeError, with a hint if the wrapped module has the attribute."""
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        wrapped = self.__dict__.get("wrapped")
        if wrapped is not None and hasattr(wrapped, name):
            message += f", but the {type(wrapped).__name__} that it wraps has: use datamodule.wrapped.{name}"
        raise AttributeError(message, name=name, obj=self)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the wrapped module; raises AttributeError where that has none."""
        return self.wrapped.tokenizer  # type: ignore[attr-defined]

    def prepare_data(self) -> None:
        """Prepare the wrapped module's data."""
        self.wrapped.trainer = self.trainer
        self.wrapped.prepare_data()

    def setup(self, stage: str) -> None:
        """Set the wrapped module up, then open and check its training data and the reference set."""
        self.wrapped.trainer = self.trainer
        self.wrapped.setup(stage)
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        """End the workers, and tear the wrapped module down."""
        super().teardown(stage)
        self.wrapped.teardown(stage)

    def on_exception(self, exception: BaseException | None = None) -> None:
        """End the workers, and call the wrapped module's hook."""
        super().on_exception(exception)
        if exception is not None:
            self.wrapped.on_exception(exception)

    def open_rows(self) -> OpenedRows:
        """Open the rows of the wrapped module's training dataset, read as its ``DataLoader`` reads them."""
        loader = training_loader(self.wrapped)
        name = type(self.wrapped).__name__
        size = self.settings.batch_size or loader_batch_size(loader)
        if size is None:
            raise ValueError(
                f"the batch sampler of {name} does not say how large its batches are: pass batch_size to "
                "SelectionDataModule.wrap"
            )
        options = {option: getattr(loader, option) for option in LOADER_OPTIONS}
        own_collate = options.pop("collate_fn")
        rows = CollatedRows(loader.dataset, self._collate_fn or own_collate, self.settings.columns)
        if self._num_workers is not None:
            options["num_workers"] = self._num_workers
            if not self._num_workers:  # what needs workers goes with them
                options |= {"timeout": 0, "prefetch_factor": None, "multiprocessing_context": None}
        tokenizer = open_tokenizer(self.settings.tokenizer, rows, other=self.settings.other_tokenizer)
        if tokenizer is None:
            own = getattr(self.wrapped, "tokenizer", None)
            tokenizer = adopt_tokenizer(own, rows, name, self.settings.other_tokenizer)
        return OpenedRows(rows, size, tokenizer, options)


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
    is_iterable = isinstance(loader.dataset, IterableDataset)
    if is_iterable and not is_readable_by_position(loader.dataset):
        raise TypeError(
            f"{name} trains on an iterable dataset ({type(loader.dataset).__name__}): selection reads rows by their "
            "position, which a stream does not allow. Write it to disk with `liveselect prepare`, or use a map-style "
            "dataset"
        )
    if loader.batch_sampler is None:
        raise TypeError(
            f"{name} loads with batch_size=None, so its dataset yields whole batches: selection chooses single rows. "
            "Let the DataLoader make the batches"
        )
    known = (RandomSampler, SequentialSampler, DistributedSampler)
    for sampler in () if is_iterable else (loader.sampler, loader.batch_sampler):
        if not isinstance(sampler, known) and type(sampler) is not BatchSampler:
            warnings.warn(
                f"the {type(sampler).__name__} of {name} is not used: every row of its dataset is a candidate, and the "
                "plan sets the rows of each batch. If rows were left out on purpose, wrap a torch.utils.data.Subset",
                SelectionWarning,
                stacklevel=2,
            )
    known_loaders = (DataLoader.__iter__, *(getattr(loader, "__iter__", None) for loader in _foreign_loaders()))
    if type(loader).__iter__ not in known_loaders:
        warnings.warn(
            f"the __iter__ of {type(loader).__name__} is not used: its collate function makes the batches of the rows "
            f"of its dataset. If {name} changes batches after that, do it in the collate function or in "
            "on_after_batch_transfer",
            SelectionWarning,
            stacklevel=2,
        )
    return loader


def _foreign_loaders() -> list[type | None]:
    """Return, as far as they were imported, loaders that make the same batches: those of torchdata and litdata."""
    named = {
        "torchdata.stateful_dataloader": "StatefulDataLoader",
        "litdata.streaming.dataloader": "StreamingDataLoader",
    }
    return [getattr(sys.modules.get(module), name, None) for module, name in named.items()]


def loader_batch_size(loader: DataLoader) -> int | None:
    """Return the rows of a batch, None where only a custom batch sampler knows."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None
