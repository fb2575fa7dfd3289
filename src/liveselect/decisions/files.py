"""The files of the decision ledger: written whole or not at all, and read by anything that reads Parquet."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch import Tensor

from liveselect.decisions.table import SCHEMA, RoundDecisions, decision_rows
from liveselect.json_lines import whole_file
from liveselect.ledger import record_folder, run_id_of
from liveselect.plan import Plan

FOLDER = "decisions"
MOST_REJECTED = 5_000_000
"""Rejected candidates of a round that are recorded by default, some 20 MB."""
ROWS_PER_WRITE = 1 << 16
"""Rows encoded at once, so that a round of the whole pool needs little memory besides its columns."""
_FILE_NAME = re.compile(r"round-(\d{6,})\.parquet")
_KEY_PREFIX = "liveselect."


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

    The content of a file follows from the decisions alone: a resumed run that repeats a round writes the same file.
    Files of later rounds, left by a run that resumed from an earlier checkpoint, are deleted. When a new run starts in
    the same folder, the files of the run before are kept beside it as ``decisions-1`` and so on.

    Args:
        folder: made when the first round is written.
        most_rejected: limit on the rejected candidates of a round; those nearest to being chosen are written. Chosen
            and measured candidates are all written. Of ready scores only what has changed since the first round
            that drew from them is written; the files of later rounds name the first one.
    """

    def __init__(self, folder: str | Path, most_rejected: int = MOST_REJECTED) -> None:
        if most_rejected < 0:
            raise ValueError(f"expected most_rejected of at least 0, got {most_rejected}")
        self.folder = Path(folder)
        self.most_rejected = most_rejected

    def write(self, decisions: RoundDecisions) -> Path:
        """Write one round and return its file; raise OSError if it cannot be written."""
        if decisions.record.round == 0:
            self.keep_older()
        scores_id, base = decisions.selection.scores_id, self._round_with(decisions)
        known = None if base is None else read_rows(base, ["id", "reason"], pc.is_finite(ds.field("score")))
        rows, left_out = decision_rows(decisions, self.most_rejected, known)
        about = {
            "round": decisions.record.round,
            "step": decisions.record.step,
            "selector": decisions.record.selector,
            "plan": decisions.plan.fingerprint,
            "chosen": len(decisions.plan.ids),
            "pool": decisions.pool.fingerprint,
            "pool_size": decisions.pool.size,
            "left_out": left_out,
            "run": decisions.run_id,
            **({} if scores_id is None else {"scores": scores_id}),
            **({} if base is None else {"scores_in": base.name}),
        }
        schema = SCHEMA.with_metadata({_KEY_PREFIX + key: str(value) for key, value in about.items()})
        path = self.folder / f"round-{decisions.record.round:06d}.parquet"
        encoding = dict.fromkeys(["score", "bonus", "noise", "influence"], "BYTE_STREAM_SPLIT")
        encoding |= dict.fromkeys(["id", "place", "rank"], "DELTA_BINARY_PACKED")
        repeated = ["group", "reason", "threshold", "round", "step", "round_flops", "flops_before"]
        settings = {"compression": "zstd", "use_dictionary": repeated, "column_encoding": encoding}
        with whole_file(path) as file, pq.ParquetWriter(file, schema, **settings) as writer:
            for start in range(0, len(rows), ROWS_PER_WRITE):
                writer.write_table(rows.slice(start, ROWS_PER_WRITE).cast(schema))
        for index, later in rounds_in(self.folder).items():
            if index > decisions.record.round:
                later.unlink()
        return path

    def _round_with(self, decisions: RoundDecisions) -> Path | None:
        """Return the file of the earlier round of this run that holds the same ready scores, None where there is none.

        It is the first one, so that a round that is repeated after a resume refers to the same file.
        """
        wanted = decisions.selection.scores_id
        if wanted is None:
            return None
        for index, path in rounds_in(self.folder).items():
            if index >= decisions.record.round:
                break
            about = read_about(path)
            if about.get("scores") == wanted and about.get("run", "") == decisions.run_id and "scores_in" not in about:
                return path
        return None

    def keep_older(self) -> None:
        """Give the decisions of an earlier run in the same folder another name; they are the only record of it."""
        if rounds_in(self.folder):
            names = (self.folder.with_name(f"{self.folder.name}-{i}") for i in count(1))
            self.folder.rename(next(name for name in names if not name.exists()))


def rounds_in(folder: Path) -> dict[int, Path]:
    """Return the files of the recorded rounds in ``folder``, by round, ascending."""
    matches = ((_FILE_NAME.fullmatch(path.name), path) for path in folder.glob("round-*.parquet"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def find_decisions(run: str | Path) -> Path:
    """Return the folder of the decisions of a run: ``run`` itself, or the only such folder in it or beside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, or it holds those of several runs.
    """
    folder = _find_folder(run)
    check_one_run(folder)
    return folder


def check_one_run(folder: Path) -> None:
    """Raise ValueError when the rounds in ``folder``, and the ledger beside it, are not of one run."""
    rounds: dict[str, list[int]] = {}
    for index, path in rounds_in(folder).items():
        rounds.setdefault(read_about(path).get("run", ""), []).append(index)
    beside = run_id_of(folder.parent / "ledger.jsonl") if folder.name == FOLDER else None
    if len(rounds) > 1:
        parts = "; ".join(f"round {', '.join(map(str, each))} of run {run_id!r}" for run_id, each in rounds.items())
        raise ValueError(f"{folder} holds the decisions of several runs, which nobody trained on together: {parts}")
    if beside is not None and rounds and beside not in rounds:
        raise ValueError(
            f"{folder} holds the decisions of run {next(iter(rounds))!r}, and the ledger beside it is of run "
            f"{beside!r}: put together what belongs together"
        )


def _find_folder(run: str | Path) -> Path:
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


def read_rows(path: Path, columns: Sequence[str] | None = None, where: ds.Expression | None = None) -> pa.Table:
    """Return the rows of a round's file for which ``where`` holds, by default all; ValueError for a damaged file."""
    with _naming(path):
        return ds.dataset(path).to_table(columns=None if columns is None else list(columns), filter=where)


def read_scores(path: Path) -> pa.Table:
    """Return ``id`` and ``score`` of what a round compared, with ready scores that an earlier round's file holds.

    Those of candidates that the earlier round compared and this one did not, because they were trained on, are among
    them.
    """
    columns, finite = ["id", "score"], pc.is_finite(ds.field("score"))
    own, earlier = read_rows(path, columns, finite), read_about(path).get("scores_in")
    if earlier is None or not path.with_name(earlier).is_file():
        return own
    rest = read_rows(path.with_name(earlier), columns, finite)
    rest = rest.filter(pc.invert(pc.is_in(rest["id"], value_set=own["id"].combine_chunks())))
    return pa.concat_tables([own, rest])


def read_round(
    path: Path, columns: Sequence[str] | None = None, ids: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Return columns of a round as arrays, of some ``ids`` or of all; a null number is NaN.

    Raises:
        ValueError: the file is damaged.
    """
    table = read_rows(path, columns, None if ids is None else ds.field("id").isin(ids))
    return {name: table[name].to_numpy() for name in table.column_names}


def read_about(path: Path) -> dict[str, str]:
    """Return the metadata of a round's file: round, step, selector, plan, chosen, pool, pool_size, left_out, run.

    Raises:
        ValueError: the file has none, or cannot be read.
    """
    with _naming(path):
        metadata = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
    found = {name.removeprefix(_KEY_PREFIX): text for name, text in metadata.items() if name.startswith(_KEY_PREFIX)}
    if "plan" not in found:
        raise ValueError(f"{path} is not the file of a round: it lacks the metadata of one")
    return found


def read_plan(path: Path) -> RecordedPlan:
    """Return the plan of a round's file; raise ValueError if its fingerprint is not the recorded one."""
    about = read_about(path)
    rows = read_rows(path, ["id", "place"], ds.field("chosen")).sort_by("place")
    ids = torch.from_numpy(np.array(rows["id"].to_numpy()))
    plan = RecordedPlan(int(about["round"]), int(about["step"]), ids, about["plan"], about["pool"])
    if Plan(plan.round, plan.ids).fingerprint != plan.fingerprint:
        raise ValueError(f"{path} does not hold the plan that it names: it was changed or copied in part")
    return plan


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the error of one that cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not the file of a round ({str(error).strip()}): it was damaged or copied in part"
        ) from error
