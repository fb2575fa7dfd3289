"""Random numbers of a dataset: drawn under a seed, without a change to the generators of the process that trains.

A dataset that augments its rows draws from the global generators. Their state when a row is read depends on the number
of workers, on the rows that these read before, and on whether the run was resumed. So rows are read under seeds that
depend on their place only. Generators that a dataset keeps for itself, and those of accelerators, are out of reach.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np
import torch
from torch.utils.data import Subset

from liveselect.seeding import derive_seed

Seed = Callable[[int], None]

Collate = Callable[[list], object]
"""Makes a batch of rows."""


class MapStyle(Protocol):
    """A map-style dataset: rows of any kind, by their position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


@contextmanager
def private_draws() -> Iterator[Seed]:
    """Yield a function that seeds torch (CPU), numpy and random; restore their states at the end."""
    # a user's code draws from the global states, so these must be seeded
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield _seed_all
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the generators of accelerators
    np.random.seed(seed % 2**32)  # noqa: NPY002, TID251
    random.seed(seed)


def fetch(dataset: MapStyle, ids: Sequence[int], seeds: Sequence[int | None], seed: Seed) -> list:
    """Return the rows ``ids`` of a map-style dataset as a ``DataLoader`` would, each read under its own seed.

    A dataset with ``__getitems__`` reads all rows at once, under the seed of the first.

    Args:
        dataset: map-style.
        ids: ``(B,)`` positions.
        seeds: ``(B,)`` seeds; where one is None, the random states stay as they are.
        seed: the function that :func:`private_draws` yielded.
    """
    while type(dataset) is Subset:  # it has __getitems__ whether or not the dataset inside can read rows at once
        ids = [dataset.indices[i] for i in ids]
        dataset = cast("MapStyle", dataset.dataset)
    read_at_once: Callable[[list[int]], list] | None = getattr(dataset, "__getitems__", None)
    if read_at_once:
        if len(ids) and seeds[0] is not None:
            seed(seeds[0])
        return read_at_once(list(ids))
    rows = []
    for i, own in zip(ids, seeds, strict=True):
        if own is not None:
            seed(own)
        rows.append(dataset[i])
    return rows


def load_rows(
    dataset: MapStyle,
    collate_fn: Collate,
    ids: Sequence[int],
    seeds: Sequence[int | None],
    then: int | None = None,
) -> object:
    """Return the batch that a collate function makes of the rows ``ids (B,)``, each read under its of ``seeds (B,)``.

    The function draws under the seed ``then``; without it, from the states that the last row left.
    """
    with private_draws() as seed:
        rows = fetch(dataset, ids, seeds, seed)
        if isinstance(rows, list):  # a collate function may pop keys of a row, and data in memory would lose them
            rows = [dict(row) if type(row) is dict else row for row in rows]
        if then is not None:
            seed(then)
        return collate_fn(rows)


def candidate_seeds(ids: Sequence[int]) -> list[int]:
    """Return the seeds of rows ``(B,)`` that are read for other ends than training: the same at every call."""
    return [derive_seed(0, 0, f"look at row {i}") for i in ids]


def training_seeds(seed: int, round_index: int, start: int, count: int) -> list[int]:
    """Return the seeds of the rows at the places ``start .. start + count - 1`` of a round's plan."""
    return [derive_seed(seed, round_index, f"row {place} of the plan") for place in range(start, start + count)]
