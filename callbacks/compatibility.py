"""What a run must look like for selection to be exact; everything else is refused before training starts."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from liveselect.callbacks.folder import is_remote, logger_folder
from liveselect.functional.sharding import ThroughRoot, is_flat
from liveselect.grammar import CandidateSource, LossFn, SelectionWarning, State
from liveselect.parts import check_source
from liveselect.plan import Plan

BATCHES_PER_STEP = "batches_per_step"
"""The attribute by which a module with manual optimization declares how many batches a step of its optimizers takes."""


def find_source(trainer: pl.Trainer) -> CandidateSource:
    """Return the trainer's datamodule as a candidate source."""
    source = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(source, CandidateSource):
        raise MisconfigurationException(
            f"DataSelection needs a datamodule that serves candidates, got {type(source).__name__}: use "
            "trainer.fit(model, datamodule=SelectionDataModule(...)), or SelectionDataModule.wrap(your_datamodule)"
        )
    return check_source(source, "datamodule")


def check_setup(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise MisconfigurationException for settings that can be judged before the data are loaded."""
    _check_strategy(trainer.strategy)
    steps_per_batch(pl_module)
    if trainer.precision == "16-mixed":
        raise MisconfigurationException(
            "DataSelection does not work with precision='16-mixed': single-example gradients underflow without the "
            "loss scale. Use 'bf16-mixed' or '32-true'"
        )
    if trainer.precision == "16-true":
        raise MisconfigurationException(
            "DataSelection does not work with precision='16-true': gradients and moments of half precision underflow, "
            "and nothing can be measured. Use 'bf16-true', 'bf16-mixed' or '32-true'"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise MisconfigurationException("overfit_batches replaces the training data, so nothing could be selected")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (GradientAccumulationScheduler, BatchSizeFinder)):
            raise MisconfigurationException(
                f"{type(callback).__name__} changes the number of examples of an optimizer step while DataSelection "
                "plans rounds of whole steps: set accumulate_grad_batches and batch_size to fixed numbers"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging begins its schedule and adds to its average when an epoch starts, and loses "
                "them when a run is resumed inside of one: use EMAWeightAveraging or WeightAveraging"
            )


def steps_per_batch(pl_module: pl.LightningModule) -> int:
    """Return the optimizer steps of Lightning's count that one batch of a module with manual optimization takes.

    0 with automatic optimization, where the Trainer counts.

    Raises:
        MisconfigurationException: the module does not declare where a step ends, or in a way that cannot be followed.
    """
    if pl_module.automatic_optimization:
        return 0
    declared = getattr(pl_module, BATCHES_PER_STEP, None)
    if declared is None:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes manually, so that only it knows where an optimizer step ends: if "
            f"each batch ends a step of every optimizer, declare it with `{BATCHES_PER_STEP} = 1` in the class; else "
            "use automatic optimization"
        )
    if declared != 1:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} declares {BATCHES_PER_STEP} = {declared!r}, and with manual optimization only "
            "1 can be followed: make batches larger, or use automatic optimization with accumulate_grad_batches"
        )
    optimizers = pl_module.optimizers(use_pl_optimizer=False) if pl_module._trainer is not None else []
    return len(optimizers) if isinstance(optimizers, list) else 1


def _check_strategy(strategy: Strategy) -> None:
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            "DataSelection works with a single device, DDPStrategy, ModelParallelStrategy (FSDP2) and FSDPStrategy, "
            f"not with {type(strategy).__name__}: use one of these"
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            "DataSelection shares out batches over all ranks, but with tensor_parallel_size="
            f"{strategy.device_mesh['tensor_parallel'].size()} groups of ranks must see the same ones: use "
            "ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1)"
        )


def callable_model(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: LossFn
) -> tuple[torch.nn.Module, LossFn]:
    """Return the module to measure with, and the loss function that takes it.

    Raises:
        MisconfigurationException: parameters wait elsewhere than where the model computes.
    """
    found, computes = next(pl_module.parameters()).device, trainer.strategy.root_device
    if found.type != computes.type:
        raise MisconfigurationException(
            f"the parameters are kept on {found} and the model computes on {computes}, which DataSelection does not "
            "know how to measure with: leave out the offloading to CPU"
        )
    root = trainer.strategy.model
    if root is not None and root is not pl_module and is_flat(root):
        # wrapped as a whole, it can be called as a whole only
        return root, ThroughRoot(loss_fn)
    return pl_module, loss_fn


def check_intervals(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException when a checkpoint could be written inside an accumulation window.

    Lightning saves no gradient buffers, so such a checkpoint never resumes exactly. Call it once the loaders exist.
    """
    _warn_of_late_schedulers(trainer)
    window = trainer.accumulate_grad_batches
    if window == 1:
        return
    intervals: dict[str, int | float | None] = {
        "the number of batches in an epoch (limit_train_batches)": trainer.num_training_batches
    }
    if trainer.enable_validation:
        intervals["val_check_interval"] = trainer.val_check_batch
    for name, batches in intervals.items():
        if batches not in (None, float("inf")) and batches % window:
            raise MisconfigurationException(
                f"{name} is {batches} batches, which ends inside an accumulation window of {window} "
                f"(accumulate_grad_batches): a checkpoint there would not resume exactly. Use a multiple of {window}"
            )
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            raise MisconfigurationException(
                f"{type(callback).__name__} saves on an exception, which may come inside an accumulation window of "
                f"{window} (accumulate_grad_batches): it would not resume exactly. Use every_n_train_steps"
            )
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) can save inside an accumulation window "
                f"(accumulate_grad_batches={window}), which would not resume exactly: use every_n_train_steps"
            )


def _warn_of_late_schedulers(trainer: pl.Trainer) -> None:
    if any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs):
        rank_zero_warn(
            "Lightning updates ReduceLROnPlateau of interval='step' after the checkpoints of a step are written, so a "
            "resumed run lacks that update and is not exact: take a schedule that depends on the step alone, or "
            "interval='epoch'",
            category=SelectionWarning,
        )


def check_rest(plan: Plan, global_batch: int, trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException when a checkpoint goes on with steps of another size that do not fit its place.

    What is left of the round must be whole steps, and Lightning counts windows from the start of the epoch.
    """
    window = trainer.accumulate_grad_batches
    left, done = len(plan.ids) - plan.cursor, trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    if left % global_batch:
        raise MisconfigurationException(
            f"the checkpoint has {left} candidates of round {plan.round} left to train on, which are no whole steps of "
            f"{global_batch} (batch_size {global_batch // window // trainer.world_size}, {trainer.world_size} ranks, "
            f"accumulate_grad_batches {window}): resume with the numbers that the run began with, or with others whose "
            f"product divides {left}"
        )
    if done % window:
        raise MisconfigurationException(
            f"the checkpoint stands after {done} batches of its epoch, which is inside a window of {window} "
            "(accumulate_grad_batches): resume with the window that the run began with, or with one that divides them"
        )


def keep_checkpoints_out_of_windows(trainer: pl.Trainer) -> None:
    """Let no ``ModelCheckpoint`` save the step that a run begins at once more, inside its first accumulation window.

    It saves when the step number fits and is not the one that it saved last, which it forgets over a resume, and knows
    of an earlier fit in a second one.
    """
    if trainer.accumulate_grad_batches == 1:
        return
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0)
        if isinstance(callback, ModelCheckpoint) and every and trainer.global_step % every == 0:
            callback._last_global_step_saved = trainer.global_step


def warn_inside_window(trainer: pl.Trainer) -> None:
    """Warn when some batches of an optimizer step are done and others are not, at which a checkpoint is written."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    if done % trainer.accumulate_grad_batches:
        rank_zero_warn(
            f"a checkpoint of step {trainer.global_step} is written inside an accumulation window of "
            f"{trainer.accumulate_grad_batches} batches. Lightning saves no gradients, so a resume from it could "
            "not be exact and is refused: save after an optimizer step",
            category=SelectionWarning,
        )


def requeue_signals(trainer: pl.Trainer) -> list[int]:
    """Return the signals on which SLURM asks the job to save and be requeued, if it runs there."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
        return [int(environment.requeue_signal)]
    return []


def count_finished_epoch(checkpoint: State) -> None:
    """Count the epoch as complete in a checkpoint that was written at its very end.

    Lightning counts such an epoch only after the checkpoint. With ``max_steps`` it would then train one more batch of
    it and force an optimizer step after it, in the middle of an accumulation window.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    current = epochs["current"]
    if current["processed"] == current["ready"] == current["completed"] + 1:
        current["completed"] += 1
        epochs["total"]["completed"] += 1
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run: where its logger writes, or its checkpoints would lie by default.

    Where that is no local place, it is the folder that the process runs in.
    """
    root = trainer.default_root_dir
    return logger_folder(trainer) or (Path.cwd() if is_remote(root) else Path(root))
