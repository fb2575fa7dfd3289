"""Selection inside the Trainer of Hugging Face: a callback that drives, and the loader that it trains on."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_utils import get_last_checkpoint

from liveselect import distributed
from liveselect.callbacks import DataSelection
from liveselect.callbacks.records import scalars_of
from liveselect.grammar import Batch, CandidateSource, LossFn
from liveselect.loops.driver import Driver

STATE_FILE = "liveselect.pt"
"""The state of selection, in the folder of a checkpoint."""


class HuggingFaceSelection(TrainerCallback):
    """Chooses the training data of a Hugging Face ``Trainer``.

    A run of three lines::

        trainer = Trainer(model=model, args=TrainingArguments(...))
        HuggingFaceSelection(LiveSelection(every_n_steps=100), data).attach(trainer)
        trainer.train()

    The Trainer's own ``train_dataset`` and sampler are not used: :meth:`attach` gives it a loader that walks the plans,
    which fetches no batch ahead. Rounds are made in ``on_step_end``, before the step is saved; the state of selection
    is one file in the folder of the checkpoint, and ``trainer.train(resume_from_checkpoint=...)`` goes on from it with
    the same batches. Epochs are passes over the pool, and begin anew where a run is resumed.

    Tested on a single device, with accumulation. DDP (``torchrun``) and ``bf16`` are provided for and not tested.

    Args:
        selection: who measures, who chooses and how often: a preset, or a ``DataSelection``.
        source: the data; its ``batch_size`` must be ``per_device_train_batch_size``.

    Attributes:
        driver: of the training under way or the last one, None before.
    """

    def __init__(self, selection: DataSelection, source: CandidateSource) -> None:
        self._selection, self._source = selection, source
        self._trainer: Trainer | None = None
        self._resumes_from: Path | None = None
        self.driver: Driver | None = None

    def attach(self, trainer: Trainer) -> Trainer:
        """Let a Trainer train on what is selected, and return it.

        Raises:
            ValueError: it is set to what selection does not work with.
        """
        _check(trainer, self._selection)
        train: Callable[..., Any] = trainer.train
        self._trainer = trainer

        def noting(resume_from_checkpoint: str | bool | None = None, *others: Any, **settings: Any) -> object:
            found = resume_from_checkpoint
            if found is True:
                found = get_last_checkpoint(trainer.args.output_dir)
            self._resumes_from = Path(found) if found else None
            try:
                return train(resume_from_checkpoint, *others, **settings)
            finally:
                if self.driver is not None:
                    self.driver.session.release()

        trainer.train = noting  # type: ignore[method-assign, assignment]
        trainer.get_train_dataloader = self._loader  # type: ignore[method-assign, assignment]
        trainer.args.ignore_data_skip = True  # the plan's cursor says where a resumed run goes on
        trainer.add_callback(self)
        return trainer

    # ---- hooks -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Make the first plan, or go on with that of the checkpoint."""
        driver = self._driving
        driver.estimated_stepping_batches = state.max_steps
        if self._resumes_from is not None:
            driver.load_state_dict(_read(self._resumes_from))
        driver.begin()

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Count the step; at the round's last one make the next plan."""
        self._driving.after_step()

    def on_evaluate(self, args: Arguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Note what was found beside what it cost."""
        if self.driver is not None:
            found = scalars_of(others.get("metrics") or {})
            self.driver.evaluated(found, found.get("eval_runtime", 0.0))

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Write the state of selection beside the checkpoint that was saved."""
        saved = self._driving.state_dict()  # on all ranks
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if distributed.rank() == 0 and folder.is_dir():
            unfinished = folder / f"{STATE_FILE}.unfinished"
            torch.save(saved, unfinished)
            unfinished.replace(folder / STATE_FILE)

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Write the final ledger."""
        self._driving.close()

    # ---- parts -------------------------------------------------------------------------------------------------

    @property
    def _driving(self) -> Driver:
        if self.driver is None:
            raise RuntimeError("HuggingFaceSelection is among the callbacks, but attach(trainer) was not called")
        return self.driver

    def _loader(self) -> "_Batches":
        """Return the training batches of a run; the Trainer asks for them when a training begins."""
        trainer = self._trainer
        if trainer is None or trainer.model is None:
            raise RuntimeError("attach(trainer) was not called, or the Trainer has no model")
        args, selection = trainer.args, copy.deepcopy(self._selection)  # another training learns from the start
        if args.bf16:
            selection.loss_fn = InOwnPrecision(selection.loss_fn)
        optimizer = trainer.create_optimizer()
        clipped = args.max_grad_norm
        self.driver = Driver(
            selection,
            self._source,
            trainer.model,
            getattr(optimizer, "optimizer", optimizer),  # inside of accelerate's, after an earlier training
            accumulate=args.gradient_accumulation_steps,
            clip_gradients=None if not clipped else lambda each: nn.utils.clip_grad_norm_(each, clipped),
            autocast=trainer.accelerator.autocast,
            log=lambda numbers, step: trainer.log(dict(numbers)),
        )
        if self._source.batch_size != args.per_device_train_batch_size:
            raise ValueError(
                f"expected the data's batch_size ({self._source.batch_size}) to be per_device_train_batch_size "
                f"({args.per_device_train_batch_size}): set both to the rows of one rank's batch"
            )
        return _Batches(self.driver)


class InOwnPrecision:
    """A loss that is computed without the autocast that accelerate puts around the forward of a model.

    Differences of losses are lost in 16 bits, so those who measure open the precision context themselves.

    Args:
        loss_fn: the loss.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the losses of a batch, ``(B,)``."""
        own = vars(module).get("_original_forward")
        if own is None:
            return self.loss_fn(module, batch)
        wrapped = vars(module)["forward"]
        module.forward = own
        try:
            return self.loss_fn(module, batch)
        finally:
            module.forward = wrapped


class _Batches:
    """What the Trainer trains on: no ``DataLoader``, so that none of its batches is fetched ahead."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __len__(self) -> int:
        return len(self._driver.loader)

    def __iter__(self) -> Iterator[object]:
        for _ in range(len(self)):
            batch = self._driver.next_batch()
            yield {name: value for name, value in batch.items() if name != "id"}


def _read(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"the checkpoint {checkpoint} holds no state of selection ({STATE_FILE}): it was saved without selection, "
            "or the run ended while it was written. Resume from an earlier checkpoint"
        )
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def _check(trainer: Trainer, selection: DataSelection) -> None:
    """Raise ValueError for settings of a Trainer under which selection could not be exact."""
    args = trainer.args
    refused = {
        "fp16=True, whose loss scale single-example gradients need: use bf16=True": args.fp16,
        "several GPUs in one process: start it with torchrun": args.n_gpu > 1,
        "DeepSpeed or FSDP of accelerate: use DDP (torchrun), or FSDP2 in Lightning": (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        ),
        "auto_find_batch_size=True, which changes the examples of a step": args.auto_find_batch_size,
        "label_smoothing_factor, another loss than influence is measured on: pass loss_fn, and "
        "training_loss_differs=True": args.label_smoothing_factor > 0 and not selection.training_loss_differs,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"selection does not work with {what}")
