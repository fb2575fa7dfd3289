"""The corpus: all sources and the recipe that turns them into a pool, read as one stream of documents."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from liveselect.datamodules.pools.integrity import hash_file
from liveselect.datamodules.pools.parts import Content, Document
from liveselect.datamodules.pools.readers import (
    ON_INVALID,
    ON_UNDECODABLE,
    DataError,
    OnInvalid,
    OnUndecodable,
    Reading,
    Record,
    RecordError,
    whole_characters,
)
from liveselect.datamodules.pools.sources import Source, describe_source, parts_of
from liveselect.datamodules.pools.tokenizers import bpe_size
from liveselect.datamodules.rows.token_rows import COUNTED, SEEN, UNCLEAR
from liveselect.grammar import IGNORE_INDEX

BESIDE_IDS = (*SEEN, *COUNTED, *UNCLEAR, "labels")
"""Columns that say which of the ids in another column are padding."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of a pool, besides the sources.

    Attributes:
        tokenizer: name or path of a Hugging Face tokenizer, or ``bpe:N`` to train one on the sources;
            it may be None with ready ids.
        block_size: T, tokens of a block.
        text_column: the column with the text.
        ids_column: a column with ready token ids; the text is then ignored.
        id_column: a column that identifies each document. By default documents are named by source, file and line.
        metadata: the other columns to keep. None keeps all, but beside ready ids neither the text nor other lists.
        separate: whether to put the end-of-text token after each document.
        eos_id: that token, where the tokenizer has none or another is wanted.
        vocab_size: every id is below it; required for ready ids without a tokenizer.
        on_undecodable: what to do with text that is not UTF-8: ``error``, ``replace`` or ``skip``.
        on_invalid: what to do with malformed records (a line that is no JSON object, a column that is missing or holds
            no text or ids, a file that is not text): ``error``, or ``skip``, which leaves them out and counts them.
    """

    tokenizer: str | None = None
    block_size: int = 1024
    text_column: str = "text"
    ids_column: str | None = None
    id_column: str | None = None
    metadata: tuple[str, ...] | None = None
    separate: bool = True
    eos_id: int | None = None
    vocab_size: int | None = None
    on_undecodable: OnUndecodable = "error"
    on_invalid: OnInvalid = "error"

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise DataError(
                f"expected blocks of at least 2 tokens, got block_size={self.block_size}: a single token leaves "
                "nothing to predict"
            )
        if self.on_undecodable not in ON_UNDECODABLE:
            raise DataError(f"expected on_undecodable to be one of {ON_UNDECODABLE}, got {self.on_undecodable!r}")
        if self.on_invalid not in ON_INVALID:
            raise DataError(f"expected on_invalid to be one of {ON_INVALID}, got {self.on_invalid!r}")
        if self.ids_column is None and self.tokenizer is None:
            raise DataError(
                "text needs a tokenizer: pass a Hugging Face name, a path, or bpe:N to train one (bpe:4096)"
            )
        if self.ids_column is not None and self.tokenizer is None and self.vocab_size is None:
            raise DataError(
                "ready token ids need the tokenizer that made them, or vocab_size (the largest id plus one)"
            )
        if self.tokenizer is not None and bpe_size(self.tokenizer) is not None and self.ids_column is not None:
            raise DataError("a tokenizer cannot be trained on ready token ids: name the one that made them")

    @property
    def content_column(self) -> str:
        """The column with the text or the ready ids."""
        return self.ids_column or self.text_column

    def reading(self) -> Reading:
        """Return which columns of the records to read, and how."""
        required = [self.content_column, *([self.id_column] if self.id_column else [])]
        beside = BESIDE_IDS if self.ids_column is not None else ()
        keep = None if self.metadata is None else [*required, *beside, *self.metadata]
        return Reading(required, keep, self.on_undecodable, self.on_invalid)


class Corpus:
    """Sources under a recipe.

    Args:
        sources: in the order of their documents in the pool.
        recipe: which columns to read, and how they become a pool.

    Attributes:
        size: bytes of all sources.
        settings: an identification of sources and recipe, for comparing two runs.
        tally: numbers of documents left out or repaired, complete once :meth:`documents` was read to its end.
    """

    def __init__(self, sources: Sequence[Source], recipe: Recipe) -> None:
        if not sources:
            raise DataError("expected at least one source: a file, a folder, a pattern, or hub:NAME")
        names = Counter(source.name for source in sources)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise DataError(f"several sources are called {repeated[0]!r}: give each its own name with name=location")
        self.sources, self.recipe = list(sources), recipe
        self._parts = [(source, parts_of(source)) for source in sources]
        self.size = sum(part.size for _, parts in self._parts for part in parts)
        self.tally: Counter[str] = Counter()
        self.settings = {
            "sources": [describe_source(source, parts) for source, parts in self._parts],
            **{name: value for name, value in asdict(recipe).items() if (name, value) != ("on_invalid", "error")},
            "metadata": None if recipe.metadata is None else list(recipe.metadata),
            "tokenizer_files": _identity(recipe.tokenizer),
        }

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty, in order."""
        reading = self.recipe.reading()
        self.tally = reading.tally
        before = 0
        for source, parts in self._parts:
            for part in parts:
                for record in part.read(reading):
                    document = None
                    with reading.tolerant():
                        document = self._document(source, record, before)
                        reading.tally["empty"] += document is None
                    if document is not None:
                        yield document
                before += part.size

    def _document(self, source: Source, record: Record, before: int) -> Document | None:
        content = self._content(record)
        if content is None:
            return None
        name = self._document_id(source, record)
        metadata = json.dumps(self._metadata(record), default=_plain)
        return Document(source.name, name, record.where, content, metadata, before + record.done)

    def sample(self, characters: int) -> list[str]:
        """Return the beginnings of all sources and their files, in equal shares of at most ``characters`` in all.

        Sources and files shorter than their share leave the rest of it to the later ones.
        """
        texts: list[str] = []
        for index, (_, parts) in enumerate(self._parts):
            for_source = characters // (len(self._parts) - index)
            for position, part in enumerate(parts):
                for_part = for_source // (len(parts) - position)
                reading = self.recipe.reading()
                for record in part.read(reading):
                    if for_part <= 0:
                        break
                    text = ""
                    with reading.tolerant():
                        text = str(self._content(record) or "")[:for_part]
                    texts.append(text)
                    for_part -= len(text)
                    for_source -= len(text)
                    characters -= len(text)
        return texts

    def _content(self, record: Record) -> Content | None:
        """Return the text or ids of a record, or None when it is empty."""
        column = self.recipe.content_column
        content = record.values[column]
        if self.recipe.ids_column is not None:
            if content is not None and not isinstance(content, (list, np.ndarray)):
                raise RecordError(
                    f"{record.where}: expected a list of token ids in column {column!r}, got {content!r:.60}"
                )
            return None if content is None or not len(content) else self._without_padding(record, content)
        if content is not None and not isinstance(content, str):
            kind = type(content).__name__
            raise RecordError(
                f"{record.where}: expected text in column {column!r}, got {kind}. Name the column with the text, or "
                "for ready token ids pass their column as ids_column (--ids-column)"
            )
        return content if content and not content.isspace() else None

    def _without_padding(self, record: Record, ids: list[int] | np.ndarray) -> list[int] | np.ndarray | None:
        """Return ready ids without those that a mask or labels beside them hide; None where nothing is left.

        A pool has neither: every token of its blocks is seen and carries loss.
        """
        beside = {name: _beside(record, name, len(ids)) for name in BESIDE_IDS}
        if all(values is None for values in beside.values()):
            return ids
        try:
            tokens = np.asarray(ids)
        except ValueError:  # lists of unequal lengths
            return ids
        if tokens.ndim != 1:
            return ids  # whoever encodes it says what is wrong, as without a mask
        seen = np.ones(len(tokens), bool)
        for name, values in beside.items():
            if values is None:
                continue
            if name in SEEN:
                seen &= values != 0
            elif name in UNCLEAR:
                if values.min() != values.max():
                    raise RecordError(
                        f"{record.where}: {name!r} has 1 for padding in some tools, and for tokens in others: call it "
                        "'attention_mask', with 1 for tokens and 0 for padding, or cut the padding off"
                    )
            else:
                seen &= _not_padding(record, name, tokens, values, seen)
        if seen.all():
            return ids
        self.tally["padded"] += 1
        return tokens[seen] if seen.any() else None

    def _metadata(self, record: Record) -> dict[str, object]:
        recipe = self.recipe
        used = {recipe.content_column, recipe.id_column}
        values = {name: value for name, value in record.values.items() if name not in used}
        if recipe.metadata is not None:
            return {name: value for name, value in values.items() if name in recipe.metadata}
        if recipe.ids_column is None:
            return values
        values.pop(recipe.text_column, None)
        return {name: value for name, value in values.items() if not isinstance(value, (list, np.ndarray))}

    def _document_id(self, source: Source, record: Record) -> str:
        column = self.recipe.id_column
        if column is None:
            return whole_characters(f"{source.name}/{record.key}")  # names of files may be no UTF-8
        if record.values[column] is None:
            raise RecordError(f"{record.where}: the id column {column!r} is empty; choose another, or none")
        return str(record.values[column])


def _not_padding(record: Record, name: str, tokens: np.ndarray, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return which ``tokens (n,)`` are no padding by their labels, or by a mask of the loss; of the ``seen (n,)`` ones.

    Raises:
        RecordError: they hide more than padding, and a pool cannot keep that.
    """
    carries = values != (IGNORE_INDEX if name == "labels" else 0)
    if name == "labels" and (values != tokens)[carries].any():
        raise RecordError(
            f"{record.where}: the labels are neither the token ids nor {IGNORE_INDEX}, and a pool has no labels: "
            "remove them (losses shift labels themselves), or pass the rows as a map-style dataset"
        )
    kept = _until_the_last(carries)
    first = int((carries & seen & kept).argmax())
    if first > 1 and (tokens[:first] == tokens[0]).all():  # padding on the left
        kept[:first] = False
    shown = seen & kept
    if (shown & ~carries)[int(shown.argmax()) + 1 :].any():
        hiding = f"labels of {IGNORE_INDEX} hide" if name == "labels" else f"zeros of {name!r} hide"
        raise RecordError(
            f"{record.where}: {hiding} tokens before others, such as those of a prompt, and in a pool every token "
            f"carries loss: remove {'the labels' if name == 'labels' else repr(name)} to train on all of them, or pass "
            "the rows as a map-style dataset with labels, which keeps them"
        )
    return kept


def _beside(record: Record, name: str, length: int) -> np.ndarray | None:
    """Return the column that says something about each of ``length`` ids, or None without one."""
    value = record.values.get(name)
    if not isinstance(value, (list, np.ndarray)):  # a label of the whole document is metadata
        return None
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.empty(0, object)
    is_mask = name != "labels"
    if found.shape != (length,) or found.dtype.kind not in ("iubf" if is_mask else "iub"):
        raise RecordError(
            f"{record.where}: expected {name!r} as one integer for each of the {length} token ids, got "
            f"{str(value)[:60]}: mend or remove it"
        )
    if is_mask and not ((found == 0) | (found == 1)).all():
        raise RecordError(
            f"{record.where}: expected {name!r} to hold 0 and 1 only, got {str(value)[:60]}: a pool weighs no tokens; "
            "mend or remove it"
        )
    return found


def _until_the_last(marks: np.ndarray) -> np.ndarray:
    """Return which of ``marks (n,)`` stand before or at the last that is set."""
    return np.logical_or.accumulate(marks[::-1])[::-1]


def _plain(value: object) -> object:
    """Return a metadata value in a form that JSON has; binary data (images, sound) is dropped."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if isinstance(value, (bytes, bytearray)) else str(value)


def _identity(tokenizer: str | None) -> dict[str, str] | None:
    """Return the hashes of the files of a tokenizer that is given by its path."""
    if tokenizer is None or not Path(tokenizer).is_dir():
        return None
    files = sorted(file for file in Path(tokenizer).iterdir() if file.is_file() and "token" in file.name)
    return {file.name: hash_file(file) for file in files}
