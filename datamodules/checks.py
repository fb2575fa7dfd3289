"""Checks before training that pool, reference set, model and ranks fit each other."""

import inspect
import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, TypeGuard

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from liveselect import distributed
from liveselect.datamodules.overlap import visible_rows
from liveselect.datamodules.pools.foreign_tokenizers import ForeignTokenizer, is_hugging_face
from liveselect.datamodules.pools.pool_files import TOKENIZER
from liveselect.datamodules.pools.tokenizers import load_tokenizer
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows.collating import without_fill
from liveselect.datamodules.rows.content import spread_ids
from liveselect.datamodules.rows.rows import Rows
from liveselect.datamodules.settings import OnOther, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = re.compile(r"wpe|wpos|pos(itions?)?|(embed_|learned_)?pos(ition(s|al)?)?_?(emb\w*|enc\w*)?|embed_positions")
"""Names that models give to the table of their learned positions."""

MIN_ROUND_TRIP_SHARE = 0.95  # with the tokenizer that made some ids, nearly all come back; with another, 85% and less

PACKABLE_MODEL_TYPES = ("gpt2", "gpt_neox", "llama")
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


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", rows: Rows, what: str, other: OnOther = "refuse") -> None:
    """Raise unless ``tokenizer`` can be the one that made the pool.

    A reference set of other ids than the pool's is noise to the model, and causes no error. Signs are another
    vocabulary than that of the pool's own tokenizer, or other tokens for its text; and where the pool has none, ids
    beyond the tokenizer's, and rows that do not become the same ids again after decoding and encoding: with the right
    tokenizer nearly all do.

    Args:
        tokenizer: tokenizer of the reference set.
        rows: the pool.
        what: origin of the tokenizer, for messages.
        other: ``allow`` to accept another one.

    Raises:
        TypeError: it is no Hugging Face tokenizer.
        ValueError: the pool was prepared with another one.
    """
    if not is_hugging_face(tokenizer):
        raise TypeError(
            f"expected {what} as a Hugging Face tokenizer, the name or path of one, or one that encodes and decodes "
            f"(tiktoken, SentencePiece, litgpt), got {type(tokenizer).__name__}"
        )
    if other == "allow":
        return
    folder = rows.store.tokenizer_path if rows.store is not None else None
    if folder is not None:
        own = load_tokenizer(folder)
        other_vocabulary = not isinstance(tokenizer, ForeignTokenizer) and own.get_vocab() != tokenizer.get_vocab()
        if other_vocabulary or _same_token_share(own, tokenizer, rows) < MIN_ROUND_TRIP_SHARE:
            raise ValueError(
                f"{what} is not the tokenizer that {folder.parent} was prepared with, so the same ids mean different "
                "texts: leave it out, the pool holds its own (or pass other_tokenizer='allow' if that is meant)"
            )
        return
    known = len(tokenizer)
    again = _round_trip_share(tokenizer, rows)
    if rows.vocab_size > known or again < MIN_ROUND_TRIP_SHARE:
        raise ValueError(
            f"{what} does not look like the one that made the pool: it knows {known} tokens, ids of the pool go up to "
            f"{rows.vocab_size - 1}, and {again:.0%} of the ids in some rows came back after decoding and encoding. "
            "With another one the reference set means nothing to the model: pass the tokenizer that made the pool, or "
            "other_tokenizer='allow' if you know that this one fits"
        )


def _same_token_share(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", rows: Rows) -> float:
    """Return the share of the tokens of some rows' text in which two tokenizers agree."""
    blocks = [rows.candidates([i])["input_ids"][0, :256].tolist() for i in spread_ids(len(rows), 8)]
    texts = own.batch_decode(blocks, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    one, two = (Counter(itertools.chain(*each(texts, add_special_tokens=False)["input_ids"])) for each in (own, other))
    most = max(sum(one.values()), sum(two.values()))
    return sum((one & two).values()) / most if most else 1.0


def _round_trip_share(tokenizer: "PreTrainedTokenizerBase", rows: Rows) -> float:
    """Return the share of the ids of some rows that come back after decoding and encoding."""
    special = {*tokenizer.all_special_ids}
    kept = total = 0
    for i in spread_ids(len(rows), 8):
        (row,) = visible_rows(rows.candidates([i]))
        for is_text, part in itertools.groupby(
            without_fill(row[:256]).tolist(), lambda token: token < len(tokenizer) and token not in special
        ):
            if not is_text:  # a special token separates documents, which were encoded one by one
                continue
            ids = list(part)
            text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            kept += sum((Counter(ids) & Counter(encoded)).values())
            total += len(ids)
    return kept / total if total else 1.0


def check_same_on_all_ranks(what: str, fingerprint: str) -> None:
    """Raise ValueError when ranks opened different data; a collective."""
    found = distributed.gather_objects(fingerprint)
    if len(set(found)) > 1:
        raise ValueError(
            f"{what} differs between the ranks ({', '.join(found)}): every rank must open all of it, since an id must "
            "mean the same row everywhere. Do not shard data by rank (dataset.shard, split_dataset_by_node), and give "
            "every random split a seed: the loader gives each rank its share of the plan"
        )


def check_pool_size(size: int, batch_size: int, place: Place) -> None:
    """Raise ValueError when a pool of ``size`` candidates is smaller than the examples of one optimizer step."""
    global_batch = batch_size * place.world_size * place.accumulate
    if size < global_batch:
        raise ValueError(
            f"the pool holds {size} candidates, less than the {global_batch} of one optimizer step "
            f"({batch_size} a batch, {place.world_size} ranks, accumulate_grad_batches={place.accumulate}): "
            "enlarge the pool or lower the batch size"
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
    """Return the number of tokens that a model knows, None when it cannot be found.

    It is the size of the input embeddings of Hugging Face models in ``module``; without such models, of the largest
    ``nn.Embedding``, since nothing marks the one that embeds tokens.
    """
    models = [part for part in module.modules() if _is_transformer(part)]
    embeddings: list[nn.Module] = [part.get_input_embeddings() for part in models] or list(module.modules())
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

    Rotary and other computed positions have no limit. Tables of positions are recognised by their names; some models
    keep a few more entries in them than positions, so the configuration of a Hugging Face model counts too.
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
    if kinds and kinds <= set(PACKABLE_MODEL_TYPES) and not hides:
        return
    reason = (
        f"{type(module).__name__}.forward takes no position_ids"
        if hides
        else f"the model is {', '.join(sorted(kinds)) or 'not a Hugging Face model'}"
    )
    raise ValueError(
        f"pack_reference=True needs a model that keeps packed examples apart by their position_ids ("
        f"{', '.join(PACKABLE_MODEL_TYPES)} do), but {reason}: examples would see each other and the reference loss "
        "would be wrong. Pass pack_reference=False, which needs little padding"
    )


def _is_transformer(module: nn.Module) -> "TypeGuard[PreTrainedModel]":
    return hasattr(module, "get_input_embeddings") and hasattr(module, "config")
