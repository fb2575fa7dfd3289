"""Products with single examples' gradients in the families of models that people pretrain, against autograd."""

import pytest
import torch
from families import CONFIGURATIONS, FAMILIES, VOCABULARY, build

from liveselect.functional.gradients import example_dot, token_dots
from liveselect.losses import causal_lm_loss, causal_lm_token_losses

# float64 agrees to 1e-14; norms, routers and scans of many families compute in float32 whatever their model does
TOLERANCE = 1e-5
FUSED = ["Mixtral", "gpt-oss", "DeepSeek-V3"]


def batch_of(rows=3, length=9):
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


def direction_of(model):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def one_by_one(model, batch, direction):
    products = []
    for row in range(len(batch["input_ids"])):
        loss = causal_lm_loss(model, {name: value[row : row + 1] for name, value in batch.items()}).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(gradients, direction.values(), strict=True)
        products.append(sum((gradient * value).sum() for gradient, value in pairs if gradient is not None))
    return torch.stack(products)


@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_those_of_gradients_formed_one_by_one(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    expected = one_by_one(model, batch, direction)
    found = example_dot(model, causal_lm_loss, batch, direction)
    assert (found - expected).norm() < TOLERANCE * expected.norm()
    again = example_dot(model, causal_lm_loss, {key: value.flip(0) for key, value in batch.items()}, direction)
    assert (again.flip(0) - expected).norm() < TOLERANCE * expected.norm()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", FUSED)
def test_grouped_products_of_experts_are_differentiated_too(name):
    model, batch = build(name, torch.float32), batch_of()
    assert model.config._experts_implementation == "grouped_mm"
    direction = direction_of(model)
    expected = one_by_one(model, batch, direction)
    assert (example_dot(model, causal_lm_loss, batch, direction) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["Mixtral", "OPT", "Mamba", "a list of experts"])
def test_the_products_of_tokens_add_up_to_those_of_rows(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    tokens = token_dots(model, causal_lm_token_losses, batch, direction)
    rows = example_dot(model, causal_lm_loss, batch, direction)
    torch.testing.assert_close(tokens.nanmean(dim=1).to(rows), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mamba-2"])
def test_activation_checkpointing_changes_nothing(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(example_dot(model, causal_lm_loss, batch, direction), expected, rtol=1e-6, atol=1e-8)


def test_every_family_has_a_configuration_of_its_own():
    assert len({str(settings) + kind for kind, settings in CONFIGURATIONS.values()}) == len(CONFIGURATIONS)
