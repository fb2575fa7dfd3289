"""Per-example losses of causal language models."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.protocols import IGNORE_INDEX, Batch


def shifted_targets(batch: Batch) -> Tensor:
    """Return the target of every position but the last, ``(B, T - 1)``, -100 where no loss is taken."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels[:, 1:]


def target_counts(batch: Batch) -> Tensor:
    """Return how many tokens of each example carry loss, ``(B,)`` int64."""
    return (shifted_targets(batch) != IGNORE_INDEX).sum(dim=1)


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token cross-entropy of each example, ``(B,)`` float32, nats per token.

    Understands Hugging Face causal language models, modules that return logits ``(B, T, V)`` (bare, as the first
    element of a tuple, or under ``logits``), and wrappers, such as a LightningModule, whose ``forward`` is one of these
    or that hold exactly one such model. Where the model can restrict its output head to given positions
    (``logits_to_keep``), only positions that carry loss are computed. An example without any target has loss 0.

    Raises:
        TypeError: the module cannot be called with token ids, or returns no logits; pass a ``loss_fn``.
    """
    targets = shifted_targets(batch)
    counted = targets != IGNORE_INDEX
    network = find_language_model(model)
    parameters = inspect.signature(network.forward).parameters
    optional: dict[str, Any] = {
        key: batch[key] for key in ("attention_mask", "position_ids") if key in batch and key in parameters
    }
    if "use_cache" in parameters:
        optional["use_cache"] = False
    columns = counted.any(dim=0).nonzero().flatten()
    if "logits_to_keep" in parameters and 0 < len(columns) < targets.shape[1]:
        logits = _logits(network(batch["input_ids"], logits_to_keep=columns, **optional), network)
        targets, counted = targets[:, columns], counted[:, columns]
    else:
        logits = _logits(network(batch["input_ids"], **optional), network)[:, : targets.shape[1]]
    # float32 before the softmax: the differences that selection looks at are lost in bfloat16
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def find_language_model(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to logits: ``model`` itself, or the one that it wraps."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module that carries the signature
    if _has_forward(model):
        return model
    inner = [found for child in model.children() if "forward" in dir(child) and _is_language_model(found := _peel(child))]
    if len(inner) == 1:
        return inner[0]
    raise TypeError(
        f"cannot tell how to get logits from {type(model).__name__}: it defines no forward(input_ids) and holds "
        f"{len(inner)} Hugging Face language models. Define forward, or pass loss_fn=(model, batch) -> (B,) losses"
    )


def _peel(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _has_forward(model: nn.Module) -> bool:
    # LightningModule.forward only calls nn.Module's, which raises: neither counts as defined
    return type(model).forward.__qualname__ not in {"LightningModule.forward", "_forward_unimplemented"}


def _is_language_model(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "get_output_embeddings")


def _logits(output: Any, network: nn.Module) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 3:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"expected {type(network).__name__} to return logits (B, T, V) or an output with .logits, got {got}; "
            "pass loss_fn=(model, batch) -> (B,) losses"
        )
    return output


def reference_loss(losses: list[Tensor], counts: list[Tensor]) -> float:
    """Return the token-weighted mean of per-example mean losses, each list holding ``(B,)`` tensors; nats per token.

    Sums in float64: candidates differ by a thousandth of the loss.
    """
    total = sum(float((loss.double() * count).sum()) for loss, count in zip(losses, counts, strict=True))
    return total / max(1, int(sum(int(count.sum()) for count in counts)))


