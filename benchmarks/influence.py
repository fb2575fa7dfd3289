"""What it costs to measure influence: every engine beside the exact probe, kronfluence, and a plain training step.

Three tables, each measured side by side in one process:

1. Engines. The cost of one candidate in seconds and in forwards (of the same tokens, without a graph), how many times
   cheaper it is than the exact one-step probe with 128 and with 1,024 reference sequences as long as a candidate, the
   memory that it needs beyond model and optimizer, and the rank correlation with gradients formed one by one. The
   direction is that of KFACInfluence; what it takes to make it, once a round, stands below the table. *In a training
   step* is what scores of its examples add to forward and backward.
2. Factors and aggregated scores from end to end, beside kronfluence: the same model, examples, batches and damping.
3. A training step with AdamW, with and without scores of its examples.

The fastest of several turns counts. Ratios compare processor time on a CPU, where other work on the machine does not
count, and wall-clock time on an accelerator. Memory is the growth of the peak in a process of its own.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python benchmarks/influence.py --threads 1

The variables keep glibc from handing memory back to the system after each step and clearing it anew.
"""

import argparse
import copy
import logging
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from live_round import LiveRound, live_round
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from liveselect.functional.differences import central_difference_dot
from liveselect.functional.gradients import example_dot, forward_mode_dot
from liveselect.grammar import Batch, CandidateSource
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.influence.training_step import TrainingStepScores, mean_weights
from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

ROWS = 8  # of a batch
OVERHEARD = "in a training step"
SAME_NUMBERS = (  # engines that meet one direction
    "gradients one by one",
    "vmap(grad)",
    "forward mode",
    "central difference",
    "hooks (example_dot)",
    "KFACInfluence",
    OVERHEARD,
)
Run = Callable[[], Any]


class Source(CandidateSource):
    """Random token sequences: candidates, and a reference set of the same length."""

    batch_size = ROWS

    def __init__(self, candidates: Tensor, references: Tensor, rows: int = ROWS) -> None:
        self.tokens, self.references, self.rows = candidates, references, rows
        self.pool = CandidatePool(len(candidates), "benchmark")

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the candidates in batches."""
        for part in ids.split(self.rows):
            yield {"id": part, "input_ids": self.tokens[part], "labels": self.tokens[part]}

    def reference(self) -> Iterable[Batch]:
        """Yield the reference set in batches."""
        for part in self.references.split(self.rows):
            yield {"input_ids": part, "labels": part}

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the ids as text."""
        return [str(row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        """Refuse: nothing is trained."""
        raise NotImplementedError("the benchmark does not train on a plan")


def language_model(hidden: int, layers: int, vocab: int, device: str) -> nn.Module:
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
    )
    model: nn.Module = GPTNeoXForCausalLM(config)
    return model.to(device)


def make_context(options: argparse.Namespace) -> LiveRound:
    """Return a model with warm AdamW moments, as a round would see it."""
    model = language_model(options.hidden, options.layers, options.vocab, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, 1, options.vocab, generator=generator)
    source = Source(draw((options.candidates, options.length)), draw((1024, options.length)))
    for _ in range(3):
        causal_lm_loss(model, {"input_ids": draw((ROWS, options.length)).to(options.device)}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return live_round(
        model.eval(),
        optimizer,
        source,
        index=1,
        global_batch=64,
        clip_gradients=lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0) and None,
    )


# ---- measuring ---------------------------------------------------------------------------------------------------


def seconds(run: Run, device: str) -> float:
    """Return processor seconds of one call on CPU, wall-clock seconds on an accelerator."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict[str, Run], device: str, turns: int, warm: bool = True) -> dict[str, float]:
    """Return the fastest of several turns of each run, one after the other in each turn."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + warm):
        for name, run in runs.items():
            spent = seconds(run, device)
            if turn >= warm:
                best[name] = min(best[name], spent)
    return best


def peak_megabytes(run: Run, device: str) -> float:
    """Return by how much one call raises the peak of memory; on CPU in a forked process."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writing, str((after - before) / 1e3).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return float(pipe.read())


# ---- 1. engines --------------------------------------------------------------------------------------------------


def gradients_one_by_one(context: LiveRound, batch: Batch, direction: dict[str, Tensor]) -> Tensor:
    """Return the products of whole gradients, one example after the other."""
    parameters = [dict(context.model.named_parameters())[name] for name in direction]
    products = []
    for row in batch["input_ids"]:
        loss = causal_lm_loss(context.model, {"input_ids": row[None]}).sum()
        gradients = torch.autograd.grad(loss, parameters)
        products.append(torch.stack([(g * v).sum() for g, v in zip(gradients, direction.values(), strict=True)]).sum())
    return torch.stack(products)


def vectorised_gradients(context: LiveRound, batch: Batch, direction: dict[str, Tensor]) -> Tensor:
    """Return the products of whole gradients that ``vmap(grad)`` forms for all examples at once."""
    parameters = {name: parameter.detach() for name, parameter in context.model.named_parameters()}
    moving = {name: parameters[name] for name in direction}

    def loss(values: dict[str, Tensor], tokens: Tensor) -> Tensor:
        output = torch.func.functional_call(
            context.model, {**parameters, **values}, (tokens[None],), {"use_cache": False}
        )
        return F.cross_entropy(output.logits[0, :-1], tokens[1:])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(moving, batch["input_ids"])
    return torch.stack([gradients[name].flatten(1) @ direction[name].flatten() for name in direction]).sum(dim=0)


def displacement(model: nn.Module, direction: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
    """Return the share of the parameters' length along the direction that moves the reference loss by 0.01 nats."""
    slope = sum(float((direction[name] * gradient[name]).sum()) for name in direction)
    parameters = dict(model.named_parameters())
    lengths = [
        sum(float(values[name].detach().square().sum()) for name in direction) ** 0.5
        for values in (direction, parameters)
    ]
    return 0.01 / slope * lengths[0] / lengths[1]


def probe(context: LiveRound, references: int) -> tuple[LiveRound, OneStepInfluence]:
    """Return an exact probe with the first ``references`` reference sequences, prepared for a round."""
    source = context.round.source
    part = context.with_source(Source(source.tokens, source.references[:references], rows=32))
    estimator = OneStepInfluence()
    part.fit(estimator)
    return part, estimator


def engines(options: argparse.Namespace) -> None:
    context = make_context(options)
    few = context.with_source(Source(context.round.source.tokens, context.round.source.references[:128]))
    estimator = KFACInfluence(factor_examples=128)
    peaks = {"kfac, prepare": peak_megabytes(lambda: few.fit(KFACInfluence(factor_examples=128)), options.device)}
    identity = KFACInfluence("identity")
    preparation = {
        "reference gradient, 128 sequences": seconds(lambda: few.fit(identity), options.device),
        "kfac, 128 examples and 128 reference sequences": seconds(lambda: few.fit(estimator), options.device),
    }
    direction = dict(estimator.direction())
    share = displacement(context.model, direction, identity.direction())
    first_order = {name: FirstOrderInfluence(engine=name) for name in ("hooks", "optimizer_step")}
    for each in first_order.values():
        few.fit(each)
    batch = next(iter(context.round.batches(torch.arange(ROWS))))

    @torch.no_grad()
    def forward() -> Tensor:
        return causal_lm_loss(context.model, batch)

    def training() -> None:
        causal_lm_loss(context.model, batch).mean().backward()
        context.optimizer.zero_grad()

    overheard = TrainingStepScores(context.model, direction)

    def training_with_scores() -> Tensor:
        overheard.attach(batch)
        causal_lm_loss(context.model, batch).mean().backward()
        context.optimizer.zero_grad()
        return overheard.collect(mean_weights(batch, "examples"))

    runs: dict[str, Run] = {
        "forward": forward,
        "forward and backward": training,
        "gradients one by one": lambda: gradients_one_by_one(context, batch, direction),
        "vmap(grad)": lambda: vectorised_gradients(context, batch, direction),
        "forward mode": lambda: forward_mode_dot(context.model, causal_lm_loss, batch, direction),
        "central difference": lambda: central_difference_dot(context.model, causal_lm_loss, batch, direction, share),
        "hooks (example_dot)": lambda: example_dot(context.model, causal_lm_loss, batch, direction),
        "KFACInfluence": lambda: context.score(estimator, batch),
        "FirstOrderInfluence": lambda: context.score(first_order["hooks"], batch),
        "the same, optimizer_step": lambda: context.score(first_order["optimizer_step"], batch),
        OVERHEARD: training_with_scores,
    }
    if options.device == "cpu":  # forks come first: what is measured later would leave them memory to reuse
        peaks |= {name: peak_megabytes(run, options.device) for name, run in runs.items()}
    spent = take_turns(runs, options.device, options.turns)
    if options.device != "cpu":
        peaks |= {name: peak_megabytes(run, options.device) for name, run in runs.items()}
    for measured in (spent, peaks):
        measured[OVERHEARD] -= measured["forward and backward"]
    unit = spent["forward"] / ROWS
    exact = gradients_one_by_one(context, batch, direction).detach().cpu()
    probes: dict[int, float] = {}
    for references, rows in ((128, 2), (1024, 1)):
        part, one_step = probe(context, references)
        candidate = {name: value[:rows] for name, value in batch.items()}
        measure = partial(part.score, one_step, candidate)
        probes[references] = seconds(measure, options.device) / rows
        if references == 128:
            peaks["exact probe"] = peak_megabytes(measure, options.device)
    parameters = sum(parameter.numel() for parameter in context.model.parameters())
    print(f"\n1. Engines: {parameters / 1e6:.1f} M parameters, sequences of {options.length} tokens, batches of {ROWS}")
    heads = ("s/candidate", "forwards", "x probe 128", "x probe 1024", "MB", "Spearman")
    print(f"{'engine':28}" + "".join(f"{head:>13}" for head in heads))
    for name, run in runs.items():
        each = spent[name] / ROWS
        agreement = f"{spearmanr(run().detach().cpu(), exact)[0]:.6f}" if name in SAME_NUMBERS else ""
        print(
            f"{name:28}{each:13.5f}{each / unit:13.2f}{probes[128] / each:13.0f}{probes[1024] / each:13.0f}"
            f"{peaks[name]:13.0f}{agreement:>13}"
        )
    for references, each in probes.items():
        print(f"{f'exact probe, {references} references':28}{each:13.5f}{each / unit:13.2f}")
    print(
        f"memory of the exact probe: {peaks['exact probe']:.0f} MB; of preparing kfac: {peaks['kfac, prepare']:.0f} MB"
    )
    for name, once in preparation.items():
        print(f"once a round: {name}: {once:.2f} s = {once / unit:.0f} forwards of a candidate")


# ---- 2. end to end -----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The toy of the comparison: plain linear layers, of which kronfluence understands all."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 8, vocab: int = 512, length: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    **{name: nn.Linear(width, width) for name in "qkvo"},
                    "between": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits ``(B, T, V)``."""
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            y = block["before"](x)
            q, k, v = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            x = x + block["o"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["between"](x))))
        return self.head(self.last(x))


def kronfluence_scores(model: nn.Module, candidates: Tensor, references: Tensor, strategy: str) -> Tensor:
    """Return kronfluence's aggregated scores ``(n,)``, factors and files included."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Sums(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            (tokens,) = batch
            return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"]

        def get_attention_mask(self, batch: Any) -> Tensor:
            (tokens,) = batch
            return (torch.arange(tokens.shape[1], device=tokens.device) < tokens.shape[1] - 1).expand(tokens.shape)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        task = Sums()
        prepared = prepare_model(copy.deepcopy(model), task)
        analyzer = Analyzer(
            "benchmark", prepared, task, cpu=not torch.cuda.is_available(), disable_tqdm=True, output_dir=folder
        )
        factors = FactorArguments(strategy=strategy, use_empirical_fisher=True)
        analyzer.fit_all_factors("f", TensorDataset(candidates), per_device_batch_size=16, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            query_dataset=TensorDataset(references),
            train_dataset=TensorDataset(candidates),
            per_device_query_batch_size=16,
            per_device_train_batch_size=16,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
        )
        scores = analyzer.load_pairwise_scores("s")["all_modules"].flatten()
        logging.disable(logging.NOTSET)
        return scores


def end_to_end(options: argparse.Namespace) -> None:
    model = Decoder().to(options.device)
    draw = partial(torch.randint, 0, 512, generator=torch.Generator().manual_seed(0))
    candidates, references = draw((128, 64)), draw((16, 64))
    source = Source(candidates, references, rows=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = live_round(model, optimizer, source, global_batch=64)

    def ours(strategy: Any) -> Tensor:
        estimator = KFACInfluence(strategy, factor_examples=128)
        context.fit(estimator)
        return torch.cat([context.score(estimator, batch) for batch in context.round.batches(torch.arange(128))])

    print("\n2. From end to end: width 128, 4 layers, 64 tokens; 128 candidates, 16 references, batches of 16")
    try:
        import kronfluence  # noqa: F401 - is it there?
    except ImportError:
        print("kronfluence is not installed")
        return
    heads = ("liveselect s", "kronfluence s", "times faster", "MB", "MB theirs", "Spearman")
    print(f"{'curvature':12}" + "".join(f"{head:>14}" for head in heads))
    both: dict[str, dict[str, Run]] = {
        strategy: {
            "ours": partial(ours, strategy),
            "theirs": partial(kronfluence_scores, model, candidates, references, strategy),
        }
        for strategy in ("kfac", "ekfac")
    }
    memory = {  # forks come before this process does the same
        strategy: {name: peak_megabytes(run, options.device) for name, run in runs.items()}
        for strategy, runs in both.items()
    }
    for strategy, runs in both.items():
        peaks, spent = memory[strategy], take_turns(runs, options.device, options.turns)
        agreement = spearmanr(runs["ours"]().cpu(), runs["theirs"]().cpu())[0]
        print(
            f"{strategy:12}{spent['ours']:14.2f}{spent['theirs']:14.2f}{spent['theirs'] / spent['ours']:14.2f}"
            f"{peaks['ours']:14.0f}{peaks['theirs']:14.0f}{agreement:14.6f}"
        )


# ---- 3. training steps -------------------------------------------------------------------------------------------


def training_steps(options: argparse.Namespace) -> None:
    print("\n3. A training step with AdamW, scores of its examples included, relative to one without")
    print(f"{'model':42}{'all layers':>12}{'MLP layers':>12}{'half the examples':>19}{'s/step':>9}")
    for hidden, layers, vocab, length, rows in options.steps:
        model = language_model(hidden, layers, vocab, options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": tokens.to(options.device), "labels": tokens.to(options.device)}
        body = {
            name: torch.randn(parameter.shape, device=options.device)
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and ".layers." in name
        }
        mlp = {name: value for name, value in body.items() if ".mlp." in name}
        half = TrainingStepScores(model, body, examples=max(1, rows // 2))
        kinds = {"": None, "all": TrainingStepScores(model, body), "mlp": TrainingStepScores(model, mlp), "half": half}
        runs: dict[str, Run] = {
            name: partial(training_step, model, optimizer, batch, scores) for name, scores in kinds.items()
        }
        spent = take_turns(runs, options.device, options.turns)
        name = f"width {hidden}, {layers} layers, vocab {vocab}, {rows} x {length}"
        shares = [spent[kind] / spent[""] for kind in ("all", "mlp", "half")]
        print(f"{name:42}{shares[0]:12.2f}{shares[1]:12.2f}{shares[2]:19.2f}{spent['']:9.3f}")


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, scores: TrainingStepScores | None
) -> None:
    optimizer.zero_grad()
    if scores is not None:
        scores.attach(batch)
    causal_lm_loss(model, batch).mean().backward()
    if scores is not None:
        scores.collect(mean_weights(batch, "examples"))
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--parts", default="123", help="which tables to make")
    options = parser.parse_args()
    options.steps = [(128, 4, 4096, 128, 8), (256, 4, 4096, 128, 8), (256, 4, 4096, 256, 4), (256, 4, 4096, 512, 1)]
    torch.set_num_threads(options.threads)
    torch.random.default_generator.manual_seed(0)
    warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap over fused attention: it is the point
    for part, make in (("1", engines), ("2", end_to_end), ("3", training_steps)):
        if part in options.parts:
            make(options)


if __name__ == "__main__":
    main()
