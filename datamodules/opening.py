"""Opening the sources that a user passes: rows of a pool, batches of a reference set."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from liveselect.datamodules import checks
from liveselect.datamodules.batching import Item, bucket, pack
from liveselect.datamodules.disjoint import set_apart
from liveselect.datamodules.loader import LoaderOptions
from liveselect.datamodules.pools.foreign_tokenizers import adapted, is_hugging_face
from liveselect.datamodules.pools.pool_files import hash_tokens
from liveselect.datamodules.pools.sources import HUB, is_dataset_folder, open_dataset_folder, open_hub, open_parquet
from liveselect.datamodules.pools.token_files import TokenFiles, holds_token_files
from liveselect.datamodules.pools.tokenizers import load_tokenizer
from liveselect.datamodules.reference import Loaded, ReferenceSet, as_store, is_splits, load_reference, loader_batches
from liveselect.datamodules.rows.collating import unpadded, without_fill
from liveselect.datamodules.rows.columns import Columns
from liveselect.datamodules.rows.draws import Collate
from liveselect.datamodules.rows.hugging_face import TOKEN_COLUMNS
from liveselect.datamodules.rows.rows import CollatedRows, DatasetRows, FileRows, Rows, StoreRows
from liveselect.datamodules.rows.token_rows import complete_batch
from liveselect.datamodules.settings import OnOther, OnOverlap, ServingSettings
from liveselect.grammar import IGNORE_INDEX, REFERENCE_SET, REFERENCE_WEIGHT, Batch, SelectionWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FURTHER_KEYS = ("subtask", REFERENCE_SET, REFERENCE_WEIGHT)  # of a reference batch, where it has them


@dataclass(frozen=True)
class OpenedRows:
    """The rows of a pool, and how they are read.

    Attributes:
        rows: the rows.
        batch_size: rows in the training batch of one rank.
        tokenizer: the Hugging Face tokenizer that made their ids, or None.
        options: further arguments of a ``DataLoader`` that reads them, such as ``num_workers``.
    """

    rows: Rows
    batch_size: int
    tokenizer: "PreTrainedTokenizerBase | None" = None
    options: LoaderOptions = field(default_factory=dict)

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``; without a tokenizer, the ids."""
        rows = input_ids.tolist()
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in rows]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def open_source(
    source: object, collate_fn: Collate | None, columns: Columns | None = None, groups: str | None = None
) -> Rows:
    """Return the rows of a pool.

    Args:
        source: a prepared pool, given by its path or opened; the path of Parquet files, of a folder that ``datasets``
            saved, or ``hub:NAME``; token files; or a dataset whose rows can be read by position.
        collate_fn: makes batches of its rows, or None.
        columns: where rows or batches have their token ids, if not in ``input_ids``.
        groups: column of groups, which is read too.

    Raises:
        FileNotFoundError: ``source`` is a path without a pool.
        TypeError: it is a dataset whose rows cannot be read by position.
        ValueError: it is the path of files that hold no token ids, or do not say how these are cut.
    """
    store = as_store(source)
    if store is None and isinstance(source, (str, Path)):
        wanted = None if collate_fn is not None else [*map(str, columns.values() if columns else TOKEN_COLUMNS)]
        wanted = wanted if wanted is None or groups is None else [*wanted, groups]
        source = _open_path(str(source), wanted)
    if collate_fn is not None:
        return CollatedRows(store or source, collate_fn, columns)
    if columns is not None and (store is not None or isinstance(source, TokenFiles)):
        raise ValueError(f"columns={columns!r} has no effect on {store or source!r}, whose rows have one: leave it out")
    if store is not None:
        return StoreRows(store)
    if isinstance(source, TokenFiles) and source.block_size is not None:
        return FileRows(source)
    return DatasetRows(source, columns)


def _open_path(name: str, wanted: Sequence[str] | None) -> object:
    """Return the dataset at a path that holds no prepared pool; ``wanted`` columns are read, None for all."""
    path = Path(name).expanduser()
    if name.startswith(HUB):
        return open_hub(name)
    if is_dataset_folder(path):
        return open_dataset_folder(path)
    if (dataset := open_parquet(path, wanted)) is not None:
        return dataset
    if holds_token_files(path):
        raise ValueError(
            f"{name!r} holds token ids, and does not say how they are cut into rows: pass "
            f"liveselect.datamodules.TokenFiles({name!r}, block_size=...) as the pool, with dtype='uint32' where they "
            "are no 16-bit numbers"
        )
    raise FileNotFoundError(
        f"expected a pool made by `liveselect prepare` at {name!r}, found none there: run `liveselect prepare` first, "
        "or pass Parquet files or a map-style dataset with input_ids, or TokenFiles(path, block_size=...) of token ids"
    )


def open_tokenizer(
    spec: "str | Path | PreTrainedTokenizerBase | None",
    rows: Rows,
    what: str = "tokenizer=",
    other: OnOther = "refuse",
) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer that made the ids of a pool: ``spec``, else the pool's, else None.

    Args:
        spec: a Hugging Face tokenizer, its name or path, one that encodes and decodes, or None.
        rows: the pool.
        what: origin of ``spec``, for messages.
        other: whether a tokenizer that is not the pool's is refused or allowed.

    Raises:
        ValueError: it is another tokenizer than that of the pool, and these are refused.
    """
    if spec is None:
        kept = rows.store.tokenizer_path if rows.store is not None else None
        return None if kept is None else load_tokenizer(kept)
    tokenizer = load_tokenizer(spec) if isinstance(spec, (str, Path)) else adapted(spec) or spec
    checks.check_tokenizer(tokenizer, rows, what, other)
    return tokenizer


def adopt_tokenizer(own: object, rows: Rows, name: str, other: OnOther) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a wrapped module; a foreign one that did not make the pool is left alone, with a note.

    Nobody passed it to be used here, and ready ids need none. One of Hugging Face's is refused then.
    """
    what = f"the tokenizer of {name}"
    if own is None or isinstance(own, (str, Path)) or is_hugging_face(own):
        return open_tokenizer(own, rows, what, other)  # type: ignore[arg-type]
    try:
        return open_tokenizer(own, rows, what, other)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"{what} ({type(own).__name__}) is left alone, so a reference set needs input_ids, and rows are shown as "
            f"ids: {error}. For text, pass the one that made the ids as tokenizer=",
            SelectionWarning,
            stacklevel=2,
        )
        return None


def fingerprint_of(batches: Iterable[Batch]) -> str:
    """Return a hash of the token ids, labels, subtasks and weights of some batches."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for name in ("input_ids", "labels", *(key for key in FURTHER_KEYS if key in batch)):
            array = np.ascontiguousarray(batch[name])
            digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def mixture_of(source: object) -> dict[str, ReferenceSet]:
    """Return the sets of a mixture by name, none where ``source`` is a single reference set.

    A mixture is a dict of names, or a list of :class:`ReferenceSet`; a dict of settings stands for such a set.
    """
    if isinstance(source, (list, tuple)) and source and any(isinstance(each, ReferenceSet) for each in source):
        return {f"set {number}": ReferenceSet.of(each) for number, each in enumerate(source)}
    if not isinstance(source, Mapping) or is_splits(source):
        return {}
    for name, each in source.items():
        if not isinstance(name, str) or each is None or isinstance(each, (int, float)):
            raise TypeError(
                f"expected the reference as a source, or as a dict of names and sources, got {name!r}: {each!r} in it"
            )
    return {
        name: ReferenceSet(**each) if isinstance(each, Mapping) and "source" in each else ReferenceSet.of(each)
        for name, each in source.items()
    }


def open_mixture(source: object, opened: OpenedRows, settings: ServingSettings, on_overlap: OnOverlap) -> list[Batch]:
    """Return the batches of a reference set, or of a mixture of several; see :func:`open_reference`.

    In a mixture the mean loss over all tokens, each with its ``reference_weight``, is the mean of the sets' own mean
    losses with the weights of the sets.
    """
    sets = mixture_of(source)
    if not sets:
        return open_reference(source, opened, settings, on_overlap)
    every = [open_reference(each, opened, settings, on_overlap) for each in sets.values()]
    tokens = [sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches) for batches in every]
    shares = [each.weight / sum(one.weight for one in sets.values()) for each in sets.values()]
    found: list[Batch] = []
    for number, batches in enumerate(every):
        if not tokens[number]:
            raise ValueError(f"no token of the reference set {[*sets][number]!r} carries loss: look at its labels")
        weight = shares[number] * sum(tokens) / tokens[number]
        for batch in batches:
            rows = len(batch["input_ids"])
            marks = {REFERENCE_SET: torch.full((rows,), number)}
            marks[REFERENCE_WEIGHT] = torch.full((rows,), weight, dtype=torch.float64)
            found.append({**batch, **marks})
    return found


def open_reference(source: object, opened: OpenedRows, settings: ServingSettings, on_overlap: OnOverlap) -> list[Batch]:
    """Return the batches of a reference set.

    Args:
        source: a :class:`ReferenceSet`, or a source for one.
        opened: the pool.
        settings: the size of batches, and whether several examples share a row.
        on_overlap: what to do with records that are in the pool: ``refuse``, ``drop`` or ``allow``.

    Raises:
        ValueError: the reference set is empty, inside the pool, or prepared with another tokenizer.
    """
    rows = opened.rows
    reference = ReferenceSet.of(source)
    if isinstance(reference.source, DataLoader):
        if settings.pack_reference:
            raise ValueError(
                "pack_reference=True has no effect on a DataLoader, whose batches are used unchanged: pass its "
                "dataset, or leave it out"
            )
        batches = _completed(loader_batches(reference.source))
        if on_overlap != "allow":
            _check_batches_apart(opened, batches)
        return batches
    if settings.other_tokenizer != "allow":
        checks.check_same_tokenizer(rows.store, as_store(reference.source))
    loaded = load_reference(reference, opened.tokenizer, rows.block_size)
    if loaded.left_out:
        warnings.warn(
            f"{loaded.left_out} of {len(loaded.documents)} reference records have no token that could count (a text "
            "needs two tokens, an answer needs a prompt before it) and are left out",
            SelectionWarning,
            stacklevel=2,
        )
    for remark in loaded.remarks:
        warnings.warn(remark, SelectionWarning, stacklevel=2)
    loaded = set_apart(rows, loaded, on_overlap, opened.decode)
    pad_id = (rows.store.eos_id or 0) if rows.store is not None else 0
    if settings.pack_reference:
        width = rows.block_size or max(map(len, loaded.items))
        return list(pack(loaded.items, width, settings.reference_tokens, pad_id))
    found: list[Batch] = []
    for batch in bucket(loaded.items, settings.reference_tokens, pad_id):
        records = [int(loaded.positions[loaded.items[i].record]) for i in batch["id"].tolist()]
        found.append({**batch, "record": torch.tensor(records)})  # for messages: the place of a row in its source
    return found


def largest_id(batches: Iterable[Batch]) -> int:
    """Return the largest token id of some batches."""
    return max((int(batch["input_ids"].max()) for batch in batches), default=0)


def most_positions(batches: Iterable[Batch]) -> int:
    """Return the number of positions that a model needs for some batches; each packed example begins at position 0."""
    return max(
        (
            int(batch["position_ids"].max()) + 1 if "position_ids" in batch else batch["input_ids"].shape[1]
            for batch in batches
        ),
        default=0,
    )


def _completed(batches: Iterable[Any]) -> list[Batch]:
    complete: list[Batch] = []
    start = 0
    for batch in batches:
        rows = len(batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else batch)
        completed = complete_batch(batch, range(start, start + rows), "the reference DataLoader")
        tokens = completed["input_ids"]
        smallest = int(tokens.min()) if tokens.numel() else None
        if smallest is None or smallest < 0:
            raise ValueError(
                f"expected input_ids of the reference DataLoader as token ids of 0 or more, got a batch of shape "
                f"{tuple(tokens.shape)} with the smallest id {smallest}: mask tokens in labels, by {IGNORE_INDEX}, and "
                "leave empty examples out"
            )
        complete.append(completed)
        start += rows
    return complete


def _check_batches_apart(opened: OpenedRows, batches: Iterable[Batch]) -> None:
    """Raise ValueError when rows of ready batches are in the pool."""
    seen = [tokens for batch in batches for tokens in unpadded(batch)]
    items = [Item(tokens, tokens, record) for record, tokens in enumerate(map(without_fill, seen))]
    documents = np.array([hash_tokens(item.input_ids) for item in items], np.uint64)
    loaded = Loaded([item for item in items if len(item)], documents, list(range(len(items))))
    set_apart(opened.rows, loaded, "refuse", opened.decode, can_drop=False)
