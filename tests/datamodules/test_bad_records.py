"""One bad record among many is mended, left out and counted, or refused with its file and line; never packed."""

import bz2
import gzip
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from liveselect.cli import main
from liveselect.datamodules.pools.prepare import prepare
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.sources import read_records
from liveselect.scores import read_scores

TEXT = "some text to train on " * 20
BOM = b"\xef\xbb\xbf"
IDS = {"tokenizer": None, "ids_column": "input_ids", "vocab_size": 100, "eos_id": 99}


def line(**columns):
    return json.dumps(columns).encode() + b"\n"


def packed(source, tmp_path, **settings):
    settings = {"tokenizer": "bpe:300", "block_size": 8, "quiet": True, "workers": 1, **settings}
    return prepare(source, tmp_path / "pool", **settings)


def documents(store):
    return sum(source["documents"] for source in store.manifest["sources"])


def ids_of(store):
    return store.read(range(len(store))).flatten().tolist()


# ---- JSON Lines and text -------------------------------------------------------------------------------------------


def test_marks_of_joined_files_are_left_out_of_every_line(tmp_path):
    file = tmp_path / "joined.jsonl"
    file.write_bytes(BOM + line(text=TEXT) + BOM + line(text=TEXT) + BOM + BOM + line(text=TEXT))
    assert [record["text"] for record in read_records(file)] == [TEXT] * 3
    (tmp_path / "joined.txt").write_bytes(BOM + b"one\n" + BOM + b"two\r\n" + BOM + BOM + b"three")
    assert [record["text"] for record in read_records(tmp_path / "joined.txt")] == ["one\ntwo\r\nthree"]


BROKEN = {
    "cut": b'{"text": "cut of\n',
    "two objects": line(text="a").strip() + line(text="b"),
    "a list": b'["a", "b"]\n',
    "no text": line(title="a"),
    "a number": line(text=7),
    "key twice": b'{"text": "a", "text": "b"}\n',
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_refused_with_its_place_or_left_out_and_counted(tmp_path, broken, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(line(text=TEXT) + broken + line(text=TEXT) + broken)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: .*set on-invalid to skip"):
        packed(file, tmp_path)
    command = ["prepare", str(file), "--out", str(tmp_path / "pool"), "--tokenizer=bpe:300", "--block-size=8"]
    assert main([*command, "--on-invalid=skip"]) == 0
    store = packed(file, tmp_path, on_invalid="skip")
    assert documents(store) == 2
    assert store.manifest["counts"]["invalid"] == 2
    assert "left out or repaired: 2 invalid" in capsys.readouterr().out


def test_impossible_ids_are_left_out_and_counted(tmp_path):
    file = tmp_path / "ids.jsonl"
    bad = ([1, -1], [1, 100], [1.5], [[1], [2, 3]], ["a"], "text")
    file.write_bytes(line(input_ids=[5] * 10) + b"".join(line(input_ids=ids) for ids in bad))
    with pytest.raises(DataError, match="line 7"):
        packed(file, tmp_path, **IDS)
    store = packed(file, tmp_path, on_invalid="skip", **IDS)
    assert (documents(store), store.manifest["counts"]["invalid"]) == (1, len(bad))


def test_what_was_prepared_before_bad_lines_could_be_skipped_is_still_recognised(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(text=TEXT))
    assert "on_invalid" not in packed(tmp_path / "a.jsonl", tmp_path).manifest["settings"]


def test_halves_of_surrogate_pairs_in_keys_and_file_names_are_mended(tmp_path):
    file = tmp_path / "key.jsonl"
    file.write_bytes(b'{"text": %s, "\\ud800k": 1, "\\ud83d\\ude00": 2}\n' % json.dumps(TEXT).encode())
    store = packed(file, tmp_path)
    assert store.document(0)["metadata"] == {"\ufffdk": 1, "😀": 2}
    folder = tmp_path / "folder"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (folder / name).write_text(TEXT)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    store = prepare(folder, tmp_path / "named", tokenizer="bpe:300", block_size=8, quiet=True, workers=1)
    assert store.document(0)["id"] == "folder/caf\ufffd.txt"


def test_a_text_with_half_a_pair_is_refused_with_its_line(tmp_path):
    (tmp_path / "half.jsonl").write_bytes(line(text=TEXT) + b'{"text": "abc \\ud800 def"}\n')
    with pytest.raises(DataError, match=r"half\.jsonl, line 2"):
        packed(tmp_path / "half.jsonl", tmp_path)


# ---- Parquet -------------------------------------------------------------------------------------------------------


def test_two_columns_of_one_name_are_refused_with_file_and_name_unless_they_are_not_read(tmp_path, capsys):
    file = tmp_path / "two.parquet"
    arrays = [pa.array([TEXT] * 3), pa.array(["x"] * 3), pa.array([1, 2, 3])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["text", "text", "n"]), file)
    with pytest.raises(DataError, match=r"two\.parquet: several columns are called 'text'"):
        packed(file, tmp_path)
    assert main(["prepare", str(file), "--out", str(tmp_path / "pool"), "--tokenizer=bpe:300"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    pq.write_table(pa.Table.from_arrays(arrays, names=["text", "n", "n"]), file)
    assert documents(packed(file, tmp_path, metadata=())) == 3


def test_scores_with_two_columns_of_one_name_are_refused(tmp_path):
    file = tmp_path / "scores.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["score", "score"]), file)
    with pytest.raises(ValueError, match=r"several columns of .*scores\.parquet are called 'score'"):
        read_scores(file)


# ---- padding -------------------------------------------------------------------------------------------------------

PADDED = {
    "mask right": {"input_ids": [5] * 6 + [0] * 4, "attention_mask": [1] * 6 + [0] * 4},
    "mask left": {"input_ids": [0] * 4 + [5] * 6, "attention_mask": [0] * 4 + [1] * 6},
    "labels right": {"input_ids": [5] * 6 + [0] * 4, "labels": [5] * 6 + [-100] * 4},
    "labels left": {"input_ids": [0] * 4 + [5] * 6, "labels": [-100] * 4 + [5] * 6},
    "both": {
        "input_ids": [0] + [5] * 6 + [0] * 3,
        "attention_mask": [0] + [1] * 6 + [0] * 3,
        "labels": [-100] + [5] * 6 + [-100] * 3,
    },
    "input mask": {"input_ids": [5] * 6 + [0] * 4, "input_mask": [True] * 6 + [False] * 4},
    "loss mask right": {"input_ids": [5] * 6 + [0] * 4, "loss_mask": [1.0] * 6 + [0.0] * 4},
    "loss mask left": {"input_ids": [0] * 4 + [5] * 6, "loss_mask": [0] * 4 + [1] * 6},
    "completion mask": {"input_ids": [5] * 6 + [0] * 4, "completion_mask": [1] * 6 + [0] * 4},
    "end of text": {"input_ids": [5] * 6 + [99] * 4},
    "nothing hidden": {"input_ids": [5] * 6, "attention_mask": [1] * 6, "labels": [-100] + [5] * 5},
}


@pytest.mark.parametrize("columnar", [False, True], ids=["json", "parquet"])
@pytest.mark.parametrize("row", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("metadata", [None, ()])
def test_padding_beside_ready_ids_is_not_packed(tmp_path, row, columnar, metadata):
    file = tmp_path / f"rows.{'parquet' if columnar else 'jsonl'}"
    if columnar:
        pq.write_table(pa.Table.from_pylist([row] * 2), file)
    else:
        file.write_bytes(line(**row) * 2)
    store = packed(file, tmp_path, block_size=7, metadata=metadata, **IDS)
    assert ids_of(store) == ([5] * 6 + [99]) * 2
    hidden = len(row["input_ids"]) > 6 and len(row) > 1
    assert store.manifest["counts"].get("padded", 0) == 2 * hidden


def test_the_padding_token_of_the_tokenizer_is_not_packed_where_no_mask_tells(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "ids.jsonl").write_bytes(line(input_ids=[3, 0, 4, 0, 0]) + line(input_ids=[0, 3, 4]))
    settings = {"tokenizer": tmp_path / "tokenizer", "ids_column": "input_ids", "block_size": 7}
    store = packed(tmp_path / "ids.jsonl", tmp_path, **settings)
    assert ids_of(store) == [3, 0, 4, 2, 3, 4, 2]
    assert store.manifest["counts"]["padded"] == 2


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([-100, -100, -100, 4, 5, 6], "labels of -100 hide tokens before others"),
        ([2, 3, 4, 5, 6, -100], "labels are neither the token ids nor -100"),
        ([1, 2, 3], "expected 'labels' as one integer for each of the 6 token ids"),
        ([1, 2, 3, 4, 5, None], "expected 'labels' as one integer for each of the 6 token ids"),
    ],
    ids=["prompt", "shifted", "short", "null"],
)
def test_labels_that_a_pool_cannot_keep_are_refused_with_their_line(tmp_path, labels, said):
    (tmp_path / "rows.jsonl").write_bytes(line(input_ids=[1, 2, 3, 4, 5, 6], labels=labels))
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        packed(tmp_path / "rows.jsonl", tmp_path, **IDS)


@pytest.mark.parametrize("metadata", [None, ()])
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({"padding_mask": [0, 0, 0, 0, 1, 1]}, "'padding_mask' has 1 for padding in some tools"),
        ({"mask": [True] * 4 + [False] * 2}, "'mask' has 1 for padding in some tools"),
        ({"loss_mask": [0, 0, 0, 1, 1, 1]}, "zeros of 'loss_mask' hide tokens before others"),
        ({"assistant_masks": [0, 0, 0, 1, 1, 0]}, "zeros of 'assistant_masks' hide tokens before others"),
        ({"loss_mask": [0.5] * 6}, "expected 'loss_mask' to hold 0 and 1 only"),
        ({"input_mask": [1, 0]}, "expected 'input_mask' as one integer for each of the 6 token ids"),
    ],
    ids=["unclear", "nameless", "prompt", "chat", "weights", "short"],
)
def test_masks_that_a_pool_cannot_keep_are_refused_with_their_line(tmp_path, mask, said, metadata):
    (tmp_path / "rows.jsonl").write_bytes(line(input_ids=[1, 2, 3, 4, 5, 6], **mask))
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        packed(tmp_path / "rows.jsonl", tmp_path, metadata=metadata, **IDS)


@pytest.mark.parametrize("ids", [[[1], [2, 3]], [[1, 2], [3, 4]], [1, None]])
def test_impossible_ids_beside_a_mask_are_refused_with_their_line(tmp_path, ids):
    (tmp_path / "rows.jsonl").write_bytes(line(input_ids=ids, attention_mask=[1, 0], labels=[1, 2]))
    with pytest.raises(DataError, match=r"line 1: expected a flat list of integer token ids|line 1: the labels are"):
        packed(tmp_path / "rows.jsonl", tmp_path, **IDS)


def test_a_label_of_the_document_stays_metadata(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(line(input_ids=[1] * 10, labels="news"))
    assert packed(tmp_path / "rows.jsonl", tmp_path, **IDS).document(0)["metadata"] == {"labels": "news"}


# ---- what is no text -----------------------------------------------------------------------------------------------


def tar_bytes():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("0.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"{}"))
    return made.getvalue()


def saved(write, *what):
    made = io.BytesIO()
    write(made, *what)
    return made.getvalue()


def zip_bytes():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.txt", "a" * 50)
    return made.getvalue()


BINARIES = {
    "shard.tar": tar_bytes(),
    "shard": tar_bytes(),
    "shard.tar.gz": gzip.compress(tar_bytes()),
    "shard.txt.gz": gzip.compress(tar_bytes()),
    "tokens.bin": np.full(100, 0x4141, np.uint16).tobytes(),  # "AAAA...": valid text
    "tokens": np.arange(100, dtype=np.uint16).tobytes(),
    "texts.zip": zip_bytes(),
    "texts.txt": zip_bytes(),
    "no-suffix.txt": gzip.compress(b"text"),
    "no-suffix.jsonl": gzip.compress(line(text="text")),
    "twice.txt.gz": gzip.compress(gzip.compress(b"text")),
    "bzip": bz2.compress(b"text"),
    "array.npy": saved(np.save, np.arange(9)),
    "array.dat": saved(np.save, np.arange(9)),
    "array.npz": saved(lambda file, array: np.savez(file, a=array), np.arange(9)),
    "weights.pt": saved(lambda file, value: torch.save(value, file), torch.ones(3)),
    "table.txt": saved(lambda file, table: pq.write_table(table, file), pa.table({"text": ["a"]})),
    "wide.txt": "text".encode("utf-16"),
    "wide2.txt": "text".encode("utf-16-le"),
    "picture.txt": b"\x89PNG\r\n\x1a\n" + b"x" * 30,
    "picture": b"\xff\xd8\xff\xe0" + b"x" * 30,
}


@pytest.mark.parametrize("name", BINARIES)
@pytest.mark.parametrize("on_undecodable", ["error", "replace"])
def test_a_binary_file_is_refused_with_what_is_read(tmp_path, name, on_undecodable):
    (tmp_path / name).write_bytes(BINARIES[name])
    with pytest.raises(DataError, match=rf"{name} holds .*Read are JSON Lines .*Parquet .*UTF-8 text"):
        packed(tmp_path / name, tmp_path, on_undecodable=on_undecodable)
    with pytest.raises(DataError, match="Read are JSON Lines"):
        list(read_records(tmp_path / name))


def test_binary_files_among_texts_are_left_out_and_counted_where_that_is_wanted(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.bin").write_bytes(b"text\0")
    (folder / "c.md").write_bytes(b"text\0")
    store = packed(folder, tmp_path, include=["*"], on_invalid="skip")
    assert (documents(store), store.manifest["counts"]["invalid"]) == (1, 2)


def test_suffixes_in_capitals_are_known(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(line(text=TEXT)))
    assert documents(packed(tmp_path / "A.JSONL.GZ", tmp_path)) == 1


def test_patterns_of_files_without_a_folder_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(text=TEXT))
    with pytest.raises(DataError, match="expected a folder among the sources"):
        packed(tmp_path / "a.jsonl", tmp_path, include=["*.txt"])
