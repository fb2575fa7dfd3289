"""What would fail in the first measuring round is told before training starts, and telling it changes nothing."""

import copy

import pytest
import torch
from fakes import VOCABULARY, Bigrams, fake_context, random_source
from tiny_encoder import TINY, tiny_regressor
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


def a_rehearsal(model=None, estimator=None, optimizer=None, regressor=None, source=None, **arguments):
    source = source or random_source(candidates=20, vocab=VOCABULARY)
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


class Column(HashedRidgeRegressor):
    """Returns a column, as a linear head does."""

    def predict(self, context, batch):
        return super().predict(context, batch).unsqueeze(1)


class Numbers(HashedRidgeRegressor):
    def predict(self, context, batch):
        return super().predict(context, batch).tolist()


class Mute(HashedRidgeRegressor):
    def fit(self, context, ids, influence):
        super().fit(context, ids, influence)


@pytest.mark.parametrize(
    ("regressor", "message"),
    [
        (Column(), r"Column.predict to return one number .* got \(\d+, 1\): squeeze the last dimension"),
        (Numbers(), r"Numbers.predict to return a tensor \(\d+,\), got list"),
        (Mute(), r"Mute.fit to return a mapping of metrics.*got NoneType"),
        (tiny_regressor(chunk_tokens=500), "(?i)size|range|expand|index"),  # beyond the encoder's 16 positions
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_regressor_of_ones_own_is_tried_before_anything_is_measured(regressor, message):
    run, context = a_rehearsal(source=random_source(candidates=20, length=30), regressor=regressor)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        rehearse(run, context)


def test_a_token_that_the_encoder_does_not_know_is_found_anywhere_in_a_small_pool():
    source = random_source(candidates=20, vocab=VOCABULARY)
    source.tokens.clamp_(max=40)[13, -1] = VOCABULARY - 1
    run, context = a_rehearsal(source=source, regressor=tiny_regressor(encoder={**TINY, "vocab_size": 41}))
    with pytest.raises(ValueError, match="below the encoder's vocab_size 41"):
        rehearse(run, context)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_trial_leaves_the_regressor_as_it_was(fitted):
    for regressor in (HashedRidgeRegressor(), tiny_regressor(epochs=1)):
        run, context = a_rehearsal(regressor=regressor)
        if fitted:
            regressor.fit(context, context.candidates, torch.arange(20.0))
        before = copy.deepcopy(regressor.state_dict())
        rehearse(run, context)
        assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(regressor.state_dict()), strict=True))


def tensors(state):
    return [
        v
        for value in state.values()
        for v in (value.values() if isinstance(value, dict) else [value])
        if torch.is_tensor(v)
    ]


def test_a_regressor_that_cannot_be_copied_is_left_alone():
    class Connected(HashedRidgeRegressor):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a connection")

        def fit(self, context, ids, influence):
            raise RuntimeError("the original was fitted")

    run, context = a_rehearsal(regressor=Connected())
    rehearse(run, context)


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
