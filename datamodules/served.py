"""The pool and the reference set of a fit, opened and checked, with the loader of its training batches."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from liveselect.datamodules import checks
from liveselect.datamodules.loader import PlanLoader, candidate_batches, epoch_length
from liveselect.datamodules.opening import OpenedRows, fingerprint_of, mixture_of, open_mixture
from liveselect.datamodules.rows.groups import cost_of_groups, open_pool
from liveselect.datamodules.settings import Place, ServingSettings
from liveselect.grammar import Batch
from liveselect.pool import CandidatePool

BULK_ROWS = 512
"""Rows of a batch that no model sees: reading costs as much for each batch as for dozens of rows."""


class ServedPool:
    """A pool and its reference set, opened and checked for one fit, and the loader that walks the fit's plans.

    Args:
        opened: the rows of the pool.
        settings: how they are served.
        place: the rank that they are served on.
        before: the candidates of an earlier fit; if they are the same ones, their counts of uses are kept.
        before_batch: called before each training batch is fetched.

    Attributes:
        opened: the rows of the pool.
        pool: the candidates.
        cost_of_groups: what making the groups took, by kind and phase, where they are clusters; else nothing.
        reference: batches of the reference set.
        reference_names: the sets that it is a mixture of, none where it is a single one.
        reference_fingerprint: a hash of them.
        further_sets: batches of further sets, by name.
        loader: serves training batches.

    Raises:
        ValueError: the pool is smaller than a global batch, the reference set is empty or inside the pool, or ranks
            opened different data.
    """

    def __init__(
        self,
        opened: OpenedRows,
        settings: ServingSettings,
        place: Place,
        before: CandidatePool | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> None:
        rows, batch_size = opened.rows, opened.batch_size
        self.opened = opened
        pool = open_pool(rows, settings.groups)
        self.pool = before if before is not None and before.identity == pool.identity else pool
        self.cost_of_groups: Mapping[str, Mapping[str, float]] = cost_of_groups(rows, settings.groups)
        checks.check_same_on_all_ranks("the pool", " ".join(filter(None, self.pool.identity)))
        checks.check_pool_size(self.pool.size, batch_size, place)
        examples = settings.epoch_examples or self.pool.size
        length = epoch_length(examples, batch_size * place.world_size, place.accumulate)
        self.reference: list[Batch] = open_mixture(settings.reference, opened, settings, settings.overlap)
        self.reference_names = tuple(mixture_of(settings.reference))
        self.reference_fingerprint = fingerprint_of(self.reference)
        self.further_sets: dict[str, list[Batch]] = {
            name: open_mixture(source, opened, settings, "allow")
            for name, source in (settings.further_sets or {}).items()
        }
        checks.check_same_on_all_ranks("the reference set", self.reference_fingerprint)
        self.loader = PlanLoader(
            rows,
            batch_size,
            length,
            place.rank,
            place.world_size,
            settings.seed,
            place.pin_memory,
            opened.options,
            before_batch,
        )
        self._probe_batch_size = settings.probe_batch_size or batch_size

    def candidates(self, ids: Tensor) -> Iterator[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order.

        A prepared pool is read in this process; rows of a dataset are loaded by workers if there are enough of them.
        """
        rows = self.opened.rows
        return candidate_batches(rows, ids, self._probe_batch_size, self.opened.options if rows.worth_workers else {})

    def in_bulk(self, ids: Tensor) -> Iterator[Batch]:
        """Yield the candidates ``ids (n,)`` in batches that are read fastest, in their order."""
        rows = self.opened.rows
        return candidate_batches(rows, ids, BULK_ROWS, self.opened.options if rows.worth_workers else {})

    def close(self) -> None:
        """End the workers, and forget the plan."""
        self.loader.shutdown()
        self.loader.plan = None
