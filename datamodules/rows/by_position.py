"""Datasets that call themselves streams and can be asked for a row by its position."""

import copy
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset

from liveselect.datamodules.rows.draws import MapStyle

LITDATA, MDS = "litdata.", "streaming."


def is_readable_by_position(dataset: object) -> bool:
    """Return whether a dataset has a length and a ``__getitem__`` of its own, whatever it calls itself."""
    kind = type(dataset)
    # torch's Dataset defines a __getitem__ that only raises, and iterable datasets inherit it
    own = getattr(kind, "__getitem__", None) not in (None, Dataset.__getitem__, IterableDataset.__getitem__)
    return own and hasattr(kind, "__len__")


class ByPosition(Dataset):
    """A dataset that is read as a stream elsewhere: all its rows, in the order in which they are stored.

    What it does to a stream is left out: shuffling, and the share of a rank. The rows of litdata's and MosaicML's
    ``StreamingDataset`` are counted over all ranks, whose length is that of one rank's share.

    Args:
        dataset: has a length and a ``__getitem__`` that takes a position.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset
        self._size = _rows_of_all_ranks(dataset)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> object:
        return cast("MapStyle", self.dataset)[int(index)]


def _rows_of_all_ranks(dataset: Any) -> int:
    home = type(dataset).__module__ + "."
    if home.startswith(MDS):
        return int(dataset.size)
    if home.startswith(LITDATA):
        alone = copy.copy(dataset)  # what it counts for itself is kept out of the user's
        environment = copy.copy(dataset.distributed_env)
        environment.world_size, environment.global_rank, environment.num_nodes = 1, 0, 1
        alone.distributed_env, alone.shuffler, alone.cache, alone.drop_last = environment, None, None, False
        return int(alone.get_len(1, 1))
    return len(dataset)
