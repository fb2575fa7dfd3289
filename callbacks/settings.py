"""What selection was set to, so that a resumed run can say what has changed."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn

from liveselect.grammar import InfluenceEstimator, LossFn, Part, SelectionWarning, Selector, State
from liveselect.parts import check_keys, check_part


def check_arguments(
    selector: Selector,
    estimator: InfluenceEstimator | None,
    every_n_steps: int,
    warmup_rounds: int,
    loss_fn: LossFn | None,
) -> None:
    """Raise TypeError or ValueError for what cannot be the parts and the rounds of a run."""
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
        raise ValueError(f"expected every_n_steps of at least one optimizer step, got {every_n_steps}")
    if not isinstance(warmup_rounds, int) or warmup_rounds < 0:
        raise ValueError(f"expected warmup_rounds of zero or more, got {warmup_rounds}")
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


def settings_of(parts: Mapping[str, object]) -> dict[str, str]:
    """Return the settings of some parts as text, by dotted name.

    A part is named by its class, and by the arguments of its constructor that it keeps under their names, where they
    are plain values; parts inside a part likewise. What a part learns is no setting.
    """
    found: dict[str, str] = {}
    for name, part in parts.items():
        if _is_plain(part):
            found[name] = repr(part)
            continue
        found[name] = getattr(part, "__qualname__", type(part).__qualname__)
        if hasattr(part, "__dict__") and not inspect.isroutine(part) and not inspect.isclass(part):
            kept = {argument: vars(part)[argument] for argument in _arguments(part) if argument in vars(part)}
            # of other objects only those that are parts of selection; a data set or a model is none
            inner = {key: value for key, value in kept.items() if _is_plain(value) or isinstance(value, Part)}
            found.update({f"{name}.{key}": value for key, value in settings_of(inner).items()})
    return found


@contextmanager
def damage_reported() -> Iterator[None]:
    """Open a block in which state is restored; what is missing in it raises ValueError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the selection state of the checkpoint cannot be read ({type(error).__name__}: {error}): it was damaged, "
            "or a part has changed. Resume from an earlier checkpoint, or start a new run from the model's weights"
        ) from error


def check_saved(state: State, version: int, seed: int, settings: Mapping[str, str]) -> bool:
    """Raise ValueError for selection state of another version, and warn of another seed and of changed settings.

    Returns:
        Whether anything has changed.

    Args:
        state: of a checkpoint.
        version: of the state that this code writes.
        seed: of this run.
        settings: of this run.
    """
    if (found := state.get("version", 1)) != version:
        raise ValueError(
            f"the checkpoint holds selection state of version {found} (1 is that of liveselect 0.1), and this is "
            f"version {version}, whose rounds differ: resume with the liveselect that wrote it, or start a new run "
            "from the model's weights (trainer.fit without ckpt_path)"
        )
    check_keys(
        state,
        {"version", "seed", "settings", "global_batch", "conditions", "run", "overhearing", "random_states"},
        "entry of DataSelection",
    )
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


def _arguments(part: object) -> list[str]:
    try:
        return list(inspect.signature(type(part)).parameters)
    except (TypeError, ValueError):  # of a compiled class
        return []


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
