"""Makes the files of a pool out of its parts, and knows how much space that takes."""

import errno
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.metadata import metadata_array, struct_type
from liveselect.datamodules.pools.parts import Encoding, part_facts, read_part
from liveselect.datamodules.pools.pool_files import TOKENIZER, PoolWriter
from liveselect.datamodules.pools.readers import DataError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(OSError):
    """There is no space for the pool; the message says how much is missing."""


@dataclass
class Space:
    """How much has been written of how much; bytes.

    Attributes:
        folder: where it is written.
        total: size of all sources.
        done: how much of the sources is encoded.
        written: size of the parts so far.
    """

    folder: Path
    total: int
    done: int = 0
    written: int = 0

    def missing(self) -> int:
        """Return about how many bytes are still to be written: the parts that lack, and the pool, as large as they."""
        per_byte = self.written / self.done if self.done else 0.5  # two bytes for a token of four characters
        parts = int(per_byte * self.total)
        return max(parts - self.written, 0) + parts

    def require(self) -> None:
        """Raise DiskFullError when less is free than is missing."""
        if shutil.disk_usage(self.folder).free < self.missing():
            raise self._error("too little is free")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the system's error about a full disk into one that says how many bytes are needed."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise self._error(str(error.strerror)) from error

    def _error(self, reason: str) -> "DiskFullError":
        free = shutil.disk_usage(self.folder).free
        return DiskFullError(
            f"there is no space for the pool on the disk of {self.folder} ({reason}): about {self.missing()} more "
            f"bytes are needed, {free} are free. Free some, or prepare the pool elsewhere"
        )


def assemble(
    parts: Sequence[Path],
    folder: Path,
    encoding: Encoding,
    *,
    block_size: int,
    sources: Sequence[str],
    tokenizer: Path | None,
    settings: Mapping[str, Any],
    tally: Counter[str],
    display: PrepareDisplay,
) -> dict[str, Any]:
    """Write a pool into ``folder`` from its parts, in their order, and return the manifest.

    Raises:
        DataError: there is less than one block of tokens.
    """
    facts = [part_facts(part) for part in parts]
    tally = tally + Counter(empty=sum(entry["empty"] for entry in facts))
    _require_a_block(sum(entry["tokens"] for entry in facts), block_size, tally)
    kind = struct_type(facts)
    if unseen := set(settings["metadata"] or ()) - {field.name for field in kind or ()}:
        display.say(f"no document has the metadata columns {sorted(unseen)}; there are {[f.name for f in kind or ()]}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER)
    writer = PoolWriter(folder, block_size, encoding.vocab_size, encoding.separator, sources, kind)
    try:
        done = 0
        for part in parts:
            writer.append(*_stream_and_documents(read_part(part), kind))
            done += part.stat().st_size
            display.update(done, writer.stream_tokens)
        return writer.finish(settings, tally)
    except BaseException:
        with suppress(OSError):  # on a full disk closing fails as writing did
            writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_a_block(tokens: int, block_size: int, tally: Counter[str]) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in tally.items()) or "none"
    if not tokens:
        raise DataError(f"the sources hold no text: no document is left (left out: {left_out}). Check the text column")
    if tokens < block_size:
        raise DataError(
            f"the sources hold {tokens} tokens, which do not fill one block of {block_size} (documents left out: "
            f"{left_out}): use a smaller block size or add text"
        )


def _stream_and_documents(part: pa.Table, kind: pa.StructType | None) -> tuple[np.ndarray, pa.Table]:
    """Return the stream ``(n,)`` of a part, and its documents with the columns of the pool."""
    ids = part["ids"].combine_chunks()
    stream = ids.flatten().to_numpy()
    begins = ids.offsets.to_numpy()[:-1]
    documents = part.select(["id", "source", "tokens", "hash"]).append_column("start", pa.array(begins))
    if kind is not None:
        documents = documents.append_column("metadata", metadata_array(part["metadata"], kind))
    return stream, documents
