"""Tokenizers that are none of Hugging Face's: litgpt's, tiktoken's, SentencePiece's, by their encode and decode."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES = ("n_vocab", "vocab_size", "padded_vocab_size", "get_vocab_size", "get_piece_size")
SPECIAL_IDS = ("bos_id", "eos_id", "pad_id", "eot_token", "bos_token_id", "eos_token_id", "pad_token_id")


def is_hugging_face(tokenizer: object) -> bool:
    """Return whether a tokenizer has the interface of Hugging Face's."""
    return callable(tokenizer) and hasattr(tokenizer, "all_special_ids")


def adapted(tokenizer: object) -> "PreTrainedTokenizerBase | None":
    """Return a tokenizer with what is used here of Hugging Face's interface; None unless it encodes and decodes."""
    if is_hugging_face(tokenizer):
        return cast("PreTrainedTokenizerBase", tokenizer)
    if type(tokenizer).__module__.split(".")[0] == "tokenizers":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
        return None
    return cast("PreTrainedTokenizerBase", ForeignTokenizer(tokenizer))


class ForeignTokenizer:
    """The part of a Hugging Face tokenizer's interface that a reference set needs, over another tokenizer.

    Special tokens are neither added nor recognised, as far as the other one lets itself be told.

    Args:
        tokenizer: has ``encode`` and ``decode``.

    Attributes:
        name: the class of the other one, for messages.
        is_fast: False: it says no places of tokens in a text.
        chat_template: None.
    """

    is_fast = False
    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self.name = type(tokenizer).__name__
        self._tokenizer = tokenizer
        self._size = _size(tokenizer)
        found = (_value(tokenizer, name) for name in SPECIAL_IDS)
        self.all_special_ids = sorted({int(each) for each in found if isinstance(each, int) and each >= 0})
        encode: Callable[..., Any] = getattr(tokenizer, "encode_ordinary", None) or tokenizer.encode
        accepted = _accepted(encode)
        self._encode = lambda text: encode(text, **{name: False for name in ("bos", "add_bos") if name in accepted})

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"ForeignTokenizer({self.name})"

    def __call__(self, text: str | Sequence[str], **settings: object) -> Mapping[str, Any]:
        """Return the ``input_ids`` of a text, or of each of several; settings of Hugging Face's have no effect."""
        if isinstance(text, str):
            return {"input_ids": _ids(self._encode(text))}
        return {"input_ids": [_ids(self._encode(each)) for each in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **settings: object) -> str:
        """Return the text of some ids; those beyond its vocabulary are left out."""
        special = set(self.all_special_ids) if skip_special_tokens else set()
        kept = [int(each) for each in ids if int(each) not in special and int(each) < self._size]
        if not kept:
            return ""
        try:
            return str(self._tokenizer.decode(kept))
        except (TypeError, AttributeError):  # litgpt's takes a tensor
            import torch

            return str(self._tokenizer.decode(torch.tensor(kept)))

    def batch_decode(self, rows: Sequence[Sequence[int]], **settings: Any) -> list[str]:
        """Return the text of each row of ids."""
        return [self.decode(row, **settings) for row in rows]


def _ids(found: Any) -> list[int]:
    ids = getattr(found, "ids", found)
    return [int(each) for each in np.asarray(ids).reshape(-1)]


def _accepted(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # made by a compiler
        return set()


def _value(tokenizer: object, name: str) -> object:
    value = getattr(tokenizer, name, None)
    try:
        return value() if callable(value) else value
    except TypeError:  # it wants arguments, so it is another thing of this name
        return None


def _size(tokenizer: object) -> int:
    """Return how many tokens a tokenizer knows, as it says; as many as there can be where it does not say."""
    sizes = [size for name in SIZES if isinstance(size := _value(tokenizer, name), int) and size > 0]
    return max(sizes, default=2**31)
