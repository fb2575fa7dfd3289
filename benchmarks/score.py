"""Seconds and memory of ``liveselect score`` on pools of growing size.

The pools are random tokens; the proxy, the solve and the scorer (hashed ridge regression) are small and the same for
every size, so that what grows is what the pool makes grow. Each job runs as a process of its own. ``seconds`` is
processor time; ``memory`` is the largest resident memory without the pages of mapped files, which the system may take
back at any time, and ``mapped`` with them. ``per sequence`` is by how much the memory grew since the smallest pool, for
each sequence that the pool has more.

    OMP_NUM_THREADS=1 python benchmarks/score.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from liveselect.datamodules import write_store

VOCABULARY, PART = 2000, 100_000


def documents(sequences: int, block_size: int) -> list[np.ndarray]:
    """Return random tokens that make so many sequences."""
    draws = np.random.default_rng(0)
    sizes = [min(PART, sequences - start) for start in range(0, sequences, PART)]
    return [draws.integers(1, VOCABULARY, size * block_size - 1, dtype=np.uint16) for size in sizes]


def run_file(folder: Path, block_size: int) -> dict[str, Any]:
    """Return the configuration of a training run over the pool in a folder."""
    draws = np.random.default_rng(1)
    rows = [{"input_ids": draws.integers(1, VOCABULARY, block_size).tolist()} for _ in range(64)]
    (folder / "reference.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        "model": {
            "class_path": "liveselect.cli.model.CausalLM",
            "init_args": {"config": {"model_type": "gpt_neox", "vocab_size": VOCABULARY, **shape}},
        },
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(folder / "pool"),
                "reference": str(folder / "reference.jsonl"),
                "batch_size": 256,
            },
        },
    }


def resident(process: int) -> dict[str, int]:
    """Return bytes of resident memory of a process, by kind; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in ("VmRSS", "RssAnon") if kind in fields}


def measured(command: list[str]) -> tuple[float, int, int]:
    """Run a command; return its processor seconds, and its peak memory without and with mapped files, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks, ended = {"VmRSS": 0, "RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for kind, amount in resident(process.pid).items():
                peaks[kind] = max(peaks[kind], amount)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return usage.ru_utime + usage.ru_stime, peaks["RssAnon"], max(peaks["VmRSS"], usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=float, nargs="+", default=[2e5, 8e5, 3.2e6])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--probes", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where pools and scores are made (default: a temporary folder)")
    options = parser.parse_args()
    print(f"{'sequences':>10} {'seconds':>8} {'memory':>9} {'mapped':>9} {'per sequence':>14}")
    base: tuple[int, int] | None = None
    for count in map(int, options.sequences):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            texts = documents(count, options.block_size)
            write_store(folder / "pool", texts, block_size=options.block_size, vocab_size=VOCABULARY, eos_id=0)
            del texts
            (folder / "run.yaml").write_text(json.dumps(run_file(folder, options.block_size)))
            spent, memory, mapped = measured(
                [
                    *(sys.executable, "-c", "import sys, liveselect.cli; sys.exit(liveselect.cli.main())"),
                    *("score", f"--config={folder / 'run.yaml'}", f"--out={folder / 'scores'}", "--device=cpu"),
                    "--estimator=liveselect.influence.PMPInfluence",
                    *("--estimator.init_args.steps=4", "--estimator.init_args.score_every=2"),
                    *("--regressor=liveselect.regressors.HashedRidgeRegressor", f"--probes={options.probes}"),
                ]
            )
        base = base or (count, memory)
        grown = f"{(memory - base[1]) / (count - base[0]):.1f} B" if count > base[0] else "–"
        print(f"{count:>10,} {spent:>8.0f} {memory / 1e9:>6.2f} GB {mapped / 1e9:>6.2f} GB {grown:>14}", flush=True)


if __name__ == "__main__":
    main()
