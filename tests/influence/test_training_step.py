"""Scores out of the training step's own backward: the same numbers, and the same training to the bit."""

import pytest
import torch
import torch.nn.functional as F
from cases import Bigrams
from probing import VOCAB, tiny_model
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from liveselect.functional.differences import central_difference_dot
from liveselect.functional.gradients import example_dot, token_dots
from liveselect.influence.training_step import (
    TrainingStepScores,
    find_loss_mean,
    mean_weights,
    tokens_of_positions,
)
from liveselect.losses import causal_lm_loss, causal_lm_token_losses, target_counts

MODELS = {
    "neox": lambda: tiny_model(torch.float32, hidden_dropout=0.1, attention_dropout=0.1),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
}


def build(name, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(1)
        return MODELS[name]().to(dtype)


def batch_of(rows=6, seed=0):
    tokens = torch.randint(0, VOCAB, (rows, 10), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    for row in range(rows):
        labels[row, 10 - row :] = -100 if row else labels[row, 10 - row :]
    return {"id": torch.arange(rows), "input_ids": tokens, "labels": labels}


def direction_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def training_loss(model, batch, mean="tokens"):
    losses = causal_lm_loss(model, batch)
    return losses @ mean_weights(batch, mean).to(losses)


@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_measurement_of_their_own(name, rows, mean):
    model, batch = build(name).eval(), batch_of(rows)
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction)
    scores = TrainingStepScores(model, direction)
    scores.attach(batch)
    loss = training_loss(model, batch, mean)
    scores.check(loss)
    (loss * 128 / 3).backward()  # the scale of a GradScaler, three micro-batches in a step
    found = scores.collect(mean_weights(batch, mean, divisor=3 / 128))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert not scores.attached


def test_only_the_first_examples_are_scored_on_request():
    model, batch = build("neox").eval(), batch_of(3)
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction).float()
    for wanted in (1, 2, 3, 7):
        scores = TrainingStepScores(model, direction, examples=wanted)
        scores.attach(batch)
        training_loss(model, batch).backward()
        found = scores.collect(mean_weights(batch))
        torch.testing.assert_close(found[:wanted], expected[:wanted], rtol=1e-5, atol=1e-6)
        assert found[wanted:].isnan().all()


def positions_of(model, batch, direction, mean="tokens", examples=None):
    scores = TrainingStepScores(model, direction, examples, by_position=True)
    scores.attach(batch)
    loss = training_loss(model, batch, mean)
    scores.check(loss)
    (loss * 128).backward()
    return scores.collect(mean_weights(batch, mean, divisor=1 / 128)), scores.positions


@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("name", MODELS)
def test_what_positions_show_sums_to_the_example_and_so_do_the_tokens_made_of_it(name, mean):
    model, batch = build(name).eval(), batch_of()
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction)
    influence, positions = positions_of(model, batch, direction, mean)
    torch.testing.assert_close(influence, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(positions.sum(dim=1), influence, rtol=1e-5, atol=1e-5)
    tokens = tokens_of_positions(positions, batch)
    counts = target_counts(batch)
    assert torch.equal((~tokens.isnan()).sum(dim=1), counts)
    assert tokens[:, 0].isnan().all()
    torch.testing.assert_close(tokens.nansum(dim=1), counts * influence, rtol=1e-4, atol=1e-4)
    few, first = positions_of(model, batch, direction, mean, examples=2)
    torch.testing.assert_close(first[:2], positions[:2], rtol=1e-5, atol=1e-6)
    assert first[2:].isnan().all()
    assert few[2:].isnan().all()


def test_where_positions_do_not_look_at_each_other_a_step_shows_what_each_token_is_worth():
    model, batch = Bigrams().double(), batch_of()
    direction = direction_of(model)
    _, positions = positions_of(model, batch, direction)
    exact = token_dots(model, causal_lm_token_losses, batch, direction)
    differences = central_difference_dot(model, causal_lm_token_losses, batch, direction, 1e-5)
    tokens = tokens_of_positions(positions, batch)
    torch.testing.assert_close(tokens, exact.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(tokens, differences.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_where_positions_look_at_each_other_a_step_still_shows_most_of_what_tokens_are_worth():
    model, batch = build("neox").eval(), equally_long(24)
    direction = gradients_as_direction(model, batch_of(6, seed=5))
    tokens = tokens_of_positions(positions_of(model, batch, direction)[1], batch)[:, 1:]
    exact = token_dots(model, causal_lm_token_losses, batch, direction)[:, 1:]
    assert torch.corrcoef(torch.stack([tokens.flatten().double(), exact.flatten()]))[0, 1] > 0.7


def gradients_as_direction(model, batch):
    loss = training_loss(model, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def train(name, scored, rows=5, accumulate=1, autocast=False, checkpointing=False, steps=4):
    """Train with dropout, clipping and accumulation; returns the model, and all scores."""
    model = build(name, torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scores = TrainingStepScores(model, direction_of(model))
    found = []
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(5)
        for step in range(steps):
            for part in range(accumulate):
                batch = batch_of(rows, seed=10 * step + part)
                if scored:
                    scores.attach(batch)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = training_loss(model, batch) / accumulate
                if scored:
                    scores.check(loss)
                loss.backward()
                if scored:
                    found.append(scores.collect(mean_weights(batch, divisor=accumulate)))
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model, found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rows": 1},
        {"rows": 3},
        {"accumulate": 3},
        {"autocast": True},
        {"checkpointing": True},
        {"checkpointing": True, "autocast": True, "accumulate": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_to_the_bit(name, settings):
    plain, _ = train(name, scored=False, **settings)
    watched, found = train(name, scored=True, **settings)
    assert all(scores.isfinite().all() and scores.abs().max() > 0 for scores in found)
    for (key, expected), value in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    hooks = [[len(module._forward_hooks) for module in model.modules()] for model in (plain, watched)]
    assert hooks[0] == hooks[1]  # checkpointing brings some of its own
    assert not any(parameter._backward_hooks for parameter in watched.parameters())


@pytest.mark.parametrize("rows", [3, 6])
def test_checkpointing_and_autocast_change_scores_within_rounding_only(rows):
    exact = train("llama", True, rows=rows, steps=1)[1][0]
    assert torch.equal(train("llama", True, rows=rows, steps=1, checkpointing=True)[1][0], exact)
    short = train("llama", True, rows=rows, steps=1, autocast=True)[1][0]
    assert (short - exact).norm() < 0.05 * exact.norm()


def equally_long(rows, seed=0):
    tokens = torch.randint(0, VOCAB, (rows, 10), generator=torch.Generator().manual_seed(seed))
    return {"id": torch.arange(rows), "input_ids": tokens, "labels": tokens}


def heard(model, batch, direction, mean="examples"):
    scores = TrainingStepScores(model, direction)
    scores.attach(batch)
    training_loss(model, batch, mean).backward()
    return scores.collect(mean_weights(batch, mean))


@pytest.mark.parametrize("rows", [2, 8, 16, 17])
@pytest.mark.parametrize("name", MODELS)
def test_the_example_that_is_had_from_the_sum_is_as_exact_as_the_others(name, rows):
    """Within rounding of float32 all are; the last one gathers that of the sum, and no more."""
    batch = equally_long(rows)
    exact = build(name, torch.float64).eval()
    expected = example_dot(exact, causal_lm_loss, batch, direction_of(exact))
    single = build(name, torch.float32).eval()
    direction = {key: value.float() for key, value in direction_of(exact).items()}
    errors = (heard(single, batch, direction) - expected).abs()
    size = expected.square().mean().sqrt()
    assert (errors < 1e-5 * size).all()
    assert errors[-1] < rows * 1e-6 * size


def test_an_example_without_targets_has_no_influence_and_changes_that_of_no_other():
    model, batch = build("neox").eval(), equally_long(5)
    direction = direction_of(model)
    batch["labels"] = batch["labels"].clone()
    expected = example_dot(model, causal_lm_loss, batch, direction).float()
    for empty in (1, 4):
        labels = batch["labels"].clone()
        labels[empty] = -100
        for mean in ("tokens", "examples"):
            model.zero_grad()
            found = heard(model, {**batch, "labels": labels}, direction, mean)
            others = torch.arange(5) != empty
            torch.testing.assert_close(found[others], expected[others], rtol=1e-5, atol=1e-6)
            assert found[empty].abs() < 1e-10 * expected.norm()


def test_a_parameter_that_is_frozen_after_the_direction_was_made_counts_for_every_example():
    model, batch = build("neox").eval(), equally_long(4)
    direction = direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction).float()
    model.gpt_neox.layers[0].requires_grad_(False)
    torch.testing.assert_close(heard(model, batch, direction), expected, rtol=1e-5, atol=1e-6)


class Positioned(nn.Module):
    """Looks its positions up once for all examples, as many hand-written models do."""

    def __init__(self, width=8):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(16, width)
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, VOCAB)

    def forward(self, ids):
        return self.head(self.inner(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))).tanh())


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_positions_that_examples_share_are_met_by_each_of_them(rows):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = Positioned().double()
    batch, direction = equally_long(rows), direction_of(model)
    expected = example_dot(model, causal_lm_loss, batch, direction).float()
    for examples in (None, 1, 3):
        scores = TrainingStepScores(model, direction, examples)
        scores.attach(batch)
        training_loss(model, batch).backward()
        wanted = min(examples or rows, rows)
        found = scores.collect(mean_weights(batch))
        torch.testing.assert_close(found[:wanted], expected[:wanted], rtol=1e-5, atol=1e-6)
        assert found[wanted:].isnan().all()


class Routed(nn.Module):
    """Its gate sees all tokens of a batch in one row, as those of mixtures of experts do."""

    def __init__(self, width=8):
        super().__init__()
        self.tokens, self.gate = nn.Embedding(VOCAB, width), nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids):
        x = self.tokens(ids)
        flat = x.flatten(0, 1)
        shares = self.gate(flat).softmax(dim=-1)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            chosen = (shares.argmax(dim=-1) == index).nonzero().flatten()
            mixed = mixed.index_add(0, chosen, expert(flat[chosen]) * shares[chosen, index, None])
        return self.head(x + mixed.view_as(x))


def routed():
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Routed()


def gradients_of_step(model, batch, scores=None):
    model.zero_grad()
    if scores is not None:
        scores.attach(batch)
    loss = training_loss(model, batch)
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("rows", [1, 3])
def test_layers_that_cannot_be_heard_leave_the_step_as_it_was_and_are_told(rows):
    batch = equally_long(rows)
    expected = gradients_of_step(routed(), batch)
    model = routed()
    scores = TrainingStepScores(model, direction_of(model))
    found = gradients_of_step(model, batch, scores)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if rows == 1:  # one example alone needs no layers
        assert scores.collect(mean_weights(batch)).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"expected module 'experts.0' .* one row for each of the 3 examples"):
        scores.collect(mean_weights(batch))
    scores.attach(batch)
    loss = training_loss(model, batch)
    with pytest.raises(ValueError, match=r"training step cannot be scored: expected module 'experts.0'"):
        scores.check(loss)
    scores.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_in_the_backward_leaves_the_step_as_it_was_and_is_told(monkeypatch):
    batch = equally_long(3)
    expected = gradients_of_step(build("neox").eval(), batch)
    model = build("neox").eval()
    scores = TrainingStepScores(model, direction_of(model))

    def fails(inputs, delta):
        raise NotImplementedError("no forward-mode rule")

    monkeypatch.setitem(scores._plan.observers, "gpt_neox.final_layer_norm", fails)
    found = gradients_of_step(model, batch, scores)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="cannot be scored: no forward-mode rule"):
        scores.collect(mean_weights(batch))


def parallel(scored):
    from liveselect import distributed

    model = build("neox", torch.float32).train()
    wrapped = DistributedDataParallel(model)
    scores = TrainingStepScores(model, direction_of(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    torch.random.default_generator.manual_seed(3)
    for step in range(3):
        batch = batch_of(5, seed=2 * step + distributed.rank())
        if scored:
            scores.attach(batch)
        logits = wrapped(batch["input_ids"]).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        if scored:
            found.append(scores.collect(mean_weights(batch)).tolist())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.tolist() for parameter in model.parameters()], found


@pytest.mark.long
def test_under_data_parallel_training_is_the_same_and_each_rank_scores_its_own():
    plain, watched = on_ranks(parallel, 2, False), on_ranks(parallel, 2, True)
    assert plain[0][0] == plain[1][0] == watched[0][0] == watched[1][0]
    assert watched[0][1] != watched[1][1]


def test_hooks_are_gone_after_a_step_that_failed():
    model, batch = build("neox"), batch_of()
    scores = TrainingStepScores(model, direction_of(model))
    scores.attach(batch)
    with pytest.raises(IndexError):
        model(torch.full((6, 10), VOCAB))
    scores.detach()
    assert not any(module._forward_hooks for module in model.modules())
    scores.attach(batch)
    training_loss(model, batch).backward()
    assert scores.collect(mean_weights(batch)).isfinite().all()


def test_attaching_twice_and_collecting_nothing_are_refused():
    model, batch = build("neox"), batch_of()
    scores = TrainingStepScores(model, direction_of(model))
    with pytest.raises(RuntimeError, match="attach\\(batch\\) before the forward"):
        scores.collect(mean_weights(batch))
    scores.attach(batch)
    with pytest.raises(RuntimeError, match="attached already"):
        scores.attach(batch)
    with pytest.raises(RuntimeError, match="no hook was called"):
        scores.collect(mean_weights(batch))
    scores.attach(batch)
    training_loss(model, batch)
    with pytest.raises(RuntimeError, match="layers were called, but no gradient reached them"):
        scores.collect(mean_weights(batch))
    assert not scores.attached


def test_a_model_that_was_compiled_before_says_that_its_hooks_do_not_run():
    model, batch = build("neox", torch.float32), batch_of()
    inner = torch.compile(model.gpt_neox, backend="eager")
    head = model.embed_out if hasattr(model, "embed_out") else model.lm_head

    def logits():
        return head(inner(batch["input_ids"]).last_hidden_state)

    logits()
    body = {name: value for name, value in direction_of(model).items() if ".layers." in name}
    scores = TrainingStepScores(model, body)
    scores.attach(batch)
    with torch.compiler.set_stance("default"):
        F.cross_entropy(logits()[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
    with pytest.raises(RuntimeError, match="Hooks do not run in compiled layers"):
        scores.collect(mean_weights(batch))


def test_uses_of_weights_past_their_layers_are_found_by_the_check():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.inner = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return F.linear(self.inner(self.tokens(ids)).tanh(), self.inner.weight) @ self.tokens.weight.t()

    model, batch = Past(), batch_of()
    scores = TrainingStepScores(model, direction_of(model))
    scores.attach(batch)
    loss = training_loss(model, batch)
    with pytest.raises(ValueError, match=r"uses parameters \['inner.weight', 'tokens.weight'\] past the layers"):
        scores.check(loss)
    scores.detach()
    # one example alone needs no layers to be seen
    model, batch = model.double(), batch_of(1)
    direction = direction_of(model)
    gradients = torch.autograd.grad(causal_lm_loss(model, batch).sum(), list(model.parameters()))
    scores = TrainingStepScores(model, direction)
    scores.attach(batch)
    loss = training_loss(model, batch)
    scores.check(loss)
    loss.backward()
    expected = sum((g * direction[n]).sum() for g, (n, _) in zip(gradients, model.named_parameters(), strict=True))
    assert scores.collect(mean_weights(batch)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_which_mean_a_training_loss_is_can_be_told():
    model, batch = build("neox").eval(), batch_of()
    losses, counts = causal_lm_loss(model, batch), target_counts(batch)
    for mean in ("tokens", "examples"):
        assert find_loss_mean(losses, counts, training_loss(model, batch, mean).item()) == mean
    with pytest.raises(ValueError, match=r"neither the mean over tokens .* nor that over examples"):
        find_loss_mean(losses, counts, losses.sum().item())


def test_weights_of_a_mean_sum_to_one_over_the_divisor():
    batch = batch_of()
    for mean in ("tokens", "examples"):
        assert mean_weights(batch, mean, divisor=4.0).sum().item() == pytest.approx(0.25)
    counts = target_counts(batch).double()
    torch.testing.assert_close(mean_weights(batch), counts / counts.sum())


def test_a_number_of_examples_below_one_is_refused():
    model = build("neox")
    with pytest.raises(ValueError, match="examples of at least 1, or None for all of a batch, got 0"):
        TrainingStepScores(model, direction_of(model), examples=0)
