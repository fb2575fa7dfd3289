"""Is the reference set apart from the pool? Records that both hold are refused, left out, or let through."""

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
from liveselect.protocols import SelectionWarning

LISTED = 20  # records that a message names
SHOWN = 60  # characters of a passage that it shows

Decode = Callable[[Tensor], list[str]]

REWARD = "Selection would be rewarded for choosing the very text that it is judged by"
REMEDY = (
    "Leave these records out of the reference set{offer}, or their text out of the pool; "
    "overlap='allow' lets them through, if this is meant"
)


def set_apart(rows: Rows, reference: Loaded, on_overlap: OnOverlap, decode: Decode, can_drop: bool = True) -> Loaded:
    """Return the reference set, without the records that stand in the pool where these are to be dropped.

    Whole documents of prepared pools are compared by their hashes. In pools up to
    :func:`~liveselect.datamodules.overlap.scan_limit` tokens, passages from all over every example are looked for at
    every position, and short examples are compared with the rows of a dataset. A warning says where that was not done.

    Args:
        rows: the pool.
        reference: what was read.
        on_overlap: ``refuse``, ``drop``, or ``allow``, which looks for nothing.
        decode: shows tokens.
        can_drop: whether to offer that records are dropped.

    Raises:
        ValueError: records are in the pool and are not to be dropped, or none would be left.
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
    """Return one overlap for every reference record that is in the pool; warn where not everything was looked at."""
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
    for overlap in shared_passages(rows, reference.items):
        found.setdefault(overlap.record, overlap)
    for overlap in shared_rows(rows, reference.items) if rows.store is None else []:
        found.setdefault(overlap.record, overlap)
    return [found[record] for record in sorted(found)]


def describe(found: Sequence[Overlap], reference: Loaded, rows: Rows, decode: Decode) -> str:
    """Return which records share what with the pool, and by which rule."""
    names = [f"record {_place(overlap, reference)} {_what(overlap, decode)}" for overlap in found[:LISTED]]
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    rules = [f"{passage_length(rows)} tokens in a row of an example stand in the pool"]
    if rows.store is not None:
        rules.insert(0, "the whole record is one of its documents")
    else:
        rules.append(f"an example of less than {PASSAGE} tokens is one of its rows")
    return (
        f"{len(found)} of {len(reference.documents)} reference records share text with the pool (looked for: "
        f"{', or '.join(rules)}): {'; '.join(names)}{more}."
    )


def describe_dropped(found: Sequence[Overlap], reference: Loaded, left: int, decode: Decode) -> str:
    """Return which records are left out, shortly, and that ``left`` remain."""
    places = sorted(_place(overlap, reference) for overlap in found)
    named = ", ".join(map(str, places[:LISTED])) + (f" and {len(places) - LISTED} more" if len(places) > LISTED else "")
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
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    several = f"{overlap.found} of {overlap.looked_for} passages, such as " if overlap.looked_for > 1 else ""
    return f"shares {several}{shown!r} with candidate {overlap.candidate}"
