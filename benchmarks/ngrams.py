"""Tokens per second and core of the scores that only count words: ngram-ratio, dsir and bm25.

Each method counts a pool of random tokens, scores it and writes the scores, as ``liveselect score --method`` does.
Seconds are processor time of one thread, of which other work on the machine takes nothing, and the least of three
calls. ``times bincount`` sets them beside ``numpy.bincount`` over the same tokens, which nothing that counts can beat.

    OMP_NUM_THREADS=1 python benchmarks/ngrams.py
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from gumbel import fastest

from liveselect.cli.score_method import MethodJob
from liveselect.cli.score_methods import build
from liveselect.datamodules import SelectionDataModule, write_store
from liveselect.grammar import Round

VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    # the commoner half of a vocabulary makes most of a text
    tokens = (draws.random((options.rows, options.width)) ** 3 * VOCABULARY).astype(np.uint16)
    millions = tokens.size / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder / "pool", list(tokens), block_size=options.width, vocab_size=VOCABULARY, eos_id=None)
        reference = [{"input_ids": tokens[0, :200].tolist()}]
        data = SelectionDataModule(str(store.path), reference, batch_size=8, overlap="allow")
        data.setup("fit")
        bare = fastest(lambda: np.bincount(tokens.ravel(), minlength=VOCABULARY), 3)
        print(f"{options.rows:,} rows of {options.width:,} tokens, one core")
        print(f"{'method':<14}{'M tokens/s':>12}{'times bincount':>16}")
        print(f"{'bincount':<14}{millions / bare:>12.1f}{1:>16.0f}")
        for method in ("ngram-ratio", "dsir", "bm25"):

            def score(method: str = method) -> None:
                all_rows = Round(index=0, step=0, seed=0, candidates=torch.arange(options.rows), source=data)
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    job = MethodJob(model=None, round=all_rows, method=build(method, {}, data), folder=Path(out) / "s")
                    job.run()

            seconds = fastest(score, 3)
            print(f"{method:<14}{millions / seconds:>12.1f}{seconds / bare:>16.0f}", flush=True)


if __name__ == "__main__":
    main()
