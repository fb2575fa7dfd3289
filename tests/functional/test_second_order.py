"""Hessian products and differences along a direction against the dense Hessian and explicit gradients, in float64."""

import pytest
import torch
from fakes import random_source
from probing import VOCAB, tiny_model
from torch import nn

from liveselect.functional.differences import (
    DISPLACEMENT_SHARES,
    Reach,
    central_difference,
    central_difference_dots,
    central_difference_product,
    parameters_kept,
)
from liveselect.functional.gradients import mean_gradient
from liveselect.functional.second_order import double_backward_product
from liveselect.losses import causal_lm_loss

HESSIANS = [double_backward_product, central_difference_product]


class Net(nn.Module):
    """Tied weights, and a parameter that the loss does not reach."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.first.T) @ self.first) @ self.first.T @ self.second


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]) ** 2


def batches_of(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(n, 4, generator=generator, dtype=torch.float64),
            "y": torch.randn(n, generator=generator, dtype=torch.float64),
        }
        for n in sizes
    ]


def direction_for(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def dense_product(model, batches, vector):
    names = [name for name, _ in model.named_parameters()]

    def mean_loss(*values):
        parts = [
            torch.func.functional_call(model, dict(zip(names, values, strict=True)), (batch["x"],)) for batch in batches
        ]
        return torch.cat([(part - batch["y"]) ** 2 for part, batch in zip(parts, batches, strict=True)]).mean()

    values = tuple(parameter.detach() for parameter in model.parameters())
    product = torch.autograd.functional.hvp(mean_loss, values, tuple(vector[name] for name in names))[1]
    return dict(zip(names, product, strict=True))


@pytest.mark.parametrize(("product", "tolerance"), [(HESSIANS[0], 1e-12), (HESSIANS[1], 1e-7)])
def test_a_hessian_product_over_unequal_batches_is_that_of_the_mean(product, tolerance):
    model, batches = Net(), batches_of(5, 2, 1)
    vector = direction_for(model)
    expected = dense_product(model, batches, vector)
    found = product(model, squared, batches, vector)
    for name in vector:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("product", HESSIANS)
def test_parameters_that_the_vector_does_not_name_are_held_still(product):
    model, batches = Net(), batches_of(4)
    vector = direction_for(model)
    part = {"first": vector["first"]}
    expected = dense_product(model, batches, {**{n: torch.zeros_like(v) for n, v in vector.items()}, **part})
    found = product(model, squared, batches, part)
    assert set(found) == {"first"}
    torch.testing.assert_close(found["first"], expected["first"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("product", HESSIANS)
def test_the_hessian_of_a_language_model_is_symmetric_under_its_default_attention(product):
    model = tiny_model().eval()
    tokens = random_source(candidates=4, length=8, vocab=VOCAB).tokens
    batches = [{"input_ids": tokens[:3]}, {"input_ids": tokens[3:]}]
    u, v = direction_for(model, 0), direction_for(model, 1)
    left, right = product(model, causal_lm_loss, batches, v), product(model, causal_lm_loss, batches, u)
    one, other = (sum(float((a[n] * b[n]).sum()) for n in a) for a, b in ((u, left), (v, right)))
    assert one == pytest.approx(other, rel=1e-6)


def test_the_two_kinds_of_product_agree_on_a_language_model():
    model = tiny_model().eval()
    batches = [{"input_ids": random_source(candidates=4, length=8, vocab=VOCAB).tokens}]
    vector = direction_for(model)
    exact, close = (product(model, causal_lm_loss, batches, vector) for product in HESSIANS)
    for name in vector:
        torch.testing.assert_close(close[name], exact[name], rtol=1e-4, atol=1e-6)


def test_a_vector_of_zeros_gives_zeros():
    model, batches = Net(), batches_of(3)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for product in HESSIANS:
        assert not any(value.any() for value in product(model, squared, batches, zeros).values())
    assert not central_difference_dots(model, squared, lambda: batches, zeros).any()


def test_differences_of_losses_are_products_with_the_gradients_of_the_examples():
    model, batches = Net(), batches_of(5, 2)
    vector = direction_for(model)
    expected = []
    for batch in batches:
        for loss in squared(model, batch):
            gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            pairs = zip(gradient, vector.values(), strict=True)
            expected.append(sum(float((g * v).sum()) for g, v in pairs if g is not None))
    found = central_difference_dots(model, squared, lambda: batches, vector)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert central_difference_dots(model, squared, list, vector).shape == (0,)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_displaced_parameters_come_back_to_the_bit_also_after_an_error(fails_at):
    model, calls = Net(), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def failing(model, batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return squared(model, batch)

    for function in (
        lambda: central_difference_product(model, failing, batches_of(3), direction_for(model)),
        lambda: central_difference_dots(model, failing, lambda: batches_of(3), direction_for(model)),
    ):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            function()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_parameters_are_put_back_into_the_same_storage():
    model = Net()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with parameters_kept(model, model.parameters()) as kept, torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), kept, strict=True))


class Fused(torch.autograd.Function):
    """The identity, with a backward that has no derivative, like that of a fused kernel."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if torch.is_grad_enabled() and gradient.requires_grad:
            raise NotImplementedError("the derivative of fused_backward is not implemented")
        return gradient.clone()


def test_what_cannot_be_differentiated_twice_is_told_what_to_do():
    model, batches = Net(), batches_of(3)

    def fused(model, batch):
        return (Fused.apply(model(batch["x"])) - batch["y"]) ** 2

    with pytest.raises(RuntimeError, match=r'fused_backward is not implemented.*hessian="central_difference"'):
        double_backward_product(model, fused, batches, direction_for(model))
    central_difference_product(model, fused, batches, direction_for(model))


FREQUENCY = 1e4


class Wave(nn.Module):
    """A loss that turns over along one direction, on a length that is short beside that of the parameters."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.ones(100, dtype=torch.float64))

    def forward(self, phases):
        return torch.sin(FREQUENCY * self.place.mean() * 10 + phases)


def wave_losses(model, batch):
    return model(batch["x"])


def test_where_a_gradient_turns_on_the_way_differences_go_less_far():
    model, batches = Wave(), [{"x": torch.tensor([0.3, 0.7], dtype=torch.float64)}]
    vector = {"place": torch.full((100,), 0.1, dtype=torch.float64)}  # of length one
    exact = double_backward_product(model, wave_losses, batches, vector)["place"]
    reach = Reach()
    close = central_difference(model, vector, lambda: mean_gradient(model, wave_losses, batches), reach)["place"]
    torch.testing.assert_close(close, exact, rtol=1e-3, atol=0)
    assert 0 < reach.share < DISPLACEMENT_SHARES[torch.float64]
    calls = []

    def counted():
        calls.append(1)
        return mean_gradient(model, wave_losses, batches)

    torch.testing.assert_close(central_difference(model, vector, counted, reach)["place"], exact, rtol=1e-3, atol=0)
    assert len(calls) == 2  # it began where the one before ended


def test_differences_of_losses_go_as_far_as_losses_change_and_never_much_farther_than_usual():
    model, batches = Wave(), [{"x": torch.tensor([0.3, 0.7], dtype=torch.float64)}]
    vector = {"place": torch.full((100,), 0.1, dtype=torch.float64)}
    expected = FREQUENCY * torch.cos(FREQUENCY * 10 + batches[0]["x"])
    found = central_difference_dots(model, wave_losses, lambda: batches, vector, slope=FREQUENCY)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(central_difference_dots(model, wave_losses, lambda: batches, vector), expected, rtol=0.05)
    moved = []

    def noted(model, batch):
        moved.append(float((model.place - 1).norm()))
        return wave_losses(model, batch)

    central_difference_dots(model, noted, lambda: batches, vector, slope=1e-30)
    assert moved == pytest.approx([10 * DISPLACEMENT_SHARES[torch.float64] * 10] * 2, rel=1e-6)
