"""Texts of any length for an encoder of fixed length: even chunks, batches of similar length, no empty row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Chunks(NamedTuple):
    """The chunks of some texts as one padded batch.

    Attributes:
        input_ids: ``(C, L)`` int64; every row holds at least one token.
        mask: ``(C, L)`` bool, True at tokens.
        owner: ``(C,)`` int64, the text that a chunk belongs to.
        texts: number of texts; one without tokens has no chunk.
    """

    input_ids: Tensor
    mask: Tensor
    owner: Tensor
    texts: int

    def to(self, device: torch.device) -> "Chunks":
        """Return the same chunks on another device."""
        return Chunks(self.input_ids.to(device), self.mask.to(device), self.owner.to(device), self.texts)


def chunk(texts: Sequence[Tensor], longest: int) -> Chunks:
    """Cut ``texts``, token ids ``(L_i,)`` each, into the fewest chunks of at most ``longest`` tokens.

    The chunks of a text differ by at most one token: less padding, and no chunk of a few words.
    """
    parts = [(part, i) for i, text in enumerate(texts) for part in _cut(text, longest)]
    if not parts:
        none = torch.empty(0, 0, dtype=torch.int64)
        return Chunks(none, none.bool(), torch.empty(0, dtype=torch.int64), len(texts))
    lengths = torch.tensor([len(part) for part, _ in parts])
    input_ids = pad_sequence([part.long() for part, _ in parts], batch_first=True)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return Chunks(input_ids, mask, torch.tensor([owner for _, owner in parts]), len(texts))


def length_groups(lengths: Sequence[int], longest: int, tokens: int) -> list[list[int]]:
    """Group texts of similar length so that the padded chunks of a group hold at most ``tokens`` tokens.

    A text that is larger than that by itself is a group of its own. Every position in ``lengths`` appears once.
    """

    def shape(length: int) -> tuple[int, int]:
        chunks = -(-length // longest)
        return -(-length // chunks) if chunks else 0, chunks

    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: shape(lengths[i])):
        width, chunks = shape(lengths[i])  # ascending, so the width of the newest is the width of the group
        if not groups or (held + chunks) * width > tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += chunks
    return groups


def _cut(text: Tensor, longest: int) -> Sequence[Tensor]:
    return text.tensor_split(-(-len(text) // longest)) if len(text) else ()
