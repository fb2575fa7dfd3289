"""What a run leaves behind: its ledger, and the numbers of its rounds in the loggers. Nothing here ends a training."""

import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from liveselect import distributed
from liveselect.callbacks.lines import round_line
from liveselect.decisions import carry_decisions
from liveselect.grammar import SelectionWarning
from liveselect.ledger import Ledger, RoundRecord
from liveselect.rounds import SelectionRun

log = logging.getLogger("liveselect")


class LogsRounds:
    """Marks a callback that sends the numbers of rounds to the loggers itself."""


def log_round(trainer: pl.Trainer, ledger: Ledger) -> None:
    """Send the numbers of the last round to every logger and say what it did; a failing logger costs a warning."""
    record = ledger.rounds[-1]
    if not any(isinstance(each, LogsRounds) for each in trainer.callbacks):  # type: ignore[attr-defined]
        log_scalars(trainer, {**record.scalars(), "time_share": ledger.selection_share})
    for note in record.notes:
        rank_zero_warn(f"round {record.round}: {note}", category=SelectionWarning)
    if not trainer.is_global_zero:
        return
    log.info(round_line(record, ledger.selection_share if ledger.training_seconds else None))
    for alarm in ledger.new_alarms(record):
        log.warning("ALARM (%s) in round %d, step %d: %s", alarm.kind, alarm.round, alarm.step, alarm.text)


def log_end(trainer: pl.Trainer, ledger: Ledger) -> None:
    """Say what selection has cost."""
    if not trainer.is_global_zero:
        return
    before = sum(ledger.before_seconds.values())
    log.info(
        "selection: %d rounds, %.1f s of selection%s beside %.1f s of training (%.1f%%)",
        len(ledger.rounds),
        ledger.selection_seconds,
        f" ({before:.1f} s of it before this run, on what it draws from)" if before else "",
        ledger.training_seconds,
        100 * ledger.selection_share,
    )


def record_captured(trainer: pl.Trainer, record: RoundRecord, ids: Tensor, influence: Tensor) -> None:
    """Note the finite influence ``(m,)`` of examples ``ids (m,)`` that a training step has shown."""
    record.overheard.extend(ids.tolist())
    record.overheard_influence.extend(influence.tolist())
    log_scalars(trainer, {"overheard_influence": float(influence.double().mean())})


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Send numbers to every logger; a failing one costs a warning."""
    for logger in trainer.loggers:
        try:
            logger.log_metrics({f"selection/{key}": value for key, value in scalars.items()}, step=trainer.global_step)
        except Exception as error:  # third-party loggers raise anything; training matters more
            rank_zero_warn(f"{type(logger).__name__} failed on selection metrics: {error}", category=SelectionWarning)


def keep_older_ledger(path: Path | None) -> None:
    """Give the ledger of an earlier run in the same folder another name; it is the only record of that run.

    Where that run was cut off, say that this one does not continue it.
    """
    if path is None or distributed.rank() != 0 or not path.exists():
        return
    try:
        earlier = Ledger.read(path)
    except (OSError, ValueError):
        earlier = Ledger()  # damaged, or of another version
    if earlier.finished is False and earlier.rounds:
        rank_zero_warn(
            f"training starts over from step 0, although a run that wrote to {path.parent} was cut off in round "
            f"{earlier.rounds[-1].round}: no checkpoint was loaded. To continue that run, pass its checkpoint as "
            "ckpt_path; 'last' finds one only in the folder of a ModelCheckpoint(dirpath=..., save_last=True), and a "
            "logger may give every run a new folder",
            category=SelectionWarning,
        )
    free = next(name for i in count(1) if not (name := path.with_stem(f"{path.stem}-{i}")).exists())
    path.rename(free)
    log.info("the ledger of an earlier run in this folder is now %s", free)


def carry_earlier_decisions(run: SelectionRun) -> None:
    """Bring along what a run that goes on in another folder has decided; a full disk costs a warning."""
    if run.decisions is None or distributed.rank() != 0:
        return
    try:
        carry_decisions(run.decisions, run.ledger, run.pool.fingerprint)
    except OSError as error:
        rank_zero_warn(
            f"the decisions of earlier rounds could not be brought to {run.decisions.folder}: {error}",
            category=SelectionWarning,
        )


def write_ledger(ledger: Ledger, path: Path | None) -> None:
    """Write the ledger on rank 0; the checkpoint holds it too, so a full disk costs a warning."""
    if path is None or distributed.rank() != 0:
        return
    try:
        ledger.write(path)
    except OSError as error:
        rank_zero_warn(f"could not write {path}: {error}", category=SelectionWarning)
