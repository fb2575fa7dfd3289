import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveselect.regressors.chunks import even_chunks, length_groups, mean_over_tokens


def texts_of(lengths):
    return [torch.arange(1, n + 1) + 100 * i for i, n in enumerate(lengths)]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 16))
def test_chunks_hold_every_token_once_in_order_and_no_row_is_empty(lengths, longest):
    texts = texts_of(lengths)
    input_ids, mask = even_chunks(texts, longest)
    assert input_ids.shape == mask.shape
    assert mask.any(dim=-1).all()
    assert mask.shape[1] <= longest
    assert input_ids[mask].tolist() == [token for text in texts for token in text.tolist()]
    row = 0
    for length in lengths:
        chunks = -(-length // longest)  # as few as possible
        sizes = mask[row : row + chunks].sum(1)
        assert int(sizes.sum()) == length
        assert len(sizes) == 0 or sizes.max() - sizes.min() <= 1
        row += chunks
    assert row == len(mask)


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 16), st.integers(1, 64))
def test_groups_partition_the_texts_and_stay_within_the_budget(lengths, longest, budget):
    groups = length_groups(lengths, longest, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = even_chunks(texts_of([lengths[i] for i in group]), longest)[0].numel()
        assert padded <= budget or len(group) == 1


def test_grouping_by_length_pads_less_than_the_order_given():
    lengths = torch.randint(1, 64, (200,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(groups):
        return sum(even_chunks(texts_of([lengths[i] for i in group]), 64)[0].numel() for group in groups)

    grouped = padded(length_groups(lengths, 64, 512))
    assert grouped < 1.2 * sum(lengths)
    assert grouped < 0.8 * padded([list(range(i, i + 8)) for i in range(0, 200, 8)])


@pytest.mark.parametrize("lengths", [[3], [3, 9, 0, 20], [0, 0], [16, 17]])
def test_pooling_is_the_mean_over_the_unpadded_text_in_value_and_gradient(lengths):
    texts = texts_of(lengths)
    input_ids, mask = even_chunks(texts, 8)
    table = torch.randn(400 + 30 * len(lengths), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = table[input_ids]
    hidden[~mask] = 1e30  # whatever stands at padding
    hidden.requires_grad_()
    pooled = mean_over_tokens(hidden, mask, torch.tensor(lengths))
    expected = torch.stack(
        [table[text].mean(0) if len(text) else torch.zeros(5, dtype=torch.float64) for text in texts]
    )
    assert torch.allclose(pooled, expected, rtol=1e-12)
    if len(input_ids):
        (gradient,) = torch.autograd.grad(pooled.sum(), hidden)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()
        shares = torch.cat([torch.full((length,), 1.0 / max(1, length)).double() for length in lengths])
        assert torch.allclose(gradient[mask], shares.unsqueeze(1))
