import pytest
import torch
from datasketch import MinHash

from liveselect.functional.minhash import agreement, minhash, near_duplicates


def shingles(row, width):
    return {tuple(row[i : i + width]) for i in range(len(row) - width + 1)}


def test_signatures_agree_as_often_as_rows_have_ngrams_in_common_and_as_another_library_says():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 500, (40, 120), generator=generator)
    other = rows.clone()
    for i, row in enumerate(other):
        row[2 * i :] = torch.randint(0, 500, (120 - 2 * i,), generator=generator)
    mine = agreement(minhash(rows, permutations=256, width=3), minhash(other, permutations=256, width=3))
    exact, theirs = [], []
    for a, b in zip(rows.tolist(), other.tolist(), strict=True):
        first, second = shingles(a, 3), shingles(b, 3)
        exact.append(len(first & second) / len(first | second))
        sketches = [MinHash(num_perm=256, seed=1) for _ in range(2)]
        for sketch, grams in zip(sketches, (first, second), strict=True):
            sketch.update_batch([str(gram).encode() for gram in grams])
        theirs.append(sketches[0].jaccard(sketches[1]))
    exact, theirs = torch.tensor(exact), torch.tensor(theirs)
    assert (mine - exact).abs().max() < 4 * 0.5 / 256**0.5  # standard deviations
    assert (mine - exact).pow(2).mean() < 2 * (theirs - exact).pow(2).mean()


def test_what_the_mask_hides_does_not_count_and_signatures_do_not_change_with_the_batch():
    row = torch.tensor([[5, 6, 7, 8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert torch.equal(minhash(row, mask, width=3), minhash(row[:, :5], width=3))
    rows = torch.randint(0, 50, (9, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(minhash(rows), torch.cat([minhash(part) for part in rows.split(2)]))


def test_chains_are_dropped_but_for_their_first_row():
    signatures = torch.arange(32, dtype=torch.int32).repeat(4, 1)
    signatures[1, :4] += 100
    signatures[2, :6] += 100  # as far from the first row as 6 places, from the second as 2
    signatures[3, :6] += 200
    assert near_duplicates(signatures, threshold=0.8, bands=8).tolist() == [False, True, True, True]
    assert near_duplicates(signatures, threshold=0.85, bands=8).tolist() == [False, True, True, False]
    assert near_duplicates(signatures[[0, 2, 3]], threshold=0.85, bands=8).tolist() == [False, False, False]


def test_bands_that_do_not_divide_the_signature_are_refused():
    with pytest.raises(ValueError, match="divides 10"):
        near_duplicates(torch.zeros(2, 10, dtype=torch.int32), bands=3)
