import io
import math
import socket

import pytest
import torch
from fakes import FakeSource, fake_context, random_source
from tiny_encoder import TINY, save_pretrained, tiny_regressor

from liveselect.regressors import EncoderRegressor, encoder_training
from liveselect.regressors.encoder_model import InfluenceNetwork
from liveselect.regressors.encoder_training import Examples, accumulate_gradients, look, predict

torch.set_num_threads(1)


def predictions(regressor, context, ids=None):
    ids = context.candidates if ids is None else ids
    return torch.cat([regressor.predict(context.round, batch) for batch in context.round.batches(ids)])


def saved(regressor):
    """The state after a trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(regressor.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def learnable():
    source = random_source(candidates=160, length=24, vocab=60)
    return source, (source.tokens < 20).float().mean(dim=1)


def test_the_reported_spearman_is_that_of_the_kept_weights_on_what_was_held_out(learnable, monkeypatch):
    source, influence = learnable
    seen = []
    monkeypatch.setattr(encoder_training, "look", lambda *looked: seen.append(looked) or look(*looked))
    regressor, context = tiny_regressor(), fake_context(source)
    metrics = regressor.fit(context.round, torch.arange(160), influence)
    assert len(seen) == 8
    assert metrics["held_out"] == 32
    assert look(regressor._network, *seen[0][1:])["spearman"] == metrics["spearman"] > 0.3


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([0.1, 0.5, 0.3, 0.4], 1),
        ([-0.9, -0.5, -0.7, -0.6], 1),  # a tracker that starts at 0 keeps none of these
        ([math.nan, -0.2, math.nan, -0.3], 1),
        ([0.5, 0.5, 0.5, 0.5], 0),
        ([math.nan] * 4, 3),
    ],
)
def test_the_weights_of_the_best_look_are_restored(learnable, monkeypatch, looks, best):
    source, influence = learnable
    weights = []

    def scripted(network, *looked):
        weights.append({k: v.clone() for k, v in network.state_dict().items()})
        return {"spearman": looks[len(weights) - 1]}

    monkeypatch.setattr(encoder_training, "look", scripted)
    regressor = tiny_regressor(epochs=4, evaluations=4)
    metrics = regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
    kept = regressor.state_dict()["weights"]
    assert len(weights) == 4
    for i, then in enumerate(weights):
        assert all(torch.equal(kept[name], then[name]) for name in kept) == (i == best)
    assert metrics["spearman"] == looks[best] or math.isnan(looks[best])
    assert metrics["best_step"] == 2 * (best + 1)


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_round_continues_from_the_last_one_or_begins_anew(learnable, warm_start):
    source, influence = learnable
    regressor = tiny_regressor(epochs=1, warm_start=warm_start)
    regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
    first = predictions(regressor, fake_context(source))
    regressor.schedule = tiny_regressor(epochs=1, learning_rate=0.0).schedule  # a second fit that learns nothing
    regressor.fit(fake_context(source, index=1).round, torch.arange(64), influence[:64])
    assert torch.equal(predictions(regressor, fake_context(source)), first) == warm_start


def test_a_fit_is_repeated_bit_for_bit_whatever_the_global_random_state(learnable):
    source, influence = learnable
    found = []
    for _ in range(2):
        torch.rand(3)
        regressor = tiny_regressor(epochs=1)
        regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
        found.append(predictions(regressor, fake_context(source)))
    assert torch.equal(*found)


def test_the_random_state_the_default_type_and_the_grad_mode_of_training_are_left_alone(learnable):
    source, influence = learnable
    torch.rand(7)  # else the state could be what another fit left behind
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        regressor = tiny_regressor(epochs=1)
        with torch.no_grad():
            regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
            predictions(regressor, fake_context(source))
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in regressor._network.parameters()} == {torch.float32}


def test_dropout_is_on_while_fitting_and_off_while_predicting(learnable):
    source, influence = learnable
    found = []
    for dropout in (0.0, 0.5):
        regressor = tiny_regressor(epochs=1, dropout=dropout)
        regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
        first, second = (predictions(regressor, fake_context(source)) for _ in range(2))
        assert torch.equal(first, second)
        found.append(first)
    assert not torch.allclose(*found, atol=1e-4)


def test_the_learning_rate_falls_linearly_to_zero_and_only_matrices_decay(learnable, monkeypatch):
    source, influence = learnable
    rates, decays, step = [], {}, torch.optim.AdamW.step

    def recorded(optimizer, *arguments):
        rates.append({group["lr"] for group in optimizer.param_groups})
        decays.update({p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]})
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    regressor = tiny_regressor(epochs=2, learning_rate=0.4, weight_decay=0.25)
    regressor.fit(fake_context(source).round, torch.arange(64), influence[:64])
    assert [rate for (rate,) in rates] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert decays == {2: 0.25, 1: 0.0}


def test_training_goes_on_in_training_mode_after_a_look(learnable, monkeypatch):
    source, influence = learnable
    modes, parts = [], InfluenceNetwork.parts
    monkeypatch.setattr(
        InfluenceNetwork,
        "parts",
        lambda self, *arguments: modes.append((self.training, torch.is_grad_enabled())) or parts(self, *arguments),
    )
    tiny_regressor(epochs=2, evaluations=2).fit(fake_context(source).round, torch.arange(64), influence[:64])
    assert modes == 2 * [(True, True), (True, True), (False, False)]


def test_a_restored_regressor_needs_the_pretrained_weights_no_more(learnable, tmp_path):
    source, influence = learnable
    first = tiny_regressor(encoder=save_pretrained(tmp_path, 60), epochs=1)
    first.fit(fake_context(source).round, torch.arange(64), influence[:64])
    restored = tiny_regressor(encoder=str(tmp_path), epochs=1)
    restored.load_state_dict(saved(first))
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(predictions(restored, fake_context(source)), predictions(first, fake_context(source)))


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_restored_regressor_predicts_and_goes_on_bit_for_bit_alike(learnable, tmp_path, pretrained):
    source, influence = learnable
    encoder = save_pretrained(tmp_path, 60) if pretrained else TINY
    first = tiny_regressor(encoder=encoder, epochs=1)
    first.fit(fake_context(source).round, torch.arange(64), influence[:64])
    restored = tiny_regressor(encoder=encoder, epochs=1)
    restored.load_state_dict(saved(first))
    restored.load_state_dict(saved(restored))  # saved again before it was used
    assert torch.equal(predictions(restored, fake_context(source)), predictions(first, fake_context(source)))
    for regressor in (first, restored):
        regressor.fit(fake_context(source, index=1).round, torch.arange(64, 128), influence[64:128])
    assert torch.equal(predictions(restored, fake_context(source)), predictions(first, fake_context(source)))


def test_a_restored_regressor_that_begins_anew_does_not_use_what_was_saved(learnable):
    source, influence = learnable
    first = tiny_regressor(epochs=1)
    first.fit(fake_context(source).round, torch.arange(64), influence[:64])
    restored, fresh = (tiny_regressor(epochs=1, warm_start=False) for _ in range(2))
    restored.load_state_dict(saved(first))
    for regressor in (restored, fresh):
        regressor.fit(fake_context(source, index=1).round, torch.arange(64), influence[:64])
    assert torch.equal(predictions(restored, fake_context(source)), predictions(fresh, fake_context(source)))


def test_an_unused_regressor_can_be_saved_and_restored():
    restored = tiny_regressor()
    restored.load_state_dict(saved(tiny_regressor()))
    with pytest.raises(RuntimeError, match="before fit"):
        predictions(restored, fake_context(random_source()))


def test_a_state_of_another_encoder_is_refused(learnable):
    source, influence = learnable
    regressor = tiny_regressor(epochs=1)
    regressor.fit(fake_context(source).round, torch.arange(16), influence[:16])
    other = tiny_regressor(encoder={**TINY, "hidden_size": 16})
    other.load_state_dict(saved(regressor))
    with pytest.raises(ValueError, match="does not fit the encoder of this run"):
        predictions(other, fake_context(source))


def by_hand(network, text, longest):
    """Every chunk alone and unpadded, the mean over all tokens, the head."""
    states = [
        network.encoder(input_ids=part.long().unsqueeze(0)).last_hidden_state[0]
        for part in text.tensor_split(-(-len(text) // longest))
    ]
    return float(network.head(torch.cat(states).mean(0)))


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
def test_a_prediction_is_the_head_of_the_mean_over_all_tokens_of_all_chunks(length):
    source = random_source(candidates=12, length=length)
    regressor, context = tiny_regressor(epochs=1), fake_context(source)
    regressor.fit(context.round, torch.arange(12), torch.arange(12.0))
    with torch.no_grad():
        expected = [by_hand(regressor._network.eval(), row, 16) for row in source.tokens]
    assert predictions(regressor, context).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_short_and_empty_texts_have_finite_values_and_gradients(attention):
    from transformers import BertConfig

    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    tokens = random_source(candidates=24, length=20).tokens
    mask = torch.arange(20) < torch.arange(24)[:, None]  # lengths 0..20
    context = fake_context(FakeSource(tokens, mask=mask))
    regressor = tiny_regressor(encoder=BertConfig(**fields, attn_implementation=attention), epochs=1, dropout=0.0)
    regressor.fit(context.round, torch.arange(24), torch.arange(24.0))
    network = regressor._network
    found = predictions(regressor, context)
    assert found.isfinite().all()
    assert float(found[0]) == pytest.approx(network.head.bias.item(), abs=1e-6)
    with torch.no_grad():
        expected = [by_hand(network, row[keep], 16) for row, keep in zip(tokens[1:], mask[1:], strict=True)]
    assert found[1:].tolist() == pytest.approx(expected, abs=1e-5)
    examples = Examples([row[keep] for row, keep in zip(tokens, mask, strict=True)], torch.randn(24))
    accumulate_gradients(network, examples, torch.arange(24), context.meter)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_the_size_of_a_forward_changes_neither_predictions_nor_gradients(learnable):
    source, influence = learnable
    regressor, context = tiny_regressor(epochs=1, dropout=0.0), fake_context(source)
    regressor.fit(context.round, torch.arange(40), influence[:40])
    network = regressor._network
    network.encoder.config.hidden_dropout_prob = 0.0
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    texts = [row[: 1 + i % 24] for i, row in enumerate(source.tokens[:40])]
    examples = Examples(texts, influence[:40])
    found, gradients = [], []
    for network.tokens in (16, 100_000):
        network.zero_grad()
        accumulate_gradients(network, examples, torch.arange(40), context.meter)
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        found.append(predict(network, texts, context.meter))
    assert torch.allclose(*found, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_named_encoder_reads_the_decoded_text_with_its_own_tokenizer(tmp_path):
    name = save_pretrained(tmp_path)
    source = random_source(candidates=12, length=9, vocab=50)
    regressor, context = tiny_regressor(encoder=name, epochs=1), fake_context(source)
    regressor.fit(context.round, torch.arange(12), torch.arange(12.0))
    ends = torch.tensor([[2], [3]]).expand(2, 12).unsqueeze(-1)
    read = torch.cat([ends[0], source.tokens + 4, ends[1]], dim=1)  # [CLS] words [SEP]; word w has id w + 4
    with torch.no_grad():
        expected = [by_hand(regressor._network.eval(), row, 16) for row in read]
    assert predictions(regressor, context).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_named_encoder_begins_with_its_pretrained_weights_in_training_mode(tmp_path, learnable):
    from transformers import AutoModel

    source, influence = learnable
    name = save_pretrained(tmp_path, 60)
    regressor = tiny_regressor(encoder=name, epochs=1, learning_rate=0.0)
    regressor.fit(fake_context(source).round, torch.arange(16), influence[:16])
    pretrained = AutoModel.from_pretrained(name).state_dict()
    weights = regressor.state_dict()["weights"]
    assert all(torch.equal(weights[f"encoder.{name}"], value) for name, value in pretrained.items())
    fresh = tiny_regressor(encoder=name)._built({}, torch.device("cpu"), seed=0)
    assert all(module.training for module in fresh.modules())


def test_a_local_folder_is_used_without_asking_the_hub(tmp_path, learnable, monkeypatch):
    hosts = []

    def unreachable(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(f"no way to {host}")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    source, influence = learnable
    regressor = tiny_regressor(encoder=save_pretrained(tmp_path, 60), epochs=1)
    regressor.check(fake_context(source, candidates=torch.arange(4)).round)
    regressor.fit(fake_context(source).round, torch.arange(16), influence[:16])
    assert not hosts


def test_only_the_first_tokens_of_a_text_are_read():
    source = random_source(candidates=12, length=40)
    first = FakeSource(torch.cat([source.tokens[:, :20], source.tokens[:, :20].flip(1)], dim=1))
    found = []
    for candidates in (source, first):
        regressor = tiny_regressor(epochs=1, max_tokens=20)
        regressor.fit(fake_context(candidates).round, torch.arange(12), torch.arange(12.0))
        found.append(predictions(regressor, fake_context(candidates)))
    assert torch.equal(*found)


def test_token_ids_outside_of_the_encoders_vocabulary_are_refused(tmp_path):
    source = random_source(vocab=200)
    with pytest.raises(ValueError, match=r"vocab_size 60, got \d+: give the encoder a vocab_size above"):
        tiny_regressor().fit(fake_context(source).round, torch.arange(12), torch.arange(12.0))
    name = save_pretrained(tmp_path, tokenizer_words=200)
    with pytest.raises(ValueError, match=r"vocab_size 64, got \d+: the tokenizer .* belongs to another encoder"):
        tiny_regressor(encoder=name).fit(fake_context(source).round, torch.arange(12), torch.arange(12.0))


def test_too_few_held_out_candidates_give_no_spearman():
    source = random_source(candidates=400)
    for m, count in ((8, 2), (12, 3), (40, 10), (150, 32), (400, 40)):
        metrics = tiny_regressor(epochs=1).fit(fake_context(source).round, torch.arange(m), torch.randn(m))
        assert metrics["held_out"] == count
        assert math.isnan(metrics["spearman"]) == (count < 3)


def test_equal_influence_predicts_one_value_and_admits_to_know_nothing():
    source, regressor = random_source(candidates=16), tiny_regressor()
    metrics = regressor.fit(fake_context(source).round, torch.arange(16), torch.full((16,), 0.25))
    assert math.isnan(metrics["spearman"])
    assert predictions(regressor, fake_context(source)).tolist() == [0.0] * 16


def test_repeated_measurements_are_one_candidate():
    source, held = random_source(candidates=40), tiny_regressor(epochs=1)
    ids = torch.cat([torch.arange(20), torch.arange(20)])
    influence = torch.cat([torch.arange(20.0), torch.arange(20.0) + 2])
    metrics = held.fit(fake_context(source).round, ids, influence)
    once = tiny_regressor(epochs=1)
    assert once.fit(fake_context(source).round, torch.arange(20), torch.arange(20.0) + 1) == metrics
    assert torch.equal(predictions(held, fake_context(source)), predictions(once, fake_context(source)))


def test_flops_are_those_of_training_in_every_epoch_and_of_looking_at_what_is_held_out():
    source, regressor = random_source(candidates=40, length=10), tiny_regressor(epochs=3, evaluations=2)
    context = fake_context(source)
    regressor.fit(context.round, torch.arange(40), torch.arange(40.0))
    encoder, head = regressor._network.encoder, 2 * 32
    linear = sum(each.weight.numel() for each in encoder.encoder.modules() if isinstance(each, torch.nn.Linear))
    learned = 2 * linear * 10 + 4 * encoder.config.num_hidden_layers * 10**2 * encoder.config.hidden_size + head
    pooled = 2 * encoder.pooler.dense.weight.numel()  # of one token, and no part of what is learned
    forward = learned + pooled
    assert context.meter.flops["fit regressor"] == 3 * 30 * (3 * learned + pooled) + 2 * 10 * forward
    with context.meter.phase("predict"):
        predictions(regressor, context, torch.arange(7))
    assert context.meter.flops["predict"] == 7 * forward


def test_bfloat16_computes_under_autocast_and_keeps_float32_weights(learnable):
    source, influence = learnable
    regressor = tiny_regressor(epochs=4, precision="bfloat16")
    metrics = regressor.fit(fake_context(source).round, torch.arange(160), influence)
    found = predictions(regressor, fake_context(source))
    assert found.dtype == torch.float32
    assert {p.dtype for p in regressor._network.parameters()} == {torch.float32}
    regressor._network.precision = "float32"
    exact = predictions(regressor, fake_context(source))
    assert not torch.equal(found, exact)
    assert torch.allclose(found, exact, atol=0.1)
    assert not math.isnan(metrics["spearman"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "expected epochs to be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"evaluations": 0}, "evaluations"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"held_out": 1.0}, "between 0 and 1, got 1.0"),
        ({"precision": "float16"}, "expected precision to be one of .*bfloat16.*got 'float16'"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderRegressor(**arguments)


def test_encoders_that_cannot_work_are_refused_with_the_reason():
    context = fake_context(random_source())
    with pytest.raises(ValueError, match="model_type"):
        EncoderRegressor({"hidden_size": 32}).fit(context.round, torch.arange(12), torch.arange(12.0))
    with pytest.raises(ValueError, match="got t5, which also has a decoder"):
        EncoderRegressor({"model_type": "t5"}).fit(context.round, torch.arange(12), torch.arange(12.0))


def test_making_a_regressor_loads_nothing():
    EncoderRegressor("no/such-encoder")
