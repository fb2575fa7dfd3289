"""Texts of the reference set to tokens, with a mask of those that carry loss."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from liveselect.grammar import SelectionWarning

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


MARK = "\n"


class Encoded(NamedTuple):
    """Tokens of one text.

    Attributes:
        input_ids: ``(T,)`` int64.
        counts: ``(T,)`` bool, whether the token carries loss.
    """

    input_ids: np.ndarray
    counts: np.ndarray


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Encoded]:
    """Return the tokens of each text; every token counts."""
    if not texts:
        return []
    encoded = [np.asarray(ids, dtype=np.int64) for ids in _call(tokenizer, texts)["input_ids"]]
    return [Encoded(ids, np.ones(len(ids), bool)) for ids in encoded]


def encode_answers(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Return the tokens of each ``(prompt, answer)``, joined as they are; only the answer's tokens count.

    The two are tokenised as one text, as the model would meet them, and character offsets show which tokens reach into
    the answer: white space at the border goes into the answer's first token, as it does in running text. Where a
    token would hold letters of both, or the tokenizer has no offsets, the two are tokenised one by one.
    """
    if not pairs:
        return []
    _warn_of_glued_words(pairs)
    if not tokenizer.is_fast:
        return [_one_by_one(tokenizer, prompt, answer) for prompt, answer in pairs]
    encoded = _call(tokenizer, [prompt + answer for prompt, answer in pairs], return_offsets_mapping=True)
    found = []
    for (prompt, answer), ids, spans in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        offsets = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        counts = offsets[:, 1] > len(prompt)
        if (counts & (offsets[:, 0] < len(prompt.rstrip()))).any():
            found.append(_one_by_one(tokenizer, prompt, answer))
        else:
            found.append(Encoded(np.asarray(ids, dtype=np.int64), counts))
    return found


def encode_chats(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[tuple[Sequence[Mapping], int]]) -> list[Encoded]:
    """Return the tokens of each chat, as the tokenizer's template writes it; the assistant's turns count.

    Args:
        tokenizer: has a chat template.
        chats: messages, and the first of them whose turns count.

    Raises:
        ValueError: there is no template, or it writes a chat otherwise when it is longer.
    """
    if chats and not tokenizer.chat_template:
        raise ValueError(
            "the reference set holds chats, and the tokenizer has no chat template: set tokenizer.chat_template, or "
            "give them as prompt and answer"
        )
    return [_encode_chat(tokenizer, [dict(message) for message in messages], first) for messages, first in chats]


def _encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], first: int) -> Encoded:
    def written(count: int, asks: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks))

    text = written(len(messages))
    spans = []
    for place in range(first, len(messages)):
        if messages[place]["role"] != "assistant":
            continue
        before = written(place, asks=True) if place else ""
        if not text.startswith(before):
            before = written(place)
        content = str(messages[place]["content"]).strip()
        start, after = text.find(content, len(before)), written(place + 1)
        if not text.startswith(before) or not text.startswith(after) or start < 0:
            raise ValueError(
                f"the chat template of the tokenizer writes message {place} otherwise in a longer chat, so its tokens "
                "cannot be told from the others: give such chats as prompt and answer"
            )
        spans.append((start, len(after)))
    return _marked(tokenizer, text, spans)


def _marked(tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Return the tokens of a text with its special tokens, of which those count that reach into one of the spans."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
        )
        starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        reached = [(ends > start) & (starts < end) for start, end in spans]
        counts = np.logical_or.reduce([np.zeros(len(starts), bool), *reached])
        return Encoded(np.asarray(encoded["input_ids"], np.int64), counts)
    edges = [0, *itertools.chain.from_iterable(spans), len(text)]
    pieces = [
        tokenizer(text[start:end], add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        for start, end in itertools.pairwise(edges)
    ]
    counted = [np.full(len(ids), number % 2 == 1) for number, ids in enumerate(pieces)]
    return Encoded(np.asarray([*itertools.chain.from_iterable(pieces)], np.int64), np.concatenate(counted))


def _one_by_one(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str) -> Encoded:
    context = prompt.rstrip()
    answer = prompt[len(context) :] + answer  # tokenizers join white space to the word that follows
    if not tokenizer.is_fast:  # where the text begins with the tokens of its prompt, those after them are the answer's
        whole, *earlier = _call(tokenizer, [context + answer, prompt, context])["input_ids"]
        for before in earlier:
            if 0 < len(before) < len(whole) and list(whole[: len(before)]) == list(before):
                return Encoded(np.asarray(whole, dtype=np.int64), np.arange(len(whole)) >= len(before))
    before, after = _call(tokenizer, [context, answer])["input_ids"]
    if tokenizer.is_fast:  # behind a mark, because SentencePiece would put a space before a text of its own
        marked = _call(tokenizer, [MARK + answer], return_offsets_mapping=True)
        starts, ends = np.asarray(marked["offset_mapping"][0], dtype=np.int64).reshape(-1, 2).T
        if not ((starts < len(MARK)) & (ends > len(MARK))).any():
            after = np.asarray(marked["input_ids"][0])[ends > len(MARK)].tolist()
    ids = np.asarray([*before, *after], dtype=np.int64)
    return Encoded(ids, np.arange(len(ids)) >= len(before))


def _warn_of_glued_words(pairs: Sequence[tuple[str, str]]) -> None:
    glued = [(prompt, answer) for prompt, answer in pairs if prompt[-1:].isalnum() and answer[:1].isalnum()]
    if len(glued) > len(pairs) // 2:
        prompt, answer = glued[0]
        warnings.warn(
            f"prompts and answers join without a space, as in {prompt[-12:] + answer[:12]!r}: if that is a mistake, "
            "begin the answers with a space or pass ReferenceSet(separator=' ')",
            SelectionWarning,
            stacklevel=2,
        )


def _call(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], **settings: bool) -> "BatchEncoding":
    # special tokens are neither added nor recognised, as in the pool
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False, **settings
    )
