"""Sources of text in, a pool on disk out: parallel, resumable, and there whole or not at all.

All work happens in ``<out>.partial``: first a part file for every unit of documents, named by its content, then the
pool made of the parts, which takes its place in one rename. Documents keep the order of their sources, whoever encodes
them, so the content of a pool does not depend on the number of workers or on interruptions.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from liveselect.datamodules.pools.assemble import DiskFullError, Space, assemble
from liveselect.datamodules.pools.corpus import Corpus, Recipe
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.parts import UNIT_BYTES, Encoding, part_facts, units_of
from liveselect.datamodules.pools.pool_files import LOCK, MANIFEST, PARTIAL, check_files, read_manifest, sync_folder
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.sources import Source
from liveselect.datamodules.pools.tokenizers import end_of_text_id, make_tokenizer, vocabulary_size
from liveselect.datamodules.pools.workers import write_parts

if TYPE_CHECKING:
    from liveselect.datamodules.pools.tokens import TokenStore


@dataclass(frozen=True)
class Prepared:
    """What became of a preparation.

    Attributes:
        path: the pool.
        manifest: its manifest.
        existed: whether it was there already.
    """

    path: Path
    manifest: dict[str, Any]
    existed: bool = False


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
) -> "TokenStore":
    """Turn sources into a pool of token blocks at ``out`` and open it.

    The same sources and recipe give the same fingerprint. A call that was interrupted continues when it is repeated; a
    pool that is there already is returned as it is.

    Args:
        sources: one or several, each a :class:`Source`, or its location with or without ``name=``.
        out: folder to make.
        tokenizer: as in :class:`Recipe`.
        block_size: T, tokens of a block.
        include: patterns of the files to take from folders.
        workers: processes that encode; by default one for each core.
        overwrite: replace a pool that was made in another way.
        quiet: show nothing.
        unit_bytes: text that is encoded at once; an interruption loses at most this much for each worker.
        recipe: the other fields of :class:`Recipe`.

    Raises:
        DataError: the sources or the recipe cannot be used; the message says what to change.
        DiskFullError: the disk is full; the same call continues when there is space.
    """
    from liveselect.datamodules.pools.tokens import TokenStore

    listed = [sources] if isinstance(sources, (str, Path, Source)) else sources
    found = [Source.parse(source, include).require() for source in listed]  # told before what a recipe lacks
    made = Recipe(tokenizer=None if tokenizer is None else str(tokenizer), block_size=block_size, **recipe)
    corpus = Corpus(found, made)
    display = PrepareDisplay(quiet=quiet)
    return TokenStore(prepare_pool(corpus, Path(out), display, workers, overwrite, unit_bytes).path)


def prepare_pool(
    corpus: Corpus,
    out: Path,
    display: PrepareDisplay,
    workers: int | None = None,
    overwrite: bool = False,
    unit_bytes: int = UNIT_BYTES,
) -> Prepared:
    """Do what :func:`prepare` says, without opening the pool."""
    out = out.absolute()  # workers may have another current folder
    partial = out.with_name(out.name + PARTIAL)
    found = None if overwrite else _existing(out, corpus.settings)
    if found is None or partial.exists():  # an interruption may leave the folder behind a finished pool
        with _working_folder(partial):
            found = None if overwrite else _existing(out, corpus.settings)
            manifest = found or _build(corpus, partial, out, display, workers, unit_bytes)
            shutil.rmtree(partial, ignore_errors=True)
    if found is None:
        return Prepared(out, manifest)
    display.say(f"{out} was prepared from the same sources in the same way before: nothing to do")
    return Prepared(out, found, existed=True)


def _build(
    corpus: Corpus, partial: Path, out: Path, display: PrepareDisplay, workers: int | None, unit_bytes: int
) -> dict[str, Any]:
    """Make the pool, or take the one that only lacks its last rename, and put it in place."""
    _require_replaceable(out)
    manifest = _complete_pool(partial / "pool", corpus.settings)
    if manifest is None:
        number = _sensible_workers(workers, corpus.size, unit_bytes)
        manifest = _make_pool(corpus, partial, display, number, unit_bytes)
    _put_in_place(partial, out)
    return manifest


def _make_pool(corpus: Corpus, partial: Path, display: PrepareDisplay, workers: int, unit_bytes: int) -> dict[str, Any]:
    """Encode the documents, continuing with the parts that are there, and make a pool of the parts."""
    space = Space(partial, corpus.size)
    with space.watched():
        tokenizer, encoding = _encoding(corpus, partial, display)
        folder = partial / f"parts-{encoding.key()}"
        folder.mkdir(exist_ok=True)
        parts = _encode(corpus, folder, encoding, display, space, workers, unit_bytes)
        space.require()
        display.start("writing the pool", space.written)
        unfinished = partial / "pool.tmp"
        try:
            manifest = assemble(
                parts,
                unfinished,
                encoding,
                block_size=corpus.recipe.block_size,
                sources=[source.name for source in corpus.sources],
                tokenizer=tokenizer,
                settings=corpus.settings,
                tally=corpus.tally,
                display=display,
            )
        finally:
            display.stop()
        shutil.rmtree(partial / "pool", ignore_errors=True)
        unfinished.replace(partial / "pool")
    return manifest


def _encode(
    corpus: Corpus,
    folder: Path,
    encoding: Encoding,
    display: PrepareDisplay,
    space: Space,
    workers: int,
    unit_bytes: int,
) -> list[Path]:
    """Return the parts of the corpus in their order, after writing those that are missing."""
    parts: list[Path] = []
    kept = tokens = 0
    units = units_of(corpus.documents(), unit_bytes)
    display.start("encoding", corpus.size)
    try:
        for part, done, existed in write_parts(units, folder, encoding, workers):
            parts.append(part)
            space.done, space.written = done, space.written + part.stat().st_size
            kept += existed
            tokens += part_facts(part)["tokens"]
            display.update(done, tokens)
    finally:
        display.stop()
    if kept:
        display.say(f"continued: {kept} of {len(parts)} parts were there from an interrupted run")
    return parts


def _encoding(corpus: Corpus, partial: Path, display: PrepareDisplay) -> tuple[Path | None, Encoding]:
    """Return the folder of the tokenizer, and how documents become tokens with it."""
    recipe = corpus.recipe
    path, vocab_size, eos_id = None, recipe.vocab_size or 0, recipe.eos_id
    if recipe.tokenizer is not None:
        path, tokenizer = make_tokenizer(recipe.tokenizer, partial, corpus.sample, display.say)
        needed = vocabulary_size(tokenizer)
        if recipe.vocab_size is not None and recipe.vocab_size < needed:
            raise DataError(f"vocab_size={recipe.vocab_size} is smaller than the tokenizer's, {needed}: leave it out")
        vocab_size = max(needed, vocab_size)
        eos_id = end_of_text_id(tokenizer) if eos_id is None else eos_id
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise DataError(f"expected eos_id in 0..{vocab_size - 1}, got {eos_id}")
    if recipe.separate and eos_id is None:
        display.say("no end-of-text token is known: documents are joined without one (name it with --eos-id)")
    encoder = path if recipe.ids_column is None else None
    return path, Encoding(encoder, vocab_size, eos_id if recipe.separate else None)


def _sensible_workers(workers: int | None, size: int, unit_bytes: int) -> int:
    """Return the number of processes; by default as many as there are cores and work for them."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 1 + size // (4 * unit_bytes))  # starting one takes as long as encoding some units
    if workers < 1:
        raise DataError(f"expected at least one worker, got workers={workers}")
    return workers


def _existing(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a pool at ``out`` that was made with these settings, or None when there is no pool.

    Raises:
        DataError: the pool was made with other settings, or is damaged.
    """
    if not (out / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(out)
        check_files(out, manifest)
    except ValueError as error:
        raise DataError(f"{error}, with --overwrite") from error
    if manifest["settings"] == _as_json(settings):
        return manifest
    before, now = manifest["settings"], _as_json(settings)
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    raise DataError(
        f"{out} is a pool that was made with other {', '.join(differ)}: choose another place, or pass --overwrite to "
        "replace it"
    )


def _complete_pool(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a pool that only lacks its last rename, if it was made with these settings."""
    try:
        manifest = read_manifest(path)
        check_files(path, manifest)
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest["settings"] == _as_json(settings) else None


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _require_replaceable(out: Path) -> None:
    """Raise DataError when ``out`` is something that is not ours to replace."""
    is_ours = (out / MANIFEST).exists() or (out.is_dir() and not any(out.iterdir()))
    if out.exists() and not is_ours:
        raise DataError(f"{out} exists and is no pool: choose another place, or remove it yourself")


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename the complete pool to ``out``; a pool that it replaces goes away with the working folder."""
    if out.exists():
        replaced = partial / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        out.replace(replaced)
    (partial / "pool").replace(out)
    sync_folder(out.parent)


@contextmanager
def _working_folder(partial: Path) -> Iterator[None]:
    """Hold the working folder for this process alone; after an error it stays if there is something in it to continue.

    Raises:
        DataError: another process holds it, or it is not ours.
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
            kept = f"What is finished stays in {partial}: the next attempt continues from it, and it may be deleted"
            raise type(error)(f"{error}. {kept}") from error
        raise
    finally:
        lock.release()
