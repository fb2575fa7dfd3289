"""What is wrong with pool, reference set and model together, said before hours are spent."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from liveselect.datamodules.overlap import (
    Overlap,
    pool_tokens,
    scan_limit,
    shared_documents,
    shared_passages,
    shared_rows,
)
from liveselect.datamodules.pool_files import TOKENIZER
from liveselect.datamodules.reference import Loaded
from liveselect.datamodules.rows import Rows
from liveselect.datamodules.tokens import TokenStore
from liveselect.protocols import SelectionWarning

PACKABLE = ("gpt2", "gpt_neox", "llama")
"""Hugging Face model types that keep packed items apart; a test compares each with items run one by one."""


def check_no_overlap(rows: Rows, reference: Loaded, decode: Callable[[Tensor], list[str]]) -> None:
    """Raise ValueError when reference examples are in the pool; warn where that was not looked for in full.

    Whole documents of prepared pools are compared by their hashes. In pools up to
    :func:`~liveselect.datamodules.overlap.scan_limit` tokens, a passage from the middle of every example is looked for
    at every position, and short examples are compared with the rows of a dataset.
    """
    remedy = (
        "Selection would be rewarded for choosing the very text that it is judged by. Remove them from the pool or "
        "from the reference set, or pass check_overlap=False if this is meant"
    )
    if reference.fingerprint is not None and reference.fingerprint == rows.fingerprint:
        raise ValueError(f"the reference set and the pool are the same prepared pool ({rows.fingerprint}). {remedy}")
    found: list[Overlap] = []
    if rows.store is not None:
        found = shared_documents(rows.store.document_hashes, reference.documents)
    if not found:
        size = pool_tokens(rows)
        if size <= scan_limit(rows):
            found = shared_passages(rows, reference.items)
            if not found and rows.store is None:
                found = shared_rows(rows, reference.items)
        else:
            compared = "nothing was compared" if rows.store is None else "only whole documents were compared"
            warnings.warn(
                f"the pool holds {size} tokens, too many to search for passages of the reference set: {compared}. If "
                "they come from the same corpus, make sure that they are disjoint",
                SelectionWarning,
                stacklevel=2,
            )
    if found:
        raise ValueError(
            f"{len(found)} of {len(reference.documents)} reference records are in the pool, the first of them record "
            f"{found[0].record}{_where(found[0], decode)}. {remedy}"
        )


def check_same_tokenizer(pool: TokenStore | None, reference: TokenStore | None) -> None:
    """Raise ValueError when two prepared pools were made with different tokenizers."""
    if pool is None or reference is None:
        return
    file = f"{TOKENIZER}/tokenizer.json"
    hashes = [store.manifest["files"].get(file, {}).get("blake2b") for store in (pool, reference)]
    if pool.vocab_size != reference.vocab_size or (all(hashes) and hashes[0] != hashes[1]):
        raise ValueError(
            f"{pool.path} and {reference.path} were prepared with different tokenizers, so the same ids mean different "
            "texts: prepare the second one with the tokenizer of the first "
            f"(liveselect prepare ... --tokenizer {pool.tokenizer_path or 'NAME'})"
        )


def _where(overlap: Overlap, decode: Callable[[Tensor], list[str]]) -> str:
    if overlap.candidate is None:
        return ", which is one of the pool's documents"
    (text,) = decode(torch.from_numpy(overlap.tokens[np.newaxis]))
    return f", which shares the passage {text!r} with candidate {overlap.candidate}"


def check_vocabulary(module: nn.Module, largest: int, what: str) -> None:
    """Raise ValueError when ``what`` holds token ids up to ``largest`` that the model has no embedding for."""
    size = model_vocabulary(module)
    if size is not None and largest >= size:
        raise ValueError(
            f"{what} holds token ids up to {largest}, but the model knows only {size} tokens: build the model with "
            f"vocab_size of at least {largest + 1}, or prepare the data with the model's own tokenizer"
        )


def model_vocabulary(module: nn.Module) -> int | None:
    """Return how many tokens a model knows, None when it does not say.

    Asks the embeddings of Hugging Face models in ``module``, or else takes the largest ``nn.Embedding``, since
    which one embeds tokens cannot be told.
    """
    models: list[Any] = [
        part for part in module.modules() if hasattr(part, "get_input_embeddings") and hasattr(part, "config")
    ]
    embeddings = [part.get_input_embeddings() for part in models] or list(module.modules())
    sizes = [part.num_embeddings for part in embeddings if isinstance(part, nn.Embedding)]
    return max(sizes, default=None)


def check_packing(module: nn.Module) -> None:
    """Raise ValueError unless the model gets the positions of packed examples and keeps these apart by them."""
    kinds = {str(getattr(part.config, "model_type", None)) for part in module.modules() if _is_transformer(part)}
    hides = (
        isinstance(module, pl.LightningModule)
        and is_overridden("forward", module)
        and "position_ids" not in inspect.signature(type(module).forward).parameters
    )
    if kinds and kinds <= set(PACKABLE) and not hides:
        return
    reason = (
        f"{type(module).__name__}.forward takes no position_ids"
        if hides
        else f"the model is {', '.join(sorted(kinds)) or 'not a Hugging Face model'}"
    )
    raise ValueError(
        f"pack_reference=True needs a model that keeps packed examples apart by their position_ids ("
        f"{', '.join(PACKABLE)} do), but {reason}: examples would see each other and the reference loss would be "
        "wrong. Pass pack_reference=False, which wastes few tokens on padding"
    )


def _is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "get_input_embeddings") and hasattr(module, "config")
