"""Text that every machine with Python has: a mixed pool, and English prose held out of it.

The pool is the source of the standard library, split into code, docstrings, comments and tables of characters; the
prose is the language reference that Python's ``help()`` shows. The texts and their order depend on the version of
Python alone.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

KB = 1024
POOL = {"code": 2800 * KB, "docstrings": 1300 * KB, "comments": 800 * KB, "tables": 1300 * KB}
"""Sources of the pool with their largest number of characters; the rest of the language reference is another."""

HELD_OUT = {"reference": 64 * KB, "validation": 96 * KB}
"""Characters of prose held out of the pool, for selection and for the verdict."""

MAX_DOCUMENT_CHARACTERS = 48 * KB
"""The rest of a longer document is cut, so that no single file fills a source."""

MIN_DOCUMENT_CHARACTERS = 200
"""Less is hardly a text."""

MIN_COPY_CHARACTERS = 40
"""Shorter paragraphs, such as "See also:", may occur twice without being copies."""

_LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class DemoCorpus:
    """The texts of the demo.

    Attributes:
        pool: documents to choose from, by source.
        reference: prose that selection aims at.
        validation: other prose of the same kind, only for the verdict.
    """

    pool: dict[str, list[str]]
    reference: list[str]
    validation: list[str]

    def __str__(self) -> str:
        sizes = ", ".join(f"{source} {sum(map(len, texts)) // KB}" for source, texts in self.pool.items())
        return f"Text of the library of Python {sys.version.split()[0]}, kB: {sizes}"


def find_corpus(library: Path | None = None, sizes: Mapping[str, int] = POOL, least: int = 1024 * KB) -> DemoCorpus:
    """Collect the corpus without paragraphs that occur twice, so that nothing held out is in the pool.

    Args:
        library: folder of the library's source files, by default that of this Python.
        sizes: largest number of characters of each source.
        least: smallest number of characters of the pool.

    Raises:
        ValueError: there is too little text, as in an interpreter without its library.
    """
    seen: set[str] = set()
    held_out, rest = hold_out(without_copies(language_reference(), seen))
    library = library or Path(sysconfig.get_path("stdlib"))
    paths = [path for path in library.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(library).parts)]
    left = dict(sizes)
    pool: dict[str, list[str]] = {source: [] for source in sizes}
    for path in random.Random(0).sample(sorted(paths), len(paths)):
        if max(left.values()) <= 0:
            break
        for source, text in parts_of(path).items():
            if left[source] > 0:
                kept = without_copies([text], seen)
                pool[source] += kept
                left[source] -= sum(map(len, kept))
    pool["reference"] = rest
    found = sum(len(text) for texts in pool.values() for text in texts)
    if found < least or not all(held_out.values()):
        raise ValueError(
            f"found only {found // KB} kB of text in {library}, or no language reference (pydoc_data): the demo needs "
            "a Python with its standard library as source files. Install one, or prepare texts of your own with "
            "'liveselect prepare'"
        )
    return DemoCorpus({source: texts for source, texts in pool.items() if texts}, **held_out)


def parts_of(path: Path) -> dict[str, str]:
    """Split a Python file by source; a file that cannot be read has no parts."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.parent.name == "encodings":
            ast.parse(text)
            return {"tables": text}
        return _parts_of_source(text)
    except (OSError, ValueError, SyntaxError, RecursionError):  # nested too deeply for the parser or for unparsing
        return {}


def _parts_of_source(text: str) -> dict[str, str]:
    tree = ast.parse(text)
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(docstring)
                node.body[0] = ast.Pass()
    lines = (line.strip() for line in text.splitlines())
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") or not line)
    return {"code": ast.unparse(tree), "docstrings": "\n\n".join(docstrings), "comments": "\n".join(comments)}


def hold_out(texts: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Assign whole texts, in order, to the first held-out part with room for them, or else to the rest."""
    parts: dict[str, list[str]] = {part: [] for part in HELD_OUT}
    rest: list[str] = []
    for text in texts:
        fits = (parts[part] for part, size in HELD_OUT.items() if sum(map(len, parts[part])) + len(text) <= size)
        next(fits, rest).append(text)
    return parts, rest


def without_copies(texts: Iterable[str], seen: set[str]) -> list[str]:
    """Return the texts without ``seen`` paragraphs, to which theirs are added; short results are dropped."""
    kept = []
    for text in texts:
        parts = []
        for part in re.split(r"\n\s*\n", text[:MAX_DOCUMENT_CHARACTERS]):
            words = " ".join(part.split())
            if words and words not in seen:
                parts.append(part)
                seen.update([words] if len(words) >= MIN_COPY_CHARACTERS else [])
        if len(joined := "\n\n".join(parts)) >= MIN_DOCUMENT_CHARACTERS:
            kept.append(joined)
    return kept


def write_corpus(corpus: DemoCorpus, folder: Path) -> dict[str, Path]:
    """Write a JSON Lines file for each source and for both held-out parts; returns the sources' files."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {"held_out_reference": corpus.reference, "held_out_validation": corpus.validation}
    for name, texts in {**corpus.pool, **held_out}.items():
        lines = (json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {source: folder / f"{source}.jsonl" for source in corpus.pool}


def language_reference() -> list[str]:
    """Return the topics of the language reference, in an order that is always the same; none where it is missing."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in random.Random(0).sample(sorted(topics), len(topics))]
