"""Score files: one number for every candidate of a pool, made once and drawn from in every round.

A score folder, as ``liveselect score`` writes it, holds

``scores.npy``    ``(n,)`` little-endian float32; entry i is the score of candidate i, larger is better
``scores.json``   ``format``, ``version``, ``pool`` (fingerprint of the pool), ``size`` (n), ``blake2b`` of the numbers,
                  and ``about``: what made them. It is written last: without it the folder is unfinished

Scores made elsewhere (QuRating, FineWeb-Edu, perplexity) are read from a NumPy file, a Parquet file or an array. They
name no pool, so only their number can be checked.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liveselect.json_lines import whole_file

FORMAT, VERSION = "liveselect-scores", 1
VALUES, MANIFEST = "scores.npy", "scores.json"
_REMEDY = "copy the folder again from where it is whole, or delete it and score the pool again"

_NUMBERS_PER_CHUNK = 1 << 22  # 32 MiB as float64
_MAX_BYTES_IN_MEMORY = 1 << 30  # larger files are mapped, and must not change while a run draws from them


@dataclass(frozen=True)
class Scores:
    """One score for every candidate of a pool.

    Attributes:
        values: ``(n,)`` floating point, larger is better; -inf is never drawn. A NumPy file above 1 GiB is mapped.
        digest: BLAKE2b hash of the values.
        pool: fingerprint of their pool, None if the file does not say.
        about: how they were made, as far as is known.
        name: their origin, for messages.
        mapped: the file that the values are mapped from, its size and its time of change in ns; None if not mapped.
    """

    values: Tensor
    digest: str
    pool: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)  # JSON
    name: str = "an array"
    mapped: tuple[Path, int, int] | None = None

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

    def check_unchanged(self) -> None:
        """Raise ValueError if the file that the values are mapped from has changed."""
        if self.mapped is not None and (not self.mapped[0].exists() or _stamp(self.mapped[0]) != self.mapped):
            raise ValueError(
                f"{self.mapped[0]} was changed while a run draws from it, so the numbers are no longer those that it "
                "began with: put the file back and resume from the last checkpoint, and write others to another file"
            )


def read_scores(source: object, column: str = "score") -> Scores:
    """Read scores from a folder, a file or numbers in memory.

    Args:
        source: a score folder; a ``.npy`` file ``(n,)``; a ``.parquet`` file with a column of scores and, if its rows
            are not in the order of the pool, one called ``id``; or a tensor, an array, a list or a column of a dataset.
        column: name of the Parquet column.

    Raises:
        FileNotFoundError: there is no such file, or the folder is incomplete.
        ValueError: the file is no score file, a column is named of something else than a Parquet file, or a score is
            NaN, +inf or an integer that no float64 holds.
    """
    is_path = isinstance(source, (str, Path))
    if column != "score" and not (is_path and Path(str(source)).suffix.lower() == ".parquet"):
        got = f"scores at {source}" if is_path else f"scores in memory ({type(source).__name__})"
        raise ValueError(
            f"expected a .parquet file where column={column!r} names its scores, got {got}: pass such a file, or leave "
            "column out"
        )
    if not isinstance(source, (str, Path)):
        return _checked(_array(source), "an array")
    if not str(source):
        raise ValueError("expected the path of scores, got an empty string: make them with `liveselect score`")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected scores at {path}, found nothing there: make them with `liveselect score`")
    if path.suffix.lower() == ".npy":
        return _read_numpy(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, column)
    raise ValueError(f"expected scores in a folder made by `liveselect score`, a .npy or a .parquet file, got {path}")


def write_scores(folder: str | Path, values: npt.ArrayLike, pool: str, about: Mapping[str, object]) -> Scores:
    """Write a score folder, whole or not at all, and return what it holds.

    Args:
        folder: created if missing; may hold other files, but no finished scores and no other ``scores.npy``.
        values: ``(n,)``, possibly mapped from a file; read in chunks.
        pool: fingerprint of the pool.
        about: how the scores were made, as JSON.

    Raises:
        FileExistsError: the folder holds finished scores, or a ``scores.npy`` with other numbers.
        OSError: the disk is full, or not writable.
        ValueError: the values are not numbers ``(n,)``, or one is NaN, +inf or beyond float32.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds finished scores: choose another folder, or delete it")
    array, name = _array(values), "the scores to write"
    _check_form(array, name)
    _check_values(array, name)
    _check_float32(array, name)
    digest = _digest(array, "<f4")
    manifest = {"format": FORMAT, "version": VERSION, "pool": pool, "size": len(array), "blake2b": digest}
    text = json.dumps({**manifest, "about": dict(about)}, indent=1)  # before anything is written: it may be no JSON
    _check_same_numbers(folder / VALUES, digest)
    with _score_file(folder / VALUES) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in _chunks(array):  # not through a memory map: a full disk would end the process by a signal
            file.write(part.astype("<f4").tobytes())
    with _score_file(folder / MANIFEST) as file:
        file.write(text.encode())
    for name in (VALUES, MANIFEST):  # files of a process that was killed
        for path in folder.glob(f"{name}.*.tmp"):
            if path.suffixes[-2][1:].isdigit():
                path.unlink(missing_ok=True)
    return read_scores(folder)


def write_part(path: str | Path, ids: npt.ArrayLike, scores: npt.ArrayLike, pool: str) -> None:
    """Write the scores ``(m,)`` of the candidates ``ids (m,)`` of a pool as a part for :func:`join_scores`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": _array(ids), "score": _array(scores)}).replace_schema_metadata({"pool": pool})
    with whole_file(Path(path)) as file:
        pq.write_table(table, file)


def join_scores(folder: str | Path, parts: Sequence[str | Path], size: int, pool: str) -> Scores:
    """Join parts that other programs made, and write them as a score folder.

    Args:
        folder: as in :func:`write_scores`.
        parts: Parquet files with a column ``id``, the candidates, and a column ``score``; in any order. A part whose
            metadata has the key ``pool`` must say the fingerprint of the pool there.
        size: n, candidates of the pool.
        pool: its fingerprint.

    Raises:
        ValueError: a part is not of this pool, or some candidate is in none of them, or in several.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    values, found = np.full(size, np.nan), np.zeros(size, np.int32)
    for path in parts:
        try:
            table = pq.read_table(path, columns=["id", "score"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"expected a Parquet file with the columns id and score at {path}: {error}") from error
        said = (table.schema.metadata or {}).get(b"pool", pool.encode()).decode()
        if said != pool:
            raise ValueError(f"{path} was made for the pool {said!r}, not for {pool!r}: join the parts of one pool")
        ids, numbers = table["id"].to_numpy(), table["score"].to_numpy()
        if not np.issubdtype(ids.dtype, np.integer) or (len(ids) and not 0 <= ids.min() <= ids.max() < size):
            raise ValueError(f"expected the ids in {path} to be integers in 0..{size - 1}, the pool's candidates")
        np.add.at(found, ids, 1)
        values[ids] = numbers
    if not (found == 1).all():
        missing, twice = int((found == 0).sum()), int((found > 1).sum())
        raise ValueError(
            f"expected every candidate of the pool in one of {len(parts)} parts, got {missing} of {size} in none and "
            f"{twice} in several: pass all parts, and each once"
        )
    return write_scores(folder, values, pool, {"parts": [Path(path).name for path in parts]})


@contextmanager
def _score_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once it is complete, with advice in the error of a full disk."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        advice = f"free space in {path.parent}, or make it writable, and repeat"
        raise OSError(error.errno, f"cannot write {path} ({error.strerror or error}): {advice}") from error


def _check_same_numbers(file: Path, digest: str) -> None:
    """Raise FileExistsError if the file exists with other numbers; a job that was stopped may have left the same."""
    try:
        if not file.exists() or _read_numpy(file).digest == digest:
            return
    except ValueError:
        pass  # an unreadable file is not one that was left here
    raise FileExistsError(
        f"{file} is there already, with other contents and without a {MANIFEST}: choose another folder, or move it away"
    )


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
        raise ValueError(f"{file} does not describe scores ({error!r}): {_REMEDY}") from error
    if not known:
        raise ValueError(f"expected {file} to say format {FORMAT!r} version {VERSION}: {_REMEDY}")
    if not (path / VALUES).is_file():
        raise FileNotFoundError(f"expected {VALUES} beside {MANIFEST} in {path}, found none: {_REMEDY}")
    try:
        scores = _read_numpy(path / VALUES)
    except ValueError as error:
        raise ValueError(f"{error}. As {MANIFEST} is there, it was whole once: {_REMEDY}") from error
    if len(scores.values) != size or scores.digest != digest:
        raise ValueError(f"the numbers in {path / VALUES} are not those that {MANIFEST} describes: {_REMEDY}")
    return replace(scores, pool=pool, about=about, name=str(path))


def _read_numpy(path: Path) -> Scores:
    stamp = _stamp(path)  # before reading, so that a change meanwhile is noticed
    array = _opened(path)
    return replace(_checked(array, str(path)), mapped=stamp if isinstance(array, np.memmap) else None)


def _opened(path: Path) -> np.ndarray:
    """Read a NumPy file into memory, where no other process can change it, or map a large one."""
    try:
        # "c" is copy on write: torch warns of read-only arrays
        mapped = np.lib.format.open_memmap(path, mode="c")
        if mapped.ndim != 1 or mapped.nbytes > _MAX_BYTES_IN_MEMORY:
            return mapped
        return np.fromfile(path, mapped.dtype, mapped.size, offset=mapped.offset)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read numbers from {path}, one array as numpy.save writes it: {error}") from error


def _stamp(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path.absolute(), status.st_size, status.st_mtime_ns


def _read_parquet(path: Path, column: str) -> Scores:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        if twice := [name for name in (column, "id") if names.count(name) > 1]:
            raise ValueError(f"several columns of {path} are called {twice[0]!r}: rename or remove all but one")
        table = pq.read_table(path, columns=[name for name in dict.fromkeys((column, "id")) if name in names])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read a Parquet file from {path}: {error}") from error
    if column == "id" and "id" in names:
        raise ValueError(
            f"expected a column of scores, got 'id', which numbers the candidates in {path}: name the one that holds "
            f"the scores, of {names}"
        )
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


def _array(source: object) -> np.ndarray:
    """Return tensors, lists and columns of datasets as an array."""
    try:
        if isinstance(source, Tensor):
            known = (torch.float16, torch.float32, torch.float64)
            narrow = source.is_floating_point() and source.dtype not in known  # to NumPy
            source = source.detach().to("cpu", torch.float32 if narrow else source.dtype).numpy()
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected numbers (n,), such as a dense tensor of float32, got a {type(source).__name__} that holds no "
            f"such numbers: {error}"
        ) from error


def _checked(array: np.ndarray, name: str) -> Scores:
    _check_form(array, name)
    bits = 8 * array.dtype.itemsize
    if array.dtype.kind != "f":
        if bits == 64:
            _check_integers(array, name, np.float64)
        array = array.astype(np.float64 if bits > 16 else np.float32)  # float32 holds 24 bits
    elif array.dtype.byteorder == ">":
        array = array.astype(np.float64 if bits > 32 else np.float32)
    _check_values(array, name)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    return Scores(torch.from_numpy(array), _digest(array), name=name)


def _check_form(array: np.ndarray, name: str) -> None:
    if array.ndim != 1 or array.dtype.kind not in "fiu" or array.dtype.itemsize > 8 or not len(array):
        raise ValueError(
            f"expected {name} to hold numbers (n,) of at most 64 bits, got shape {array.shape} of {array.dtype}"
        )


def _check_integers(array: np.ndarray, name: str, kept_as: type[np.float32 | np.float64]) -> None:
    """Raise ValueError if different integers would become the same float."""
    limit = 2 ** (np.finfo(kept_as).nmant + 1)
    if any(int(part.max()) > limit or int(part.min()) < -limit for part in _chunks(array)):
        raise ValueError(
            f"expected {name} to be integers of at most {limit}, which {kept_as.__name__} holds exactly, got larger "
            "ones, which would lose their order: give them as floating point numbers on a smaller scale"
        )


def _check_float32(array: np.ndarray, name: str) -> None:
    """Raise ValueError if a value is beyond the float32 of a score file."""
    if array.dtype.kind != "f":
        _check_integers(array, name, np.float32)
        return
    largest = np.finfo(np.float32).max
    beyond = sum(int((np.isfinite(part) & (np.abs(part) > largest)).sum()) for part in _chunks(array))
    if beyond:
        raise ValueError(
            f"{beyond} of {name} are beyond {largest:.4g}, the range of the float32 that a score file holds: give them "
            "on a smaller scale"
        )


def _check_values(array: np.ndarray, name: str) -> None:
    broken = sum(int((np.isnan(part) | np.isposinf(part)).sum()) for part in _chunks(array))
    if broken:
        raise ValueError(
            f"{broken} of the {len(array)} scores in {name} are NaN or +inf: give candidates without a score -inf, "
            "and they are never drawn"
        )


def _digest(array: np.ndarray, dtype: str | None = None) -> str:
    """Return the hash of the numbers, as numbers of ``dtype`` if one is given."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _chunks(array):
        digest.update(part.astype(dtype or part.dtype).tobytes())
    return digest.hexdigest()


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _NUMBERS_PER_CHUNK] for start in range(0, len(array), _NUMBERS_PER_CHUNK))
