"""Random numbers of a dataset: drawn as a seed says, and without the process that trains noticing.

A dataset that augments its rows draws from the global generators. What these hold when a row is read depends on how
many workers there are, on what they read before, and on whether the run was resumed. So rows are read under seeds that
depend on their place only. Generators that a dataset keeps for itself, and those of accelerators, are out of reach.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from liveselect.seeding import derive_seed

Seed = Callable[[int], None]


@contextmanager
def private_draws() -> Iterator[Seed]:
    """Yield a function that seeds torch (CPU), numpy and random; at the end they are as they were before."""
    # the draws of a user's code come from the global states, so these are what has to be seeded
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


def fetch(
    dataset: Any, ids: Sequence[int], seeds: Sequence[int | None] | None = None, seed: Seed | None = None
) -> list:
    """Return the rows ``ids`` of a map-style dataset as a ``DataLoader`` would, each read under its own seed.

    A dataset with ``__getitems__`` reads all rows at once, under the seed of the first.

    Args:
        dataset: map-style.
        ids: ``(B,)`` positions.
        seeds: ``(B,)`` seeds; None reads on with the state that is there.
        seed: what :func:`private_draws` yielded, needed with ``seeds``.
    """
    while type(dataset) is Subset:  # it has __getitems__ whether or not the dataset inside can read rows at once
        dataset, ids = dataset.dataset, [dataset.indices[i] for i in ids]
    seeds = [None] * len(ids) if seeds is None else seeds
    if getattr(dataset, "__getitems__", None):
        if seed is not None and len(ids) and seeds[0] is not None:
            seed(seeds[0])
        return dataset.__getitems__(list(ids))
    rows = []
    for i, own in zip(ids, seeds, strict=True):
        if seed is not None and own is not None:
            seed(own)
        rows.append(dataset[i])
    return rows


def load_rows(
    dataset: Any,
    collate_fn: Callable[[Any], Any],
    ids: Sequence[int],
    seeds: Sequence[int | None],
    then: int | None = None,
) -> Any:
    """Return what a collate function makes of the rows ``ids (B,)``, each read under its own of ``seeds (B,)``.

    The function draws under the seed ``then``, or goes on where the last row stopped.
    """
    with private_draws() as seed:
        rows = fetch(dataset, ids, seeds, seed)
        if isinstance(
            rows, list
        ):  # a collate function may pop keys of what it is given, and data in memory would lose them
            rows = [dict(row) if type(row) is dict else row for row in rows]
        if then is not None:
            seed(then)
        return collate_fn(rows)


def candidate_seeds(ids: Sequence[int]) -> list[int]:
    """Return the seed of each row that is looked at, and not trained on: ``(B,)``, the same whenever it is."""
    return [derive_seed(0, 0, f"look at row {i}") for i in ids]


def training_seeds(seed: int, round_index: int, start: int, count: int) -> list[int]:
    """Return the seeds of the rows at the places ``start .. start + count - 1`` of a round's plan."""
    return [derive_seed(seed, round_index, f"row {place} of the plan") for place in range(start, start + count)]
