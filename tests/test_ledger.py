import io
import json
import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from liveselect.ledger import Example, Histogram, Ledger, RoundRecord


def ledger() -> Ledger:
    book = Ledger(about={"preset": "MATES"}, training_seconds=9.0, training_flops=4.0)
    book.rounds.append(
        RoundRecord(
            round=0,
            step=10,
            selector="UniformSelector",
            candidates=5,
            chosen=2,
            plan="ab",
            measured=[1],
            influence=[0.25],
            groups={"web": {"available": 5, "measured": 1, "chosen": 2}},
            histogram=Histogram.of(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([False, True, True]), bins=2),
            examples=[Example(1, "web", None, True, 'two\nlines "quoted" é')],
            metrics={"regressor/spearman": 0.5},
            seconds={"probe": 0.75, "choose": 0.25},
            flops={"probe": 3.0},
            notes=["a note"],
        )
    )
    book.evaluate(10, {"val_loss": 2.5})
    return book


def test_a_ledger_comes_back_from_its_file_and_from_a_checkpoint(tmp_path):
    book = ledger()
    book.write(tmp_path / "deep" / "ledger.jsonl")
    assert Ledger.read(tmp_path / "deep" / "ledger.jsonl") == book
    file = io.BytesIO()
    torch.save(book.state_dict(), file)
    file.seek(0)
    restored = Ledger()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored == book


def test_a_ledger_that_grows_adds_to_its_file_what_is_new(tmp_path):
    path, book = tmp_path / "ledger.jsonl", ledger()
    book.write(path)
    sizes = [path.stat().st_size]
    inode = path.stat().st_ino
    for index in range(1, 30):
        book.rounds[-1].overheard.append(index)  # the round that is trained on still listens
        book.rounds.append(replace(ledger().rounds[0], round=index))
        book.training_seconds += 1.0
        if index % 3 == 0:
            book.evaluate(10 * index, {"val_loss": 1 / index})
        book.write(path)
        assert Ledger.read(path) == book
        sizes.append(path.stat().st_size)
    assert path.stat().st_ino == inode  # never replaced
    assert max(b - a for a, b in pairwise(sizes)) < 3 * sizes[0]
    book.finished = True
    book.write(path)
    assert Ledger.read(path) == book
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["run", *["round"] * 30, *["evaluation"] * 10]


@pytest.mark.parametrize("change", ["shorter", "restored", "replaced", "gone", "elsewhere"])
def test_a_file_that_is_not_the_beginning_of_the_ledger_is_replaced(tmp_path, change):
    path, book = tmp_path / "ledger.jsonl", ledger()
    book.rounds.append(replace(book.rounds[0], round=1))
    book.write(path)
    if change == "shorter":
        book.rounds.pop()
    elif change == "restored":
        book.load_state_dict(replace_text(book.state_dict(), "a note", "another"))
    elif change == "replaced":
        path.write_text("somebody else's")
    elif change == "gone":
        path.unlink()
    else:
        path = tmp_path / "other.jsonl"
    book.write(path)
    assert Ledger.read(path) == book
    assert len(path.read_text().splitlines()) == 2 + len(book.rounds)


def replace_text(state, old, new):
    return json.loads(json.dumps(state).replace(old, new))


def test_a_line_that_is_being_written_is_left_out_and_one_in_the_middle_is_not(tmp_path):
    path, book = tmp_path / "ledger.jsonl", ledger()
    book.finished = True
    book.write(path)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    found = Ledger.read(path)
    assert found.rounds == book.rounds
    assert found.evaluations == []
    assert found.finished is False  # it says less than the run did
    note = data.index("é".encode())
    path.write_bytes(data[: note + 1])  # in the middle of a letter
    assert Ledger.read(path).rounds == []
    first, second, *others = data.decode().splitlines(keepends=True)
    path.write_text(first + second[:-9] + "\n" + "".join(others))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        Ledger.read(path)


def test_a_disk_that_fills_while_lines_are_added_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, book = tmp_path / "ledger.jsonl", ledger()
    book.write(path)
    before = path.read_bytes()
    book.evaluate(20, {"val_loss": 2.0})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            book.write(path)
    assert path.read_bytes() == before
    book.write(path)
    assert Ledger.read(path) == book


def test_costs_add_up():
    book = ledger()
    assert book.selection_seconds == 1.0
    assert book.selection_share == pytest.approx(0.1)
    entry = book.evaluations[0]
    assert (entry.training_seconds, entry.selection_seconds, entry.selection_flops) == (9.0, 1.0, 3.0)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger().write(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Ledger().write(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("text", ["", "not json\n", '{"kind": "round"}\n', "[1]\n"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="is not a ledger"):
        Ledger.read(tmp_path / "x")


def test_a_histogram_counts_every_finite_score_once():
    scores = torch.tensor([0.0, 1.0, 2.0, float("nan"), float("inf"), 2.0])
    chosen = torch.tensor([True, False, True, True, True, False])
    histogram = Histogram.of(scores, chosen, bins=4)
    assert sum(histogram.counts) == 4
    assert sum(histogram.chosen) == 2
    assert sum(Histogram.of(torch.ones(3), torch.ones(3, dtype=torch.bool)).counts) == 3
    assert sum(Histogram.of(torch.full((2,), float("nan")), torch.ones(2, dtype=torch.bool)).counts) == 0


def heard(rounds: int, examples: int) -> Ledger:
    book = Ledger(run_id="a")
    for index in range(rounds):
        ids = list(range(examples))
        book.rounds.append(
            replace(ledger().rounds[0], round=index, overheard=ids, overheard_influence=[0.5] * examples)
        )
    return book


def saved_bytes(book: Ledger) -> int:
    file = io.BytesIO()
    torch.save(book.state_dict(), file)
    return len(file.getvalue())


def test_what_training_steps_showed_in_rounds_that_are_over_stays_out_of_checkpoints(tmp_path):
    grown = saved_bytes(heard(21, 5000)) - saved_bytes(heard(1, 5000))
    assert grown < 20 * 2 * saved_bytes(heard(1, 0))
    whole = heard(3, 100)
    whole.write(tmp_path / "ledger.jsonl")
    file = tmp_path / "state.pt"
    torch.save(whole.state_dict(), file)
    resumed = Ledger()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [record.captured for record in resumed.rounds] == [100, 100, 100]
    assert (resumed.rounds[0].overheard, resumed.rounds[0].overheard_mean) == ([], 0.5)
    assert resumed.rounds[2] == whole.rounds[2]  # the one that may still be trained on
    resumed.recall([tmp_path / "none.jsonl", tmp_path / "ledger.jsonl"])
    assert resumed == whole
    other = Ledger()
    other.load_state_dict(torch.load(file, weights_only=True))
    other.run_id = "b"
    other.recall([tmp_path / "ledger.jsonl"])  # of another run
    assert other.rounds[0].overheard == []
    other.write(tmp_path / "other.jsonl")
    assert Ledger.read(tmp_path / "other.jsonl") == other
