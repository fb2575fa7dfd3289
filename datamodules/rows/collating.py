"""A check before training that a collate function keeps the rows in their order, by trying it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

TRIAL_ROWS = 8  # of a trial batch
UNMIXED_SHARE = 0.9  # of a row's tokens comes back where nothing is random; truncation and padding do not count
# of a random function: it moved a row when half of the row is found elsewhere, clearly more than in its own place
MOVED_SHARE, MOVED_LEAD = 0.5, 0.25
MAX_SLIDING_COMPARISONS = 1 << 20  # for longer pairs of rows, only the beginnings and the ends are aligned

MakeRows = Callable[[Sequence[int], int], list[np.ndarray]]
"""Makes a batch of the rows ``ids (B,)`` under a seed, and returns its rows without marked padding."""


def check_order(make_rows: MakeRows, ids: Sequence[int], what: str) -> None:
    """Raise ValueError unless row j of a batch was made of its j-th example.

    Rows are made one by one, and in batches with the short ones first and with the long ones first: a function that
    sorts changes one of the two orders. Padding on either side and truncation do not count. A function that draws
    random numbers (masking) is judged by the tokens that it does not change.

    Args:
        make_rows: makes a batch of some rows.
        ids: rows to try, of different lengths where there are any.
        what: the name of the function, for messages.
    """
    one_by_one = ((i, make_rows([i], 0)[0]) for i in ids)
    alone = dict({row.tobytes(): (i, row) for i, row in one_by_one}.values())  # equal rows cannot show their order
    by_length = sorted(alone, key=lambda i: len(alone[i]))
    chosen = [by_length[k] for k in np.unique(np.linspace(0, len(alone) - 1, min(len(alone), TRIAL_ROWS)).astype(int))]
    if len(chosen) < 2:
        return
    for order in (chosen, chosen[::-1]):
        rows = make_rows(order, 0)
        is_random = not all(map(np.array_equal, rows, make_rows(order, 1)))
        for place, row in enumerate(rows):
            _check_place([agreement(row, alone[i]) for i in order], place, order, is_random, what)


def _check_place(found: list[tuple[float, int]], place: int, order: Sequence[int], is_random: bool, what: str) -> None:
    """Raise ValueError unless a row agrees best with its own example; ``found`` has its agreement with each."""
    own, own_tokens = found[place]
    best = max(range(len(found)), key=lambda k: (found[k][1], k == place))
    share, tokens = found[best]
    is_clear = share >= max(MOVED_SHARE, own + MOVED_LEAD) if is_random else share > own
    if is_clear and tokens > own_tokens:
        raise ValueError(
            f"{what} changes the order of the rows: of the examples {list(order)}, in this order, row {place} of the "
            f"batch holds example {order[best]}, not {order[place]}. Selection credits row j to the j-th example, so "
            "influence would go to the wrong ones: return the rows in the order of the examples (sort, if you must, "
            "inside the model)"
        )
    if not is_random and own < UNMIXED_SHARE:
        raise ValueError(
            f"{what} mixes rows: of the examples {list(order)}, row {place} of the batch holds {own:.0%} of the tokens "
            f"that example {order[place]} has in a batch by itself. Selection credits row j to the j-th example: "
            "return one row for each example, padded or cut, and nothing of the others in it"
        )


def agreement(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """Return the share and the number of tokens of the shorter of two rows that it has in common with the longer one.

    The rows are ``(S,)`` and ``(T,)``; the shorter one is shifted to where it fits best.
    """
    short, long = sorted((one, other), key=len)
    if not len(short):
        return 1.0, 0
    if len(short) * (len(long) - len(short) + 1) > MAX_SLIDING_COMPARISONS:
        equal = max(int((long[: len(short)] == short).sum()), int((long[-len(short) :] == short).sum()))
    else:
        windows = np.lib.stride_tricks.sliding_window_view(long, len(short))
        equal = int((windows == short).sum(axis=1).max())
    return equal / len(short), equal


def unpadded(batch: Mapping[str, ArrayLike]) -> list[np.ndarray]:
    """Return the rows of ``input_ids (B, T)``, without the tokens that an ``attention_mask (B, T)`` hides."""
    tokens = np.asarray(batch["input_ids"])
    mask = batch.get("attention_mask")
    if mask is None or np.shape(mask) != tokens.shape:
        return list(tokens)
    return [row[seen] for row, seen in zip(tokens, np.asarray(mask) != 0, strict=True)]


def without_fill(row: np.ndarray) -> np.ndarray:
    """Return ``row (T,)`` without padding: a token that is repeated at its beginning or its end."""
    if not len(row):
        return row
    other_than_last, other_than_first = np.flatnonzero(row != row[-1]), np.flatnonzero(row != row[0])
    if not len(other_than_last):
        return row[:1]
    end = int(other_than_last[-1]) + 2 if len(row) - other_than_last[-1] > 2 else len(row)
    start = int(other_than_first[0]) - 1 if other_than_first[0] > 1 else 0
    return row[start:end]
