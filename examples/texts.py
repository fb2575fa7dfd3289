"""Write text that comes with Python, and a tokenizer for it, for the other examples to train on. No network.

    python examples/texts.py texts

makes texts/train/*.txt (source code), texts/reference/*.txt and texts/held_out/*.txt (prose of the reference manual),
and texts/tokenizer.
"""

import asyncio
import email
import sys
import unittest
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast


def main(folder):
    """Write everything into ``folder``."""
    for name in ("train", "reference", "held_out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for package in (asyncio, email, unittest):
        for file in Path(package.__file__).parent.glob("*.py"):
            text = file.read_text(encoding="utf-8")
            (folder / "train" / f"{package.__name__}-{file.stem}.txt").write_text(text, encoding="utf-8")
    for i, text in enumerate(topics.values()):
        part = "reference" if i % 2 else "held_out"
        (folder / part / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    bpe = ByteLevelBPETokenizer()
    files = [str(file) for file in sorted(folder.glob("*/*.txt"))]
    bpe.train(files, vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
