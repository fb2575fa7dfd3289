"""SelectionDataModule: serves candidates, the reference set, and the batches of the plan."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from liveselect.datamodules import checks, wrapping
from liveselect.datamodules.disjoint import ON_OVERLAP, OnOverlap
from liveselect.datamodules.loader import PlanLoader, ShardedBatches, candidate_batches, epoch_length
from liveselect.datamodules.opening import (
    fingerprint_of,
    largest_id,
    most_positions,
    open_existing,
    open_reference,
    open_source,
    open_tokenizer,
)
from liveselect.datamodules.reference import ReferenceSet
from liveselect.datamodules.rows.rows import Collate, Rows, cost_of_groups, open_pool
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import Batch

NOT_SET_UP = "setup('fit') has to come first; trainer.fit calls it"


class SelectionDataModule(pl.LightningDataModule):
    """The data of a run with live selection: a pool to choose from and a reference set to improve on.

    Training batches follow the plan that the DataSelection callback publishes. Nothing is read before ``setup``, where
    everything that would make selection meaningless is refused.

    Args:
        pool: path of a pool made by ``liveselect prepare``, a ``TokenStore``, a map-style dataset whose rows have
            ``input_ids`` (rows may differ in length), or a ``LightningDataModule`` (see :meth:`wrap`).
        reference: what selection aims to improve: a :class:`~liveselect.datamodules.ReferenceSet`, or anything that
            one can be made of: a prepared pool, a file or folder of text, a list, a dataset, a ``DataLoader``.
        batch_size: rows in the training batch of one rank.
        validation: what ``val_dataloader`` serves, in the same forms as ``reference``; by default the reference set.
        num_workers: worker processes of the training loader.
        probe_batch_size: rows of a batch of candidates; by default ``batch_size``.
        reference_tokens: tokens of a reference batch, padding included.
        pack_reference: put several reference examples into one row. Only for models that keep them apart by their
            ``position_ids``, others are refused; needs a loss function that passes these on without a cache, as the
            default one does. Without it padding is small: 3% of the tokens on LAMBADA.
        epoch_examples: examples of an epoch, all ranks together; by default the size of the pool. It sets how often
            epoch hooks run, not what is trained on.
        groups: column of the dataset that names each row's group. For a prepared pool ``clusters``, or the name that
            `liveselect cluster` was given; by default its sources.
        tokenizer: name, path or Hugging Face tokenizer; by default the one inside the prepared pool.
        collate_fn: makes training batches of the dataset's rows, in place of ``{"id", "input_ids", "labels"}``.
        overlap: what to do with reference records that stand in the pool: ``refuse`` them, ``drop`` them from the
            reference set with a warning that lists them, or ``allow`` them without looking.
        seed: seeds what the dataset draws: each row draws what its place in the plan says, from torch, numpy and
            random.

    Attributes:
        before_batch: called before each training batch is fetched; None for nothing.
        reference_fingerprint: a hash of the reference set, None before ``setup("fit")``.
        setup_seconds: what the last ``setup("fit")`` took to open the data and check it, the setup of a wrapped module
            aside.
    """

    def __init__(
        self,
        pool: str | Path | Any,
        reference: str | ReferenceSet | Any,
        batch_size: int | None = None,
        validation: str | ReferenceSet | Any = None,
        num_workers: int = 0,
        probe_batch_size: int | None = None,
        reference_tokens: int = 8192,
        pack_reference: bool = False,
        epoch_examples: int | None = None,
        groups: str | None = None,
        tokenizer: str | Any = None,
        collate_fn: Collate | None = None,
        overlap: OnOverlap = "refuse",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._existing = pool if isinstance(pool, pl.LightningDataModule) else None
        if batch_size is None and self._existing is None:
            raise ValueError("expected batch_size, the rows in the training batch of one rank")
        sizes = {"batch_size": batch_size, "probe_batch_size": probe_batch_size, "epoch_examples": epoch_examples}
        for name, value in {**sizes, "reference_tokens": reference_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if overlap not in ON_OVERLAP:
            raise ValueError(f"expected overlap to be one of {ON_OVERLAP}, got {overlap!r}")
        self.batch_size = batch_size or 0
        self._source = pool
        self._reference_set = reference
        self._validation_set = validation
        self._batch_size = batch_size
        self._probe_batch_size = probe_batch_size
        self._reference_tokens = reference_tokens
        self._pack_reference = pack_reference
        self._epoch_examples = epoch_examples
        self._groups = groups
        self._tokenizer_spec = tokenizer
        self._tokenizer: Any = None
        self._collate_fn = collate_fn
        self._overlap: OnOverlap = overlap
        self._seed = seed
        self._options: dict[str, Any] = {"num_workers": num_workers}
        self._rows: Rows | None = None
        self._pool: CandidatePool | None = None
        self._reference: list[Batch] | None = None
        self.reference_fingerprint: str | None = None
        self._validation: list[Batch] | None = None
        self._loader: PlanLoader | None = None
        self._plan: Plan | None = None
        self.before_batch: Callable[[], None] | None = None
        self.setup_seconds = 0.0
        self._cost_of_groups: Mapping[str, Mapping[str, float]] = {}
        if self._existing is not None:
            names = [*wrapping.HOOKS, *(["val_dataloader"] if validation is None else [])]
            wrapping.adopt_hooks(self, self._existing, names)

    @classmethod
    def wrap(
        cls, existing: pl.LightningDataModule, reference: str | ReferenceSet | Any, **settings: Any
    ) -> "SelectionDataModule":
        """Return a datamodule that selects from the training data of ``existing``.

        Its dataset, batch size, collate function and workers are taken over; its sampler is not, since the plan says
        which rows come when. Training batches look as before. Other data loaders and all data hooks stay those of
        ``existing``, whose further attributes can be read through the wrapper.

        Args:
            existing: has a map-style training dataset whose batches hold ``input_ids``.
            reference: as in the constructor.
            settings: further arguments of the constructor.
        """
        return cls(existing, reference, **settings)

    def __getattr__(self, name: str) -> Any:
        existing = self.__dict__.get("_existing")
        if existing is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(existing, name)

    # ---- Lightning ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the wrapped module's data."""
        if self._existing is not None:
            self._existing.trainer = self.trainer
            self._existing.prepare_data()

    def setup(self, stage: str) -> None:
        """Open pool and reference set, and check that they fit each other, the trainer and the model.

        Raises:
            ValueError: the pool is smaller than a global batch, the reference set is empty or inside the pool, or token
                ids exceed the model's vocabulary.
            TypeError: the pool or the reference set is of an unknown kind.
        """
        if self._existing is not None:
            self._existing.trainer = self.trainer
            self._existing.setup(stage)
        with isolate_rng(include_cuda=False):  # datasets may draw when they are looked at; training must not notice
            if stage == "fit":
                began = time.perf_counter()
                self._setup_fit()
                self.setup_seconds = time.perf_counter() - began
            elif stage == "validate" and self._serves_validation:
                self._open_pool()
                self._open_validation()

    def train_dataloader(self) -> PlanLoader:
        """Return the loader of the whole run, the same one at every call."""
        if self._loader is None:
            rows = self._opened()
            self._check_model()
            self._loader = PlanLoader(
                rows,
                self.batch_size,
                self._epoch_batches(),
                self._rank,
                self._world_size,
                self._seed,
                self._pins_memory,
                rows.receive,
                self._options,
                self._before_batch,
            )
            if self._plan is not None:
                self._loader.follow(self._plan)
        return self._loader

    def val_dataloader(self) -> ShardedBatches:
        """Return the validation set, by default the reference set."""
        if self._validation is None:
            raise RuntimeError(f"the validation set is not read yet: {NOT_SET_UP}")
        return ShardedBatches(self._validation, self._rank, self._world_size)

    def teardown(self, stage: str) -> None:
        """End the workers."""
        self._close()
        if self._existing is not None:
            self._existing.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """End the workers."""
        self._close()
        if self._existing is not None:
            self._existing.on_exception(exception)

    # ---- CandidateSource ---------------------------------------------------------------------------------------

    @property
    def pool(self) -> CandidatePool:
        """The candidates; raises RuntimeError before ``setup``."""
        if self._pool is None:
            raise RuntimeError(f"the pool is not open yet: {NOT_SET_UP}")
        return self._pool

    def cost_before_training(self) -> Mapping[str, Mapping[str, float]]:
        """Return the ``seconds`` by phase that making the groups took, where they are clusters; else nothing."""
        return self._cost_of_groups

    def candidates(self, ids: Tensor) -> Iterator[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order.

        A prepared pool is read in this process; rows of a dataset are loaded by the workers where there are enough of
        them to pay for starting these.
        """
        rows = self._opened()
        in_process = rows.store is not None and self._collate_fn is None
        options = {} if in_process else self._options
        return candidate_batches(rows, ids, self._probe_batch_size or self.batch_size, options)

    def reference(self) -> Iterable[Batch]:
        """Return the batches of the reference set, the same ones in the same order at each call."""
        if self._reference is None:
            raise RuntimeError(f"the reference set is not read yet: {NOT_SET_UP}")
        return iter(self._reference)

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``; without a tokenizer, the ids."""
        rows = input_ids.tolist()
        if self._tokenizer is None:
            return [" ".join(map(str, row)) for row in rows]
        texts: list[str] = self._tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def follow(self, plan: Plan) -> None:
        """Serve training batches from ``plan``, starting at its cursor."""
        self._plan = plan
        if self._loader is not None:
            self._loader.follow(plan)

    # ---- opening and checking ----------------------------------------------------------------------------------

    def _setup_fit(self) -> None:
        self._open_pool()
        rows = self._opened()
        pool = open_pool(rows, self._groups)
        self._cost_of_groups = cost_of_groups(rows, self._groups)
        if self._pool is None or self._pool.fingerprint != pool.fingerprint:  # else it keeps what was used of it
            self._pool = pool
        checks.check_same_on_all_ranks("the pool", pool.fingerprint)
        self._check_size()
        self._reference = self._open_reference(self._reference_set, self._overlap)
        self.reference_fingerprint = fingerprint_of(self._reference)
        checks.check_same_on_all_ranks("the reference set", self.reference_fingerprint)
        self._open_validation()
        self._check_model()

    def _open_pool(self) -> None:
        if self._existing is None:
            self._rows = open_source(self._source, self._collate_fn)
        else:
            self._rows, self.batch_size, self._options = open_existing(self._existing, self._batch_size)
        self._tokenizer = open_tokenizer(self._tokenizer_spec, self._rows, self._existing)

    def _open_reference(self, source: Any, overlap: OnOverlap) -> list[Batch]:
        tokens, packed = self._reference_tokens, self._pack_reference
        return open_reference(source, self._opened(), self._tokenizer, tokens, packed, overlap, self.decode)

    def _open_validation(self) -> None:
        if not self._serves_validation:
            return
        if self._validation_set is not None:
            self._validation = self._open_reference(self._validation_set, "allow")
        else:
            overlap: OnOverlap = "drop" if self._overlap == "drop" else "allow"  # the same examples as in a fit
            self._validation = self._reference or self._open_reference(self._reference_set, overlap)

    def _check_size(self) -> None:
        global_batch = self.batch_size * self._world_size * self._accumulate
        if self.pool.size < global_batch:
            raise ValueError(
                f"the pool holds {self.pool.size} candidates, less than the {global_batch} of one optimizer step "
                f"({self.batch_size} a batch, {self._world_size} ranks, accumulate_grad_batches={self._accumulate}): "
                "enlarge the pool or lower the batch size"
            )
        self._epoch_batches()

    def _check_model(self) -> None:
        """Check the data against the model, once there is one: it may be built as late as in ``configure_model``."""
        module = self.trainer.lightning_module if self.trainer else None
        if module is not None and any(True for _ in module.parameters()):
            self.check_model(module)

    def check_model(self, module: nn.Module) -> None:
        """Raise ValueError when the data holds token ids or lengths that the model does not know."""
        rows = self._opened()
        checks.check_vocabulary(module, rows.vocab_size - 1, "the pool")
        checks.check_positions(module, rows.longest, "the pool", "make the rows shorter (`prepare --block-size`)")
        for what, batches in {"reference": self._reference, "validation": self._validation}.items():
            checks.check_vocabulary(module, largest_id(batches or []), f"the {what} set")
            longest = most_positions(batches or [])
            checks.check_positions(module, longest, f"the {what} set", "shorten it (ReferenceSet(max_length=...))")
        if self._pack_reference:
            checks.check_packing(module)

    # ---- small things ------------------------------------------------------------------------------------------

    def _opened(self) -> Rows:
        if self._rows is None:
            raise RuntimeError(f"the pool is not open yet: {NOT_SET_UP}")
        return self._rows

    def _close(self) -> None:
        if self._loader is not None:
            self._loader.shutdown()
        self._loader = None
        self._plan = None
        self.before_batch = None

    def _before_batch(self) -> None:
        if self.before_batch is not None:
            self.before_batch()

    def _epoch_batches(self) -> int:
        examples = self._epoch_examples or self.pool.size
        return epoch_length(examples, self.batch_size * self._world_size, self._accumulate)

    @property
    def _serves_validation(self) -> bool:
        return self._existing is None or self._validation_set is not None

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def _pins_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
