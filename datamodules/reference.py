"""The reference set, which selection aims to improve: read from files, pools, lists and datasets."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from liveselect.datamodules import records
from liveselect.datamodules.batching import Item
from liveselect.datamodules.lm_eval_tasks import is_task_file, read_task
from liveselect.datamodules.pools.encoding import Encoded, encode_answers, encode_chats, encode_texts
from liveselect.datamodules.pools.pool_files import MANIFEST, hash_tokens
from liveselect.datamodules.pools.readers import whole_characters
from liveselect.datamodules.pools.sources import read_records
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows.columns import by_role, is_array
from liveselect.datamodules.rows.draws import candidate_seeds, fetch, private_draws
from liveselect.datamodules.rows.token_rows import FOR_MASKS, WEIGHTS, check_map_style, masks_of, token_row
from liveselect.grammar import IGNORE_INDEX
from liveselect.seeding import generator_for

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

RECORDS_PER_BATCH = 1024  # read and tokenised at once
ROLES = ("input_ids", "prompt", "answer", "text", "subtask", "messages", "choices")
DESCRIPTIONS = {
    *("_id", "doc_id", "id", "idx", "index", "record", "uid", "uuid", "hash", "length", "name", "path", "file"),
    *("url", "author", "date", "created", "timestamp", "meta", "metadata", "title", "lang", "language"),
    *("source", "dataset", "domain", "group", "category", "subject", "topic", "task", "split", "subset"),
}
"""Fields that only describe a record: nobody expects an effect of them."""

Numbered = tuple[int, object]
"""A record, with its position in the source."""


@dataclass
class ReferenceSet:
    """The source of a reference set, and how its records become examples.

    The source may be the path of a prepared pool; a file, folder, pattern, ``datasets`` folder or ``hub:NAME`` with
    records; the YAML file of a task of the LM Evaluation Harness; a list of strings or dicts; a map-style dataset; a
    ``DatasetDict`` with ``split``; or a ``DataLoader``, whose batches are used unchanged. A record is one of these:

    - ``text``: every token counts; a text longer than ``max_length`` is cut into several examples.
    - ``prompt`` and ``answer``: only the tokens of the answer count; a long prompt loses its beginning, and so does,
      with a warning, an answer that is too long itself.
    - ``prompt`` and ``completion``: the same. Where the answer is a list of texts, each is an example.
    - a question (``prompt``, ``question``, ``query``, ``ctx``), its ``choices``, and in ``answer`` (``answerKey``,
      ``label``) the position, letter or text of the right one: the text of that choice is the answer, after a space.
    - ``messages``: a chat, written by the tokenizer's chat template; the assistant's turns count.
    - ``input_ids`` and, if given, ``labels`` and ``attention_mask``.

    A record may say in ``subtask`` which part of a benchmark it is of (a string or a number); then all of them must.
    :class:`~liveselect.influence.LESSInfluence` takes the best of the subtasks. Others make no difference between them.

    Records without text (null) are left out with a warning. All records count alike: a ``weight`` is refused.

    Args:
        source: the source of the records.
        answer: ``last_word`` makes the last word of each ``text`` its answer, as LAMBADA is scored.
        max_examples: use this many examples, drawn with ``seed``; all by default.
        separator: text between prompt and answer.
        columns: names of the columns, where they are not called ``text``, ``prompt``, ``answer``, ``input_ids``,
            ``subtask``, ``messages``, ``choices``: for example ``{"text": "content"}``.
        max_length: longest example in tokens; by default the block size of the pool.
        seed: seed of the draw.
        split: of a ``DatasetDict``, or of the data set of a task.
        weight: what the set counts in a mixture of several, ``reference={"name": ReferenceSet(...), ...}``: the
            reference loss is the mean of their mean losses with these weights.
    """

    source: Any
    answer: Literal["all", "last_word"] = "all"
    max_examples: int | None = None
    separator: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    seed: int = 0
    split: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"expected the weight of a reference set as a positive number, got {self.weight}")
        self.source = _split_of(self.source, self.split)
        if self.answer not in ("all", "last_word"):
            raise ValueError(f"expected answer='all' or 'last_word', got {self.answer!r}")
        for name, value, least in (("max_examples", self.max_examples, 1), ("max_length", self.max_length, 2)):
            if value is not None and value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")
        if unknown := set(self.columns) - set(ROLES):
            raise ValueError(f"expected columns to name those for {', '.join(ROLES)}, got {sorted(unknown)}")
        given: dict[str, object] = {"answer": self.answer != "all", "max_examples": self.max_examples}
        given |= {"separator": self.separator, "columns": self.columns, "max_length": self.max_length}
        if isinstance(self.source, DataLoader) and any(given.values()):
            names = ", ".join(name for name, value in given.items() if value)
            raise ValueError(
                f"expected a DataLoader alone, whose batches are used unchanged, got {names} too, without effect on "
                "it: pass its dataset instead, or leave these out"
            )

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
        remarks: what else was mended or had no effect, for warnings.
        fingerprint: fingerprint of the prepared pool that it was read from, or None.
    """

    items: list[Item]
    documents: np.ndarray
    positions: list[int]
    left_out: int = 0
    fingerprint: str | None = None
    remarks: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What was found in the records of a reference set.

    Attributes:
        used: roles that some record has.
        unused: fields without effect, with the number of records that have them.
        mended: texts with halves of surrogate pairs.
        shortened: answers too long for an example.
        subtasks: their numbers, by name, in the order in which they were found.
        without_subtask: whether a record has none.
    """

    used: set[str] = field(default_factory=set)
    unused: Counter[str] = field(default_factory=Counter)
    mended: int = 0
    shortened: int = 0
    subtasks: dict[str, int] = field(default_factory=dict)
    without_subtask: bool = False

    def check(self, reference: ReferenceSet) -> None:
        """Raise ValueError when a setting had no effect on any record."""
        for setting, role, given in (
            ("separator", "prompt", reference.separator),
            ("answer='last_word'", "text", reference.answer == "last_word"),
            *((f"columns[{role!r}]={name!r}", role, True) for role, name in reference.columns.items()),
        ):
            if given and role not in self.used:
                raise ValueError(
                    f"{setting} has no effect: no record of the reference set ({_name(reference.source)}) is read by "
                    f"its {reference.columns.get(role, role)!r}. Leave it out, or name columns that the records have"
                )

    def remarks(self, records: int, longest: int | None) -> tuple[str, ...]:
        """Return what to warn of."""
        found = []
        if self.shortened:
            found.append(
                f"{self.shortened} of {records} reference answers do not fit into the {longest} tokens of an example: "
                "only their last tokens count. Pass ReferenceSet(max_length=...), prepare longer blocks or shorten them"
            )
        if self.mended:
            found.append(
                f"{self.mended} of {records} reference records hold halves of surrogate pairs (a cut emoji), which no "
                "tokenizer takes: U+FFFD stands in their place"
            )
        if self.unused:
            names = ", ".join(f"{name!r} ({count})" for name, count in sorted(self.unused.items()))
            found.append(
                f"fields of the reference records have no effect, with the number of records that have them: {names}. "
                "Leave them out, or name what is meant with ReferenceSet(columns=...)"
            )
        return tuple(found)


class _Answered(NamedTuple):
    """A text of which only the end counts."""

    prompt: str
    answer: str


class _Chat(NamedTuple):
    """A chat, and the first of its messages whose turns count."""

    messages: list[records.Message]
    first: int


_Content = Encoded | _Answered | _Chat | str


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
    if store is not None:
        store.verify()
    every = _records(reference.source if store is None else store, reference)
    longest = reference.max_length or max_length
    items: list[Item] = []
    documents: list[int] = []
    positions: list[int] = []
    left_out = 0
    seen = _Seen()
    for position, encoded, subtask in _encode(every, reference, tokenizer, seen):
        parts = [replace(item, subtask=subtask) for item in _cut(encoded, longest, len(documents)) if item.targets]
        documents.append(hash_tokens(encoded.input_ids))
        positions.append(position)
        left_out += not parts
        seen.shortened += bool(parts) and _is_shortened(encoded, longest)
        items += parts
    items = [items[i] for i in _drawn(len(items), reference)]
    seen.check(reference)
    if not items:
        raise ValueError(
            f"the reference set is empty: of its {len(documents)} records none has a token that could count (a text "
            f"needs two tokens, an answer needs a prompt before it). It was read from {_name(reference.source)}"
        )
    fingerprint, remarks = store.fingerprint if store else None, seen.remarks(len(documents), longest)
    return Loaded(items, np.array(documents, np.uint64), positions, left_out, fingerprint, remarks)


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
        path = Path(source).expanduser()
        found = read_task(path, reference.split) if is_task_file(path) else read_records(source)
        yield from _reservoir(enumerate(found), reference)
        return
    dataset = check_map_style(source, "the reference set", "Read its records into a list, list(stream)")
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
    every: Iterator[Numbered], reference: ReferenceSet, tokenizer: "PreTrainedTokenizerBase | None", seen: _Seen
) -> Iterator[tuple[int, Encoded, int | None]]:
    """Yield each record's position, its tokens with a mask of those that count, and the number of its subtask.

    A record with several right answers comes once for each.
    """
    while part := list(itertools.islice(every, RECORDS_PER_BATCH)):
        rows = [
            (position, record, content)
            for position, record in part
            for content in _contents(record, reference, position, seen)
        ]
        contents = [content for _, _, content in rows]
        texts = [content for content in contents if isinstance(content, str)]
        pairs = [content for content in contents if isinstance(content, _Answered)]
        chats = [content for content in contents if isinstance(content, _Chat)]
        encoded: dict[type, Iterator[Encoded]] = {Encoded: (one for one in contents if isinstance(one, Encoded))}
        if tokenizer is not None:
            encoded |= {str: iter(encode_texts(tokenizer, texts)), _Answered: iter(encode_answers(tokenizer, pairs))}
            encoded |= {_Chat: iter(encode_chats(tokenizer, chats))}
        elif texts or pairs or chats:
            raise ValueError(
                f"the reference set ({_name(reference.source)}) holds text, but the tokenizer that made the pool is "
                "not known: pass it to SelectionDataModule, or to SelectionDataModule.wrap, as tokenizer= (a name, a "
                "path or a tokenizer), or give the reference as input_ids"
            )
        for position, record, content in rows:
            yield position, next(encoded[type(content)]), _subtask(record, reference, position, seen)


def _subtask(record: object, reference: ReferenceSet, position: int, seen: _Seen) -> int | None:
    """Return the number of a record's subtask; raise ValueError where others name theirs and it does not."""
    column = reference.columns.get("subtask", "subtask")
    name = record.get(column) if isinstance(record, Mapping) else None
    if _is_missing(name):
        if seen.subtasks:
            raise ValueError(
                f"expected record {position} of the reference set ({_name(reference.source)}) to name its subtask in "
                f"{column!r}, as records before it do: name all or none"
            )
        seen.without_subtask = True
        return None
    if seen.without_subtask:
        raise ValueError(
            f"record {position} of the reference set ({_name(reference.source)}) names its subtask in {column!r}, and "
            "records before it do not: name all or none"
        )
    seen.used.add("subtask")
    return seen.subtasks.setdefault(str(name), len(seen.subtasks))


def _contents(record: object, reference: ReferenceSet, position: int, seen: _Seen) -> list[_Content]:
    """Return the tokens or texts of a record, several where it has several answers; no tokens where text is missing."""
    where = f"record {position} of the reference set ({_name(reference.source)})"
    if isinstance(record, str) or record is None:
        record = {reference.columns.get("text", "text"): record}
    if is_array(record) or (isinstance(record, tuple) and record and all(map(is_array, record))):
        row = by_role(record, None, where)
        record = {reference.columns.get("input_ids", "input_ids"): row.pop("input_ids"), **row}
    if not isinstance(record, Mapping):
        raise TypeError(f"expected {where} as a string or a dict, got {type(record).__name__}")
    names = {role: reference.columns.get(role, role) for role in ROLES}
    if names["input_ids"] not in record:
        if (chat := records.chat_of(record, names, where)) is not None:
            messages, first, read = chat
            _look_at_others(record, sorted(read), names["subtask"], where, seen)
            seen.used.update(role for role, name in names.items() if name in read)
            return [_Chat(messages, first)]
        if records.is_choice(record, names):
            prompt, answer, read = records.right_choice(record, names, where)
            _look_at_others(record, sorted(read), names["subtask"], where, seen)
            seen.used.update(role for role, name in names.items() if name in read)
            seen.used.add("prompt")
            joint = reference.separator or ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ")
            return [_Answered(prompt + joint, answer)]
    return _plain_contents(record, reference, names, where, seen)


def _plain_contents(
    record: Mapping, reference: ReferenceSet, names: dict[str, str], where: str, seen: _Seen
) -> list[_Content]:
    """Return the contents of a record of ids, of a text, or of a prompt with its answer."""
    if names["answer"] not in record and records.COMPLETION in record:
        names = {**names, "answer": records.COMPLETION}
    kinds: tuple[tuple[str, ...], ...] = (("input_ids",), ("prompt", "answer"), ("text",))
    there = [roles for roles in kinds if all(names[role] in record for role in roles)]
    if not there:
        raise ValueError(
            f"expected {where} to have {names['text']!r}, {names['prompt']!r} and {names['answer']!r}, "
            f"{names['messages']!r}, or {names['input_ids']!r}, got the columns {sorted(map(str, record))}: name "
            'yours, as in ReferenceSet(source, columns={"text": "content"})'
        )
    # a table of records of several kinds has nulls in the columns of the others
    kind = next((roles for roles in there if not any(_is_missing(record[names[role]]) for role in roles)), there[0])
    columns = [names[role] for role in kind]
    seen.used.update(kind)
    _look_at_others(record, columns, names["subtask"], where, seen)
    if any(_is_missing(record[column]) for column in columns):
        return [NOTHING]
    if kind == ("input_ids",):
        return [_ready(record, columns[0], where)]
    if kind == ("text",):
        text = _whole(_text(record[columns[0]], columns[0], where), seen)
        return [_last_word(text) if reference.answer == "last_word" else text]
    prompt = _whole(_text(record[columns[0]], columns[0], where), seen)
    answers = records.answers_of(record[columns[1]], prompt, columns[1], where)
    return [_Answered(prompt + reference.separator, _whole(answer, seen)) for answer in answers]


def _whole(text: str, seen: _Seen) -> str:
    """Return a text without halves of surrogate pairs, and note that it had some."""
    if text.isascii():
        return text
    mended = whole_characters(text)
    seen.mended += mended != text
    return mended


def is_splits(source: object) -> "TypeGuard[DatasetDict]":
    """Return whether a source is a ``DatasetDict``."""
    datasets = sys.modules.get("datasets")  # whoever passes one of its objects has imported it
    return datasets is not None and isinstance(source, datasets.DatasetDict)


def _split_of(source: object, split: str | None) -> Any:
    """Return the split of a mapping of data sets, such as a ``DatasetDict``; anything else as it is."""
    if not is_splits(source):
        if split is not None and not (isinstance(source, (str, Path)) and is_task_file(Path(source).expanduser())):
            raise ValueError(
                f"split={split!r} has no effect on {_name(source)}: pass a DatasetDict, or the file of a task; of a "
                "data set of the hub, hub:NAME:CONFIG:SPLIT"
            )
        return source
    names = list(source)
    if split is None and len(names) == 1:
        return source[names[0]]
    if split not in source:
        raise ValueError(
            f"expected the split of the reference set as one of {', '.join(map(repr, names))}, got {split!r}: "
            f"ReferenceSet(data, split={names[-1]!r})"
        )
    return source[split]


def _look_at_others(record: Mapping, columns: Sequence[str], subtask: str, where: str, seen: _Seen) -> None:
    """Note the fields of a record without effect; raise ValueError for a weight, or a mask of its tokens."""
    used = {*columns, subtask, *(("labels", "attention_mask") if columns == ["input_ids"] else ())}
    others = [str(name) for name, value in record.items() if name not in used and value is not None]
    if columns == ["input_ids"] and (masks := masks_of(record)):
        raise ValueError(f"{where} has the field {masks[0]!r}, {FOR_MASKS}")
    if weights := [name for name in others if name in WEIGHTS]:
        raise ValueError(
            f"{where} has the field {weights[0]!r}, which has no effect: all reference records count alike. Repeat "
            "records that should count more, or leave the field out"
        )
    seen.unused.update(name for name in others if name not in DESCRIPTIONS)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


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


NOTHING = Encoded(np.empty(0, np.int64), np.empty(0, bool))


def _last_word(text: str) -> Encoded | _Answered:
    """Return the text before the last word, and that word with the white space before it; a lone word is no answer."""
    text = text.rstrip()
    words = text.rsplit(maxsplit=1)
    if len(words) < 2:
        return NOTHING
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


def _is_shortened(encoded: Encoded, longest: int | None) -> bool:
    """Return whether an answer loses tokens, or the token before it that predicts its first."""
    lost = 0 if longest is None else len(encoded.input_ids) - longest
    return lost > 0 and not encoded.counts.all() and bool(encoded.counts[: lost + 1].any())


def _name(source: object) -> str:
    if isinstance(source, (str, Path)):
        return repr(str(source))
    if isinstance(source, Sequence):
        return f"a {type(source).__name__} of {len(source)}"
    return f"a {type(source).__name__}"
