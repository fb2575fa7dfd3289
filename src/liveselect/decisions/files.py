"""The files of the decision ledger: written whole or not at all, and read by anything that reads Parquet."""

import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from liveselect.decisions.table import DecisionTable, RoundDecisions
from liveselect.plan import Plan
from liveselect.run_paths import record_folder

FOLDER = "decisions"
_NAME = re.compile(r"round-(\d{6,})\.parquet")
_MARK = b"liveselect"
_TEXTS = ("group", "reason")
_FLOATS = ("score", "bonus", "noise", "influence")
SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32()),
        pa.field("step", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("group", pa.string()),
        pa.field("chosen", pa.bool_()),
        pa.field("place", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("bonus", pa.float64()),
        pa.field("noise", pa.float64()),
        pa.field("rank", pa.int32()),
        pa.field("threshold", pa.float64()),
        pa.field("influence", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("round_flops", pa.float64()),
        pa.field("flops_before", pa.float64()),
    ]
)
"""One row for each candidate that a round compared, measured or chose.

``place`` is its place in training order, ``rank`` how many compared candidates had a larger sum of score, bonus and
noise; for selectors that compare groups, score, bonus and rank are those of its group. ``round_flops`` is what the
round cost and ``flops_before`` what the run had cost until then, over all ranks. What does not apply is null.
"""


class RecordedPlan(NamedTuple):
    """The plan of one round as it was recorded.

    Attributes:
        round: index of the round.
        step: optimizer steps done when it was made.
        ids: ``(k,)`` int64, in training order.
        fingerprint: of the plan.
        pool: fingerprint of the pool.
    """

    round: int
    step: int
    ids: Tensor
    fingerprint: str
    pool: str


class DecisionLedger:
    """Writes the decisions of a run, a file for each round.

    The content of a file follows from the decisions alone: a resumed run that repeats a round writes the same again.
    Files of later rounds, which a run leaves that goes back to an earlier checkpoint, are deleted; those of another run
    in the same folder, which begins anew, are kept beside it as ``decisions-1`` and so on.

    Args:
        folder: made when the first round is written.
        most_rejected: of a round's rejected candidates only so many are told, those that came nearest to being chosen.
            Chosen and measured ones are all told.
    """

    def __init__(self, folder: str | Path, most_rejected: int = 5_000_000) -> None:
        if most_rejected < 0:
            raise ValueError(f"expected most_rejected of at least 0, got {most_rejected}")
        self.folder = Path(folder)
        self.most_rejected = most_rejected

    def write(self, decisions: RoundDecisions) -> Path:
        """Write one round and return its file; raise OSError when the disk does not take it."""
        if decisions.record.round == 0:
            self.keep_older()
        self.folder.mkdir(parents=True, exist_ok=True)
        table = DecisionTable(decisions, self.most_rejected)
        about = {
            "round": decisions.record.round,
            "step": decisions.record.step,
            "selector": decisions.record.selector,
            "plan": decisions.plan.fingerprint,
            "chosen": len(decisions.plan.ids),
            "pool": decisions.pool.fingerprint,
            "pool_size": decisions.pool.size,
            "left_out": table.left_out,
        }
        schema = SCHEMA.with_metadata({_MARK + b"." + key.encode(): str(about[key]).encode() for key in about})
        path = self.folder / f"round-{decisions.record.round:06d}.parquet"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                with pq.ParquetWriter(
                    file,
                    schema,
                    compression="zstd",
                    use_dictionary=[*_TEXTS, "threshold", "round", "step", "round_flops", "flops_before"],
                    column_encoding=dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT")
                    | {"id": "DELTA_BINARY_PACKED", "place": "DELTA_BINARY_PACKED", "rank": "DELTA_BINARY_PACKED"},
                ) as writer:
                    for piece in table.pieces():
                        writer.write_table(_arrow(piece, schema, table.words))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._forget_after(decisions.record.round)
        return path

    def keep_older(self) -> None:
        """Give the decisions of an earlier run in the same folder another name; they are the only record of it."""
        if rounds_in(self.folder):
            names = (self.folder.with_name(f"{self.folder.name}-{i}") for i in count(1))
            self.folder.rename(next(name for name in names if not name.exists()))

    def _forget_after(self, last: int) -> None:
        for index, path in rounds_in(self.folder).items():
            if index > last:
                path.unlink()


def rounds_in(folder: Path) -> dict[int, Path]:
    """Return the files of the recorded rounds in ``folder``, by round, ascending."""
    found = {int(match[1]): path for path in folder.glob("round-*.parquet") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def find_decisions(run: str | Path) -> Path:
    """Return the folder of the decisions of a run: ``run`` itself, or the only such folder inside of it or beside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    path = record_folder(Path(run))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected the folder of a run")
    if path.is_file():  # a ledger.jsonl, or one of the rounds
        path = path.parent
    if rounds_in(path):
        return path
    found = [folder for folder in sorted(path.rglob(FOLDER)) if rounds_in(folder)]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no {FOLDER}/round-*.parquet: expected the folder that a run with the DataSelection callback "
            "wrote to; the first file appears with the first round"
        )
    if len(found) > 1:
        raise ValueError(f"{path} holds the decisions of several runs, name one of them: {', '.join(map(str, found))}")
    return found[0]


def read_round(
    path: Path, columns: Sequence[str] | None = None, ids: Sequence[int] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return columns of a round as arrays; numbers that are null are NaN.

    Args:
        path: file of the round.
        columns: names; all by default.
        ids: only these candidates.

    Raises:
        ValueError: the file is not what was written.
    """
    try:
        filters = None if ids is None else [("id", "in", list(ids))]
        table = pq.read_table(path, columns=None if columns is None else list(columns), filters=filters)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not the file of a round ({error}): it was damaged or copied in part") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def read_about(path: Path) -> dict[str, str]:
    """Return what a round's file says of itself: round, step, selector, plan, chosen, pool, pool_size, left_out.

    Raises:
        ValueError: it says nothing, or cannot be read.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not the file of a round ({error}): it was damaged or copied in part") from error
    prefix = _MARK + b"."
    found = {key.removeprefix(prefix).decode(): value.decode() for key, value in metadata.items() if prefix in key}
    if "plan" not in found:
        raise ValueError(f"{path} is not the file of a round: it lacks the marks of one")
    return found


def read_plan(path: Path) -> RecordedPlan:
    """Return the plan of a round's file; raise ValueError when it is not the one that was trained on."""
    about = read_about(path)
    columns = read_round(path, ["id", "chosen", "place"])
    chosen = columns["chosen"].astype(bool)
    order = columns["place"][chosen].argsort(kind="stable")
    ids = np.ascontiguousarray(columns["id"][chosen][order], dtype=np.int64)
    plan = RecordedPlan(int(about["round"]), int(about["step"]), torch.from_numpy(ids), about["plan"], about["pool"])
    if Plan(plan.round, plan.ids).fingerprint != plan.fingerprint:
        raise ValueError(f"{path} does not hold the plan that it names: it was changed or copied in part")
    return plan


def _arrow(columns: dict[str, npt.NDArray[Any]], schema: pa.Schema, words: dict[str, list[str]]) -> pa.Table:
    arrays = []
    for field in schema:
        values = columns[field.name]
        if field.name in words:
            arrays.append(pa.array(words[field.name], field.type).take(pa.array(values)))
        elif field.name in ("place", "rank"):
            arrays.append(pa.array(values.astype(np.int32), mask=values < 0))
        elif values.dtype.kind == "f":
            arrays.append(pa.array(values, field.type, mask=np.isnan(values)))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)
