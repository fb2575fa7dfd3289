"""Texts of any length for an encoder of limited length: even chunks, batches of similar length, one mean per text."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def even_chunks(texts: Sequence[Tensor], longest: int) -> tuple[Tensor, Tensor]:
    """Cut ``texts``, token ids ``(L_i,)`` each, into the fewest chunks of at most ``longest`` tokens, in order.

    Returns token ids ``(C, L)`` int64 and their mask ``(C, L)`` bool, True at tokens. The chunks of a text differ by at
    most one token: less padding, and no chunk of a few words. A text without tokens has no chunk.
    """
    chunks = [part for text in texts if len(text) for part in text.long().tensor_split(-(-len(text) // longest))]
    if not chunks:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
    tokens = [torch.ones(len(chunk), dtype=torch.bool) for chunk in chunks]
    return pad_sequence(chunks, batch_first=True), pad_sequence(tokens, batch_first=True)


def length_groups(lengths: Sequence[int], longest: int, tokens: int) -> list[list[int]]:
    """Group texts of similar length so that the padded chunks of a group hold at most ``tokens`` tokens.

    A text that exceeds this by itself is a group of its own. Every position in ``lengths`` appears once.
    """
    chunks = [-(-length // longest) for length in lengths]
    widths = [-(-length // max(1, count)) for length, count in zip(lengths, chunks, strict=True)]
    groups: list[list[int]] = []
    held = 0  # chunks in the last group
    for i in sorted(range(len(lengths)), key=widths.__getitem__):  # ascending: the last one is the widest of its group
        if not groups or (held + chunks[i]) * widths[i] > tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += chunks[i]
    return groups


def mean_over_tokens(hidden: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of ``hidden (C, L, D)`` over the tokens of each text, ``(len(lengths), D)``.

    Zeros for a text without tokens. Padding has no part in value or gradient.
    """
    # sums in a fixed order, unlike index_add on GPUs: equal runs stay equal
    return torch.segment_reduce(hidden[mask], "mean", lengths=lengths, initial=0)
