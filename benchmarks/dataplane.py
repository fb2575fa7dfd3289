"""Tokens per second of PlanLoader beside a plain DataLoader, and the wait between a finished round and its first batch.

Loaders that are compared walk the same rows of the same prepared pool in turn, in one process, with live workers, each
from asking for the first batch to having the last. What is printed are medians over the turns, and the median of the
ratios of neighbouring turns, which other work on the machine disturbs least.

- ``PlanLoader``: as SelectionDataModule serves it: ``id``, ``input_ids``, ``labels``.
- ``same reading``: a ``DataLoader`` with a shuffling sampler over the same rows, which reads a batch at once and makes
  the same three tensors; in workers, it hands these over as tensors.
- ``row by row``: a ``DataLoader(TokenStore, shuffle=True)`` with the default collate function, as one writes it by
  hand; its batches have no labels.

Before them stand the rows per second of every format that a pool may have, read by position (``formats.py``).

    python benchmarks/dataplane.py
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import measure_formats
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from liveselect.datamodules.batching import Item
from liveselect.datamodules.loader import PlanLoader
from liveselect.datamodules.overlap import shared_passages
from liveselect.datamodules.pools.tokens import TokenStore, write_store
from liveselect.datamodules.rows.rows import StoreRows
from liveselect.plan import Plan

SHAPES = [(256, 16), (256, 64), (1024, 8), (1024, 64), (2048, 16)]  # tokens of a block, rows of a batch
VOCABULARY = 50_000


def make_store(folder: Path, tokens: int, block_size: int) -> TokenStore:
    """Write a pool of random tokens."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, VOCABULARY, (tokens // block_size, block_size), dtype=np.int64)
    return write_store(folder / str(block_size), blocks, block_size=block_size, vocab_size=VOCABULARY)


class PlanTurns:
    """Walks one plan after another with one PlanLoader."""

    def __init__(self, rows: StoreRows, batch_size: int, workers: int, steps: int) -> None:
        self.size, self.count, self.round = len(rows), steps * batch_size, 0
        self.loader = PlanLoader(rows, batch_size, steps, options={"num_workers": workers})

    def publish(self) -> None:
        """Follow a new plan of random rows."""
        generator = torch.Generator().manual_seed(self.round)
        self.loader.follow(Plan(self.round, torch.randperm(self.size, generator=generator)[: self.count]))
        self.round += 1

    def batches(self) -> Iterator[Any]:
        """Publish a plan and iterate over it."""
        self.publish()
        return iter(self.loader)


class WholeBatches(Dataset):
    """The rows of a store, a batch at a time, as tensors."""

    def __init__(self, rows: StoreRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, ids: list[int]) -> dict[str, torch.Tensor]:
        return self.rows.candidates(ids)


def plain_loader(rows: StoreRows, batch_size: int, workers: int, steps: int) -> Callable[[], Iterator[Any]]:
    """Return how to iterate over a DataLoader with the same reading."""
    sampler = BatchSampler(RandomSampler(rows, num_samples=steps * batch_size), batch_size, drop_last=True)
    loader = DataLoader(
        WholeBatches(rows),
        batch_sampler=sampler,
        collate_fn=lambda batch: batch,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)


def row_loader(store: TokenStore, batch_size: int, workers: int, steps: int) -> Callable[[], Iterator[Any]]:
    """Return how to iterate over a DataLoader as one writes it."""
    sampler = RandomSampler(store, num_samples=steps * batch_size)
    loader = DataLoader(store, batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    return lambda: iter(loader)


def walk(begin: Callable[[], Iterator[Any]]) -> float:
    """Return the seconds from the beginning of an iteration to its last batch."""
    since = time.perf_counter()
    for batch in begin():
        batch["input_ids"][0, 0].item()
    return time.perf_counter() - since


def compare_loaders(store: TokenStore, batch_size: int, workers: int, options: argparse.Namespace) -> None:
    """Let the loaders take turns and print their line."""
    steps = max(4, options.tokens_per_turn // (batch_size * store.block_size))
    rows = StoreRows(store)
    begin = {
        "plan": PlanTurns(rows, batch_size, workers, steps).batches,
        "same": plain_loader(rows, batch_size, workers, steps),
        "rows": row_loader(store, batch_size, workers, steps),
    }
    for one in begin.values():
        walk(one)  # starts the workers and fills the page cache
    seconds: dict[str, list[float]] = {name: [] for name in begin}
    for turn in range(options.turns):
        names = list(begin) if turn % 2 else list(begin)[::-1]
        for name in names:
            seconds[name].append(walk(begin[name]))
    tokens = steps * batch_size * store.block_size
    speed = {name: tokens / statistics.median(times) / 1e6 for name, times in seconds.items()}
    ratio = {
        other: statistics.median(b / a for a, b in zip(seconds["plan"], seconds[other], strict=True))
        for other in ("same", "rows")
    }
    print(
        f"{store.block_size:>6} {batch_size:>5} {workers:>7} {speed['plan']:>11.1f} {speed['same']:>13.1f} "
        f"{speed['rows']:>11.1f} {ratio['same']:>13.2f} {ratio['rows']:>11.2f}"
    )


def measure_swaps(store: TokenStore, batch_size: int, workers: int, options: argparse.Namespace) -> None:
    """Print the time from a published plan to its first batch, after a whole plan and in the middle of one."""
    turns = PlanTurns(StoreRows(store), batch_size, workers, steps=16)
    waits: dict[str, list[float]] = {"walked": [], "replaced": [], "next": [], "fresh": []}
    for turn in range(options.swaps + 1):
        kind = "walked" if turn % 2 else "replaced"
        batches = turns.batches()
        for _ in range(16 if kind == "walked" else 5):
            next(batches)
        since = time.perf_counter()
        batches = turns.batches()
        next(batches)
        first = time.perf_counter()
        next(batches)
        if turn:
            waits[kind].append(first - since)
            waits["next"].append(time.perf_counter() - first)
    for _ in range(max(3, options.swaps // 4)):
        since = time.perf_counter()
        next(PlanTurns(StoreRows(store), batch_size, workers, steps=16).batches())
        waits["fresh"].append(time.perf_counter() - since)
    medians = {kind: 1e3 * statistics.median(times) for kind, times in waits.items()}
    print(
        f"{store.block_size:>6} {batch_size:>5} {workers:>7} {medians['walked']:>16.1f} {medians['replaced']:>18.1f} "
        f"{medians['next']:>14.1f} {medians['fresh']:>16.1f}"
    )


def measure_overlap(store: TokenStore) -> None:
    """Print the speed of the search for reference passages."""
    rng = np.random.default_rng(1)
    items = [Item(tokens, tokens, i) for i, tokens in enumerate(rng.integers(0, VOCABULARY, (1024, 90)))]
    since = time.perf_counter()
    found = shared_passages(StoreRows(store), items)
    seconds = time.perf_counter() - since
    tokens = len(store) * store.block_size
    print(
        f"\nsearch for {len(items)} reference passages: {tokens / seconds / 1e6:.0f} M tokens/s ({len(found)} found in "
        f"{tokens / 1e6:.0f} M tokens)"
    )


def measure_gumbel() -> None:
    """Run the benchmark of Gumbel-top-k in a process of its own: it measures peak memory."""
    print("\nGumbel-top-k", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name("gumbel.py")], check=True)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of each pool (default: %(default)s)")
    parser.add_argument("--tokens-per-turn", type=int, default=2_000_000, help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--swaps", type=int, default=40, help="plans to change (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="default: %(default)s")
    parser.add_argument("--formats-only", action="store_true", help="only rows per second of each format")
    parser.add_argument("--format-rows", type=int, default=20_000, help="rows of each format (default: %(default)s)")
    parser.add_argument("--skip-gumbel", action="store_true", help="leave out Gumbel-top-k")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure_formats(Path(folder), options.format_rows, 512, seconds=2.0)
        if options.formats_only:
            return
        stores = {size: make_store(Path(folder), options.tokens, size) for size in {block for block, _ in SHAPES}}
        print("million tokens per second; ratio: PlanLoader over the other loader, larger is better")
        print(
            f"{'block':>6} {'batch':>5} {'workers':>7} {'PlanLoader':>11} {'same reading':>13} {'row by row':>11} "
            f"{'ratio to same':>13} {'to row by':>11}"
        )
        for block_size, batch_size in SHAPES:
            for workers in options.workers:
                compare_loaders(stores[block_size], batch_size, workers, options)
        print("\nmilliseconds from a published plan to its first batch")
        print(
            f"{'block':>6} {'batch':>5} {'workers':>7} {'after a walk':>16} {'in mid-walk':>18} {'later batches':>14} "
            f"{'a fresh loader':>16}"
        )
        for workers in options.workers:
            measure_swaps(stores[1024], 8, workers, options)
        measure_overlap(stores[1024])
    if not options.skip_gumbel:
        measure_gumbel()


if __name__ == "__main__":
    main()
