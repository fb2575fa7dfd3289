"""A W&B logger that a dead network does not stop."""

from typing import TYPE_CHECKING, Any, Union

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.arguments import check_plain
from liveselect.grammar import SelectionWarning

if TYPE_CHECKING:
    from wandb import Run
    from wandb.sdk.lib import RunDisabled


class OfflineFallbackWandbLogger(WandbLogger):
    """A WandbLogger that goes on offline when the server cannot be reached or refuses the key.

    Lightning opens the run before training begins, and an unreachable server ends the training there. This one waits
    for ``patience`` seconds, warns, and writes to the disk instead; ``wandb sync FOLDER`` sends it later.

    Args:
        patience: seconds to wait for the server.
        arguments: those of :class:`lightning.pytorch.loggers.WandbLogger`.
    """

    def __init__(self, *, patience: float = 30.0, **arguments: Any) -> None:
        import wandb

        check_plain(OfflineFallbackWandbLogger, locals())
        given = arguments.get("settings")
        settings = wandb.Settings(**given) if isinstance(given, dict) else given or wandb.Settings()
        settings.init_timeout = min(settings.init_timeout, patience)
        self._arguments = {**arguments, "settings": settings}
        super().__init__(**self._arguments)

    @property
    @rank_zero_experiment
    def experiment(self) -> Union["Run", "RunDisabled"]:
        """The W&B run, opened when it is first asked for."""
        import wandb

        try:
            return super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            rank_zero_warn(
                f"W&B cannot be reached, the run is written to the disk instead ({error}). Send it later with "
                f"`wandb sync {self.save_dir or '.'}/wandb/offline-run-*`",
                category=SelectionWarning,
            )
            super().__init__(**{**self._arguments, "mode": "offline"})
            return super().experiment
