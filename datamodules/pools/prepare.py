"""Sources of text in, a pool on disk out: in parallel, resumable, and never half a pool.

All work happens in ``<out>.partial``: first a part file for every unit of documents, named by its content, then the
pool made of the parts, which takes its place in one rename. Documents keep the order of their sources, so the content
of a pool does not depend on the number of workers or on interruptions.

Units are encoded by joblib rather than by ``datasets.Dataset.map(num_proc=...)``: the latter first stores all text a
second time, loses an unfinished share of the corpus when it is interrupted, and its workers outlive a killed parent.
"""

import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from liveselect.datamodules.pools.corpus import Corpus, Recipe
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.integrity import check_sizes
from liveselect.datamodules.pools.metadata import struct_type
from liveselect.datamodules.pools.parts import (
    UNIT_BYTES,
    Encoding,
    Unit,
    WrittenPart,
    encoding_of,
    read_part,
    start_worker,
    units_of,
    write_part,
)
from liveselect.datamodules.pools.pool_files import (
    LOCK,
    MANIFEST,
    PARTIAL,
    REMEDY,
    TOKENIZER,
    PoolWriter,
    read_manifest,
    sync_folder,
)
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.sources import Source
from liveselect.datamodules.pools.tokenizers import end_of_text_id, make_tokenizer, vocabulary_size
from liveselect.datamodules.pools.tokens import TokenStore

DISK_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(OSError):
    """There is no space for the pool; the message states how many bytes are missing."""


def prepare(
    sources: str | Path | Source | Sequence[str | Path | Source],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    block_size: int = 1024,
    include: Sequence[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    unit_bytes: int = UNIT_BYTES,
    **recipe: Any,
) -> TokenStore:
    """Turn sources into a pool of token blocks at ``out`` and open it.

    The same sources and recipe give the same fingerprint. A call that was interrupted continues when it is repeated; a
    pool that was prepared in the same way before is returned as it is.

    Args:
        sources: one or several, each a :class:`Source`, or its location with or without ``name=``.
        out: folder to make.
        tokenizer: as in :class:`Recipe`.
        block_size: T, tokens of a block.
        include: patterns of the files to take from folders.
        workers: processes that encode; by default one for each core.
        overwrite: replace a pool that was prepared in another way.
        quiet: show nothing.
        unit_bytes: bytes of text encoded at once; an interruption loses at most this much for each worker.
        recipe: the other fields of :class:`Recipe`.

    Raises:
        DataError: the sources or the recipe cannot be used; the message says what to change.
        DiskFullError: the disk is full; the same call continues when there is space.
    """
    listed = [sources] if isinstance(sources, (str, Path, Source)) else sources
    found = [Source.parse(source, include).require() for source in listed]  # a missing file is reported first
    made = Recipe(tokenizer=None if tokenizer is None else str(tokenizer), block_size=block_size, **recipe)
    if include and not any(Path(source.location).expanduser().is_dir() for source in found):
        raise DataError(
            f"expected a folder among the sources, whose files include={list(include)} chooses: leave it out"
        )
    corpus, display = Corpus(found, made), PrepareDisplay(quiet)
    out = Path(out).absolute()  # workers may have another current folder
    partial = out.with_name(out.name + PARTIAL)
    exists = not overwrite and _is_prepared(out, corpus.settings)
    if not exists or partial.exists():  # an interruption may leave the folder behind a finished pool
        with _working_folder(partial):
            exists = not overwrite and _is_prepared(out, corpus.settings)
            if not exists:
                _require_replaceable(out)
                _make_pool(corpus, partial, display, _sensible_workers(workers, corpus.size, unit_bytes), unit_bytes)
                _put_in_place(partial, out)
            shutil.rmtree(partial, ignore_errors=True)
    if exists:
        display.say(f"{out} was prepared from the same sources in the same way before: nothing to do")
    return TokenStore(out)


@dataclass
class _Space:
    """The space that the pool needs on the disk of ``folder``; all sizes are bytes.

    Attributes:
        folder: the folder that the pool is written to.
        total: size of all sources.
        done: size of the sources encoded so far.
        written: size of the parts written so far.
    """

    folder: Path
    total: int
    done: int = 0
    written: int = 0

    def require(self) -> None:
        """Raise DiskFullError when less is free than the pool still needs."""
        if shutil.disk_usage(self.folder).free < self._missing():
            raise self._error("too little is free")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the system's error about a full disk into one that states how many bytes are needed."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL_ERRORS:
                raise
            raise self._error(str(error.strerror)) from error

    def _missing(self) -> int:
        per_byte = self.written / self.done if self.done else 0.5  # two bytes for a token of four characters
        parts = int(per_byte * self.total)
        return max(parts - self.written, 0) + parts  # the missing parts, and the pool, as large as all parts

    def _error(self, reason: str) -> DiskFullError:
        free = shutil.disk_usage(self.folder).free
        return DiskFullError(
            f"there is no space for the pool on the disk of {self.folder} ({reason}): about {self._missing()} more "
            f"bytes are needed, {free} are free. Free some, or prepare the pool elsewhere"
        )


def _make_pool(corpus: Corpus, partial: Path, display: PrepareDisplay, workers: int, unit_bytes: int) -> None:
    """Encode the documents, except for parts that exist, and make ``partial/pool`` of the parts."""
    space = _Space(partial, corpus.size)
    with space.watched():
        encoding = _encoding(corpus, partial, display)
        folder = partial / f"parts-{encoding.key}"
        folder.mkdir(exist_ok=True)
        parts: list[WrittenPart] = []
        tokens = 0
        with display.phase("encoding", corpus.size):
            for part in _write_parts(units_of(corpus.documents(), unit_bytes), folder, encoding, workers):
                parts.append(part)
                space.done, space.written = part.done, space.written + part.size
                tokens += part.tokens
                display.update(part.done, tokens)
        if kept := sum(part.existed for part in parts):
            display.say(f"continued: an interrupted run had written {kept} of {len(parts)} parts")
        space.require()
        with display.phase("writing the pool", space.written):
            _assemble(corpus, parts, partial, encoding, display)


def _write_parts(units: Iterable[Unit], folder: Path, encoding: Encoding, workers: int) -> Iterator[WrittenPart]:
    """Yield the part of every unit, in order, after writing missing ones; holds a few units for each worker."""
    parallel = Parallel(
        n_jobs=workers,
        return_as="generator",
        pre_dispatch="3 * n_jobs",
        batch_size=1,
        max_nbytes=None,
        **({"initializer": start_worker} if workers > 1 else {}),
    )
    try:
        yield from parallel(delayed(write_part)(folder, unit, encoding) for unit in units)
    except DataError as error:
        raise DataError(str(error)) from error  # without the traceback of the worker that joblib attaches
    except TerminatedWorkerError as error:
        raise DataError("a worker process died, perhaps for lack of memory: use fewer --workers") from error
    finally:
        if workers > 1:  # otherwise the processes would wait for more work while the caller trains
            get_reusable_executor().shutdown(wait=True)


def _assemble(
    corpus: Corpus, parts: Sequence[WrittenPart], partial: Path, encoding: Encoding, display: PrepareDisplay
) -> None:
    """Write ``partial/pool`` from its parts, in their order; raise DataError for less than one block of tokens."""
    recipe = corpus.recipe
    tally = sum((Counter(part.counts) for part in parts), corpus.tally)
    _require_a_block(sum(part.tokens for part in parts), recipe.block_size, tally)
    kind = struct_type(part.kinds for part in parts)
    columns = [field.name for field in kind or ()]
    if unseen := set(recipe.metadata or ()).difference(columns):
        display.say(f"no document has the metadata columns {sorted(unseen)}; there are {columns}")
    folder = partial / "pool"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if encoding.tokenizer_folder is not None:
        shutil.copytree(encoding.tokenizer_folder, folder / TOKENIZER)
    names = [source.name for source in corpus.sources]
    writer = PoolWriter(folder, recipe.block_size, encoding.vocab_size, encoding.separator, names, kind)
    try:
        done = 0
        for part in parts:
            writer.append(*read_part(part.path, kind))
            done += part.size
            display.update(done, writer.stream_tokens)
        writer.finish(corpus.settings, tally)
    except BaseException:
        with suppress(OSError):  # on a full disk, closing fails like writing
            writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_a_block(tokens: int, block_size: int, tally: Counter[str]) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in tally.items()) or "none"
    if not tokens:
        raise DataError(f"the sources hold no text: all documents are left out ({left_out}). Check the text column")
    if tokens < block_size:
        raise DataError(
            f"the sources hold {tokens} tokens, which do not fill one block of {block_size} (documents left out: "
            f"{left_out}): use a smaller block size or add text"
        )


def _encoding(corpus: Corpus, partial: Path, display: PrepareDisplay) -> Encoding:
    """Return the encoding of the documents, after loading or training the tokenizer."""
    recipe = corpus.recipe
    path, vocab_size, eos_id, pad_id = None, recipe.vocab_size or 0, recipe.eos_id, None
    if recipe.tokenizer is not None:
        path, tokenizer = make_tokenizer(recipe.tokenizer, partial, corpus.sample, display.say)
        needed = vocabulary_size(tokenizer)
        if recipe.vocab_size is not None and recipe.vocab_size < needed:
            raise DataError(f"vocab_size={recipe.vocab_size} is smaller than the tokenizer's, {needed}: leave it out")
        vocab_size = max(needed, vocab_size)
        eos_id = end_of_text_id(tokenizer) if eos_id is None else eos_id
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}  # these stand in text, too
        pad_id = None if recipe.ids_column is None or tokenizer.pad_token_id in ends else tokenizer.pad_token_id
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise DataError(f"expected eos_id in 0..{vocab_size - 1}, got {eos_id}")
    if recipe.separate and eos_id is None:
        display.say("the tokenizer has no end-of-text token: documents are joined without one (set it by --eos-id)")
    separator, ready = eos_id if recipe.separate else None, recipe.ids_column is not None
    return encoding_of(path, vocab_size, separator, ready, pad_id, recipe.on_invalid == "skip")


def _sensible_workers(workers: int | None, size: int, unit_bytes: int) -> int:
    """Return the number of processes: by default one for each core, and fewer where there is little work."""
    if workers is None:
        return min(cpu_count(), 1 + size // (4 * unit_bytes))  # starting one takes as long as encoding some units
    if workers < 1:
        raise DataError(f"expected at least one worker, got workers={workers}")
    return workers


def _is_prepared(out: Path, settings: Mapping[str, object]) -> bool:
    """Return whether ``out`` is a pool; raise DataError when it was made with other settings, or is damaged."""
    if not (out / MANIFEST).exists():
        return False
    try:
        manifest = read_manifest(out)
        check_sizes(out, manifest["files"], REMEDY)
    except ValueError as error:
        raise DataError(f"{error}, with --overwrite") from error
    before, now = manifest["settings"], json.loads(json.dumps(settings))
    if before == now:
        return True
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    raise DataError(
        f"{out} is a pool that was made with other {', '.join(differ)}: choose another place, or pass --overwrite to "
        "replace it"
    )


def _require_replaceable(out: Path) -> None:
    """Raise DataError when ``out`` is neither a pool nor an empty folder."""
    may_go = (out / MANIFEST).exists() or (out.is_dir() and not any(out.iterdir()))
    if out.exists() and not may_go:
        raise DataError(f"{out} exists and is no pool: choose another place, or remove it yourself")


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename the complete pool to ``out``; a pool that it replaces is deleted with the working folder."""
    if out.exists():
        replaced = partial / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        out.replace(replaced)
    (partial / "pool").replace(out)
    sync_folder(out.parent)


@contextmanager
def _working_folder(partial: Path) -> Iterator[None]:
    """Lock the working folder for this process; after an error keep it if it has finished parts.

    Raises:
        DataError: another process has locked it, or it holds something else.
    """
    if partial.exists() and not (partial / LOCK).exists() and any(partial.iterdir()):
        raise DataError(f"{partial} is needed to work in, and holds something else: choose another place for the pool")
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another process is preparing this pool (it holds {partial / LOCK}): wait for it") from None
    try:
        yield
    except BaseException as error:
        if next(partial.glob("parts-*/*.arrow"), None) is None:
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, (DataError, DiskFullError)):
            kept = f"Finished parts stay in {partial}: the next attempt continues from them; deleting them is safe"
            raise type(error)(f"{error}. {kept}") from error
        raise
    finally:
        lock.release()
