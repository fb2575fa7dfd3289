"""Reading records from files: JSON Lines, Parquet, text, and Arrow tables of ``datasets``.

A record is one document with all its columns. Every reader streams: it holds one record, or one batch of a columnar
file, at a time.

JSON Lines and text are not read by ``datasets.load_dataset``: it does not report the line of a file that is wrong,
fills a column that a line lacks with None, stops at text that is not UTF-8 even with ``encoding_errors``, and changes
line ends.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from datasets import Dataset

OnUndecodable = Literal["error", "replace", "skip"]
ON_UNDECODABLE: tuple[OnUndecodable, ...] = ("error", "replace", "skip")
ROWS_PER_BATCH = 1024  # rows of a columnar file decoded at once
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BOM = b"\xef\xbb\xbf"

Values = dict[str, object]
"""The columns of a record."""


class DataError(ValueError):
    """The data or settings cannot be used; the message says what to change."""


class Record(NamedTuple):
    """One document.

    Attributes:
        key: identifies the record within its source.
        where: its place, for messages.
        values: the columns.
        done: bytes of the part consumed so far, this record included; for progress.
    """

    key: str
    where: str
    values: Values
    done: int


@dataclass
class Reading:
    """Which columns to read, and how.

    Attributes:
        required: columns that must exist.
        keep: the columns to read, or None for all.
        on_undecodable: what to do with text that is not UTF-8: raise, put U+FFFD for it, or leave the record out.
        tally: numbers of documents repaired or left out, by reason.
    """

    required: Sequence[str] = ()
    keep: Sequence[str] | None = None
    on_undecodable: OnUndecodable = "error"
    tally: Counter[str] = field(default_factory=Counter)

    def check(self, where: str, columns: Iterable[str]) -> None:
        """Raise DataError when a required column is missing from ``columns``."""
        columns = list(columns)
        if missing := [name for name in self.required if name not in columns]:
            raise DataError(
                f"{where}: no column {', '.join(map(repr, missing))}; the columns are "
                f"{', '.join(map(repr, columns)) or 'none'}. Name one of these"
            )

    def wants(self, column: str) -> bool:
        """Return whether to read a column."""
        return self.keep is None or column in self.keep or column in self.required

    def decode(self, data: bytes, where: str, offset: int = 0) -> str | None:
        """Return the text of UTF-8 bytes, or None to leave the record out; errors name ``where`` and ``offset``."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.on_undecodable == "error":
                raise DataError(
                    f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8 text. Convert the "
                    "data to UTF-8, or set on-undecodable to replace (puts U+FFFD there) or skip (drops the document)"
                ) from None
            self.tally["undecodable"] += 1
            return data.decode("utf-8", errors="replace") if self.on_undecodable == "replace" else None

    def decode_required(self, values: Values, where: str) -> bool:
        """Decode the required columns that hold text; return False to leave the record out.

        Strings from Arrow and JSON may be invalid: bytes that nobody checked, halves of surrogate pairs.
        """
        for name in self.required:
            value = values[name]
            if isinstance(value, str) and not value.isascii():
                value = value.encode("utf-8", errors="surrogatepass")
            if isinstance(value, bytes):
                values[name] = self.decode(value, f"{where}, column {name!r}")
                if values[name] is None:
                    return False
        return True


def read_json_lines(path: Path, key: str, reading: Reading) -> Iterator[Record]:
    """Yield the objects of a JSON Lines file, compressed (.gz, .zst, .bz2) or not; blank lines are skipped."""
    offset = 0
    with _opened(path) as (raw, file):
        for number, line in enumerate(file, start=1):
            begin, offset = offset, offset + len(line)
            if number == 1 and line.startswith(BOM):
                begin, line = begin + len(BOM), line[len(BOM) :]
            where = f"{path}, line {number}"
            text = reading.decode(line, where, begin)
            if text is None or not text.strip():
                continue
            values = _json_object(text, where)
            reading.check(where, values)
            if reading.keep is not None:
                values = {name: value for name, value in values.items() if reading.wants(name)}
            if reading.decode_required(values, where):
                yield Record(f"{key}:{number}", where, values, raw.tell())


def _json_object(text: str, where: str) -> Values:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = " (the file looks like one JSON array: write each of its objects on a line)" if text[0] == "[" else ""
        raise DataError(
            f"{where}: not valid JSON ({error}){hint}. Expected one JSON object on every line: mend or remove this one"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"text": ...}}, got {type(values).__name__}')
    return values


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, io.BufferedIOBase]]:
    """Open a file; yield the raw file, whose position shows the progress, and the decompressed file to read."""
    try:
        with path.open("rb") as raw:
            codec = COMPRESSIONS.get(path.suffix)
            yield raw, raw if codec is None else io.BufferedReader(pa.input_stream(raw, compression=codec))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        raise DataError(f"{path}: cannot be decompressed ({error}): the file is damaged or incomplete") from None


def read_text_file(path: Path, key: str, reading: Reading) -> Iterator[Record]:
    """Yield a text file, compressed or not, as one record with the columns ``text`` and ``path``."""
    reading.check(str(path), ("text", "path"))
    with _opened(path) as (raw, file):
        data = file.read()
        done = raw.tell()
    skipped = len(BOM) if data.startswith(BOM) else 0
    text = reading.decode(data[skipped:], str(path), skipped)
    if text is not None:
        values: Values = {name: value for name, value in (("text", text), ("path", key)) if reading.wants(name)}
        yield Record(key, str(path), values, done)


def read_parquet(path: Path, key: str, reading: Reading) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # pre-buffering keeps the whole file in memory
            names = file.schema_arrow.names
            reading.check(str(path), names)
            batches = file.iter_batches(ROWS_PER_BATCH, columns=[name for name in names if reading.wants(name)])
            tables = (pa.Table.from_batches([batch]) for batch in batches)
            yield from _rows(tables, f"{key}:", str(path), path.stat().st_size, file.metadata.num_rows, reading)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}): the file is damaged or another kind") from None


def read_dataset(dataset: "Dataset", label: str, size: int, reading: Reading) -> Iterator[Record]:
    """Yield the rows of a ``datasets.Dataset`` of ``size`` bytes, each an equal part of the progress."""
    names = dataset.column_names
    reading.check(label, names)
    dataset = dataset.select_columns([name for name in names if reading.wants(name)])
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    yield from _rows(tables, "", label, size, len(dataset), reading)


def _rows(
    tables: Iterable[pa.Table], prefix: str, label: str, size: int, total: int, reading: Reading
) -> Iterator[Record]:
    row = 0
    for table in tables:
        columns = {name: _column(table[name]) for name in table.column_names}
        for position in range(len(table)):
            where = f"{label}, row {row}"
            values = {name: column[position] for name, column in columns.items()}
            row += 1
            if reading.decode_required(values, where):
                yield Record(f"{prefix}{row - 1}", where, values, size * row // total)


def _column(column: pa.ChunkedArray) -> list[object]:
    """Return the values of a column as Python objects; lists of integers as arrays, which is many times faster."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_integer(kind.value_type) and not pc.list_flatten(column).null_count:
        return list(column.to_numpy())
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()
