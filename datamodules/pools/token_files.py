"""Token ids that other programs wrote, as a pool: read where they lie, through memory maps.

Known are plain ids (nanoGPT's ``train.bin``, datatrove's ``.ds``), ids behind the header of llm.c, Megatron's pairs of
``.bin`` and ``.idx``, and one-dimensional ``.npy`` arrays.
"""

import glob
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from liveselect import distributed
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.integrity import BLOCK_BYTES, BLOCKS, SLOW_BYTES, WHOLE_BYTES

MEGATRON_MAGIC, MEGATRON_HEAD = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Number types of Megatron's token files by their codes; the codes between are of no integers."""

LLM_C_HEAD = struct.Struct("<iii")  # magic, version, tokens: the first of 256 numbers
LLM_C_HEADER_BYTES, LLM_C_TYPES = 1024, {20240520: "<u2", 20240801: "<u4"}

TYPES = {"uint8": "u1", "uint16": "<u2", "int16": "<i2", "int32": "<i4", "uint32": "<u4", "int64": "<i8"}
SUFFIXES = (".bin", ".ds", ".npy")
LOOKED_AT = 1 << 16  # tokens that show whether the number type is right


@dataclass(frozen=True)
class TokenFile:
    """One file of ids, end to end.

    Attributes:
        path: the file.
        dtype: the type of its numbers.
        offset: bytes before the first id.
        tokens: how many ids it holds.
        lengths: ``(n,)`` tokens of each of its sequences where an index says it, else None.
    """

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int
    lengths: np.ndarray | None = None

    def open(self) -> np.ndarray:
        """Return the ids ``(tokens,)`` as a memory map."""
        if not self.tokens:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


class TokenFiles(Dataset):
    """Files of token ids as a pool, without a copy: row i is a block of ids, read when it is asked for.

    Each file is cut into blocks by itself, from its beginning; what does not fill its last block is left out.

    Args:
        path: a file, a folder of ``.bin``, ``.ds`` or ``.npy`` files, a pattern, or a list of these. Of Megatron's
            pairs, either file or the path without suffix.
        block_size: T, tokens of a row. None takes the sequences of Megatron's index as rows.
        dtype: the type of the ids in files that do not say it: ``uint16`` by default, or ``uint32``, ``int32``,
            ``int64``, ``int16``, ``uint8``. Headers, indexes and datatrove's ``.metadata`` files say it.
        vocab_size: every id is below it; by default the largest id of the files, plus one.

    Attributes:
        files: what is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, of another type than ``dtype``, or holds less than a block.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        block_size: int | None = None,
        dtype: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if block_size is not None and block_size < 2:
            raise ValueError(f"expected blocks of at least 2 tokens, got block_size={block_size}")
        if dtype is not None and dtype not in TYPES:
            raise ValueError(f"expected dtype as one of {', '.join(TYPES)}, got {dtype!r}")
        names = [path] if isinstance(path, (str, Path)) else list(path)
        self.files = [_open(file, dtype) for name in names for file in _files(str(name))]
        self.block_size, self.vocab_size = block_size, vocab_size
        for file in self.files:
            _check_type(file)
        if block_size is None and any(file.lengths is None for file in self.files):
            raise ValueError(
                f"expected block_size, the tokens of a row: {self.files[0].path} does not say where its sequences end "
                "(only Megatron's .idx files do)"
            )
        rows = [file.tokens // block_size if block_size else len(_lengths(file)) for file in self.files]
        self._ends = np.cumsum([0, *rows])
        if not len(self):
            tokens = sum(file.tokens for file in self.files)
            raise ValueError(f"expected at least one row of {block_size} tokens, got {tokens} tokens in {names[0]}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        where = str(self.files[0].path) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        return f"TokenFiles({where!r}, rows={len(self)}, block_size={self.block_size})"

    def __getstate__(self) -> dict[str, object]:
        lazy = {name for name, value in vars(type(self)).items() if isinstance(value, cached_property)}
        return {name: value for name, value in vars(self).items() if name not in lazy}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        if self.block_size is not None:
            return [{"input_ids": block} for block in self.read(indices)]
        return [{"input_ids": torch.from_numpy(self._sequence(int(i)))} for i in self._checked(indices)]

    def read(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Return the blocks ``ids (n,)`` as ``(n, T)`` int64; raise IndexError for ids that are no rows."""
        if self.block_size is None:
            raise ValueError("rows are sequences of different lengths: they cannot be read as one tensor")
        rows = self._checked(ids)
        blocks = np.empty((len(rows), self.block_size), np.int64)
        owners = np.searchsorted(self._ends, rows, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            blocks[mine] = self._blocks[owner][rows[mine] - self._ends[owner]]
        return torch.from_numpy(blocks)

    def file_names(self) -> list[str]:
        """Return the name of each row's file."""
        sizes = np.diff(self._ends).tolist()
        return [file.path.stem for file, size in zip(self.files, sizes, strict=True) for _ in range(size)]

    def survey(self) -> tuple[str, int]:
        """Return a fingerprint of the rows and their largest id, with a line on standard error where it takes seconds.

        Files of up to 4 GiB in all are read in full; of larger ones, 4096 blocks that are evenly spread.

        Raises:
            ValueError: an id is negative.
        """
        total = sum(file.tokens * file.dtype.itemsize for file in self.files)
        display = PrepareDisplay(quiet=distributed.rank() > 0)
        amount = min(total, BLOCKS * BLOCK_BYTES) if total > WHOLE_BYTES else total
        if amount > SLOW_BYTES:
            display.say(f"reading {amount / 1e9:.1f} GB of token ids ({self!r}), about 1 GB a second")
        ends = [len(_lengths(file)) for file in self.files] if self.block_size is None else []
        shape = [self.block_size, [file.tokens for file in self.files], ends, total > WHOLE_BYTES]
        digest = hashlib.blake2b(json.dumps(shape).encode(), digest_size=16)
        largest = 0
        for file in self.files:
            if file.lengths is not None and self.block_size is None:
                digest.update(np.ascontiguousarray(file.lengths).tobytes())
            for start, piece in _pieces(file, total):
                digest.update(piece.tobytes())
                largest = max(largest, int(piece.max()))
                if piece.min() < 0:
                    raise ValueError(
                        f"{file.path}: expected token ids of 0 or more, got {piece.min()} among the tokens {start} to "
                        f"{start + len(piece)}: pass the dtype that the file was written with"
                    )
        return digest.hexdigest(), largest

    @cached_property
    def _blocks(self) -> list[np.ndarray]:
        size = self.block_size or 1
        return [file.open()[: file.tokens // size * size].reshape(-1, size) for file in self.files]

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        lengths = [_lengths(file).astype(np.int64) for file in self.files]
        return [np.cumsum(each) - each for each in lengths]

    def _sequence(self, row: int) -> np.ndarray:
        owner = int(np.searchsorted(self._ends, row, side="right")) - 1
        file, place = self.files[owner], row - int(self._ends[owner])
        start = int(self._starts[owner][place])
        return self._blocks[owner][start : start + int(_lengths(file)[place])].reshape(-1).astype(np.int64)

    def _checked(self, ids: Tensor | Sequence[int]) -> np.ndarray:
        rows = np.asarray(ids, dtype=np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"expected row ids in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        return rows


def holds_token_files(path: Path) -> bool:
    """Return whether a path looks like files of token ids: by its suffix, or by what a folder holds."""
    if path.is_dir():
        return any(file.suffix in SUFFIXES or file.suffix == ".idx" for file in path.iterdir())
    return path.suffix in (*SUFFIXES, ".idx") or path.with_name(path.name + ".idx").is_file()


def _files(name: str) -> list[Path]:
    """Return the files of a path, a folder or a pattern, sorted by name."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    elif path.is_file() or path.with_name(path.name + ".bin").is_file():
        found = [path]
    else:
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not found:
        raise FileNotFoundError(
            f"expected files of token ids ({', '.join(SUFFIXES)}, or Megatron's .bin and .idx) at {name!r}, found none"
        )
    return found


def _open(path: Path, dtype: str | None) -> TokenFile:
    """Return a file with the type of its ids, from its index or header where it has one."""
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index = stem.with_name(stem.name + ".idx")
    if path.suffix == ".idx" or (path.suffix != ".ds" and index.is_file()):
        return _open_megatron(stem.with_name(stem.name + ".bin"), index)
    if path.suffix == ".npy":
        return _open_array(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
    if len(head) == LLM_C_HEADER_BYTES:
        magic, _, tokens = LLM_C_HEAD.unpack_from(head)
        if magic in LLM_C_TYPES:
            found = np.dtype(LLM_C_TYPES[magic])
            _expect_size(path, LLM_C_HEADER_BYTES + tokens * found.itemsize, "its header")
            return TokenFile(path, found, LLM_C_HEADER_BYTES, tokens)
    kind = np.dtype(TYPES[dtype] if dtype is not None else _type_beside(path) or "<u2")
    if size % kind.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, which is no whole number of ids of {kind.itemsize} bytes: pass the dtype that "
            "it was written with, or copy it again"
        )
    return TokenFile(path, kind, 0, size // kind.itemsize)


def _type_beside(path: Path) -> str | None:
    """Return the type of ids that datatrove noted beside a file, None where there is no note."""
    note = path.with_name(path.name + ".metadata")
    size = note.read_text().splitlines()[0].rpartition("|")[2] if note.is_file() else ""
    return {"2": "<u2", "4": "<u4"}.get(size)


def _open_array(path: Path) -> TokenFile:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not isinstance(array, np.memmap):
        raise ValueError(
            f"expected {path} to hold a one-dimensional array of integers, got {array.dtype} of shape {array.shape}: "
            "rows of ids are a pool as they are, np.load(path, mmap_mode='r')"
        )
    return TokenFile(path, array.dtype, array.offset, len(array))


def _open_megatron(path: Path, index: Path) -> TokenFile:
    """Return a file of tokens with the lengths of its sequences, which follow each other without gaps."""
    if not index.is_file() or not path.is_file():
        raise FileNotFoundError(f"expected both files of a Megatron data set, {path} and {index}")
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEAD.size)
    if len(head) < MEGATRON_HEAD.size or not head.startswith(MEGATRON_MAGIC):
        raise ValueError(f"{index} is no index of a Megatron data set: it does not begin with MMIDIDX")
    _, version, code, sequences, _ = MEGATRON_HEAD.unpack(head)
    if version != 1 or code not in MEGATRON_TYPES:
        raise ValueError(
            f"expected {index} of version 1 with integers, got version {version} and the number type {code}"
        )
    if index.stat().st_size < MEGATRON_HEAD.size + 12 * sequences:
        raise ValueError(f"{index} is shorter than its {sequences} sequences need: copy it again")
    kind = np.dtype(MEGATRON_TYPES[code])
    lengths = np.memmap(index, "<i4", "r", MEGATRON_HEAD.size, (sequences,)) if sequences else np.empty(0, "<i4")
    starts = np.memmap(index, "<i8", "r", MEGATRON_HEAD.size + 4 * sequences, (sequences,)) if sequences else lengths
    tokens = int(lengths.sum(dtype=np.int64))
    _expect_size(path, tokens * kind.itemsize, f"{index.name}")
    if sequences and (starts[0] != 0 or starts[-1] + int(lengths[-1]) * kind.itemsize != tokens * kind.itemsize):
        raise ValueError(f"{index} names sequences that do not follow each other in {path}: write the data set again")
    return TokenFile(path, kind, 0, tokens, np.asarray(lengths[:]))


def _expect_size(path: Path, expected: int, by: str) -> None:
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes where {by} says {expected}: it was changed, or copied in part")


def _lengths(file: TokenFile) -> np.ndarray:
    return file.lengths if file.lengths is not None else np.empty(0, np.int64)


def _check_type(file: TokenFile) -> None:
    """Raise ValueError where ids of 32 bits would be read as 16 bits: every second one is then zero."""
    tokens = file.open()[:LOOKED_AT]
    if file.dtype.itemsize != 2 or len(tokens) < 64:
        return
    low, high = tokens[0::2], tokens[1::2]
    if (high == 0).mean() > 0.95 and (low == 0).mean() < 0.5:
        raise ValueError(
            f"{file.path} looks like ids of 32 bits, read as 16 bits every second one is zero: pass dtype='uint32'"
        )


def _pieces(file: TokenFile, total: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the tokens of a file in pieces, each with its first position; of large pools, pieces spread over it."""
    tokens, size = file.open(), BLOCK_BYTES // file.dtype.itemsize
    if total <= WHOLE_BYTES:
        starts = range(0, file.tokens, size)
    else:
        count = max(2, BLOCKS * file.tokens * file.dtype.itemsize // total)
        starts = np.unique(np.linspace(0, max(0, file.tokens - size), count).astype(np.int64)).tolist()
    for start in starts:
        yield start, tokens[start : start + size]
