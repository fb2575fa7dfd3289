"""Rows and batches of any form, as mappings: pairs of tokens and next tokens, bare tensors, columns of other names."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from liveselect.grammar import IGNORE_INDEX

TARGETS = "targets"
ROLES = ("input_ids", "labels", TARGETS, "attention_mask")
SHIFTED_SHARE = 0.95  # of the tokens of a pair that are where they are expected; the others were masked or augmented

Columns = Mapping[str, str | int]
"""Where a row has its ``input_ids``, ``labels``, ``targets`` and ``attention_mask``: a name, or a place in a tuple."""


def check_columns(columns: object, rows: str) -> None:
    """Raise ValueError unless ``columns`` says where rows have their token ids."""
    if columns is None:
        return
    kinds = "a name, or a place in a tuple"
    example = "columns={'input_ids': 'tokens'} or {'input_ids': 0, 'targets': 1}"
    if not isinstance(columns, Mapping) or not all(isinstance(place, (str, int)) for place in columns.values()):
        raise ValueError(f"expected columns of {rows} as a dict of {kinds}, such as {example}, got {columns!r}")
    if unknown := sorted({str(role) for role in columns} - set(ROLES)):
        raise ValueError(f"expected columns of {rows} to name those for {', '.join(ROLES)}, got {unknown}: {example}")
    if "input_ids" not in columns or {"labels", TARGETS} <= set(columns):
        raise ValueError(f"expected columns of {rows} to name input_ids, and labels or targets, got {dict(columns)}")


def by_role(row: object, columns: Columns | None, where: str) -> dict[str, Any]:
    """Return a row or a batch as a dict with ``input_ids`` and, where it has them, ``labels`` and ``attention_mask``.

    A tensor, an array or a list of numbers is its ``input_ids``; of a pair (x, y), x is. Other keys of a mapping stay.
    ``targets`` are the next token of each token; as ``labels`` they move one place to the right, since losses shift
    labels themselves, and the last of them is lost.

    Raises:
        TypeError: it is neither a mapping, nor a tensor, nor a tuple.
        ValueError: a column is missing, or y is neither x nor its next tokens.
    """
    if columns is not None:
        return _named(row, columns, where)
    if isinstance(row, Mapping):
        return dict(row)
    if is_array(row):
        return {"input_ids": row}
    if isinstance(row, (tuple, list)) and row and all(map(is_array, row)):
        if len(row) == 1:
            return {"input_ids": row[0]}
        if len(row) == 2:
            return {"input_ids": row[0], "labels": _labels_of_pair(row[0], row[1], where)}
    if isinstance(row, str):
        raise TypeError(
            f"expected {where} as token ids, got text: text has to be made a pool first (`liveselect prepare`), or "
            "pass a collate_fn that tokenizes it"
        )
    form = f"{type(row).__name__} of {len(row)}" if isinstance(row, (tuple, list)) else type(row).__name__
    raise TypeError(
        f"expected {where} as a dict with input_ids, a tensor of token ids, or a pair (x, y), got {form}: say where "
        "they are, such as columns={'input_ids': 0, 'targets': 1}, or pass a collate_fn that returns a dict"
    )


def is_array(value: object) -> bool:
    """Return whether a value is a tensor, an array or a list of numbers, none of them a single number."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, list) and bool(value) and all(isinstance(each, (int, np.integer)) for each in value)


def _named(row: object, columns: Columns, where: str) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    if isinstance(row, Mapping):
        missing = [name for name in columns.values() if name not in row]
        had = f"the columns {sorted(map(str, row))}"
        rest = {name: value for name, value in row.items() if name not in columns.values() and name not in ROLES}
    elif isinstance(row, Sequence) and not isinstance(row, str):
        missing = [place for place in columns.values() if not isinstance(place, int) or not 0 <= place < len(row)]
        had = f"a {type(row).__name__} of {len(row)}"
    else:
        missing, had = list(columns.values()), type(row).__name__
    if missing:
        raise ValueError(f"columns names {missing[0]!r}, and {where} is {had}: name a column that it has")
    values: Any = row
    found = {role: values[place] for role, place in columns.items()}
    if TARGETS in found:
        found["labels"] = labels_of_targets(found["input_ids"], found.pop(TARGETS), where)
    return {**rest, **found}


def labels_of_targets(tokens: ArrayLike | Tensor, targets: ArrayLike | Tensor, where: str) -> Tensor:
    """Return labels of the shape of ``tokens (..., T)`` whose next ones are ``targets (..., T)``; negative ones: none.

    The first token has no label, since nothing precedes it, and the last target has no token.
    """
    following = torch.as_tensor(targets)
    if following.shape != torch.as_tensor(tokens).shape:
        raise ValueError(
            f"expected {where} to have one target for each token, got shapes {tuple(torch.as_tensor(tokens).shape)} "
            f"and {tuple(following.shape)}"
        )
    labels = torch.full_like(following, IGNORE_INDEX, dtype=torch.int64)
    labels[..., 1:] = following[..., :-1]
    return labels.masked_fill_(labels < 0, IGNORE_INDEX)


def _labels_of_pair(x: ArrayLike | Tensor, y: ArrayLike | Tensor, where: str) -> Tensor:
    """Return the labels of a pair (x, y), whose y holds the same tokens as x or the next ones, or marks to ignore."""
    tokens, others = torch.as_tensor(x), torch.as_tensor(y)
    if tokens.shape == others.shape and not others.dtype.is_floating_point:
        counts = others >= 0
        inside = counts[..., :-1]
        if not counts.any() or _share(others[..., :-1] == tokens[..., 1:], inside) > SHIFTED_SHARE:
            return labels_of_targets(tokens, others, where)
        if _share(others == tokens, counts) > SHIFTED_SHARE:
            return others.long().masked_fill(~counts, IGNORE_INDEX)
    raise ValueError(
        f"expected {where} as a pair (x, y) whose y holds the tokens of x or the tokens after them, got shapes "
        f"{tuple(tokens.shape)} and {tuple(others.shape)} of other content: say what they are, such as "
        "columns={'input_ids': 0} where y is no label, or {'input_ids': 0, 'targets': 1}"
    )


def _share(equal: Tensor, counted: Tensor) -> float:
    return float(equal[counted].double().mean()) if counted.any() else 0.0
