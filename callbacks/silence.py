"""What modules log in a forward is about training; forwards that measure log nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl


@contextmanager
def silent_logging() -> Iterator[None]:
    """Open a block in which ``log`` and ``log_dict`` of every LightningModule do nothing.

    Metrics decide about early stopping, checkpoints and learning rates, and inside of some hooks they are refused. The
    class is changed and not the model: modules may lie in lists, and override ``log`` to call that of the class.
    """
    kept = {name: vars(pl.LightningModule)[name] for name in ("log", "log_dict")}
    try:
        for name in kept:
            setattr(pl.LightningModule, name, _nothing)
        yield
    finally:
        for name, method in kept.items():
            setattr(pl.LightningModule, name, method)


def _nothing(module: pl.LightningModule, *arguments: Any, **settings: Any) -> None:
    """Log nothing."""
