"""Kills live runs at random moments, resumes them, and compares what they trained on with runs that were left alone.

Every method, loader workers or none, one to three ranks, and other numbers of ranks after the kill. A run and all its
processes are ended at a moment drawn uniformly from the time that the uninterrupted run took, by SIGKILL, or by one of
the signals that ask a job to stop (SIGTERM, SIGINT) or to save and be requeued (SIGUSR1, whose handler here saves as
Lightning's for SLURM does); some are ended again while they resume. They write to the folder of temporary files, or to
another file system. With the same ranks the weights must be equal bit for bit as well; with others sums are rounded
otherwise, so runs compute in float64 and must train on the same candidates in the same order.

    python tests/kill_matrix.py --kills 120
    python tests/kill_matrix.py --kills 120 --signals KILL TERM INT USR1 --folder /dev/shm

Prints a line for each case and a table at the end; exits with 1 when a case differs.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from small_run import SmallLM, rows, small_trainer, weights_hash

from liveselect.callbacks import PDS, DataSelection, Quad
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

GLOBAL_BATCH, ACCUMULATE, STEPS, ROUND, POOL = 6, 2, 12, 4, 96
LONGEST = 120  # seconds after which a run is taken to hang
GRACE = 30.0  # seconds that a run has to end by itself
REQUEUED = 3
SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "TERM", "INT", "USR1")}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def regression() -> RegressionSelector:
    # without ranks and memory: other ranks round otherwise, which may swap two influences, and memory would keep it
    regressor = HashedRidgeRegressor(targets="standardized", forgetting=0.0, damping=1.0)
    return RegressionSelector(regressor, probes=12, ratio=0.5, min_spearman=None)


METHODS: dict[str, Callable[..., DataSelection]] = {
    "random": lambda **settings: DataSelection(UniformSelector(), **settings),
    "mates": lambda **settings: DataSelection(regression(), OneStepInfluence(step="in_batch"), **settings),
    "mates, spread": lambda **settings: DataSelection(
        regression(), OneStepInfluence(step="in_batch"), probes_between_steps=4, **settings
    ),
    "first order": lambda **settings: DataSelection(regression(), FirstOrderInfluence(), **settings),
    "quad": lambda **settings: Quad(pulls=3, at_once=1, probes=3, controls=4, arms=2, **settings),
    "pds": lambda **settings: PDS(torch.linspace(-2, 2, POOL).sin().numpy(), ratio=0.9, **settings),
}
RANKS = [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)]


@dataclass(frozen=True)
class Case:
    method: str
    workers: int
    ranks: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.workers} workers, {self.ranks[0]}->{self.ranks[1]} ranks"


class Trace(Callback):
    """Appends every batch's place in the plan, its ids and the weights after it to a file that survives a kill."""

    def __init__(self, folder: Path, selection: DataSelection) -> None:
        self.folder, self.selection = folder, selection

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        plan = self.selection.plan  # this callback comes first: the cursor still stands before the batch
        line = [plan.round, plan.cursor, trainer.global_rank, batch["id"].tolist(), weights_hash(pl_module)]
        descriptor = os.open(self.folder / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)


def train(folder: Path, case: Case, ranks: int) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "liveselect"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    pl.seed_everything(1, verbose=False)
    selection = METHODS[case.method](every_n_steps=ROUND, warmup_rounds=1, dirpath=folder / "selection")
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True)
    grouped = [{**row, "source": f"source {i % 4}"} for i, row in enumerate(rows(POOL, seed=1))]
    data = SelectionDataModule(
        pool=grouped,
        groups="source",
        reference=rows(6, seed=2),
        batch_size=GLOBAL_BATCH // ranks,
        num_workers=case.workers,
        probe_batch_size=4,
    )
    settings = {
        "accumulate_grad_batches": ACCUMULATE,
        "precision": "32-true",
        "max_steps": STEPS,
        "val_check_interval": 4,
        "devices": ranks,
    }
    if ranks > 1:
        settings["strategy"] = DDPStrategy(process_group_backend="gloo", start_method="fork")
    elastic = case.ranks[0] != case.ranks[1]  # ranks draw their own dropout
    trainer = small_trainer(folder, [Trace(folder, selection), selection, keep], **settings)
    requeue_by(trainer, folder)
    # not precision="64-true": Lightning loads a checkpoint before it converts the module, which rounds the weights
    trainer.fit(SmallLM(dropout=0.0 if elastic else 0.1).double(), datamodule=data, ckpt_path="last")


def requeue_by(trainer: pl.Trainer, folder: Path) -> None:
    """Let SIGUSR1 save at once and end the run, as a job that is requeued does."""

    def save(number: int, frame: object) -> None:
        if trainer.training and trainer.fit_loop.epoch_loop.global_step:
            trainer.save_checkpoint(folder / "checkpoints" / "last-1.ckpt")
        os._exit(REQUEUED)

    signal.signal(signal.SIGUSR1, save)


def run(
    function: Callable[..., None], *arguments: object, kill_after: float | None = None, by: int = signal.SIGKILL
) -> tuple[int, float]:
    """Run in a forked child and end it and its children after so many seconds; returns its exit status and time.

    What does not end by a signal within :data:`GRACE` seconds is killed, as a cluster does.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            function(*arguments)
            code = 0
        except BaseException as error:
            sys.stderr.write("".join(traceback.format_exception_only(error))[-600:])
            code = 1
        os._exit(code)
    deadline = began + (LONGEST if kill_after is None else kill_after)
    if by != signal.SIGKILL and kill_after is not None:
        return _asked_to_stop(child, began, deadline, by)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):  # it has not become the leader of its group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, time.monotonic() - began
        time.sleep(0.002)


def _asked_to_stop(child: int, began: float, moment: float, by: int) -> tuple[int, float]:
    """Send the signal to the process alone at the moment, and kill what does not end."""
    asked = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # its loader workers
            code = os.waitstatus_to_exitcode(status)
            return (-signal.SIGKILL if asked and code != 0 else code), time.monotonic() - began
        now = time.monotonic()
        if now >= moment and not asked:
            asked = True
            os.kill(child, by)
        if now >= moment + GRACE:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, now - began
        time.sleep(0.002)


def batches(folder: Path) -> dict[tuple[int, int], tuple[list[int], set[str]]]:
    """Return the global batch at every place of the plans, its ids in order, and the weights after it.

    Raises:
        ValueError: a place was trained on twice with other candidates or other weights.
    """
    parts: dict[tuple[int, int], dict[tuple[int, int], tuple[list[int], str]]] = {}
    path = folder / "trace"
    for line in path.read_text().splitlines() if path.exists() else ():
        if not line.endswith("]"):
            continue  # the kill fell into the write
        round_index, cursor, rank, ids, weights = json.loads(line)
        parts.setdefault((round_index, cursor), {}).setdefault((rank, len(ids)), (ids, weights))
        if parts[round_index, cursor][rank, len(ids)][0] != ids:
            raise ValueError(f"round {round_index}, candidate {cursor}: trained on {ids} and on other candidates")
    found = {}
    for place, seen in parts.items():
        for size in {length for _, length in seen}:
            ranks = sorted(rank for rank, length in seen if length == size)
            if len(ranks) * size != GLOBAL_BATCH:
                continue  # the kill fell between the ranks; the resumed run trains the whole batch
            ids = [i for rank in ranks for i in seen[rank, size][0]]
            weights = {seen[rank, size][1] for rank in ranks}
            if place in found and found[place][0] != ids:
                raise ValueError(f"{place}: {found[place][0]} on some ranks, {ids} on others")
            found[place] = (ids, weights)
    return found


def attempt(
    case: Case, folder: Path, whole: Path, seconds: float, draw: random.Random, signals: list[int]
) -> tuple[int, str]:
    """Kill a run of the case, resume it to its end, and compare; returns the kills and what differs."""
    folder.mkdir(parents=True)
    kills = 0
    ranks = case.ranks[0]
    while True:
        again = kills == 0 or draw.random() < 0.3
        by = draw.choice(signals) if ranks == 1 else signal.SIGKILL  # how ranks stop is tested apart
        moment = draw.uniform(0, seconds) if again else None
        code, _ = run(train, folder, case, ranks, kill_after=moment, by=by)
        if code == 0:
            break
        if code != -signal.SIGKILL or not again:
            return kills, f"the resumed run ended with {code}"
        kills += 1
        ranks = case.ranks[1]
    try:
        expected, found = batches(whole), batches(folder)
    except ValueError as error:
        return kills, str(error)
    if set(expected) != set(found):
        return kills, f"{len(set(expected) ^ set(found))} batches are lost or too many"
    for place, (ids, weights) in expected.items():
        if found[place][0] != ids:
            return kills, f"batch {place} differs"
        if case.ranks[0] == case.ranks[1] and found[place][1] != weights:
            return kills, f"the weights after batch {place} differ"
    return kills, ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="stop after so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", nargs="+", default=[f"{a}{b}" for a, b in RANKS], help="such as 11 22 21")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=["KILL"])
    parser.add_argument("--folder", type=Path, help="where the runs write, such as /dev/shm (default: temporary files)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    ranks = [(int(pair[0]), int(pair[1])) for pair in options.ranks]
    cases = [Case(*each) for each in itertools.product(options.methods, options.workers, ranks)]
    draw.shuffle(cases)
    kills, failures, left_alone = dict.fromkeys(cases, 0), [], {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, dir=options.folder) as name:
        for index, case in enumerate(itertools.cycle(cases)):
            if sum(kills.values()) >= options.kills:
                break
            elastic = case.ranks[0] != case.ranks[1]
            key = f"{case.method}-{case.workers}-{case.ranks[0]}-{elastic}"
            whole = Path(name) / "whole" / hashlib.sha256(key.encode()).hexdigest()[:12]
            if whole not in left_alone:
                whole.mkdir(parents=True)
                code, left_alone[whole] = run(train, whole, case, case.ranks[0])
                if code != 0:
                    failures.append(f"{case.name}: the uninterrupted run ended with {code}")
                    say(failures[-1])
            number, trouble = attempt(
                case,
                Path(name) / str(index),
                whole,
                left_alone[whole],
                draw,
                [SIGNALS[each] for each in options.signals],
            )
            kills[case] += number
            say(f"{sum(kills.values()):4d} kills  {case.name}: {trouble or 'equal'}")
            if trouble:
                failures.append(f"{case.name}: {trouble}")
    say("\n| method | " + " | ".join(f"{a}->{b} ranks" for a, b in ranks) + " |")
    say("| --- |" + " --- |" * len(ranks))
    for method in options.methods:
        row = [sum(kills[each] for each in cases if (each.method, each.ranks) == (method, pair)) for pair in ranks]
        say(f"| {method} | " + " | ".join(map(str, row)) + " |")
    say(f"\n{sum(kills.values())} kills, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
