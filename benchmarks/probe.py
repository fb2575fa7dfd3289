"""Seconds per candidate of the one-step probe, side by side with a probe that reloads a checkpoint for each candidate.

Three probes measure the same candidates in turn, in one process, on one state of one model:

- ``liveselect``: OneStepInfluence. Snapshot in memory; reference rows cut after their target and grouped by length,
  logits at target positions only.
- ``reload``: model and optimizer are loaded from a checkpoint file for each candidate, as the code that was released
  with MATES does; the reference pass is that of ``liveselect``, so the difference is the reload alone.
- ``released``: the same reload, and the reference pass as released: batches of 32 in the order of the set, padded to
  the longest row, logits of every position.

Of each probe the fastest of several turns is reported, with the shares of its phases. Ratios compare processor time on
a CPU, where other work on the machine does not count, and wall-clock time on an accelerator. The file stays in the page
cache, which flatters the reload: a cluster's file system is slower. What the reference pass costs decides the ratio, so
two models of about ten million parameters are measured: one whose parameters are mostly layers, and Pythia's smallest
shape, whose vocabulary of 50,304 makes the logits of unused positions the largest cost.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python benchmarks/probe.py --threads 1

The variables keep glibc from handing memory back to the system after each step and clearing it anew, which costs more
than the differences to be seen and falls on one probe or the other by chance.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from live_round import LiveRound, live_round
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from liveselect.grammar import Batch, CandidateSource
from liveselect.influence import OneStepInfluence
from liveselect.influence.reference import ReferencePass
from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

SIZES = {  # name: (hidden size, layers, vocabulary)
    "2M": (128, 6, 4096),
    "10M": (256, 8, 8192),
    "Pythia-14M": (128, 6, 50304),
}
REFERENCE_BATCH = 32  # rows, as released


class Source(CandidateSource):
    """Random candidates, and a reference set with the lengths of LAMBADA: about 90 tokens, the last word counts."""

    batch_size = 8

    def __init__(self, candidates: int, length: int, references: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, vocab, (candidates, length), generator=generator)
        self.pool = CandidatePool(candidates, "benchmark")
        self.rows = [
            torch.randint(1, vocab, (int(rows),), generator=generator)
            for rows in torch.normal(90.0, 25.0, (references,), generator=generator).clamp(30, 200)
        ]

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the candidates in one batch."""
        yield {"id": ids, "input_ids": self.tokens[ids], "labels": self.tokens[ids]}

    def reference(self) -> Iterable[Batch]:
        """Yield the reference in batches padded to their longest row."""
        for start in range(0, len(self.rows), REFERENCE_BATCH):
            rows = self.rows[start : start + REFERENCE_BATCH]
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            last = torch.tensor([len(row) for row in rows])[:, None] - 1
            yield {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(tokens.shape[1]) != last, -100)}

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the ids as text."""
        return [str(row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        """Refuse: nothing is trained."""
        raise NotImplementedError("the benchmark does not train on a plan")


def make_context(size: str, options: argparse.Namespace) -> LiveRound:
    """Return a model of the given size with warm AdamW moments, as a round would see it."""
    hidden, layers, vocab = SIZES[size]
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * hidden,
        )
    ).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    source = Source(options.candidates, options.length, options.references, vocab)
    for batch in torch.randint(1, vocab, (3, 2, options.length), generator=torch.Generator().manual_seed(1)):
        causal_lm_loss(model, {"input_ids": batch.to(options.device)}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return live_round(
        model,
        optimizer,
        source,
        index=1,
        global_batch=64,
        clip_gradients=lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0) and None,
    )


class ReloadProbe:
    """Loads the checkpoint, takes one step on the candidate, evaluates the reference; for each candidate again."""

    def __init__(self, context: LiveRound, path: Path, reference_loss: Callable[[], float]) -> None:
        self.context, self.path, self.reference_loss = context, path, reference_loss

    def score(self, batch: Batch) -> list[float]:
        """Return the reference loss after a step on each row."""
        return [self._one(row[None]) for row in batch["input_ids"]]

    def _one(self, tokens: Tensor) -> float:
        model, optimizer, meter = self.context.model, self.context.optimizer, self.context.live.meter
        with meter.phase("reload"):
            _load(self.context, self.path)
        with meter.phase("probe step"):
            optimizer.zero_grad()
            causal_lm_loss(model, {"input_ids": tokens}).mean().backward()
            self.context.live.clip_gradients(list(model.parameters()))
            optimizer.step()
        with meter.phase("reference pass"):
            return self.reference_loss()


def released_reference_loss(context: LiveRound, batches: list[Batch]) -> Callable[[], float]:
    """Return the reference pass as released: padded batches, all logits, the mean of the batches' means."""

    @torch.no_grad()
    def loss() -> float:
        means = []
        for batch in batches:
            logits = context.model(batch["input_ids"], use_cache=False).logits[:, :-1]
            means.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
        return torch.stack(means).mean().item()

    return loss


def run(size: str, options: argparse.Namespace) -> None:
    """Measure one size and print its table."""
    context = make_context(size, options)
    parameters = sum(parameter.numel() for parameter in context.model.parameters())
    padded = [context.live.to_device(batch) for batch in context.round.source.reference()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": context.model.state_dict(), "optimizer": context.optimizer.state_dict()}, path)
        megabytes = path.stat().st_size / 1e6
        estimator = OneStepInfluence()
        fitted = context.fit(estimator)
        ours = ReferencePass.load(context.live, context.round)
        probes = {
            "liveselect": lambda batch: context.score(estimator, batch),
            "reload": ReloadProbe(context, path, lambda: ours.loss(context.live)).score,
            "released": ReloadProbe(context, path, released_reference_loss(context, padded)).score,
        }
        turns, scores = take_turns(context, path, probes, options.rows)
    after = (fitted["reference_loss_zero_step"] - torch.tensor(scores["reload"], dtype=torch.float64)) / 1e-3
    influence = torch.tensor(scores["liveselect"], dtype=torch.float64)
    padded_tokens = sum(batch["input_ids"].numel() for batch in padded)
    print(f"\n{size}: {parameters / 1e6:.1f} M parameters, checkpoint {megabytes:.0f} MB")
    print(
        f"reference: {ours.examples} rows, {ours.targets} targets; {ours.tokens} positions in {len(ours.batches)} "
        f"batches grouped by length, {padded_tokens} in {len(padded)} as released"
    )
    print(
        f"influence, liveselect against reload: largest difference {float((influence - after).abs().max()):.1e}, "
        f"spread over candidates {float(influence.std()):.1e}"
    )
    print_table(turns)


@dataclass
class Turn:
    """What one probe spent on one batch of candidates, in seconds per candidate."""

    wall: float
    compared: float  # processor time on CPU, else the same as wall
    phases: dict[str, float]

    @property
    def state(self) -> float:
        """Seconds spent on putting model and optimizer back, at the turn's ratio of compared to wall-clock time."""
        spent = sum(self.phases.get(phase, 0.0) for phase in ("snapshot", "restore", "reload", "other"))
        return spent * self.compared / self.wall


def take_turns(
    context: LiveRound, path: Path, probes: Mapping[str, Callable[[Batch], Any]], rows: int
) -> tuple[dict[str, list[Turn]], dict[str, list[float]]]:
    """Let every probe measure every batch of candidates, another one first each time."""
    turns: dict[str, list[Turn]] = {name: [] for name in probes}
    scores: dict[str, list[float]] = {name: [] for name in probes}
    names = list(probes)
    on_cpu = context.live.device.type == "cpu"
    for turn, ids in enumerate(context.round.candidates.split(rows)):
        batch = next(iter(context.round.batches(ids)))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _load(context, path)  # the reloading probes leave the model where the last candidate put it
            context.live.meter.seconds.clear()
            busy = time.process_time()
            with context.live.meter.phase("other"):
                scores[name] += torch.as_tensor(probes[name](batch)).tolist()
            busy = time.process_time() - busy
            phases = {phase: spent / len(ids) for phase, spent in context.live.meter.seconds.items()}
            wall = sum(phases.values())
            turns[name].append(Turn(wall, busy / len(ids) if on_cpu else wall, phases))
    return turns, scores


def print_table(turns: Mapping[str, list[Turn]]) -> None:
    """Print what the fastest turn of each probe cost per candidate, and ratios to the first probe."""
    fastest = {name: min(each, key=lambda turn: turn.compared) for name, each in turns.items()}
    own = next(iter(fastest.values()))
    print(f"{'probe':<12}{'wall s':>8}{'compared s':>12}{'ratio':>8}{'state s':>10}{'ratio':>8}   share of each phase")
    for name, turn in fastest.items():
        shares = sorted(turn.phases.items(), key=lambda item: -item[1])
        print(
            f"{name:<12}{turn.wall:>8.3f}{turn.compared:>12.3f}{turn.compared / own.compared:>8.2f}{turn.state:>10.4f}"
            f"{turn.state / own.state:>8.2f}   "
            + ", ".join(f"{phase} {spent / turn.wall:.1%}" for phase, spent in shares)
        )


def _load(context: LiveRound, path: Path) -> None:
    state = torch.load(path, map_location=context.live.device)
    context.model.load_state_dict(state["model"])
    context.optimizer.load_state_dict(state["optimizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--candidates", type=int, default=8, help="candidates measured by each probe")
    parser.add_argument("--rows", type=int, default=4, help="candidates in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a candidate")
    parser.add_argument("--references", type=int, default=96, help="rows of the reference set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.random.default_generator.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; {vars(options)}")
    for size in options.sizes:
        run(size, options)


if __name__ == "__main__":
    main()
