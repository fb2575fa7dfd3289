"""What selection was set to, so that a resumed run can say what has changed."""

import inspect
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.grammar import (
    CandidateSource,
    InfluenceEstimator,
    LossFn,
    Named,
    Part,
    SelectionWarning,
    Selector,
    State,
    as_setting,
    given_to,
)
from liveselect.parts import check_keys, check_part, digest_of

DEFAULT_LOGGER_NAME = "lightning_logs"
"""How Lightning calls a logger that the user has not named."""

DIGEST = "digest"
"""The key of a hash of all the other entries."""

_NOT_AS_WRITTEN = (
    "the entry of DataSelection in the checkpoint is not what was written: it was damaged or changed. Resume from an "
    "earlier checkpoint, or start a new run from the model's weights"
)


def check_digest(state: State) -> None:
    """Raise ValueError when a checkpoint's entry is not what was written; a file of PyTorch has no check that is used.

    Last, because other checks can say what is wrong.
    """
    if not _is_as_written(state):
        raise ValueError(_NOT_AS_WRITTEN)


def _is_as_written(state: State) -> bool:
    return digest_of({key: value for key, value in state.items() if key != DIGEST}) == state[DIGEST]


def check_arguments(
    selector: Selector,
    estimator: InfluenceEstimator | None,
    every_n_steps: int,
    warmup_rounds: int,
    loss_fn: LossFn | None,
    most_rejected: int,
) -> None:
    """Raise TypeError or ValueError for what cannot be the parts and the rounds of a run."""
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
        raise ValueError(f"expected every_n_steps of at least one optimizer step, got {every_n_steps}")
    if not isinstance(warmup_rounds, int) or warmup_rounds < 0:
        raise ValueError(f"expected warmup_rounds of zero or more, got {warmup_rounds}")
    if not isinstance(most_rejected, int) or isinstance(most_rejected, bool) or most_rejected < 0:
        raise ValueError(f"expected most_rejected of zero or more candidates, got {most_rejected}")
    if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
        hint = f": pass {loss_fn.__name__}(...)" if isinstance(loss_fn, type) else ""
        raise TypeError(f"expected loss_fn to be a function (module, batch) -> (B,) losses, got {loss_fn!r}{hint}")
    check_part(selector, Selector, "selector")
    if estimator is not None:
        check_part(estimator, InfluenceEstimator, "estimator")


def check_measures(selector: Selector, estimator: InfluenceEstimator | None) -> None:
    """Raise ValueError when the selector wants measurements, and there is no estimator."""
    if estimator is None and selector.needs_estimator:
        raise ValueError(
            f"{type(selector).__name__} proposes candidates to measure, but there is no estimator: pass one, such "
            "as liveselect.influence.OneStepInfluence()"
        )


def settings_of(parts: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of some parts by dotted name, as values that JSON knows.

    A part is named by its class, and by what its constructor was given; parts inside a part likewise, also where they
    stand in a mapping or a list. An argument that a part keeps under its own name counts as it is now. What a part
    learns is no setting.
    """
    found: dict[str, object] = {}
    for name, part in parts.items():
        value = as_setting(part)
        inside = _inside(value)
        found[name] = Named(type(value).__qualname__) if inside is not None else value
        if inside is not None:
            found.update({f"{name}.{key}": each for key, each in settings_of(inside).items()})
    return found


def _inside(value: object) -> Mapping[str, object] | None:
    """Return what a part was given, or what a collection with parts holds; None for a plain value."""
    if isinstance(value, Part):
        kept = vars(value)
        return {argument: kept.get(argument, given) for argument, given in _given(value).items()}
    items = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
    has_parts = any(isinstance(each, Part | Mapping | list) and _inside(each) is not None for each in items.values())
    return {str(name): each for name, each in items.items()} if has_parts else None


def _given(part: Part) -> Mapping[str, object]:
    """Return what a part was given; one whose constructor a decorator has made keeps it under the arguments' names."""
    if given := given_to(part):
        return given
    kept, names = vars(part), list[str]()
    with suppress(TypeError, ValueError):  # a compiled class has no signature
        names = list(inspect.signature(type(part)).parameters)
    return {name: kept[name] for name in names if name in kept}


def as_text(settings: Mapping[str, object]) -> dict[str, str]:
    """Return settings as texts that can be compared: classes and functions by name, values as Python writes them."""
    return {name: str(value) if isinstance(value, Named) else repr(value) for name, value in settings.items()}


def facts_of(trainer: pl.Trainer, module: pl.LightningModule, source: CandidateSource) -> dict[str, object]:
    """Return what else a run is made of: its data, sizes, precision and versions."""
    names = ("liveselect", "torch", "lightning", "transformers", "numpy")
    window, ranks = trainer.accumulate_grad_batches, trainer.world_size
    return {
        "pool": source.pool.fingerprint,
        "pool.candidates": source.pool.size,
        "pool.groups": len(source.pool.group_names),
        "reference": source.reference_fingerprint,
        "reference.examples": source.reference_examples,
        "batch_size": source.batch_size,
        "ranks": ranks,
        "accumulate_grad_batches": window,
        "global_batch": source.batch_size * ranks * window,
        "max_steps": trainer.max_steps,
        "model": type(module).__qualname__,
        "model.parameters": sum(parameter.numel() for parameter in module.parameters()),
        "optimizer": " and ".join(type(each).__qualname__ for each in trainer.optimizers),
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__qualname__,
        "device": str(trainer.strategy.root_device.type),
        "device.name": _device_name(trainer.strategy.root_device),
        "name": _run_name(trainer),
        **{f"versions.{name}": version(name) for name in names},
        "versions.python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" if device.type == "cpu" else device.type


def _run_name(trainer: pl.Trainer) -> str:
    """Return what the user calls the run: its name in W&B, or the name of its logger; empty for none."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            name = getattr(logger.experiment, "name", None)  # disabled runs, and those of other ranks, have none
            if isinstance(name, str) and name:
                return name
        elif logger.name and logger.name != DEFAULT_LOGGER_NAME:
            return f"{logger.name}/{logger.version}" if logger.version is not None else str(logger.name)
    return ""


@contextmanager
def damage_reported(state: State) -> Iterator[None]:
    """Open a block in which ``state`` is restored; whatever is raised in it becomes a ValueError that says what to do.

    A sentence of a part stays as it is, and a note says so where the state is not what was written.
    """
    try:
        yield
    except ValueError as error:
        if not _is_as_written(state):
            error.add_note(_NOT_AS_WRITTEN)
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # parts of a user's own, too, take what they are given apart
        raise ValueError(
            f"the selection state of the checkpoint cannot be read ({type(error).__name__}: {error}): it was damaged, "
            "or a part has changed. Resume from an earlier checkpoint, or start a new run from the model's weights"
        ) from error


def check_saved(state: State, version: int, seed: int, settings: Mapping[str, str], keys: Collection[str]) -> bool:
    """Raise ValueError for selection state of another version, and warn of another seed and of changed settings.

    Returns:
        Whether anything has changed.

    Args:
        state: of a checkpoint.
        version: of the state that this code writes.
        seed: of this run.
        settings: of this run.
        keys: what the entry holds beside its version, seed and settings.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("settings", {}), Mapping):
        raise ValueError(
            f"expected the checkpoint to hold selection state with its settings, got a {type(state).__name__} that "
            "does not: it was damaged or changed. Resume from another checkpoint"
        )
    if (found := state.get("version", 1)) != version:
        raise ValueError(
            f"the checkpoint holds selection state of version {found} (1 is that of liveselect 0.1), and this is "
            f"version {version}, whose rounds differ: resume with the liveselect that wrote it, or start a new run "
            "from the model's weights (trainer.fit without ckpt_path)"
        )
    check_keys(state, {"version", "seed", "settings", DIGEST, *keys}, "entry of DataSelection")
    if state["seed"] != seed:
        rank_zero_warn(
            f"the checkpoint was made with selection seed {state['seed']}, this run uses {seed}: "
            "rounds to come will differ from those of the original run",
            category=SelectionWarning,
        )
    if not state["random_states"]:
        raise ValueError("the entry of DataSelection in the checkpoint holds no random states: it was damaged")
    if changed := changes(state["settings"], settings):
        rank_zero_warn(
            f"selection is resumed with other settings than those of the checkpoint: {'; '.join(changed)}. Rounds "
            "to come follow what is set now, and differ from those of the original run",
            category=SelectionWarning,
        )
    return bool(changed) or state["seed"] != seed


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what differs, one text each; a setting that only one of them knows has come or gone with its part."""
    return [
        f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
