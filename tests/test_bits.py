"""The checksum of a live model sees every change of one value."""

import pytest
import torch
from torch import nn

from liveselect.preserve import bit_sum


class Holder(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("tensor", tensor)


def sum_of(tensor: torch.Tensor) -> int:
    module = Holder(tensor)
    return bit_sum(module, torch.optim.SGD(module.parameters(), lr=0.1))


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_change_of_any_single_value_is_seen_wherever_it_lies(dtype, size, offset):
    storage = torch.zeros(size + offset, dtype=dtype)
    before = sum_of(storage[offset:])
    for index in range(size):
        changed = storage.clone()
        changed[offset + index] = 1
        assert sum_of(changed[offset:]) != before


def test_the_smallest_change_of_a_value_is_seen():
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for index in (0, 1, 500, 1000):
        changed = values.clone()
        changed[index] = torch.nextafter(values[index], torch.tensor(9.0))
        assert sum_of(changed) != sum_of(values)


def test_the_sum_does_not_depend_on_how_a_tensor_lies_in_memory():
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert sum_of(values.t().contiguous().t()) == sum_of(values)
    for offset in (1, 2):
        shifted = torch.cat([torch.zeros(offset), values.flatten()])[offset:].view(6, 8)
        assert sum_of(shifted) == sum_of(values)
