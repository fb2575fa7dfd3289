"""What a cheap scorer is: a plain function from a batch of rows to a column of numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, TypedDict

from torch import Tensor, nn

Setting = str | int | float | bool | None


class Rows(TypedDict, total=False):
    """A batch: ``input_ids (B, T)`` with ``attention_mask (B, T)`` where some tokens do not count, or B ``text``s."""

    id: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    text: list[str]


Total = Callable[[Tensor], Tensor]
"""Adds up a tensor over the processes that share out the pool."""


@dataclass(frozen=True)
class MethodCard:
    """What a method is, for those who read its scores.

    Attributes:
        name: as it is called in the command.
        measures: what a score is, and its unit; larger is drawn first.
        source: the paper or program that it follows.
        published: settings and results of the source.
        refreshed: whether it can be measured again during training, and by what.
    """

    name: str
    measures: str
    source: str
    published: Mapping[str, Setting] = field(default_factory=dict)
    refreshed: str = "made once, before training"

    def as_json(self) -> dict[str, object]:
        """Return the card as builtins."""
        return asdict(self) | {"published": dict(self.published)}


class Scorer(ABC):
    """Scores rows by what it learned from a reference set and a pool; needs no model that is trained.

    Once it is fitted, ``scorer(rows)`` depends on the rows alone and can be pickled, so that any engine can run it.

    Attributes:
        card: what the method is.
        reads: ``tokens`` where rows are ``input_ids`` and ``attention_mask``, ``text`` where they are ``text``.
        pool_rows: rows of the pool, drawn uniformly, that it is fitted on at the most.
        shares_pool: whether processes share out these rows; if not, each is given all of them.
        networks: modules that it runs; the FLOPs of their forwards are charged.
        uncounted: what else it computes whose FLOPs are not known, by name.
    """

    card: MethodCard
    reads: Literal["tokens", "text"] = "tokens"
    pool_rows: int = 1 << 20
    shares_pool: bool = True
    networks: tuple[nn.Module, ...] = ()
    uncounted: tuple[str, ...] = ()

    @abstractmethod
    def fit(self, reference: Iterable[Rows], pool: Iterable[Rows], total: Total = lambda value: value) -> None:
        """Learn from the rows of the reference set and of the pool.

        Args:
            reference: batches of all of the reference set.
            pool: batches of the pool, or of this process's share of it.
            total: adds up what was counted in the shares of all processes.
        """

    @abstractmethod
    def __call__(self, rows: Rows) -> Tensor:
        """Return the scores of rows, ``(B,)`` float32; -inf for what is never to be drawn."""

    def finished(self, values: Tensor) -> Tensor:
        """Return the scores of a whole pool ``(n,)`` from what was returned for its rows, ``(n,)`` or ``(n, K)``."""
        return values


def counted_mask(rows: Rows) -> Tensor | None:
    """Return which tokens count, ``(B, T)``, None where all do."""
    return rows.get("attention_mask")


def trimmed(rows: Rows) -> list[Tensor]:
    """Return the tokens of each row that count, ``(T_i,)``."""
    mask = counted_mask(rows)
    if mask is None:
        return list(rows["input_ids"])
    return [row[inside.bool()] for row, inside in zip(rows["input_ids"], mask, strict=True)]
