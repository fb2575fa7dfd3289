"""Seconds for PDS's solver, side by side with the published recipe at the same settings.

All recipes solve the same problem (plain SGD from one state of one model, the same batches, reference set, scored
steps and candidates) and so must agree; how well is printed. They are

- ``published``: Hessian products forward over reverse in chunks of 2 sequences, products of single examples by forward
  mode under ``vmap`` over 8 of them, attention in plain operations, reference rows padded to the length of a candidate,
  the states of every stretch of about sqrt(T) steps computed again.
- ``exact``: PMPInfluence without approximation: Hessian products by double backward, products of examples from hooks,
  reference rows cut after their target and grouped by length.
- ``differences``: PMPInfluence with both kinds of products by central differences.
- ``bf16``: the same, products of examples under bf16 autocast (``product_precision="training"``); everything else, and
  all of the other recipes, computes in float32.

Each recipe runs in a process of its own, so that its peak of memory is its own, and in turn with the others as often as
``--repeats`` says; of every number the least counts. Compared is processor time on a CPU, where other work on the
machine counts little, and wall-clock time on an accelerator. ``at published settings`` adds up the units measured here
(a step, a reference gradient, a Hessian product, a product) in the published numbers: 100 steps of 256 sequences, 1,024
references, 163,840 candidates in 10 scored steps.

    python benchmarks/pmp.py --threads 1
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from live_round import LiveRound, live_round
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from transformers import LlamaConfig, LlamaForCausalLM

from liveselect.functional.adjoint import State, Transition
from liveselect.functional.differences import Reach
from liveselect.functional.updates import Vector
from liveselect.grammar import Batch, CandidateSource
from liveselect.influence import PMPInfluence
from liveselect.influence.pmp import estimator as pmp
from liveselect.influence.pmp.unroll import Unroll, unrolled_ids
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.preserve import measuring

RATE = 0.008
RECIPES = ("published", "exact", "differences", "bf16")
PUBLISHED_COUNTS = {  # sequences of each kind of work in the published run
    "step": 2 * 100 * 256,  # forwards, and once more on the way back
    "reference": 101 * 1024,
    "hessian": 100 * 256,
    "product": 10 * 163_840,
}


class Source(CandidateSource):
    """Random candidates, and references of uneven length, as conversations are."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, options.vocab, (options.candidates, options.length), generator=generator)
        self.pool = CandidatePool(options.candidates, "benchmark")
        self.batch_size = self.rows = options.rows
        share = torch.rand(options.references, generator=generator) * 0.8 + 0.2
        self.references = [
            torch.randint(1, options.vocab, (int(options.length * each),), generator=generator) for each in share
        ]

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield batches of ``rows`` candidates."""
        for part in ids.split(self.rows):
            yield {"id": part, "input_ids": self.tokens[part], "labels": self.tokens[part]}

    def reference(self) -> Iterable[Batch]:
        """Yield the reference padded to the length of a candidate."""
        for start in range(0, len(self.references), self.rows):
            rows = self.references[start : start + self.rows]
            tokens = torch.stack([F.pad(row, (0, self.tokens.shape[1] - len(row))) for row in rows])
            lengths = torch.tensor([len(row) for row in rows])[:, None]
            yield {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths, -100)}

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the ids as text."""
        return [str(row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        """Refuse: nothing is trained."""
        raise NotImplementedError("the benchmark does not train on a plan")


class Clock:
    """Adds up the time and the sequences of each kind of work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.sequences: dict[str, int] = defaultdict(int)

    @contextmanager
    def work(self, kind: str, sequences: int) -> Iterator[None]:
        """Charge the block to a kind of work."""
        since = self._now()
        yield
        self.seconds[kind] += self._now() - since
        self.sequences[kind] += sequences

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def make_context(options: argparse.Namespace, attention: str, short: bool = False) -> LiveRound:
    """Return a small decoder as a round would see it."""
    torch.random.default_generator.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=3 * options.hidden,
            max_position_embeddings=options.length,
            attn_implementation=attention,
        )
    ).to(options.device)
    return live_round(
        model.eval(),
        torch.optim.SGD(model.parameters(), lr=RATE),
        Source(options),
        global_batch=options.batch,
        autocast=lambda: torch.autocast(options.device, torch.bfloat16, enabled=short),
    )


class TimedUnroll(Unroll):
    """An unroll whose kinds of work are told apart."""

    clock: Clock

    def _gradient(self, state: State, index: int) -> Vector:
        with self.clock.work("step", len(self.ids[index])):
            return super()._gradient(state, index)

    def _curved(self, transition: Transition, vector: Vector, reach: Reach) -> Vector:
        with self.clock.work("hessian", len(self.ids[transition.index])):
            return super()._curved(transition, vector, reach)

    def _reference_gradient(self, state: State) -> tuple[float, Vector]:
        with self.clock.work("reference", self.reference.examples):
            return super()._reference_gradient(state)


def liveselect(options: argparse.Namespace, clock: Clock, recipe: str) -> Tensor:
    """Score the candidates with PMPInfluence; returns (scored,)."""
    context = make_context(options, "sdpa", short=recipe == "bf16")
    differences = recipe != "exact"
    TimedUnroll.clock = clock
    pmp.Unroll = TimedUnroll
    estimator = PMPInfluence(
        steps=options.steps,
        score_every=options.score_every,
        dynamics="sgd",
        learning_rate=RATE,
        batch_size=options.batch,
        hessian="central_difference" if differences else "double_backward",
        products="central_difference" if differences else "exact",
        product_precision="training" if recipe == "bf16" else "float32",
        reference_weighting="examples",
    )
    context.fit(estimator)
    sequences = options.scored * len(estimator.scored_steps)
    with clock.work("product", sequences), measuring(context.model, context.optimizer):
        return estimator.score_ids(context.live, context.round, torch.arange(options.scored))


def published(options: argparse.Namespace, clock: Clock) -> Tensor:
    """Score the candidates by the published recipe; returns (candidates,)."""
    context = make_context(options, "eager")
    model, source = context.model, context.round.source
    ids = unrolled_ids(context.round, options.steps, options.batch)
    device = context.live.device
    theta = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    references = list(source.reference())

    def mean_loss(parameters: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (tokens,), {"use_cache": False}).logits
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return (losses.sum(dim=1) / (targets != -100).sum(dim=1)).mean()

    def summed(parts: list[tuple[Tensor, Tensor]], one: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = sum(len(tokens) for tokens, _ in parts)
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for tokens, labels in parts:
            for name, value in one(tokens.to(device), labels.to(device)).items():
                total[name] += value * (len(tokens) / rows)
        return total

    def gradient(at: dict[str, Tensor], parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        def one(tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
            leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
            found = torch.autograd.grad(mean_loss(leaves, tokens, labels), list(leaves.values()))
            return dict(zip(leaves, found, strict=True))

        return summed(parts, one)

    def batch(index: int, rows: int) -> list[tuple[Tensor, Tensor]]:
        return [(source.tokens[part], source.tokens[part]) for part in ids[index].split(rows)]

    def step(at: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        with clock.work("step", options.batch):
            moved = gradient(at, batch(index, options.rows))
            return {name: value - RATE * moved[name] for name, value in at.items()}

    def reference_gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        with clock.work("reference", options.references):
            return gradient(at, [(each["input_ids"], each["labels"]) for each in references])

    def curved(at: dict[str, Tensor], index: int, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        def one(tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return jvp(lambda parameters: grad(mean_loss)(parameters, tokens, labels), (at,), (vector,))[1]

        with clock.work("hessian", options.batch):
            return summed(batch(index, 2), one)

    def products(at: dict[str, Tensor], vector: dict[str, Tensor]) -> Tensor:
        def one(tokens: Tensor) -> Tensor:
            def loss(parameters: dict[str, Tensor]) -> Tensor:
                return mean_loss(parameters, tokens[None], tokens[None])

            return jvp(loss, (at,), (vector,))[1]

        with clock.work("product", options.scored), torch.no_grad():
            return torch.cat([vmap(one)(rows.to(device)) for rows in source.tokens[: options.scored].split(8)]).cpu()

    every = math.isqrt(options.steps)
    kept = {}
    at = theta
    for index in range(options.steps):
        if index % every == 0:
            kept[index] = at
        at = step(at, index)
    costate = reference_gradient(at)
    scores = torch.zeros(options.scored)
    for begin in reversed(range(0, options.steps, every)):
        states = [kept[begin]]
        for index in range(begin, min(begin + every, options.steps) - 1):
            states.append(step(states[-1], index))
        for index in reversed(range(begin, begin + len(states))):
            here = states[index - begin]
            if index % options.score_every == 0:
                scores += products(here, costate)
            turned, own = curved(here, index, costate), reference_gradient(here)
            costate = {name: value + own[name] - RATE * turned[name] for name, value in costate.items()}
    return scores


def run_recipe(options: argparse.Namespace) -> None:
    """Run one recipe and print what it took, as JSON."""
    clock = Clock(options.device)
    name = options.recipe
    with clock.work("everything", 1):
        scores = published(options, clock) if name == "published" else liveselect(options, clock, name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps([dict(clock.seconds), dict(clock.sequences), peak, scores.double().tolist()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        **{"hidden": 128, "layers": 4, "heads": 4, "vocab": 2048, "length": 256},
        **{"steps": 4, "score_every": 2, "batch": 8, "rows": 8, "references": 64, "candidates": 64, "scored": 64},
        "threads": torch.get_num_threads(),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", choices=RECIPES, help="run one recipe only, and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.recipe:
        run_recipe(options)
        return
    runs: dict[str, list[Any]] = {name: [] for name in RECIPES}
    for _ in range(options.repeats):
        for name in RECIPES:
            command = [sys.executable, __file__, *sys.argv[1:], "--recipe", name]
            runs[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    report(options, {name: least(found) for name, found in runs.items()})


def least(runs: list[Any]) -> Any:
    """Return the first of some runs of one recipe, with the least seconds of each kind that any of them took."""
    (seconds, *others), *_ = runs
    return [{kind: min(run[0][kind] for run in runs) for kind in seconds}, *others]


def report(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print a table: seconds per sequence of each kind of work, totals, ratios, agreement and memory."""
    parameters = sum(parameter.numel() for parameter in make_context(options, "sdpa").model.parameters())
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; {vars(options)}")
    print(f"{parameters / 1e6:.1f} M parameters; milliseconds per sequence, and the ratio to ours in brackets")
    kinds = list(PUBLISHED_COUNTS)
    theirs = results["published"]
    print(
        f"{'recipe':<14}"
        + "".join(f"{kind:>17}" for kind in kinds)
        + f"{'here, s':>15}{'at published, h':>17}{'peak GB':>9}"
    )
    base = None
    for name, (seconds, sequences, peak, _) in results.items():
        units = {kind: seconds[kind] / sequences[kind] for kind in kinds}
        whole = sum(units[kind] * count for kind, count in PUBLISHED_COUNTS.items()) / 3600
        base = base or (theirs[0], theirs[1], whole)
        cells = [f"{1e3 * units[k]:.1f} ({base[0][k] / base[1][k] / units[k]:.1f}x)" for k in kinds]
        total = f"{seconds['everything']:.1f} ({base[0]['everything'] / seconds['everything']:.1f}x)"
        print(
            f"{name:<14}"
            + "".join(f"{cell:>17}" for cell in cells)
            + f"{total:>15}{f'{whole:.1f} ({base[2] / whole:.1f}x)':>17}{peak / 1e9:>9.2f}"
        )
    reference = torch.tensor(theirs[3])
    for name in RECIPES[1:]:
        found = torch.tensor(results[name][3])
        error = float((found - reference).norm() / reference.norm())
        rank = float(spearmanr(found, reference).statistic)
        print(f"{name}: relative difference from the published recipe {error:.1e}, Spearman {rank:.5f}")


if __name__ == "__main__":
    main()
