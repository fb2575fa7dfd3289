"""Products of every example's gradient with a direction, against gradients that autograd forms one by one."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from families import Kernel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from liveselect.functional.differences import central_difference_dot
from liveselect.functional.gradients import (
    example_dot,
    forward_mode_dot,
    mean_gradient,
    mean_loss_and_gradient,
    plan_products,
)
from liveselect.functional.layer_plans import known_of
from liveselect.losses import causal_lm_loss, target_counts

VOCAB = 61
EXACT = {"rtol": 1e-11, "atol": 1e-12}
# norms of these models compute in float32 whatever the model's precision, in both ways of measuring
ROUNDED = {"rtol": 1e-5, "atol": 1e-7}


def llama(**settings):
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "attention_bias": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))


def gpt2(**settings):
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


def neox(**settings):
    defaults = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**defaults, intermediate_size=64, max_position_embeddings=32, **settings))


def gemma(**settings):
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            sliding_window=8,
            pad_token_id=0,
        )
    )


class Scale(nn.Module):
    """A layer of a kind that nobody knows, not linear in its parameter."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.gain.tanh() * self.gain


class HandMade(nn.Module):
    """Positions without a batch, a layer called twice, work in place, a layer of unknown kind, a tied head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 16, padding_idx=0)
        self.positions = nn.Embedding(16, 16)
        self.twice = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 40, bias=False)
        self.narrow = nn.Linear(40, 16)
        self.scale = Scale(16)
        self.norm = nn.RMSNorm(16)
        self.last = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCAB)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = x + self.twice(self.twice(x).tanh())
        x = self.norm(x.cumsum(dim=1) / x.shape[1])
        hidden = F.relu(self.wide(x), inplace=True)
        x = self.narrow(hidden)
        scaled = self.scale(x)
        scaled += x
        return self.head(self.last(scaled))


MODELS = {"gpt2": gpt2, "neox": neox, "llama": llama, "gemma": gemma, "hand-made": HandMade}


def build(name, dtype=torch.float64, **settings):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        model = MODELS[name](**settings).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # away from ones and zeros, at which mistakes hide
                parameter.add_(0.3 * torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return model


def batch_of(rows=5, length=11, padded=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    if padded:
        for row in range(0, rows, 2):
            end = length - 2 - row
            labels[row, end:] = -100
            mask[row, end:] = 0
            tokens[row, end:] = 0
        labels[1, :3] = -100
        tokens[:, 1] = 0  # the padding token inside of a text
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def direction_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def row_of(batch, index):
    return {key: value[index : index + 1] for key, value in batch.items()}


def one_by_one(model, batch, direction, loss_fn=causal_lm_loss):
    """The products from whole gradients of one example after the other."""
    names = [name for name, value in direction.items() if value is not None]
    parameters = [dict(model.named_parameters())[name] for name in names]
    products = []
    for index in range(len(batch["input_ids"])):
        loss = loss_fn(model, row_of(batch, index)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        terms = [(g * direction[n]).sum() for g, n in zip(gradients, names, strict=True) if g is not None]
        products.append(torch.stack(terms).sum())
    return torch.stack(products)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_products_equal_those_of_gradients_formed_one_by_one(name, padded):
    model, batch = build(name), batch_of(padded=padded)
    direction = direction_of(model)
    tolerance = ROUNDED if name in {"llama", "gemma"} else EXACT
    torch.testing.assert_close(
        example_dot(model, causal_lm_loss, batch, direction), one_by_one(model, batch, direction), **tolerance
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_single_parameter_is_met_exactly(name):
    model, batch = build(name), batch_of(rows=3)
    for parameter_name, value in direction_of(model).items():
        found = example_dot(model, causal_lm_loss, batch, {parameter_name: value})
        expected = one_by_one(model, batch, {parameter_name: value})
        tolerance = ROUNDED if name in {"llama", "gemma"} else EXACT
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda text, n=parameter_name: f"{n}: {text}")


def test_products_equal_those_of_vectorised_per_example_gradients():
    model, batch = build("neox"), batch_of(padded=False)
    model.set_attn_implementation("eager")
    direction = direction_of(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values, tokens):
        logits = torch.func.functional_call(model, values, (tokens.unsqueeze(0),), {"use_cache": False}).logits
        return F.cross_entropy(logits[0, :-1], tokens[1:])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch["input_ids"])
    expected = sum((gradients[name].flatten(1) @ direction[name].flatten()) for name in direction)
    torch.testing.assert_close(example_dot(model, causal_lm_loss, batch, direction), expected, **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_agrees_in_every_parameter(name):
    model, batch = build(name), batch_of(padded=False)
    direction = direction_of(model)
    torch.testing.assert_close(
        forward_mode_dot(model, causal_lm_loss, batch, direction),
        example_dot(model, causal_lm_loss, batch, direction),
        **(ROUNDED if name in {"llama", "gemma"} else EXACT),
    )


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_central_differences_agree_to_the_order_of_their_step(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    exact = example_dot(model, causal_lm_loss, batch, direction)
    errors = [
        (central_difference_dot(model, causal_lm_loss, batch, direction, step) - exact).norm() / exact.norm()
        for step in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[2] < 1e-6
    assert errors[1] / errors[0] == pytest.approx(1e-2, rel=0.2)


def test_central_differences_put_the_parameters_back_to_the_bit_also_when_the_loss_fails():
    model, batch = build("gpt2", torch.float32), batch_of()
    before = copy.deepcopy(model.state_dict())
    central_difference_dot(model, causal_lm_loss, batch, direction_of(model))

    def fails(model, batch):
        raise KeyError("no")

    with pytest.raises(KeyError):
        central_difference_dot(model, fails, batch, direction_of(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_nothing_of_the_model_changes():
    model, batch = build("gpt2"), batch_of()
    model(batch["input_ids"]).logits.sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in model.named_parameters()}
    example_dot(model, causal_lm_loss, batch, direction_of(model))
    mean_gradient(model, causal_lm_loss, [batch])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
    assert not hooks_of(model)


def test_hooks_are_gone_after_an_exception_in_the_loss():
    model, batch = build("gemma"), batch_of(padded=False)

    def fails(model, batch):
        causal_lm_loss(model, batch)
        raise KeyError("no")

    with pytest.raises(KeyError):
        example_dot(model, fails, batch, direction_of(model))
    assert not hooks_of(model)


def test_hooks_are_gone_and_parameters_whole_after_an_exception_in_the_backward():
    model, batch = build("hand-made"), batch_of(padded=False)
    forward = model.scale.forward
    model.scale.forward = lambda x: forward(x) if torch.is_grad_enabled() else fails()

    def fails():
        raise KeyError("no")

    with pytest.raises(KeyError):
        example_dot(model, causal_lm_loss, batch, direction_of(model))
    assert not hooks_of(model)
    assert isinstance(model.scale.gain, nn.Parameter)


def test_tied_weights_sum_the_products_of_their_uses():
    model, batch = build("gpt2"), batch_of()
    assert model.lm_head.weight is model.transformer.wte.weight
    value = direction_of(model)["transformer.wte.weight"]
    found = example_dot(model, causal_lm_loss, batch, {"transformer.wte.weight": value})
    assert torch.equal(found, example_dot(model, causal_lm_loss, batch, {"lm_head.weight": value}))
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    parts = [
        example_dot(untied, causal_lm_loss, batch, {name: value})
        for name in ("transformer.wte.weight", "lm_head.weight")
    ]
    torch.testing.assert_close(found, parts[0] + parts[1], **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_products_do_not_depend_on_batch_order_or_padding(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    whole = example_dot(model, causal_lm_loss, batch, direction)
    alone = torch.cat([example_dot(model, causal_lm_loss, row_of(batch, i), direction) for i in range(5)])
    turned = example_dot(model, causal_lm_loss, {key: value.flip(0) for key, value in batch.items()}, direction)
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    longer = {key: F.pad(value, (0, 4), value=pad[key]) for key, value in batch.items()}
    padded = example_dot(model, causal_lm_loss, longer, direction)
    tolerance = ROUNDED if name in {"llama", "gemma"} else {"rtol": 1e-10, "atol": 1e-11}
    for other in (alone, turned.flip(0), padded):
        torch.testing.assert_close(other, whole, **tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_any_attention_kernel_gives_the_same_products(name, attention):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    model.set_attn_implementation(attention)
    expected = one_by_one(model, batch, direction)
    torch.testing.assert_close(example_dot(model, causal_lm_loss, batch, direction), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_activation_checkpointing_changes_no_bit(name):
    model, batch = build(name), batch_of()
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # models checkpoint in training mode only; these have no dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(example_dot(model, causal_lm_loss, batch, direction), expected)


def test_reentrant_checkpointing_is_refused_where_it_hides_layers():
    model, batch = build("neox"), batch_of()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    hidden = {name: value for name, value in direction_of(model).items() if ".layers." in name}
    with pytest.raises(ValueError, match=r"gpt_neox\.layers\.\*.*ran without gradients.*use_reentrant=False"):
        example_dot(model, causal_lm_loss, batch, hidden)


@pytest.mark.long
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_are_measured_eagerly(in_place):
    model, batch = build("neox", torch.float32), batch_of(padded=False)
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction)
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        direction = {f"_orig_mod.{name}": value for name, value in direction.items()}
    compiled(batch["input_ids"])  # hooks that come after the first compiled call would never fire
    assert torch.equal(example_dot(compiled, causal_lm_loss, batch, direction), expected)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_autocast_is_followed_within_its_own_rounding(name):
    model, batch = build(name, torch.float32), batch_of(rows=8)
    direction = mean_gradient(model, causal_lm_loss, [batch_of(rows=8, seed=5)])

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return causal_lm_loss(model, batch)

    found = example_dot(model, loss_fn, batch, direction)
    expected = one_by_one(model, batch, direction, loss_fn)
    exact = one_by_one(model, batch, direction)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * exact.norm()
    assert (found - exact).norm() < 0.04 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_products_in_lower_precision_are_those_of_double_precision_within_rounding(name, dtype):
    model, batch = build(name), batch_of(padded=False)
    direction = mean_gradient(model, causal_lm_loss, [batch_of(rows=8, seed=5, padded=False)])
    exact = example_dot(model, causal_lm_loss, batch, direction)
    found = example_dot(model.to(dtype), causal_lm_loss, batch, direction)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < (1e-5 if dtype == torch.float32 else 0.1) * exact.norm()


class Opaque(HandMade):
    """Uses one weight past its layer, and holds a parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(16))

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.start
        return self.head(F.linear(self.last(x), self.twice.weight, self.twice.bias) + self.twice(x))


def test_parameters_that_no_layer_shows_are_seen_from_above():
    model, batch = Opaque().double(), batch_of(padded=False)
    direction = direction_of(model)
    expected = one_by_one(model, batch, direction)
    torch.testing.assert_close(example_dot(model, causal_lm_loss, batch, direction), expected, **EXACT)
    torch.testing.assert_close(forward_mode_dot(model, causal_lm_loss, batch, direction), expected, **EXACT)
    for name in ("start", "twice.weight", "twice.bias"):
        alone = {name: direction[name]}
        found = example_dot(model, causal_lm_loss, batch, alone)
        torch.testing.assert_close(found, one_by_one(model, batch, alone), **EXACT)
    assert not hooks_of(model)


def test_a_use_past_the_layer_is_seen_under_autocast_and_checkpointing():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCAB, 16)
            self.inner = nn.Linear(16, 16)

        def forward(self, input_ids):
            x = checkpoint(
                lambda x: F.linear(self.inner(x).tanh(), self.inner.weight), self.tokens(input_ids), use_reentrant=False
            )
            return x @ self.tokens.weight.t()

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return causal_lm_loss(model, batch)

    model, batch = Head(), batch_of(padded=False)
    direction = mean_gradient(model, causal_lm_loss, [batch_of(rows=8, seed=5)])
    found, expected = example_dot(model, loss_fn, batch, direction), one_by_one(model, batch, direction)
    assert (found - expected).norm() < 0.04 * expected.norm()
    assert {"tokens.weight", "inner.weight"} <= set(known_of(model).levels)


class Fused(HandMade):
    """Holds parameters that go through a kernel."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(16))

    def forward(self, input_ids):
        return self.head(Kernel.apply(self.tokens(input_ids) + self.start))


def test_parameters_that_cannot_be_seen_from_anywhere_are_an_error_with_their_layer():
    model, batch = Fused().double(), batch_of(padded=False)
    direction = direction_of(model)
    with pytest.raises(ValueError, match=r"\(Fused\) maps tensors by .* twice: leave its.*exclude.*central_difference"):
        example_dot(model, causal_lm_loss, batch, direction)
    seen = {**direction, "start": None}
    found = example_dot(model, causal_lm_loss, batch, seen)
    torch.testing.assert_close(found, one_by_one(model, batch, seen), **EXACT)
    assert not hooks_of(model)


class Dropping(nn.Module):
    """A parameter beside dropout, with which a layer computes something else each time."""

    def __init__(self):
        super().__init__()
        self.inside, self.gain = nn.Linear(16, 16), nn.Parameter(torch.randn(16))

    def forward(self, x):
        return F.dropout(self.inside(x) * self.gain.exp(), 0.5, self.training)


def test_a_layer_that_computes_once_more_draws_the_same_numbers():
    model = nn.Sequential(nn.Embedding(VOCAB, 16), Dropping(), nn.Linear(16, VOCAB)).double().train()
    batch = {"input_ids": batch_of(padded=False)["input_ids"]}
    direction = {"1.gain": direction_of(model)["1.gain"]}
    example_dot(model, causal_lm_loss, batch, direction)  # compares with gradients, which draw other numbers
    torch.random.default_generator.manual_seed(5)
    found = example_dot(model, causal_lm_loss, batch, direction)
    after = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(5)
    losses = causal_lm_loss(model, batch)
    assert torch.equal(after, torch.random.get_rng_state())
    expected = [
        (torch.autograd.grad(loss, model[1].gain, retain_graph=True)[0] * direction["1.gain"]).sum() for loss in losses
    ]
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)


def test_layers_that_a_batch_does_not_reach_contribute_nothing():
    model, batch = build("neox"), batch_of()
    model.idle = nn.Linear(4, 4).double()
    direction = direction_of(model)
    reached = {name: value for name, value in direction.items() if not name.startswith("idle")}
    found = example_dot(model, causal_lm_loss, batch, direction)
    assert torch.equal(found, example_dot(model, causal_lm_loss, batch, reached))
    idle = {name: value for name, value in direction.items() if name.startswith("idle")}
    assert torch.equal(example_dot(model, causal_lm_loss, batch, idle), torch.zeros(5, dtype=torch.float64))


def test_a_layer_that_mixes_examples_is_an_error():
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.BatchNorm1d(11), nn.Linear(16, VOCAB))
    with pytest.raises(ValueError, match=r"parameters \['1.bias', '1.weight'\]: their modules mix the examples"):
        plan_products(model, direction_of(model))
    recurrent = nn.Sequential(nn.GRU(4, 4))
    with pytest.raises(ValueError, match=re.escape(f"parameters {sorted(dict(recurrent.named_parameters()))}")):
        plan_products(recurrent, direction_of(recurrent))


def test_a_layer_that_mixes_examples_unseen_gives_the_gradients_of_losses_in_their_batch():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.gain = nn.Linear(16, 16), nn.Parameter(torch.ones(16))

        def forward(self, x):
            x = self.inside(x)
            return (x - x.mean(dim=0)) * self.gain

    model = nn.Sequential(nn.Embedding(VOCAB, 16), Mixing(), nn.Linear(16, VOCAB)).double()
    batch, direction = {"input_ids": batch_of()["input_ids"]}, direction_of(model)
    found = example_dot(model, causal_lm_loss, batch, direction)
    expected = []
    for loss in causal_lm_loss(model, batch):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        expected.append(sum((g * value).sum() for g, value in zip(gradients, direction.values(), strict=True)))
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)


def test_parametrised_weights_are_seen_at_the_layer_that_uses_them():
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, VOCAB)))
    batch, direction = {"input_ids": batch_of()["input_ids"]}, direction_of(model.double())
    found = example_dot(model, causal_lm_loss, batch, direction)
    torch.testing.assert_close(found, one_by_one(model, batch, direction), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "no.such": d["head.bias"]}, r"does not have: \['no.such'\]"),
        (lambda d: {**d, "head.bias": d["head.bias"][:3]}, r"shape \(61,\) for 'head.bias', got \(3,\)"),
        (lambda d: {**d, "head.weight": d["tokens.weight"]}, "tied parameter twice"),
        (lambda d: dict.fromkeys(d), "at least one parameter"),
    ],
)
@pytest.mark.parametrize("engine", [example_dot, central_difference_dot, forward_mode_dot])
def test_directions_that_do_not_fit_are_refused(engine, change, message):
    model = build("hand-made")
    with pytest.raises(ValueError, match=message):
        engine(model, causal_lm_loss, batch_of(), change(direction_of(model)))


def test_positions_that_could_be_examples_are_seen_from_above():
    model, batch = build("hand-made"), batch_of(rows=11, padded=False)
    direction = direction_of(model)
    found = example_dot(model, causal_lm_loss, batch, direction)
    torch.testing.assert_close(found, one_by_one(model, batch, direction), **EXACT)


def test_a_loss_of_the_wrong_shape_is_refused():
    model = build("hand-made")
    with pytest.raises(ValueError, match=r"expected loss_fn to return \(5,\) losses, one per row, got \(\)"):
        example_dot(model, lambda m, b: causal_lm_loss(m, b).mean(), batch_of(), direction_of(model))


def test_the_mean_gradient_weighs_examples_by_their_tokens_and_batches_do_not_matter():
    model, batch = build("gpt2"), batch_of()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected_loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    parts = [row_of(batch, index) for index in range(5)]
    for batches in ([batch], parts, parts[::-1]):
        counts = [target_counts(part) for part in batches]
        loss, gradient = mean_loss_and_gradient(model, causal_lm_loss, batches, counts)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
        torch.testing.assert_close(list(gradient.values()), list(expected), **EXACT)


def test_without_weights_every_example_counts_once():
    model, batch = build("neox"), batch_of()
    expected = torch.autograd.grad(causal_lm_loss(model, batch).mean(), list(model.parameters()))
    torch.testing.assert_close(list(mean_gradient(model, causal_lm_loss, [batch]).values()), list(expected), **EXACT)


def test_the_mean_gradient_of_a_short_float_model_is_accumulated_in_float32():
    model = build("neox", torch.bfloat16)
    gradient = mean_gradient(model, causal_lm_loss, [batch_of()])
    assert {value.dtype for value in gradient.values()} == {torch.float32}


def test_the_sum_of_products_is_the_product_of_the_summed_gradient():
    model, batch = build("llama"), batch_of()
    direction = direction_of(model)
    gradient = mean_gradient(model, causal_lm_loss, [batch])
    expected = sum((gradient[name] * direction[name]).sum() for name in direction)
    found = example_dot(model, causal_lm_loss, batch, direction).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_mean_gradient_over_nothing_is_refused():
    model = build("neox")
    with pytest.raises(ValueError, match="weights with a positive sum"):
        mean_gradient(model, causal_lm_loss, [batch_of()], [torch.zeros(5)])
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        mean_gradient(model.requires_grad_(False), causal_lm_loss, [batch_of()])
