"""Candidates per second, read by their position, from each format of token ids, beside the format's own reader.

The same random tokens are written in every format. Ours reads batches of random rows as a round does, ``candidates``;
its own reader walks the first rows one after the other. Formats whose libraries are not installed are left out.
``benchmarks/dataplane.py`` calls it.
"""

import importlib.util
import itertools
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from liveselect.datamodules import TokenFiles, write_store
from liveselect.datamodules.opening import open_source

BATCH = 64


class Format(NamedTuple):
    """A pool of one format, and its own reader."""

    name: str
    pool: object
    sequential: Callable[[], Iterable[object]]


def formats(folder: Path, rows: int, block_size: int) -> Iterator[Format]:
    """Write random tokens in every format that can be written here, and yield how to read them."""
    table = np.random.default_rng(0).integers(1, 50_000, (rows, block_size)).astype(np.uint16)
    store = write_store(folder / "prepared", table, block_size=block_size, vocab_size=50_000)
    yield Format("prepared pool", store, lambda: map(store.__getitem__, range(rows)))

    table.tofile(folder / "train.bin")
    stream = np.memmap(folder / "train.bin", np.uint16, "r")
    cuts = range(0, stream.size, block_size)
    yield Format(
        "nanoGPT .bin",
        TokenFiles(str(folder / "train.bin"), block_size),
        lambda: (torch.from_numpy(stream[cut : cut + block_size].astype(np.int64)) for cut in cuts),
    )

    (folder / "megatron.bin").write_bytes(table.tobytes())
    starts = (np.arange(rows) * 2 * block_size).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, rows, rows + 1)
    lengths, documents = np.full(rows, block_size, "<i4"), np.arange(rows + 1, dtype="<i8")
    (folder / "megatron.idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + documents.tobytes())
    ours = TokenFiles(str(folder / "megatron"), block_size)
    if _is_there("megatron"):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        indexed = IndexedDataset(str(folder / "megatron"))
        yield Format("Megatron .bin .idx", ours, lambda: map(indexed.__getitem__, range(rows)))
    if _is_there("datatrove"):
        from datatrove.utils.dataset import DatatroveFolderDataset

        (folder / "shards").mkdir()
        table.tofile(folder / "shards" / "000.ds")
        theirs = DatatroveFolderDataset(str(folder / "shards"), block_size - 1, filename_pattern="*.ds")
        walk = lambda: map(theirs.__getitem__, range(rows))  # noqa: E731
        yield Format("datatrove .ds", TokenFiles(str(folder / "shards"), block_size), walk)
        yield Format("datatrove's dataset", theirs, walk)
    if _is_there("litdata"):
        from litdata import StreamingDataset
        from litdata.streaming import Cache
        from litdata.streaming.item_loader import TokensLoader

        (folder / "chunks").mkdir()
        loader = TokensLoader(block_size=block_size)
        cache = Cache(str(folder / "chunks"), chunk_size=block_size * 1024, item_loader=loader)
        for number, row in enumerate(table):
            cache[number] = torch.from_numpy(row.astype(np.int32))
        cache.done()
        cache.merge()
        chunks = StreamingDataset(str(folder / "chunks"), item_loader=TokensLoader(block_size=block_size))
        yield Format("litdata chunks", chunks, lambda: iter(chunks))
    from datasets import Dataset

    arrow = Dataset.from_dict({"input_ids": list(table)})
    arrow.save_to_disk(str(folder / "arrow"))
    yield Format("datasets folder", str(folder / "arrow"), lambda: iter(arrow.with_format("numpy")))
    yield Format("rows of a tensor", torch.from_numpy(table.astype(np.int64)), lambda: iter(table))


def _is_there(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def measure_formats(folder: Path, rows: int, block_size: int, seconds: float) -> None:
    """Print the line of every format."""
    print(f"\nthousand rows of {block_size} tokens a second, {rows} rows in all")
    print(f"{'format':>20} {'by position':>12} {'own reader':>11} {'setup s':>8}")
    for each in formats(folder, rows, block_size):
        since = time.perf_counter()
        opened = open_source(each.pool, None)
        setup = time.perf_counter() - since
        ids = itertools.cycle(torch.randperm(rows, generator=torch.Generator().manual_seed(0)).split(BATCH))
        ours = _rate((len(opened.candidates(batch.tolist())["id"]) for batch in ids), seconds)
        theirs = _rate(
            (1 for _ in itertools.chain.from_iterable(each.sequential() for _ in itertools.count())), seconds
        )
        print(f"{each.name:>20} {ours / 1e3:>12.1f} {theirs / 1e3:>11.1f} {setup:>8.2f}", flush=True)


def _rate(counts: Iterator[int], seconds: float) -> float:
    """Return how many rows a second are read, for some seconds after the first batch."""
    next(counts)
    since, total = time.perf_counter(), 0
    for count in counts:
        total += count
        if (elapsed := time.perf_counter() - since) > seconds:
            break
    return total / elapsed
