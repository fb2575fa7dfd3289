"""What is near an earlier row is dropped, in chains too, and clusters only leave out comparisons."""

import torch

from liveselect.functional.near_vectors import near_an_earlier, near_vectors


def test_a_chain_is_dropped_but_for_its_first():
    cosines = torch.tensor([[1.0, 0.99, 0.5], [0.99, 1.0, 0.99], [0.5, 0.99, 1.0]])
    assert near_an_earlier(cosines, 0.95).tolist() == [False, True, True]  # the example of SemDeDup
    angles = torch.tensor([0.0, 10.0, 20.0, 90.0, 30.0]).deg2rad()
    units = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert near_vectors(units, float(torch.tensor(15.0).deg2rad().cos())).tolist() == [False, True, True, False, True]


def test_blocks_and_clusters_find_what_a_comparison_of_all_finds():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1500, 32, generator=generator)
    rows[1100:1200] = rows[:100] + 0.05 * torch.randn(100, 32, generator=generator)
    units = rows / rows.norm(dim=1, keepdim=True)
    expected = ((units @ units.T).tril(-1) > 0.95).any(dim=1)
    assert expected.nonzero()[:, 0].tolist() == list(range(1100, 1200))
    assert torch.equal(near_vectors(units, 0.95), expected)
    clustered = near_vectors(units, 0.95, clusters=4)
    assert not bool((clustered & ~expected).any())
    assert int(clustered.sum()) > 80  # but for pairs at the borders
