"""The tokens and the labels that a Fisher matrix is taken over."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.grammar import IGNORE_INDEX, Batch
from liveselect.losses import TARGET_COLUMNS, at_targets, shifted_targets, target_logits

Labels = Literal["empirical", "sampled"]


def active_tokens(batch: Batch) -> Tensor:
    """Return the tokens on which some loss of their example may depend, ``(B, T)`` bool on CPU.

    These are the tokens left of the example's last target that the attention mask shows: however far a batch is
    padded, they are the same.
    """
    carries = (shifted_targets(batch) != IGNORE_INDEX).cpu()
    active = F.pad(carries.flip(1).cummax(dim=1).values.flip(1), (0, 1))
    mask = batch.get("attention_mask")
    return active if mask is None or mask.dim() != 2 else active & (mask.cpu() != 0)


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the batch with every target drawn from the model's own predictions; inputs stay as they are.

    Gradients of the loss on such labels have the true Fisher matrix of the model as second moment, where the texts' own
    labels give the empirical one (Kunstner et al. 2019, arXiv 1905.12558).

    Args:
        model: a causal language model in evaluation mode.
        batch: examples.
        generator: on CPU; draws by inverting the distribution function, so that all devices draw alike.
    """
    prepared = at_targets(batch)
    logits, targets = target_logits(model, prepared)
    heights = logits.double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(*targets.shape, 1, generator=generator, dtype=torch.float64).to(heights.device)
    sampled = torch.searchsorted(heights, drawn * heights[..., -1:], right=True).squeeze(-1)
    sampled = sampled.clamp(max=logits.shape[-1] - 1)
    labels = torch.full_like(prepared["input_ids"], IGNORE_INDEX)
    columns = prepared[TARGET_COLUMNS] + 1
    kept = targets != IGNORE_INDEX
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    labels[rows[kept], columns[kept]] = sampled[kept]
    return {**prepared, "labels": labels}
