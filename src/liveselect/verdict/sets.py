"""What both arms are judged on: the half of the reference set that selection does not see, and further sets."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from liveselect.functional.layer_pass import count_rows
from liveselect.grammar import Batch, CandidateSource
from liveselect.plan import Plan
from liveselect.seeding import generator_for


class HalfReference(CandidateSource):
    """A source that serves one half of its reference set, and all else as it is.

    Of every two neighbouring examples a coin under the seed gives one to each half, so that both halves have the
    composition of the whole. A last one without a neighbour belongs to selection.

    Args:
        source: the data.
        seed: of the run.
        held_out: whether this is the half that selection does not see.
    """

    def __init__(self, source: CandidateSource, seed: int, held_out: bool = False) -> None:
        self._source, self._seed, self._held_out = source, seed, held_out
        self.pool = source.pool
        self.batch_size = source.batch_size
        self.reference_names = source.reference_names
        if source.reference_fingerprint is not None:
            half = "held out" if held_out else "seen"
            self.reference_fingerprint = f"{source.reference_fingerprint}, the half that is {half} with seed {seed}"

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order."""
        return self._source.candidates(ids)

    def reference(self) -> Iterator[Batch]:
        """Yield the batches of this half, the same ones in the same order at each call."""
        generator = generator_for(self._seed, 0, "halves of the reference set")
        waiting: Tensor | None = None  # the second coin of a pair whose first example ended a batch
        batches = [(batch, count_rows(batch)) for batch in self._source.reference()]
        left = sum(rows for _, rows in batches)
        for batch, rows in batches:
            flags = []
            for _ in range(rows):
                if waiting is not None:
                    flag, waiting = waiting, None
                elif left == 1:
                    flag = torch.tensor(False)
                else:
                    flag = torch.rand((), generator=generator) < 0.5
                    waiting = ~flag
                flags.append(flag)
                left -= 1
            mask = torch.stack(flags) == self._held_out if rows else torch.empty(0, dtype=torch.bool)
            if mask.any():
                yield _rows_of(batch, mask, rows)

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``."""
        return self._source.decode(input_ids)

    def follow(self, plan: Plan) -> None:
        """Refuse: training follows the source itself."""
        raise RuntimeError("a half of a reference set serves no training batches")


def first_rows(batches: Iterable[Batch], most: int) -> list[Batch]:
    """Return the first ``most`` rows of some batches, in batches."""
    kept: list[Batch] = []
    for batch in batches:
        rows = count_rows(batch)
        if rows > most:
            batch = _rows_of(batch, torch.arange(rows) < most, rows)
        if most > 0:
            kept.append(batch)
        most -= rows
    return kept


def _rows_of(batch: Batch, mask: Tensor, rows: int) -> Batch:
    def part(value: Tensor) -> Tensor:
        per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        return value[mask.to(value.device)] if per_example else value

    return {key: part(value) for key, value in batch.items()}
