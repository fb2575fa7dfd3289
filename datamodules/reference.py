"""The reference set, which selection aims to improve: read from files, pools, lists and datasets."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from liveselect.datamodules.batching import Item
from liveselect.datamodules.pools.encoding import Encoded, encode_answers, encode_texts
from liveselect.datamodules.pools.pool_files import MANIFEST, hash_tokens
from liveselect.datamodules.pools.sources import read_records
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows.draws import candidate_seeds, fetch, private_draws
from liveselect.datamodules.rows.token_rows import check_map_style, token_row
from liveselect.grammar import IGNORE_INDEX
from liveselect.seeding import generator_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_PER_BATCH = 1024  # read and tokenised at once

Numbered = tuple[int, object]
"""A record, with its position in the source."""


@dataclass
class ReferenceSet:
    """The source of a reference set, and how its records become examples.

    The source may be the path of a prepared pool; a file, folder, pattern, ``datasets`` folder or ``hub:NAME`` with
    records; a list of strings or dicts; a map-style dataset; or a ``DataLoader``, whose batches are used unchanged.
    A record is one of these:

    - ``text``: every token counts; a text longer than ``max_length`` is cut into several examples.
    - ``prompt`` and ``answer``: only the tokens of the answer count; a long prompt loses its beginning.
    - ``input_ids`` and, if given, ``labels`` and ``attention_mask``.

    Args:
        source: the source of the records.
        answer: ``last_word`` makes the last word of each ``text`` its answer, as LAMBADA is scored.
        max_examples: use this many examples, drawn with ``seed``; all by default.
        separator: text between prompt and answer.
        columns: names of the columns, where they are not called ``text``, ``prompt``, ``answer``, ``input_ids``:
            for example ``{"text": "content"}``.
        max_length: longest example in tokens; by default the block size of the pool.
        seed: seed of the draw.
    """

    source: Any
    answer: Literal["all", "last_word"] = "all"
    max_examples: int | None = None
    separator: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answer not in ("all", "last_word"):
            raise ValueError(f"expected answer='all' or 'last_word', got {self.answer!r}")
        for name, value, least in (("max_examples", self.max_examples, 1), ("max_length", self.max_length, 2)):
            if value is not None and value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")

    @classmethod
    def of(cls, source: object) -> "ReferenceSet":
        """Return ``source`` itself, or a reference set with the default settings around it."""
        return source if isinstance(source, cls) else cls(source)


@dataclass(frozen=True)
class Loaded:
    """A reference set that was read.

    Attributes:
        items: its examples.
        documents: ``(records,)`` uint64, the hash of each record's tokens before any cutting.
        positions: the position of each record in its source.
        left_out: number of records without a token that could count.
        fingerprint: fingerprint of the prepared pool that it was read from, or None.
    """

    items: list[Item]
    documents: np.ndarray
    positions: list[int]
    left_out: int = 0
    fingerprint: str | None = None


class _Answered(NamedTuple):
    """A text of which only the end counts."""

    prompt: str
    answer: str


def load_reference(
    reference: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None" = None, max_length: int | None = None
) -> Loaded:
    """Read and tokenise a reference set.

    Args:
        reference: what to read; anything but a ``DataLoader``.
        tokenizer: Hugging Face tokenizer, needed for text.
        max_length: longest example in tokens where the reference set has no ``max_length``.

    Raises:
        ValueError: it is empty, has unknown columns, or holds text while there is no tokenizer.
        TypeError: it is of an unknown kind.
    """
    store = as_store(reference.source)
    records = _records(reference.source if store is None else store, reference)
    longest = reference.max_length or max_length
    items: list[Item] = []
    documents: list[int] = []
    positions: list[int] = []
    left_out = 0
    for position, encoded in _encode(records, reference, tokenizer):
        parts = [item for item in _cut(encoded, longest, len(documents)) if item.targets]
        documents.append(hash_tokens(encoded.input_ids))
        positions.append(position)
        left_out += not parts
        items += parts
    items = [items[i] for i in _drawn(len(items), reference)]
    if not items:
        raise ValueError(
            f"the reference set is empty: of its {len(documents)} records none has a token that could count (a text "
            f"needs two tokens, an answer needs a prompt before it). It was read from {_name(reference.source)}"
        )
    return Loaded(items, np.array(documents, np.uint64), positions, left_out, store.fingerprint if store else None)


def as_store(source: object) -> TokenStore | None:
    """Return ``source`` as a prepared pool if it is one or the path of one, else None."""
    if isinstance(source, TokenStore):
        return source
    if isinstance(source, (str, Path)) and (Path(source) / MANIFEST).is_file():
        return TokenStore(source)
    return None


def loader_batches(loader: DataLoader) -> list[object]:
    """Return the batches of an existing ``DataLoader``, which must be the same in every pass over it."""
    sampler = loader.sampler
    if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)):
        raise ValueError(
            f"the reference DataLoader shuffles or shares out its rows ({type(sampler).__name__}): its batches would "
            "differ between ranks and after a resume: make it with shuffle=False and without a sampler"
        )
    with private_draws() as seed:
        seed(0)
        batches = list(loader)
    if not batches:
        raise ValueError("the reference set is empty: its DataLoader yields no batch")
    return batches


def _drawn(size: int, reference: ReferenceSet) -> list[int]:
    """Return the positions of up to ``max_examples`` of ``size`` examples, ascending."""
    if reference.max_examples is None or size <= reference.max_examples:
        return list(range(size))
    order = torch.randperm(size, generator=generator_for(reference.seed, 0, "reference"))
    return sorted(order[: reference.max_examples].tolist())


def _records(source: object, reference: ReferenceSet) -> Iterator[Numbered]:
    """Yield the records to use, each with its position in the source."""
    if isinstance(source, (str, Path)):
        yield from _reservoir(enumerate(read_records(source)), reference)
        return
    dataset = check_map_style(source, "the reference set")
    drawn = _drawn(len(dataset), reference)
    for first in range(0, len(drawn), RECORDS_PER_BATCH):
        ids = drawn[first : first + RECORDS_PER_BATCH]
        with private_draws() as seed:  # random draws must be the same on all ranks, and after a resume
            records = fetch(dataset, ids, candidate_seeds(ids), seed)
        yield from zip(ids, records, strict=True)


def _reservoir(records: Iterable[Numbered], reference: ReferenceSet) -> Iterator[Numbered]:
    """Yield up to ``max_examples`` records of a stream, every one equally likely, in their order."""
    if reference.max_examples is None:
        yield from records
        return
    generator = generator_for(reference.seed, 0, "reference stream")
    kept: list[Numbered] = []
    for position, record in records:
        if position < reference.max_examples:
            kept.append((position, record))
            continue
        slot = int(torch.randint(position + 1, (), generator=generator))
        if slot < reference.max_examples:
            kept[slot] = (position, record)
    yield from sorted(kept, key=lambda pair: pair[0])


def _encode(
    records: Iterator[Numbered], reference: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None"
) -> Iterator[tuple[int, Encoded]]:
    """Yield each record's position, and its tokens with a mask of those that count."""
    while part := list(itertools.islice(records, RECORDS_PER_BATCH)):
        contents = [_content(record, reference, position) for position, record in part]
        texts = [content for content in contents if isinstance(content, str)]
        pairs = [content for content in contents if isinstance(content, _Answered)]
        encoded: dict[type, Iterator[Encoded]] = {Encoded: (one for one in contents if isinstance(one, Encoded))}
        if tokenizer is not None:
            encoded |= {str: iter(encode_texts(tokenizer, texts)), _Answered: iter(encode_answers(tokenizer, pairs))}
        elif texts or pairs:
            raise ValueError(
                f"the reference set ({_name(reference.source)}) holds text, but the tokenizer that made the pool is "
                "not known: pass it to SelectionDataModule, or to SelectionDataModule.wrap, as tokenizer= (a name, a "
                "path or a tokenizer), or give the reference as input_ids"
            )
        for (position, _), content in zip(part, contents, strict=True):
            yield position, next(encoded[type(content)])


def _content(record: object, reference: ReferenceSet, position: int) -> Encoded | _Answered | str:
    """Return the tokens or text of a record."""
    where = f"record {position} of the reference set ({_name(reference.source)})"
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise TypeError(f"expected {where} as a string or a dict, got {type(record).__name__}")
    names = {role: reference.columns.get(role, role) for role in ("input_ids", "prompt", "answer", "text")}
    if names["input_ids"] in record:
        return _ready(record, names["input_ids"], where)
    if names["prompt"] in record and names["answer"] in record:
        prompt, answer = (_text(record[names[role]], names[role], where) for role in ("prompt", "answer"))
        return _Answered(prompt + reference.separator, answer)
    if names["text"] in record:
        text = _text(record[names["text"]], names["text"], where)
        return _last_word(text) if reference.answer == "last_word" else text
    raise ValueError(
        f"expected {where} to have {names['text']!r}, {names['prompt']!r} and {names['answer']!r}, or "
        f"{names['input_ids']!r}, got the columns {sorted(map(str, record))}: name yours, as in "
        'ReferenceSet(source, columns={"text": "content"})'
    )


def _ready(record: Mapping, column: str, where: str) -> Encoded:
    """Return the tokens of a record of ready ids, without those that its attention mask hides."""
    tokens, labels = token_row({"input_ids": record[column], "labels": record.get("labels")}, where)
    mask = record.get("attention_mask")
    seen = np.ones(len(tokens), bool) if mask is None else np.asarray(mask) != 0
    if seen.shape != tokens.shape:
        raise ValueError(f"expected attention_mask of {where} to have {len(tokens)} entries, got shape {seen.shape}")
    tokens, labels = tokens[seen], labels[seen]
    if len(tokens) and tokens.min() < 0:
        raise ValueError(
            f"expected input_ids of {where} as token ids of 0 or more, got {tokens.min()}: mask tokens that should not "
            f"count in labels, by {IGNORE_INDEX}"
        )
    counts = labels != IGNORE_INDEX
    if (wrong := labels[counts & (labels != tokens)]).size:
        raise ValueError(
            f"expected labels of {where} to be its input_ids, or {IGNORE_INDEX} where no loss is taken, got {wrong[0]}:"
            " losses shift labels themselves, and leave out no other value"
        )
    return Encoded(tokens, counts)


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text in column {column!r} of {where}, got {type(value).__name__}")
    return str(value)  # numpy's strings too become plain ones


def _last_word(text: str) -> Encoded | _Answered:
    """Return the text before the last word, and that word with the white space before it; a lone word is no answer."""
    text = text.rstrip()
    words = text.rsplit(maxsplit=1)
    if len(words) < 2:
        return Encoded(np.empty(0, np.int64), np.empty(0, bool))
    prompt = text[: len(text) - len(words[-1])].rstrip()
    return _Answered(prompt, text[len(prompt) :])


def _cut(encoded: Encoded, longest: int | None, record: int) -> list[Item]:
    """Return the examples of one record, none longer than ``longest`` tokens.

    Where every token counts, all of them are kept, in several pieces; where only some count, the tokens before them
    are context, and the nearest of these matter most.
    """
    tokens, counts = encoded
    labels = np.where(counts, tokens, IGNORE_INDEX)
    if longest is None or len(tokens) <= longest:
        return [Item(tokens, labels, record)]
    if not counts.all():
        return [Item(tokens[-longest:], labels[-longest:], record)]
    starts = range(0, len(tokens), longest)
    return [Item(tokens[i : i + longest], labels[i : i + longest], record) for i in starts]


def _name(source: object) -> str:
    if isinstance(source, (str, Path)):
        return repr(str(source))
    if isinstance(source, Sequence):
        return f"a {type(source).__name__} of {len(source)}"
    return f"a {type(source).__name__}"
