"""From what a user names to what training reads: rows of a pool, batches of a reference set."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from liveselect.datamodules import checks, wrapping
from liveselect.datamodules.batching import bucket, pack
from liveselect.datamodules.reference import ReferenceSet, as_store, load_reference, loader_batches
from liveselect.datamodules.rows import Collate, CollatedRows, DatasetRows, Rows, StoreRows, complete_batch
from liveselect.datamodules.tokenizers import load_tokenizer
from liveselect.protocols import Batch, SelectionWarning


def open_source(source: Any, collate_fn: Collate | None) -> Rows:
    """Return the rows of a prepared pool, given by its path or opened, or of a map-style dataset.

    Raises:
        FileNotFoundError: ``source`` is a path without a pool.
        TypeError: it is a dataset that cannot be asked for rows.
    """
    store = as_store(source)
    if store is None and isinstance(source, (str, Path)):
        raise FileNotFoundError(
            f"expected a pool made by `liveselect prepare` at {str(source)!r}, found none there: run `liveselect "
            "prepare` first, or pass a map-style dataset with input_ids"
        )
    if collate_fn is not None:
        return CollatedRows(store or source, collate_fn)
    return StoreRows(store) if store is not None else DatasetRows(source)


def open_existing(existing: pl.LightningDataModule, batch_size: int | None) -> tuple[Rows, int, dict[str, Any]]:
    """Return the rows, the batch size and the loader options of a datamodule that has been set up."""
    loader = wrapping.training_loader(existing)
    size = batch_size or wrapping.loader_batch_size(loader)
    if size is None:
        raise ValueError(
            f"the batch sampler of {type(existing).__name__} does not say how large its batches are: pass batch_size "
            "to SelectionDataModule.wrap"
        )
    options = wrapping.loader_options(loader)
    return CollatedRows(loader.dataset, options.pop("collate_fn")), size, options


def open_tokenizer(spec: Any, rows: Rows, existing: pl.LightningDataModule | None) -> Any:
    """Return the tokenizer that ``spec`` is or names, else the pool's, else the wrapped module's, else None."""
    if spec is None and rows.store is not None:
        spec = rows.store.tokenizer_path
    if spec is None:
        spec = getattr(existing, "tokenizer", None)
    return load_tokenizer(spec) if isinstance(spec, (str, Path)) else spec


def open_reference(
    source: Any,
    rows: Rows,
    tokenizer: Any,
    tokens: int,
    packed: bool,
    decode: Callable[[Tensor], list[str]] | None,
) -> list[Batch]:
    """Return the batches of a reference set.

    Args:
        source: a :class:`ReferenceSet` or what one can be made of.
        rows: the pool.
        tokenizer: for text.
        tokens: tokens of a batch, padding included.
        packed: put several examples into one row.
        decode: shows what pool and reference set share; None to leave out the search for it.

    Raises:
        ValueError: the reference set is empty, inside the pool, or prepared with another tokenizer.
    """
    reference = ReferenceSet.of(source)
    if isinstance(reference.source, DataLoader):
        return _completed(loader_batches(reference.source))
    checks.check_same_tokenizer(rows.store, as_store(reference.source))
    loaded = load_reference(reference, tokenizer, rows.block_size)
    if loaded.left_out:
        warnings.warn(
            f"{loaded.left_out} of {len(loaded.documents)} reference records have no token that could count (a text "
            "needs two tokens, an answer needs a prompt before it) and are left out",
            SelectionWarning,
            stacklevel=2,
        )
    if decode is not None:
        checks.check_no_overlap(rows, loaded, decode)
    pad_id = (rows.store.eos_id or 0) if rows.store is not None else 0
    if packed:
        return list(pack(loaded.items, rows.block_size or max(map(len, loaded.items)), tokens, pad_id))
    return list(bucket(loaded.items, tokens, pad_id))


def largest_id(batches: Iterable[Batch]) -> int:
    """Return the largest token id of some batches."""
    return max(int(batch["input_ids"].max()) for batch in batches)


def _completed(batches: Iterable[Any]) -> list[Batch]:
    complete: list[Batch] = []
    start = 0
    for batch in batches:
        rows = len(batch["input_ids"]) if "input_ids" in batch else len(batch)
        complete.append(complete_batch(batch, range(start, start + rows), "the reference DataLoader"))
        start += rows
    return complete
