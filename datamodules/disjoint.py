"""A check that reference set and pool are disjoint: records in both are refused, left out, or let through."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.overlap import (
    PASSAGE,
    Overlap,
    passage_length,
    pool_tokens,
    scan_limit,
    shared_documents,
    shared_passages,
    shared_rows,
)
from liveselect.datamodules.reference import Loaded
from liveselect.datamodules.rows.rows import Rows
from liveselect.datamodules.settings import OnOverlap
from liveselect.grammar import SelectionWarning

MAX_RECORDS_NAMED = 20  # in a message
MAX_PASSAGE_CHARACTERS = 60  # shown in a message

Decode = Callable[[Tensor], list[str]]

REWARD = "Selection would be rewarded for choosing the very text that it is judged by"
REMEDY = (
    "Leave these records out of the reference set{offer}, or their text out of the pool; "
    "overlap='allow' lets them through, if this is meant"
)


def set_apart(rows: Rows, reference: Loaded, on_overlap: OnOverlap, decode: Decode, can_drop: bool = True) -> Loaded:
    """Return the reference set, under ``drop`` without the records that are in the pool.

    Whole documents of prepared pools are compared by their hashes. In pools up to
    :func:`~liveselect.datamodules.overlap.scan_limit` tokens, passages from all over every example are looked for at
    every position, and short examples are compared with the rows of a dataset. For larger pools a warning says so.

    Args:
        rows: the pool.
        reference: the reference set.
        on_overlap: ``refuse``, ``drop``, or ``allow``, which compares nothing.
        decode: maps tokens to text, for messages.
        can_drop: whether the message should offer to drop records.

    Raises:
        ValueError: records are in the pool and must not be dropped, or none would remain.
    """
    if on_overlap == "allow":
        return reference
    if reference.fingerprint is not None and reference.fingerprint == rows.fingerprint:
        raise ValueError(
            f"the reference set and the pool are the same prepared pool ({rows.fingerprint}). {REWARD}. Hold a part of "
            "the text back when the pool is made; overlap='allow' lets it through, if this is meant"
        )
    found = find_overlaps(rows, reference)
    if not found:
        return reference
    dropped = {overlap.record for overlap in found}
    left = [item for item in reference.items if item.record not in dropped]
    if on_overlap == "refuse" or not left:
        message = describe(found, reference, rows, decode)
        if on_overlap != "refuse":
            raise ValueError(f"{message} Without them the reference set is empty")
        offer = " (overlap='drop' does it for you)" if can_drop else ", whose batches are used as they come"
        raise ValueError(f"{message} {REWARD}. {REMEDY.format(offer=offer)}")
    records = len({item.record for item in left})
    warnings.warn(describe_dropped(found, reference, records, decode), SelectionWarning, stacklevel=2)
    return replace(reference, items=left)


def find_overlaps(rows: Rows, reference: Loaded) -> list[Overlap]:
    """Return one overlap for every reference record that is in the pool; warn where not everything was compared."""
    found: dict[int, Overlap] = {}
    if rows.store is not None:
        kept = {item.record for item in reference.items}
        documents = shared_documents(rows.store.document_hashes, reference.documents)
        found = {overlap.record: overlap for overlap in documents if overlap.record in kept}
    size = pool_tokens(rows)
    if size > scan_limit(rows):
        compared = "nothing was compared" if rows.store is None else "only whole documents were compared"
        warnings.warn(
            f"the pool holds {size} tokens, too many to search for passages of the reference set: {compared}. If "
            "they come from the same corpus, make sure that they are disjoint",
            SelectionWarning,
            stacklevel=3,
        )
        return list(found.values())
    equal_rows = [] if rows.is_stream else shared_rows(rows, reference.items)
    for overlap in (*shared_passages(rows, reference.items), *equal_rows):
        found.setdefault(overlap.record, overlap)
    return [found[record] for record in sorted(found)]


def describe(found: Sequence[Overlap], reference: Loaded, rows: Rows, decode: Decode) -> str:
    """Return a message that names the records, the text that each shares with the pool, and the rules applied."""
    names = [f"record {_place(overlap, reference)} {_what(overlap, decode)}" for overlap in found[:MAX_RECORDS_NAMED]]
    more = f"; and {len(found) - MAX_RECORDS_NAMED} more" if len(found) > MAX_RECORDS_NAMED else ""
    rules = [f"{passage_length(rows)} tokens in a row of an example are in the pool"]
    if rows.store is not None:
        rules.insert(0, "the whole record is one of its documents")
    if not rows.is_stream:
        rules.append(f"an example of less than {PASSAGE} tokens is one of its rows")
    return (
        f"{len(found)} of {len(reference.documents)} reference records share text with the pool (looked for: "
        f"{', or '.join(rules)}): {'; '.join(names)}{more}."
    )


def describe_dropped(found: Sequence[Overlap], reference: Loaded, left: int, decode: Decode) -> str:
    """Return a short message that names the records left out; ``left`` of them remain."""
    places = sorted(_place(overlap, reference) for overlap in found)
    more = f" and {len(places) - MAX_RECORDS_NAMED} more" if len(places) > MAX_RECORDS_NAMED else ""
    named = ", ".join(map(str, places[:MAX_RECORDS_NAMED])) + more
    first = min(found, key=lambda overlap: _place(overlap, reference))
    return (
        f"{len(found)} of {len(reference.documents)} reference records share text with the pool and are left out, "
        f"{left} remain. Left out: {named}. Record {places[0]} {_what(first, decode)}"
    )


def _place(overlap: Overlap, reference: Loaded) -> int:
    return reference.positions[overlap.record]


def _what(overlap: Overlap, decode: Decode) -> str:
    if overlap.candidate is None:
        return "is one of the pool's documents"
    (text,) = decode(torch.from_numpy(overlap.tokens[np.newaxis]))
    shown = text if len(text) <= MAX_PASSAGE_CHARACTERS else text[:MAX_PASSAGE_CHARACTERS] + "..."
    several = f"{overlap.found} of {overlap.looked_for} passages, such as " if overlap.looked_for > 1 else ""
    return f"shares {several}{shown!r} with candidate {overlap.candidate}"
