"""``liveselect prepare``: turn sources of text into a pool of token blocks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liveselect.datamodules.pools.tokens import TokenStore

DESCRIPTION = """\
Turn sources of text into a pool: fixed-length blocks of token ids on disk, each traceable to its documents.
An interrupted command continues when it is repeated; the same sources and options always give the same pool.
"""

EXAMPLES = """\
a source is
  corpus.jsonl.gz, shard.parquet    a file: JSON Lines (.jsonl .ndjson .json, also .gz .zst .bz2), Parquet, else text
  data/                             a folder: its JSON Lines and Parquet files, its *.txt files, or what --include says
  'data/**/*.parquet'               a pattern
  saved/                            a folder written by datasets' save_to_disk
  hub:NAME[:CONFIG[:SPLIT]]         a data set of the Hugging Face hub (SPLIT is train by default)
each may be given a name: web=crawl/ books=books.parquet

examples
  liveselect prepare corpus.jsonl --out pool --tokenizer gpt2
  liveselect prepare code=src/ text=docs/ --include '*.py' --include '*.md' --out pool --tokenizer bpe:8192
  liveselect prepare hub:wikitext:wikitext-103-raw-v1 --out pool --tokenizer EleutherAI/pythia-160m --block-size 1024
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    result = argparse.ArgumentParser(
        prog="liveselect prepare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("sources", nargs="+", metavar="[NAME=]SOURCE", help="where the text is; see below")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the pool to make")
    add("--tokenizer", metavar="T", help="Hugging Face name or path, or bpe:N to train one of N tokens on the sources")
    add("--block-size", type=int, default=1024, metavar="N", help="tokens of a block (default: %(default)s)")
    add("--include", action="append", default=[], metavar="PATTERN", help="files to take from folders; may be repeated")
    add("--text-column", default="text", metavar="C", help="column with the text (default: %(default)s)")
    add("--ids-column", metavar="C", help="column with token ids, instead of text")
    add("--id-column", metavar="C", help="column that names each document (default: source, file and line)")
    add("--metadata", type=_names, metavar="C,C", help="other columns to keep, separated by commas (default: all)")
    add("--no-separator", dest="separate", action="store_false", help="put no end-of-text token after each document")
    add("--eos-id", type=int, metavar="N", help="the end-of-text token (default: the tokenizer's)")
    add("--vocab-size", type=int, metavar="N", help="largest token id plus one; for token ids without a tokenizer")
    undecodable = "text that is not UTF-8: stop, put U+FFFD, or drop the document (default: %(default)s)"
    add("--on-undecodable", choices=("error", "replace", "skip"), default="error", help=undecodable)
    invalid = "a malformed record, such as a broken line: stop, or leave it out and count it (default: %(default)s)"
    add("--on-invalid", choices=("error", "skip"), default="error", help=invalid)
    add("--clusters", type=int, metavar="K", help="sort the blocks into K clusters; more options: liveselect cluster")
    add("--embed", nargs="?", const="hashed", metavar="E", help="how clusters compare blocks; see liveselect cluster")
    add("--workers", type=int, metavar="N", help="processes that encode (default: one for each core)")
    add("--overwrite", action="store_true", help="replace a pool that was made from other sources or in another way")
    add("--quiet", action="store_true", help="show no progress")
    return result


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    settings = vars(parser().parse_args(argv))
    clusters, embed = settings.pop("clusters"), settings.pop("embed")

    from liveselect.cli.output import say

    if clusters is not None and clusters < 1:
        raise ValueError(f"expected --clusters of at least 1, got {clusters}")
    if embed is not None:
        from liveselect.datamodules.clusters.embedding import parse_form

        parse_form(embed)  # a mistake is reported now, not after the pool is made
    from liveselect.datamodules.pools.prepare import prepare

    try:
        store = prepare(**settings)
    except KeyboardInterrupt:
        sys.stderr.write("\nliveselect prepare: interrupted; the same command continues from here\n")
        return 130
    if not settings["quiet"]:
        say(summary(store))
    if clusters is None and embed is None:
        return 0

    from liveselect.cli import cluster

    options = [] if clusters is None else ["--clusters", str(clusters)]
    options += [] if embed is None else ["--embed", embed]
    options += [f"--{name}" for name in ("quiet", "overwrite") if settings[name]]
    return cluster.main([str(store.path), *options])


def summary(store: "TokenStore") -> str:
    """Return the contents of a pool as text."""
    manifest = store.manifest
    tokens = manifest["rows"] * manifest["block_size"]
    lines = [
        f"{store.path}",
        f"  {manifest['rows']} blocks of {manifest['block_size']} tokens ({tokens / 1e6:.1f}M), vocabulary of "
        f"{manifest['vocab_size']}, fingerprint {manifest['fingerprint']}",
    ]
    lines += [
        f"  {source['name']}: {source['documents']} documents, {source['tokens'] / 1e6:.1f}M tokens"
        for source in manifest["sources"]
    ]
    left_out = [f"{count} {reason}" for reason, count in manifest["counts"].items() if count]
    lines += [f"  documents left out or repaired: {', '.join(left_out)}"] if left_out else []
    return "\n".join(lines)
