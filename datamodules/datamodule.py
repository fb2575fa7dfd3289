"""The base class of the datamodules with selection: the hooks of Lightning and the methods that the engine calls."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from liveselect import distributed
from liveselect.datamodules import checks
from liveselect.datamodules.loader import PlanLoader, ShardedBatches
from liveselect.datamodules.opening import OpenedRows, largest_id, most_positions, open_mixture
from liveselect.datamodules.served import ServedPool
from liveselect.datamodules.settings import OnOverlap, Place, ServingSettings
from liveselect.grammar import Batch, CandidateSource
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

NOT_SET_UP = "setup('fit') has to come first; trainer.fit calls it"


class ServedDataModule(pl.LightningDataModule, CandidateSource):
    """A datamodule that serves a pool as the DataSelection callback plans it; subclasses define ``open_rows``.

    Attributes:
        settings: how pool and reference set are served.
        batch_size: rows in the training batch of one rank; 0 while only the unopened data knows it.
        before_batch: called before each training batch is fetched, or None.
        reference_fingerprint: a hash of the reference set, None before ``setup("fit")``.
        reference_examples: how many it has, None before.
        setup_seconds: seconds that the last ``setup("fit")`` took to open and check the data, without the setup of a
            wrapped module.
    """

    validates_on_reference = True  # where no validation set is named

    def __init__(self, settings: ServingSettings) -> None:
        super().__init__()
        self.settings = settings
        self.batch_size = settings.batch_size or 0
        self.before_batch: Callable[[], None] | None = None
        self.reference_fingerprint: str | None = None
        self.reference_examples: int | None = None
        self.setup_seconds = 0.0
        self._served: ServedPool | None = None
        self._validation: list[Batch] | None = None
        self._accumulate = 1  # of a loop without a Trainer, which knows its own

    @abstractmethod
    def open_rows(self) -> OpenedRows:
        """Open the rows of the pool."""

    # ---- Lightning ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open pool and reference set, and check that they fit each other, the trainer and the model.

        Raises:
            ValueError: the pool is smaller than a global batch, the reference set is empty or inside the pool, or token
                ids exceed the model's vocabulary.
            TypeError: the pool or the reference set is of an unknown kind, or a callback is a class.
        """
        refuse_classes(self.trainer)
        with isolate_rng(include_cuda=False):  # datasets may draw when they are read, and training must not change
            if stage == "fit":
                began = time.perf_counter()
                self._setup_fit()
                self.setup_seconds = time.perf_counter() - began
            elif stage == "validate" and self._serves_validation and self._validation is None:
                self._validation = self._open_validation(self.open_rows())

    def train_dataloader(self) -> PlanLoader:
        """Return the loader of the whole run, the same one at every call."""
        self._check_model()  # a second time: the model may be built in configure_model, after setup
        return self.served.loader

    def val_dataloader(self) -> ShardedBatches:
        """Return the validation set, by default the reference set."""
        if self._validation is None:
            raise RuntimeError(f"the validation set is not read yet: {NOT_SET_UP}")
        place = Place.of(self.trainer, self._accumulate)
        return ShardedBatches(self._validation, place.rank, place.world_size)

    def teardown(self, stage: str) -> None:
        """End the workers."""
        self._close()

    def on_exception(self, exception: BaseException | None = None) -> None:
        """End the workers.

        Raises:
            TypeError: the Trainer got the class, on which Lightning calls this with nothing but the exception.
        """
        if not isinstance(self, ServedDataModule):
            raise TypeError(
                "expected the datamodule of the Trainer to be an object, got the class: write "
                "datamodule=SelectionDataModule(...)"
            )
        self._close()

    # ---- CandidateSource ---------------------------------------------------------------------------------------

    @property
    def served(self) -> ServedPool:
        """The pool and the reference set of the fit; raises RuntimeError before ``setup("fit")``."""
        if self._served is None:
            raise RuntimeError(f"pool and reference set are not open yet: {NOT_SET_UP}")
        return self._served

    @property  # the pool is known only after setup
    def pool(self) -> CandidatePool:  # type: ignore[override]
        """The candidates; raises RuntimeError before ``setup("fit")``."""
        return self.served.pool

    def cost_before_training(self) -> Mapping[str, Mapping[str, float]]:
        """Return what making the groups took, by kind and phase, where they are clusters; else nothing."""
        return {} if self._served is None else self._served.cost_of_groups

    def candidates(self, ids: Tensor) -> Iterator[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order."""
        return self.served.candidates(ids)

    def in_bulk(self, ids: Tensor) -> Iterator[Batch]:
        """Yield the candidates ``ids (n,)`` in batches that are read fastest, in their order."""
        return self.served.in_bulk(ids)

    def reference(self) -> Iterable[Batch]:
        """Return the batches of the reference set, the same ones in the same order at each call."""
        return iter(self.served.reference)

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``; without a tokenizer, the ids."""
        return self.served.opened.decode(input_ids)

    def follow(self, plan: Plan) -> None:
        """Serve training batches from ``plan``, starting at its cursor."""
        self.served.loader.follow(plan)

    def begin_loop(self, accumulate: int) -> PlanLoader:
        """Prepare and open the data for a loop without a Trainer, and return the loader of its training batches."""
        if distributed.rank() == 0:
            self.prepare_data()
        distributed.wait_for_all()
        self._accumulate = accumulate
        self.setup("fit")
        return self.served.loader

    def training_batches(self, plan: Plan) -> Iterator[object]:
        """Yield this rank's training batches of a plan that is not followed, read in this process."""
        return self.served.loader.read(plan)

    def further_sets(self) -> Mapping[str, Iterable[Batch]]:
        """Return the sets of ``further_sets``, and the validation set where one is named."""
        served = self.served.further_sets
        if self.settings.validation is not None and self._validation is not None:
            return {"validation": self._validation, **served}
        return served

    # ---- opening and checking ----------------------------------------------------------------------------------

    def check_model(self, module: nn.Module) -> None:
        """Raise ValueError when the data holds token ids or positions that the model has no embedding for."""
        rows = self.served.opened.rows
        checks.check_vocabulary(module, rows.vocab_size - 1, "the pool")
        rows.known_tokens = checks.model_vocabulary(module)
        checks.check_positions(module, rows.longest, "the pool", "make the rows shorter (`prepare --block-size`)")
        for what, batches in {"reference": self.served.reference, "validation": self._validation or []}.items():
            checks.check_vocabulary(module, largest_id(batches), f"the {what} set")
            longest = most_positions(batches)
            checks.check_positions(module, longest, f"the {what} set", "shorten it (ReferenceSet(max_length=...))")
        if self.settings.pack_reference:
            checks.check_packing(module)

    def _setup_fit(self) -> None:
        opened = self.open_rows()
        before = None if self._served is None else self._served.pool
        self._served = ServedPool(
            opened, self.settings, Place.of(self.trainer, self._accumulate), before, self._begin_batch
        )
        self.batch_size = opened.batch_size
        self.reference_fingerprint = self._served.reference_fingerprint
        self.reference_examples = sum(len(batch["input_ids"]) for batch in self._served.reference)
        self.reference_names = self._served.reference_names
        self._validation = self._open_validation(opened) if self._serves_validation else None
        self._check_model()

    def _open_validation(self, opened: OpenedRows) -> list[Batch]:
        settings = self.settings
        if settings.validation is not None:
            return open_mixture(settings.validation, opened, settings, "allow")
        if self._served is not None:
            return self._served.reference
        overlap: OnOverlap = "drop" if settings.overlap == "drop" else "allow"  # the same examples as in a fit
        return open_mixture(settings.reference, opened, settings, overlap)

    def _check_model(self) -> None:
        """Check the data against the model, once there is one."""
        module = self.trainer.lightning_module if self.trainer else None
        if module is not None and any(True for _ in module.parameters()):
            self.check_model(module)

    @property
    def _serves_validation(self) -> bool:
        return self.validates_on_reference or self.settings.validation is not None

    def _begin_batch(self) -> None:
        if self.before_batch is not None:
            self.before_batch()

    def _close(self) -> None:
        if self._served is not None:
            self._served.close()
        self.before_batch = None


def refuse_classes(trainer: pl.Trainer | None) -> None:
    """Raise TypeError when a class is among the callbacks of a Trainer, where an object belongs."""
    callbacks: list[object] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, type):
            callbacks.remove(callback)  # or Lightning calls its on_exception, whose error hides this one
            raise TypeError(
                f"expected objects among the callbacks of the Trainer, got the class {callback.__name__}: write "
                f"{callback.__name__}(...)"
            )
