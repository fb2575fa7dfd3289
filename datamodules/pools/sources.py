"""Sources of text: files, folders, patterns, ``datasets`` folders and the Hugging Face hub, read in the same way."""

import glob
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from liveselect.datamodules.pools.pool_files import LOCK, MANIFEST, PARTIAL
from liveselect.datamodules.pools.readers import (
    COMPRESSIONS,
    DataError,
    OnUndecodable,
    Reading,
    Record,
    Values,
    read_dataset,
    read_json_lines,
    read_parquet,
    read_text_file,
)

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
TEXT_PATTERN = "*.txt"


@dataclass(frozen=True)
class Source:
    """A named origin of documents.

    Args:
        name: its name in reports; it becomes the group of its candidates.
        location: a file, a folder, a pattern (``data/**/*.jsonl.gz``), a folder written by ``datasets.save_to_disk``,
            or ``hub:NAME[:CONFIG[:SPLIT]]`` for ``datasets.load_dataset``.
        include: patterns of the files to take from a folder. By default a folder gives its JSON Lines and Parquet
            files, or if it has none its ``*.txt`` files.
    """

    name: str
    location: str
    include: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: "str | Path | Source", include: Sequence[str] = ()) -> "Source":
        """Return the source that ``name=location`` or a bare location describes."""
        if isinstance(text, Source):
            return text
        location = str(text)
        name, separator, rest = location.partition("=")
        if separator and re.fullmatch(r"[\w.+-]+", name) and rest and not Path(location).exists():
            return cls(name, rest, tuple(include))
        return cls(_default_name(location), location, tuple(include))

    def require(self) -> "Source":
        """Return the source; raise DataError if its file or folder is missing. The hub is not asked."""
        path = Path(self.location).expanduser()
        if not (self.location.startswith(HUB) or path.exists() or glob.has_magic(str(path))):
            raise _nothing_at(path)
        return self


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read by itself: a file, or a data set.

    Attributes:
        label: its name in messages.
        size: bytes.
        identity: changes when the content does.
        read: yields its records.
    """

    label: str
    size: int
    identity: str
    read: Callable[[Reading], Iterator[Record]]


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a source in the order in which they are read; raise DataError where there is none."""
    if source.location.startswith(HUB):
        return [_hub_part(source.location)]
    path = Path(source.location).expanduser()
    if is_dataset_folder(path):
        return [_dataset_folder_part(path)]
    return [_file_part(file, key) for key, file in _files(path, source.include)]


def read_records(
    source: "str | Path | Source",
    columns: Sequence[str] | None = None,
    *,
    include: Sequence[str] = (),
    on_undecodable: OnUndecodable = "error",
) -> Iterator[Values]:
    """Yield the records of a source as dicts, one at a time.

    Args:
        source: a :class:`Source`, or its location with or without ``name=``.
        columns: the columns to read, all of which must exist; None for all columns of each record. Text files have the
            columns ``text`` and ``path``.
        include: patterns of the files to take from a folder.
        on_undecodable: what to do with text that is not UTF-8: ``error``, ``replace`` or ``skip``.

    Raises:
        DataError: the source or a column is missing, or a record cannot be read; the message names file and line.
    """
    reading = Reading(required=columns or (), keep=columns, on_undecodable=on_undecodable, tally=Counter())
    for part in parts_of(Source.parse(source, include)):
        for record in part.read(reading):
            yield record.values


def _default_name(location: str) -> str:
    if location.startswith(HUB):
        location = location.removeprefix(HUB).split(":")[0]
    name = Path(re.sub(r"[*?\[].*", "", location)).name or "data"
    suffixes = "|".join(map(re.escape, (*JSON_LINES, *PARQUET, *COMPRESSIONS, ".txt")))
    return re.sub(rf"({suffixes})+$", "", name) or name


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    suffix = suffixes[-1] if suffixes else ""
    return "json" if suffix in JSON_LINES else "parquet" if suffix in PARQUET else "text"


def _file_part(path: Path, key: str) -> Part:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    reader = {"json": read_json_lines, "parquet": read_parquet, "text": read_text_file}[_kind(path)]
    return Part(str(path), stat.st_size, f"{key} {stat.st_size} {stat.st_mtime_ns}", partial(reader, path, key))


def _files(path: Path, include: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files of a path or pattern, each with its name below the root, sorted by name."""
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        return _named_below(path, _files_in_folder(path, include))
    if glob.has_magic(str(path)):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not files:
            raise DataError(f"the pattern {str(path)!r} matches no file: check it, and quote it in the shell")
        return _named_below(fixed, files)
    raise _nothing_at(path)


def _named_below(root: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    return sorted((file.relative_to(root).as_posix(), file) for file in files)


def _nothing_at(path: Path) -> DataError:
    return DataError(
        f"no such file or folder: {str(path)!r}. For a data set of the Hugging Face hub write {HUB}{path.as_posix()}"
    )


def _files_in_folder(root: Path, include: Sequence[str]) -> list[Path]:
    """Return the files that match ``include``, by default those with records, or if there is none the text files."""
    everything = _visible_files(root)
    if include:
        files = sorted({file for pattern in include for file in root.rglob(pattern)}.intersection(everything))
    else:
        files = [file for file in everything if _kind(file) != "text" and ".json" not in file.suffixes]
        files = files or [file for file in everything if file.match(TEXT_PATTERN)]
    if not files:
        suffixes = Counter(file.suffix or "no suffix" for file in everything)
        held = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(6)) or "no files"
        wanted = " ".join(include) or f"*{JSON_LINES[0]}, *{PARQUET[0]} or {TEXT_PATTERN}"
        raise DataError(f"the folder {root} has no file that matches {wanted}; it holds {held}. Choose with --include")
    return files


def _visible_files(root: Path) -> list[Path]:
    """Return all files in a folder except hidden ones and pools, finished or not, that were made below it."""
    files = [file for file in root.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts)]
    pools = {file.parent for file in files if file.name == MANIFEST}
    pools |= {file.parent for file in files if file.name == LOCK and file.parent.suffix == PARTIAL}
    return [file for file in files if pools.isdisjoint(file.parents)]


def open_dataset_folder(path: Path) -> "Dataset":
    """Return the data set that ``datasets.save_to_disk`` wrote; raise DataError for one of several splits."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: cannot be opened by datasets.load_from_disk ({error})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) > 1:
            choices = ", ".join(str(path / name) for name in dataset)
            raise DataError(f"{path} holds several splits: name the folder of one, such as {choices}")
        (dataset,) = dataset.values()
    return dataset


def is_dataset_folder(path: Path) -> bool:
    """Return whether ``datasets.save_to_disk`` wrote a folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_parquet(path: Path, wanted: Sequence[str] | None) -> "Dataset | None":
    """Return the rows of Parquet files, None where a path names none, or other files too.

    They are decoded once, into the cache of ``datasets``, since Parquet cannot be read by the row.

    Args:
        path: a file, a folder or a pattern.
        wanted: the columns to read, as far as the files have them; None for all.

    Raises:
        DataError: a file cannot be read, or has none of the columns.
    """
    import datasets

    try:
        files = [file for _, file in _files(path, ())]
    except DataError:
        return None
    if not files or any(_kind(file) != "parquet" for file in files):
        return None
    try:
        names = pq.ParquetFile(files[0]).schema_arrow.names
        kept = names if wanted is None else [name for name in names if name in wanted]
        if kept:
            every = [str(file) for file in files]
            return datasets.load_dataset("parquet", data_files=every, columns=kept, split="train")
    except Exception as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}): a file is damaged or of another kind") from error
    raise DataError(
        f"{files[0]} has no column of token ids ({', '.join(wanted or ())}); the columns are {', '.join(names)}. Name "
        "the one with ids, columns={'input_ids': NAME}; text has to be made a pool first (`liveselect prepare`)"
    )


def _dataset_folder_part(path: Path) -> Part:
    dataset = open_dataset_folder(path)
    files = sorted((file.relative_to(path).as_posix(), file.stat()) for file in path.rglob("*") if file.is_file())
    identity = " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
    size = sum(stat.st_size for _, stat in files)
    return Part(str(path), size, identity, partial(read_dataset, dataset, str(path), size))


def open_hub(location: str) -> "Dataset":
    """Return the data set of ``hub:NAME[:CONFIG[:SPLIT]]``; raise DataError where it cannot be loaded."""
    import datasets

    name, config, split, *_ = [*location.removeprefix(HUB).split(":", 2), "", ""]
    split = split or "train"
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise DataError(
            f"{location}: datasets.load_dataset could not load {name!r}, configuration {config or 'default'!r}, split "
            f"{split!r} ({type(error).__name__}: {error}). Check the name ({HUB}NAME:CONFIG:SPLIT) and the "
            "connection, or download the data and pass its path"
        ) from error


def _hub_part(location: str) -> Part:
    dataset = open_hub(location)
    size = int(dataset.dataset_size or dataset.data.nbytes)
    return Part(location, size, dataset._fingerprint, partial(read_dataset, dataset, location, size))


def describe_source(source: Source, parts: Sequence[Part]) -> dict[str, object]:
    """Return an identification of a source and its content, for comparing two runs."""
    identities = "\n".join(part.identity for part in parts)
    return {
        "name": source.name,
        "location": source.location if source.location.startswith(HUB) else str(Path(source.location).absolute()),
        "include": list(source.include),
        "parts": len(parts),
        "bytes": sum(part.size for part in parts),
        "content": hashlib.blake2b(identities.encode(errors="surrogatepass"), digest_size=8).hexdigest(),
    }
