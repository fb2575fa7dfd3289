"""Models small enough for tests, by name. Initial weights depend on a seed alone, and the global stream stays."""

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

VOCABULARY = 50


class Bigrams(nn.Module):
    """The smallest language model that learns something; ``settings`` go to its embedding."""

    def __init__(self, **settings) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # noqa: TID251 - the initial weights
            self.embed = nn.Embedding(VOCABULARY, 8, **settings)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.hidden(self.embed(input_ids)).tanh())


class Restless(nn.Module):
    """Tied embeddings, dropout, batch norm, a submodule put into eval mode, a frozen parameter and an unused one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.3)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.3)).eval()
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, input_ids):
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.body(self.dropout(hidden)) * self.frozen + hidden.cumsum(1))


def tiny_neox(seed: int = 0, *, vocabulary: int = VOCABULARY, width: int = 16, inner: int = 32, **settings):
    """Return a GPT-NeoX of two layers and two heads; ``settings`` are fields of its configuration."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # noqa: TID251 - the initial weights
        return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **depth, **settings}))
