"""A batch that comes from a worker is the batch that was made there."""

import pytest
import torch
from torch.utils.data import DataLoader

from liveselect.datamodules.rows.transport import Compact, receive, send
from liveselect.grammar import IGNORE_INDEX


def batch_of(tokens, labels=None):
    tokens = torch.tensor(tokens)
    return {
        "id": torch.arange(len(tokens)) + 2**40,
        "input_ids": tokens,
        "labels": tokens.clone() if labels is None else torch.tensor(labels),
    }


BATCHES = {
    "small ids": batch_of([[0, 65535], [7, 8]]),
    "large ids": batch_of([[0, 65536], [2**31 - 1, 8]]),
    "negative ids": batch_of([[0, -1]]),
    "labels of their own": batch_of([[5, 6, 7]], [[IGNORE_INDEX, 6, IGNORE_INDEX]]),
    "empty rows": batch_of([[], []]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_arrives_as_it_was_sent(name, workers):
    batch = BATCHES[name]
    loader = DataLoader([batch], batch_size=None, collate_fn=send, num_workers=workers)
    (sent,) = loader
    assert isinstance(sent, Compact) == (workers == 1)
    arrived = receive(sent)
    assert arrived.keys() == batch.keys()
    for key, tensor in batch.items():
        assert torch.equal(arrived[key], tensor)
        assert arrived[key].dtype == tensor.dtype or not tensor.numel()
    assert not arrived["labels"].numel() or arrived["labels"].data_ptr() != arrived["input_ids"].data_ptr()
