"""Score files: what is written is read, what does not fit is refused, and nothing half-written passes for whole."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from liveselect import scores
from liveselect.cli.score_column import column_scores
from liveselect.datamodules.pools.pool_files import DOCUMENTS
from liveselect.scores import read_scores, write_scores

VALUES = np.array([0.5, -1.25, 3.0, -np.inf, 0.0], dtype=np.float32)


def write(folder, values=VALUES, pool="pool-a", about=None):
    return write_scores(folder, values, pool, about or {"method": "a test"})


def test_what_was_written_is_read(tmp_path):
    written = write(tmp_path / "s", about={"method": "pmp", "settings": {"steps": 3}})
    found = read_scores(str(tmp_path / "s"))
    assert torch.equal(found.values, torch.from_numpy(VALUES))
    assert found.values.dtype == torch.float32
    assert (found.pool, found.about) == ("pool-a", {"method": "pmp", "settings": {"steps": 3}})
    assert found.digest == written.digest
    assert np.array_equal(np.load(tmp_path / "s" / "scores.npy"), VALUES)  # anybody's numpy reads it
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["scores.json", "scores.npy"]


def test_writing_takes_pieces_so_that_their_number_does_not_matter(tmp_path, monkeypatch):
    whole = write(tmp_path / "a", np.arange(11.0)).digest
    monkeypatch.setattr(scores, "_NUMBERS_PER_CHUNK", 4)
    assert write(tmp_path / "b", np.arange(11.0)).digest == whole


@pytest.mark.parametrize("fit", [(5, "pool-b"), (4, "pool-a"), (6, "pool-a")])
def test_scores_of_another_pool_are_refused(tmp_path, fit):
    found = write(tmp_path / "s")
    found.check_fit(5, "pool-a")
    with pytest.raises(ValueError, match="liveselect score"):
        found.check_fit(*fit)


def test_scores_from_elsewhere_fit_by_their_length_only():
    found = read_scores([3.0, 1.0])
    found.check_fit(2, "whatever")
    with pytest.raises(ValueError, match="2 scores, the pool 3 candidates"):
        found.check_fit(3, "whatever")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int64, np.uint8])
def test_numpy_files_of_any_kind_of_number_are_read(tmp_path, dtype):
    np.save(tmp_path / "s.npy", np.array([3, 1, 2], dtype=dtype))
    assert read_scores(tmp_path / "s.npy").values.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_what_is_done_to_the_values_leaves_a_numpy_file_unchanged(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(scores, "_MAX_BYTES_IN_MEMORY", in_memory)
    np.save(tmp_path / "s.npy", VALUES)
    found = read_scores(tmp_path / "s.npy")
    assert (found.mapped is None) == (in_memory > 0)
    found.values[0] = 9.0
    assert np.array_equal(np.load(tmp_path / "s.npy"), VALUES)


def test_what_is_done_to_a_numpy_file_leaves_the_values_unchanged(tmp_path):
    file = tmp_path / "s.npy"
    np.save(file, np.arange(4000.0))
    found = read_scores(file)
    np.save(file, -np.arange(4000.0))
    assert torch.equal(found.values, torch.arange(4000, dtype=torch.float64))
    file.write_bytes(b"")  # what is mapped could no longer be read, and would end the process
    assert torch.equal(found.values, torch.arange(4000, dtype=torch.float64))
    found.check_unchanged()


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("change", ["other numbers", "cut short", "removed"])
def test_a_change_of_a_mapped_file_is_noticed(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr(scores, "_MAX_BYTES_IN_MEMORY", 0)
    write(tmp_path / "s")
    file = tmp_path / "s" / "scores.npy"
    found = read_scores(file.parent if kind == "folder" else file)
    found.check_unchanged()
    if change == "removed":
        file.unlink()
    else:
        whole = file.read_bytes()
        status = file.stat()
        file.write_bytes(whole[:-1] if change == "cut short" else whole[:-1] + b"?")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + (change != "cut short")))
    with pytest.raises(ValueError, match=r"scores.npy was changed while a run draws from it"):
        found.check_unchanged()


def test_tensors_and_parquet_columns_are_read_in_the_order_of_their_ids(tmp_path):
    assert torch.equal(read_scores(torch.from_numpy(VALUES)).values, torch.from_numpy(VALUES))
    pq.write_table(pa.table({"edu": [0.1, 0.2, 0.3]}), tmp_path / "plain.parquet")
    assert read_scores(tmp_path / "plain.parquet", "edu").values.tolist() == [0.1, 0.2, 0.3]
    pq.write_table(pa.table({"id": [2, 0, 1], "score": [0.2, 0.0, 0.1]}), tmp_path / "ids.parquet")
    assert read_scores(tmp_path / "ids.parquet").values.tolist() == [0.0, 0.1, 0.2]


def test_a_column_of_a_dataset_and_tensors_of_any_kind_are_read():
    from datasets import Dataset

    found = read_scores(Dataset.from_dict({"edu": [0.5, 1.5, -1.0]})["edu"])
    assert found.values.tolist() == [0.5, 1.5, -1.0]
    for tensor in (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0, 2.0], requires_grad=True)):
        assert read_scores(tensor).values.tolist() == [1.0, 2.0]
        assert not read_scores(tensor).values.requires_grad


def unfinished(folder):
    write(folder)
    (folder / "scores.json").unlink()


def cut_short(folder):
    write(folder)
    np.save(folder / "scores.npy", VALUES[:3])


def exchanged(folder):
    write(folder)
    np.save(folder / "scores.npy", VALUES[::-1].copy())


def of_the_future(folder):
    write(folder)
    manifest = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps({**manifest, "version": 99}))


def garbled(folder):
    write(folder)
    (folder / "scores.json").write_text("{")


def without_numbers(folder):
    write(folder)
    (folder / "scores.npy").unlink()


def with_half_the_numbers(folder):
    write(folder)
    (folder / "scores.npy").write_bytes((folder / "scores.npy").read_bytes()[:-8])


def test_an_unfinished_folder_is_refused_and_goes_on_when_the_command_is_repeated(tmp_path):
    unfinished(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="goes on"):
        read_scores(tmp_path / "s")


@pytest.mark.parametrize(
    "damage", [cut_short, exchanged, of_the_future, garbled, without_numbers, with_half_the_numbers]
)
def test_a_finished_folder_that_is_damaged_is_refused_and_must_be_deleted(tmp_path, damage):
    damage(tmp_path / "s")  # repeating the command would find it finished, and fail in the same way
    with pytest.raises((ValueError, FileNotFoundError), match=r"delete it and score the pool again"):
        read_scores(tmp_path / "s")


@pytest.mark.parametrize("written", [0, 1])
def test_a_crash_while_writing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, written):
    calls = []

    def crash(file):
        calls.append(file)
        if len(calls) > written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["scores.npy"][:written]
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path / "s")
    write(tmp_path / "s")
    assert torch.equal(read_scores(tmp_path / "s").values, torch.from_numpy(VALUES))


FULL_DISK = """
import resource, sys
import numpy as np
from liveselect.scores import write_scores
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_scores(sys.argv[1], np.arange(9000.0), "pool", {})
except OSError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "s")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert f"free space in {tmp_path / 's'}, or" in told.stderr
    assert "Traceback" not in told.stderr
    assert list((tmp_path / "s").iterdir()) == []


def test_numbers_are_written_and_not_mapped_which_a_full_disk_would_end_by_a_signal(tmp_path, monkeypatch):
    mapped_for_writing = []
    plain = np.memmap.__new__

    def noted(cls, filename, dtype=np.uint8, mode="r+", *rest, **named):
        if mode != "c":
            mapped_for_writing.append(filename)
        return plain(cls, filename, dtype, mode, *rest, **named)

    monkeypatch.setattr(np.memmap, "__new__", noted)
    write(tmp_path / "s")
    assert mapped_for_writing == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 2)), "numbers"),
        (np.float64(1.0), "numbers"),
        ([], "numbers"),
        (["high", "low"], "numbers"),
        ([[1.0], [1.0, 2.0]], "numbers"),
        ([1.0, None], "numbers"),
        ([0.0, np.nan], "1 of the 2 scores"),
        ([0.0, 1e39, -1e300, -np.inf], "2 of the scores to write are beyond .* float32"),
        ([2**24 + 1], "float32"),
    ],
    ids=str,
)
def test_what_cannot_be_read_back_is_refused_before_anything_is_written(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", values)
    assert not (tmp_path / "s").exists()


def test_what_cannot_be_told_in_the_manifest_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write(tmp_path / "s", about={"made by": object()})
    assert not (tmp_path / "s").exists()


def test_the_largest_numbers_of_float32_are_written(tmp_path):
    largest = float(np.finfo(np.float32).max)
    assert write(tmp_path / "s", [largest, -largest, -np.inf]).values.tolist() == [largest, -largest, -np.inf]


@pytest.mark.parametrize("content", [VALUES[::-1], np.zeros((2, 2)), np.float32(1), b"notes"], ids=str)
def test_a_file_of_the_same_name_is_not_written_over(tmp_path, content):
    file = tmp_path / "scores.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="another folder, or move it"):
        write(tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_left_is_removed_and_other_files_stay(tmp_path):
    for name in ("scores.npy.123.tmp", "scores.json.123.tmp", "scores.npy.mine.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.tmp",
        "scores.json",
        "scores.npy",
        "scores.npy.mine.tmp",
    ]


def test_finished_scores_are_never_written_over(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(FileExistsError, match="another folder"):
        write(tmp_path / "s")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_cannot_be_compared_are_refused(tmp_path, bad):
    values = np.array([0.0, bad, 1.0])
    with pytest.raises(ValueError, match="1 of the 3 scores"):
        read_scores(values)
    with pytest.raises(ValueError, match="-inf"):
        write(tmp_path / "s", values)


def test_files_that_hold_no_scores_are_told_apart(tmp_path):
    np.save(tmp_path / "matrix.npy", np.zeros((2, 2)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    (tmp_path / "noise.npy").write_bytes(b"not numpy")
    for name in ("empty.npy", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "scores.txt").write_text("1 2 3")
    pq.write_table(pa.table({"id": [0, 0], "score": [0.1, 0.2]}), tmp_path / "twice.parquet")
    pq.write_table(pa.table({"quality": [0.1]}), tmp_path / "other.parquet")
    np.save(tmp_path / "long.npy", np.array([1, 2], dtype=np.longdouble))
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, values=VALUES)
    pq.write_table(pa.table({"score": ["high"]}), tmp_path / "labels.parquet")
    pq.write_table(pa.table({"score": [0.1, None]}), tmp_path / "gaps.parquet")
    (tmp_path / "short.parquet").write_bytes((tmp_path / "gaps.parquet").read_bytes()[:-9])
    np.save(tmp_path / "whole.npy", np.zeros(4000))
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:9000])
    for name, message in {
        "matrix.npy": "shape",
        "words.npy": "numbers",
        "noise.npy": "cannot read",
        "empty.npy": "cannot read numbers from .*empty.npy",
        "empty.parquet": "cannot read .*empty.parquet",
        "scores.txt": "expected scores in a folder",
        "twice.parquet": "each once",
        "other.parquet": "quality",
        "labels.parquet": "numbers",
        "gaps.parquet": "1 of the 2 scores",
        "short.parquet": "cannot read",
        "short.npy": "cannot read",
        "long.npy": "at most 64 bits",
        "archive.npy": "one array as numpy.save writes it",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_scores(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="liveselect score"):
        read_scores(tmp_path / "absent")
    with pytest.raises(ValueError, match="'id', which numbers the candidates"):
        read_scores(tmp_path / "twice.parquet", "id")
    with pytest.raises(ValueError, match="empty string"):
        read_scores("")


def test_a_column_of_something_that_has_none_is_refused(tmp_path):
    np.save(tmp_path / "s.npy", VALUES)
    write_scores(tmp_path / "folder", VALUES, "p", {})
    for source in (VALUES, torch.from_numpy(VALUES), [1.0], str(tmp_path / "s.npy"), tmp_path / "folder"):
        with pytest.raises(ValueError, match=r"expected a \.parquet file where column='edu'.* leave column out"):
            read_scores(source, "edu")


def test_tensors_that_hold_no_numbers_to_take_are_refused_in_a_sentence():
    for tensor in (torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match="a dense tensor of float32"):
            read_scores(tensor)
    eighths = torch.tensor([1.0, -2.0, 0.5])
    assert read_scores(eighths.to(torch.float8_e4m3fn)).values.tolist() == [1.0, -2.0, 0.5]


def test_suffixes_in_capitals_and_the_home_folder_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with (tmp_path / "S.NPY").open("wb") as file:
        np.save(file, VALUES)
    pq.write_table(pa.table({"score": VALUES}), tmp_path / "S.PARQUET")
    for name in ("S.NPY", "S.PARQUET"):
        assert torch.equal(read_scores(f"~/{name}").values, torch.from_numpy(VALUES))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integers_keep_their_order_or_are_refused(dtype):
    limits = np.iinfo(dtype)
    largest, smallest = min(int(limits.max), 2**53), max(int(limits.min), -(2**53))
    values = [largest, largest - 1, largest - 2, smallest, smallest + 1]
    assert [int(value) for value in read_scores(np.array(values, dtype=dtype)).values.tolist()] == values
    if limits.max > 2**53:
        with pytest.raises(ValueError, match="would lose their order"):
            read_scores(np.array([2**53, 2**53 + 1], dtype=dtype))


@pytest.mark.parametrize(
    "numbers", [[1e300, -1.0], [2**60 + 1, 0]], ids=["beyond float32", "beyond float64's integers"]
)
def test_columns_of_documents_that_no_score_file_can_hold_are_refused_and_nothing_is_written(tmp_path, numbers):
    documents = {"start": [0, 4], "tokens": [4, 4], "metadata": [{"edu": number} for number in numbers]}
    pq.write_table(pa.table(documents), tmp_path / DOCUMENTS)
    store = SimpleNamespace(path=tmp_path, rows=2, block_size=4)
    with pytest.raises(ValueError, match=r"smaller scale|smaller numbers"):
        write(tmp_path / "s", column_scores(store, "edu"))
    assert not (tmp_path / "s").exists()
