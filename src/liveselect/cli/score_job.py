"""The work of ``liveselect score``: measure some candidates, learn to predict it, predict the whole pool.

Everything that takes long is cut into shards, each a file in a folder of the job that appears when it is whole. A job
that was stopped, in whatever way, goes on with the first shard that is missing. Several processes share the shards out
and wait for each other between the stages; their folder must be one that all of them see.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cli.score_cost import KEEPING, SpentCost
from liveselect.cli.score_lock import alone_in
from liveselect.cost import CostMeter, SilentProgress, added
from liveselect.functional.sampling import uniform_subset
from liveselect.influence import PMPInfluence
from liveselect.protocols import InfluenceEstimator, InfluenceRegressor, RoundContext
from liveselect.regressors.targets import MIN_MEASUREMENTS
from liveselect.rehearsal import SOME
from liveselect.scores import MANIFEST, VALUES, Scores, read_scores, write_scores
from liveselect.selectors.trial import check_predictions, try_regressor
from liveselect.snapshot import checksum, measuring

WORK, JOB, REGRESSOR = ".liveselect-work", "job.json", "regressor.pt"
Found = TypeVar("Found")

DEARER = 64  # measuring a candidate costs more than predicting it: its shards are smaller by this factor


@dataclass
class ScoreJob:
    """Scores a pool with what an estimator measured on a model and a regressor learned from it.

    Attributes:
        context: the model that is measured on, and the pool.
        estimator: measures influence.
        regressor: predicts it from text.
        probes: candidates measured.
        folder: where the scores go; what is unfinished is in its folder ``.liveselect-work``.
        shard_size: candidates scored between two files.
        settings: what the job was asked to do, kept with the scores; a job is continued only under equal settings.
        cost: what was spent before the job on what it works with (the training of the proxy): ``seconds`` and ``flops``
            by phase. It is kept with the scores, and with it what the job costs.
        report: told one line after each stage.
    """

    context: RoundContext
    estimator: InfluenceEstimator
    regressor: InfluenceRegressor
    probes: int
    folder: Path
    shard_size: int = 65_536
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    report: Callable[[str], None] = lambda line: None
    _spent: SpentCost = field(init=False)

    def run(self) -> Scores:
        """Do what is not done yet, and return the scores.

        Raises:
            FileExistsError: the folder holds finished scores of another job, or files of somebody else.
            ValueError: the folder holds the unfinished work of another job, or is in use, or too little could be
                measured.
        """
        probes = min(self.probes, self.context.source.pool.size)
        if probes < MIN_MEASUREMENTS or self.shard_size < 1:
            raise ValueError(
                f"expected at least {MIN_MEASUREMENTS} probes for the scorer to learn from and shards of at least one, "
                f"got {probes} (of a pool of {self.context.source.pool.size}) and shard_size={self.shard_size}"
            )
        if _agreed((self.folder / MANIFEST).exists()):
            scores = read_scores(self.folder)
            if scores.about.get("job") != self._key():
                raise FileExistsError(
                    f"{self.folder} holds finished scores that were made in another way: choose another folder, or "
                    "delete it"
                )
            self.report(f"{self.folder} was scored in the same way before: nothing to do")
            self._clean_up()  # a job that was killed at its very end had not
            return scores
        if _agreed((self.folder / VALUES).exists() and not (self.work / JOB).exists()):
            raise FileExistsError(
                f"{self.folder / VALUES} is there without {MANIFEST}, so it is not of a scoring job: choose another "
                "folder, or move it"
            )
        with alone_in(self.work, JOB):
            self._tried()
            self._open()
            return self._scored()

    def _scored(self) -> Scores:
        with self.context.meter.phase(KEEPING):  # and whatever has no phase of its own
            ids, influence = self._measured()
            metrics = self._fitted(ids, influence)
            self._predicted()
        _wait_for_all()
        if distributed.rank() == 0:
            self._assemble(len(ids), metrics)
        self._clean_up()
        return read_scores(self.folder)

    def _clean_up(self) -> None:
        _wait_for_all()
        if distributed.rank() == 0:
            shutil.rmtree(self.work, ignore_errors=True)
        _wait_for_all()

    @property
    def work(self) -> Path:
        """The folder of what is unfinished."""
        return self.folder / WORK

    def _key(self) -> str:
        """Return what is equal for equal jobs."""
        context = self.context
        key = hashlib.blake2b(digest_size=16)
        key.update(json.dumps([dict(self.settings), self.probes, self.shard_size, context.seed], default=str).encode())
        key.update(f"{context.source.pool.fingerprint} {checksum(context.model, context.optimizer)}".encode())
        key.update(str(context.global_batch).encode())
        for batch in context.source.reference():
            for name in ("input_ids", "labels"):
                key.update(batch[name].cpu().contiguous().numpy().tobytes() if name in batch else b"")
        return key.hexdigest()

    def _open(self) -> None:
        """Begin, or make sure that what was begun is this job."""
        context = self.context
        job = {"key": self._key(), "settings": dict(self.settings)}
        file = self.work / JOB
        if distributed.rank() == 0 and not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            _write(file, json.dumps(job, indent=1, default=str).encode())
        _wait_for_all()
        if _whole(file, lambda: json.loads(file.read_text())["key"], self.work) != job["key"]:
            raise ValueError(
                f"{self.work} holds the unfinished work of another job (other settings, model or pool; {file.name} "
                "tells which): repeat that command to finish it, choose another folder, or delete this one"
            )
        self._spent = SpentCost.open(self.work, context.meter)
        if isinstance(self.estimator, PMPInfluence) and self.estimator.directory is None:
            self.estimator.directory = self.work / "solve"

    def _tried(self) -> None:
        """Raise now what the scorer would hours later; what was fitted before needs no trial."""
        if _agreed((self.work / REGRESSOR).exists()):
            return
        context = self.context
        few = uniform_subset(context.source.pool.size, min(SOME, context.source.pool.size), context.generator("trial"))
        small = replace(context, candidates=few, meter=CostMeter(), progress=SilentProgress())
        with measuring(context.model, context.optimizer):
            if hasattr(self.estimator, "check"):
                self.estimator.check(small)
            try_regressor(self.regressor, small)

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Measure, and return ids (m,) and influence (m,), both of what is finite."""
        context = self.context
        pool_size = context.source.pool.size
        ids = uniform_subset(pool_size, min(self.probes, pool_size), context.generator("probes"))
        shards = _shards(len(ids), max(1, self.shard_size // DEARER))
        missing = _agreed([shard for shard in shards if not self._file("measured", shard).exists()])
        if missing:
            with context.meter.phase("solve"), measuring(context.model, context.optimizer):
                metrics = self.estimator.fit(context)
            self._spent.keep()
            self.report("solved: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        mine = missing[distributed.rank() :: distributed.world_size()]
        with context.phase("measure influence", sum(len(shard) for shard in mine), "candidates") as advance:
            for shard in mine:
                influence = measure(self.estimator, context, ids[shard.start : shard.stop])
                _write_array(self._file("measured", shard), influence.numpy())
                self._spent.keep()
                advance(len(shard))
        _wait_for_all()
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
        """Fit the regressor, or take up the one that was fitted; return its metrics."""
        file = self.work / REGRESSOR
        keeps_state = hasattr(self.regressor, "load_state_dict")
        if keeps_state and _agreed(file.exists()):
            kept = _whole(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
            self.regressor.load_state_dict(kept["state"])  # type: ignore[attr-defined]
            return dict(kept["metrics"])
        with self.context.meter.phase("fit scorer"):
            metrics = dict(self.regressor.fit(self.context, ids, influence))
        if keeps_state and distributed.rank() == 0:
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            torch.save({"state": self.regressor.state_dict(), "metrics": metrics}, temporary)  # type: ignore[attr-defined]
            _put(temporary, file)
        self._spent.keep()
        _wait_for_all()
        self.report("fitted: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    def _predicted(self) -> None:
        """Predict every candidate of the pool, shard by shard."""
        context = self.context
        missing = _agreed([shard for shard in self._pool_shards() if not self._file("scores", shard).exists()])
        mine = missing[distributed.rank() :: distributed.world_size()]
        with context.phase("score the pool", sum(len(shard) for shard in mine), "candidates") as advance:
            for shard in mine:
                parts = []
                for batch in context.candidate_batches(torch.arange(shard.start, shard.stop)):
                    predicted = self.regressor.predict(context, batch)
                    check_predictions(self.regressor, predicted, len(batch["input_ids"]))
                    parts.append(predicted.float().cpu())
                    advance(len(parts[-1]))
                _write_array(self._file("scores", shard), _finite(torch.cat(parts), self.regressor).numpy())
                self._spent.keep()
        _wait_for_all()

    def _assemble(self, measured: int, metrics: Mapping[str, float]) -> None:
        """Put the shards together and write the scores."""
        pool = self.context.source.pool
        with (self.work / "all").open("wb") as file:  # not a mapped file: a full disk kills who writes to one
            for shard in self._pool_shards():
                _read_array(self._file("scores", shard)).astype("<f4").tofile(file)
        whole = np.memmap(self.work / "all", dtype="<f4", mode="r", shape=(pool.size,))
        about = {
            "job": self._key(),
            "estimator": type(self.estimator).__name__,
            "regressor": type(self.regressor).__name__,
            "measured": measured,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "cost": added(self.cost, self._spent.total()),
            "settings": json.loads(json.dumps(dict(self.settings), default=str)),
        }
        write_scores(self.folder, whole, pool.fingerprint, about)

    def _pool_shards(self) -> list[range]:
        return _shards(self.context.source.pool.size, self.shard_size)

    def _file(self, kind: str, shard: range) -> Path:
        return self.work / f"{kind}-{shard.start:012d}.npy"


def measure(estimator: InfluenceEstimator, context: RoundContext, ids: Tensor) -> Tensor:
    """Return the influence of the candidates ``ids (m,)``, ``(m,)`` floating point on CPU."""
    if hasattr(estimator, "score_ids"):
        with measuring(context.model, context.optimizer):
            return torch.as_tensor(estimator.score_ids(context, ids))
    parts = []
    for batch in context.candidate_batches(ids):
        with measuring(context.model, context.optimizer):
            parts.append(estimator.score(context, batch))
    return torch.cat(parts)


def _finite(predictions: Tensor, regressor: InfluenceRegressor) -> Tensor:
    broken = int((~predictions.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{type(regressor).__name__} predicts what is not finite for {broken} of {len(predictions)} candidates, so "
            "they cannot be compared: lower its learning rate, or choose another, and score into a new folder"
        )
    return predictions


def _shards(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def _agreed(found: Found) -> Found:
    """Return what the first rank found, once all have looked: a rank that is ahead makes files that others look for."""
    first: Found = distributed.gather_objects(found)[0]
    return first


def _wait_for_all() -> None:
    distributed.gather_objects(None)


def _whole(file: Path, read: Callable[[], Found], remedy: Path | None = None) -> Found:
    """Return what ``read`` finds in a file of the job."""
    try:
        return read()
    except (ValueError, KeyError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete {remedy or file} and repeat the command, which makes it again"
        ) from error


def _read_array(file: Path) -> np.ndarray:
    return _whole(file, lambda: np.load(file))


def _write_array(file: Path, array: np.ndarray) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    _put(temporary, file)


def _write(file: Path, data: bytes) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    _put(temporary, file)


def _put(temporary: Path, file: Path) -> None:
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)
