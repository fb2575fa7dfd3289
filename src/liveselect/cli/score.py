"""``liveselect score``: scores for every sequence of a pool, from a proxy model or from a column of numbers."""

import json
import logging
import os
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from torch import Tensor

from liveselect import distributed
from liveselect.callbacks.lines import show_lines
from liveselect.callbacks.progress import RoundProgress
from liveselect.cli.output import say
from liveselect.cli.score_column import column_scores
from liveselect.cli.score_job import WORK, ScoreJob
from liveselect.cli.score_method import MethodJob
from liveselect.cli.score_methods import METHODS, NEEDS_MODEL, build, check_settings
from liveselect.cli.score_proxy import clipping_of, load_proxy, proxy_optimizer, training_cost
from liveselect.cost import Cost, CostMeter
from liveselect.datamodules import TokenStore
from liveselect.grammar import CandidateSource, InfluenceEstimator, InfluenceRegressor, LiveModel, LossFn, Round, State
from liveselect.influence import PMPInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import EncoderRegressor
from liveselect.report.words import duration
from liveselect.scores import MANIFEST, Scores, join_scores, read_scores, write_scores

DESCRIPTION = """\
Score every sequence of a pool for `liveselect fit` to draw from: solve for the influence of some sequences on a proxy
model (PDS), fit a scorer that predicts it from text, and score the pool. The file of `liveselect fit` can be used
unchanged: its model section is the proxy, its data section the pool and the reference set.

A command that was stopped continues when it is repeated. torchrun distributes the work over processes.

  liveselect score --config run.yaml --ckpt_path proxy.ckpt --out scores/pds
  liveselect score --config run.yaml --ckpt_path proxy.ckpt --out scores/cheap \\
      --regressor liveselect.regressors.HashedRidgeRegressor
  torchrun --nproc-per-node 8 --no-python liveselect score --config run.yaml --ckpt_path proxy.ckpt --out scores/pds

Or score by one of the known methods; those that ask a model take it from the same file:

  liveselect score --config run.yaml --method ngram-ratio --out scores/ratio
  liveselect score --config run.yaml --ckpt_path proxy.ckpt --method tap --settings.steps 32 --out scores/tap
  liveselect score --config run.yaml --method bm25 --filter scores/unique --out scores/bm25

  {methods}

Or take numbers that came with the documents (an educational value, a perplexity), averaged over the tokens of each
sequence:

  liveselect score --pool pools/web --column edu_score --out scores/edu

Or join the parts that another engine made, Parquet files with the columns `id` and `score`:

  liveselect score --pool pools/web --parts parts/*.parquet --out scores/joined
""".replace("{methods}", ", ".join(METHODS))

log = logging.getLogger("liveselect")

CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
SCORES_PER_CHUNK = 1 << 22
"""Scores converted to float64 at a time, 32 MiB: a pool may have 10^9."""
RANK_TIMEOUT = timedelta(hours=12)
"""How long a process may wait for the shards of the others."""
PUBLISHED: dict[str, Any] = {"dynamics": "sgd", "learning_rate": 0.008, "batch_size": 256}
PUBLISHED["reference_weighting"] = "examples"
"""Arguments of PMPInfluence in the released code of PDS."""


class _Layout(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with the description's own line breaks."""


def parser() -> ArgumentParser:
    """Return the parser of the command."""
    result = ArgumentParser(prog="liveselect score", description=DESCRIPTION, formatter_class=_Layout)
    add = result.add_argument
    add("--config", action="config", help="a file of `liveselect fit`; later ones override settings of earlier ones")
    result.add_subclass_arguments(pl.LightningModule, "model", required=False, help="the proxy")
    result.add_subclass_arguments(pl.LightningDataModule, "data", required=False, help="the pool and the reference set")
    add("--ckpt_path", type=Path | None, default=None, help="checkpoint of the proxy, as the Trainer writes it")
    add("--out", type=Path, required=True, help="folder of the scores")
    add("--estimator", type=InfluenceEstimator | None, default=None, help="measures influence (default: as published)")
    add("--regressor", type=InfluenceRegressor | None, default=None, help="the scorer (default: a BERT encoder)")
    add("--probes", type=int, default=163_840, help="sequences measured")
    add("--loss_fn", type=LossFn | None, default=None, help="(module, batch) -> (B,) losses")
    add("--shard_size", type=int, default=65_536, help="sequences of a file of intermediate results")
    add("--device", type=str, default="auto", help="cpu, cuda, or auto")
    add("--seed", type=int, default=0, help="seed of all random draws")
    add("--method", type=str | None, default=None, help=f"score by this method: {', '.join(METHODS)}")
    add("--settings", type=dict | None, default=None, help="with --method: its settings, --settings.NAME VALUE")
    add("--filter", type=Path | None, default=None, help="scores of the same pool; what is -inf there, becomes -inf")
    add("--pool", type=Path | None, default=None, help="with --column or --parts: a pool of `liveselect prepare`")
    add("--parts", type=list[Path] | None, default=None, help="with --pool: Parquet files with columns id and score")
    add("--column", type=str | None, default=None, help="take this column of the documents' metadata as the scores")
    # not one option that takes a mapping, which a second file would replace; only clipping and accumulation are read
    result.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    for action in result._actions:  # they would fill two thirds of the help
        action.help = SUPPRESS if action.dest.startswith("trainer.") else action.help
    add("--select", type=dict | None, default=None, help="not read")
    add("--seed_everything", type=bool | int, default=0, help="not read")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    show_lines(always=True)
    command = parser()
    config = command.parse_args(list(argv))
    _refuse_together(config)
    if config.parts is not None:
        scores = _from_parts(config)
    elif config.column is not None or config.pool is not None:
        scores = _from_column(config)
    else:
        with _process_group(config.device):
            scores = _from_proxy(command, config) if config.method is None else _from_method(command, config)
    if int(os.environ.get("RANK", 0)) == 0:
        say(summary(config.out, scores))
    return 0


def summary(folder: Path, scores: Scores) -> str:
    """Return the number, moments and cost of the scores as text."""
    known, mean, std = moments(scores.values)
    lines = [f"{folder}", f"  {len(scores.values)} scores, mean {mean:.4g}, std {std:.4g}"]
    if known < len(scores.values):
        lines.append(f"  {len(scores.values) - known} sequences have no score and are never drawn")
    metrics = scores.about.get("metrics", {})
    if "spearman" in metrics:
        measured, spearman = scores.about["measured"], metrics["spearman"]
        lines.append(f"  held-out Spearman of the scorer: {spearman:.3f}, of {measured} measured sequences")
        if not spearman > 0:
            lines.append(
                "  NOT ABOVE CHANCE: a draw by these scores is no better than a random one. Measure more (--probes)"
            )
    seconds = scores.about.get("cost", {}).get("seconds", {})
    if seconds:
        longest = sorted(seconds.items(), key=lambda entry: -entry[1])[:4]
        parts = ", ".join(f"{phase} {duration(spent)}" for phase, spent in longest)
        lines.append(f"  took {duration(sum(seconds.values()))}: {parts}")
    lines.append(f"  draw from them: liveselect.callbacks.PDS(scores={str(folder)!r})")
    return "\n".join(lines)


def moments(values: Tensor) -> tuple[int, float, float]:
    """Return the number of ``values (n,)`` above -inf, their mean and standard deviation, in constant memory."""
    known, mean, squares = 0, 0.0, 0.0  # squares of distances from the mean
    for part in values.split(SCORES_PER_CHUNK):
        part = part[part > -torch.inf].double()
        if not len(part):
            continue
        delta, total = float(part.mean()) - mean, known + len(part)
        squares += float(part.var(correction=0)) * len(part) + delta**2 * known * len(part) / total
        mean, known = mean + delta * len(part) / total, total
    return known, mean, (squares / known) ** 0.5 if known else float("nan")


def _from_column(config: Namespace) -> Scores:
    if config.column is None or config.pool is None:
        raise ValueError("expected --pool together with --column: the prepared pool whose documents have the numbers")
    store = TokenStore(config.pool, verify=True)
    about = {"column": config.column, "mean_over": "tokens"}
    if (config.out / WORK).exists():
        raise FileExistsError(
            f"{config.out} holds the unfinished work of another job ({WORK}): finish it, or choose another folder"
        )
    if (config.out / MANIFEST).exists():
        scores = read_scores(config.out)
        if (scores.pool, dict(scores.about)) == (store.fingerprint, about):
            log.info("%s was made of the same column before: nothing to do", config.out)
            return scores
    return write_scores(config.out, column_scores(store, config.column), store.fingerprint, about)


def _from_parts(config: Namespace) -> Scores:
    if config.pool is None:
        raise ValueError("expected --pool together with --parts: the prepared pool whose candidates the parts are of")
    store = TokenStore(config.pool)
    return join_scores(config.out, config.parts, store.rows, store.fingerprint)


def _from_method(command: ArgumentParser, config: Namespace) -> Scores:
    asks_model = config.method in NEEDS_MODEL
    check_settings(config.method, config.settings or {})
    if config.data is None or (asks_model and config.model is None):
        needed = "a model and data" if asks_model else "data"
        raise ValueError(
            f"expected {needed} (the pool and the reference set) for {config.method}: pass --config with a file of "
            "`liveselect fit`"
        )
    made = instantiated(command, config)
    checkpoint = _loaded(made, config) if asks_model else {}
    round_ = _round(made, config, int(checkpoint.get("global_step", 0)))
    model = None
    if asks_model:
        made.data.check_model(made.model)
        with_moments = config.method == "less"  # the others ask the optimizer which parameters it trains
        sgd = torch.optim.SGD(made.model.parameters(), lr=1.0)
        model = _live(made, config, round_, proxy_optimizer(made.model, None, checkpoint) if with_moments else sgd)
    method = build(config.method, config.settings or {}, round_.source)
    return MethodJob(model=model, round=round_, method=method, **_of_every_job(config, checkpoint)).run()


def _from_proxy(command: ArgumentParser, config: Namespace) -> Scores:
    if config.model is None or config.data is None:
        raise ValueError(
            "expected a model (the proxy) and data (the pool and the reference set): pass --config with a file of "
            "`liveselect fit`, or --pool and --column to take numbers that came with the documents"
        )
    made = instantiated(command, config)
    checkpoint = _loaded(made, config)
    estimator = PMPInfluence(**PUBLISHED) if made.estimator is None else made.estimator
    round_ = _round(made, config, int(checkpoint.get("global_step", 0)))
    made.data.check_model(made.model)
    job = ScoreJob(
        model=_live(made, config, round_, proxy_optimizer(made.model, estimator, checkpoint)),
        round=round_,
        estimator=estimator,
        regressor=EncoderRegressor("bert-base-uncased") if made.regressor is None else made.regressor,
        probes=config.probes,
        **_of_every_job(config, checkpoint),
    )
    return job.run()


def _loaded(made: Namespace, config: Namespace) -> State:
    """Load the checkpoint into the model, move it to the device, and return the checkpoint."""
    checkpoint = load_proxy(made.model, config.ckpt_path)
    if config.ckpt_path is None and distributed.rank() == 0:
        log.warning("no --ckpt_path: the proxy is as its configuration builds it, untrained unless that loads weights")
    made.model.to(_device(config.device))
    return checkpoint


def _round(made: Namespace, config: Namespace, step: int) -> Round:
    made.data.setup("fit")
    if not isinstance(made.data, CandidateSource):
        raise ValueError(
            f"expected data that serves candidates, a SelectionDataModule, got {type(made.data).__name__}: wrap it "
            "with liveselect.datamodules.SelectionDataModule"
        )
    meter = CostMeter()
    if distributed.rank() == 0:
        meter.progress = RoundProgress("liveselect score")
    return Round(
        index=0,
        step=step,
        seed=config.seed,
        candidates=torch.arange(made.data.pool.size),
        source=made.data,
        device=_device(config.device),
        meter=meter,
    )


def _live(made: Namespace, config: Namespace, round_: Round, optimizer: torch.optim.Optimizer) -> LiveModel:
    return LiveModel(
        module=made.model,
        optimizer=optimizer,
        loss_fn=made.loss_fn or causal_lm_loss,
        global_batch=made.data.batch_size * int(_trainer(config).accumulate_grad_batches),
        clip_gradients=clipping_of(_trainer(config)),
        meter=round_.meter,
    )


class _OfEveryJob(TypedDict):
    folder: Path
    shard_size: int
    settings: dict[str, Any]
    cost: Cost
    report: Callable[[str], None]
    dropped: Scores | None


def _of_every_job(config: Namespace, checkpoint: State) -> _OfEveryJob:
    return {
        "folder": config.out,
        "shard_size": config.shard_size,
        "settings": _settings(config),
        "cost": training_cost(checkpoint),
        "report": log.info if distributed.rank() == 0 else lambda line: None,
        "dropped": None if config.filter is None else read_scores(config.filter),
    }


def _refuse_together(config: Namespace) -> None:
    """Raise ValueError for options that do not belong together."""
    given = [name for name in ("method", "column", "parts") if config[name] is not None]
    if len(given) > 1:
        raise ValueError(f"expected one of --method, --column and --parts, got {given}")
    if config.settings is not None and config.method is None:
        raise ValueError("expected --method together with --settings, which are the settings of a method")
    if config.filter is not None and given in (["column"], ["parts"]):
        raise ValueError(f"--filter does not apply to --{given[0]}: filter what a method or a proxy scores")
    if config.method is not None and config.pool is not None:
        raise ValueError("expected --config with a data section for --method, got --pool: it goes with --column")


def instantiated(command: ArgumentParser, config: Namespace) -> Namespace:
    """Return the configuration with its objects built."""
    build = getattr(command, "instantiate", None) or command.instantiate_classes  # the name until jsonargparse 4.49
    made: Namespace = build(config)
    return made


def _trainer(config: Namespace) -> Namespace:
    """Return what is read of the Trainer's section, which a file need not have."""
    defaults = {"accumulate_grad_batches": 1, **dict.fromkeys(CLIPPING)}
    return Namespace({**defaults, **vars(config.get("trainer") or Namespace())})


def _settings(config: Namespace) -> dict[str, Any]:
    """Return the settings that the scores depend on, as builtins."""
    left_out = {"config", "out", "device", "trainer", "select", "seed_everything", "pool", "column"}
    left_out |= {"method", "settings", "filter", "parts"}  # kept as what they stand for
    settings = {name: value for name, value in config.clone().as_dict().items() if name not in left_out}
    settings["clipping"] = {name: _trainer(config)[name] for name in CLIPPING}
    return dict(json.loads(json.dumps(settings, default=str)))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("expected --device=cpu or auto on this machine, got cuda: PyTorch finds no CUDA device")
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected --device=auto, cpu, cuda or cuda:N, got {name!r}: {error}") from None
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """Join the other processes if torchrun started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if _device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
