"""Does what makes a batch keep the rows in their order? Asked before training, by trying it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

TRIED = 8  # rows of a trial batch
SAME = 0.9  # share of a row's tokens that is found again where nothing random happens: truncation and padding aside
CLEARER, HALF = 0.25, 0.5  # a random function moved a row when half of it is found elsewhere, clearly more than here
SLIDING = 1 << 20  # comparisons of a pair of rows beyond which only their beginnings and ends are aligned

Together = Callable[[Sequence[int], int], list[np.ndarray]]
"""Makes a batch of the rows ``ids (B,)`` under a seed, and returns what became of each, without marked padding."""


def check_order(together: Together, ids: Sequence[int], what: str) -> None:
    """Raise ValueError unless row j of a batch is what becomes of its j-th example.

    Rows are asked for one by one, and together, the short ones first and the long ones first, so that a function that
    sorts shows itself in one of the two. Padding on either side and truncation do not count. A function that draws
    random numbers (masking) is judged by the tokens that it leaves alone.

    Args:
        together: makes a batch of some rows.
        ids: rows to try, of different lengths where there are any.
        what: what makes the batch.
    """
    alone = _distinct({i: together([i], 0)[0] for i in ids})
    by_length = sorted(alone, key=lambda i: len(alone[i]))
    chosen = [by_length[k] for k in np.unique(np.linspace(0, len(alone) - 1, min(len(alone), TRIED)).astype(int))]
    if len(chosen) < 2:
        return
    for order in (chosen, chosen[::-1]):
        rows = together(order, 0)
        is_random = not all(map(np.array_equal, rows, together(order, 1)))
        for place, row in enumerate(rows):
            _check_place([agreement(row, alone[i]) for i in order], place, order, is_random, what)


def _check_place(found: list[tuple[float, int]], place: int, order: Sequence[int], is_random: bool, what: str) -> None:
    """Raise ValueError unless a row agrees best with its own example; ``found`` has its agreement with each."""
    own, own_tokens = found[place]
    best = max(range(len(found)), key=lambda k: (found[k][1], k == place))
    share, tokens = found[best]
    is_clear = share >= max(HALF, own + CLEARER) if is_random else share > own
    if is_clear and tokens > own_tokens:
        raise ValueError(
            f"{what} changes the order of the rows: of the examples {list(order)}, in this order, row {place} of the "
            f"batch holds example {order[best]}, not {order[place]}. Selection credits row j to the j-th example, so "
            "influence would go to the wrong ones: return the rows in the order in which they came (sort, if you must, "
            "inside the model)"
        )
    if not is_random and own < SAME:
        raise ValueError(
            f"{what} mixes rows: of the examples {list(order)}, row {place} of the "
            f"batch holds {own:.0%} of what example {order[place]} is when it stands alone. Selection credits row "
            "j to the j-th example: return one row for each example, padded or cut, and nothing of the others in it"
        )


def agreement(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """Return which share of the shorter of two rows ``(S,)`` and ``(T,)`` is in the longer one, and how many tokens.

    The shorter one is laid where it fits best.
    """
    short, long = sorted((one, other), key=len)
    if not len(short):
        return 1.0, 0
    if len(short) * (len(long) - len(short) + 1) > SLIDING:
        equal = max(int((long[: len(short)] == short).sum()), int((long[-len(short) :] == short).sum()))
    else:
        windows = np.lib.stride_tricks.sliding_window_view(long, len(short))
        equal = int((windows == short).sum(axis=1).max())
    return equal / len(short), equal


def unpadded(batch: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the rows of ``input_ids (B, T)``, without what an ``attention_mask (B, T)`` hides."""
    tokens = np.asarray(batch["input_ids"])
    mask = batch.get("attention_mask")
    if mask is None or np.shape(mask) != tokens.shape:
        return list(tokens)
    return [row[seen] for row, seen in zip(tokens, np.asarray(mask) != 0, strict=True)]


def without_fill(row: np.ndarray) -> np.ndarray:
    """Return ``row (T,)`` without what fills it up: a token that is repeated at its beginning or its end."""
    if not len(row):
        return row
    other_than_last, other_than_first = np.flatnonzero(row != row[-1]), np.flatnonzero(row != row[0])
    if not len(other_than_last):
        return row[:1]
    end = int(other_than_last[-1]) + 2 if len(row) - other_than_last[-1] > 2 else len(row)
    start = int(other_than_first[0]) - 1 if other_than_first[0] > 1 else 0
    return row[start:end]


def _distinct(rows: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    return dict({row.tobytes(): (i, row) for i, row in rows.items()}.values())
