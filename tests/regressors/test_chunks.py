import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveselect.regressors.chunks import chunk, length_groups
from liveselect.regressors.encoder_model import mean_over_tokens


def texts_of(lengths):
    return [torch.arange(1, n + 1) + 100 * i for i, n in enumerate(lengths)]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 16))
def test_chunks_hold_every_token_once_in_order_and_no_row_is_empty(lengths, longest):
    texts = texts_of(lengths)
    chunks = chunk(texts, longest)
    assert chunks.texts == len(texts)
    assert chunks.mask.any(dim=-1).all()
    assert chunks.mask.shape[1] <= longest
    for i, text in enumerate(texts):
        rows = chunks.owner == i
        assert chunks.input_ids[rows][chunks.mask[rows]].tolist() == text.tolist()
        assert int(rows.sum()) == -(-len(text) // longest)  # as few as possible
        sizes = chunks.mask[rows].sum(1)
        assert len(sizes) == 0 or sizes.max() - sizes.min() <= 1


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 16), st.integers(1, 64))
def test_groups_partition_the_texts_and_stay_within_the_budget(lengths, longest, budget):
    groups = length_groups(lengths, longest, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = chunk(texts_of([lengths[i] for i in group]), longest).input_ids.numel()
        assert padded <= budget or len(group) == 1


def test_grouping_by_length_pads_less_than_the_order_given():
    lengths = torch.randint(1, 64, (200,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(groups):
        return sum(chunk(texts_of([lengths[i] for i in group]), 64).input_ids.numel() for group in groups)

    grouped = padded(length_groups(lengths, 64, 512))
    assert grouped < 1.2 * sum(lengths)
    assert grouped < 0.8 * padded([list(range(i, i + 8)) for i in range(0, 200, 8)])


@pytest.mark.parametrize("lengths", [[3], [3, 9, 0, 20], [0, 0], [16, 17]])
def test_pooling_is_the_mean_over_the_unpadded_text_in_value_and_gradient(lengths):
    texts = texts_of(lengths)
    chunks = chunk(texts, 8)
    table = torch.randn(400 + 30 * len(lengths), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = table[chunks.input_ids]
    hidden[~chunks.mask] = 1e30  # whatever stands at padding
    hidden.requires_grad_()
    pooled = mean_over_tokens(hidden, chunks)
    expected = torch.stack(
        [table[text].mean(0) if len(text) else torch.zeros(5, dtype=torch.float64) for text in texts]
    )
    assert torch.allclose(pooled, expected, rtol=1e-12)
    if len(chunks.input_ids):
        (gradient,) = torch.autograd.grad(pooled.sum(), hidden)
        assert gradient.isfinite().all()
        assert not gradient[~chunks.mask].any()
        for i, text in enumerate(texts):
            mine = chunks.owner == i
            assert torch.allclose(gradient[mine][chunks.mask[mine]], torch.tensor(1.0 / max(1, len(text))).double())
