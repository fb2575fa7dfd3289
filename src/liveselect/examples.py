"""Candidates of a round as a person would read them, with the parts of their texts that made their scores."""

import math
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from liveselect.grammar import Batch, CandidateSource, Round, Selection, Selector
from liveselect.ledger import Example, writable
from liveselect.looking import only_looking

EXAMPLES_SHOWN = 6
"""Of the chosen, and of the rejected."""
CHARACTERS_SHOWN = 600
MARKS_SHOWN = 40
"""Marked tokens of a text, the strongest ones: the ledger holds them for every round."""
NOT_DECODED = "(could not be decoded)"

Mark = tuple[int, int, float]


def examples_of(round: Round, selector: Selector, selection: Selection) -> list[Example]:
    """Return the highest chosen and the lowest rejected candidates, or the first chosen when nothing was scored."""
    if selection.scored is None or selection.scores is None:
        ids, scores = selection.ids[:EXAMPLES_SHOWN], None
        chosen = torch.ones(len(ids), dtype=torch.bool)
    else:
        is_chosen = round.pool.mask(selection.ids)[selection.scored]
        order = selection.scores.argsort(descending=True, stable=True)
        best = order[is_chosen[order]][:EXAMPLES_SHOWN]
        worst = order[~is_chosen[order]].flip(0)[:EXAMPLES_SHOWN]
        rows = torch.cat([best, worst])
        ids, scores, chosen = selection.scored[rows], selection.scores[rows], is_chosen[rows]
    pool, texts, marks = round.pool, list[str](), list[list[Mark]]()
    with only_looking("the examples of a round could not be decoded"):
        for batch in round.source.candidates(ids):
            texts += [text[:CHARACTERS_SHOWN] for text in round.source.decode(batch["input_ids"])]
            marks += [[] for _ in range(len(texts) - len(marks))]
            if scores is not None:
                with only_looking("what made the scores of a round could not be marked"):
                    marks[len(texts) - len(batch["input_ids"]) :] = _marks(round, selector, batch, texts)
    texts += [NOT_DECODED] * (len(ids) - len(texts))
    marks += [[] for _ in range(len(ids) - len(marks))]
    return [
        Example(
            id=int(ids[i]),
            group=writable(pool.group_names[0 if pool.groups is None else int(pool.groups[ids[i]])]),
            score=None if scores is None else float(scores[i]),
            chosen=bool(chosen[i]),
            text=writable(text),
            marks=marks[i] if writable(text) == text else [],  # places in another text would be wrong
        )
        for i, text in enumerate(texts[: len(ids)])
    ]


def _marks(round: Round, selector: Selector, batch: Batch, texts: Sequence[str]) -> list[list[Mark]]:
    """Return the marks of the rows of a batch, whose ``texts`` are the last ones."""
    rows = batch["input_ids"]
    weights = selector.token_scores(round, batch)
    if weights is None:
        return [[] for _ in rows]
    return [
        _strongest(text, places(round.source, row, text), each.tolist())
        for text, row, each in zip(texts[-len(rows) :], rows, weights, strict=True)
    ]


def _strongest(text: str, ends: Sequence[int], weights: Sequence[float]) -> list[Mark]:
    """Return the marks of the tokens that weigh most, in order."""
    begins = [0, *ends[:-1]]
    found = [
        (begin, end, weight)
        for begin, end, weight in zip(begins, ends, weights, strict=False)
        if text[begin:end].strip() and weight and math.isfinite(weight)
    ]
    kept = sorted(found, key=lambda mark: -abs(mark[2]))[:MARKS_SHOWN]
    return [(begin, end, float(f"{weight:.3g}")) for begin, end, weight in sorted(kept)]


def places(source: CandidateSource, row: Tensor, text: str) -> list[int]:
    """Return where each token of a row ends in its ``text``, in characters; of the tokens that begin inside of it.

    Tokens alone say what they hold as long as they join to the text. Where they do not (half of a character, a space
    that a token has only inside of a text), the beginning of the row decides, as long as it stays one of the text's.
    """
    row = row.cpu()
    row = row[: len(text) + 64]  # a token holds a character at least, save for a few special ones
    pieces = source.decode(row[:, None])
    joined, ends = "", []
    for piece in pieces:
        joined += piece
        ends.append(min(len(joined), len(text)))
        if len(joined) >= len(text):
            break
    if joined.startswith(text) or text.startswith(joined):
        return ends
    ends = []
    for length in range(1, len(row) + 1):
        ends.append(_common(source.decode(row[None, :length])[0], text))
        if ends[-1] == len(text):
            break
    return ends


def _common(begun: str, text: str) -> int:
    """Return how many characters both begin with."""
    if text.startswith(begun):
        return len(begun)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begun, text, strict=False)))
