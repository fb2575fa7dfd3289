"""How fast the records of a run grow, and what writing them takes.

1. Decisions (Parquet) of one round of a million choices: compared by scores with noise, and drawn uniformly.
2. The ledger (JSON lines): bytes of a round, and seconds of adding one when there are many.

    python benchmarks/ledger.py [--choices 1000000] [--ratio 0.2] [--rounds 10000]
"""

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from liveselect.decisions import DecisionLedger, RoundDecisions
from liveselect.functional.sampling import Noise, gumbel_topk
from liveselect.grammar import Selection
from liveselect.ledger import Example, Histogram, Ledger, RoundRecord
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

SEED = 0


def record_of(index: int, chosen: int) -> RoundRecord:
    """Return a round as MATES or Quad records it: 500 probes, 24 groups, 12 texts."""
    generator = torch.Generator().manual_seed(index)
    scores = torch.randn(1000, generator=generator)
    return RoundRecord(
        round=index,
        step=1000 * index,
        selector="RegressionSelector",
        candidates=5 * chosen,
        chosen=chosen,
        plan="0" * 32,
        measured=torch.randint(10**7, (500,), generator=generator).tolist(),
        influence=torch.randn(500, generator=generator).tolist(),
        groups={f"group {i}": {"available": 1000.0, "measured": 20.0, "chosen": 40.0} for i in range(24)},
        histogram=Histogram.of(scores, scores > 1),
        examples=[Example(i, "group 1", 0.5, i < 6, "some text " * 60) for i in range(12)],
        metrics={f"metric {i}": 0.123456789 for i in range(12)},
        seconds={f"phase {i}": 1.23456789 for i in range(12)},
        flops={f"phase {i}": 1e15 for i in range(6)},
    )


def decisions(choices: int, ratio: float) -> None:
    compared = int(choices / ratio)
    pool = CandidatePool(2 * compared, "benchmark")
    generator = torch.Generator().manual_seed(SEED)
    scored = torch.randperm(pool.size, generator=generator)[:compared]
    scores = torch.randn(compared, generator=generator)
    noise = Noise(0.5, torch.Generator().manual_seed(1))
    drawn = scored[gumbel_topk(scores, choices, 0.5, torch.Generator().manual_seed(1))]
    ids = drawn[torch.randperm(choices, generator=generator)]
    none = torch.empty(0)
    print(f"| {choices:,} choices | MB | bytes a row | seconds |\n| --- | --- | --- | --- |")
    for name, selection, rows in (
        (f"of {compared:,} compared, with noise", Selection(ids, scored, scores, noise=noise), compared),
        ("drawn uniformly", Selection(ids, reasons={"drawn uniformly": ids}), choices),
    ):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            path = DecisionLedger(folder).write(
                RoundDecisions(record_of(0, choices), pool, selection, Plan(0, ids), none.long(), none)
            )
            seconds = time.perf_counter() - began
            size = path.stat().st_size
        print(f"| {name} | {size / 1e6:.1f} | {size / rows:.1f} | {seconds:.1f} |", flush=True)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB\n")


def ledger(rounds: int) -> None:
    print("| rounds so far | ledger, MB | seconds to add one | seconds to write it whole |\n| --- | --- | --- | --- |")
    book = Ledger(rounds=[record_of(0, 1000)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        for many in (10, rounds // 10, rounds):
            first = book.rounds[0]
            book.rounds += [replace(first, round=index) for index in range(len(book.rounds), many)]
            began = time.perf_counter()
            Ledger(rounds=book.rounds).write(path)
            whole = time.perf_counter() - began
            book.write(path)  # the file was another ledger's
            book.rounds.append(replace(first, round=many))
            began = time.perf_counter()
            book.write(path)
            added = time.perf_counter() - began
            print(f"| {many:,} | {path.stat().st_size / 1e6:.1f} | {added:.4f} | {whole:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=int, default=1_000_000)
    parser.add_argument("--ratio", type=float, default=0.2, help="chosen share of the compared")
    parser.add_argument("--rounds", type=int, default=10_000)
    arguments = parser.parse_args()
    decisions(arguments.choices, arguments.ratio)
    ledger(arguments.rounds)


if __name__ == "__main__":
    main()
