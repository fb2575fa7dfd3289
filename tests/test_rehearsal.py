"""What would fail in the first measuring round is reported before training starts, and reporting it changes nothing."""

import copy
import warnings

import pytest
import torch
from cases import VOCABULARY, Bigrams
from fakes import fake_context, random_source
from tiny_encoder import TINY, tiny_regressor
from torch import nn
from torch.utils.checkpoint import checkpoint

from liveselect.grammar import SelectionWarning
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.losses import causal_lm_loss
from liveselect.preserve import checksum
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor
from liveselect.rehearsal import rehearse
from liveselect.selectors import RegressionSelector, UniformSelector

BUDGET = 4


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
    context = fake_context(source, model=model, optimizer=optimizer, **arguments)
    return selector, estimator or OneStepInfluence(), context


def rehearse_in(context, selector, estimator):
    rehearse(selector, estimator, context.live, context.round, BUDGET)


def summed(model, batch):
    return causal_lm_loss(model, batch).sum()


def per_token(model, batch):
    return causal_lm_loss(model, batch)[:, None].expand(-1, 11)


class Toggling(Bigrams):
    """Trains its head in training mode only."""

    def forward(self, *arguments, **named):
        self.head.weight.requires_grad_(self.training)
        return super().forward(*arguments, **named)


def test_losses_in_sixteen_bits_are_warned_of():
    rounded = lambda model, batch: causal_lm_loss(model, batch).bfloat16()  # noqa: E731
    selector, estimator, context = a_rehearsal(loss_fn=rounded)
    with pytest.warns(SelectionWarning, match=r"losses in torch.bfloat16, which differ by 0\.03\d? nats or not at all"):
        rehearse_in(context, selector, estimator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": summed}, r"return \(2,\) losses for a batch of 2 candidates.*got \(\) torch.float32.*reduction"),
        ({"loss_fn": per_token}, r"got \(2, 11\)"),
        ({"loss_fn": lambda model, batch: 1.0}, "got float"),
        ({"loss_fn": lambda model, batch: causal_lm_loss(model, batch).detach()}, "does not depend on any parameter"),
        ({"model": Toggling()}, "the forward of Toggling switches requires_grad off for head.weight"),
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
def test_what_cannot_work_is_reported_at_the_start(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    selector, estimator, context = a_rehearsal(**arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError), match=message) as caught:
        rehearse_in(context, selector, estimator)
    note = caught.value.__notes__[-1]
    assert "RegressionSelector" in note
    assert "before training starts" in note


@pytest.mark.parametrize(
    "estimator", [OneStepInfluence, FirstOrderInfluence, KFACInfluence, PMPInfluence], ids=lambda each: each.__name__
)
def test_a_rehearsal_leaves_the_run_as_it_was(estimator):
    selector, estimator, context = a_rehearsal(estimator=estimator())
    before = checksum(context.model, context.optimizer), torch.get_rng_state(), dict(vars(estimator))
    of_the_selector = selector.state_dict()
    rehearse_in(context, selector, estimator)
    assert checksum(context.model, context.optimizer) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert vars(estimator) == before[2]
    assert str(selector.state_dict()) == str(of_the_selector)
    assert context.meter.flops == {}
    assert all(parameter.grad is None for parameter in context.model.parameters())
    assert not context.source.pool.uses.any()
    assert context.source.plan is None


class Column(HashedRidgeRegressor):
    """Returns a column, as a linear head does."""

    def predict(self, round, batch):
        return super().predict(round, batch).unsqueeze(1)


class Numbers(HashedRidgeRegressor):
    def predict(self, round, batch):
        return super().predict(round, batch).tolist()


class Mute(HashedRidgeRegressor):
    def fit(self, round, ids, influence):
        super().fit(round, ids, influence)


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
    selector, estimator, context = a_rehearsal(source=random_source(candidates=20, length=30), regressor=regressor)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        rehearse_in(context, selector, estimator)


def test_a_token_that_the_encoder_does_not_know_is_found_anywhere_in_a_small_pool():
    source = random_source(candidates=20, vocab=VOCABULARY)
    source.tokens.clamp_(max=40)[13, -1] = VOCABULARY - 1
    selector, estimator, context = a_rehearsal(
        source=source, regressor=tiny_regressor(encoder={**TINY, "vocab_size": 41})
    )
    with pytest.raises(ValueError, match="below the encoder's vocab_size 41"):
        rehearse_in(context, selector, estimator)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_trial_leaves_the_regressor_as_it_was(fitted):
    for regressor in (HashedRidgeRegressor(), tiny_regressor(epochs=1)):
        selector, estimator, context = a_rehearsal(regressor=regressor)
        if fitted:
            regressor.fit(context.round, context.candidates, torch.arange(20.0))
        before = copy.deepcopy(regressor.state_dict())
        rehearse_in(context, selector, estimator)
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

        def fit(self, round, ids, influence):
            raise RuntimeError("the original was fitted")

    selector, estimator, context = a_rehearsal(regressor=Connected())
    rehearse_in(context, selector, estimator)


def test_a_learning_rate_that_is_still_zero_is_no_reason_to_stop():
    selector, estimator, context = a_rehearsal(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    rehearse_in(context, selector, estimator)


@pytest.mark.parametrize("estimator", [OneStepInfluence, PMPInfluence, KFACInfluence], ids=lambda each: each.__name__)
def test_where_nothing_can_be_measured_yet_the_selector_is_checked_all_the_same(estimator):
    def still(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    selector, estimator, context = a_rehearsal(optimizer=still, estimator=estimator(), regressor=Column())
    with pytest.raises(ValueError, match="squeeze the last dimension") as caught:
        rehearse_in(context, selector, estimator)
    assert "before training starts" in caught.value.__notes__[0]


def test_an_optimizer_without_any_learning_rate_is_refused():
    selector, estimator, context = a_rehearsal()
    for group in context.optimizer.param_groups:
        group["lr"] = None
    with pytest.raises(ValueError, match="AdamW has none"):
        rehearse_in(context, selector, estimator)


def test_of_a_run_that_measures_nothing_only_the_selector_is_checked():
    class Checked(UniformSelector):
        def check(self, round, budget):
            raise KeyError(len(round.candidates), budget)

    context = a_rehearsal(loss_fn=lambda model, batch: 1.0, source=random_source(candidates=50, vocab=VOCABULARY))[-1]
    rehearse_in(context, UniformSelector(), None)
    assert context.source.read == 0
    with pytest.raises(KeyError, match=f"32, {BUDGET}"):  # a few candidates, and what a round trains on
        rehearse_in(context, Checked(), None)


def test_an_estimator_is_measured_with_unless_it_says_that_this_costs_too_much():
    class Costly(OneStepInfluence):
        rehearsed = False

        def check(self, model, round):
            checked.append(len(round.candidates))

        def fit(self, model, round):
            raise KeyError("fitted")

    class Cheap(Costly):
        rehearsed = True

    checked: list[int] = []
    selector, _, context = a_rehearsal()
    rehearse_in(context, selector, Costly())
    assert checked == [20]
    with pytest.raises(KeyError, match="fitted"):
        rehearse_in(context, selector, Cheap())
    assert checked == [20, 20]


def test_a_regressor_is_tried_unless_it_says_that_this_costs_too_much():
    class Costly(HashedRidgeRegressor):
        rehearsed = False

        def check(self, round):
            checked.append(len(round.candidates))

        def fit(self, round, ids, influence):
            raise KeyError("fitted")

    class Cheap(Costly):
        rehearsed = True

    checked: list[int] = []
    rehearse_in(a_rehearsal()[-1], *a_rehearsal(regressor=Costly())[:2])
    assert checked == [20]
    with pytest.raises(KeyError, match="fitted"):
        rehearse_in(a_rehearsal()[-1], *a_rehearsal(regressor=Cheap())[:2])
    assert checked == [20, 20]


def test_influence_that_is_not_one_number_for_each_candidate_is_refused():
    class Column(OneStepInfluence):
        def score(self, model, batch):
            return super().score(model, batch).unsqueeze(1)

    selector, estimator, context = a_rehearsal(estimator=Column())
    with pytest.raises(ValueError, match=r"Column.score to return one influence for each of 2 .*\(2, 1\)"):
        rehearse_in(context, selector, estimator)


@pytest.mark.parametrize(
    ("direction", "got"),
    [
        (torch.ones(3), "an object of Tensor"),
        ([("embed.weight", torch.ones(3))], "an object of list"),
        ({"embed.weight": 1.0}, "float under 'embed.weight'"),
        ({"embed.weight": None}, "NoneType under 'embed.weight'"),
        ({0: torch.ones(3)}, "Tensor under 0"),
    ],
)
def test_a_direction_that_is_no_mapping_of_names_to_tensors_is_refused(direction, got):
    class Mine(OneStepInfluence):
        has_direction = True

        def direction(self):
            return direction

    selector, estimator, context = a_rehearsal(estimator=Mine())
    expected = r"expected Mine\.direction to return a mapping of parameter names to tensors"
    with pytest.raises(TypeError, match=expected) as error:
        rehearse_in(context, selector, estimator)
    assert str(error.value).endswith(f"got {got}")


def test_no_direction_yet_is_no_mistake():
    class Mine(OneStepInfluence):
        has_direction = True

        def direction(self):
            return None

    selector, estimator, context = a_rehearsal(estimator=Mine())
    rehearse_in(context, selector, estimator)


@pytest.mark.parametrize(
    ("loss", "depends"),
    [
        (lambda losses: losses.mean().expand(len(losses)), True),
        (lambda losses: losses.flip(0), True),
        (lambda losses: losses / losses.sum(), True),
        (lambda losses: losses * 2, False),
    ],
)
def test_a_loss_that_depends_on_the_other_examples_of_a_batch_is_warned_of(loss, depends):
    context = a_rehearsal(loss_fn=lambda model, batch: loss(causal_lm_loss(model, batch)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rehearse_in(context[-1], *context[:-1])
    assert any("beside other examples" in str(each.message) for each in said) == depends
