"""SelectionDataModule: serves candidates, the reference set, and the batches of the plan."""

from typing import Any

import lightning.pytorch as pl

from liveselect.arguments import check_plain
from liveselect.datamodules.datamodule import ServedDataModule
from liveselect.datamodules.opening import OpenedRows, open_source, open_tokenizer
from liveselect.datamodules.reference import ReferenceSet
from liveselect.datamodules.rows.draws import Collate
from liveselect.datamodules.settings import ServingSettings
from liveselect.datamodules.wrapping import WrappingDataModule


class SelectionDataModule(ServedDataModule):
    """The data of a run with live selection: a pool to choose from and a reference set to improve on.

    Training batches follow the plan that the DataSelection callback publishes. Nothing is read before ``setup``, which
    refuses data that would make selection meaningless.

    Args:
        pool: path of a pool made by ``liveselect prepare``, a ``TokenStore``; ``TokenFiles`` of token ids; Parquet
            files, a folder that ``datasets`` saved, or ``hub:NAME``, with a column ``input_ids``; or a dataset whose
            rows can be asked for by position and have ``input_ids``, are tensors, or pairs (x, y) of tokens. For a
            ``LightningDataModule``, use :meth:`wrap`.
        reference: what selection aims to improve: a :class:`~liveselect.datamodules.ReferenceSet`, or a source for
            one: a prepared pool, a file or folder of text, a list, a dataset, a ``DataLoader``.
        batch_size: rows in the training batch of one rank.
        num_workers: worker processes of the training loader.
        collate_fn: makes training batches of the dataset's rows, in place of ``{"id", "input_ids", "labels"}``.
        settings: further arguments of :class:`~liveselect.datamodules.ServingSettings`: ``validation``,
            ``probe_batch_size``, ``reference_tokens``, ``pack_reference``, ``epoch_examples``, ``groups``,
            ``columns``, ``tokenizer``, ``other_tokenizer``, ``overlap``, ``further_sets`` and ``seed``.

    Raises:
        TypeError: ``pool`` is a datamodule.
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        pool: str | Any,  # a Path is one of any; named here it would be the form in which YAML saves a dataset's class
        reference: str | ReferenceSet | Any,
        batch_size: int,
        *,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        **settings: Any,
    ) -> None:
        if batch_size is None:
            raise ValueError("expected batch_size, the rows in the training batch of one rank")
        check_plain(SelectionDataModule, locals())
        if isinstance(pool, pl.LightningDataModule):
            name = type(pool).__name__
            raise TypeError(
                f"expected the pool as a prepared pool or a map-style dataset, got the datamodule {name}: use "
                f"SelectionDataModule.wrap({name}(...), reference=...), which is in YAML class_path: "
                f"liveselect.datamodules.SelectionDataModule.wrap, with {name} as `existing` in place of `pool`"
            )
        for name, value in {"pool": pool, "reference": reference}.items():
            if value is None:
                raise ValueError(f"expected a {name}, got None")
            if isinstance(value, type):
                raise TypeError(
                    f"expected {name} to be an object, got the class {value.__name__}: pass {value.__name__}(...)"
                )
        if num_workers < 0:
            raise ValueError(f"expected num_workers of 0 or more, got {num_workers}")
        super().__init__(ServingSettings(reference, batch_size, **settings))
        self._source = pool
        self._num_workers = num_workers
        self._collate_fn = collate_fn

    @classmethod
    def wrap(
        cls,
        existing: pl.LightningDataModule,
        reference: str | ReferenceSet | Any,
        *,
        num_workers: int | None = None,
        collate_fn: Collate | None = None,
        **settings: Any,
    ) -> WrappingDataModule:
        """Return a datamodule that selects from the training data of ``existing``.

        Its dataset, batch size, collate function and workers are taken over; its sampler is not, since the plan sets
        the order of the rows. Training batches look as before. Other data loaders and all data hooks stay those of
        ``existing``, which is the attribute ``wrapped`` of the returned datamodule.

        Args:
            existing: has a map-style training dataset whose batches hold ``input_ids``.
            reference: as in the constructor.
            num_workers: worker processes of the training loader, in place of those of ``existing``.
            collate_fn: makes training batches, in place of the collate function of ``existing``: for rows that are no
                dicts with ``input_ids``, for example.
            settings: further arguments of :class:`~liveselect.datamodules.ServingSettings`; ``batch_size`` replaces
                that of ``existing``.
        """
        return WrappingDataModule(existing, reference, num_workers=num_workers, collate_fn=collate_fn, **settings)

    def open_rows(self) -> OpenedRows:
        """Open the rows of the pool."""
        rows = open_source(self._source, self._collate_fn, self.settings.columns, self.settings.groups)
        tokenizer = open_tokenizer(self.settings.tokenizer, rows, other=self.settings.other_tokenizer)
        return OpenedRows(rows, self.batch_size, tokenizer, {"num_workers": self._num_workers})
