"""Text to token ids: loading a tokenizer, training one, and encoding with the tokenizer in a pool."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liveselect.datamodules.pools.readers import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_BPE_TOKENS = 257  # every byte, and the end of text
SAMPLE_CHARACTERS = 32 << 20  # a BPE is trained on this many at the most: more take minutes and change few merges
PIECE_CHARACTERS = 1 << 20  # encoded at once: bounds the memory that a very long document takes
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


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
    """Return the Hugging Face tokenizer of a name or path; one that needs code of its own is refused, not asked about."""
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
        if file.is_file():
            from tokenizers import Tokenizer  # without transformers a worker starts in a tenth of the time

            fast = Tokenizer.from_file(str(file))
            fast.no_truncation()
            fast.no_padding()
            fast.encode_special_tokens = True
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
        pieces = [list(_pieces(text)) for text in texts]
        with _one_thread():
            encoded = iter(self._encode([piece for parts in pieces for piece in parts]) if pieces else [])
        return [np.concatenate([np.asarray(next(encoded), dtype=np.int64) for _ in parts]) for parts in pieces]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text between words, where tokens end anyway; tokens are unlikely to differ from those of the whole."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        window = text[start : start + PIECE_CHARACTERS]
        near_the_end = _BETWEEN_WORDS.finditer(window, PIECE_CHARACTERS - 4096)
        cut = max((match.start() for match in near_the_end), default=PIECE_CHARACTERS)
        yield window[:cut]
        start += cut
    yield text[start:]


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
