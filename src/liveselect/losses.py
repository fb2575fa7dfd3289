"""Per-example losses of causal language models."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.grammar import IGNORE_INDEX, REFERENCE_WEIGHT, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGET_COLUMNS = "target_columns"
"""Key that :func:`at_targets` adds: ``(B, K)`` int64, the columns of each row whose next token carries loss.

Rows with fewer than K of them are filled up with their last column, which has no next token.
"""

_MAX_SOFTMAX_ENTRIES = {"cpu": 2**19, "accelerator": 2**26}  # at once: a cache holds the first, the second fills a GPU
_TARGET_INPUTS = ("targets", "labels")
_NEEDS_TARGETS: "WeakSet[nn.Module]" = WeakSet()  # networks that return the logits of all positions to targets only
_OPTIONAL_MODEL_INPUTS = ("attention_mask", "position_ids")


def shifted_targets(batch: Batch) -> Tensor:
    """Return the target of every position but the last, ``(B, T - 1)``, -100 where no loss is taken."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels[:, 1:]


def target_counts(batch: Batch) -> Tensor:
    """Return the number of tokens that carry loss in each example, ``(B,)`` int64."""
    return (shifted_targets(batch) != IGNORE_INDEX).sum(dim=1)


def token_weights(batch: Batch) -> Tensor:
    """Return what each example counts in the mean over a reference set, ``(B,)``: its tokens that carry loss.

    In a mixture of sets each token has the weight of its set, float64.
    """
    counts = target_counts(batch)
    weight = batch.get(REFERENCE_WEIGHT)
    return counts if weight is None else counts.double() * weight.to(counts.device).double()


def targets_shape(batch: Batch) -> tuple[int, ...]:
    """Return what the cost of :func:`causal_lm_loss` depends on beside the shapes of a batch's tensors.

    The largest number of targets of an example and the column of the last one; nothing where the shapes say it.
    """
    if TARGET_COLUMNS in batch or "labels" not in batch or batch["labels"].dim() != 2:
        return ()
    carries = shifted_targets(batch) != IGNORE_INDEX
    columns = torch.arange(1, carries.shape[1] + 1, device=carries.device) * carries
    if not columns.numel():
        return ()
    most, last = torch.stack([carries.sum(dim=1).max(), columns.max()]).tolist()
    return most, last


def at_targets(batch: Batch) -> dict[str, Tensor]:
    """Return the batch cut after its last target, and with the columns that carry loss under :data:`TARGET_COLUMNS`.

    A causal model looks only to the left, so the loss is that of the whole batch. A batch that is used many times is
    best prepared once, on CPU: the columns decide shapes, and finding them on an accelerator makes it wait.
    """
    carries = shifted_targets(batch) != IGNORE_INDEX
    rows, width = batch["input_ids"].shape
    columns = torch.arange(width - 1, device=carries.device).expand(rows, -1)
    most = max(int(carries.sum(dim=1).max()), 1) if width > 1 else 0
    kept = width
    if most < width - 1:
        columns = columns.masked_fill(~carries, width).sort(dim=1).values[:, :most]
        if (columns < width).any() and all(batch[key].dim() == 2 for key in _OPTIONAL_MODEL_INPUTS if key in batch):
            kept = int(columns[columns < width].max()) + 2  # the last target is predicted one column before its own
        columns = columns.clamp(max=kept - 1)
        if most == kept - 1:  # some row needs all remaining columns, so none is worth leaving out
            columns = torch.arange(most, device=carries.device).expand(rows, -1)
    return {key: _cut(value, width, kept) for key, value in batch.items()} | {TARGET_COLUMNS: columns}


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token cross-entropy of each example, ``(B,)``, nats per token, in float32 or finer.

    Understands Hugging Face causal language models, modules that return logits ``(B, T, V)`` (bare, as the first
    element of a tuple, or under ``logits``), and wrappers, such as a LightningModule, whose ``forward`` is one of these
    or that hold exactly one such model. Columns after the last target are not fed to the model, and a Hugging Face
    model computes the logits of positions that carry loss only. An example without any target has loss 0.

    Raises:
        TypeError: the module cannot be called with token ids, or returns no logits; pass a ``loss_fn``.
        ValueError: there is not one row of logits for each token of the batch.
    """
    logits, targets = _logits_and_targets(model, batch)
    losses = _token_losses(logits.flatten(0, 1), targets.flatten())
    return losses.view_as(targets).sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1).clamp(min=1)


def causal_lm_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each token, ``(B, T)``, nats, NaN where no loss is taken; else as the loss above.

    Column t is the loss of predicting token t from those before it; the mean over a row's tokens is its loss.
    """
    cut = batch if TARGET_COLUMNS in batch else at_targets(batch)
    logits, targets = _logits_and_targets(model, cut)
    losses = _token_losses(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    losses = losses.masked_fill(targets == IGNORE_INDEX, math.nan)
    columns = cut[TARGET_COLUMNS]
    losses = losses[:, : columns.shape[1]]
    every = losses.new_full((len(losses), batch["input_ids"].shape[1] + 1), math.nan)
    # a row with fewer targets than columns repeats one that has none: it goes to the end, and is cut off
    places = torch.where(losses.isnan(), every.shape[1] - 1, columns + 1)
    return every.scatter(1, places, losses)[:, :-1]


def target_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits ``(B, K, V)`` and targets ``(B, K)`` from which :func:`causal_lm_loss` is computed.

    K is the largest number of targets of an example; where one has fewer, targets are -100. The batch may come from
    :func:`at_targets`. Errors are those of :func:`causal_lm_loss`.
    """
    if TARGET_COLUMNS not in batch:
        batch = at_targets(batch)
    logits, targets = _logits_and_targets(model, batch)
    wanted = batch[TARGET_COLUMNS].shape[1]
    return logits[:, :wanted], targets[:, :wanted]


def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of all positions, ``(B, T, V)``; errors are those of :func:`causal_lm_loss`."""
    ids = batch["input_ids"]
    rows, columns = (torch.arange(size, device=ids.device) for size in ids.shape)
    return _logits_at(find_language_model(model), batch, rows[:, None], columns.expand(len(rows), -1))


def _logits_and_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Do as :func:`target_logits`, with one more column without targets where cutting it off would copy."""
    if TARGET_COLUMNS not in batch:
        batch = at_targets(batch)
    columns = batch[TARGET_COLUMNS]
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[rows, columns]
    logits = _logits_at(find_language_model(model), batch, rows, columns)
    return logits, F.pad(targets, (0, logits.shape[1] - targets.shape[1]), value=IGNORE_INDEX)


def reference_loss(losses: list[Tensor], counts: list[Tensor]) -> float:
    """Return the token-weighted mean of per-example mean losses, each list holding ``(B,)`` tensors; nats per token.

    Sums in float64, because candidates differ by a thousandth of the loss, and fetches from the device once.
    """
    return mean_of(loss_sums(torch.cat(losses), torch.cat(counts)))


def loss_sums(losses: Tensor, counts: Tensor) -> Tensor:
    """Return what examples with losses ``(B,)`` over ``counts (B,)`` tokens add to a mean, ``(2,)`` float64 on CPU.

    That is the sum of the losses of their tokens, and the number of tokens: add these up over batches and ranks.
    """
    weights = counts.cpu().double()
    return torch.stack([losses.detach().cpu().double() @ weights, weights.sum()])


def mean_of(sums: Tensor) -> float:
    """Return the mean loss, nats per token, of what :func:`loss_sums` added up; 0 without tokens."""
    total, tokens = sums.tolist()
    return float(total / max(1.0, tokens))


def find_language_model(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to logits: ``model`` itself, or the one that it wraps.

    For a compiled module that is the original one, which has the signature.

    Raises:
        TypeError: the module defines no ``forward``, and holds neither exactly one language model nor exactly one
        module
            with parameters.
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


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes the logits of a Hugging Face language model, None where there is none."""
    language_models = [module for module in model.modules() if _is_language_model(module)]
    heads = {id(head): head for each in language_models if isinstance(head := each.get_output_embeddings(), nn.Module)}
    return next(iter(heads.values())) if len(heads) == 1 else None


def _logits_at(network: nn.Module, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the logits ``(B, K, V)`` of the positions ``columns (B, K)`` of the ``rows (B, 1)``.

    Where only the last of all positions is not among them, it follows them.
    """
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"{type(network).__name__} is an encoder-decoder: it predicts labels from an input beside them, and a row "
            "of input_ids does not say which is which. Pass loss_fn=(model, batch) -> (B,) losses that calls it as "
            "training does, or train a decoder"
        )
    accepted = inspect.signature(network.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    options: dict[str, Tensor | bool] = {
        key: batch[key] for key in _OPTIONAL_MODEL_INPUTS if key in batch and (key in accepted or takes_any)
    }
    if "use_cache" in accepted:
        options["use_cache"] = False
    width, wanted = batch["input_ids"].shape[1], columns.shape[1]
    with _head_narrowed(network, rows, columns, width) as was_narrowed:
        takes = next((name for name in _TARGET_INPUTS if name in accepted), None)
        takes = None if _is_language_model(network) else takes
        if takes is not None and network in _NEEDS_TARGETS:
            options[takes] = _next_tokens(batch)
        try:
            output = network(batch["input_ids"], **options)
            logits = _logits(output, network)
            if takes is not None and takes not in options and logits.shape[:2] == (len(rows), 1) != (1, width):
                # as in nanoGPT: without targets only what a sampler needs is computed
                _NEEDS_TARGETS.add(network)
                output = network(batch["input_ids"], **options, **{takes: _next_tokens(batch)})
        except (TypeError, IndexError, KeyError, AttributeError) as error:
            error.add_note(
                f"this came from {type(network).__name__}.forward(input_ids), called with token ids "
                f"{tuple(batch['input_ids'].shape)} to get logits: if it takes something else, pass "
                "loss_fn=(model, batch) -> (B,) losses"
            )
            raise
        logits = _logits(output, network)
    _check_positions(logits, (len(rows), wanted if was_narrowed() else width), network)
    return logits if was_narrowed() or wanted == width - 1 else logits[rows, columns]


def _next_tokens(batch: Batch) -> Tensor:
    """Return a token for each position, ``(B, T)``; the loss that a model takes of them is not used."""
    return batch["input_ids"].roll(-1, dims=1)


def _check_positions(logits: Tensor, expected: tuple[int, int], network: nn.Module) -> None:
    """Raise ValueError unless there is a row of logits for each of the ``expected`` examples and positions."""
    found, (examples, positions) = tuple(logits.shape), expected
    if found[:2] == expected:
        return
    if found[:2] == (examples, 1):
        cause = (
            "they are those of the last position only, as nanoGPT's forward returns without targets, or one with "
            "logits_to_keep=1: no loss of the tokens before can be had from them. Return the logits of all positions"
        )
    elif found[:2] == (positions, examples):
        cause = "time comes first: return logits.transpose(0, 1)"
    elif found[0] == examples and found[2] == positions:
        cause = "the vocabulary comes before time: return logits.transpose(1, 2)"
    elif found[2] == examples and positions in found[:2]:
        cause = f"the batch comes last: return logits.permute(2, {'0, 1' if found[0] == positions else '1, 0'})"
    elif found[:2] == (examples, positions - 1):
        cause = "they leave out a position: return those of all of them; the shift to next tokens is made here"
    elif found[0] == examples and found[1] > positions:
        cause = "they hold positions that are no tokens of the batch, such as those of a learned prompt: cut them off"
    else:
        cause = "examples or positions are missing or joined: return one row of logits for each token"
    raise ValueError(
        f"expected {type(network).__name__} to return logits (B, T, V) with B={examples} examples and T={positions} "
        f"positions, got {found}: {cause}, or pass loss_fn=(model, batch) -> (B,) losses that calls the model as "
        "training does"
    )


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row of ``logits (N, V)``, ``(N,)``, in float32 or finer.

    Without gradients it is taken some rows at a time: no second tensor as large as the logits is ever made, which on a
    CPU takes longer to get from the system than to fill.
    """
    rows = len(logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        rows = _MAX_SOFTMAX_ENTRIES["cpu" if logits.device.type == "cpu" else "accelerator"] // logits.shape[1]
    parts = []
    for part, target in zip(logits.split(max(1, rows)), targets.split(max(1, rows)), strict=True):
        if part.dtype in (torch.bfloat16, torch.float16):
            part = part.float()  # differences between candidates are lost in a 16-bit softmax
        parts.append(F.cross_entropy(part, target, ignore_index=IGNORE_INDEX, reduction="none"))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def _head_narrowed(network: nn.Module, rows: Tensor, columns: Tensor, width: int) -> Iterator[Callable[[], bool]]:
    """Let the output head see the positions ``columns`` only, where they are few; yields whether it did, as a function.

    A hook, and not the models' own ``logits_to_keep``, because that keeps the same columns in all rows. The model
    scales or caps the remaining logits as usual.
    """
    head = output_head(network) if columns.shape[1] < width - 1 else None
    narrowed: list[bool] = []
    if head is None:
        yield lambda: False
        return

    def narrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        narrowed.append(hidden.shape[:2] == (len(rows), width))
        return (hidden[rows, columns], *inputs[1:]) if narrowed[-1] else inputs

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield lambda: any(narrowed)
    finally:
        handle.remove()


def _cut(value: Tensor, width: int, kept: int) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
        return value[:, :kept]
    return value


def _uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _defines_forward(model: nn.Module) -> bool:
    # LightningModule.forward only calls nn.Module's, which raises: neither counts as defined
    return getattr(model.forward, "__qualname__", "") not in {"LightningModule.forward", "_forward_unimplemented"}


def _is_language_model(module: nn.Module) -> "TypeGuard[PreTrainedModel]":
    return hasattr(module, "config") and hasattr(module, "get_output_embeddings")


def _logits(output: object, network: nn.Module) -> Tensor:
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 3:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"expected {type(network).__name__} to return logits (B, T, V) or an output with .logits, got {got}; "
            "pass loss_fn=(model, batch) -> (B,) losses"
        )
    return output
