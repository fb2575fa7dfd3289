"""Clusters of sequences from different Markov chains; the reference set comes from some of them."""

from collections.abc import Sequence

import torch
from cases import tiny_neox
from fakes import FakeSource
from torch import Tensor, nn

from liveselect.losses import causal_lm_loss

VOCABULARY = 40


def chains(clusters: int, generator: torch.Generator, sharpness: float) -> Tensor:
    """Transition probabilities ``(clusters, V, V)``."""
    return torch.softmax(sharpness * torch.randn(clusters, VOCABULARY, VOCABULARY, generator=generator), dim=-1)


def walk(chain: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences ``(rows, length)`` of one chain."""
    tokens = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    for _ in range(length - 1):
        tokens = torch.cat([tokens, torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)], dim=1)
    return tokens


def planted_clusters(
    clusters: int = 8,
    wanted: Sequence[int] = (2, 5),
    rows: int = 60,
    length: int = 24,
    sharpness: float = 2.0,
    seed: int = 0,
    **kwargs,
) -> tuple[FakeSource, Tensor]:
    """A source with ``rows`` candidates of each cluster, and the chains; the reference set comes from ``wanted``."""
    generator = torch.Generator().manual_seed(seed)
    matrices = chains(clusters, generator, sharpness)
    tokens = torch.cat([walk(chain, rows, length, generator) for chain in matrices])
    order = torch.randperm(len(tokens), generator=generator)
    groups = torch.arange(clusters).repeat_interleave(rows)[order]
    reference = torch.cat([walk(matrices[index], 8, length, generator) for index in wanted])
    names = tuple(f"chain {index}" for index in range(clusters))
    return FakeSource(tokens[order], reference, groups=groups.int(), group_names=names, **kwargs), matrices


def small_lm(seed: int = 0, width: int = 32, inner: int = 64) -> nn.Module:
    return tiny_neox(seed, vocabulary=VOCABULARY, width=width, inner=inner, max_position_embeddings=64)


def train(model, optimizer, source: FakeSource, ids: Tensor, batch_size: int = 16) -> None:
    """Take one step on each batch of ``ids``."""
    model.train()
    for part in ids.split(batch_size):
        batch = {"input_ids": source.tokens[part], "labels": source.labels[part]}
        optimizer.zero_grad()
        causal_lm_loss(model, batch).mean().backward()
        optimizer.step()
