"""Seconds and memory of making and clustering large pools of made-up text.

Every document is one line about one of 200 topics: words of the topic and words that all share. Each command runs as a
process of its own. ``seconds`` is processor time of it and its children, of which other work on the machine takes
nothing; ``peak`` is the largest resident memory of one of these processes, the pages of the mapped pool and vectors
among it that the system may take back at any time. ``pure`` is the share of blocks that have the commonest topic of
their cluster, in a sample of blocks.

    OMP_NUM_THREADS=1 python benchmarks/clusters.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from liveselect.datamodules.clusters.cluster import Clusters
from liveselect.datamodules.pools.tokens import TokenStore

TOPICS, TOPIC_WORDS, COMMON_WORDS, WORDS = 200, 40, 400, 24
PART = 10_000


def vocabulary(draws: np.random.Generator, words: int) -> list[str]:
    """Return distinct words of two to four syllables."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < words:
        found["".join(draws.choice(syllables, draws.integers(2, 5)))] = None
    return list(found)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """Yield ``count`` documents as JSON lines."""
    draws = np.random.default_rng(seed)
    words = np.array(vocabulary(draws, COMMON_WORDS + TOPICS * TOPIC_WORDS))
    for start in range(0, count, PART):
        rows = min(PART, count - start)
        topics = draws.integers(TOPICS, size=(rows, 1))
        own = COMMON_WORDS + topics * TOPIC_WORDS + draws.integers(TOPIC_WORDS, size=(rows, WORDS))
        which = np.where(draws.random((rows, WORDS)) < 0.5, own, draws.integers(COMMON_WORDS, size=(rows, WORDS)))
        for topic, line in zip(topics[:, 0].tolist(), words[which].tolist(), strict=True):
            yield json.dumps({"text": " ".join(line), "topic": topic}) + "\n"


def measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return seconds of its processors and of the wall clock, and its peak memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def purity(pool: Path) -> float:
    """Return the share of a sample of blocks that have the commonest topic of their cluster, 0..1."""
    store = TokenStore(pool)
    rows = np.sort(np.random.default_rng(0).choice(store.rows, min(40_000, store.rows), replace=False))
    clusters = Clusters(store).read("assignment")[rows]
    topics: dict[int, Counter[int]] = defaultdict(Counter)
    for row, cluster in zip(rows.tolist(), clusters.tolist(), strict=True):
        most = max(store.documents_of(row), key=lambda document: document["end"] - document["start"])
        topics[cluster][most["metadata"]["topic"]] += 1
    return sum(max(counts.values()) for counts in topics.values()) / len(rows)


def line(command: str, seconds: float, wall: float, peak: float) -> str:
    """Return what a command took, for the table."""
    return f"{command:>9} {seconds:>8.0f} {wall:>7.0f} {peak:>5.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, nargs="+", default=[1e5, 8.5e5])
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--embed", default="hashed")
    parser.add_argument("--folder", type=Path, help="where texts and pools are made (default: a temporary folder)")
    arguments = parser.parse_args()
    program = [sys.executable, "-c", "import sys, liveselect.cli; sys.exit(liveselect.cli.main())"]
    print(f"{'documents':>10} {'blocks':>10} {'command':>9} {'seconds':>8} {'wall':>7} {'peak':>8} {'pure':>7}")
    for count in arguments.documents:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            texts, pool = Path(folder) / "texts.jsonl", Path(folder) / "pool"
            with texts.open("w", encoding="utf-8") as file:
                file.writelines(documents(int(count)))
            options = ["--tokenizer", "bpe:4096", "--block-size", str(arguments.block_size), "--workers", "1"]
            spent = measured([*program, "prepare", str(texts), "--out", str(pool), *options])
            blocks = TokenStore(pool).rows
            sizes = f"{int(count):>10,} {blocks:>10,}"
            print(sizes, line("prepare", *spent), flush=True)
            options = ["--clusters", str(arguments.clusters), "--embed", arguments.embed]
            spent = measured([*program, "cluster", str(pool), *options])
            print(sizes, line("cluster", *spent), f"{purity(pool):>7.2f}", flush=True)


if __name__ == "__main__":
    main()
