import pytest
import torch

from liveselect.functional.bands import band_edges, band_order


@pytest.mark.parametrize(
    ("band", "order"), [("low", (0, 1, 2)), ("middle", (1, 0, 2)), ("high", (2, 1, 0))], ids=["low", "middle", "high"]
)
def test_nine_losses_fall_into_bands_of_two_three_and_four_in_the_published_order(band, order):
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    thirds = [{0, 1}, {2, 3, 4}, {5, 6, 7, 8}]
    by_loss = band_order(torch.arange(9.0), band)
    found = [set((by_loss == value).nonzero()[:, 0].tolist()) for value in (2, 1, 0)]
    assert found == [thirds[place] for place in order]
    assert torch.equal(band_order(torch.arange(9.0)[shuffled], band), by_loss[shuffled])


def test_the_published_cuts_of_a_large_pool():
    losses = torch.arange(270_679.0)
    assert band_edges(losses) == (90_136.0, 180_272.0)


def test_candidates_without_a_loss_are_in_no_band():
    scores = band_order(torch.tensor([1.0, torch.inf, 2.0, 3.0]), "low")
    assert scores[1] == -torch.inf
    assert scores[[0, 2, 3]].isfinite().all()
