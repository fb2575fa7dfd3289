"""Score files: one number for every candidate of a pool, made once and drawn from in every round.

A score folder, as ``liveselect score`` writes it, holds

``scores.npy``    ``(n,)`` little-endian float32; entry i is the score of candidate i, larger is better
``scores.json``   ``format``, ``version``, ``pool`` (fingerprint of the pool), ``size`` (n), ``blake2b`` of the numbers,
                  and ``about``: what made them. It is written last: without it the folder is unfinished

Scores made elsewhere (QuRating, FineWeb-Edu, perplexity) are read from a NumPy file, a Parquet file or an array; these
name no pool, so only their length can be compared with it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FORMAT, VERSION = "liveselect-scores", 1
VALUES, MANIFEST = "scores.npy", "scores.json"

_CHUNK = 1 << 22  # numbers looked at at once


@dataclass(frozen=True)
class Scores:
    """One score for every candidate of a pool.

    Attributes:
        values: ``(n,)`` floating point, larger is better; -inf is never drawn. Mapped from the file where there is one.
        digest: BLAKE2b hash of the values.
        pool: fingerprint of the pool that they belong to, or None when the file does not say.
        about: what made them, as far as it is known.
        name: where they come from, for messages.
    """

    values: Tensor
    digest: str
    pool: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    name: str = "an array"

    def check_fit(self, size: int, fingerprint: str) -> None:
        """Raise ValueError unless the scores belong to a pool of ``size`` candidates with this fingerprint."""
        if len(self.values) != size:
            raise ValueError(
                f"{self.name} holds {len(self.values)} scores, the pool {size} candidates: scores belong to the "
                "candidates by position, so they must be of this pool. Score it with `liveselect score`"
            )
        if self.pool is not None and self.pool != fingerprint:
            raise ValueError(
                f"{self.name} was made for the pool {self.pool!r}, this run uses the pool {fingerprint!r}: its numbers "
                "would go to other texts. Point the run at that pool, or score this one with `liveselect score`"
            )


def read_scores(source: Any, column: str = "score") -> Scores:
    """Read scores from whatever holds them.

    Args:
        source: a score folder; a ``.npy`` file ``(n,)``; a ``.parquet`` file with a column of scores and, if its rows
            are not in the order of the pool, one called ``id``; or a tensor, an array, a list or a column of a dataset.
        column: name of the Parquet column.

    Raises:
        FileNotFoundError: there is no such file, or the folder is unfinished.
        ValueError: the file is not what it should be, or there are NaN or +inf among the scores.
    """
    if isinstance(source, Tensor):
        source = source.detach().to("cpu", torch.float32 if source.dtype == torch.bfloat16 else source.dtype).numpy()
    if not isinstance(source, (str, Path)):
        return _checked(np.asarray(source), "an array")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected scores at {path}, found nothing there: make them with `liveselect score`")
    if path.suffix == ".npy":
        return _checked(_mapped(path), str(path))
    if path.suffix == ".parquet":
        return _read_parquet(path, column)
    raise ValueError(f"expected scores in a folder made by `liveselect score`, a .npy or a .parquet file, got {path}")


def write_scores(folder: str | Path, values: npt.ArrayLike, pool: str, about: Mapping[str, Any]) -> Scores:
    """Write a score folder, whole or not at all, and return what it holds.

    Args:
        folder: made if need be; may hold other files, but no finished scores.
        values: ``(n,)``, possibly mapped from a file; read in pieces.
        pool: fingerprint of the pool.
        about: what made the scores: strings, numbers, lists and dicts.

    Raises:
        FileExistsError: the folder holds finished scores.
        ValueError: NaN or +inf among the values.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds finished scores: choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    array = np.asarray(values)
    _check_values(array, "the scores to write")
    temporary = folder / f"{VALUES}.{os.getpid()}.tmp"
    try:
        mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype="<f4", shape=array.shape)
        for start in range(0, len(array), _CHUNK):
            mapped[start : start + _CHUNK] = array[start : start + _CHUNK]
        mapped.flush()
        digest = _digest(mapped)
        del mapped
        _replace(temporary, folder / VALUES)
    finally:
        temporary.unlink(missing_ok=True)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "pool": pool,
        "size": len(array),
        "blake2b": digest,
        "about": dict(about),
    }
    temporary = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    _replace(temporary, folder / MANIFEST)
    return read_scores(folder)


def _replace(temporary: Path, final: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def _read_folder(path: Path) -> Scores:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"expected finished scores in {path}, found no {MANIFEST}: run the same `liveselect score` again, which "
            "goes on where it was stopped"
        )
    try:
        manifest = json.loads(file.read_bytes())
        known = manifest["format"] == FORMAT and manifest["version"] == VERSION
        size, digest, pool, about = (manifest[key] for key in ("size", "blake2b", "pool", "about"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe scores ({error!r}): score the pool again") from error
    if not known:
        raise ValueError(f"expected {file} to say format {FORMAT!r} version {VERSION}: score the pool again")
    scores = _checked(_mapped(path / VALUES), str(path))
    if len(scores.values) != size or scores.digest != digest:
        raise ValueError(
            f"the numbers in {path / VALUES} are not those that {MANIFEST} describes: copy the folder again, or score "
            "the pool again"
        )
    return Scores(scores.values, digest, pool, about, str(path))


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        # "c": copy on write, because torch warns of arrays that cannot be written to
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read numbers from {path}: {error}") from error


def _read_parquet(path: Path, column: str) -> Scores:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in (column, "id") if name in names])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read a Parquet file from {path}: {error}") from error
    if column not in names:
        raise ValueError(f"expected a column {column!r} in {path}, got {names}: name the one that holds the scores")
    values = table[column].to_numpy()
    if "id" in names:
        ids = table["id"].to_numpy()
        if not np.issubdtype(ids.dtype, np.integer) or not np.array_equal(np.sort(ids), np.arange(len(ids))):
            raise ValueError(
                f"expected the ids in {path} to be the integers 0..{len(ids) - 1}, each once, as the candidates of a "
                "pool are numbered; without an id column rows are taken in their order"
            )
        values = values[np.argsort(ids)]
    return _checked(values, str(path))


def _checked(array: npt.NDArray[Any], name: str) -> Scores:
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not len(array):
        raise ValueError(f"expected {name} to hold numbers (n,), got shape {array.shape} of {array.dtype}")
    if array.dtype.kind != "f" or array.dtype.byteorder == ">":
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    _check_values(array, name)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    return Scores(torch.from_numpy(array), _digest(array), name=name)


def _check_values(array: npt.NDArray[Any], name: str) -> None:
    broken = sum(int((np.isnan(part) | np.isposinf(part)).sum()) for part in _parts(array))
    if broken:
        raise ValueError(
            f"{broken} of the {len(array)} scores in {name} are NaN or +inf: give candidates without a score -inf, "
            "and they are never drawn"
        )


def _digest(array: npt.NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(array):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _parts(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK))
