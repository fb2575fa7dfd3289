"""``liveselect explain``: why a candidate was chosen or not."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from liveselect.cli.report import RUN

DESCRIPTION = """\
Show what every round of a run decided about one candidate: its score, bonus and noise, its rank and the threshold, the
influence that was measured, and the reason of the decision.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="liveselect explain", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument("id", type=int, metavar="ID", help="row id of the candidate in the pool")
    parser.add_argument("--pool", type=Path, help="the prepared pool, to show the text too")
    arguments = parser.parse_args(argv)

    from liveselect.cli.output import say
    from liveselect.decisions import find_decisions, lacking_rounds
    from liveselect.decisions.explain import explain, lines_about

    fates = explain(arguments.run, arguments.id)
    text = None if arguments.pool is None else _text(arguments.pool, arguments.id)
    for line in lines_about(arguments.id, fates, lacking_rounds(find_decisions(arguments.run))):
        say(line)
    say("to see its text, too, add --pool POOL" if text is None else f"\n{text}")
    return 0


def _text(pool: Path, candidate: int) -> str:
    from liveselect.datamodules.pools.tokenizers import load_tokenizer
    from liveselect.datamodules.pools.tokens import TokenStore

    store = TokenStore(pool)
    if not 0 <= candidate < len(store):
        raise ValueError(f"the pool {pool} holds the candidates 0..{len(store) - 1}, not {candidate}")
    ids = store[candidate]["input_ids"].tolist()
    if store.tokenizer_path is None:
        return " ".join(map(str, ids))
    return str(load_tokenizer(store.tokenizer_path).decode(ids))
