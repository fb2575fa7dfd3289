"""SelectionMonitor: shows every round of selection in the loggers of the Trainer."""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.arguments import check_plain
from liveselect.callbacks.records import LogsRounds, scalars_of
from liveselect.callbacks.selection import DataSelection
from liveselect.decisions import rounds_in
from liveselect.grammar import SelectionWarning, State
from liveselect.ledger import Evaluation, RoundRecord
from liveselect.looking import only_looking
from liveselect.monitoring.artifact_sink import ArtifactSink, CometStore, MLflowStore
from liveselect.monitoring.tensorboard_sink import TensorBoardSink
from liveselect.monitoring.view import RoundView, evaluation_scalars, names_to_show, round_scalars, shortened
from liveselect.monitoring.wandb_sink import WandbSink
from liveselect.rounds import SelectionRun
from liveselect.watch import Watch

log = logging.getLogger("liveselect")

FAILURES_BORNE = 3


class SelectionMonitor(Callback, LogsRounds):
    """Shows what selection measures, chooses and costs, while training runs.

    Scalars go to every logger of the Trainer as ``selection/*``: the round's cost, the regressor's rank correlation,
    the mixture of what is chosen, the pulls and bonuses of arms, and how far preferences moved since the round before.
    Weights & Biases also gets histograms, tables with texts, charts and artifacts, TensorBoard histograms and texts,
    MLflow and Comet the examples and decisions of rounds as files.

    What the watch finds wrong with a round becomes an alert there, a text in TensorBoard, and stands in the log and the
    ledger anyway.

    It stands beside :class:`~liveselect.callbacks.DataSelection`, runs on rank 0 alone and never stops the training: a
    logger that fails costs one warning, and after three failures in a row it is left alone.

    Args:
        examples: limit on the rows of a table of texts, for the chosen and for the rejected candidates of a round each.
        characters: of each text.
        groups: sources or arms that have curves of their own; the others are added up.
        rich_rounds: number of rounds of a run, evenly spread, that get tables, charts and artifacts beside the scalars
            and histograms of all.
        watch: bounds of the alarms; by default those of :class:`~liveselect.watch.Watch`.
        workspace: whether to save a view of selection in the W&B project, once, when a run begins online. It needs
            ``wandb-workspaces``; without it nothing is saved.
    """

    def __init__(
        self,
        examples: int = 6,
        characters: int = 600,
        groups: int = 32,
        rich_rounds: int = 100,
        watch: Watch | None = None,
        workspace: bool = True,
    ) -> None:
        check_plain(SelectionMonitor, locals())
        for name, value in {"examples": examples, "characters": characters, "groups": groups}.items():
            if value < 0:
                raise ValueError(f"expected {name} of zero or more, got {value}")
        if rich_rounds < 1:
            raise ValueError(f"expected rich_rounds of at least 1, got {rich_rounds}")
        self.examples = examples
        self.characters = characters
        self.groups = groups
        self.rich_rounds = rich_rounds
        self.watch = watch
        self.workspace = workspace
        self._selection: DataSelection | None = None
        self._sinks: dict[int, WandbSink | TensorBoardSink | ArtifactSink] = {}
        self._failures: dict[int, int] = {}
        self._opened = False
        self._names: list[str] = []
        self._rounds_shown = self._evaluations_shown = 0
        self._verdict_shown = ""  # the sentence

    def state_dict(self) -> dict[str, object]:
        """Return how much was shown."""
        shown = {"rounds": self._rounds_shown, "evaluations": self._evaluations_shown, "verdict": self._verdict_shown}
        return {**shown, "names": list(self._names)}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what :meth:`state_dict` returned; without what is damaged, everything is shown again."""
        with only_looking("what SelectionMonitor has shown before the checkpoint is not known, and is shown again"):
            rounds, evaluations = int(state_dict["rounds"]), int(state_dict["evaluations"])
            names, verdict = [str(name) for name in state_dict["names"]], str(state_dict.get("verdict", ""))
            self._rounds_shown, self._evaluations_shown = max(0, rounds), max(0, evaluations)
            self._names, self._verdict_shown = names, verdict

    # ---- hooks -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the selection."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._selection = next((each for each in callbacks if isinstance(each, DataSelection)), None)
        if self._selection is None:
            rank_zero_warn(
                "SelectionMonitor has nothing to show: no DataSelection (MATES, Quad, PDS) is among the callbacks",
                category=SelectionWarning,
            )
        elif self.watch is not None:
            self._selection.run.watch = self.watch
        self._sinks.clear()
        self._failures.clear()
        self._opened = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the first round."""
        if trainer.global_step == 0:
            self._rounds_shown = self._evaluations_shown = 0
            self._names, self._verdict_shown = [], ""
        self._show(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show a round that was made after this batch."""
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the metrics beside what they cost."""
        if not trainer.sanity_checking:
            self._show(trainer)
            if self._selection is not None and trainer.is_global_zero and self._selection.plan is not None:
                with only_looking("where the run stands could not be said"):
                    log.info(_progress_line(trainer, self._selection))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what came last, and name the checkpoint that it led to."""
        self._show(trainer)
        if self._selection is None:
            return
        found = getattr(trainer.checkpoint_callback, "last_model_path", "") or ""
        plan = None if self._selection.plan is None else self._selection.plan.fingerprint
        if trainer.is_global_zero and "folder" in self._about():
            log.info("to look at this run: liveselect report %s", shlex.quote(self._about()["folder"]))
        for logger in trainer.loggers:
            sink = self._sinks.get(id(logger))
            if isinstance(sink, WandbSink):
                self._try(logger, sink.end, Path(found) if found else None, plan)

    def _about(self) -> State:
        """Return the settings of selection, and where its records lie."""
        return {} if self._selection is None else self._selection.run.ledger.about

    # ---- showing -----------------------------------------------------------------------------------------------

    def _open(self, logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            sink = WandbSink(logger.experiment)
            sink.begin(self._about())
            if self.workspace:
                sink.save_view()
            self._sinks[id(logger)] = sink
        elif isinstance(logger, TensorBoardLogger):
            self._sinks[id(logger)] = TensorBoardSink(logger.experiment)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            self._sinks[id(logger)] = ArtifactSink(MLflowStore(logger.experiment, logger.run_id))
        elif isinstance(logger, CometLogger):
            self._sinks[id(logger)] = ArtifactSink(CometStore(logger.experiment))

    def _show(self, trainer: pl.Trainer) -> None:
        """Show rounds and evaluations that were not shown yet, and count the time to selection."""
        if self._selection is None:
            return
        with self._selection.session.charged("monitor"):
            self._show_new(trainer, self._selection)

    def _show_new(self, trainer: pl.Trainer, selection: DataSelection) -> None:
        ledger = selection.run.ledger
        rounds, evaluations = ledger.rounds[self._rounds_shown :], ledger.evaluations[self._evaluations_shown :]
        self._rounds_shown, self._evaluations_shown = len(ledger.rounds), len(ledger.evaluations)
        if not trainer.is_global_zero or selection.plan is None:
            return
        if not self._opened:  # not before training begins, when the folder of the records is known
            self._opened = True
            for logger in trainer.loggers:
                self._try(logger, self._open, logger)
        for record in rounds:
            with only_looking("a round could not be shown"):
                view, rich = self._view(selection.run, record), self._is_rich(trainer, record.round)
                for logger in trainer.loggers:
                    self._try(logger, self._show_round, logger, view, rich)
        for entry in evaluations:
            for logger in trainer.loggers:
                self._try(logger, self._show_evaluation, logger, entry)
        said, sentence = (str(ledger.verdict.get(name, "")) for name in ("said", "sentence"))
        if sentence != self._verdict_shown:
            is_new = not self._verdict_shown.startswith(said)
            self._verdict_shown = sentence
            for logger in trainer.loggers:
                self._try(logger, self._show_verdict, logger, said, sentence, is_new)

    def _show_evaluation(self, logger: Logger, entry: Evaluation) -> None:
        sink = self._sinks.get(id(logger))
        if isinstance(sink, WandbSink):
            sink.evaluation(entry)
        else:
            logger.log_metrics(evaluation_scalars(entry), step=entry.step)

    def _show_verdict(self, logger: Logger, said: str, sentence: str, is_new: bool) -> None:
        sink = self._sinks.get(id(logger))
        if isinstance(sink, WandbSink | ArtifactSink):
            sink.verdict(said, sentence)
        if sink is not None and is_new and said != "cannot tell yet":
            sink.alert(f"Selection: {said}", sentence)

    def _show_round(self, logger: Logger, view: RoundView, rich: bool) -> None:
        sink = self._sinks.get(id(logger))
        if not isinstance(sink, WandbSink):
            logger.log_metrics(dict(view.scalars), step=view.record.step)
        if sink is not None:
            sink.round(view, rich)
            for alarm in view.ledger.new_alarms(view.record):
                sink.alert(f"Selection: {alarm.kind}", f"Round {alarm.round}, step {alarm.step}: {alarm.text}")

    def _view(self, run: SelectionRun, record: RoundRecord) -> RoundView:
        self._names = names_to_show(self._names, record, self.groups)
        files = {} if run.decisions is None else rounds_in(run.decisions.folder)
        return RoundView(
            record=record,
            ledger=run.ledger,
            scalars=round_scalars(record, run.ledger, self._names),
            decisions=files.get(record.round),
            pool=run.pool.fingerprint,
            examples=shortened(record.examples, self.examples, self.characters),
        )

    def _is_rich(self, trainer: pl.Trainer, index: int) -> bool:
        if self._selection is None:
            return False
        steps = trainer.estimated_stepping_batches
        total = steps / self._selection.every_n_steps if steps != float("inf") else 10_000
        return index % max(1, -(-int(total) // self.rich_rounds)) == 0

    def _try(self, logger: Logger, action: Callable[..., None], *arguments: object) -> None:
        """Run ``action``; a logger that fails is warned of once, and left alone when it goes on failing."""
        failures = self._failures.get(id(logger), 0)
        if failures >= FAILURES_BORNE:
            return
        try:
            action(*arguments)
            if failures:
                self._failures[id(logger)] = 1  # it was warned of already
        except Exception as error:  # third-party loggers raise anything; training matters more
            self._failures[id(logger)] = failures + 1
            if not failures:
                rank_zero_warn(
                    f"{type(logger).__name__} failed to show selection, training goes on without it: {error}",
                    category=SelectionWarning,
                )


def _progress_line(trainer: pl.Trainer, selection: DataSelection) -> str:
    """Return a line that says where the run stands, for terminals that show no bar."""
    metrics = scalars_of({name: value for name, value in trainer.callback_metrics.items() if "loss" in name})
    losses = "".join(f", {name} {value:.4f}" for name, value in sorted(metrics.items(), reverse=True))
    round_index = -1 if selection.plan is None else selection.plan.round
    steps = trainer.estimated_stepping_batches
    whole = f" of {steps:g}" if steps != float("inf") else ""
    share = f"selection took {selection.time_share():.1%} of the time"
    if verdict := selection.run.ledger.verdict.get("said"):
        share += f", {verdict}"
    return f"step {trainer.global_step}{whole}{losses}, round {round_index}, {share}"
