"""A W&B logger that a dead network does not stop."""

from typing import TYPE_CHECKING, Any, Union

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.protocols import SelectionWarning

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
        super().__init__(**arguments)
        self._patience = patience

    @property
    @rank_zero_experiment
    def experiment(self) -> Union["Run", "RunDisabled"]:
        """The W&B run, opened when it is first asked for."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        given = self._wandb_init.get("settings")
        settings = wandb.Settings(**given) if isinstance(given, dict) else given or wandb.Settings()
        settings.init_timeout = min(settings.init_timeout, self._patience)
        self._wandb_init["settings"] = settings
        try:
            return super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            rank_zero_warn(
                f"W&B cannot be reached, the run is written to the disk instead ({error}). Send it later with "
                f"`wandb sync {self._save_dir or '.'}/wandb/offline-run-*`",
                category=SelectionWarning,
            )
            self._offline, self._wandb_init["mode"] = True, "offline"
            return super().experiment
