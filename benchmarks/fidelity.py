"""How well cheap estimators rank candidates like the exact one-step probe, at three moments of one training run.

A small language model is trained from scratch with AdamW on the mixed pool of ``liveselect demo``: the code,
docstrings, comments and tables of Python's library. At an early, a middle and a late step of it,
with the moments warm and at the run's learning rate, the same candidates are measured by OneStepInfluence, in its
``published`` and its ``in_batch`` form, and by the estimators that cost about three forwards. Printed are Spearman
correlations with either form.

How well the probe agrees with itself limits what agreement with it can mean: *split-half* is the Spearman correlation
of the probe against one half of the reference sequences with the probe against the other half, averaged over random
halves, and *Spearman-Brown* extrapolates it to the whole set, 2 r / (1 + r). An estimator that looks at the very same
reference sequences may come out above it, because it shares their noise.

Run ``python benchmarks/fidelity.py``; numbers depend on the version of Python. Checkpoints and what the probe
measured are kept in ``--folder``, so that a second run only repeats the cheap part.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from live_round import LiveRound, live_round
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from liveselect.cli.corpus import find_corpus
from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.grammar import Batch, CandidateSource, InfluenceEstimator
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.influence.one_step import StepSize
from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

BATCH = 16
SPLITS = 20
FORMS: tuple[StepSize, ...] = ("published", "in_batch")


class Source(CandidateSource):
    """Sequences of equal length cut out of texts, and a reference set of them."""

    batch_size = BATCH

    def __init__(self, tokens: Tensor, references: Tensor) -> None:
        self.tokens, self.references = tokens, references
        self.pool = CandidatePool(len(tokens), "fidelity")

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the candidates in batches of eight."""
        for part in ids.split(8):
            yield {"id": part, "input_ids": self.tokens[part], "labels": self.tokens[part]}

    def reference(self) -> Iterable[Batch]:
        """Yield the reference set in batches of 32."""
        for rows in self.references.split(32):
            yield {"input_ids": rows, "labels": rows}

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the ids as text."""
        return [str(row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        """Refuse: training here takes random rows."""
        raise NotImplementedError("the benchmark does not train on a plan")


def make_source(options: argparse.Namespace) -> Source:
    """Tokenize the texts of the demo and cut them into rows."""
    corpus = find_corpus()
    documents = [text for texts in corpus.pool.values() for text in texts]
    tokenizer = train_bpe(documents, options.vocabulary)
    generator = torch.Generator().manual_seed(0)

    def rows(texts: list[str]) -> Tensor:
        ids = [torch.tensor(each, dtype=torch.int64) for each in tokenizer(texts, verbose=False)["input_ids"]]
        cut = [each[: len(each) // options.length * options.length].view(-1, options.length) for each in ids]
        found = torch.cat(cut)
        return found[torch.randperm(len(found), generator=generator)]

    references = rows([*corpus.reference, *corpus.validation])
    return Source(rows(documents), references[: options.references])


def new_model(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.random.default_generator.manual_seed(options.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            intermediate_size=4 * options.width,
            max_position_embeddings=options.length,
        )
    )
    return model, torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)


def train(source: Source, options: argparse.Namespace, folder: Path) -> None:
    """Train once and keep model and optimizer at the steps that are asked for."""
    files = {step: folder / f"step-{step}.pt" for step in options.steps}
    if all(file.exists() for file in files.values()):
        return
    model, optimizer = new_model(options)
    generator = torch.Generator().manual_seed(1)
    held = torch.arange(options.candidates)  # never trained on, as candidates of the next round are not
    for step in range(1, max(options.steps) + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, step / options.warmup)
        ids = torch.randint(len(held), len(source.tokens), (BATCH,), generator=generator)
        loss = causal_lm_loss(model, {"input_ids": source.tokens[ids]}).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step in files:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, files[step])
            print(f"step {step}: training loss {loss.item():.2f}", flush=True)


def context_at(step: int, source: Source, options: argparse.Namespace, folder: Path) -> LiveRound:
    """Return a round at one step of the run, with model and moments as they were then."""
    model, optimizer = new_model(options)
    state = torch.load(folder / f"step-{step}.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])

    def clip(parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, options.clip)

    found = live_round(model, optimizer, source, clip_gradients=clip)
    return replace(found, round=replace(found.round, step=step, candidates=torch.arange(options.candidates)))


def estimators(context: LiveRound) -> dict[str, tuple[InfluenceEstimator, LiveRound]]:
    """Return what is compared, by the name that the table prints, each with the round that it measures."""
    rate = context.optimizer.param_groups[0]["lr"]
    sgd = torch.optim.SGD(context.model.parameters(), lr=rate)
    plain = replace(context, live=replace(context.live, optimizer=sgd))
    below = ["*.embed_in.*", *(f"*.layers.{index}.*" for index in range(context.model.config.num_hidden_layers - 1))]
    return {
        "plain dot, at theta": (FirstOrderInfluence(gradient_at="current", slope_over="zero"), plain),
        "K-FAC, at theta": (KFACInfluence(), context),
        "identity, layers only": (KFACInfluence(curvature="identity"), context),
        "first order, at theta": (FirstOrderInfluence(gradient_at="current"), context),
        "first order, slope at 0": (FirstOrderInfluence(slope_over="zero"), context),
        "first order": (FirstOrderInfluence(), context),
        "first order, published": (FirstOrderInfluence(step="published"), context),
        "first order, last layer": (FirstOrderInfluence(exclude=below), context),
        "steps": (FirstOrderInfluence(engine="optimizer_step"), context),
        "steps, published": (FirstOrderInfluence(engine="optimizer_step", step="published"), context),
    }


@dataclass(frozen=True)
class Exact:
    """What the exact probe measured: influence ``(n,)``, and of each reference sequence alone ``(n, R)``."""

    influence: Tensor
    by_reference: Tensor
    seconds: float

    def split_half(self) -> float:
        """Return the mean Spearman correlation between halves of the reference set."""
        generator = torch.Generator().manual_seed(0)
        half = self.by_reference.shape[1] // 2
        found = []
        for _ in range(SPLITS):
            order = torch.randperm(self.by_reference.shape[1], generator=generator)
            found.append(rank_correlation(*(self.by_reference[:, p].mean(1) for p in (order[:half], order[half:]))))
        return sum(found) / len(found)


def exact_influence(context: LiveRound, form: StepSize, file: Path) -> Exact:
    """Return what the exact probe measures, from the file if it is there."""
    if file.exists():
        return Exact(**torch.load(file))
    losses: list[Tensor] = []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        found = causal_lm_loss(model, batch)
        if not torch.is_grad_enabled():  # a batch of a reference pass
            losses.append(found)
        return found

    started = time.process_time()
    estimator, watching = OneStepInfluence(step=form), replace(context, live=replace(context.live, loss_fn=watched))
    rate = watching.fit(estimator)["probe_learning_rate"]
    candidates = context.round.candidates
    parts = [watching.score(estimator, batch) for batch in context.round.batches(candidates)]
    seconds = (time.process_time() - started) / len(candidates)
    passes = torch.cat(losses).double().view(len(candidates) + 2, -1)  # before, zero step, candidates
    weight = context.live.global_batch if form == "in_batch" else 1
    exact = Exact(torch.cat(parts), weight * (passes[1] - passes[2:]) / rate, seconds)
    torch.save(vars(exact), file)
    return exact


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation."""
    return float(spearmanr(first, second).statistic)


def compare(step: int, source: Source, options: argparse.Namespace, folder: Path) -> None:
    """Print the table of one step."""
    context = context_at(step, source, options, folder)
    exact = {form: exact_influence(context, form, folder / f"exact-{step}-{form}.pt") for form in FORMS}
    print(f"\nstep {step}" + "".join(f"{form:>14}" for form in FORMS) + f"{'ms/candidate':>16}")
    halves = {form: each.split_half() for form, each in exact.items()}
    rows = {
        "probe: split-half": halves,
        "probe: Spearman-Brown": {form: 2 * r / (1 + r) for form, r in halves.items()},
    }
    for name, by_form in rows.items():
        print(f"{name:<28}" + "".join(f"{by_form[form]:>14.3f}" for form in FORMS))
    between = rank_correlation(*(each.influence for each in exact.values()))
    spent = 1e3 * sum(each.seconds for each in exact.values()) / len(exact)
    print(f"{'probe: one form, the other':<28}{between:>14.3f}{between:>14.3f}{spent:>16.1f}")
    for name, (estimator, measured) in estimators(context).items():
        measured.fit(estimator)
        started = time.process_time()
        batches = context.round.batches(context.round.candidates)
        found = torch.cat([measured.score(estimator, batch) for batch in batches])
        spent = 1e3 * (time.process_time() - started) / len(found)
        row = "".join(f"{rank_correlation(found, each.influence):>14.3f}" for each in exact.values())
        print(f"{name:<28}{row}{spent:>16.1f}", flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", nargs="+", type=int, default=[60, 300, 900], help="when to measure")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--references", type=int, default=128, help="reference sequences")
    parser.add_argument("--length", type=int, default=48, help="tokens of a sequence")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps over which the learning rate rises")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to keep checkpoints and measurements; by default nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        kept = {name: value for name, value in vars(options).items() if name not in ("folder", "threads", "steps")}
        mark = hashlib.blake2b(repr(sorted(kept.items())).encode(), digest_size=4).hexdigest()
        folder = (options.folder or Path(temporary)) / mark
        folder.mkdir(parents=True, exist_ok=True)
        source = make_source(options)
        parameters = sum(parameter.numel() for parameter in new_model(options)[0].parameters())
        print(f"torch {torch.__version__}, {parameters / 1e6:.2f} M parameters, {kept}", flush=True)
        train(source, options, folder)
        for step in options.steps:
            compare(step, source, options, folder)


if __name__ == "__main__":
    main()
