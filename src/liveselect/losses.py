"""Per-example losses of causal language models."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.protocols import IGNORE_INDEX, Batch

TARGET_COLUMNS = "target_columns"
"""Key of what :func:`at_targets` adds: ``(K,)`` int64, the positions whose next token carries loss in some row."""

_MODEL_INPUTS = ("attention_mask", "position_ids")


def shifted_targets(batch: Batch) -> Tensor:
    """Return the target of every position but the last, ``(B, T - 1)``, -100 where no loss is taken."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels[:, 1:]


def target_counts(batch: Batch) -> Tensor:
    """Return how many tokens of each example carry loss, ``(B,)`` int64."""
    return (shifted_targets(batch) != IGNORE_INDEX).sum(dim=1)


def at_targets(batch: Batch) -> dict[str, Tensor]:
    """Return the batch cut after its last target, and with the columns that carry loss under :data:`TARGET_COLUMNS`.

    A causal model looks only to the left, so the loss is that of the whole batch. A batch that is used many times is
    best prepared once, on CPU: the columns decide shapes, and finding them on an accelerator makes it wait.
    """
    columns = (shifted_targets(batch) != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    width = batch["input_ids"].shape[1]
    kept = width
    if 0 < len(columns) < width - 1 and all(batch[key].dim() == 2 for key in _MODEL_INPUTS if key in batch):
        kept = int(columns[-1]) + 2  # the last target is predicted one column before its own
    return {key: _cut(value, width, kept) for key, value in batch.items()} | {TARGET_COLUMNS: columns}


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token cross-entropy of each example, ``(B,)``, nats per token, in float32 or finer.

    Understands Hugging Face causal language models, modules that return logits ``(B, T, V)`` (bare, as the first
    element of a tuple, or under ``logits``), and wrappers, such as a LightningModule, whose ``forward`` is one of these
    or that hold exactly one such model. Columns after the last target are not fed to the model, and where it can
    restrict its output head to given positions (``logits_to_keep``), only positions that carry loss are computed. An
    example without any target has loss 0.

    Raises:
        TypeError: the module cannot be called with token ids, or returns no logits; pass a ``loss_fn``.
    """
    if TARGET_COLUMNS not in batch:
        batch = at_targets(batch)
    network = find_language_model(model)
    accepted = inspect.signature(network.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    options: dict[str, Any] = {
        key: batch[key] for key in _MODEL_INPUTS if key in batch and (key in accepted or takes_any)
    }
    if "use_cache" in accepted:
        options["use_cache"] = False
    targets, columns = shifted_targets(batch), batch[TARGET_COLUMNS]
    if "logits_to_keep" in accepted and 0 < len(columns) < targets.shape[1]:
        logits = _logits(network(batch["input_ids"], logits_to_keep=columns, **options), network)
        targets = targets[:, columns]
    else:
        logits = _logits(network(batch["input_ids"], **options), network)[:, : targets.shape[1]]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # the differences that selection looks at are lost in a short softmax
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets).sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1).clamp(min=1)


def reference_loss(losses: list[Tensor], counts: list[Tensor]) -> float:
    """Return the token-weighted mean of per-example mean losses, each list holding ``(B,)`` tensors; nats per token.

    Sums in float64, because candidates differ by a thousandth of the loss, and fetches from the device once.
    """
    weights = torch.cat(counts).cpu().double()
    return float(torch.cat(losses).detach().cpu().double() @ weights) / max(1.0, float(weights.sum()))


def find_language_model(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to logits: ``model`` itself, or the one that it wraps.

    A compiled module is answered by the module that was compiled: that one carries the signature.

    Raises:
        TypeError: the module defines no ``forward`` and does not hold exactly one module that could be meant.
    """
    model = _uncompiled(model)
    if _defines_forward(model):
        return model
    inner = [_uncompiled(child) for child in model.children() if next(child.parameters(), None) is not None]
    language_models = [child for child in inner if _is_language_model(child)]
    for found in (language_models, inner):
        if len(found) == 1:
            return found[0]
    raise TypeError(
        f"cannot tell how to get logits from {type(model).__name__}: it defines no forward(input_ids) and holds "
        f"{len(language_models)} Hugging Face language models among {len(inner)} modules with parameters, where one "
        "was expected. Define forward(input_ids), or pass loss_fn=(model, batch) -> (B,) losses"
    )


def _cut(value: Any, width: int, kept: int) -> Any:
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
        return value[:, :kept]
    return value


def _uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _defines_forward(model: nn.Module) -> bool:
    # LightningModule.forward only calls nn.Module's, which raises: neither counts as defined
    return getattr(model.forward, "__qualname__", "") not in {"LightningModule.forward", "_forward_unimplemented"}


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
