"""The reference set on the device, arranged so that one pass over it costs little."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from liveselect.functional.flops import forward_flops
from liveselect.losses import at_targets, causal_lm_loss, reference_loss, target_counts
from liveselect.protocols import IGNORE_INDEX, Batch, RoundContext

Precision = Literal["float32", "training"]

_PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE_INDEX}


@dataclass(frozen=True)
class ReferenceSet:
    """The batches of the reference set, on the model's device.

    Attributes:
        batches: what the loss is computed on.
        counts: for each batch ``(B,)`` int64 on CPU, how many tokens of each example carry loss.
        tokens: positions that the model reads in one pass, padding included.
    """

    batches: list[Batch]
    counts: list[Tensor]
    tokens: int

    @classmethod
    def load(cls, context: RoundContext) -> "ReferenceSet":
        """Fetch the reference set once.

        For :func:`causal_lm_loss` rows are cut after their last target and grouped with rows of like length, which
        changes no loss: nothing to the right of a target is seen by it. Any other loss gets the source's own batches.

        Raises:
            ValueError: no token of the reference set carries loss.
        """
        batches = list(context.source.reference())
        if context.loss_fn is causal_lm_loss:
            batches = [at_targets(batch) for batch in group_by_length(batches)]
        counts = [target_counts(batch).cpu() for batch in batches]
        if not sum(int(count.sum()) for count in counts):
            raise ValueError(
                f"no token of the reference set carries loss ({len(batches)} batches): expected labels other than "
                f"{IGNORE_INDEX} beyond the first column. Check how the reference set is prepared and masked"
            )
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return cls([context.to_device(batch) for batch in batches], counts, tokens)

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
        training does.
        """
        torch.clear_autocast_cache()  # casts of the weights made before the last step would be used again
        full = torch.autocast(context.device.type, enabled=False)
        with full if precision == "float32" else context.forward_context():
            losses = [context.loss_fn(context.model, batch) for batch in self.batches]
        context.meter.add_flops(forward_flops(context.model, self.tokens))
        return reference_loss(losses, self.counts)


def group_by_length(batches: list[Batch]) -> list[Batch]:
    """Return the rows of all batches cut after their last target, longest first, in batches of like length.

    No batch holds more tokens than the largest one given. Rows without targets are left out, and of the keys only those
    that :func:`causal_lm_loss` reads are kept.
    """
    keys = [key for key in _PADDING if key == "labels" or any(key in batch for batch in batches)]
    if any(key not in batch or batch[key].dim() != 2 for batch in batches for key in keys if key != "labels"):
        return batches
    room = max((batch["input_ids"].numel() for batch in batches), default=0)
    rows = [row for batch in batches for row in _rows_to_last_target(batch, keys)]
    rows.sort(key=_length, reverse=True)
    groups: list[list[dict[str, Tensor]]] = []
    for row in rows:
        if not groups or (len(groups[-1]) + 1) * _length(groups[-1][0]) > room:
            groups.append([])
        groups[-1].append(row)
    return [_stack(group, keys) for group in groups]


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
