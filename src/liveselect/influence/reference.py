"""The loss over the reference set, arranged so that one pass costs little."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.flops import forward_flops
from liveselect.functional.sharding import is_sharded, reshard
from liveselect.losses import (
    TARGET_COLUMNS,
    at_targets,
    causal_lm_loss,
    output_head,
    reference_loss,
    target_counts,
)
from liveselect.protocols import IGNORE_INDEX, Batch, RoundContext

Precision = Literal["float32", "training"]

_WORTH_A_BATCH = 2048  # positions; smaller batches leave an accelerator idle
_ALIKE = 0.8  # rows this much shorter than the longest of their batch are better served by the next one
_PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE_INDEX}


@dataclass(frozen=True)
class ReferencePass:
    """The batches of the reference set, on the model's device.

    Attributes:
        batches: what the loss is computed on.
        counts: for each batch ``(B,)`` int64 on CPU, how many tokens of each example carry loss.
        tokens: positions that the model reads in one pass, padding included.
        flops: floating point operations of one pass.
    """

    batches: list[Batch]
    counts: list[Tensor]
    tokens: int
    flops: float

    @classmethod
    def load(cls, context: RoundContext) -> "ReferencePass":
        """Fetch the reference set once.

        For :func:`causal_lm_loss` rows are cut after their last target and grouped with rows of like length, which
        changes no loss: nothing to the right of a target is seen by it. Any other loss gets the source's own batches.

        Raises:
            ValueError: no token of the reference set carries loss.
        """
        batches = list(context.source.reference())
        if getattr(context.loss_fn, "loss_fn", context.loss_fn) is causal_lm_loss:
            batches = [at_targets(batch) for batch in group_by_length(batches)]
        counts = [target_counts(batch).cpu() for batch in batches]
        if not sum(int(count.sum()) for count in counts):
            raise ValueError(
                f"no token of the reference set carries loss ({len(batches)} batches): expected labels other than "
                f"{IGNORE_INDEX} beyond the first column. Check how the reference set is prepared and masked"
            )
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        flops = sum(batch_flops(context.model, batch) for batch in batches)
        return cls([context.to_device(batch) for batch in batches], counts, tokens, flops)

    @property
    def examples(self) -> int:
        """Number of reference examples."""
        return sum(len(count) for count in self.counts)

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return sum(int(count.sum()) for count in self.counts)

    @torch.no_grad()  # not inference_mode: tensors that a model caches in it cannot be used in training
    def loss(self, context: RoundContext, precision: Precision = "float32") -> float:
        """Return the mean loss over all reference tokens, nats per token, and charge its FLOPs to the meter.

        ``float32`` switches autocast off and computes in the precision of the parameters; ``training`` computes as
        training does. For a sharded model it is a collective: ranks share out the batches, and all get the same loss.
        """
        torch.clear_autocast_cache()  # casts of the weights made before the last step would be used again
        full = torch.autocast(context.device.type, enabled=False)
        with full if precision == "float32" else context.forward_context():
            if is_sharded(context.model):
                return self._shared_out(context)
            losses = [context.loss_fn(context.model, batch) for batch in self.batches]
        context.meter.add_flops(self.flops)
        return reference_loss(losses, self.counts)

    def _shared_out(self, context: RoundContext) -> float:
        losses, counts = [], []
        for (batch, count), own in distributed.even_share(list(zip(self.batches, self.counts, strict=True))):
            losses.append(context.loss_fn(context.model, batch).cpu().double())
            counts.append(count.double() * own)
            context.meter.add_flops(batch_flops(context.model, batch))
        reshard(context.model)  # a step on the shards comes next
        summed = torch.cat(losses) @ torch.cat(counts)
        total, tokens = distributed.sum_over_ranks(torch.stack([summed, torch.cat(counts).sum()])).tolist()
        return float(total / max(1.0, tokens))


def batch_flops(model: nn.Module, batch: Batch) -> float:
    """Return the FLOPs of one forward over a batch; a head that is told where the targets are computes only those."""
    rows, width = batch["input_ids"].shape
    wanted = batch[TARGET_COLUMNS].shape[1] if TARGET_COLUMNS in batch else width
    head = output_head(model) if wanted < width - 1 else None
    return forward_flops(model, rows * width) - (forward_flops(head, rows * (width - wanted)) if head else 0.0)


def group_by_length(batches: list[Batch]) -> list[Batch]:
    """Return the rows of all batches cut after their last target, longest first, in batches of like length.

    No batch holds more tokens than the largest one given. Rows without targets are left out, and of the keys only those
    that :func:`causal_lm_loss` reads are kept. A mask that hides nothing to the left of a target is dropped, because
    attention is faster without one.
    """
    keys = [key for key in _PADDING if key == "labels" or any(key in batch for batch in batches)]
    if any(key not in batch or batch[key].dim() != 2 for batch in batches for key in keys if key != "labels"):
        return batches
    room = max((batch["input_ids"].numel() for batch in batches), default=0)
    rows = [row for batch in batches for row in _rows_to_last_target(batch, keys)]
    if all(bool(row["attention_mask"].all()) for row in rows if "attention_mask" in row):
        keys = [key for key in keys if key != "attention_mask"]
    rows.sort(key=_length, reverse=True)
    groups: list[list[dict[str, Tensor]]] = []
    for row in rows:
        if not groups or _is_complete(groups[-1], _length(row), room):
            groups.append([])
        groups[-1].append(row)
    return [_stack(group, keys) for group in groups]


def _is_complete(group: list[dict[str, Tensor]], next_length: int, room: int) -> bool:
    """Whether the next row begins a new group: there is no room, or much padding and enough rows without it."""
    width = _length(group[0])
    full = (len(group) + 1) * width > room
    return full or (len(group) * width >= _WORTH_A_BATCH and next_length < _ALIKE * width)


def _rows_to_last_target(batch: Batch, keys: list[str]) -> list[dict[str, Tensor]]:
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    carries = labels != IGNORE_INDEX
    carries[:, 0] = False  # nothing predicts the first token
    ends = (carries * torch.arange(labels.shape[1], device=labels.device)).argmax(dim=1) + 1
    tensors = {**batch, "labels": labels}
    return [
        {key: tensors[key][index, :end] for key in keys}
        for index, (end, any_target) in enumerate(zip(ends.tolist(), carries.any(dim=1).tolist(), strict=True))
        if any_target
    ]


def _length(row: dict[str, Tensor]) -> int:
    return len(row["input_ids"])


def _stack(rows: list[dict[str, Tensor]], keys: list[str]) -> dict[str, Any]:
    width = _length(rows[0])
    return {
        key: torch.stack([F.pad(row[key], (0, width - len(row[key])), value=_PADDING[key]) for row in rows])
        for key in keys
    }
