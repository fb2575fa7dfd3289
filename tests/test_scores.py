"""Score files: what is written is read, what does not fit is refused, and nothing half-written passes for whole."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from liveselect import scores
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
    monkeypatch.setattr(scores, "_CHUNK", 4)
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


def test_a_large_numpy_file_is_mapped_and_not_changed(tmp_path):
    np.save(tmp_path / "s.npy", VALUES)
    read_scores(tmp_path / "s.npy").values[0] = 9.0
    assert np.array_equal(np.load(tmp_path / "s.npy"), VALUES)


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


@pytest.mark.parametrize("damage", [unfinished, cut_short, exchanged, of_the_future, garbled])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, damage):
    damage(tmp_path / "s")
    with pytest.raises((ValueError, FileNotFoundError), match=r"again|goes on"):
        read_scores(tmp_path / "s")


@pytest.mark.parametrize("moment", ["_digest", "_replace"])
def test_a_crash_while_writing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, moment):
    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(scores, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path / "s")
    write(tmp_path / "s")
    assert torch.equal(read_scores(tmp_path / "s").values, torch.from_numpy(VALUES))


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
    }.items():
        with pytest.raises(ValueError, match=message):
            read_scores(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="liveselect score"):
        read_scores(tmp_path / "absent")
