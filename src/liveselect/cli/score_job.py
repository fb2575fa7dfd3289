"""The work of ``liveselect score``: measure some candidates, learn to predict it, predict the whole pool.

Long work is split into shards, each a file in a folder of the job that appears once it is complete. A job that was
stopped or killed continues with the first missing shard. Several processes distribute the shards and wait for each
other between the stages; all of them must see the folder.
"""

import hashlib
import json
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cli.score_cost import FILES_PHASE, SpentCost
from liveselect.cli.score_lock import locked_folder
from liveselect.cost import CostMeter, added
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import MIN_MEASUREMENTS, Batch, InfluenceEstimator, InfluenceRegressor, LiveModel, Round
from liveselect.influence import PMPInfluence
from liveselect.json_lines import whole_file
from liveselect.preserve import checksum, measuring
from liveselect.rehearsal import LOOKED_AT_CANDIDATES
from liveselect.scores import MANIFEST, VALUES, Scores, read_scores, write_scores
from liveselect.selectors.trial import check_predictions, try_regressor

WORK, JOB, REGRESSOR = ".liveselect-work", "job.json", "regressor.pt"
Found = TypeVar("Found")

MEASURED_SHARD_DIVISOR = 64
"""Measuring a candidate costs more than predicting it: its shards are smaller by this factor."""


@dataclass(kw_only=True)
class PoolJob(ABC):
    """Scores a pool shard by shard, in a folder of unfinished work; what makes the scores is left to subclasses.

    Attributes:
        round: the pool, all of whose candidates are scored.
        folder: of the scores; unfinished work is in its folder ``.liveselect-work``.
        model: the model that scores, None where none does.
        shard_size: candidates scored in one file.
        settings: of the command, kept with the scores; a job is continued only under equal settings.
        cost: of what was made before, such as the training of the model, ``seconds`` and ``flops`` by phase; kept with
            the scores, plus the job's.
        report: called with a line after each stage.
        dropped: scores of the same pool; what is -inf there becomes -inf here.
    """

    round: Round
    folder: Path
    model: LiveModel | None = None
    shard_size: int = 65_536
    settings: Mapping[str, object] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    report: Callable[[str], None] = lambda line: None
    dropped: Scores | None = None
    _spent: SpentCost = field(init=False)

    def run(self) -> Scores:
        """Do the remaining work, and return the scores.

        Raises:
            FileExistsError: the folder holds finished scores of another job, or files that no job made.
            ValueError: the folder is in use or holds unfinished work of another job, or the pool cannot be scored so.
        """
        self._refuse_settings()
        if self.dropped is not None:
            self.dropped.check_fit(self.round.pool.size, self.round.pool.fingerprint)
        if agreed((self.folder / MANIFEST).exists()):
            scores = read_scores(self.folder)
            if scores.about.get("job") != self._key():
                raise FileExistsError(
                    f"{self.folder} holds finished scores that were made in another way: choose another folder, or "
                    "delete it"
                )
            self.report(f"{self.folder} was scored in the same way before: nothing to do")
            self._clean_up()  # in case the job was killed just before it did so
            return scores
        if agreed((self.folder / VALUES).exists() and not (self.work / JOB).exists()):
            raise FileExistsError(
                f"{self.folder / VALUES} is there without {MANIFEST}, so it is not of a scoring job: choose another "
                "folder, or move it"
            )
        with locked_folder(self.work, JOB):
            self._rehearse()
            self._open()
            with self.round.meter.phase(FILES_PHASE):  # and all work without a phase of its own
                about = self._prepared()
                self._predicted()
            wait_for_all()
            if distributed.rank() == 0:
                self._assemble(about)
            self._clean_up()
            return read_scores(self.folder)

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return self.folder / WORK

    @abstractmethod
    def _prepared(self) -> dict[str, object]:
        """Do what comes before the first score, and return what the scores say about how they were made."""

    @abstractmethod
    def _scores_of(self, batch: Batch) -> Tensor:
        """Return the scores of a batch, ``(B,)`` float32, or numbers ``(B, K)`` that :meth:`_finished` is given."""

    def _rows(self, ids: Tensor) -> Iterable[Batch]:
        """Yield the candidates ``ids (n,)`` in batches of which :meth:`_scores_of` makes scores."""
        return self.round.batches(ids)

    def _checked(self, values: Tensor) -> Tensor:
        """Return the scores of a shard, or raise what is wrong with them."""
        return values

    def _finished(self, values: np.ndarray) -> np.ndarray:
        """Return the scores ``(n,)`` from what was made of all candidates, ``(n,)`` or ``(n, K)``."""
        return values

    def _refuse_settings(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"expected shards of at least one candidate, got shard_size={self.shard_size}")

    def _rehearse(self) -> None:  # noqa: B027 - optional
        """Raise now what would fail after hours."""

    def _depends_on(self) -> list[object]:
        """Return the settings that make this job another one, beside those of the command."""
        return [self.shard_size]

    def _clean_up(self) -> None:
        wait_for_all()
        if distributed.rank() == 0:
            shutil.rmtree(self.work, ignore_errors=True)
        wait_for_all()

    def _key(self) -> str:
        """Return a hash that is equal for equal jobs."""
        model, round = self.model, self.round
        key = hashlib.blake2b(digest_size=16)
        key.update(json.dumps([dict(self.settings), *self._depends_on(), round.seed], default=str).encode())
        key.update(f"{round.pool.fingerprint} {self.dropped.digest if self.dropped else None}".encode())
        if model is not None:
            key.update(f" {checksum(model.module, model.optimizer)}{model.global_batch}".encode())
        for batch in round.source.reference():
            for name in ("input_ids", "labels", "subtask"):
                key.update(batch[name].cpu().contiguous().numpy().tobytes() if name in batch else b"")
        return key.hexdigest()

    def _open(self) -> None:
        """Begin the job, or check that the unfinished one in the folder is the same."""
        job = {"key": self._key(), "settings": dict(self.settings)}
        file = self.work / JOB
        if distributed.rank() == 0 and not file.exists():
            with whole_file(file) as stream:
                stream.write(json.dumps(job, indent=1, default=str).encode())
        wait_for_all()
        if read_or_refuse(file, lambda: json.loads(file.read_text())["key"], self.work) != job["key"]:
            raise ValueError(
                f"{self.work} holds the unfinished work of another job (other settings, model or pool; {file.name} "
                "shows which): repeat that command to finish it, choose another folder, or delete this one"
            )
        self._spent = SpentCost.open(self.work, self.round.meter)

    def _predicted(self) -> None:
        """Score every candidate of the pool, shard by shard."""
        round = self.round
        missing = agreed([shard for shard in self._pool_shards() if not self._file("scores", shard).exists()])
        mine = missing[distributed.rank() :: distributed.world_size()]
        with round.meter.tracked("score the pool", sum(len(shard) for shard in mine), "candidates") as advance:
            for shard in mine:
                parts = []
                for batch in self._rows(torch.arange(shard.start, shard.stop)):
                    parts.append(self._scores_of(batch).cpu())
                    advance(len(parts[-1]))
                _write_array(self._file("scores", shard), self._checked(torch.cat(parts)).numpy())
                self._spent.keep()
        wait_for_all()

    def _assemble(self, about: Mapping[str, object]) -> None:
        """Join the shards and write the scores."""
        pool, shards = self.round.pool, self._pool_shards()
        first = _read_array(self._file("scores", shards[0]))
        kind = first.dtype.newbyteorder("<")
        with (self.work / "all").open("wb") as file:  # not a memory map: a full disk would end the process by a signal
            for shard in shards:
                _read_array(self._file("scores", shard)).astype(kind).tofile(file)
        whole = np.memmap(self.work / "all", dtype=kind, mode="r", shape=(pool.size, *first.shape[1:]))
        with self.round.meter.phase("finish scores"):
            values = without(self._finished(whole), self.dropped)
        described = {
            "job": self._key(),
            **about,
            **({"filter": self.dropped.name, "filter_blake2b": self.dropped.digest} if self.dropped else {}),
            "cost": added(self.cost, self._spent.total()),
            "settings": json.loads(json.dumps(dict(self.settings), default=str)),
        }
        write_scores(self.folder, values, pool.fingerprint, described)

    def _pool_shards(self) -> list[range]:
        return _shards(self.round.pool.size, self.shard_size)

    def _file(self, kind: str, shard: range) -> Path:
        return self.work / f"{kind}-{shard.start:012d}.npy"


@dataclass(kw_only=True)
class ScoreJob(PoolJob):
    """Scores a pool with a regressor that learns from the measurements of an estimator on a model.

    Attributes:
        estimator: measures influence.
        regressor: predicts it from text.
        probes: candidates measured.
    """

    model: LiveModel
    estimator: InfluenceEstimator
    regressor: InfluenceRegressor
    probes: int

    def _refuse_settings(self) -> None:
        probes = min(self.probes, self.round.pool.size)
        if probes < MIN_MEASUREMENTS or self.shard_size < 1:
            raise ValueError(
                f"expected at least {MIN_MEASUREMENTS} probes for the scorer to learn from and shards of at least one, "
                f"got {probes} (of a pool of {self.round.pool.size}) and shard_size={self.shard_size}"
            )

    def _depends_on(self) -> list[object]:
        return [self.probes, self.shard_size]

    def _open(self) -> None:
        super()._open()
        if isinstance(self.estimator, PMPInfluence) and self.estimator.directory is None:
            self.estimator.directory = self.work / "solve"

    def _prepared(self) -> dict[str, object]:
        ids, influence = self._measured()
        metrics = self._fitted(ids, influence)
        return {
            "estimator": type(self.estimator).__name__,
            "regressor": type(self.regressor).__name__,
            "measured": len(ids),
            "metrics": {name: float(value) for name, value in metrics.items()},
        }

    def _scores_of(self, batch: Batch) -> Tensor:
        predicted = self.regressor.predict(self.round, batch)
        check_predictions(self.regressor, predicted, len(batch["input_ids"]))
        return predicted.float().cpu()

    def _checked(self, values: Tensor) -> Tensor:
        return _finite(values, self.regressor)

    def _rehearse(self) -> None:
        """Raise errors of the scorer now, not after hours of measuring; a scorer that was fitted needs no rehearsal."""
        if agreed((self.work / REGRESSOR).exists()):
            return
        model, round = self.model, self.round
        count = min(LOOKED_AT_CANDIDATES, round.pool.size)
        few, meter = uniform_subset(round.pool.size, count, round.generator("trial")), CostMeter()
        small = replace(round, candidates=few, meter=meter)
        with measuring(model.module, model.optimizer):
            self.estimator.check(replace(model, meter=meter), small)
            try_regressor(self.regressor, small)

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Measure candidates, and return the ids (m,) and the influence (m,) of those with a finite one."""
        model, round = self.model, self.round
        pool_size = round.pool.size
        ids = uniform_subset(pool_size, min(self.probes, pool_size), round.generator("probes"))
        shards = _shards(len(ids), max(1, self.shard_size // MEASURED_SHARD_DIVISOR))
        missing = agreed([shard for shard in shards if not self._file("measured", shard).exists()])
        if missing:
            with round.meter.phase("solve"), measuring(model.module, model.optimizer):
                metrics = self.estimator.fit(model, round)
            self._spent.keep()
            self.report("solved: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        mine = missing[distributed.rank() :: distributed.world_size()]
        with round.meter.tracked("measure influence", sum(len(shard) for shard in mine), "candidates") as advance:
            for shard in mine:
                influence = measure(self.estimator, model, round, ids[shard.start : shard.stop])
                _write_array(self._file("measured", shard), influence.numpy())
                self._spent.keep()
                advance(len(shard))
        wait_for_all()
        influence = torch.from_numpy(np.concatenate([_read_array(self._file("measured", shard)) for shard in shards]))
        finite = influence.isfinite()
        if int(finite.sum()) < MIN_MEASUREMENTS:
            raise ValueError(
                f"{int(finite.sum())} of {len(ids)} measured candidates have a finite influence, the scorer needs "
                f"{MIN_MEASUREMENTS}: measure more (--probes), or look at the model's losses"
            )
        self.report(f"measured: {int(finite.sum())} of {len(ids)} candidates, std {float(influence[finite].std()):.4g}")
        return ids[finite], influence[finite].float()

    def _fitted(self, ids: Tensor, influence: Tensor) -> dict[str, float]:
        """Fit the regressor or load the fitted one, and return its metrics."""
        file = self.work / REGRESSOR
        if agreed(file.exists()):
            kept = read_or_refuse(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
            self.regressor.load_state_dict(kept["state"])
            return dict(kept["metrics"])
        with self.round.meter.phase("fit scorer"):
            metrics = dict(self.regressor.fit(self.round, ids, influence))
        state = self.regressor.state_dict()
        if state and distributed.rank() == 0:  # a regressor without state is fitted again after a stop
            with whole_file(file) as stream:
                torch.save({"state": state, "metrics": metrics}, stream)
        self._spent.keep()
        wait_for_all()
        self.report("fitted: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics


def without(values: np.ndarray, dropped: Scores | None) -> np.ndarray:
    """Return the scores ``(n,)`` with -inf where ``dropped`` has it."""
    if dropped is None:
        return values
    return np.where(np.isneginf(dropped.values.numpy()), -np.inf, values)


def measure(estimator: InfluenceEstimator, model: LiveModel, round: Round, ids: Tensor) -> Tensor:
    """Return the influence of the candidates ``ids (m,)``, ``(m,)`` floating point on CPU."""
    with measuring(model.module, model.optimizer):
        return torch.as_tensor(estimator.score_ids(model, round, ids))


def _finite(predictions: Tensor, regressor: InfluenceRegressor) -> Tensor:
    broken = int((~predictions.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{type(regressor).__name__} makes predictions that are not finite for {broken} of {len(predictions)} "
            "candidates: lower its learning rate, or choose another, and score into a new folder"
        )
    return predictions


def _shards(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def agreed(found: Found) -> Found:
    """Return the result of the first rank once all have one, before a rank makes files that others check for."""
    first: Found = distributed.gather_objects(found)[0]
    return first


def wait_for_all() -> None:
    """Return when every process has come here."""
    distributed.gather_objects(None)


def read_or_refuse(file: Path, read: Callable[[], Found], remedy: Path | None = None) -> Found:
    """Return what ``read`` returns; the error about a damaged file of the job says to delete it, or ``remedy``."""
    try:
        return read()
    except (ValueError, KeyError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete {remedy or file} and repeat the command, which makes it again"
        ) from error


def _read_array(file: Path) -> np.ndarray:
    return read_or_refuse(file, lambda: np.load(file))


def _write_array(file: Path, array: np.ndarray) -> None:
    with whole_file(file) as stream:
        np.save(stream, array)
