"""A tenth of the pool is like the reference, the rest is noise: one round of MATES finds it with the live model."""

import pytest
import torch
from fakes import fake_context, planted_source, play
from tiny_encoder import tiny_regressor
from torch import nn

from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, UniformSelector

VOCABULARY, SHARE = 60, 0.1


class Bigrams(nn.Module):
    """A language model of next-token logits, trained a little on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def enrichment(selector, step="in_batch") -> float:
    """Return the share of planted candidates among the chosen, in units of their share of the pool."""
    source, planted = planted_source(candidates=1000, share=SHARE, vocab=VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - the initial weights
        model = Bigrams()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise = torch.randint(0, VOCABULARY, (64, 24), generator=torch.Generator().manual_seed(1))
    for _ in range(20):  # warm moments
        loss = nn.functional.cross_entropy(model(noise[:, :-1]).flatten(0, 1), noise[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    run = SelectionRun(selector, OneStepInfluence(step=step), UniformSelector(), 0, source)
    plan = play(run, 100, fake_context(source, model=model, optimizer=optimizer))
    return float(planted[plan.ids].float().mean()) / SHARE


@pytest.mark.parametrize(
    "regressor",
    [HashedRidgeRegressor, lambda: tiny_regressor(epochs=20, evaluations=4)],
    ids=["hashed n-grams", "encoder"],
)
@pytest.mark.parametrize("step", ["in_batch", "published"])
def test_the_chosen_set_is_enriched_threefold(regressor, step):
    selector = RegressionSelector(regressor(), probes=250, ratio=0.2, temperature=0.1)
    assert enrichment(selector, step) >= 3


def test_uniform_selection_enriches_nothing():
    assert 0.3 < enrichment(UniformSelector()) < 2
