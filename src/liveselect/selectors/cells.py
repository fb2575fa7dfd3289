"""Cells: the parts of a pool that a mixture weighs, by source, by group, and by how a prior ranks candidates."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liveselect.cost import CostMeter
from liveselect.grammar import CandidateSource, CostByPhase
from liveselect.pool import CandidatePool
from liveselect.selectors.score_table import ScoreTable

WEIGHT = "weight"
"""The column of a table that holds weights."""

PRIOR = "prior"

Row = Mapping[str, Any]
"""A line of a table: the levels of a cell by factor, and numbers."""


@dataclass(frozen=True)
class Factor:
    """One of the ways in which a pool is divided into cells.

    Attributes:
        name: ``source``, ``group`` or ``prior``.
        levels: names of its levels.
        of_cells: ``(K,)`` int64, the level of each cell.
    """

    name: str
    levels: tuple[str, ...]
    of_cells: Tensor


@dataclass(frozen=True)
class Cells:
    """Which cell each candidate is in.

    Cells are what candidates have in common: their source, their group, and the part of the pool that a prior's score
    puts them in. Pairs of source and group that have no candidate are no cells; parts of them may be empty.

    Attributes:
        codes: ``(size,)`` int32, the cell of each candidate.
        factors: what divides the pool; none makes a single cell of it.
        groups: ``(K,)`` int64, the group of the pool that a cell lies in.
        fingerprint: names the assignment of candidates to sources and groups, and the number of parts.
    """

    codes: Tensor
    factors: tuple[Factor, ...]
    groups: Tensor
    fingerprint: str

    @classmethod
    def of(cls, pool: CandidatePool, scores: Tensor | None = None, parts: int = 5) -> "Cells":
        """Return the cells of a pool; with ``scores (size,)`` in as many equal ``parts``, the lowest first.

        Candidates whose score is -inf, which are never drawn, are in the lowest part.
        """
        group = torch.zeros(pool.size, dtype=torch.int64) if pool.groups is None else pool.groups.long()
        sources = pool.sources
        pairs = group if sources is None else sources.codes.long() * len(pool.group_names) + group
        found, codes = pairs.unique(return_inverse=True)
        digest = hashlib.blake2b(codes.int().numpy().tobytes(), digest_size=8)
        digest.update(found.numpy().tobytes())
        groups = found % len(pool.group_names)
        divided: list[tuple[str, tuple[str, ...], Tensor]] = []
        if sources is not None and len(sources.names) > 1:
            divided.append(("source", sources.names, found // len(pool.group_names)))
        if len(pool.group_names) > 1:
            divided.append(("group", pool.group_names, groups))
        if scores is not None:
            codes = codes * parts + _parts(scores, parts)
            number = torch.arange(parts)
            divided = [(name, levels, of.repeat_interleave(parts)) for name, levels, of in divided]
            divided.append((PRIOR, tuple(str(part + 1) for part in range(parts)), number.repeat(len(found))))
            groups = groups.repeat_interleave(parts)
        factors = tuple(Factor(*each) for each in divided)
        return cls(codes.int(), factors, groups, f"{len(groups)}/{digest.hexdigest()}")

    def __len__(self) -> int:
        return len(self.groups)

    def sizes(self, among: Tensor | None = None) -> Tensor:
        """Return how many candidates, or how many of ``among (n,)``, are in each cell, ``(K,)`` int64."""
        codes = self.codes if among is None else self.codes[among]
        return torch.bincount(codes, minlength=len(self))

    def rows(self, numbers: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return a line for each cell that is not empty: its levels, its ``candidates``, and ``numbers (K,)``."""
        sizes = self.sizes()
        return [
            {
                **{factor.name: factor.levels[int(factor.of_cells[cell])] for factor in self.factors},
                "candidates": int(sizes[cell]),
                **{name: float(values[cell]) for name, values in numbers.items()},
            }
            for cell in sizes.nonzero().flatten().tolist()
        ]

    def weights(self, rows: Iterable[Row], base: Tensor) -> Tensor:
        """Return the weights that a table gives the cells, ``(K,)`` float64 with the sum 1.

        A line that leaves factors out, or leaves them empty, is about all cells of its levels; its weight is shared
        out among them in proportion to ``base (K,)``. Cells that no line is about have the weight 0.

        Raises:
            ValueError: a line is not about cells of this pool, or a weight is no finite number of at least 0.
        """
        weights = torch.zeros(len(self), dtype=torch.float64)
        known = [factor.name for factor in self.factors]
        for row in rows:
            mine = torch.ones(len(self), dtype=torch.bool)
            for factor in self.factors:
                level = row.get(factor.name)
                if level is None or level == "":
                    continue
                if str(level) not in factor.levels:
                    raise ValueError(
                        f"the table of weights names the {factor.name} {str(level)!r}, and the pool has "
                        f"{_some(factor.levels)}: weights belong to the pool that they were made for"
                    )
                mine &= factor.of_cells == factor.levels.index(str(level))
            if not any(name in row for name in known):
                raise ValueError(
                    f"expected lines of the table of weights to name {' or '.join(known) or 'no cell'}, got the "
                    f"columns {sorted(map(str, row))}"
                )
            total = float(base[mine].sum())
            if total > 0:
                weights[mine] += _weight(row) * base[mine] / total
        if not weights.sum() > 0:
            raise ValueError("expected a table in which some cell that holds candidates has a weight above 0")
        return weights / weights.sum()


class Division:
    """Divides pools into cells, with or without a prior, and keeps the cells as long as the prior's scores hold.

    Args:
        prior: what :class:`~liveselect.selectors.ScoredSelector` takes as scores; None for none.
        parts: of the pool by the prior's score, of equal size, at least 2.
        column: name of the column of a Parquet file with scores.
    """

    def __init__(self, prior: Any, parts: int, column: str = "score") -> None:
        if parts < 2 and prior is not None:
            raise ValueError(f"expected at least 2 parts of the pool by the prior, got {parts}: leave the prior out")
        self.parts = parts
        self._table = None if prior is None else ScoreTable(prior, column)
        self._made: tuple[Tensor | None, Cells] | None = None  # the scores that the cells are made of

    @property
    def has_prior(self) -> bool:
        """Whether a prior divides the pool too."""
        return self._table is not None

    @property
    def cost(self) -> CostByPhase:
        """What making the prior's scores cost."""
        return {} if self._table is None else self._table.cost

    @property
    def digest(self) -> list[str] | None:
        """What names the prior's scores; None without a prior."""
        return None if self._table is None else self._table.digest

    def prepare(self, source: CandidateSource, meter: CostMeter) -> None:
        """Make the scores of the prior, where they are those of the run's own data."""
        if self._table is not None:
            self._table.prepare(source, meter)

    def expect(self, digest: list[str] | None) -> None:
        """Raise ValueError unless a checkpoint's scores are the prior's."""
        if self._table is not None and digest is not None:
            self._table.expect(digest)

    def scores(self, pool: CandidatePool) -> Tensor | None:
        """Return the prior's score of every candidate, ``(size,)``; None without a prior."""
        return None if self._table is None else self._table.values(pool)

    def eligible(self, pool: CandidatePool) -> Tensor | None:
        """Return which candidates have a score above -inf, ``(size,)`` bool; None for all."""
        return None if self._table is None else self._table.eligible(pool)

    def cells(self, pool: CandidatePool) -> Cells:
        """Return the cells of the pool: the same object until the prior's scores are others."""
        scores = self.scores(pool)
        if self._made is None or self._made[0] is not scores:
            self._made = scores, Cells.of(pool, scores, self.parts)
        return self._made[1]


def read_table(source: "str | Path | Mapping[str, float]") -> list[Row]:
    """Return the lines of a ``.csv``, ``.json`` or ``.parquet`` file of weights, or of weights by group.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, or damaged.
    """
    if isinstance(source, Mapping):
        return [{"group": name, WEIGHT: weight} for name, weight in source.items()]
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a table of weights at {path}, found none: a run writes mixture.csv")
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        if kind == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise ValueError("it holds no list of lines")
            return found
        if kind == ".parquet":
            import pyarrow.parquet as pq

            lines: list[Row] = pq.read_table(path).to_pylist()
            return lines
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of weights ({error}): a run writes one as mixture.csv") from error
    raise ValueError(f"expected a table of weights in a .csv, .json or .parquet file, got {path}")


def write_table(rows: Sequence[Row], path: str | Path) -> None:
    """Write lines to a ``.csv``, ``.json`` or ``.parquet`` file; raise ValueError for another kind."""
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind == ".csv":
        path.write_text(as_csv(rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        raise ValueError(f"expected a table of weights in a .csv, .json or .parquet file, got {path}")


def as_csv(rows: Sequence[Row]) -> str:
    """Return lines as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [WEIGHT], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parts(scores: Tensor, parts: int) -> Tensor:
    """Return the part of each candidate by its score, ``(size,)`` int64; equal scores are in one part."""
    finite = scores[scores.isfinite()].double()
    places = torch.arange(1, parts) * len(finite) // parts
    edges = finite.sort().values[places] if len(finite) else finite
    return torch.bucketize(scores.double(), edges, right=True)


def _weight(row: Row) -> float:
    try:
        weight = float(row[WEIGHT])
    except (KeyError, TypeError, ValueError):
        weight = -1.0
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"expected a {WEIGHT} of at least 0 in every line of the table of weights, got {dict(row)}")
    return weight


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
