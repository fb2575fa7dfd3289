"""Text to token ids: loading a tokenizer, training one, and encoding with the tokenizer in a pool."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from liveselect.datamodules.pools.readers import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_BPE_TOKENS = 257  # every byte, and the end of text
SAMPLE_CHARACTERS = 32 << 20  # a BPE is trained on this many at the most: more take minutes and change few merges
PIECE_CHARACTERS = 1 << 20  # encoded at once: bounds the memory that a very long document takes
OVERLAP_CHARACTERS = 1 << 12  # of two pieces of a document, which are joined in its middle


def bpe_size(spec: str) -> int | None:
    """Return N of ``bpe:N``, or None when ``spec`` is the name or path of a tokenizer."""
    if not spec.startswith("bpe:"):
        return None
    size = spec.removeprefix("bpe:")
    if not size.isdigit() or int(size) < MIN_BPE_TOKENS:
        raise DataError(
            f"expected bpe:N with a vocabulary of N >= {MIN_BPE_TOKENS} (256 bytes and end of text), got {spec!r}"
        )
    return int(size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Return a byte-level BPE tokenizer trained on ``texts``; its vocabulary is smaller when they do not fill it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(spec: str | Path) -> "PreTrainedTokenizerBase":
    """Return the Hugging Face tokenizer of a name or path; one that needs code of its own is refused."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(spec), trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the tokenizer {str(spec)!r} could not be loaded ({reason}). Check the name and the connection, pass the "
            "path of a folder that holds a tokenizer, or train one on the sources with bpe:N (such as bpe:4096)"
        ) from error


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer so that a crash leaves either the whole folder or none."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def make_tokenizer(
    spec: str, folder: Path, sample: Callable[[int], list[str]], say: Callable[[str], None]
) -> tuple[Path, "PreTrainedTokenizerBase"]:
    """Load or train the tokenizer ``spec`` and save it below ``folder``; return its path, and the tokenizer.

    Args:
        spec: ``bpe:N``, or a Hugging Face name or path.
        folder: an existing folder.
        sample: maps a number of characters to texts of at most that length in all, to train on.
        say: shows a message before a long step.
    """
    size = bpe_size(spec)
    if size is None:
        tokenizer = load_tokenizer(spec)
        path = folder / f"tokenizer-{hash_texts([spec])}"
        save_tokenizer(tokenizer, path)
        return path, tokenizer
    texts = sample(SAMPLE_CHARACTERS)
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on: every document is empty. Check the text column")
    path = folder / f"tokenizer-{hash_texts([spec, version('tokenizers'), *texts])}"
    if path.is_dir():
        return path, load_tokenizer(path)
    say(f"training a BPE of {size} tokens on {sum(map(len, texts)) / 1e6:.1f}M characters")
    tokenizer = train_bpe(texts, size)
    save_tokenizer(tokenizer, path)
    return path, tokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the largest id that a tokenizer can make, plus one; ``len(tokenizer)`` is smaller where ids have gaps."""
    return max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))


def end_of_text_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id that separates documents, or None when the tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def hash_texts(texts: Iterable[str]) -> str:
    """Return a hash of a sequence of texts and their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class Encoder:
    """Turns texts into token ids with the tokenizer saved in a folder.

    Special tokens are neither added nor recognised: a text that contains ``<|endoftext|>`` is encoded as these
    characters, so that the separator in a pool marks ends of documents and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        self._fast: Tokenizer | None = None
        if file.is_file():
            import tokenizers  # without transformers a worker starts in a tenth of the time

            fast = tokenizers.Tokenizer.from_file(str(file))
            fast.no_truncation()
            fast.no_padding()
            fast.encode_special_tokens = True
            self._fast = fast
            self._encode = lambda texts: [
                encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)
            ]
        else:
            slow = load_tokenizer(folder)
            self._encode = lambda texts: slow(
                texts, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False
            )["input_ids"]

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids ``(n,)`` int64 of each text."""
        short = [text for text in texts if self._fast is None or len(text) <= PIECE_CHARACTERS]
        with _one_thread():
            encoded = iter(self._encode(short) if short else [])
            return [
                np.asarray(next(encoded), dtype=np.int64)
                if self._fast is None or len(text) <= PIECE_CHARACTERS
                else self._in_pieces(self._fast, text)
                for text in texts
            ]

    def _in_pieces(self, fast: "Tokenizer", text: str) -> np.ndarray:
        """Return the ids of a long text, of which ``PIECE_CHARACTERS`` are encoded at once.

        Each piece begins inside the one before it, and the tokens of the two are joined where both end a token: what a
        tokenizer puts before every text (SentencePiece: a space), and how it splits a word that was cut, stays outside.
        """
        overlap = min(OVERLAP_CHARACTERS, PIECE_CHARACTERS // 2)
        found = []
        start = begin = 0  # of a piece, and of its tokens that are taken
        piece = _tokens(fast, text, 0)
        while (stop := start + PIECE_CHARACTERS) < len(text):
            following = _tokens(fast, text, stop - overlap)
            joint = _joint(piece, following, stop - overlap // 2)
            if joint is None:  # no token ends there: a word of thousands of characters is one token
                return np.asarray(fast.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            found.append(piece.ids[(piece.starts >= begin) & (piece.ends <= joint)])
            piece, start, begin = following, stop - overlap, joint
        return np.concatenate([*found, piece.ids[piece.starts >= begin]])


class _Piece(NamedTuple):
    """The tokens ``(n,)`` of a part of a text, and the characters of the text at which each starts and ends."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def cuts(self) -> np.ndarray:
        """Return the characters, ascending, at which one token has ended and the next not begun."""
        ended = np.maximum.accumulate(self.ends)[:-1]
        return ended[self.starts[1:] >= ended]


def _tokens(fast: "Tokenizer", text: str, start: int) -> _Piece:
    encoding = fast.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False)
    starts, ends = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2).T + start
    return _Piece(np.asarray(encoding.ids, dtype=np.int64), starts, ends)


def _joint(piece: _Piece, following: _Piece, middle: int) -> int | None:
    """Return the character nearest to the ``middle`` of the overlap of two pieces at which both may be cut, or None."""
    shared = np.intersect1d(piece.cuts(), following.cuts())
    return int(shared[np.abs(shared - middle).argmin()]) if len(shared) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep ``tokenizers`` to the calling thread: units are encoded in parallel processes already."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
