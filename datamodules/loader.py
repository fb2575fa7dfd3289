"""PlanLoader: serves the training batches of the current plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from liveselect.datamodules.rows.draws import MapStyle, load_rows, training_seeds
from liveselect.datamodules.rows.rows import Rows
from liveselect.grammar import Batch, State
from liveselect.plan import Plan

MIN_BATCHES_PER_WORKER = 8  # starting a worker takes longer than reading fewer

LoaderOptions = Mapping[str, Any]
"""Arguments of a ``DataLoader``."""

WorkerInit = Callable[[int], object]


class Part(NamedTuple):
    """One batch of one rank, before it is read.

    Attributes:
        round: the round of the plan.
        start: place of the first row in the plan; the others follow it.
        ids: ids of the rows.
    """

    round: int
    start: int
    ids: list[int]


class PlanBatches:
    """The sampler of the inner DataLoader: yields one rank's batches, as :class:`Part`.

    Attributes:
        plan: the plan that the next iterator will walk, from its cursor on.
    """

    def __init__(self, rank: int, world_size: int, batch_size: int) -> None:
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.plan: Plan | None = None

    def __iter__(self) -> Iterator[Part]:
        if self.plan is None:
            return iter(())
        # fixed here, because the cursor moves while this iterator is used
        rows = self.plan.remaining(self.rank, self.world_size, self.batch_size)
        index, first = self.plan.round, self.plan.cursor + self.rank * self.batch_size
        step = self.world_size * self.batch_size
        return (Part(index, first + n * step, row.tolist()) for n, row in enumerate(rows))


class SeededBatches(Dataset):
    """A dataset of batches whose random draws depend on the place of each row in its plan, not on the process.

    Args:
        load: makes the batch of some ids and their seeds.
        seed: seed of the run's data.
        draws: whether anything is drawn at all.
    """

    def __init__(self, load: Callable[[Sequence[int], Sequence[int]], object], seed: int, draws: bool = True) -> None:
        self.load, self.seed, self.draws = load, seed, draws

    def __getitem__(self, part: Part) -> object:
        seeds = training_seeds(self.seed, part.round, part.start, len(part.ids)) if self.draws else []
        return self.load(part.ids, seeds)


class PlanLoader:
    """One loader for a whole run: walks the plan that was published last.

    It is not a ``torch.utils.data.DataLoader``, so Lightning leaves it alone: no sampler is injected, and slicing by
    rank happens here. It has a length, so Lightning fetches no batch ahead of the one that it trains on. Iterating is
    lazy: nothing is read before the first batch is requested, because Lightning builds the iterator before
    ``on_train_start``, where the first plan is made.

    ``plan.cursor`` belongs to the training loop (the DataSelection callback advances it in ``on_train_batch_end``). The
    loader reads it when an iterator begins and when a plan is published; in between it keeps its own position.

    Random numbers that the dataset or the collate function draw from the global generators depend on the seed, the
    round and the place of each row in the plan, and not on the process that reads it: batches are the same with any
    number of workers and after a resume, and the process that trains keeps its own random states.

    Args:
        dataset: map-style dataset of the pool, or :class:`~liveselect.datamodules.rows.rows.Rows`. A dataset with
            ``__getitems__`` reads a batch at once, under the seed of its first row.
        batch_size: rows of one batch of this rank.
        length: batches of one epoch of this rank.
        rank: index of this rank.
        world_size: number of ranks.
        seed: seed of the dataset's random draws.
        pin_memory: serve batches in pinned memory.
        options: further arguments of the inner ``DataLoader``: ``num_workers``, ``collate_fn``, ...
        before_batch: called before each batch is fetched, in this process.
    """

    def __init__(
        self,
        dataset: MapStyle | Rows,
        batch_size: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        pin_memory: bool = False,
        options: LoaderOptions | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.pin_memory = pin_memory
        self.options = dict(options or {})
        self.before_batch = before_batch
        self.plan: Plan | None = None
        self._length = length
        self._receive = dataset.receive if isinstance(dataset, Rows) else None
        self._batches = PlanBatches(rank, world_size, batch_size)
        self._inner: DataLoader | None = None
        self._walk: Iterator[object] | None = None  # None: the next batch begins a new walk at the plan's cursor
        self._position = 0

    @property
    def global_batch(self) -> int:
        """Examples by which the plan advances with every batch, all ranks together."""
        return self.batch_size * self.world_size

    def follow(self, plan: Plan) -> None:
        """Serve ``plan`` from its cursor on, beginning with the next batch; prefetched batches are dropped.

        Raises:
            ValueError: the ranks cannot share what remains of the plan evenly.
        """
        plan.remaining(self.rank, self.world_size, self.batch_size)  # raises now rather than at the next batch
        self.plan = plan
        self._walk = None

    def read(self, plan: Plan) -> Iterator[object]:
        """Yield the batches of a plan that is not followed, read in this process."""
        if isinstance(self.dataset, Rows):
            batches = SeededBatches(self.dataset.load, self.seed, self.dataset.draws)
        else:
            collate_fn = self.options.get("collate_fn") or default_collate
            batches = SeededBatches(partial(load_rows, self.dataset, collate_fn), self.seed)
        sampler = PlanBatches(self.rank, self.world_size, self.batch_size)
        sampler.plan = plan
        for part in sampler:
            batch = batches[part]
            yield batch if self._receive is None else self._receive(batch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[object]:
        if self.plan is not None and self.plan.cursor != self._position:
            self._walk = None  # batches that were fetched but not trained on are served again
        for _ in range(self._length):
            if self.before_batch is not None:
                self.before_batch()
            yield self._next_batch()

    def state_dict(self) -> State:
        """Return nothing: the cursor in the DataSelection callback's checkpoint entry is the only truth.

        The method exists because Lightning calls a loader without it "not resumable". A state of its own would be a
        second truth, and one that Lightning does not restore in all cases.
        """
        return {}

    def load_state_dict(self, state_dict: State) -> None:
        """Do nothing: see :meth:`state_dict`."""

    def shutdown(self) -> None:
        """End the workers; a later iteration starts new ones."""
        self._walk = None
        self._inner = None  # the DataLoader ends its workers when the last reference to it is gone

    def _next_batch(self) -> object:
        plan = self.plan
        if plan is None:
            raise RuntimeError(
                "there is no plan to train on: add DataSelection, or a preset such as MATES, to the Trainer's "
                "callbacks. (Tuner and LearningRateFinder take callbacks away: find the rate without selection)"
            )
        if self._walk is None:
            self._walk = self._start_walk(plan)
        elif plan.cursor > self._position:
            raise RuntimeError(
                f"the cursor of the plan of round {plan.round} stands at {plan.cursor}, but only {self._position} "
                f"examples were served: advance it by {self.global_batch} (batch size x ranks) for every batch"
            )
        try:
            batch = next(self._walk)
        except StopIteration:
            raise RuntimeError(
                f"the plan of round {plan.round} was walked to its end ({len(plan.ids)} examples) and no further plan "
                "was published: the DataSelection callback is missing from the Trainer's callbacks, or the plan was "
                "published later than in on_train_batch_end of its last batch"
            ) from None
        self._position += self.global_batch
        if self._receive is None:
            return batch
        received = self._receive(batch)
        return {name: tensor.pin_memory() for name, tensor in received.items()} if self.pin_memory else received

    def _start_walk(self, plan: Plan) -> Iterator[object]:
        """Point the inner DataLoader at the rest of the plan; its workers live on and drop prefetched batches."""
        if self._inner is None:
            self._inner = self._make_inner()
        self._batches.plan = plan
        self._position = plan.cursor
        return iter(self._inner)

    def _make_inner(self) -> DataLoader:
        options = dict(self.options)
        collate_fn = options.pop("collate_fn", None) or default_collate
        if isinstance(self.dataset, Rows):
            source, batches = self.dataset.source, SeededBatches(self.dataset.load, self.seed, self.dataset.draws)
        else:
            source, batches = self.dataset, SeededBatches(partial(load_rows, self.dataset, collate_fn), self.seed)
        return DataLoader(
            batches,
            batch_size=None,
            sampler=self._batches,
            collate_fn=_unchanged,  # by default it would make tensors of arrays
            persistent_workers=options.get("num_workers", 0) > 0,
            pin_memory=self.pin_memory and self._receive is None,
            # without a generator of its own, every new iterator would draw from the global random state
            generator=torch.Generator().manual_seed(self.seed + self.rank),
            **_introducing(source, options),
        )


def _introducing(dataset: MapStyle, options: LoaderOptions) -> LoaderOptions:
    """Return options under which a ``worker_init_fn`` finds the user's dataset in ``get_worker_info()``, as it expects.

    Without them, it would find the dataset of batches that the workers get.
    """
    function = options.get("worker_init_fn")
    return options if function is None else {**options, "worker_init_fn": partial(_introduce, dataset, function)}


def _introduce(dataset: MapStyle, function: WorkerInit, worker: int) -> None:
    object.__setattr__(get_worker_info(), "dataset", dataset)  # it is frozen
    function(worker)


def _unchanged(batch: object) -> object:
    return batch


class ShardedBatches:
    """Ready batches, shared out over the ranks: one rank's share is every R-th batch.

    Shares are equally long, because ranks that validate together must take the same number of steps: where the batches
    cannot be shared evenly, the last ranks repeat the first batches, as a ``DistributedSampler`` does. Like
    :class:`PlanLoader` it is no ``DataLoader``: walking it draws nothing from the global random state.
    """

    def __init__(self, batches: Sequence[Batch], rank: int = 0, world_size: int = 1) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            yield self.batches[(step * self.world_size + self.rank) % len(self.batches)]


def candidate_batches(rows: Rows, ids: Tensor, batch_size: int, options: LoaderOptions) -> Iterator[Batch]:
    """Yield the candidates ``ids (n,)`` in batches, in their order.

    ``options`` are those of a ``DataLoader``. Its workers are used only for a number of batches that is worth starting
    them.
    """
    parts = [part.tolist() for part in ids.split(batch_size)]
    workers = options.get("num_workers", 0)
    if workers == 0 or len(parts) < MIN_BATCHES_PER_WORKER * workers:
        yield from map(rows.candidates, parts)
    else:
        # without a generator of its own, the DataLoader would draw from the global random state
        options = {**_introducing(rows.source, options), "generator": torch.Generator().manual_seed(0)}
        parts_of_ids = cast("Dataset[list[int]]", parts)
        yield from DataLoader(parts_of_ids, batch_size=None, collate_fn=rows.candidates, **options)


def epoch_length(examples: int, global_batch: int, accumulate: int) -> int:
    """Return the batches of one epoch of one rank, a multiple of ``accumulate``, at least one window.

    Lightning makes an optimizer step on the last batch of an epoch, complete window or not, so an epoch must end where
    a window ends.

    Args:
        examples: examples of one epoch, all ranks together.
        global_batch: examples of one batch, all ranks together.
        accumulate: batches of one optimizer step.

    Raises:
        ValueError: an epoch holds less than one optimizer step.
    """
    windows = examples // (global_batch * accumulate)
    if windows < 1:
        raise ValueError(
            f"an epoch of {examples} examples is less than one optimizer step of {global_batch * accumulate} examples "
            f"({global_batch} a batch over all ranks, accumulate_grad_batches={accumulate}): enlarge the pool or "
            "epoch_examples, or lower batch_size, accumulate_grad_batches or the number of ranks"
        )
    return windows * accumulate
