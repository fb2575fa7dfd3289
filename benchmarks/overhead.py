"""What selection does to the steps of a training, and what watching it costs.

1. What the recommended default, LiveSelection as it comes, takes of a run, for rounds of several lengths: by how much
   its steps take longer than those steps of the same run after which nothing is measured, and its longest step beside
   that of a run without selection. Seconds are processor time, of which other work on the machine takes nothing; on a
   GPU they are those of the clock. Each run is one process. That of the default has a round that the prior draws and
   two that are measured, from a prepared pool. What is done once, before the first step, is printed apart.
2. Step times and peak memory with selection off, in one pause between rounds, spread over the steps, and within a share
   of the time. Each way trains in a process of its own, one after the other.
3. Decisions, alarms and SelectionMonitor (W&B offline, TensorBoard, CSV), each as a share of the training time of one
   run. A round every few steps is the worst case for watching: rounds are as short as Quad's, and steps far shorter
   than those of a model worth watching.
4. The governor: selection's share of the time over a long run of each method, beside what max_overhead was set to, and
   the longest step beside the median one.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --tables default [--short]
    python benchmarks/overhead.py --tables steps watching [--steps 200] [--every 20]
    python benchmarks/overhead.py --size 160m --accelerator gpu --precision bf16-mixed --tables steps
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from liveselect.callbacks import MATES, DataSelection, LiveSelection, SelectionMonitor
from liveselect.cli.model import CausalLM
from liveselect.datamodules import SelectionDataModule, write_store
from liveselect.influence import FirstOrderInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

# hidden size, layers, vocabulary, tokens of an example: the larger ones are Pythia's
SIZES = {
    "1m": (128, 2, 4096, 128),
    "5m": (256, 4, 4096, 128),
    "160m": (768, 12, 50304, 1024),
    "410m": (1024, 24, 50304, 1024),
}
LENGTHS, SHORT_LENGTHS = (50, 100, 200), (20, 40)
"""Steps of a round of the default."""
KINDS = 8
"""Of text in the pool, each with tokens of its own; the reference set is of one."""

WAYS: dict[str, dict[str, Any]] = {
    "off": {},
    "one pause": {},
    "spread": {"probes_between_steps": 0},  # as many as fill the round
    "max_overhead=0.05": {"max_overhead": 0.05},
}


class TimedMonitor(SelectionMonitor):
    """A monitor that adds up the seconds inside of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        for hook in ("on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end"):
            setattr(self, hook, self._timed(hook, getattr(self, hook)))

    def _timed(self, hook: str, function: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> None:
            started = time.perf_counter()
            function(*arguments, **keywords)
            self.seconds[hook] += time.perf_counter() - started

        return timed


class Clock(pl.Callback):
    """Notes when each optimizer step begins; the time to the next one is what a step takes, selection included."""

    def __init__(self, of_process: bool = False, stops_after: int | None = None) -> None:
        self.begun: list[float] = []
        self.started = 0.0
        self._stops_after = stops_after
        self._now = time.process_time if of_process else time.perf_counter

    def on_fit_start(self, *rest: Any) -> None:
        self.started = self._now()

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.begun.append(self._now())
        trainer.should_stop = trainer.should_stop or len(self.begun) == self._stops_after

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [later - earlier for earlier, later in itertools.pairwise(self.begun)]


def rows(arguments: argparse.Namespace, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, arguments.tokens)
    return [{"input_ids": row} for row in torch.randint(0, SIZES[arguments.size][2], shape, generator=generator)]


def network(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration of the model."""
    hidden, layers, vocabulary, _ = SIZES[arguments.size]
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": arguments.tokens,
    }


def trainer_of(
    arguments: argparse.Namespace, folder: Path, callbacks: list[pl.Callback], **settings: Any
) -> pl.Trainer:
    return pl.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        precision=arguments.precision,
        max_steps=arguments.steps,
        max_epochs=-1,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )


def selector(arguments: argparse.Namespace) -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(), probes=arguments.probes, ratio=0.2, min_spearman=None)


def data_of(arguments: argparse.Namespace) -> SelectionDataModule:
    return SelectionDataModule(
        pool=rows(arguments, arguments.steps * arguments.batch * 6, 1),
        reference=rows(arguments, 16, 2),
        batch_size=arguments.batch,
    )


def train_one_way(arguments: argparse.Namespace, way: str) -> None:
    """Train and print the step times of the rounds that measure, and the peak of memory, as a line of JSON."""
    clock = Clock()
    pace = dict(WAYS[way])
    if "probes_between_steps" in pace:
        pace["probes_between_steps"] = -(-arguments.probes // (arguments.every - 1))
    with tempfile.TemporaryDirectory() as name:
        chooser, estimator = (UniformSelector(), None) if way == "off" else (selector(arguments), FirstOrderInfluence())
        selection = DataSelection(chooser, estimator, every_n_steps=arguments.every, dirpath=name, **pace)
        trainer = trainer_of(arguments, Path(name), [clock, selection], logger=False)
        module = CausalLM(network(arguments))
        trainer.fit(module, datamodule=data_of(arguments))
    if arguments.accelerator == "gpu":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds = selection.run.ledger.rounds[1:]
    found = {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "seconds": clock.seconds[arguments.every :],  # the warm-up round measures nothing
        "peak": peak,
        "measured": sum(record.metrics.get("measured", 0.0) for record in rounds) / max(1, len(rounds)),
        "age": max((record.metrics.get("staleness/max", 0.0) for record in rounds), default=0.0),
    }
    print(json.dumps(found))


def compare_ways(arguments: argparse.Namespace) -> None:
    """Print what each way of measuring does to the steps."""
    print(
        "\n| selection | median step | mean step | longest | mean / off | peak memory | probes a round | oldest probe |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    off = None
    for way in WAYS:
        found = run_again("--way", way, "--tables", "steps")
        seconds = found["seconds"]
        mean = statistics.fmean(seconds)
        off = off or mean
        times = [1000 * statistics.median(seconds), 1000 * mean, 1000 * max(seconds)]
        cells = [f"{each:.0f} ms" for each in times] + [f"{mean / off:.2f}", f"{found['peak'] / 2**20:.0f} MiB"]
        print("|", " | ".join([way, *cells, f"{found['measured']:.0f}", f"{found['age']:.0f} steps"]), "|")
    size, steps = f"{found['parameters'] / 1e6:.1f}M parameters", f"{arguments.steps} steps"
    print(f"\n{size}, batches of {arguments.batch} x {arguments.tokens} tokens, {arguments.precision}, {steps}")


def rows_of_kinds(arguments: argparse.Namespace, count: int, seed: int, kinds: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of which each ``kinds``-th has the same range of tokens, so that influence can be predicted."""
    span = SIZES[arguments.size][2] // KINDS
    made = rows(arguments, count, seed)
    return [{"input_ids": row["input_ids"] % span + span * (i % kinds)} for i, row in enumerate(made)]


def train_with_default(arguments: argparse.Namespace) -> None:
    """Train with the default, or without selection, and print what it took as a line of JSON."""
    steps = 2 + (
        min(50, arguments.every) if arguments.way == "off" else 2 * arguments.every
    )  # the first and last are not timed
    clock = Clock(arguments.accelerator == "cpu", steps)
    arguments.steps = 3 * arguments.every  # a shorter last round would measure less
    pool = rows_of_kinds(arguments, 5 * arguments.steps * arguments.batch, 1, KINDS)
    with tempfile.TemporaryDirectory() as name:
        documents = [row["input_ids"].numpy() for row in pool]
        shape = {"block_size": arguments.tokens, "vocab_size": SIZES[arguments.size][2]}
        store = write_store(Path(name) / "pool", documents, eos_id=None, **shape)
        data = SelectionDataModule(
            str(store.path), rows_of_kinds(arguments, 256, 2, 1), batch_size=arguments.batch, overlap="allow"
        )
        selection: DataSelection
        if arguments.way == "off":
            selection = DataSelection(UniformSelector(), every_n_steps=10**6, dirpath=name)
        else:
            selection = LiveSelection(every_n_steps=arguments.every, dirpath=name)
        trainer_of(arguments, Path(name), [clock, selection], logger=False).fit(CausalLM(network(arguments)), data)
    ledger = selection.run.ledger
    flops = [sum(record.flops.values()) for record in ledger.rounds]
    training = ledger.training_flops / len(clock.begun)
    seconds, pace, every = clock.seconds, selection.ahead.pace, arguments.every
    found = {
        "seconds": seconds[1:],  # the first step allocates memory
        "unmeasured": [each for i, each in enumerate(seconds) if i and pace.is_early(every, every - 1 - i % every)],
        "flops": sum(flops) / (sum(flops) + training * 2 * arguments.every),
        "before": clock.begun[0] - clock.started,
        "measured": [len(record.measured) for record in ledger.rounds],
        "references": [record.metrics.get("reference_examples", 0.0) for record in ledger.rounds],
    }
    print(json.dumps(found))


def run_again(*more: str) -> Any:
    """Run this script with some more arguments, and return what it found."""
    command = [sys.executable, __file__, *sys.argv[1:], *more]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def price_the_default(arguments: argparse.Namespace) -> None:
    """Print the share of the default in FLOPs and seconds, and its longest step, by the length of rounds."""
    columns = ("steps of a round", "probes", "reference rows", "FLOPs", "seconds", "longest step / median")
    print("|", " | ".join([*columns, "without selection"]), "|")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for every in SHORT_LENGTHS if arguments.short else LENGTHS:
        off, on = (run_again("--tables", "default", "--way", way, "--every", str(every)) for way in ("off", "default"))
        median, longest = statistics.median(on["seconds"]), max(on["seconds"])
        plain = statistics.median(off["seconds"])
        share = 1 - statistics.fmean(on["unmeasured"]) / statistics.fmean(on["seconds"])
        ratios = longest / median, max(off["seconds"]) / plain
        cells = [every, on["measured"][1], f"{on['references'][1]:.0f}", f"{on['flops']:.1%}", f"{share:.1%}"]
        print("|", " | ".join(map(str, [*cells, *(f"{ratio:.2f}" for ratio in ratios)])), "|", flush=True)
        before = (on["before"] - off["before"]) / plain
    size, tokens = arguments.size, f"{arguments.batch} x {arguments.tokens} tokens"
    print(f"\n{size}, batches of {tokens}, {arguments.precision}, a step of {1000 * plain:.0f} ms; LiveSelection()")
    print(f"before the first step, once (prior, rehearsal): as long as {before:.1f} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps of a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--size", choices=SIZES, default="1m", help="of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of an example (default: as suits the size)")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", default="32-true")
    tables = ["default", "steps", "watching", "governor"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=["default"])
    parser.add_argument("--short", action="store_true", help="shorter rounds of the default: two minutes")
    parser.add_argument("--governed", choices=GOVERNED, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=[*WAYS, "default"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or SIZES[arguments.size][3]
    warnings.filterwarnings("ignore")
    if arguments.way and "default" in arguments.tables:
        train_with_default(arguments)
        return
    if arguments.way:
        train_one_way(arguments, arguments.way)
        return
    if arguments.governed:
        train_governed(arguments, arguments.governed)
        return
    if "default" in arguments.tables:
        price_the_default(arguments)
    if "steps" in arguments.tables:
        compare_ways(arguments)
    if "governor" in arguments.tables:
        govern(arguments)
    if "watching" in arguments.tables:
        watch(arguments)


def watch(arguments: argparse.Namespace) -> None:
    """Train once with everything that watches, and print what each part of it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loggers = [
            WandbLogger(project="overhead", save_dir=folder, offline=True),
            TensorBoardLogger(folder, "tb"),
            CSVLogger(folder, "csv"),
        ]
        selection = DataSelection(
            selector(arguments), FirstOrderInfluence(), every_n_steps=arguments.every, dirpath=folder / "selection"
        )
        monitor = TimedMonitor()
        trainer_of(arguments, folder, [selection, monitor], logger=loggers).fit(
            CausalLM(network(arguments)), datamodule=data_of(arguments)
        )
        tell(selection, monitor, arguments)


def tell(selection: DataSelection, monitor: TimedMonitor, arguments: argparse.Namespace) -> None:
    ledger = selection.run.ledger
    training = ledger.training_seconds - monitor.seconds["on_train_batch_end"]
    parts = {"monitor, opening the loggers (once)": monitor.seconds["on_fit_start"]}
    parts["monitor, rounds"] = monitor.seconds["on_train_start"] + monitor.seconds["on_train_batch_end"]
    parts["monitor, end (once)"] = monitor.seconds["on_train_end"]
    for phase in ("write decisions", "watch"):
        parts[phase] = sum(record.seconds.get(phase, 0.0) for record in ledger.rounds)
    print(
        f"{arguments.steps} steps of {1000 * training / arguments.steps:.0f} ms, {len(ledger.rounds)} rounds, "
        f"training {training:.1f} s, selection {ledger.selection_seconds:.1f} s"
    )
    for name, seconds in parts.items():
        print(
            f"{name:36} {seconds:7.3f} s  {1000 * seconds / len(ledger.rounds):7.1f} ms a round  "
            f"{seconds / training:7.2%} of training"
        )


GOVERNED: dict[str, Callable[[dict[str, Any]], DataSelection]] = {
    "LiveSelection": lambda run: LiveSelection(**run),
    "LiveSelection, max_overhead=0.05": lambda run: LiveSelection(max_overhead=0.05, **run),
    "MATES, max_overhead=0.05": lambda run: MATES(
        probes=512, regressor=HashedRidgeRegressor(), max_overhead=0.05, **run
    ),
    "MATES, max_overhead=0.1": lambda run: MATES(probes=512, regressor=HashedRidgeRegressor(), max_overhead=0.1, **run),
}


def train_governed(arguments: argparse.Namespace, name: str) -> None:
    """Train and print selection's share and the steps of the rounds that measure, as a line of JSON."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = {"every_n_steps": arguments.every, "dirpath": folder}
        selection = GOVERNED[name](run)
        trainer = trainer_of(arguments, Path(folder), [clock, selection], logger=False)
        trainer.fit(CausalLM(network(arguments)), datamodule=data_of(arguments))
    ledger = selection.run.ledger
    measured = [len(record.measured) for record in ledger.rounds[1:]]
    begun = clock.begun[2 * arguments.every :]  # the first round that measures does so in one pause
    seconds = [later - earlier for earlier, later in itertools.pairwise(begun)]
    found = {
        "share": ledger.selection_seconds / ledger.training_seconds,
        "once": sum(ledger.around_seconds.get(part, 0.0) for part in ("check data", "rehearsal", "count FLOPs")),
        "training": ledger.training_seconds,
        "rounds": len(ledger.rounds),
        "measured": statistics.fmean(measured),
        "longest": max(seconds) / statistics.median(seconds),
        "long": sum(each > 2 * statistics.median(seconds) for each in seconds),
    }
    print(json.dumps(found))


def govern(arguments: argparse.Namespace) -> None:
    """Print selection's share of a long run of each method beside what was set."""
    print("\n| method | selection / training | of it once | rounds | measured a round | longest step | over twice |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in GOVERNED:
        command = [sys.executable, __file__, *sys.argv[1:], "--governed", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(answer.splitlines()[-1])
        cells = [f"{found['share']:.1%}", f"{found['once'] / found['training']:.1%}", f"{found['rounds']}"]
        cells += [f"{found['measured']:.0f}", f"{found['longest']:.1f} medians", f"{found['long']}"]
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
