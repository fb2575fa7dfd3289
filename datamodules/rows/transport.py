"""Token batches on their way from worker processes: small and without labels that repeat the tokens.

A worker hands a tensor over through shared memory, which has to be opened, mapped and paged in for every tensor: for
64 blocks of 1024 tokens that takes longer than to read them. As 16-bit numbers through a pipe they arrive in a tenth of
the time, and become tensors where they are needed.
"""

from typing import NamedTuple, cast

import numpy as np
import torch

from liveselect.grammar import Batch


class Compact(NamedTuple):
    """A batch of token rows on its way.

    Attributes:
        ids: ids of the rows.
        input_ids: ``(B, T)`` in the smallest type that holds them.
        labels: ``(B, T)`` int32, or None where they equal the tokens.
    """

    ids: list[int]
    input_ids: np.ndarray
    labels: np.ndarray | None


def send(batch: Batch) -> Batch | Compact:
    """Return a batch ``id (B,)``, ``input_ids (B, T)``, ``labels (B, T)``, in a worker process in its compact form."""
    if torch.utils.data.get_worker_info() is None:
        return batch
    tokens = batch["input_ids"].numpy()
    small = tokens.size == 0 or (tokens.min() >= 0 and tokens.max() <= np.iinfo(np.uint16).max)
    same = torch.equal(batch["input_ids"], batch["labels"])
    labels = None if same else batch["labels"].numpy().astype(np.int32)
    return Compact(batch["id"].tolist(), tokens.astype(np.uint16 if small else np.int32), labels)


def receive(batch: object) -> Batch:
    """Return the batch that :func:`send` was given, as int64 tensors."""
    if not isinstance(batch, Compact):
        return cast("Batch", batch)
    tokens = torch.from_numpy(batch.input_ids.astype(np.int64))
    labels = tokens.clone() if batch.labels is None else torch.from_numpy(batch.labels.astype(np.int64))
    return {"id": torch.tensor(batch.ids, dtype=torch.int64), "input_ids": tokens, "labels": labels}
