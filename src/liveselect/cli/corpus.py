"""Real text that any machine with Python has: a mixed pool, and English reference prose that is kept out of it.

Everything is read from the interpreter's own library, the installed packages and the system's documentation, without a
network. What is found differs between machines; on one machine it is always the same, in the same order.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from liveselect.cli import machine_texts
from liveselect.cli.machine_texts import Found

KB = 1024
LONGEST = 48 * KB
"""Characters of the longest document; the rest is cut, so that no single file fills a source."""

SHORTEST = 200
"""Characters of the shortest document of the pool."""

PARAGRAPH = 40
"""Characters from which on a paragraph that occurs twice is taken for a copy."""

HELD_OUT = {"reference": 64 * KB, "validation": 96 * KB}
"""Characters of prose kept out of the pool, for selection and for judging it."""


@dataclass(frozen=True)
class Document:
    """A text with the name of its source and of itself."""

    source: str
    name: str
    text: str


@dataclass(frozen=True)
class DemoCorpus:
    """What was found.

    Attributes:
        pool: documents to choose from, by source.
        reference: prose that selection aims at.
        validation: other prose of the same kind, which only the verdict sees.
    """

    pool: dict[str, list[Document]]
    reference: list[Document]
    validation: list[Document]


@dataclass(frozen=True)
class Place:
    """Where a source is found, and how many characters of it are taken."""

    find: Callable[[], Found]
    characters: int


PLACES = {
    "code": Place(machine_texts.code, 1200 * KB),
    "tests": Place(machine_texts.tests, 800 * KB),
    "docstrings": Place(machine_texts.docstrings, 800 * KB),
    "tables": Place(machine_texts.tables, 1000 * KB),
    "headers": Place(machine_texts.headers, 700 * KB),
    "licences": Place(machine_texts.licences, 500 * KB),
    "docs": Place(machine_texts.descriptions, 900 * KB),
}
"""The sources of the pool besides the rest of the language reference, with the most that is taken of each."""


def find_corpus(places: Mapping[str, Place] = PLACES, least: int = 1024 * KB) -> DemoCorpus:
    """Collect the corpus of this machine.

    Documents are taken in the order of a hash of their names, so that a source that is larger than its share is
    sampled rather than cut off at a letter. No paragraph of the held-out prose remains in the pool.

    Args:
        places: where each source is found.
        least: characters that the pool has to have.

    Raises:
        ValueError: there is too little text, as in an interpreter without its library.
    """
    prose, kept_out = hold_out(without_repeats(machine_texts.reference_prose()), HELD_OUT)
    forbidden = {_key(part) for documents in kept_out.values() for d in documents for part in _paragraphs(d.text)}
    pool: dict[str, list[Document]] = {}
    seen: set[bytes] = set()
    for source, place in places.items():
        pool[source] = list(_take(source, place, forbidden, seen))
    pool["reference"] = prose
    pool = {source: documents for source, documents in pool.items() if documents}
    found = sum(len(document.text) for documents in pool.values() for document in documents)
    if found < least or not all(kept_out.values()):
        raise ValueError(
            f"found only {found // KB} kB of text on this machine, or no language reference (pydoc_data): the demo "
            "needs a Python with its standard library as source files. Install one, or prepare texts of your own with "
            "'liveselect prepare'"
        )
    return DemoCorpus(pool, kept_out["reference"], kept_out["validation"])


def write_corpus(corpus: DemoCorpus, folder: Path) -> dict[str, Path]:
    """Write one JSON Lines file for each source, and ``reference`` and ``validation``; returns the sources' files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for source, documents in corpus.pool.items():
        paths[source] = folder / f"{source}.jsonl"
        _write_lines(documents, paths[source])
    _write_lines(corpus.reference, folder / "held_out_reference.jsonl")
    _write_lines(corpus.validation, folder / "held_out_validation.jsonl")
    return paths


# ---- what is kept ----------------------------------------------------------------------------------------------------


def _take(source: str, place: Place, forbidden: set[bytes], seen: set[bytes]) -> Iterator[Document]:
    """Yield documents of one source up to its share, without copies and without held-out paragraphs."""
    left = place.characters
    found = place.find()
    for name in sorted(found, key=_key):
        text = found[name]()
        cut = text if len(text) <= LONGEST else text[: text.rfind("\n", 0, LONGEST) + 1]
        kept = "\n\n".join(part for part in _paragraphs(cut) if not _is_copy(part, forbidden)).strip()
        if len(kept) < SHORTEST or _key(kept) in seen:
            continue
        seen.add(_key(kept))
        yield Document(source, name, kept)
        left -= len(kept)
        if left <= 0:
            return


def without_repeats(topics: Iterable[tuple[str, str]]) -> list[Document]:
    """Return the topics without what an earlier one says already: topics of the reference contain one another."""
    seen: set[bytes] = set()
    documents = []
    for name, text in topics:
        parts = [part for part in _paragraphs(text) if not _is_copy(part, seen)]
        seen.update(_key(part) for part in parts)
        if sum(map(len, parts)) >= SHORTEST:
            documents.append(Document("reference", f"topic/{name}", "\n\n".join(parts)))
    return documents


def hold_out(documents: list[Document], shares: Mapping[str, int]) -> tuple[list[Document], dict[str, list[Document]]]:
    """Split whole documents, in hash order, into what stays in the pool and the held-out parts of about these sizes."""
    rest = sorted(documents, key=lambda document: _key(document.name))
    parts: dict[str, list[Document]] = {}
    for part, characters in shares.items():
        parts[part] = []
        for document in list(rest):
            # a document that would overshoot by far stays in the pool
            if sum(len(d.text) for d in [*parts[part], document]) <= 1.25 * characters:
                parts[part].append(document)
                rest.remove(document)
            if sum(len(d.text) for d in parts[part]) >= characters:
                break
    return rest, parts


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _is_copy(paragraph: str, known: set[bytes]) -> bool:
    return len(paragraph.strip()) >= PARAGRAPH and _key(paragraph) in known


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16).digest()


def _write_lines(documents: Iterable[Document], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"text": document.text, "source": document.source, "name": document.name}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def describe(corpus: DemoCorpus) -> str:
    """Return one line about what was found and where."""
    shares = ", ".join(f"{source} {sum(len(d.text) for d in found) // KB}" for source, found in corpus.pool.items())
    return f"Text of Python {sys.version.split()[0]} and this machine, kB: {shares}"
