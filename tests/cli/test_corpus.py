"""The demo's texts: found anywhere, the same every time, and without the prose that judges."""

import json
import re

import pytest

from liveselect.cli import machine_texts
from liveselect.cli.corpus import (
    HELD_OUT,
    LONGEST,
    PLACES,
    Document,
    Place,
    describe,
    find_corpus,
    hold_out,
    without_repeats,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus():
    small = {source: Place(place.find, 30_000) for source, place in PLACES.items()}
    return find_corpus(small, least=1)


def paragraphs(documents):
    """Return the paragraphs of documents that are long enough to be no chance, white space aside."""
    texts = (" ".join(part.split()) for d in documents for part in re.split(r"\n\s*\n", d.text))
    return {text for text in texts if len(text) >= 40}


def test_this_machine_has_every_source_that_comes_with_python(corpus):
    assert {"code", "docstrings", "tables", "reference"} <= set(corpus.pool)
    for source, documents in corpus.pool.items():
        assert all(document.source == source for document in documents)
        assert sum(len(document.text) for document in documents[:-1]) < 30_000 or source == "reference"
        assert all(200 <= len(document.text) <= LONGEST for document in documents) or source == "reference"


def test_no_paragraph_of_the_held_out_prose_is_in_the_pool_or_in_the_other_part(corpus):
    pool = paragraphs([document for documents in corpus.pool.values() for document in documents])
    reference, validation = paragraphs(corpus.reference), paragraphs(corpus.validation)
    assert reference
    assert validation
    assert not pool & reference
    assert not pool & validation
    assert not reference & validation


def test_the_same_machine_gives_the_same_corpus(corpus):
    small = {source: Place(place.find, 30_000) for source, place in PLACES.items()}
    assert find_corpus(small, least=1) == corpus


def test_held_out_parts_have_about_the_size_asked_for(corpus):
    for part, characters in HELD_OUT.items():
        assert characters <= sum(len(document.text) for document in getattr(corpus, part)) <= 1.25 * characters


def test_copies_and_held_out_paragraphs_are_left_out_of_a_source(monkeypatch):
    secret = "The held out paragraph that nothing in the pool may repeat, in any spacing."
    monkeypatch.setattr(
        machine_texts, "reference_prose", lambda: [("secret", f"{secret}\n\n" + "other prose. " * 6000)]
    )
    words = "plain words " * 30
    texts = {
        "a": f"{words}first\n\n  The held out  paragraph that nothing in the pool\nmay repeat, in any spacing.\n\nend",
        "b": f"{words}first\n\nend",  # the same as a, once the paragraph is gone
        "c": "short",
        "d": words,
    }
    found = {name: (lambda text=text: text) for name, text in texts.items()}
    monkeypatch.setattr(
        "liveselect.cli.corpus.hold_out",
        lambda documents, shares: ([], {"reference": documents, "validation": documents}),
    )
    pool = find_corpus({"source": Place(lambda: found, 10_000)}, least=1).pool["source"]
    assert sorted(document.text for document in pool) == sorted([f"{words}first\n\nend", words.strip()])


def test_what_topics_share_stays_in_the_first_of_them():
    shared, own = "a paragraph that both of the topics hold, word for word", "own words " * 30
    documents = without_repeats([("a", f"{own}a\n\n{shared}"), ("b", f"{shared}\n\n{own}b"), ("c", shared)])
    assert [document.text.count(shared) for document in documents] == [1, 0]


def test_holding_out_moves_whole_documents_and_loses_none():
    documents = [Document("s", str(index), "x" * (50 + index)) for index in range(40)]
    rest, parts = hold_out(documents, {"reference": 300, "validation": 500})
    together = [*rest, *parts["reference"], *parts["validation"]]
    assert sorted(map(repr, together)) == sorted(map(repr, documents))
    assert hold_out(documents[::-1], {"reference": 300, "validation": 500}) == (
        rest,
        parts,
    )  # whatever order they come in


def test_code_and_docstrings_share_a_module_out_between_them(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""About it."""\n\nx = 1\n\n\ndef f():\n    """About f.\n\n    More.\n    """\n    return x\n')
    assert machine_texts._without_docstrings(path) == "\n\nx = 1\n\ndef f():\n\n    return x\n"
    assert machine_texts._only_docstrings(path) == "About it.\n\nAbout f.\n\nMore."
    path.write_text("not python (")
    assert machine_texts._only_docstrings(path) == ""


def test_what_is_no_text_reads_as_nothing(tmp_path):
    for name, content in {"nul": b"a\0b", "latin": b"caf\xe9", "broken.gz": b"\x1f\x8bno"}.items():
        (tmp_path / name).write_bytes(content)
        assert machine_texts._read(tmp_path / name) == ""
    assert machine_texts._read(tmp_path / "absent") == ""


def test_a_machine_without_texts_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(machine_texts, "reference_prose", lambda: iter(()))
    with pytest.raises(ValueError, match="needs a Python with its standard library"):
        find_corpus({})


def test_the_files_hold_every_document_with_its_source(corpus, tmp_path):
    paths = write_corpus(corpus, tmp_path)
    assert set(paths) == set(corpus.pool)
    for source, path in paths.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        assert [(row["text"], row["source"], row["name"]) for row in rows] == [
            (document.text, source, document.name) for document in corpus.pool[source]
        ]
    assert (tmp_path / "held_out_reference.jsonl").stat().st_size > HELD_OUT["reference"]
    assert all(source in describe(corpus) for source in corpus.pool)
