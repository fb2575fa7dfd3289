"""What an estimator cannot see of a model is said before it is fitted: all layers at once, with what helps."""

import re
import warnings

import pytest
import torch
from cases import VOCABULARY, Bigrams, tiny_neox
from fakes import fake_context, random_source
from families import Kernel
from torch import nn

from liveselect.grammar import NotMeasurableError, SelectionWarning
from liveselect.influence import FirstOrderInfluence, KFACInfluence, PMPInfluence
from liveselect.losses import causal_lm_loss
from liveselect.rehearsal import rehearse
from liveselect.selectors import UniformSelector


class Gate(nn.Module):
    """Returns two tensors, as routers of mixtures do."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width) / 4)

    def forward(self, x):
        logits = Kernel.apply(x @ self.weight.t())
        return logits, logits.softmax(-1)


class Experts(nn.Module):
    """Takes two tensors."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, width, width) / 4)

    def forward(self, x, weights):
        return torch.einsum("btd,edf,bte->btf", x, Kernel.apply(self.up), weights)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.experts, self.scale = Gate(width), Experts(width), nn.Linear(width, width)
        self.own = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x + self.experts(x, self.gate(x)[1])
        return Kernel.apply(x * self.own + nn.functional.linear(x, self.scale.weight, self.scale.bias))


class Mixture(nn.Module):
    """Hides gradients of single examples in four ways, in each of two blocks, and nowhere else."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.inner(x))


def context_of(model, optimizer=None, vocab=VOCABULARY, **arguments):
    source = random_source(candidates=20, vocab=vocab)
    optimizer = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-3)
    return fake_context(source, model=model, optimizer=optimizer, **arguments)


def refusal(estimator, model, **arguments):
    context = context_of(model, **arguments)
    estimator.fit = None  # before anything is fitted
    with pytest.raises(ValueError, match="these layers") as caught:
        rehearse(UniformSelector(), estimator, context.live, context.round, 4)
    assert not any(module._forward_hooks for module in model.modules())
    return str(caught.value)


IN_ALL_BLOCKS = (
    "blocks.* (Block) maps tensors by operations that cannot be differentiated twice",
    "blocks.*.gate (Gate) maps tensors by operations",
    "blocks.*.experts (Experts) maps tensors by operations",
    "blocks.*.scale (Linear) the loss uses weight past it",
)


def test_all_layers_without_a_rule_are_said_at_once_with_the_argument_that_helps():
    message = refusal(FirstOrderInfluence(), Mixture())
    assert message.startswith('engine="hooks" cannot see the gradients of single examples in these layers: ')
    assert all(text in message for text in IN_ALL_BLOCKS)
    assert 'engine="central_difference"' in message
    assert "_dot" not in message
    assert "embed" not in message
    assert "inner" not in message


@pytest.mark.filterwarnings("ignore:FirstOrderInfluence measures")
def test_the_patterns_that_are_advised_are_enough():
    message = refusal(FirstOrderInfluence(exclude=["head.bias"]), Mixture())
    advised = re.search(r"exclude=\[(.*?)\], and measure the other (\d+)%", message)
    patterns = [each.strip("'") for each in advised.group(1).split(", ")]
    assert patterns[0] == "head.bias"
    context = context_of(Mixture())
    estimator = FirstOrderInfluence(exclude=patterns)
    rehearse(UniformSelector(), estimator, context.live, context.round, 4)
    assert context.fit(estimator)["measured_share"] == pytest.approx(int(advised.group(2)) / 100, abs=0.005)


@pytest.mark.filterwarnings("ignore:FirstOrderInfluence measures")
def test_what_takes_any_module_is_not_refused():
    context = context_of(Mixture())
    rehearse(UniformSelector(), FirstOrderInfluence("central_difference"), context.live, context.round, 4)


def test_pmp_says_before_its_unroll_which_layers_need_other_products():
    message = refusal(PMPInfluence(), Mixture())
    assert message.startswith('products="exact" cannot see')
    assert all(text in message for text in IN_ALL_BLOCKS)
    assert 'Measure with products="central_difference"' in message
    context = context_of(Mixture())
    PMPInfluence(products="central_difference").check(context.live, context.round)


def test_kfac_says_which_of_its_linear_layers_it_cannot_see():
    message = refusal(KFACInfluence(), Mixture())
    assert "blocks.*.scale (Linear) the loss uses" in message
    assert "gate" not in message
    assert "exclude=['blocks.*.scale']" in message


def test_a_single_layer_is_named_as_it_is():
    model = Mixture()
    model.blocks = nn.ModuleList([Block(8)])
    message = refusal(FirstOrderInfluence(), model)
    assert "blocks.0.gate (Gate)" in message
    assert "'blocks.0.gate.weight'" in message


def test_models_without_such_layers_pass():
    for model in (Bigrams(), tiny_neox()):
        context = context_of(model)
        for estimator in (FirstOrderInfluence(), PMPInfluence()):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                estimator.check(context.live, context.round)


# ---- how much is measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "share"),
    [
        (KFACInfluence(exclude=["blocks*"]), "1%"),
        (FirstOrderInfluence(exclude=["embed*", "blocks*", "head.weight"]), None),
        (FirstOrderInfluence("central_difference", exclude=["embed*", "blocks*", "head.weight"]), None),
    ],
)
def test_less_than_half_of_the_parameters_is_a_warning_before_training_starts(estimator, share):
    model = Mixture()
    context = context_of(model)
    with pytest.warns(
        SelectionWarning, match=r"measures \d+% of the parameters that are trained \(measured_share\)"
    ) as said:
        rehearse(UniformSelector(), estimator, context.live, context.round, 4)
    told = int(re.search(r"measures (\d+)%", str(said[0].message)).group(1)) / 100
    assert told == pytest.approx(context.fit(estimator)["measured_share"], abs=0.005)
    assert told < 0.5


# ---- reasons that are true ---------------------------------------------------------------------------------------


class Sleepy(torch.optim.SGD):
    """Only initialises itself in its first step, as SOAP does."""

    def step(self, closure=None):
        fresh = [p for group in self.param_groups for p in group["params"] if p.grad is not None and not self.state[p]]
        for parameter in fresh:
            self.state[parameter]["seen"] = torch.ones(())
        kept = [p.grad for p in fresh]
        for parameter in fresh:
            parameter.grad = None
        super().step()
        for parameter, gradient in zip(fresh, kept, strict=True):
            parameter.grad = gradient


def test_an_optimizer_whose_first_step_moves_nothing_can_be_measured_with_later():
    context = context_of(Bigrams(), lambda parameters: Sleepy(parameters, lr=0.1))
    estimator = FirstOrderInfluence(slope_over="zero")
    with pytest.raises(
        NotMeasurableError, match=r"a step of Sleepy on these gradients moves no parameter.*warmup_rounds"
    ):
        context.fit(estimator)
    rehearse(UniformSelector(), estimator, context.live, context.round, 4)
    model, optimizer = context.model, context.optimizer
    causal_lm_loss(model, next(context.round.batches(torch.arange(4)))).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert context.fit(estimator)["direction_norm"] > 0


def test_a_loss_that_does_not_depend_on_parameters_keeps_its_reason():
    def loss(model, batch):
        return causal_lm_loss(model, batch) * 0.0

    context = context_of(Bigrams(), loss_fn=loss)
    with pytest.raises(ValueError, match="the reference loss does not change with any parameter"):
        context.fit(FirstOrderInfluence(slope_over="zero"))


def unrolled_refusal(model):
    context = context_of(model.double(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), vocab=4)
    with pytest.raises(RuntimeError, match="two ways to find the curvature") as caught:
        context.fit(PMPInfluence(steps=2, score_every=1, batch_size=4))
    said = str(caught.value)
    assert "differ by 0%" not in said
    assert float(re.search(r"differ by ([\d.e-]+) of it", said).group(1)) > 1e-3
    return said


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=3)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.embed(input_ids))))


class Narrow(Tied):
    """Computes a part in float32."""

    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(VOCABULARY, 8) / 4)
        self.embed.padding_idx = None

    def forward(self, input_ids):
        x = self.inner(self.embed(input_ids))
        return self.head((torch.tanh(x.half().float()) + torch.tanh(x.float())).double())


def test_a_tied_embedding_with_a_padding_row_is_named_as_the_reason():
    said = unrolled_refusal(Tied())
    assert "'head' is tied to the embedding 'embed', whose backward leaves the row of its padding_idx=3 out" in said
    assert "custom kernel" not in said


def test_a_part_in_float32_is_named_as_the_likely_reason():
    said = unrolled_refusal(Narrow())
    assert "custom kernel" not in said or float(re.search(r"differ by ([\d.e-]+)", said).group(1)) > 0.1
