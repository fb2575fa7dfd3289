"""A pool is compared with its recipe done by hand, and with itself made in other ways and through crashes."""

import gzip
import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from liveselect.datamodules.pools import display as display_module
from liveselect.datamodules.pools import parts as parts_module
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.pool_files import LOCK, TOKENS, hash_tokens
from liveselect.datamodules.pools.prepare import DiskFullError, prepare
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.tokenizers import END_OF_TEXT, save_tokenizer, train_bpe
from liveselect.datamodules.pools.tokens import TokenStore

BLOCK = 16
WORDS = ["the", "selection", "of", "data", "while", "a", "model", "is", "trained", "live", "ä", "∂", "漢字"]


def make_text(rng, words):
    return " ".join(rng.choice(WORDS, size=words)) + "\n"


def make_records(seed, count):
    rng = np.random.default_rng(seed)
    return [{"text": make_text(rng, rng.integers(1, 40)), "url": f"u{i}", "rank": i} for i in range(count)]


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    save_tokenizer(train_bpe([make_text(np.random.default_rng(0), 500)], 300), folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    """One source of each kind, in the order of their names."""
    folder = tmp_path / "sources"
    folder.mkdir()
    write_json_lines(folder / "a.jsonl", make_records(1, 60))
    packed = gzip.compress(write_json_lines(folder / "b.jsonl", make_records(2, 40)).read_bytes())
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl.gz").write_bytes(packed)
    pq.write_table(pa.Table.from_pylist(make_records(3, 50)), folder / "c.parquet", row_group_size=7)
    (folder / "d").mkdir()
    for index, record in enumerate(make_records(4, 9)):
        (folder / "d" / f"{index}.txt").write_text(record["text"])
    return [folder / "a.jsonl", folder / "b.jsonl.gz", folder / "c.parquet", folder / "d"]


@pytest.fixture
def ready_ids(tmp_path):
    """A source of token ids below 500, which needs no tokenizer."""
    rng = np.random.default_rng(5)
    documents = [{"input_ids": rng.integers(0, 500, size=rng.integers(1, 60)).tolist(), "url": i} for i in range(200)]
    return write_json_lines(tmp_path / "ids.jsonl", documents), [document["input_ids"] for document in documents]


def prepare_ids(path, out, **changes):
    settings = {"ids_column": "input_ids", "vocab_size": 501, "eos_id": 500, "block_size": BLOCK, "workers": 1}
    return prepare([path], out, **settings | {"quiet": True, "unit_bytes": 1000} | changes)


def test_a_pool_is_the_encoded_documents_of_all_sources_in_order(tmp_path, sources, tokenizer):
    from transformers import AutoTokenizer

    store = prepare(sources, tmp_path / "pool", tokenizer=tokenizer, block_size=BLOCK, quiet=True)
    reference = AutoTokenizer.from_pretrained(tokenizer)
    records = [record for seed, count in ((1, 60), (2, 40), (3, 50), (4, 9)) for record in make_records(seed, count)]
    encoded = [reference(record["text"], add_special_tokens=False)["input_ids"] for record in records]
    stream = [token for ids in encoded for token in [*ids, reference.eos_token_id]]
    rows = len(stream) // BLOCK
    assert store.read(range(rows)).flatten().tolist() == stream[: rows * BLOCK]
    assert (store.rows, store.eos_id, store.vocab_size) == (rows, reference.eos_token_id, len(reference))
    assert store.group_names == ("a", "b", "c", "d")
    assert store.document_hashes.tolist() == [hash_tokens(ids) for ids in encoded][: len(store.document_hashes)]
    again = AutoTokenizer.from_pretrained(store.tokenizer_path)
    assert again.decode(store.read([0])[0]) == reference.decode(stream[:BLOCK])


def test_every_block_is_traced_to_file_line_and_metadata(tmp_path, sources, tokenizer):
    store = prepare(sources, tmp_path / "pool", tokenizer=tokenizer, block_size=BLOCK, quiet=True)
    found = {}
    for row in range(store.rows):
        for document in store.documents_of(row):
            found[document["id"]] = document
            assert row in store.rows_of(document["id"])
    assert found["a/a.jsonl:7"]["metadata"] == {"url": "u6", "rank": 6, "path": None}
    assert found["b/b.jsonl.gz:1"]["metadata"] == {"url": "u0", "rank": 0, "path": None}
    assert found["c/c.parquet:49"]["metadata"] == {"url": "u49", "rank": 49, "path": None}
    assert found["d/3.txt"]["metadata"] == {"url": None, "rank": None, "path": "3.txt"}
    assert found["d/3.txt"]["source"] == "d"


def test_metadata_of_any_shape_survives(tmp_path):
    values = [{"k": 1, "m": 1, "s": "x", "l": {"a": 1}, "n": None}, {"k": 2.5, "m": "a", "s": "\ud800", "b": True}, {}]
    records = [{"input_ids": [1, 2, 3, 4], **value} for value in values]
    store = prepare_ids(write_json_lines(tmp_path / "a.jsonl", records), tmp_path / "pool", block_size=5)
    metadata = [store.document(index)["metadata"] for index in range(3)]
    assert metadata[0] == {"k": 1.0, "m": "1", "s": "x", "l": '{"a": 1}', "n": None, "b": None}
    assert metadata[1] == {"k": 2.5, "m": "a", "s": "?", "l": None, "n": None, "b": True}
    assert metadata[2] == dict.fromkeys("kmslnb")


def test_metadata_and_document_ids_can_be_chosen(tmp_path):
    path = write_json_lines(
        tmp_path / "a.jsonl", [{**record, "id": f"x{i}"} for i, record in enumerate(make_records(1, 9))]
    )
    store = prepare(
        [path], tmp_path / "pool", tokenizer="bpe:300", block_size=BLOCK, quiet=True, id_column="id", metadata=("url",)
    )
    assert store.documents_of(0)[0]["id"] == "x0"
    assert store.documents_of(0)[0]["metadata"] == {"url": "u0"}


def test_the_content_depends_neither_on_workers_nor_on_the_size_of_units(tmp_path, sources):
    settings = {"tokenizer": "bpe:320", "block_size": BLOCK, "quiet": True}
    one = prepare(sources, tmp_path / "one", workers=1, **settings)
    two = prepare(sources, tmp_path / "two", workers=2, unit_bytes=700, **settings)
    assert one.fingerprint == two.fingerprint
    for name in (TOKENS, "documents.parquet", "tokenizer/tokenizer.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_ready_ids_are_joined_with_one_separator_each(tmp_path, ready_ids):
    path, documents = ready_ids
    store = prepare_ids(path, tmp_path / "pool")
    stream = [token for ids in documents for token in [*ids, 500]]
    assert store.read(range(store.rows)).flatten().tolist() == stream[: store.rows * BLOCK]
    with_separator = write_json_lines(tmp_path / "sep.jsonl", [{"input_ids": [*ids, 500]} for ids in documents])
    assert prepare_ids(with_separator, tmp_path / "sep").document_tokens.tolist() == store.document_tokens.tolist()
    table = pa.table({"input_ids": pa.array(documents, pa.list_(pa.uint16()))})
    pq.write_table(table, tmp_path / "ids.parquet")
    assert (
        prepare_ids(tmp_path / "ids.parquet", tmp_path / "parquet").manifest["files"][TOKENS]
        == store.manifest["files"][TOKENS]
    )


def test_ready_blocks_pass_unchanged_without_separator(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 500, size=(30, BLOCK))
    path = write_json_lines(tmp_path / "a.jsonl", [{"input_ids": block.tolist()} for block in blocks])
    store = prepare_ids(path, tmp_path / "pool", separate=False)
    assert np.array_equal(store.read(range(30)).numpy(), blocks)


def test_beside_ready_ids_neither_their_text_nor_their_masks_are_kept(tmp_path):
    record = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "text": "one two three", "url": "u"}
    path = write_json_lines(tmp_path / "a.jsonl", [record] * 9)
    assert prepare_ids(path, tmp_path / "pool", block_size=4).document(0)["metadata"] == {"url": "u"}
    chosen = prepare_ids(path, tmp_path / "chosen", block_size=4, metadata=("text",))
    assert chosen.document(0)["metadata"] == {"text": "one two three"}


def test_a_pool_below_its_source_is_not_read_as_a_source(tmp_path, ready_ids):
    source, _ = ready_ids
    (tmp_path / "data").mkdir()
    source.rename(tmp_path / "data" / "ids.jsonl")
    store = prepare_ids(tmp_path / "data", tmp_path / "data" / "pool")
    assert prepare_ids(tmp_path / "data", tmp_path / "data" / "pool").fingerprint == store.fingerprint


def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer):
    records = [{"text": text} for text in ("", "some words here", None, " \n", "more words here")]
    path = write_json_lines(tmp_path / "a.jsonl", records)
    store = prepare([path], tmp_path / "pool", tokenizer=tokenizer, block_size=4, quiet=True)
    assert store.manifest["counts"] == {"empty": 3}
    assert len(store.document_tokens) == 2


CRASHING = """
import os, signal, sys
from liveselect.datamodules.pools import pool_files
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.prepare import prepare
from pathlib import Path

place, number, workers, source, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
owner, name = {
    "fsync": (pool_files.os, "fsync"),
    "rename": (Path, "replace"),
    "collect": (PrepareDisplay, "update"),
    "append": (pool_files.PoolWriter, "append"),
    "never": (pool_files, "hash_file"),
}[place]
original, calls = getattr(owner, name), 0


def crash_at_the_call(*arguments, **keywords):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)


if __name__ == "__main__":
    setattr(owner, name, crash_at_the_call)
    recipe = {"ids_column": "input_ids", "vocab_size": 501, "eos_id": 500, "block_size": 16}
    settings = {"workers": workers, "overwrite": place == "append", "quiet": True, "unit_bytes": 1000}
    prepare(source, out, **recipe, **settings)
"""


def run_crashing(tmp_path, place, number, source, out, workers=1):
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING)
    command = [sys.executable, str(script), place, str(number), str(workers), str(source), str(out)]
    # Workers inherit the pipe: that it ends shows that none of them outlives the killed parent.
    return subprocess.run(command, capture_output=True, timeout=120, check=False)


@pytest.fixture
def encoded_units(monkeypatch):
    """The units that are encoded from here on, in this process."""
    encoded = []
    original = parts_module.encode_unit

    def counted(unit, *rest):
        encoded.append(unit)
        return original(unit, *rest)

    monkeypatch.setattr(parts_module, "encode_unit", counted)
    return encoded


POINTS = [
    ("fsync", 1),  # the first part is written and not yet named
    ("fsync", 9),  # the fifth
    ("rename", 4),
    ("collect", 6),
    ("append", 1),  # no block of the pool is written yet
    ("append", 12),  # some are
    ("rename", "manifest"),
    ("rename", "place"),  # the pool is complete in the working folder; all that lacks is the last rename
]


@pytest.mark.parametrize(("place", "number"), POINTS)
def test_a_killed_preparation_leaves_nothing_that_looks_finished_and_continues(
    tmp_path, ready_ids, encoded_units, place, number
):
    source, _ = ready_ids
    whole = prepare_ids(source, tmp_path / "whole")
    units = len(encoded_units)
    assert units > 12
    number = {"manifest": units + 1, "place": units + 2}.get(number, number)
    encoded_units.clear()

    out = tmp_path / "pool"
    assert run_crashing(tmp_path, place, number, source, out).returncode == -9
    with pytest.raises(FileNotFoundError, match="is unfinished: run the same"):
        TokenStore(out)
    parts = {path: path.stat().st_ino for path in (tmp_path / "pool.partial").glob("parts-*/*.arrow")}

    store = prepare_ids(source, out)
    assert len(encoded_units) == units - len(parts)
    assert store.fingerprint == whole.fingerprint
    assert TokenStore(out, verify=True).rows == whole.rows
    assert not (tmp_path / "pool.partial").exists()


def test_workers_do_not_outlive_a_killed_parent_and_their_work_is_kept(tmp_path, ready_ids, encoded_units):
    source, _ = ready_ids
    whole = prepare_ids(source, tmp_path / "whole")
    units = len(encoded_units)
    encoded_units.clear()
    out = tmp_path / "pool"
    assert run_crashing(tmp_path, "collect", 5, source, out, workers=2).returncode == -9
    kept = len(list((tmp_path / "pool.partial").glob("parts-*/*.arrow")))
    assert kept >= 5
    assert prepare_ids(source, out).fingerprint == whole.fingerprint
    assert len(encoded_units) == units - kept


def test_a_pool_that_is_being_replaced_stays_until_the_new_one_is_complete(tmp_path, ready_ids):
    source, _ = ready_ids
    out = tmp_path / "pool"
    before = prepare_ids(source, out, block_size=BLOCK * 2)
    assert run_crashing(tmp_path, "append", 3, source, out).returncode == -9
    assert TokenStore(out, verify=True).fingerprint == before.fingerprint
    after = prepare_ids(source, out, overwrite=True)
    assert after.block_size == BLOCK
    assert not (tmp_path / "pool.partial").exists()


def test_a_finished_pool_is_returned_as_it_is(tmp_path, ready_ids, encoded_units, capsys):
    source, _ = ready_ids
    store = prepare_ids(source, tmp_path / "pool")
    encoded_units.clear()
    assert prepare_ids(source, tmp_path / "pool", quiet=False).fingerprint == store.fingerprint
    assert not encoded_units
    assert "was prepared from the same sources in the same way before" in capsys.readouterr().err


def test_a_pool_made_in_another_way_is_replaced_only_when_asked(tmp_path, ready_ids):
    source, _ = ready_ids
    store = prepare_ids(source, tmp_path / "pool")
    with pytest.raises(
        DataError, match=r"made with other block_size, eos_id: choose another place, or pass --overwrite"
    ):
        prepare_ids(source, tmp_path / "pool", block_size=8, eos_id=None)
    assert TokenStore(tmp_path / "pool").fingerprint == store.fingerprint
    assert prepare_ids(source, tmp_path / "pool", block_size=8, overwrite=True).block_size == 8
    with source.open("a") as file:
        file.write('{"input_ids": [1]}\n')
    with pytest.raises(DataError, match="made with other block_size, sources"):
        prepare_ids(source, tmp_path / "pool")


def test_a_damaged_pool_is_not_taken_for_finished(tmp_path, ready_ids):
    source, _ = ready_ids
    store = prepare_ids(source, tmp_path / "pool")
    (store.path / TOKENS).write_bytes(b"short")
    with pytest.raises(DataError, match=r"has 5 bytes where the manifest says .* --overwrite"):
        prepare_ids(source, tmp_path / "pool")
    assert prepare_ids(source, tmp_path / "pool", overwrite=True).fingerprint == store.fingerprint


def test_what_is_no_pool_is_never_replaced(tmp_path, ready_ids):
    source, _ = ready_ids
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear")
    with pytest.raises(DataError, match="exists and is no pool: choose another place"):
        prepare_ids(source, tmp_path / "thesis", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl", "thesis"]
    (tmp_path / "empty").mkdir()
    assert prepare_ids(source, tmp_path / "empty").rows > 0


def test_a_working_folder_that_is_not_ours_is_left_alone(tmp_path, ready_ids):
    (tmp_path / "pool.partial").mkdir()
    (tmp_path / "pool.partial" / "thesis.tex").write_text("dear")
    with pytest.raises(DataError, match=r"pool\.partial is needed to work in, and holds something else"):
        prepare_ids(ready_ids[0], tmp_path / "pool")
    assert (tmp_path / "pool.partial" / "thesis.tex").exists()


def test_two_preparations_of_one_pool_do_not_mix(tmp_path, ready_ids):
    source, _ = ready_ids
    (tmp_path / "pool.partial").mkdir()
    with FileLock(tmp_path / "pool.partial" / LOCK), pytest.raises(DataError, match="another process is preparing"):
        prepare_ids(source, tmp_path / "pool")
    assert prepare_ids(source, tmp_path / "pool").rows > 0


def test_after_an_error_in_the_middle_the_mended_source_continues(tmp_path, ready_ids, encoded_units):
    source, _ = ready_ids
    good = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*good[:150], good[150][:9] + "\n", *good[151:]]))
    with pytest.raises(DataError, match=r"line 151: not valid JSON .*\. Finished parts stay in .*pool\.partial"):
        prepare_ids(source, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    before = len(encoded_units)
    source.write_text("".join(good))
    store = prepare_ids(source, tmp_path / "pool")
    continued = len(encoded_units) - before
    encoded_units.clear()
    assert prepare_ids(source, tmp_path / "whole").fingerprint == store.fingerprint
    assert continued == len(encoded_units) - before


def test_a_part_is_not_taken_for_that_of_a_changed_document(tmp_path, ready_ids):
    source, _ = ready_ids
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:-1], "no JSON\n"]))
    with pytest.raises(DataError, match="line 200: not valid JSON"):
        prepare_ids(source, tmp_path / "pool")
    first = json.loads(lines[0])
    first["input_ids"][0] = (first["input_ids"][0] + 1) % 500
    source.write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
    store = prepare_ids(source, tmp_path / "pool")
    assert store.read([0])[0, : len(first["input_ids"])].tolist() == first["input_ids"][:BLOCK]
    assert store.fingerprint == prepare_ids(source, tmp_path / "whole").fingerprint


@pytest.mark.parametrize("change", [{"eos_id": 7}, {"vocab_size": 70000}, {"separate": False}, {"block_size": 5}])
def test_parts_of_another_recipe_are_not_mixed_in(tmp_path, ready_ids, change):
    source, _ = ready_ids
    good = source.read_text()
    source.write_text(good + "no JSON\n")
    with pytest.raises(DataError, match="line 201: not valid JSON"):
        prepare_ids(source, tmp_path / "pool")
    source.write_text(good)
    store = prepare_ids(source, tmp_path / "pool", **change)
    assert store.fingerprint == prepare_ids(source, tmp_path / "whole", **change).fingerprint


IDS = {"ids_column": "input_ids", "vocab_size": 10}
TEXT = {"tokenizer": "bpe:300"}


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([{"body": "x"}], TEXT, r"line 1: no column 'text'; the columns are 'body'"),
        ([{"text": "x"}], {**TEXT, "id_column": "id"}, r"no column 'id'; the columns are 'text'"),
        ([{"text": "x", "id": None}], {**TEXT, "id_column": "id"}, r"line 1: the id column 'id' is empty"),
        ([{"text": 3}], TEXT, r"line 1: expected text in column 'text', got int"),
        ([{"text": [1, 2]}], TEXT, r"got list. .*pass their column as ids_column"),
        ([{"text": ""}, {"text": None}], TEXT, r"no text to train a tokenizer on: every document is empty"),
        ([{"input_ids": []}, {"input_ids": None}], IDS, r"all documents are left out \(2 empty\)"),
        ([{"text": "x"}], TEXT, r"hold \d tokens, which do not fill one block of 16 .*: use a smaller block size"),
        (
            [{"input_ids": [1, 10]}],
            IDS,
            r"line 1: expected token ids from 0 to 9, got 10: name the tokenizer that made them",
        ),
        ([{"input_ids": [-1, 2]}], IDS, r"expected token ids from 0 to 9, got -1"),
        ([{"input_ids": [1.5]}], IDS, r"expected a flat list of integer token ids, got \[1\.5\]"),
        ([{"input_ids": [[1], [2]]}], IDS, r"expected a flat list of integer token ids"),
        ([{"input_ids": [[1], 2]}], IDS, r"expected a flat list of integer token ids"),
        ([{"input_ids": ["1"]}], IDS, r"expected a flat list of integer token ids"),
        ([{"input_ids": [True]}], IDS, r"expected a flat list of integer token ids"),
        ([{"input_ids": "1 2"}], IDS, r"line 1: expected a list of token ids in column 'input_ids', got '1 2'"),
        ([{"input_ids": [1]}], {**IDS, "eos_id": 10}, r"expected eos_id in 0\.\.9, got 10"),
        ([{"text": "x"}], {}, r"text needs a tokenizer: .*bpe:N"),
        ([{"text": "x"}], {"tokenizer": "bpe:12"}, r"expected bpe:N with a vocabulary of N >= 257 .* got 'bpe:12'"),
        ([{"text": "x"}], {"tokenizer": "bpe:many"}, r"got 'bpe:many'"),
        ([{"input_ids": [1]}], {"ids_column": "input_ids"}, r"need the tokenizer that made them, or vocab_size"),
        ([{"input_ids": [1]}], {"ids_column": "input_ids", **TEXT}, r"cannot be trained on ready token ids"),
        ([{"text": "x"}], {**TEXT, "vocab_size": 5}, r"vocab_size=5 is smaller than the tokenizer's, 257"),
        ([{"text": "x"}], {**TEXT, "on_undecodable": "ignore"}, r"one of \('error', 'replace', 'skip'\), got 'ignore'"),
        ([{"text": "x"}], {**TEXT, "block_size": 0}, r"blocks of at least 2 tokens, got block_size=0"),
        (
            [{"text": "x"}],
            {**TEXT, "block_size": 1},
            r"blocks of at least 2 tokens, got block_size=1: .* nothing to predict",
        ),
        ([{"text": "x"}], {**TEXT, "workers": 0}, r"at least one worker"),
    ],
)
def test_bad_input_says_what_to_do_and_leaves_nothing(tmp_path, lines, settings, message):
    path = write_json_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=message):
        prepare([path], tmp_path / "pool", **{"block_size": BLOCK, "quiet": True} | settings)
    left = sorted(file.name for file in tmp_path.iterdir())
    # A part that was finished may stay, but then in the working folder, and the message says so.
    assert left in (["a.jsonl"], ["a.jsonl", "pool.partial"])


def test_sources_must_be_there_and_told_apart(tmp_path, ready_ids):
    source, _ = ready_ids
    with pytest.raises(DataError, match="expected at least one source"):
        prepare([], tmp_path / "pool", tokenizer="bpe:300")
    with pytest.raises(DataError, match="several sources are called 'ids': give each its own name"):
        prepare([source, source], tmp_path / "pool", tokenizer="bpe:300")
    with pytest.raises(DataError, match="no such file or folder"):
        prepare([tmp_path / "nothing"], tmp_path / "pool", tokenizer="bpe:300")


def test_an_unknown_tokenizer_says_to_pass_a_path_or_train_one(tmp_path, ready_ids, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match=r"could not be loaded .*pass the path of a folder .* bpe:N"):
            prepare([ready_ids[0]], tmp_path / "pool", tokenizer=name)
    assert not (tmp_path / "pool.partial").exists()


@pytest.mark.parametrize("policy", ["replace", "skip"])
def test_undecodable_documents_are_counted(tmp_path, policy, tokenizer):
    lines = [json.dumps({"text": f"words and words {i}"}).encode() for i in range(20)]
    lines[7] = lines[7].replace(b"and", b"\xff")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    settings = {"tokenizer": tokenizer, "block_size": 4, "quiet": True}
    with pytest.raises(DataError, match=r"line 8: byte \d+ \(0xff\)"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "pool", **settings)
    store = prepare([tmp_path / "a.jsonl"], tmp_path / "pool", on_undecodable=policy, **settings)
    assert store.manifest["counts"]["undecodable"] == 1
    assert sum(source["documents"] for source in store.manifest["sources"]) == (20 if policy == "replace" else 19)


@pytest.fixture
def file_size_limit():
    """Sets how large a file may become, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1500, 9000])
def test_a_full_disk_says_how_much_is_missing_and_the_preparation_continues(
    tmp_path, ready_ids, encoded_units, file_size_limit, size
):
    source, _ = ready_ids
    whole = prepare_ids(source, tmp_path / "whole")
    assert (whole.path / TOKENS).stat().st_size > 9000  # the larger limit lets every part pass, and not the pool
    file_size_limit(size)
    with pytest.raises(DiskFullError, match=r"no space for the pool .* about \d+ more bytes are needed, \d+ are free"):
        prepare_ids(source, tmp_path / "pool")
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert not (tmp_path / "pool").exists()
    assert (tmp_path / "pool.partial").exists() == (size == 9000)
    assert not list(tmp_path.rglob("*.tmp"))
    encoded_units.clear()
    assert prepare_ids(source, tmp_path / "pool").fingerprint == whole.fingerprint
    assert bool(encoded_units) == (size == 1500)


def test_too_little_space_for_the_pool_is_seen_before_it_is_written(tmp_path, ready_ids, monkeypatch):
    source, _ = ready_ids
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 17))
    with pytest.raises(DiskFullError, match=r"about \d+ more bytes are needed, 17 are free"):
        prepare_ids(source, tmp_path / "pool")
    monkeypatch.undo()
    parts = sum(path.stat().st_size for path in (tmp_path / "pool.partial").rglob("*.arrow"))
    store = prepare_ids(source, tmp_path / "pool")
    assert sum(file["bytes"] for file in store.manifest["files"].values()) <= parts  # what was said was enough


def test_an_interruption_keeps_the_finished_parts(tmp_path, ready_ids, monkeypatch, encoded_units):
    source, _ = ready_ids
    prepare_ids(source, tmp_path / "whole")
    units = len(encoded_units)
    encoded_units.clear()
    reports = []

    def interrupted(display, done, tokens):
        reports.append(done)
        if len(reports) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrepareDisplay, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_ids(source, tmp_path / "pool")
    assert len(list((tmp_path / "pool.partial").glob("parts-*/*.arrow"))) == 4
    store = prepare_ids(source, tmp_path / "pool")
    assert len(encoded_units) == units
    assert store.rows > 0


def test_progress_is_lines_where_there_is_no_terminal_and_nothing_when_quiet(monkeypatch, capsys):
    monkeypatch.setattr(display_module, "SECONDS_BETWEEN_LINES", 0)
    for quiet in (True, False):
        display = PrepareDisplay(quiet)
        display.say("hello")
        with display.phase("encoding", 2000):
            display.update(500, 3_000_000)
        lines = capsys.readouterr().err.splitlines()
        if quiet:
            assert lines == []
    assert lines[0] == "hello"
    assert any(line.startswith("encoding: 500B of 2.00kB, 3.0M tokens, ") and "left" in line for line in lines)


def test_the_end_of_text_marks_nothing_but_ends_of_documents(tmp_path):
    texts = [f"to end say {END_OF_TEXT} and go on, number {i}" for i in range(30)]
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    store = prepare([path], tmp_path / "pool", tokenizer="bpe:400", block_size=BLOCK, quiet=True)
    tokens = store.read(range(store.rows))
    inside = sum(d["end"] - d["start"] for row in range(store.rows) for d in store.documents_of(row))
    assert int((tokens == store.eos_id).sum()) == tokens.numel() - inside
