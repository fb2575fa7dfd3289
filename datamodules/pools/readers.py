"""Reading records from files: JSON Lines, Parquet, text, and Arrow tables of ``datasets``.

A record is one document with all its columns. Every reader streams: it holds one record, or one batch of a columnar
file, at a time.

JSON Lines and text are not read by ``datasets.load_dataset``: it does not report the line of a file that is wrong,
fills a column that a line lacks with None, stops at text that is not UTF-8 even with ``encoding_errors``, and changes
line ends.
"""

import io
import json
import re
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

OnInvalid = Literal["error", "skip"]
ON_INVALID: tuple[OnInvalid, ...] = ("error", "skip")
OnUndecodable = Literal["error", "replace", "skip"]
ON_UNDECODABLE: tuple[OnUndecodable, ...] = ("error", "replace", "skip")
ROWS_PER_BATCH = 1024  # rows of a columnar file decoded at once
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BOM = b"\xef\xbb\xbf"
_MARKS = re.compile(r"^\ufeff+", re.MULTILINE)  # joined files have them at the start of any line
FORMATS = (
    "JSON Lines (.jsonl .ndjson .json, also .gz .zst .bz2), Parquet (.parquet .pq), UTF-8 text, folders of datasets"
)

Values = dict[str, object]
"""The columns of a record."""


class DataError(ValueError):
    """The data or settings cannot be used; the message says what to change."""


class RecordError(DataError):
    """One record cannot be used; others can, where they are wanted without it."""


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
        on_invalid: what to do with a record that is malformed: raise, or leave it out; None where it is no setting.
        tally: numbers of documents repaired or left out, by reason.
    """

    required: Sequence[str] = ()
    keep: Sequence[str] | None = None
    on_undecodable: OnUndecodable = "error"
    on_invalid: OnInvalid | None = None
    tally: Counter[str] = field(default_factory=Counter)

    def check(self, where: str, columns: Iterable[str]) -> None:
        """Raise RecordError when a required column is missing from ``columns``, or one that is read stands twice."""
        columns = list(columns)
        if len(set(columns)) < len(columns):
            twice = [name for name, count in Counter(columns).items() if count > 1 and self.wants(name)]
            if twice:
                raise RecordError(
                    f"{where}: several columns are called {twice[0]!r}, so it is not known which is meant: rename or "
                    "remove all but one (other columns can be left out by naming those to keep, --metadata)"
                )
        if missing := [name for name in self.required if name not in columns]:
            raise RecordError(
                f"{where}: no column {', '.join(map(repr, missing))}; the columns are "
                f"{', '.join(map(repr, columns)) or 'none'}. Name one of these"
            )

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """Count a record that is malformed, where such records are to be left out."""
        try:
            yield
        except RecordError as error:
            if self.on_invalid != "skip":
                hint = "" if self.on_invalid is None else ". To leave such records out, set on-invalid to skip"
                raise RecordError(f"{error}{hint}") from None
            self.tally["invalid"] += 1

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
            if number == 1 and not line.removeprefix(BOM).lstrip().startswith(b"{"):
                require_text(path, line)
            while line.startswith(BOM):  # joined files have them on any line
                begin, line = begin + len(BOM), line[len(BOM) :]
            where = f"{path}, line {number}"
            text = reading.decode(line, where, begin)
            if text is None or not text.strip():
                continue
            values = None
            with reading.tolerant():
                values = _json_object(text, where, reading)
            if values is not None and reading.decode_required(values, where):
                yield Record(f"{key}:{number}", where, values, raw.tell())


class _Repeating(Values):
    """A JSON object in which a key stands twice; ``keys_in_file`` are all of them."""

    keys_in_file: tuple[str, ...]


def _object(pairs: list[tuple[str, object]]) -> Values:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeating = _Repeating(values)
    repeating.keys_in_file = tuple(name for name, _ in pairs)
    return repeating


def _json_object(text: str, where: str, reading: Reading) -> Values:
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        hint = " (the file looks like one JSON array: write each of its objects on a line)" if text[0] == "[" else ""
        raise RecordError(
            f"{where}: not valid JSON ({error}){hint}. Expected one JSON object on every line: mend or remove this one"
        ) from None
    if not isinstance(values, dict):
        raise RecordError(f'{where}: expected a JSON object such as {{"text": ...}}, got {type(values).__name__}')
    reading.check(where, values.keys_in_file if isinstance(values, _Repeating) else values)
    # halves of surrogate pairs in names: no file holds them
    named = {name if name.isascii() else whole_characters(name): value for name, value in values.items()}
    return named if reading.keep is None else {name: value for name, value in named.items() if reading.wants(name)}


def whole_characters(text: str) -> str:
    """Return a text with U+FFFD in place of halves of surrogate pairs, which UTF-8 has no form for."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


BINARY_SUFFIXES = (
    *(".7z", ".jar", ".lz4", ".lzma", ".rar", ".snappy", ".sz", ".tar", ".tbz2", ".tgz", ".txz", ".whl", ".xz", ".zip"),
    *(".arrow", ".avro", ".bin", ".db", ".ds", ".feather", ".h5", ".hdf5", ".idx", ".mds", ".npy", ".npz", ".orc"),
    *(".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".sqlite", ".tfrecord"),
    *(".bmp", ".gif", ".ico", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    *(".avi", ".flac", ".mp3", ".mp4", ".wav"),
    *(".dll", ".exe", ".o", ".pyc", ".so"),
    *(".doc", ".docx", ".pdf", ".ppt", ".pptx", ".xls", ".xlsx"),
)
"""Names of files that hold no text, whatever their bytes happen to be."""

MAGIC = {
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"\x1f\x8b": "gzip data without the suffix .gz",
    b"\x28\xb5\x2f\xfd": "zstd data without the suffix .zst",
    b"BZh91AY&SY": "bzip2 data without the suffix .bz2",
    b"\xfd7zXZ\x00": "xz data",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"\x04\x22\x4d\x18": "lz4 data",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PAR1": "a Parquet file without the suffix .parquet",
    b"ARROW1": "an Arrow file (name the folder that datasets wrote)",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x89HDF\r\n": "an HDF5 file",
    b"MMIDIDX\x00": "an index of token ids",
    b"\xff\xfe": "UTF-16 text (convert it to UTF-8)",
    b"\xfe\xff": "UTF-16 text (convert it to UTF-8)",
}
TAR, TAR_AT = b"ustar", 257


def require_text(path: Path, data: bytes) -> None:
    """Raise RecordError when the first bytes of a file, after decompression, are those of a file that holds no text."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if data[TAR_AT : TAR_AT + len(TAR)] == TAR:
        kind = "a tar archive, such as WebDataset writes"
    if kind is None and b"\0" in data:
        kind = f"binary data, with a zero at byte {data.index(0)}"
    if kind is not None:
        raise not_text(path, kind)


def not_text(path: Path, kind: str) -> RecordError:
    """Return the error of a file that holds no text."""
    return RecordError(
        f"{path} holds {kind}, which is not read as text. Read are {FORMATS}: unpack or convert it. Token ids are "
        "taken from a column of JSON Lines or Parquet (--ids-column), or from a map-style dataset as the pool"
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, io.BufferedIOBase]]:
    """Open a file; yield the raw file, whose position shows the progress, and the decompressed file to read."""
    try:
        with path.open("rb") as raw:
            codec = COMPRESSIONS.get(path.suffix.lower())
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
    is_text = False
    with reading.tolerant():
        if path.suffix.lower() in BINARY_SUFFIXES:
            raise not_text(path, f"no text by its name ({path.suffix})")
        require_text(path, data)
        is_text = True
    if not is_text:
        return
    skipped = len(BOM) if data.startswith(BOM) else 0
    text = reading.decode(data[skipped:], str(path), skipped)
    if text is not None:
        text = _MARKS.sub("", text)
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
