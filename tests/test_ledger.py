import io
import os

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
