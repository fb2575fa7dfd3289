"""Seconds and memory of gumbel_topk beside one numpy pass over the same scores.

Each line is one process. ``pass`` is ``scores.max()``, one reading of the same bytes. Seconds are processor time, of
which other work on the machine takes nothing, and the least of five calls. ``peak`` is what the process grew by, scores
included, in multiples of the scores' bytes (float32).

    OMP_NUM_THREADS=1 python benchmarks/gumbel.py
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from liveselect.functional.sampling import gumbel_topk

SIZES = (1_000_000, 10_000_000, 100_000_000)
SHARE = 0.2
TEMPERATURE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--one", type=int, help="measure this size in the present process")
    arguments = parser.parse_args()
    if arguments.one is not None:
        measure(arguments.one)
        return
    print(f"{'n':>11} {'k':>10} {'seconds':>9} {'pass':>9} {'ratio':>7} {'ns/score':>9} {'peak':>6}", flush=True)
    for size in arguments.sizes:
        subprocess.run([sys.executable, __file__, "--one", str(int(size))], check=True)


def measure(n: int) -> None:
    k = int(SHARE * n)
    gumbel_topk(torch.randn(200_000), 1000, TEMPERATURE, torch.Generator())  # loads everything that stays in memory
    before = peak_bytes()
    scores = torch.empty(n).normal_(generator=torch.Generator().manual_seed(0))
    drawn = fastest(lambda: gumbel_topk(scores, k, TEMPERATURE, torch.Generator().manual_seed(1)))
    peak = (peak_bytes() - before) / scores.nbytes
    one_pass = fastest(lambda: scores.numpy().max())
    speed = f"{drawn:>9.3f} {one_pass:>9.5f} {drawn / one_pass:>7.0f} {drawn / n * 1e9:>9.1f}"
    print(f"{n:>11,} {k:>10,} {speed} {peak:>6.2f}", flush=True)


def fastest(function: Callable[[], object], calls: int = 5) -> float:
    seconds = []
    for _ in range(calls):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the size of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
