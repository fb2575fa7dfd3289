"""``liveselect fit``: training with selection from a YAML file, by LightningCLI."""

import os
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.callbacks.compatibility import check_setup, run_folder
from liveselect.callbacks.lines import show_lines
from liveselect.callbacks.selection import check_alone
from liveselect.cli.bars import bar_for
from liveselect.cli.old_files import refuse_old_files
from liveselect.looking import only_looking

USAGE = "liveselect fit --config FILE [--config FILE ...] [--SECTION.NAME VALUE ...]"
"""Shown above an error; the generated usage fills several screens and hides the error."""


class RunConfig(SaveConfigCallback):
    """Writes the settings beside the ledger of the run: the log folder of W&B is shared by all runs."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder on all ranks, because this is a collective."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the settings into the folder of the records too: another run may come to share the one above it."""
        selection = next((each for each in trainer.callbacks if isinstance(each, DataSelection)), None)  # type: ignore[attr-defined]
        if selection is None or not trainer.is_global_zero:
            return
        with only_looking("the settings could not be written beside the records"):
            self._folder = Path(selection.run.ledger.about["folder"])
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml``, on rank 0."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, folder / "config.yaml", skip_none=False, overwrite=self.overwrite, multifile=self.multifile
        )


class SelectionCLI(LightningCLI):
    """A LightningCLI whose selection callback has a section of its own, ``select``.

    ``select`` takes a class path (``liveselect.callbacks.MATES``) and ``init_args``. A second file or an option such as
    ``--select.init_args.ratio=0.1`` changes one setting, which is not possible for an element of ``trainer.callbacks``.
    Model and data may be any LightningModule and LightningDataModule.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},  # a resumed run has the same folder
            parser_kwargs={"prog": "liveselect", "fit": {"usage": USAGE}},
            seed_everything_default=0,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the methods of the Trainer that are commands."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section of the selection callback."""
        parser.add_lightning_class_args(DataSelection, "select", subclass_mode=True, required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, without Lightning's warning that the process has arguments too."""
        if isinstance(args, list):
            refuse_old_files(args)
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)

    def before_fit(self) -> None:
        """Refuse what selection cannot work with before a logger opens a run."""
        trainer = self.trainer
        check_alone(trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy):  # it has no mesh yet; the callback checks it later
            return
        if any(isinstance(each, DataSelection) for each in trainer.callbacks):  # type: ignore[attr-defined]
            check_setup(trainer, self.model)

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """Build the Trainer, with the selection callback and a monitor for it if there is one."""
        settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if self.subcommand == "validate":  # nothing is selected, and the settings of the run stay as they are
            self.save_config_callback = None
            return self._instantiate_trainer({**settings, "callbacks": None, "logger": False}, [])
        select = self._get(self.config_init, "select")
        given = settings.get("callbacks") or []
        callbacks = [] if select is None else [select]
        if select is not None and not any(isinstance(each, SelectionMonitor) for each in given):
            callbacks.append(SelectionMonitor())
        return self._instantiate_trainer(settings, [*callbacks, *bar_for(settings)])


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    return run("fit", argv)


def run(command: str, argv: Sequence[str]) -> int:
    """Run a method of the Trainer with the settings of a command line."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls, not the user's
    show_lines(always=True)
    SelectionCLI([command, *argv])
    return 0
