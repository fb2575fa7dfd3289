"""Influence under Kronecker-factored curvature against dense matrices, real steps, limits and invariances."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fakes import FakeSource, fake_context, random_source
from probing import VOCAB, warm_context
from ranks import on_ranks
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.utils.checkpoint import checkpoint

from liveselect.functional.kronecker import solve
from liveselect.grammar import NotMeasurableError
from liveselect.influence.kfac import KFACInfluence
from liveselect.losses import causal_lm_loss
from liveselect.preserve import checksum

VARIANTS = ["kfac", "ekfac", "output_only", "diagonal", "identity"]


class Small(nn.Module):
    """A language model whose queries, keys and values come from one layer or from three."""

    def __init__(self, form="separate", width=8, heads=2):
        super().__init__()
        self.form, self.heads = form, heads
        self.tokens = nn.Embedding(VOCAB, width)
        if form == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            setattr(self, form, nn.Linear(width, 3 * width))
            self.config = type("Config", (), {"num_attention_heads": heads})
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        rows, length, width = x.shape
        if self.form == "separate":
            parts = [layer(x).view(rows, length, self.heads, -1) for layer in (self.q, self.k, self.v)]
        elif self.form == "query_key_value":
            parts = self.query_key_value(x).view(rows, length, self.heads, 3, -1).unbind(3)
        else:
            parts = getattr(self, self.form)(x).view(rows, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return self.head(x + self.down(self.up(x).tanh()))


def small(form="separate"):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Small(form).double()


LAYERS = ("q", "k", "v", "out", "up", "down")


def small_context(model=None, **kwargs):
    source = random_source(candidates=24, length=7, vocab=VOCAB)
    labels = source.tokens.clone()
    labels[1, 4:] = labels[5, 2:] = -100  # two candidates end early
    source = FakeSource(source.tokens, source.references, labels=labels, **kwargs)
    return fake_context(source, model=model or small())


def candidate_batch(context, count=12):
    return next(iter(context.round.batches(torch.arange(count))))


def measure(context, batch=None, **settings):
    estimator = KFACInfluence(factor_examples=len(context.candidates), **settings)
    context.fit(estimator)
    return context.score(estimator, candidate_batch(context) if batch is None else batch)


def token_statistics(context, name, ids):
    """Inputs with a 1 and output gradients of summed losses ``(n, T, .)``, captured by hand, one example at a time."""
    layer = dict(context.model.named_modules())[name]
    xs, deltas = [], []
    for row in ids.tolist():
        kept = []
        handle = layer.register_forward_hook(lambda _, inputs, output, kept=kept: kept.extend([inputs[0], output]))
        logits = context.model(context.source.tokens[row : row + 1])
        handle.remove()
        targets = context.source.labels[row : row + 1, 1:]
        loss = F.cross_entropy(logits[0, :-1], targets[0], ignore_index=-100, reduction="sum")
        (delta,) = torch.autograd.grad(loss, kept[1])
        x = kept[0].detach()
        if layer.bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        last = int((targets[0] != -100).nonzero().max()) + 1  # what is to the right of the last target is not read
        xs.append(x[0, :last])
        deltas.append(delta[0, :last])
    return xs, deltas


def dense_fisher(variant, xs, deltas):
    tokens = sum(len(x) for x in xs)
    a = sum(x.t() @ x for x in xs) / tokens
    s = sum(delta.t() @ delta for delta in deltas) / tokens
    gradients = [(delta.t() @ x).flatten() for x, delta in zip(xs, deltas, strict=True)]
    if variant == "kfac":
        return torch.kron(s, a)
    if variant == "output_only":
        return torch.kron(s, a.trace() / len(a) * torch.eye(len(a), dtype=a.dtype))
    if variant == "diagonal":
        return torch.diag(sum(g.square() for g in gradients) / tokens)
    rotation = torch.kron(torch.linalg.eigh(s)[1], torch.linalg.eigh(a)[1])
    squares = sum((rotation.t() @ g).square() for g in gradients) / tokens
    return rotation @ torch.diag(squares) @ rotation.t()


def gradient_of(context, loss, names):
    """The gradients of the layers' weights and biases, as flat matrices with the bias last."""
    modules = dict(context.model.named_modules())
    flat = {}
    for name in names:
        layer = modules[name]
        parts = torch.autograd.grad(loss, [p for p in (layer.weight, layer.bias) if p is not None], retain_graph=True)
        flat[name] = torch.cat([part.view(len(part), -1) for part in parts], dim=1).flatten()
    return flat


def dense_influence(context, variant, batch, damping=0.1, names=LAYERS):
    reference = context.source.references
    logits = context.model(reference)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), reference[:, 1:].flatten())
    direction = gradient_of(context, loss, names)
    if variant != "identity":
        for name in names:
            fisher = dense_fisher(variant, *token_statistics(context, name, context.candidates))
            damped = fisher + damping * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=fisher.dtype)
            direction[name] = torch.linalg.solve(damped, direction[name])
    found = []
    for loss in causal_lm_loss(context.model, batch):
        gradients = gradient_of(context, loss, names)
        found.append(sum(gradients[name] @ direction[name] for name in names))
    return torch.stack(found).float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_influence_is_that_of_dense_matrices(variant):
    context = small_context()
    batch = candidate_batch(context)
    expected = dense_influence(context, variant, batch)
    torch.testing.assert_close(measure(context, curvature=variant), expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("variant", ["kfac", "ekfac"])
def test_one_layer_that_stays_whole_has_the_curvature_of_all_its_outputs(variant):
    context = small_context(small("c_attn"))
    batch = candidate_batch(context)
    expected = dense_influence(context, variant, batch, names=("c_attn", "out", "up", "down"))
    torch.testing.assert_close(measure(context, curvature=variant, split_fused=False), expected, rtol=2e-6, atol=1e-8)


MISTAKES = {
    "inverted preconditioner": lambda right, gradient, damping: solve(
        replace(right, eigenvalues=1 / (right.eigenvalues + damping)), gradient, 0.0
    ),
    "transposed eigenvectors": lambda right, gradient, damping: solve(
        replace(right, outputs=right.outputs.t(), inputs=right.inputs.t()), gradient, damping
    ),
    # the tokens of a candidate are 6: a mean over them under the damping of the sum
    "mean loss with absolute damping": lambda right, gradient, damping: solve(
        replace(right, eigenvalues=right.eigenvalues / 6**2), gradient, damping
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("variant", ["kfac", "ekfac"])
def test_known_mistakes_are_far_from_dense_matrices(variant, mistake, monkeypatch):
    context = small_context()
    batch = candidate_batch(context, 24)
    expected = dense_influence(context, variant, batch)
    monkeypatch.setattr("liveselect.influence.kfac.solve", MISTAKES[mistake])
    found = measure(context, batch, curvature=variant)
    found = found * (found @ expected) / found.square().sum()  # whatever its scale
    assert (found - expected).norm() > 0.05 * expected.norm()
    assert spearmanr(found, expected).statistic < 0.999


@pytest.mark.parametrize("form", ["c_attn", "qkv_proj", "query_key_value"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_layer_for_queries_keys_and_values_gives_what_three_give(form, variant):
    apart, fused = small(), small(form)
    rows = torch.arange(24).view(3, 2, 4)  # of queries, keys, values; of heads; within a head
    if form == "query_key_value":
        rows = torch.arange(24).view(2, 3, 4).transpose(0, 1)
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            if form in name:
                kind = name.rsplit(".", 1)[-1]
                for part, index in zip("qkv", rows, strict=True):
                    parameter[index.flatten()] = getattr(getattr(apart, part), kind)
            else:
                parameter.copy_(dict(apart.named_parameters())[name])
    torch.testing.assert_close(fused(torch.arange(6)[None]), apart(torch.arange(6)[None]))
    expected = measure(small_context(apart), curvature=variant)
    torch.testing.assert_close(measure(small_context(fused), curvature=variant), expected, rtol=1e-6, atol=1e-8)
    if variant in {"kfac", "ekfac"}:
        whole = measure(small_context(fused), curvature=variant, split_fused=False)
        assert not torch.allclose(whole, expected, rtol=1e-3)
        assert pearsonr(whole, expected).statistic > 0.95


def step_along(context, gradient_of_row, rate):
    """The mean reference loss after one step of ``rate`` on a gradient by parameter name."""
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradient_of_row:
                parameter.sub_(gradient_of_row[name], alpha=rate)
    reference = context.source.references
    return F.cross_entropy(model(reference)[:, :-1].flatten(0, 1), reference[:, 1:].flatten())


def rows_of(batch):
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]


def test_with_the_identity_influence_is_the_fall_of_the_reference_loss_per_unit_of_a_plain_step():
    context = small_context()
    batch, rate = candidate_batch(context), 1e-5
    names = [name for name, _ in context.model.named_parameters() if name.split(".")[0] in LAYERS]
    parameters = [dict(context.model.named_parameters())[name] for name in names]
    start = step_along(context, {}, rate)
    falls = []
    for row in rows_of(batch):
        gradients = torch.autograd.grad(causal_lm_loss(context.model, row).sum(), parameters)
        falls.append((start - step_along(context, dict(zip(names, gradients, strict=True)), rate)).item() / rate)
    found = measure(context, curvature="identity")
    torch.testing.assert_close(found, torch.tensor(falls), rtol=1e-3, atol=1e-5)
    assert pearsonr(found, falls).statistic > 0.9999


def test_influence_is_the_fall_of_the_reference_loss_per_unit_of_a_natural_gradient_step():
    context = small_context()
    batch, rate = candidate_batch(context), 1e-6
    start = step_along(context, {}, rate)
    fishers = {n: dense_fisher("kfac", *token_statistics(context, n, context.candidates)) for n in LAYERS}
    falls = []
    for loss in causal_lm_loss(context.model, batch):
        step = {}
        for name, gradient in gradient_of(context, loss, LAYERS).items():
            fisher = fishers[name]
            damped = fisher + 0.1 * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=fisher.dtype)
            layer = dict(context.model.named_modules())[name]
            moved = torch.linalg.solve(damped, gradient).view(len(layer.weight), -1)
            step[f"{name}.weight"] = moved[:, : layer.weight.shape[1]]
            if layer.bias is not None:
                step[f"{name}.bias"] = moved[:, -1]
        falls.append((start - step_along(context, step, rate)).item() / rate)
    torch.testing.assert_close(measure(context), torch.tensor(falls), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("variant", ["kfac", "ekfac", "output_only", "diagonal"])
def test_with_growing_damping_one_layer_ranks_as_without_curvature(variant):
    context = small_context()
    plain = measure(context, curvature="identity", include=["up"])
    damped = measure(context, curvature=variant, include=["up"], damping=1e6)
    assert spearmanr(damped, plain).statistic == pytest.approx(1.0)
    torch.testing.assert_close(damped * (plain[0] / damped[0]), plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_influence_does_not_depend_on_batches_or_padding(variant):
    context = small_context()
    expected = measure(context, curvature=variant)
    source = context.source
    in_threes = context.but(source=FakeSource(source.tokens, source.references, labels=source.labels, rows=3))
    pad = F.pad(source.tokens, (0, 5)), F.pad(source.labels, (0, 5), value=-100)
    longer = FakeSource(pad[0], source.references, labels=pad[1])
    for changed in (in_threes, context.but(source=longer)):
        found = measure(changed, candidate_batch(context.but(source=longer)), curvature=variant)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_left_padding_under_a_mask_counts_for_nothing():
    context = warm_context()
    source = context.source
    mask = torch.ones_like(source.tokens)
    tokens, labels = F.pad(source.tokens, (3, 0)), F.pad(source.tokens, (3, 0), value=-100)
    labels[:, 3] = -100  # without padding, nothing predicts the first token
    padded = FakeSource(tokens, source.references, labels=labels, mask=F.pad(mask, (3, 0)))

    def with_positions(model, batch):  # positions are counted from the first real token
        batch = dict(batch)
        if "attention_mask" in batch:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return causal_lm_loss(model, batch)

    for variant in VARIANTS:
        expected = measure(context, curvature=variant)
        shifted = context.but(source=padded, loss_fn=with_positions)
        torch.testing.assert_close(measure(shifted, curvature=variant), expected, rtol=1e-5, atol=1e-7)


def test_a_loss_of_another_scale_scales_influence_back():
    # mean losses, and with them g, scale by c and curvature by c^2: what is left is 1 / c for g, 1 for the reference
    context = small_context()
    halved = context.but(loss_fn=lambda model, batch: causal_lm_loss(model, batch) / 2)
    torch.testing.assert_close(measure(halved), measure(context), rtol=1e-5, atol=1e-8)


def test_measuring_leaves_model_optimizer_and_gradients_as_they_were():
    context = warm_context()
    context.model.train()
    context.model(context.source.tokens[:4]).logits.sum().backward()
    gradients = {name: parameter.grad for name, parameter in context.model.named_parameters()}
    values = {name: gradient.clone() for name, gradient in gradients.items()}
    before, random_state = checksum(context.model, context.optimizer), torch.get_rng_state()
    for variant in VARIANTS:
        measure(context, curvature=variant, labels="sampled")
    assert checksum(context.model, context.optimizer) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in context.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())
    for name, parameter in context.model.named_parameters():
        assert parameter.grad is gradients[name]
        assert torch.equal(parameter.grad, values[name])


def train_on(context, steps=1):
    for batch in context.source.tokens[: 4 * steps].split(4):
        context.optimizer.zero_grad()
        context.model(batch, labels=batch).loss.backward()
        context.optimizer.step()
    context.optimizer.zero_grad()


def test_factors_and_reference_have_clocks_of_their_own():
    context = warm_context()
    estimator = KFACInfluence(factor_examples=8, factors_every=4, reference_every=2)
    seen = []
    for index in range(6):
        metrics = context.but(index=index).fit(estimator)
        seen.append(("factor_tokens" in metrics, "reference_loss" in metrics))
    assert seen == [(True, True), (False, False), (False, True), (False, False), (True, True), (False, False)]


def test_factors_are_averages_with_exponentially_falling_weights():
    context = warm_context()
    single, states = [], []
    averaged = KFACInfluence(factor_examples=8, factors_every=1, factor_decay=0.25)
    for index in range(3):
        now = context.but(index=index)
        fresh = KFACInfluence(factor_examples=8, factors_every=1)
        now.fit(fresh)
        now.fit(averaged)
        single.append(fresh.state_dict()["blocks"]["means"])
        train_on(context, index + 1)
    states = averaged.state_dict()["blocks"]["means"]
    weights = torch.tensor([0.25**2, 0.25, 1.0], dtype=torch.float64)
    weights = weights / weights.sum()
    for leader, group in states.items():
        for name in set(group) - {"weight"}:
            one = [each[leader][name] / each[leader]["weight"] for each in single]
            expected = sum(weight * each for weight, each in zip(weights, one, strict=True))
            torch.testing.assert_close(group[name] / group["weight"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_estimator_goes_on_with_the_same_bits(variant):
    context = warm_context()
    settings = {"curvature": variant, "factor_examples": 8, "factors_every": 3, "reference_every": 2}
    kept = KFACInfluence(**settings)
    context.fit(kept)
    for cut in range(1, 5):
        box = io.BytesIO()
        torch.save(kept.state_dict(), box)
        box.seek(0)
        resumed = KFACInfluence(**settings)
        resumed.load_state_dict(torch.load(box, weights_only=True))
        now = context.but(index=cut)
        assert now.fit(kept) == now.fit(resumed)
        batch = candidate_batch(now, 6)
        assert torch.equal(now.score(kept, batch), now.score(resumed, batch))
        train_on(context)


def test_candidates_that_are_not_finite_are_nan_and_spoil_no_other():
    context = small_context()
    clean = measure(context)
    estimator = KFACInfluence(factor_examples=24)
    context.fit(estimator)
    poisoned = context.but(loss_fn=lambda model, batch: causal_lm_loss(model, batch) / (batch["id"] != 1).double())
    found = poisoned.score(estimator, candidate_batch(context))
    assert found[1].isnan()
    keep = torch.arange(12) != 1
    torch.testing.assert_close(found[keep], clean[keep])


def test_a_reference_that_is_not_finite_is_refused():
    context = small_context()
    broken = context.but(loss_fn=lambda model, batch: causal_lm_loss(model, batch) * float("inf"))
    with pytest.raises(ValueError, match="reference loss is inf; influence cannot be measured from there"):
        broken.fit(KFACInfluence(curvature="identity"))


@pytest.mark.parametrize("variant", ["kfac", "ekfac", "output_only", "diagonal"])
def test_curvature_that_is_not_finite_is_refused_with_the_name_of_its_layer(variant):
    context = small_context()

    def overflows(model, batch):
        losses = causal_lm_loss(model, batch)
        return losses * float("inf") if 7 in batch["id"] and len(losses) > 4 else losses

    with pytest.raises(ValueError, match=r"gradients of layer '[a-z]+' are not finite"):
        context.but(loss_fn=overflows).fit(KFACInfluence(variant, factor_examples=24))


def test_scoring_before_fitting_is_refused():
    context = small_context()
    with pytest.raises(RuntimeError, match="score was called before fit"):
        context.score(KFACInfluence(), candidate_batch(context))


def test_a_checkpoint_of_another_form_of_curvature_is_refused():
    with pytest.raises(ValueError, match="holds 'kfac' curvature, this run asks for 'ekfac'"):
        KFACInfluence("ekfac").load_state_dict(KFACInfluence("kfac").state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "full"}, r"curvature to be one of \('kfac', 'ekfac'"),
        ({"labels": "true"}, r"labels to be one of \('empirical', 'sampled'\), got 'true'"),
        ({"damping": 0.0}, "positive damping, got 0.0"),
        ({"damping": float("nan")}, "positive damping, got nan"),
        ({"factor_decay": 1.0}, "factor_decay of at least 0 and below 1, got 1.0"),
        ({"factor_examples": 0}, "factor_examples of at least 1, got 0"),
        ({"factors_every": 0}, "factors_every of at least 1, got 0"),
        ({"reference_every": 0}, "reference_every of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KFACInfluence(**settings)


def test_seconds_and_flops_are_charged_to_the_parts():
    context = warm_context()
    measure(context)
    assert {"factors", "reference gradient", "precondition", "example gradients"} <= set(context.meter.seconds)
    assert {"factors", "reference gradient", "example gradients"} <= set(context.meter.flops)


def test_what_was_measured_is_told():
    context = warm_context()
    metrics = context.fit(KFACInfluence(factor_examples=8))
    assert metrics["factor_tokens"] == 8 * 11  # the last token of twelve predicts nothing
    assert metrics["reference_examples"] == 4
    assert 0.4 < metrics["measured_share"] < 1
    assert metrics["direction_norm"] > 0


def test_a_bfloat16_model_is_measured_with_factors_in_float32():
    exact = warm_context()
    model = copy.deepcopy(exact.model).bfloat16()
    short = exact.but(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    estimator = KFACInfluence(factor_examples=32)
    short.fit(estimator)
    means = estimator.state_dict()["blocks"]["means"]
    assert {group["inputs"].dtype for group in means.values()} == {torch.float32}
    found = short.score(estimator, candidate_batch(short, 32))
    assert spearmanr(found, measure(exact, candidate_batch(exact, 32))).statistic > 0.95


@pytest.mark.parametrize("variant", ["kfac", "ekfac", "output_only", "diagonal"])
def test_examples_without_targets_have_no_curvature_to_measure(variant):
    context = small_context()
    source = context.source
    empty = FakeSource(source.tokens, source.references, labels=torch.full_like(source.tokens, -100))
    with pytest.raises(NotMeasurableError, match="none of the 24 examples that curvature is measured on carries loss"):
        context.but(source=empty).fit(KFACInfluence(variant, factor_examples=24))


def measure_on_ranks(variant):
    context = small_context()
    estimator = KFACInfluence(variant, factor_examples=24)
    metrics = context.fit(estimator)
    held = sorted(estimator._blocks._means)
    return context.score(estimator, candidate_batch(context)).tolist(), metrics, held, estimator.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_measure_what_one_does_and_share_the_layers_out(variant):
    context = small_context()
    alone = KFACInfluence(variant, factor_examples=24)
    expected = context.fit(alone)
    influence = context.score(alone, candidate_batch(context))
    (first, metrics, held, state), (second, _, held_too, state_too) = on_ranks(measure_on_ranks, 2, variant)
    torch.testing.assert_close(torch.tensor(first), influence, rtol=1e-5, atol=1e-8)
    assert first == second
    assert metrics == pytest.approx(expected, rel=1e-9)
    if variant != "identity":
        assert held
        assert held_too
        assert not set(held) & set(held_too)
        assert sorted(held + held_too) == sorted(alone.state_dict()["blocks"]["means"])
    for each in (state, state_too):
        resumed = KFACInfluence(variant, factor_examples=24, factors_every=1)
        resumed.load_state_dict(each)
        context.but(index=1).fit(resumed)
        kept = KFACInfluence(variant, factor_examples=24, factors_every=1)
        kept.load_state_dict(alone.state_dict())
        context.but(index=1).fit(kept)
        batch = candidate_batch(context)
        torch.testing.assert_close(context.score(resumed, batch), context.score(kept, batch), rtol=1e-5, atol=1e-8)


def test_what_is_not_kept_from_the_first_pass_is_computed_again(monkeypatch):
    context = warm_context()
    kept = measure(context, curvature="ekfac")
    monkeypatch.setattr("liveselect.influence.kfac._MAX_KEPT_BYTES", 0)
    torch.testing.assert_close(measure(context, curvature="ekfac"), kept, rtol=1e-6, atol=1e-8)


def test_factors_come_from_what_is_trained_on_filled_up_with_candidates():
    context = small_context()
    wanted = [3, 8, 11]
    trained = context.but(trained=torch.tensor(wanted))
    alone = context.but(candidates=torch.tensor(wanted))
    batch = candidate_batch(context)

    def influence(at, **settings):
        estimator = KFACInfluence(damping=0.01, **settings)
        at.fit(estimator)
        return at.score(estimator, batch)

    of_three = influence(alone, factor_examples=3)
    close = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(influence(trained, factor_examples=3), of_three, **close)
    of_all = influence(context, factor_examples=24)
    torch.testing.assert_close(influence(trained, factor_examples=24, factors_of="candidates"), of_all, **close)
    assert (of_all - of_three).norm() > 0.05 * of_three.norm()
    seen = KFACInfluence(factor_examples=5)._factor_ids(trained.round).tolist()
    assert len(seen) == 5
    assert set(wanted) <= set(seen)


class Checkpointed(Small):
    """Its whole body runs a second time in the backward."""

    def forward(self, input_ids):
        return checkpoint(super().forward, input_ids, use_reentrant=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_counts_nothing_twice(variant):
    context = small_context()
    recomputing = Checkpointed().double()
    recomputing.load_state_dict(context.model.state_dict())
    expected, found = (measure(context.but(model=m), curvature=variant) for m in (context.model, recomputing))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_influence_does_not_depend_on_the_order_of_candidates_or_references():
    context = small_context()
    expected = measure(context)
    order, around = torch.randperm(12, generator=torch.Generator().manual_seed(1)), context.source.references.flip(0)
    turned = FakeSource(context.source.tokens, around, labels=context.source.labels)
    estimator = KFACInfluence(factor_examples=24)
    context.but(source=turned, candidates=torch.arange(24).flip(0)).fit(estimator)
    found = context.score(estimator, next(iter(context.round.batches(order))))
    torch.testing.assert_close(found, expected[order], rtol=1e-6, atol=1e-8)
