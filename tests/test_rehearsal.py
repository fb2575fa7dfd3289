"""What would fail in the first measuring round is told before training starts, and telling it changes nothing."""

import pytest
import torch
from fakes import VOCABULARY, Bigrams, fake_context, random_source
from torch import nn
from torch.utils.checkpoint import checkpoint

from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor
from liveselect.rehearsal import rehearse
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, UniformSelector
from liveselect.snapshot import checksum


class Checkpointed(Bigrams):
    def forward(self, input_ids):
        return self.head(checkpoint(self.hidden, self.embed(input_ids), use_reentrant=True))


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids):
        return self.embed(input_ids).mean(dim=1)


def a_rehearsal(model=None, estimator=None, optimizer=None, regressor=None, **arguments):
    source = random_source(candidates=20, vocab=VOCABULARY)
    model = model or Bigrams()
    optimizer = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = RegressionSelector(regressor or HashedRidgeRegressor(), probes=8)
    run = SelectionRun(selector, estimator or OneStepInfluence(), UniformSelector(), 1, source.pool)
    return run, fake_context(source, model=model, optimizer=optimizer, **arguments)


def summed(model, batch):
    return causal_lm_loss(model, batch).sum()


def per_token(model, batch):
    return causal_lm_loss(model, batch)[:, None].expand(-1, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": summed}, r"return \(2,\) losses for a batch of 2 candidates.*got \(\) torch.float32.*reduction"),
        ({"loss_fn": per_token}, r"got \(2, 11\)"),
        ({"loss_fn": lambda model, batch: 1.0}, "got float"),
        ({"loss_fn": lambda model, batch: causal_lm_loss(model, batch).detach()}, "does not depend on any parameter"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS.step needs a closure"),
        ({"model": Bigrams(sparse=True), "optimizer": lambda p: torch.optim.SGD(p, 0.1)}, "make sparse gradients"),
        ({"model": Checkpointed()}, "use_reentrant"),
        ({"model": Embedder()}, r"return logits \(B, T, V\).*pass loss_fn"),
        ({"regressor": EncoderRegressor("no/such-encoder")}, "no/such-encoder"),
        (
            {"regressor": EncoderRegressor({"model_type": "bert", "vocab_size": 10})},
            "below the encoder's vocab_size 10",
        ),
        ({"estimator": KFACInfluence(include=["nothing*"])}, "fits none of the linear layers"),
        ({"estimator": FirstOrderInfluence(exclude=["nothing*"])}, "fits none of the parameters"),
        ({"estimator": PMPInfluence(), "optimizer": lambda p: torch.optim.Rprop(p, 0.1)}, "Rprop"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_cannot_work_is_told_at_the_start(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, context = a_rehearsal(**arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError), match=message) as caught:
        rehearse(run, context)
    assert "RegressionSelector" in caught.value.__notes__[0]
    assert "before training starts" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "estimator", [OneStepInfluence, FirstOrderInfluence, KFACInfluence, PMPInfluence], ids=lambda each: each.__name__
)
def test_a_rehearsal_leaves_the_run_as_it_was(estimator):
    run, context = a_rehearsal(estimator=estimator())
    before = checksum(context.model, context.optimizer), torch.get_rng_state(), dict(vars(run.estimator))
    rehearse(run, context)
    assert checksum(context.model, context.optimizer) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert vars(run.estimator) == before[2]
    assert context.meter.flops == {}
    assert all(parameter.grad is None for parameter in context.model.parameters())
    assert run.plan is None


def test_a_learning_rate_that_is_still_zero_is_no_reason_to_stop():
    run, context = a_rehearsal(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    rehearse(run, context)


def test_an_optimizer_without_any_learning_rate_is_refused():
    run, context = a_rehearsal()
    for group in context.optimizer.param_groups:
        group["lr"] = None
    with pytest.raises(ValueError, match="AdamW has none"):
        rehearse(run, context)


def test_nothing_is_asked_of_a_run_that_measures_nothing():
    run, context = a_rehearsal(loss_fn=lambda model, batch: 1.0)
    run.estimator = None
    rehearse(run, context)
    assert context.source.read == 0
