"""The sample that a tokenizer is trained on, and how its size is shared out."""

import pytest

from liveselect.datamodules.pools.corpus import Corpus, Recipe
from liveselect.datamodules.pools.sources import Source


@pytest.fixture
def corpus(tmp_path):
    """A source of four files of 1000 letters, one of a single short file, and one of 20000 letters."""
    for name, files in {"a": ["a" * 1000] * 4, "b": ["b" * 10], "c": ["c" * 20000]}.items():
        (tmp_path / name).mkdir()
        for index, text in enumerate(files):
            (tmp_path / name / f"{index}.txt").write_text(text)
    sources = [Source(name, str(tmp_path / name)) for name in "abc"]
    return Corpus(sources, Recipe(tokenizer="bpe:300"))


def letters(texts):
    joined = "".join(texts)
    return {letter: joined.count(letter) for letter in "abc"}


def test_a_sample_takes_as_much_of_every_source_and_file(corpus):
    texts = corpus.sample(300)
    assert [len(text) for text in texts if "a" in text] == [25] * 4
    assert letters(texts) == {"a": 100, "b": 10, "c": 190}  # what a short source leaves goes to those after it


def test_a_sample_that_could_hold_everything_does(corpus):
    assert letters(corpus.sample(10**6)) == {"a": 4000, "b": 10, "c": 20000}


def test_documents_report_how_much_was_read_up_to_all_of_it(corpus):
    done = [document.done for document in corpus.documents()]
    assert done == sorted(done)
    assert done[-1] == corpus.size == 24010
