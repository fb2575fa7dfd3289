"""The command says what it made, and in what state it leaves things."""

import json
import subprocess
import sys

import pytest

from liveselect import cli
from liveselect.cli.prepare import main
from liveselect.datamodules.clusters.cluster import Clusters
from liveselect.datamodules.pools.tokens import TokenStore


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"some words about number {i}", "url": f"u{i}"}) + "\n" for i in range(50))
    )
    return path


def command(corpus, *more):
    return [
        f"web={corpus}",
        "--out",
        str(corpus.parent / "pool"),
        "--tokenizer",
        "bpe:300",
        "--block-size",
        "16",
        *more,
    ]


def test_the_command_makes_a_pool_and_says_what_it_holds(corpus, capsys):
    assert main(command(corpus, "--metadata", "url", "--workers", "1")) == 0
    store = TokenStore(corpus.parent / "pool")
    output = capsys.readouterr().out
    assert f"{store.rows} blocks of 16 tokens" in output
    assert f"fingerprint {store.fingerprint}" in output
    assert "web: 50 documents" in output
    assert store.documents_of(0)[0]["metadata"] == {"url": "u0"}
    assert main(command(corpus, "--metadata", "url")) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(command(corpus, "--quiet", "--overwrite")) == 0
    assert capsys.readouterr().out == ""


def test_the_command_sorts_the_blocks_into_clusters_when_it_is_told_to(corpus, capsys):
    assert main(command(corpus, "--embed", "--clusters", "3")) == 0
    assert "3 clusters of" in capsys.readouterr().out
    store = TokenStore(corpus.parent / "pool")
    assert len(Clusters(store)) == 3
    assert main(command(corpus, "--clusters", "2", "--quiet", "--overwrite")) == 0
    assert len(Clusters(TokenStore(corpus.parent / "pool"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text-column", "body"], "line 1: no column 'body'; the columns are 'text', 'url'"),
        (["--block-size", "100000"], "which do not fill one block of 100000"),
        (["--tokenizer", "bpe:3"], "expected bpe:N with a vocabulary of N >= 257"),
        (["--embed", "tfidf"], "expected an embedding of the form hashed, encoder:NAME"),
        (["--clusters", "0"], "expected --clusters of at least 1, got 0"),
    ],
)
def test_an_error_is_a_sentence_and_not_a_traceback(corpus, capsys, change, message):
    assert cli.main(["prepare", *command(corpus, *change)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (corpus.parent / "pool").exists()


@pytest.mark.parametrize("source", ["nope.jsonl", "web=nope.jsonl"])
def test_a_source_that_is_not_there_is_told_before_what_else_is_missing(corpus, capsys, source):
    assert cli.main(["prepare", str(corpus), source, "--out", str(corpus.parent / "pool")]) == 1
    assert "no such file or folder: 'nope.jsonl'" in capsys.readouterr().err
    assert cli.main(["prepare", str(corpus), "--out", str(corpus.parent / "pool")]) == 1
    assert "text needs a tokenizer" in capsys.readouterr().err


def test_an_error_of_a_worker_is_a_sentence_too(corpus, capsys):
    corpus.write_text('{"ids": [1, 2, 99]}\n' * 10)
    arguments = [str(corpus), "--out", str(corpus.parent / "pool"), "--ids-column", "ids", "--vocab-size", "9"]
    assert cli.main(["prepare", *arguments, "--workers", "2"]) == 1
    error = capsys.readouterr().err
    assert "line 1: expected token ids from 0 to 8, got 99" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus.jsonl"]


def test_help_comes_without_loading_what_only_the_work_needs():
    code = (
        "import sys\nfrom liveselect.cli.prepare import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'transformers', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "hub:NAME[:CONFIG[:SPLIT]]" in done.stdout
