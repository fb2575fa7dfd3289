"""Tries models, optimizers and features of the Trainer with the estimators, and writes what came out as a page.

    python tests/compatibility.py               # writes docs/compatibility.md; some ten minutes
    python tests/compatibility.py Optimizers    # one table of it

A cell says ``exact`` where the numbers are those of a definition that is computed here by other means, with copies of
the model and plain autograd, one candidate at a time.
"""

import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
import transformers
from cases import VOCABULARY, Bigrams
from device_runs import CompiledLM, ShardedLM, trained
from fakes import Context, fake_context, random_source
from families import CONFIGURATIONS, FAMILIES, build
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_ranks import batches, fit, on_lightning_ranks
from small_run import ProbingUniform, SmallLM
from torch import Tensor, nn

from liveselect.callbacks import DataSelection
from liveselect.functional.several_optimizers import SeveralOptimizers, each_of
from liveselect.grammar import InfluenceEstimator, NotMeasurableError
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.influence.pmp.unroll import unrolled_ids
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
CANDIDATES = 3
RATE = 0.005  # of the unroll: models with random weights are unstable at much larger ones
Row = dict[str, str]

# ---- cells -------------------------------------------------------------------------------------------------------


def refusal(error: BaseException) -> str:
    """A refusal in a few words: what helps, as the message says it."""
    said = str(error)
    cures = (
        r'products="central_difference"', r'hessian="central_difference"', r'engine="central_difference"',
        r'engine="optimizer_step"', r"loss_fn", r"bf16-mixed", r"bf16-true", r"EMAWeightAveraging", r"OneStepInfluence",
        r'dynamics="sgd"',
        r"set its lr", r"without selection", r"fixed number", r"overfit_batches", r"exclude",
    )  # fmt: skip
    found = next((re.search(cure, said) for cure in cures if re.search(cure, said)), None)
    return "refused" if found is None else f"refused: `{found.group()}`"


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def alike(found: Tensor, expected: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.double(), expected.double()]))[0, 1])


def graded(found: Tensor, expected: Tensor, tolerance: float) -> str:
    if not found.isfinite().all():
        return "not finite"
    if off(found, expected) < tolerance:
        return "exact"
    return "close" if alike(found, expected) > 0.95 else "weak"


def tried(cell: Callable[[], str]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cell()
    except (ValueError, TypeError, RuntimeError, NotMeasurableError, MisconfigurationException) as error:
        return refusal(error)


def measured(context: Context, estimator: InfluenceEstimator) -> Tensor:
    """Check, fit and score as the engine does."""
    context.check(estimator)
    context.fit(estimator)
    return context.score_ids(estimator, torch.arange(CANDIDATES)).double()


# ---- what the numbers are by definition --------------------------------------------------------------------------


def gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(causal_lm_loss(model, batch).mean(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def rows_of(context: Context, ids: Iterable[int]) -> Mapping[str, Tensor]:
    return next(context.round.batches(torch.as_tensor(list(ids))))


def products(context: Context, direction: Mapping[str, Tensor]) -> Tensor:
    """The product of a direction with the gradient of every candidate, formed as a whole."""
    found = []
    for each in range(CANDIDATES):
        own = gradients(context.model, rows_of(context, [each]))
        found.append(sum(float((own[name] * value).sum()) for name, value in direction.items() if name in own))
    return torch.tensor(found, dtype=torch.float64)


def reference_loss(context: Context, model: nn.Module) -> float:
    with torch.no_grad():
        return float(causal_lm_loss(model, next(context.source.reference())).mean())


def copied(context: Context) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    reference_loss(context, context.model)  # what models keep of their last call must be no part of a graph
    found: tuple[nn.Module, list[torch.optim.Optimizer]] = copy.deepcopy((context.model, each_of(context.optimizer)))
    return found


def stepped(context: Context) -> Tensor:
    """The fall of the reference loss by a real step on a candidate in a batch, taken with copies."""
    size, rate = context.live.global_batch, context.optimizer.param_groups[0]["lr"]

    def after(candidate: int | None) -> float:
        model, optimizers = copied(context)
        found = {} if candidate is None else gradients(model, rows_of(context, [candidate]))
        for name, parameter in model.named_parameters():
            parameter.grad = found[name] / size if name in found else torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        return reference_loss(context, model)

    base = after(None)
    return torch.tensor([size * (base - after(each)) / float(rate) for each in range(CANDIDATES)], dtype=torch.float64)


def unrolled(context: Context, steps: int, batch: int, rate: float, weight: float = 1e-2) -> Tensor:
    """The derivative of all later reference losses in the weight of a candidate in the first of some steps of SGD."""
    ids = unrolled_ids(context.round, steps, batch)

    def later(candidate: int, weight: float) -> float:
        model, total = copied(context)[0], 0.0
        for index, each in enumerate(ids):
            found = gradients(model, rows_of(context, each.tolist()))
            more = gradients(model, rows_of(context, [candidate])) if index == 0 else {}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in found:
                        parameter.sub_(rate * (found[name] + weight * more.get(name, torch.zeros_like(parameter))))
            total += reference_loss(context, model)
        return total

    slopes = [(later(each, -weight) - later(each, weight)) / (2 * weight * rate) for each in range(CANDIDATES)]
    return torch.tensor(slopes, dtype=torch.float64)


# ---- models ------------------------------------------------------------------------------------------------------

ESTIMATORS = {
    "one step": partial(OneStepInfluence, step="in_batch"),
    "first order": FirstOrderInfluence,
    "its differences": partial(FirstOrderInfluence, engine="central_difference"),
    "K-FAC": partial(KFACInfluence, factor_examples=8),
    "PMP": partial(PMPInfluence, steps=2, score_every=2, dynamics="sgd", learning_rate=RATE, batch_size=3),
}
LIKE_LLAMA = [
    "Llama, tied",
    "Qwen2",
    "Gemma 2",
    "Phi-3",
    "OLMo 2",
    "SmolLM3",
    "BLOOM",
    "Qwen2-MoE",
    "OLMoE",
    "time first",
]
"""What differs from others of the table in nothing that matters here; tests/functional/test_families.py has them."""

MODELS = [name for name in FAMILIES if name not in LIKE_LLAMA] + [
    "Llama with LoRA",
    "Llama, checkpointed",
    "Llama, tied, with padding",
    "T5",
]


def _model(name: str) -> nn.Module:
    if name == "T5":
        config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(config).double()
    if name == "Llama, checkpointed":
        model = build("Llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    if name == "Llama, tied, with padding":
        settings = {**CONFIGURATIONS["Llama, tied"][1], "pad_token_id": 0}
        torch.random.default_generator.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).double()
    if name == "Llama with LoRA":
        import peft

        targets = ["q_proj", "v_proj", "down_proj"]
        torch.random.default_generator.manual_seed(0)
        wanted = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(build("Llama"), wanted).double()
    return build(name)


def _warm(model: nn.Module, optimizer: torch.optim.Optimizer) -> Context:
    """Three real steps, and the round after them."""
    source = random_source(candidates=16, length=9, vocab=VOCABULARY)
    context = fake_context(source, model=model, optimizer=optimizer)
    try:
        for index in range(3):
            optimizer.zero_grad()
            causal_lm_loss(model, rows_of(context, range(4 + 4 * index, 8 + 4 * index))).mean().backward()
            optimizer.step()
    except TypeError:
        pass  # the estimators will say the same
    optimizer.zero_grad()
    return context


def model_cell(context: Context, name: str) -> str:
    estimator = ESTIMATORS[name]()
    if name == "PMP":
        found = measured(context, estimator)
        return graded(found, unrolled(context, 2, 3, RATE), 2e-2)
    found = measured(context, estimator)
    if name == "one step":
        return graded(found, stepped(context), 1e-2)
    direction = estimator.direction()
    word = graded(found, products(context, direction), 1e-3)
    if name != "K-FAC":
        return word
    trained = sum(p.numel() for p in context.model.parameters() if p.requires_grad)
    return f"{word}, of {sum(value.numel() for value in direction.values()) / trained:.0%}"


def models(names: Iterable[str] = MODELS, estimators: Iterable[str] = tuple(ESTIMATORS)) -> dict[str, Row]:
    table = {}
    for name in names:
        model = _model(name)
        context = _warm(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3))
        table[name] = {each: tried(partial(model_cell, context, each)) for each in estimators}
    return table


# ---- optimizers --------------------------------------------------------------------------------------------------


def _pair(model: nn.Module) -> torch.optim.Optimizer:
    inner = [model.hidden.weight]
    others = [p for p in model.parameters() if p is not model.hidden.weight]
    return SeveralOptimizers([torch.optim.Muon(inner, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)])


def _of(kind: type[torch.optim.Optimizer], **settings: object) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kind(model.parameters(), **{"lr": 1e-3, **settings})


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": _of(torch.optim.SGD, lr=1e-2),
    "SGD, momentum": _of(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "Adam": _of(torch.optim.Adam),
    "Adam, amsgrad": _of(torch.optim.Adam, amsgrad=True),
    "AdamW": _of(torch.optim.AdamW),
    "AdamW, foreach": _of(torch.optim.AdamW, foreach=True),
    "AdamW, fused": _of(torch.optim.AdamW, fused=True),
    "NAdam": _of(torch.optim.NAdam),
    "RAdam": _of(torch.optim.RAdam),
    "Adamax": _of(torch.optim.Adamax),
    "Adagrad": _of(torch.optim.Adagrad),
    "Adadelta": _of(torch.optim.Adadelta, lr=0.1),
    "RMSprop": _of(torch.optim.RMSprop),
    "Rprop": _of(torch.optim.Rprop),
    "ASGD": _of(torch.optim.ASGD, lr=1e-2),
    "Adafactor of torch": _of(torch.optim.Adafactor),
    "Adafactor of transformers": lambda model: transformers.optimization.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False
    ),
    "Adafactor without a rate": lambda model: transformers.optimization.Adafactor(model.parameters()),
    "Muon and AdamW": _pair,
    "LBFGS": _of(torch.optim.LBFGS),
}
STEPPED = {
    "one step": partial(OneStepInfluence, step="in_batch"),
    "first order": FirstOrderInfluence,
    'engine="optimizer_step"': partial(FirstOrderInfluence, engine="optimizer_step"),
    "K-FAC": partial(KFACInfluence, factor_examples=8),
    "PMP, live": partial(PMPInfluence, steps=2, score_every=2, batch_size=3),
}


def optimizer_cell(context: Context, name: str) -> str:
    estimator = STEPPED[name]()
    found = measured(context, estimator)
    if name == "K-FAC":
        return graded(found, products(context, estimator.direction()), 1e-3)
    if name == "PMP, live":
        return "yes" if found.isfinite().all() else "not finite"
    return graded(found, stepped(context), 1e-4)


def optimizers(names: Iterable[str] = tuple(OPTIMIZERS)) -> dict[str, Row]:
    table = {}
    for name in names:
        model = Bigrams().double()
        try:
            context = _warm(model, OPTIMIZERS[name](model))
        except (TypeError, RuntimeError):
            source = random_source(candidates=16, length=9, vocab=VOCABULARY)
            context = fake_context(source, model=model, optimizer=OPTIMIZERS[name](model))
        table[name] = {each: tried(partial(optimizer_cell, context, each)) for each in STEPPED}
    return table


# ---- features of the Trainer -------------------------------------------------------------------------------------


class Ema(EMAWeightAveraging):
    def __init__(self) -> None:
        super().__init__(decay=0.9)


class CheckpointedLM(SmallLM):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


# name -> settings of the Trainer, and the module where it is another
FEATURES: dict[str, tuple[dict[str, object], type[pl.LightningModule]]] = {
    'precision="32-true"': ({}, SmallLM),
    'precision="64-true"': ({"precision": "64-true"}, SmallLM),
    'precision="bf16-mixed"': ({"precision": "bf16-mixed"}, SmallLM),
    'precision="bf16-true"': ({"precision": "bf16-true"}, SmallLM),
    'precision="16-true"': ({"precision": "16-true"}, SmallLM),
    "accumulate_grad_batches=2": ({"accumulate_grad_batches": 2, "max_steps": 4}, SmallLM),
    "gradient_clip_val, by norm": ({"gradient_clip_val": 0.5}, SmallLM),
    "gradient_clip_val, by value": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, SmallLM),
    "torch.compile": ({}, CompiledLM),
    "activation checkpointing": ({}, CheckpointedLM),
    "validation inside a round": (
        {"val_check_interval": 1, "limit_val_batches": 1, "check_val_every_n_epoch": None},
        SmallLM,
    ),
    "limit_train_batches": ({"limit_train_batches": 4, "max_epochs": 2, "max_steps": -1}, SmallLM),
    "max_time": ({"max_time": "00:01:00:00"}, SmallLM),
    "detect_anomaly": ({"detect_anomaly": True}, SmallLM),
    "profiler": ({"profiler": "simple"}, SmallLM),
    "reload_dataloaders_every_n_epochs": ({"reload_dataloaders_every_n_epochs": 1}, SmallLM),
    "fast_dev_run": ({"fast_dev_run": 3}, SmallLM),
    "barebones": ({"barebones": True}, SmallLM),
    "EMAWeightAveraging": ({"callbacks": [Ema]}, SmallLM),
    "StochasticWeightAveraging": (
        {"callbacks": [partial(StochasticWeightAveraging, 1e-3, swa_epoch_start=1)]},
        SmallLM,
    ),
    "GradientAccumulationScheduler": ({"callbacks": [partial(GradientAccumulationScheduler, {0: 1})]}, SmallLM),
    "overfit_batches": ({"overfit_batches": 2}, SmallLM),
    "ModelParallelStrategy (FSDP2), one device": (
        {"strategy": partial(ModelParallelStrategy, data_parallel_size=1, tensor_parallel_size=1)},
        ShardedLM,
    ),
}
PROBES = {"one step": partial(OneStepInfluence, step="in_batch"), "first order": FirstOrderInfluence}
STRATEGIES = {
    "DDP, two ranks": "ddp",
    "FSDPStrategy (FSDP1), two ranks": "fsdp",
    "ModelParallelStrategy (FSDP2), two ranks": "fsdp2",
}


def feature_cell(name: str, probe: str) -> str:
    """Whether a run that measures trains like one that does not, to the bit, and what it measured is finite."""
    given, module = FEATURES[name]

    def run(estimator: InfluenceEstimator | None) -> tuple[list[object], list[Tensor]]:
        settings = {key: value() if isinstance(value, partial) else value for key, value in given.items()}
        settings["callbacks"] = [make() for make in settings.get("callbacks", [])]
        if settings.get("barebones"):
            settings |= {"enable_checkpointing": None, "enable_progress_bar": None, "logger": None}
            settings |= {"enable_model_summary": None, "limit_val_batches": None}
        selector = UniformSelector() if estimator is None else ProbingUniform()
        with tempfile.TemporaryDirectory() as folder:
            seen, _ = trained(Path(folder), "cpu", selector, estimator, module, 0.0, **settings)
        return seen, getattr(selector, "influence", [])

    off, on = run(None), run(PROBES[probe]())
    if on[0] != off[0]:
        return "changes training"
    return "exact" if on[1] and all(each.isfinite().all() for each in on[1]) else "not finite"


def features(names: Iterable[str] = tuple(FEATURES)) -> dict[str, Row]:
    return {name: {probe: tried(partial(feature_cell, name, probe)) for probe in PROBES} for name in names}


def _selection(probe: str, folder: Path) -> DataSelection:
    selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
    return DataSelection(selector, PROBES[probe](), every_n_steps=2, dirpath=folder)


def _ranked(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for name, strategy in STRATEGIES.items():
        for probe in PROBES:
            place = folder / strategy / probe
            try:
                found.setdefault(name, {})[probe] = fit(place, _selection(probe, place), strategy, max_steps=4)
            except TypeError as error:
                found.setdefault(name, {})[probe] = refusal(error)
    return found


def strategies() -> dict[str, Row]:
    """Two ranks over gloo against one process: the same choices and the same influence."""
    table: dict[str, Row] = {name: {} for name in STRATEGIES}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        ranks = on_lightning_ranks(_ranked, 2, folder)
        for probe in PROBES:
            alone = fit(folder / probe, _selection(probe, folder / probe), None, max_steps=4)
            for name in STRATEGIES:
                runs = [rank[name][probe] for rank in ranks]
                if isinstance(runs[0], str):
                    table[name][probe] = runs[0]
                    continue
                same = batches(runs) == batches([alone])
                pairs = zip(alone["rounds"], runs[0]["rounds"], strict=True)
                close = all(
                    torch.allclose(torch.tensor(b[2]), torch.tensor(a[2]), rtol=1e-4, atol=1e-6) for a, b in pairs
                )
                table[name][probe] = "exact" if same and close else "differs"
    return table


# ---- the page ----------------------------------------------------------------------------------------------------

INTRODUCTION = """# Compatibility

What was tried with what, on the smallest models, in double precision where the device has it. A test runs every cell
and holds this page to what came out; `python tests/compatibility.py` writes it.

- **exact**: the numbers are those of the definition, computed for each candidate by itself with copies of the model
  and plain autograd, within rounding. For `K-FAC` the share of the trained parameters follows that its factors cover.
- **close**: not the same number, but correlated with it by more than 0.95 (differences of losses round; a step that
  saturates has no one slope). **weak**: less than that. Routers choose other experts when a model is moved, and
  differences see the jump.
- **refused**: a message says why, before training where it can, and what helps: the words after the colon.
"""
SECTIONS = {
    "Models": """Models of transformers unless they say otherwise: two layers, a width of 16, AdamW after three steps.
`first order` is `FirstOrderInfluence()`: its products with single gradients are exact for every layer that can be
computed once more and differentiated, wherever its parameters stand. `its differences` is the same with
`engine="central_difference"`. `PMP` is `PMPInfluence` over two steps of plain SGD. It differentiates twice, and checks
that: a tied embedding with a padding row, and parts in float32 inside of a float64 model, fail the check.""",
    "Optimizers": """A model of three layers, after three steps. `first order` takes the optimizer's step coordinate by
coordinate; `engine="optimizer_step"` takes it as it is. Both are linear in the reference loss, and the truth, a real
step, is not.""",
    "Features of the Trainer": """`exact`: a run that measures in every round trains on the same candidates to the same
weights, to the bit, as one that does not measure.""",
    "Several ranks": "`exact`: two ranks over gloo choose and measure what one process does.",
}


MAKERS: dict[str, Callable[[], dict[str, Row]]] = {
    "Models": models,
    "Optimizers": optimizers,
    "Features of the Trainer": features,
    "Several ranks": strategies,
}


def table_of(rows: Mapping[str, Row]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(row[column] for column in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def page_of(found: Mapping[str, Mapping[str, Row]]) -> str:
    parts = [INTRODUCTION]
    for title, rows in found.items():
        parts.append(f"## {title}\n\n{SECTIONS[title]}\n\n{table_of(rows)}\n")
    return "\n".join(parts)


def written(page: Path = PAGE) -> dict[str, dict[str, Row]]:
    """Read the tables of the page back, by title, first column and head of the column."""
    found: dict[str, dict[str, Row]] = {}
    columns: list[str] = []
    title = ""
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            title, columns = line.removeprefix("## "), []
        elif line.startswith("| ") and title:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not columns:
                columns = cells[1:]
            elif not cells[0].startswith("---"):
                found.setdefault(title, {})[cells[0]] = dict(zip(columns, cells[1:], strict=True))
    return found


def write(titles: Iterable[str]) -> None:
    """Make the named tables, and keep the others."""
    found = written() if PAGE.exists() else {}
    for title in titles:
        found[title] = MAKERS[title]()
    PAGE.write_text(page_of({title: found[title] for title in MAKERS if title in found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:] or list(MAKERS)
    for title in sorted(wanted, key=lambda title: title != "Several ranks"):  # a process that has trained must not fork
        write([title])
    sys.stdout.write(f"wrote {PAGE}\n")
