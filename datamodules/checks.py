"""What is wrong with pool, reference set and model together, said before hours are spent."""

import inspect
import re
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from liveselect.datamodules.pool_files import TOKENIZER
from liveselect.datamodules.tokens import TokenStore

POSITIONS = re.compile(r"wpe|wpos|pos(itions?)?|(embed_|learned_)?pos(ition(s|al)?)?_?(emb\w*|enc\w*)?|embed_positions")
"""Names that models give to the table of their learned positions."""

PACKABLE = ("gpt2", "gpt_neox", "llama")
"""Hugging Face model types that keep packed items apart; a test compares each with items run one by one."""


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


def check_positions(module: nn.Module, longest: int, what: str, remedy: str) -> None:
    """Raise ValueError when ``what`` has rows of ``longest`` tokens, and the model learned positions for fewer."""
    size = model_positions(module)
    if size is not None and longest > size:
        raise ValueError(
            f"{what} has rows of up to {longest} tokens, but the model has embeddings for {size} positions: build the "
            f"model with at least {longest} of them (max_position_embeddings, n_positions), or {remedy}"
        )


def model_positions(module: nn.Module) -> int | None:
    """Return the longest row that a model has positions for, None where positions are not learned or not found.

    Rotary and other computed positions reach as far as one likes. Tables are told by their names; some models keep a
    few more entries in them than positions, so the configuration of a Hugging Face model counts too.
    """
    sizes = [
        part.num_embeddings
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and POSITIONS.fullmatch(name.rpartition(".")[2])
    ]
    if not sizes:
        return None
    configured = [
        size
        for part in module.modules()
        if _is_transformer(part)
        and isinstance(size := getattr(part.config, "max_position_embeddings", None), int)
        and size > 0
    ]
    return min(sizes + configured)


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
