"""What a run leaves behind: its ledger, and the numbers of its rounds in the loggers. Nothing here ends a training."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from liveselect import distributed
from liveselect.callbacks.lines import round_line
from liveselect.decisions import carry_decisions
from liveselect.grammar import SelectionWarning
from liveselect.json_lines import whole_file
from liveselect.ledger import Ledger, RoundRecord, writable
from liveselect.looking import only_looking
from liveselect.plan import Plan
from liveselect.rounds import SelectionRun
from liveselect.verdict.answer import Answer

log = logging.getLogger("liveselect")


class LogsRounds:
    """Marks a callback that sends the numbers of rounds to the loggers itself."""


def log_settings(trainer: pl.Trainer, about: Mapping[str, object]) -> None:
    """Add what selection is set to to the configuration of every logger, under ``selection``."""
    for logger in trainer.loggers:
        with only_looking(f"{type(logger).__name__} failed on the settings of selection"):
            settings: dict[str, object] = {"selection": dict(about)}
            if isinstance(logger, TensorBoardLogger):  # it shows what was logged last, so the module's own come along
                settings = {**logger.hparams, **settings}
            logger.log_hyperparams(settings)


def log_round(trainer: pl.Trainer, ledger: Ledger) -> None:
    """Send the numbers of the last round to every logger and say what it did; a failing logger costs a warning."""
    with only_looking("the numbers of a round could not be logged"):
        if not any(isinstance(each, LogsRounds) for each in trainer.callbacks):  # type: ignore[attr-defined]
            log_scalars(trainer, round_numbers(ledger))
    say_round(ledger)


def round_numbers(ledger: Ledger) -> dict[str, float]:
    """Return the numbers of the last round that every logger gets."""
    return {**ledger.rounds[-1].scalars(), "time_share": ledger.selection_share, **ledger.utilisation()}


def say_round(ledger: Ledger) -> None:
    """Say, on rank 0, what the last round did, and what it noted."""
    if distributed.rank() != 0:
        return
    record = ledger.rounds[-1]
    for note in record.notes:
        warnings.warn(f"round {record.round}: {note}", SelectionWarning, stacklevel=2)
    with only_looking("what a round did could not be said"):
        log.info(round_line(record, ledger.selection_share if ledger.training_seconds else None))
        for alarm in ledger.new_alarms(record):
            log.warning("ALARM (%s) in round %d, step %d: %s", alarm.kind, alarm.round, alarm.step, alarm.text)


def log_end(trainer: pl.Trainer, ledger: Ledger, plan: Plan | None) -> None:
    """Say what selection has cost, and what is left of the plan."""
    if not trainer.is_global_zero:
        return
    if plan is not None and not plan.exhausted:
        log.info(
            "training ended inside a round: %d of the %d candidates of round %d were not trained on, and a run that "
            "goes on from the last checkpoint begins with them",
            len(plan.ids) - plan.cursor,
            len(plan.ids),
            plan.round,
        )
    before = sum(ledger.before_seconds.values())
    log.info(
        "selection: %d rounds, %.1f s of selection%s beside %.1f s of training (%.1f%%)",
        len(ledger.rounds),
        ledger.selection_seconds,
        f" ({before:.1f} s of it before this run, on what it draws from)" if before else "",
        ledger.training_seconds,
        100 * ledger.selection_share,
    )


def log_verdict(trainer: pl.Trainer, answer: Answer, is_new: bool) -> None:
    """Send the numbers of a verdict to every logger, and say it."""
    log_scalars(trainer, {f"verdict/{name}": value for name, value in answer.numbers().items()})
    if trainer.is_global_zero:
        log.log(logging.WARNING if is_new and answer.said == "not paying" else logging.INFO, answer.sentence())


def record_captured(trainer: pl.Trainer, record: RoundRecord, ids: Tensor, influence: Tensor) -> None:
    """Note the finite influence ``(m,)`` of examples ``ids (m,)`` that a training step has shown."""
    record.overheard.extend(ids.tolist())
    record.overheard_influence.extend(influence.tolist())
    log_scalars(trainer, {"overheard_influence": float(influence.double().mean())})


def report_uncounted(ledger: Ledger, names: Iterable[str]) -> None:
    """Record what ran without being counted in FLOPs, and say so of each the first time."""
    new = [name for name in names if name not in ledger.uncounted]
    ledger.uncounted.extend(new)
    if new:
        rank_zero_warn(f"not counted in the FLOPs of the ledger: {'; '.join(new)}", category=SelectionWarning)


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Send numbers to every logger; a failing one costs a warning."""
    for logger in trainer.loggers:
        with only_looking(f"{type(logger).__name__} failed on selection metrics"):
            logger.log_metrics({f"selection/{key}": value for key, value in scalars.items()}, step=trainer.global_step)


def carry_earlier_decisions(run: SelectionRun) -> None:
    """Bring along what a run that goes on in another folder has decided; a full disk costs a warning."""
    if run.decisions is None or distributed.rank() != 0:
        return
    with only_looking(f"the decisions of earlier rounds could not be brought to {run.decisions.folder}"):
        carry_decisions(run.decisions, run.ledger, run.pool.fingerprint)


def write_ledger(ledger: Ledger, path: Path | None) -> None:
    """Write the ledger on rank 0; the checkpoint holds it too, so a full disk costs a warning."""
    if path is None or distributed.rank() != 0:
        return
    with only_looking(f"could not write {path}"):
        ledger.write(path)


def write_files(files: Callable[[], Mapping[str, str]], folder: Path) -> None:
    """Write what a selector keeps beside the ledger, on rank 0; a full disk costs a warning."""
    if distributed.rank() != 0:
        return
    with only_looking(f"the files of the selector could not be written to {folder}"):
        for name, text in files().items():
            with whole_file(folder / name) as file:
                file.write(text.encode())


def scalars_of(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return the metrics that are single numbers; a vector among them is nobody's loss."""
    found = {}
    for name, value in metrics.items():
        with only_looking(f"the metric {name} is no number for the ledger"):
            found[writable(name)] = float(value)  # type: ignore[arg-type]
    return found
