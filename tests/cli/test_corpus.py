"""The demo's texts: found with any Python, the same every time, and without the prose that judges."""

import json
import re

import pytest

from liveselect.cli import corpus as texts
from liveselect.cli.corpus import (
    HELD_OUT,
    MAX_DOCUMENT_CHARACTERS,
    POOL,
    find_corpus,
    hold_out,
    parts_of,
    without_copies,
    write_corpus,
)

SMALL = dict.fromkeys(POOL, 30_000)


@pytest.fixture(scope="module")
def corpus():
    return find_corpus(sizes=SMALL, least=1)


def paragraphs(documents):
    """Return the paragraphs of documents that are long enough to be no chance, white space aside."""
    found = (" ".join(part.split()) for text in documents for part in re.split(r"\n\s*\n", text))
    return {text for text in found if len(text) >= 40}


def test_every_source_comes_with_python(corpus):
    assert set(corpus.pool) == {*POOL, "reference"}
    for source, documents in corpus.pool.items():
        assert sum(map(len, documents[:-1])) < 30_000 or source == "reference"
        assert all(200 <= len(text) <= MAX_DOCUMENT_CHARACTERS for text in documents)


@pytest.mark.slow
def test_the_whole_pool_is_large_enough_for_the_demo():
    pool = find_corpus().pool
    sizes = {source: sum(map(len, documents)) for source, documents in pool.items()}
    assert sum(sizes.values()) > 5_000_000
    assert sizes["reference"] < 0.1 * sum(sizes.values())  # what the demo aims at is rare in it


def test_no_paragraph_of_the_held_out_prose_is_in_the_pool_or_in_the_other_part(corpus):
    pool = paragraphs([text for documents in corpus.pool.values() for text in documents])
    reference, validation = paragraphs(corpus.reference), paragraphs(corpus.validation)
    assert reference
    assert validation
    assert not pool & reference
    assert not pool & validation
    assert not reference & validation


def test_the_same_python_gives_the_same_corpus(corpus):
    assert find_corpus(sizes=SMALL, least=1) == corpus


def test_held_out_parts_have_about_the_size_asked_for(corpus):
    for part, characters in HELD_OUT.items():
        assert 0.9 * characters <= sum(map(len, getattr(corpus, part))) <= characters


def test_copies_and_held_out_paragraphs_are_left_out_of_a_source(monkeypatch, tmp_path):
    secret = "The held out paragraph that nothing in the pool may repeat, in any spacing."
    monkeypatch.setattr(texts, "language_reference", lambda: [f"{secret}\n\n{'prose ' * 50}", "other prose " * 30])
    monkeypatch.setattr(texts, "HELD_OUT", {"reference": 500, "validation": 500})
    words = "plain words " * 30
    docstrings = {
        "a": f"{words}first\n\n  The held out  paragraph that nothing in the pool\nmay repeat, in any spacing.\n\nend",
        "b": f"{words}first\n\nend",  # the same as a, once the paragraph is gone
        "c": "short",
        "d": words,
    }
    for name, text in docstrings.items():
        (tmp_path / f"{name}.py").write_text(f'"""{text}"""\n')
    pool = find_corpus(tmp_path, least=1).pool["docstrings"]
    assert sorted(" ".join(text.split()) for text in pool) == sorted([f"{words}first end", words.strip()])


def test_what_topics_share_stays_in_the_first_of_them():
    shared, own = "a paragraph that both of the topics hold, word for word", "own words " * 30
    documents = without_copies([f"{own}a\n\n{shared}", f"{shared}\n\n{own}b", shared], set())
    assert [text.count(shared) for text in documents] == [1, 0]


def test_holding_out_moves_whole_documents_and_loses_none(monkeypatch):
    monkeypatch.setattr(texts, "HELD_OUT", {"reference": 300, "validation": 500})
    documents = [f"{index:03d}" + "x" * (50 + index) for index in range(40)]
    parts, rest = hold_out(documents)
    assert sorted([*rest, *parts["reference"], *parts["validation"]]) == documents
    assert all(
        300 - 90 < sum(map(len, parts[part])) <= size for part, size in {"reference": 300, "validation": 500}.items()
    )


def test_a_module_is_shared_out_between_code_docstrings_and_comments(tmp_path):
    path = tmp_path / "module.py"
    function = '# Why.\ndef f():\n    """About f.\n\n    More.\n    """\n    return x\n'
    path.write_text(f'"""About it."""\n\nx = 1  # beside\n\n\n{function}')
    parts = parts_of(path)
    assert "About" not in parts["code"]
    assert "x = 1" in parts["code"]
    assert "return x" in parts["code"]
    assert parts["docstrings"] == "About it.\n\nAbout f.\n\nMore."
    assert parts["comments"].split() == ["Why."]
    compile(parts["code"], "module.py", "exec")


def test_a_file_that_cannot_be_read_has_no_parts(tmp_path):
    contents = {"syntax.py": b"not python (", "nul.py": b"a\0b", "latin.py": b"caf\xe9"}
    contents["deep.py"] = b"+".join([b"1"] * 5000)  # can be parsed, but not written again
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert parts_of(tmp_path / name) == {}
    assert parts_of(tmp_path / "absent.py") == {}


def test_a_python_without_its_library_is_told_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="needs a Python with its standard library"):
        find_corpus(tmp_path)
    monkeypatch.setattr(texts, "language_reference", list)
    with pytest.raises(ValueError, match="or no language reference"):
        find_corpus(sizes=SMALL, least=1)


def test_the_files_hold_every_document_with_its_source(corpus, tmp_path):
    paths = write_corpus(corpus, tmp_path)
    assert set(paths) == set(corpus.pool)
    for source, path in paths.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        assert rows == [{"text": text, "source": source} for text in corpus.pool[source]]
    for part in HELD_OUT:
        lines = (tmp_path / f"held_out_{part}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line)["text"] for line in lines if line] == getattr(corpus, part)
    assert all(source in str(corpus) for source in corpus.pool)
