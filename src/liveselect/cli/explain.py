"""``liveselect explain``: why a candidate was chosen or not."""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from liveselect.cli.report import RUN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from liveselect.datamodules.pools.tokens import TokenStore

DESCRIPTION = """\
Show what every round of a run decided about one candidate: its score, bonus and noise, its rank and the threshold, the
influence that was measured, and the reason of the decision.

  liveselect explain RUN --top 10            the candidates that the last round with scores chose first
  liveselect explain RUN 1234                one candidate, by its row id in the pool
  liveselect explain RUN --text "dark matter"    candidates whose text holds these words, in any case of letters
"""

MATCHES_SHOWN = 10
ROWS_DECODED = 1024
"""Rows of the pool that are decoded at a time, in the search for a text."""
CHARACTERS_SHOWN = 70


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="liveselect explain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument("id", type=int, nargs="?", metavar="ID", help="row id of the candidate in the pool")
    parser.add_argument("--top", type=int, metavar="N", help="list the N candidates that were chosen first")
    parser.add_argument("--text", metavar="WORDS", help="find candidates by a part of their text")
    parser.add_argument("--pool", type=Path, help="the prepared pool (default: the one that the run's file names)")
    arguments = parser.parse_args(argv)
    if sum(given is not None for given in (arguments.id, arguments.top, arguments.text)) != 1:
        parser.error("expected one of ID, --top N and --text WORDS")
    if arguments.top is not None and arguments.top < 1:
        parser.error(f"argument --top: expected at least 1, got {arguments.top}")

    if arguments.top is not None:
        _list_top(arguments.run, arguments.top, arguments.pool)
    elif arguments.text is not None:
        return _explain_text(arguments.run, arguments.text, arguments.pool)
    else:
        _explain(arguments.run, arguments.id, arguments.pool)
    return 0


def _explain(run: Path, candidate: int, pool: Path | None) -> None:
    from liveselect.cli.output import say
    from liveselect.decisions import find_decisions, lacking_rounds
    from liveselect.decisions.explain import explain, lines_about

    fates = explain(run, candidate)
    store = _store(run, pool)
    for line in lines_about(candidate, fates, lacking_rounds(find_decisions(run))):
        say(line)
    say("to see its text, too, add --pool POOL" if store is None else f"\n{_text(store, candidate)}")


def _list_top(run: Path, count: int, pool: Path | None) -> None:
    from liveselect.cli.output import say
    from liveselect.decisions.top import top_chosen

    index, rows = top_chosen(run, count)
    texts, store = dict(_recorded(run)), _store(run, pool)
    say(f"what round {index} chose first, the highest scores on top")
    say(f"{'id':>10}  {'score':>10}  {'influence':>10}  {'group':<16}  text")
    for row in rows:
        text = texts.get(row["id"], "") if store is None else _text(store, row["id"])
        score, influence = ("-" if row[name] is None else f"{row[name]:.4g}" for name in ("score", "influence"))
        say(f"{row['id']:>10}  {score:>10}  {influence:>10}  {row['group'][:16]:<16}  {_short(text)}")
    say("why one of them: liveselect explain RUN ID" + ("; --pool POOL shows all texts" if store is None else ""))


def _explain_text(run: Path, words: str, pool: Path | None) -> int:
    """Explain the only candidate whose text holds the words, or list the first ones; the status is 1 for none."""
    from liveselect.cli.output import say

    store = _store(run, pool)
    texts = _recorded(run) if store is None else _of_pool(store)
    found: dict[int, str] = {}
    for candidate, text in texts:
        if words.lower() in text.lower():
            found.setdefault(candidate, text)
        if len(found) > MATCHES_SHOWN:
            break
    if len(found) == 1:
        _explain(run, next(iter(found)), pool)
        return 0
    where = "the examples that the run recorded; --pool POOL searches all" if store is None else "the pool"
    if not found:
        say(f"no text with {words!r} among {where}")
        return 1
    for candidate, text in list(found.items())[:MATCHES_SHOWN]:
        begin = max(0, text.lower().index(words.lower()) - CHARACTERS_SHOWN // 3)
        say(f"{candidate:>10}  {_short(text[begin:])}")
    more = " and more" if len(found) > MATCHES_SHOWN else ""
    say(f"{min(len(found), MATCHES_SHOWN)}{more} candidates hold {words!r}, among {where}: liveselect explain RUN ID")
    return 0


def _recorded(run: Path) -> Iterator[tuple[int, str]]:
    """Yield the candidates whose texts are in the run's ledger."""
    from liveselect.decisions import find_decisions
    from liveselect.ledger import Ledger

    file = find_decisions(run).parent / "ledger.jsonl"
    for record in Ledger.read(file).rounds if file.is_file() else ():
        for example in record.examples:
            yield example.id, example.text


def _store(run: Path, pool: Path | None) -> "TokenStore | None":
    """Return the pool of a run: the one that is named, or that its file names; None where there is none."""
    from liveselect.cli.replay import own_config
    from liveselect.datamodules.pools.tokens import TokenStore
    from liveselect.decisions import find_decisions

    if pool is not None:
        return TokenStore(pool)
    import yaml

    config = own_config(find_decisions(run), run)
    if config is None:
        return None
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    try:
        return TokenStore(Path(settings["data"]["init_args"]["pool"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another datamodule, or a pool that lies elsewhere


def _of_pool(store: "TokenStore") -> Iterator[tuple[int, str]]:
    for begin in range(0, len(store), ROWS_DECODED):
        ids = range(begin, min(begin + ROWS_DECODED, len(store)))
        yield from zip(ids, _texts(store, ids), strict=True)


def _text(store: "TokenStore", candidate: int) -> str:
    if not 0 <= candidate < len(store):
        raise ValueError(f"the pool holds the candidates 0..{len(store) - 1}, not {candidate}")
    return _texts(store, [candidate])[0]


@cache
def _tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    from liveselect.datamodules.pools.tokenizers import load_tokenizer

    return load_tokenizer(path)


def _texts(store: "TokenStore", ids: Sequence[int]) -> list[str]:
    rows = [store[candidate]["input_ids"].tolist() for candidate in ids]
    if store.tokenizer_path is None:
        return [" ".join(map(str, row)) for row in rows]
    return list(_tokenizer(store.tokenizer_path).batch_decode(rows))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS_SHOWN else f"{line[: CHARACTERS_SHOWN - 1]}…"
