"""In-memory stand-ins for the data plane, shared by tests."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import Batch, LossFn, RoundContext

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


class FakeSource:
    """A CandidateSource over token matrices: ``tokens (n, T)``, ``reference (r, T)``; text is space-joined ids.

    ``labels`` and ``reference_labels`` default to the tokens. ``mask (n, T)`` is served as ``attention_mask``, and
    what it hides is left out of the text. ``read`` records how many candidates were served.
    """

    def __init__(
        self,
        tokens: Tensor,
        reference: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        group_names: tuple[str, ...] | None = None,
        batch_size: int = 4,
        rows: int = 64,
    ) -> None:
        self.tokens = tokens
        self.labels = tokens if labels is None else labels
        self.references = tokens[:4] if reference is None else reference
        self.reference_labels = self.references if reference_labels is None else reference_labels
        self.mask = mask
        self.pool = CandidatePool(len(tokens), f"fake-{tuple(tokens.shape)}-{int(tokens.sum())}", groups, group_names)
        self.batch_size = batch_size
        self.rows = rows
        self.plan: Plan | None = None
        self.read = 0

    def candidates(self, ids: Tensor) -> Iterator[Batch]:
        for part in ids.split(self.rows):
            self.read += len(part)
            batch = {"id": part, "input_ids": self.tokens[part], "labels": self.labels[part]}
            yield batch if self.mask is None else {**batch, "attention_mask": self.mask[part]}

    def reference(self) -> Iterator[Batch]:
        for ids in torch.arange(len(self.references)).split(self.rows):
            yield {"id": ids, "input_ids": self.references[ids], "labels": self.reference_labels[ids]}

    def decode(self, input_ids: Tensor) -> list[str]:
        return [" ".join(str(token) for token in row) for row in input_ids.tolist()]

    def follow(self, plan: Plan) -> None:
        self.plan = plan


def random_source(candidates: int = 64, length: int = 12, vocab: int = 50, seed: int = 0, **kwargs) -> FakeSource:
    """A source of uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (candidates, length), generator=generator)
    return FakeSource(tokens, torch.randint(0, vocab, (4, length), generator=generator), **kwargs)


def planted_source(
    candidates: int = 600, share: float = 0.1, length: int = 24, vocab: int = 60, seed: int = 0, **kwargs
) -> tuple[FakeSource, Tensor]:
    """A source with a ``share`` of the reference's tokens (the lower third of the vocabulary, skewed) among noise.

    Returns the source and which candidates are planted, ``(candidates,)`` bool.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = torch.zeros(candidates, dtype=torch.bool)
    planted[torch.randperm(candidates, generator=generator)[: round(share * candidates)]] = True
    likely = 1.0 / torch.arange(1, vocab // 3 + 1)

    def like_reference(rows: int) -> Tensor:
        return torch.multinomial(likely.expand(rows, -1), length, replacement=True, generator=generator)

    tokens = torch.randint(0, vocab, (candidates, length), generator=generator)
    tokens[planted] = like_reference(int(planted.sum()))
    return FakeSource(tokens, like_reference(8), **kwargs), planted


def fake_context(
    source: FakeSource,
    *,
    round_index: int = 0,
    seed: int = 0,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = causal_lm_loss,
    candidates: Tensor | None = None,
    **kwargs,
) -> RoundContext:
    """A round's context over ``source`` with, unless one is given, a model of one weight."""
    if model is None:
        model = nn.utils.skip_init(nn.Linear, 1, 1)  # draws nothing from the global stream
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
    return RoundContext(
        round=round_index,
        step=0,
        seed=seed,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer,
        loss_fn=loss_fn,
        source=source,
        candidates=torch.arange(source.pool.size) if candidates is None else candidates,
        global_batch=source.batch_size,
        **kwargs,
    )
