"""What live Quad costs: selection's share of the wall time by phase, and the bandit's own time for large pools.

The first table trains a small decoder on random tokens in rounds of 20 optimizer steps and prints selection's share of
the processor's time, and how it divides among the phases of the ledger. The first round is a warm-up; by default five
more follow, in which the factors of the curvature are refreshed once, as in any five rounds. What counts is the ratio
of measured to trained examples: the share falls in proportion to the examples of a step. ``outside`` is what no phase
of the ledger covers: finding the available candidates, and writing the ledger and the logs. ``overhearing`` is what the
ledger takes off training for the steps that tell the influence of their examples; the last line holds the clocks of
batches with and without it against that.

The second table runs the bandit alone, without a model, and prints milliseconds per round. Its rounds are as short as
those of the first table.

    python benchmarks/quad.py
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from liveselect.callbacks import Quad
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import Batch, CandidateSource, InfluenceEstimator, LiveModel, Round
from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.ledger import RoundRecord
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.rounds import SelectionRun, run_round
from liveselect.selectors import UCBSelector, UniformSelector

VOCABULARY, LENGTH, CLUSTERS = 512, 64, 64
ESTIMATORS: dict[str, Callable[[], InfluenceEstimator]] = {
    "kfac": KFACInfluence,
    "identity": lambda: KFACInfluence(curvature="identity"),
    "one-step": lambda: OneStepInfluence(step="in_batch"),
}


class TimedQuad(Quad):
    """Notes the seconds of every round, and of training between rounds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.begun = self.ended = 0.0
        self.round_seconds: list[float] = []
        self.wall_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.batch_seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether the batch was listened to

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a batch before listening begins."""
        self.begun = time.process_time()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock of a batch."""
        listened = self.overhearing.direction(self.run, self.session.global_batch(trainer)) is not None
        self.batch_seconds[listened].append(time.process_time() - self.begun)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _select(self, trainer: pl.Trainer) -> None:
        started = time.process_time(), time.perf_counter()
        if self.round_seconds:
            self.step_seconds.append(started[0] - self.ended)
        super()._select(trainer)
        self.ended = time.process_time()  # on one thread the same as the wall clock's, but for other programs
        self.round_seconds.append(self.ended - started[0])
        self.wall_seconds.append(time.perf_counter() - started[1])


class Decoder(pl.LightningModule):
    """A small GPT-NeoX."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=4 * width,
                max_position_embeddings=LENGTH,
            )
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows(count: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "cluster": f"{index % CLUSTERS:02d}"} for index, row in enumerate(tokens)]


def train(estimator: str, batch: int, accumulate: int, reference: int, rounds: int, width: int) -> TimedQuad:
    """Train ``rounds`` rounds of 20 steps and return the callback with its clocks."""
    pl.seed_everything(0, verbose=False)
    selection = TimedQuad(estimator=ESTIMATORS[estimator](), warmup_rounds=1)
    data = SelectionDataModule(
        pool=rows(batch * accumulate * 20 * (rounds + 1), 1),
        reference=rows(reference, 2),
        batch_size=batch,
        groups="cluster",
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[selection],
            max_steps=20 * rounds,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Decoder(width), datamodule=data)
    return selection


def tell(name: str, selection: TimedQuad, step: int, reference: int) -> None:
    records: list[RoundRecord] = selection.run.ledger.rounds[1:]
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds / len(records)
    whole = statistics.mean(selection.round_seconds[1:])
    wall = statistics.mean(selection.wall_seconds[1:])
    phases["outside"] = wall - sum(phases.values())
    phases = {phase: seconds * whole / wall for phase, seconds in phases.items()}
    ledger = selection.run.ledger
    phases["overhearing"] = heard = ledger.around_seconds.get("overhearing", 0.0) / len(records)
    everything = whole + statistics.mean(selection.step_seconds)
    measured = statistics.mean(len(record.measured) for record in records)
    print(
        f"{name:>9}  {step:>5} examples a step, {measured:.0f} measured, {reference} reference: "
        f"training {everything - whole - heard:.2f} s, selection {whole + heard:.2f} s, "
        f"{100 * (whole + heard) / everything:.1f}%"
    )
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"{'':>11}{phase:<26}{100 * seconds / everything:>7.2f}%")
    if selection.batch_seconds[True]:
        listened, silent = (statistics.median(selection.batch_seconds[which]) for which in (True, False))
        batches = len(selection.batch_seconds[True]) / len(records)
        print(
            f"{'':>11}a batch that is listened to takes {listened / silent:.2f} times as long, which is "
            f"{100 * batches * (listened - silent) / everything:.2f}% of the time"
        )


class NoData(CandidateSource):
    """A source whose candidates are never read."""

    batch_size = 32

    def __init__(self, size: int, arms: int) -> None:
        groups = torch.randint(0, arms, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        self.pool = CandidatePool(size, "none", groups, tuple(f"{arm:05d}" for arm in range(arms)))

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the ids as if they were tokens."""
        yield {"id": ids, "input_ids": ids.view(-1, 1)}

    def reference(self) -> Iterable[Batch]:
        """Return nothing."""
        return ()

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return empty texts."""
        return [""] * len(input_ids)

    def follow(self, plan: Plan) -> None:
        """Train on nothing."""


class Noise(InfluenceEstimator):
    """An estimator that measures nothing."""

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Prepare to draw."""
        self.generator = round.generator("noise")
        return {}

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return random numbers."""
        return torch.randn(len(batch["id"]), generator=self.generator)


def bandit_alone(size: int, arms: int, rounds: int, budget: int = 5120) -> None:
    source = NoData(size, arms)
    run = SelectionRun(UCBSelector(), Noise(), UniformSelector(), 0, source)
    model = torch.nn.Linear(1, 1)
    live = LiveModel(model, torch.optim.SGD(model.parameters(), lr=1.0), lambda *_: torch.empty(0), budget)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        opened = run.open_round(0, budget)
        available = time.perf_counter() - started
        run_round(run, live, opened, budget)
        seconds.append((time.perf_counter() - started, available))
    later = seconds[1:]
    print(
        f"  {size:>10} candidates, {arms:>6} arms: first round {1000 * seconds[0][0]:>7.0f} ms, others "
        f"{1000 * statistics.median(whole for whole, _ in later):>6.0f} ms, of which finding the available "
        f"{1000 * statistics.median(part for _, part in later):>5.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", choices=ESTIMATORS, default=next(iter(ESTIMATORS)))
    parser.add_argument("--rounds", type=int, default=6, help="the first is a warm-up")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="*", default=[64], help="rows of a batch")
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--reference", type=int, default=64)
    parser.add_argument("--largest", type=int, default=1_000_000, help="candidates of the largest pool")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "liveselect"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"rounds of 20 steps, {arguments.estimator}, {LENGTH} tokens an example, width {arguments.width}")
    for batch in arguments.batch:
        step = batch * arguments.accumulate
        selection = train(
            arguments.estimator, batch, arguments.accumulate, arguments.reference, arguments.rounds, arguments.width
        )
        tell(arguments.estimator, selection, step, arguments.reference)
    print("the bandit alone, 5120 candidates a round")
    size = 10_000
    while size <= arguments.largest:
        for arms in (100, 10_000):
            if arms * 100 <= size:
                bandit_alone(size, arms, rounds=6)
        size *= 10


if __name__ == "__main__":
    main()
