"""The default loss against the models' own losses, and what it makes of modules of other shapes."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from liveselect import losses as losses_module
from liveselect.losses import (
    TARGET_COLUMNS,
    at_targets,
    causal_lm_loss,
    find_language_model,
    reference_loss,
    target_counts,
)

VOCAB = 60
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **WIDTH)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, **WIDTH)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2)),
}


def build(name="neox", dtype=torch.float32):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return MODELS[name]().eval().to(dtype)


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def draw_tokens(rows=4, length=12, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches():
    """Batches of every form, by name."""
    tokens = draw_tokens()
    position = torch.arange(12)
    lengths = torch.tensor([12, 9, 5, 7])[:, None]
    right, left = (position < lengths).long(), (position >= 12 - lengths).long()
    prompt = tokens.masked_fill(position < 6, -100)
    last_word = tokens.masked_fill(position != lengths - 1, -100)
    return {
        "whole blocks": {"input_ids": tokens, "labels": tokens},
        "without labels": {"input_ids": tokens},
        "right padding": {
            "input_ids": tokens * right,
            "labels": tokens.masked_fill(right == 0, -100),
            "attention_mask": right,
        },
        "right padding, no mask": {"input_ids": tokens * right, "labels": tokens.masked_fill(right == 0, -100)},
        "left padding": {
            "input_ids": tokens * left,
            "labels": tokens.masked_fill(left == 0, -100),
            "attention_mask": left,
            "position_ids": (left.cumsum(1) - 1).clamp(min=0),
        },
        "masked prompt": {"input_ids": tokens, "labels": prompt},
        "last word": {
            "input_ids": tokens * right,
            "labels": last_word.masked_fill(right == 0, -100),
            "attention_mask": right,
        },
        "holes": {"input_ids": tokens, "labels": tokens.masked_fill(tokens % 3 == 0, -100)},
        "last target before the end": {"input_ids": tokens, "labels": tokens.masked_fill(position > 5, -100)},
        "last target before the end, and one prompt": {
            "input_ids": tokens,
            "labels": tokens.masked_fill((position > 5) | ((torch.arange(4)[:, None] == 1) & (position < 3)), -100),
        },
        "one target": {"input_ids": tokens[:1], "labels": tokens[:1].masked_fill(position != 1, -100)},
        "two columns": {"input_ids": tokens[:, :2], "labels": tokens[:, :2]},
    }


BATCHES = list(batches())


@pytest.mark.parametrize("form", BATCHES)
def test_the_token_mean_of_the_example_losses_is_the_models_own_loss(model, form):
    batch = batches()[form]
    inputs = {"labels": batch["input_ids"], **batch}
    own = model(**inputs).loss
    counts = target_counts(batch)
    losses = causal_lm_loss(model, batch)
    assert losses.shape == (len(batch["input_ids"]),)
    torch.testing.assert_close((losses * counts).sum() / counts.sum(), own, rtol=2e-6, atol=1e-6)
    assert reference_loss([losses], [counts]) == pytest.approx(own.item(), rel=2e-6)


@pytest.mark.parametrize("form", BATCHES)
def test_positions_without_loss_are_left_out_without_changing_losses_or_gradients(model, form):
    batch = batches()[form]

    def gradients(losses):
        weights = torch.linspace(1, 2, len(losses))
        return torch.autograd.grad((losses * weights).sum(), list(model.parameters()), allow_unused=True)

    # prepared as if every position carried loss: nothing is cut, all logits are computed
    rows, width = batch["input_ids"].shape
    uncut = {**batch, TARGET_COLUMNS: torch.arange(width - 1).expand(rows, -1)}
    expected, found = causal_lm_loss(model, uncut), causal_lm_loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for first, second in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 7 * VOCAB, 2**19])
def test_without_gradients_losses_are_the_same_bits_however_much_is_computed_at_once(monkeypatch, elements, dtype):
    monkeypatch.setattr(losses_module, "_MAX_SOFTMAX_ENTRIES", {"cpu": elements})
    network = build(dtype=dtype)
    for batch in batches().values():
        whole = causal_lm_loss(network, batch)
        with torch.no_grad():
            assert torch.equal(causal_lm_loss(network, batch), whole)
        assert whole.requires_grad


def test_losses_are_those_of_all_logits_wherever_the_targets_lie():
    network = build()
    generator = torch.Generator().manual_seed(2)
    for length in [1, 2, 3, 5, 8] * 8:
        tokens = draw_tokens(3, length, seed=length)
        chances = torch.rand(3, 1, generator=generator) * 1.5  # rows with few, many or all of the targets
        end = int(torch.randint(1, length + 1, (), generator=generator))
        hidden = (torch.rand(3, length, generator=generator) > chances) | (torch.arange(length) >= end)
        labels = tokens.masked_fill(hidden, -100)
        logits = network(tokens).logits[:, :-1]
        all_losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(3, -1)
        expected = all_losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)
        found = causal_lm_loss(network, {"input_ids": tokens, "labels": labels})
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", BATCHES)
def test_the_loss_of_an_example_does_not_depend_on_its_company(model, form):
    batch = batches()[form]
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
    alone = torch.cat([causal_lm_loss(model, row) for row in rows])
    torch.testing.assert_close(causal_lm_loss(model, batch), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", BATCHES)
def test_a_batch_prepared_beforehand_has_the_same_losses(model, form):
    batch = batches()[form]
    assert torch.equal(causal_lm_loss(model, at_targets(batch)), causal_lm_loss(model, batch))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: Forwarding(model=model)], ids=["bare", "wrapped"])
def test_only_positions_up_to_the_last_target_reach_the_model_and_only_targets_its_head(wrap):
    network = build()
    shapes = {}
    network.gpt_neox.register_forward_hook(lambda module, args, out: shapes.update(body=out[0].shape))
    network.lm_head.register_forward_hook(lambda module, args, out: shapes.update(head=args[0].shape))
    labels = torch.full((4, 12), -100)
    labels[torch.arange(4), [2, 4, 5, 6]] = 1
    labels[0, 5] = 1
    causal_lm_loss(wrap(network), {"input_ids": draw_tokens(), "labels": labels})
    assert shapes["body"][:2] == (4, 7)  # columns 0..6: the target in column 6 is predicted in column 5
    assert shapes["head"][:2] == (4, 2)  # no row has more than two targets


def test_the_model_keeps_no_hook_of_ours_also_when_it_fails():
    network = build()
    batch = batches()["last word"]
    causal_lm_loss(network, batch)
    with pytest.raises(IndexError):
        causal_lm_loss(network, {**batch, "input_ids": batch["input_ids"] + VOCAB})
    assert not network.lm_head._forward_pre_hooks


def test_what_a_model_does_to_its_logits_is_done_to_those_that_are_left():
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = Gemma2Config(vocab_size=VOCAB, num_key_value_heads=1, head_dim=16, **WIDTH)
        network = Gemma2ForCausalLM(config).eval()
    network.lm_head.weight.data.mul_(100)  # far into the cap of the logits
    batch = batches()["last word"]
    assert config.final_logit_softcapping
    own = network(**batch).loss
    assert causal_lm_loss(network, batch).mean().item() == pytest.approx(own.item(), rel=2e-6)


def test_an_example_without_targets_has_loss_zero_and_no_gradient():
    network = build()
    batch = {"input_ids": draw_tokens(2), "labels": torch.full((2, 12), -100)}
    losses = causal_lm_loss(network, batch)
    assert losses.tolist() == [0, 0]
    gradients = torch.autograd.grad(losses.sum(), list(network.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_short_logits_are_widened_and_long_ones_stay(dtype, expected):
    network = build(dtype=dtype)
    batch = {"input_ids": draw_tokens()}
    losses = causal_lm_loss(network, batch)
    logits = network(batch["input_ids"]).logits.to(expected)[:, :-1]
    truth = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
    assert losses.dtype == expected
    torch.testing.assert_close(losses, truth)


class Bigram(nn.Module):
    """Logits from the last token alone, in the form that ``wrap`` gives them."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.wrap = wrap

    def forward(self, tokens):
        return self.wrap(self.table(tokens))


class Holder(pl.LightningModule):
    """A LightningModule that defines no forward."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Forwarding(Holder):
    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Answering(Holder):
    def forward(self, input_ids):
        return self.model(input_ids).logits


def tokens_batch():
    return {"input_ids": draw_tokens()}


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, lambda x: type("Output", (), {"logits": x})()],
    ids=["bare", "tuple", "dict", "attribute"],
)
def test_modules_may_return_logits_in_any_common_form(wrap):
    model = Bigram(wrap)
    tokens = draw_tokens()
    log_probabilities = model.table.weight.log_softmax(1)
    expected = torch.stack([-log_probabilities[row[:-1], row[1:]].mean() for row in tokens])
    torch.testing.assert_close(causal_lm_loss(model, tokens_batch()), expected)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda model: Holder(model=model),
        lambda model: Holder(model=model, criterion=nn.CrossEntropyLoss(), side=nn.Linear(2, 2)),
        lambda model: Holder(model=torch.compile(model)),
        lambda model: Forwarding(model=model),
        lambda model: Answering(model=model),
        lambda model: torch.compile(model),
        lambda model: torch.compile(Holder(model=model)),
        lambda model: torch.compile(Forwarding(model=model)),
    ],
    ids=[
        *("no forward", "with other parts", "compiled inside", "forwards all", "returns logits", "compiled"),
        *("compiled outside", "compiled forward"),
    ],
)
def test_wrappers_have_the_losses_of_the_model_that_they_hold(wrapper):
    network = build()
    batch = batches()["right padding"]
    torch.testing.assert_close(
        causal_lm_loss(wrapper(network), batch), causal_lm_loss(network, batch), rtol=1e-5, atol=1e-6
    )


def test_a_wrapper_that_forwards_all_passes_the_mask_on():
    network = build("gpt2")
    batch = batches()["left padding"]
    found = causal_lm_loss(Forwarding(model=network), batch)
    torch.testing.assert_close(found, causal_lm_loss(network, batch), rtol=1e-5, atol=1e-6)


def test_a_model_compiled_in_place_has_its_losses():
    network = build()
    expected = causal_lm_loss(network, tokens_batch())
    network.compile(backend="eager")
    torch.testing.assert_close(causal_lm_loss(network, tokens_batch()), expected)


def test_the_only_part_with_parameters_is_taken_for_the_model():
    bigram = Bigram()
    assert find_language_model(Holder(net=bigram, criterion=nn.CrossEntropyLoss())) is bigram


def test_two_models_in_one_wrapper_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"cannot tell how to get logits from Holder.*holds 2 Hugging Face.*loss_fn="):
        causal_lm_loss(Holder(student=build(), teacher=build("llama")), tokens_batch())


def test_an_empty_wrapper_is_refused():
    with pytest.raises(TypeError, match=r"holds 0 Hugging Face language models among 0 modules"):
        causal_lm_loss(Holder(), tokens_batch())


@pytest.mark.parametrize(
    ("wrap", "got"),
    [(lambda x: x.mean(), r"\(\)"), (lambda x: x[:, 0], r"\(4, 60\)"), (lambda x: {"loss": x}, "NoneType")],
    ids=["a loss", "one position", "no logits in a dict"],
)
def test_modules_that_return_no_logits_are_refused_with_what_to_do(wrap, got):
    with pytest.raises(TypeError, match=rf"expected Bigram to return logits \(B, T, V\).*got {got}; pass loss_fn="):
        causal_lm_loss(Bigram(wrap), tokens_batch())


def test_the_reference_loss_sums_in_float64():
    losses, counts = [torch.tensor([2.0**24]), torch.tensor([1.0])], [torch.tensor([1]), torch.tensor([1])]
    assert reference_loss(losses, counts) == (2.0**24 + 1) / 2  # float32 cannot tell 2^24 + 1 from 2^24


def test_longer_examples_weigh_more_in_the_reference_loss():
    assert reference_loss([torch.tensor([1.0, 5.0])], [torch.tensor([3, 1])]) == 2.0


class Shaped(nn.Module):
    """Returns the logits of every position in the form that ``shape`` gives them."""

    def __init__(self, shape):
        super().__init__()
        self.embed, self.head, self.shape = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), shape

    def forward(self, idx, whole=False):
        logits = self.head(self.embed(idx))
        return logits if whole else self.shape(logits)


def with_answers_of(tokens, count):
    """Return a batch in which the last ``count`` tokens of a row carry loss."""
    return {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(tokens.shape[1]) < 12 - count, -100)}


@pytest.mark.parametrize("answers", [12, 2, 1])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda logits: logits[:, [-1]], r"got \(4, 1, 60\): they are those of the last position only.*nanoGPT"),
        (lambda logits: (logits[:, [-1]], None), "the last position only"),
        (lambda logits: logits.transpose(0, 1), r"time comes first: return logits.transpose\(0, 1\)"),
        (lambda logits: logits.transpose(1, 2), r"the vocabulary comes before time: return logits.transpose\(1, 2\)"),
        (lambda logits: logits.permute(1, 2, 0), r"the batch comes last: return logits.permute\(2, 0, 1\)"),
        (lambda logits: logits.permute(2, 1, 0), r"the batch comes last: return logits.permute\(2, 1, 0\)"),
        (lambda logits: logits[:, :-1], "leave out a position"),
        (lambda logits: torch.cat([logits[:, :3], logits], 1), "positions that are no tokens of the batch"),
        (lambda logits: logits[:, ::2], "examples or positions are missing"),
        (lambda logits: logits.flatten(0, 1)[None], "examples or positions are missing or joined"),
    ],
)
def test_logits_of_other_positions_than_the_tokens_are_refused(shape, message, answers):
    model, batch = Shaped(shape), with_answers_of(draw_tokens(), answers)
    with pytest.raises(ValueError, match=r"expected Shaped to return logits \(B, T, V\).*" + message):
        causal_lm_loss(model, batch)
    with pytest.raises(ValueError, match=message):
        losses_module.target_logits(model, batch)
    whole = F.cross_entropy(
        model(batch["input_ids"], 1)[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    model.shape = lambda logits: logits
    assert torch.allclose(causal_lm_loss(model, batch), whole.sum(1) / min(answers, 11))


def test_a_language_model_that_keeps_the_last_logits_only_is_refused_though_one_target_asks_for_one(model):
    class LastOnly(type(model)):
        def forward(self, *arguments, **settings):
            return super().forward(*arguments, logits_to_keep=1, **settings)

    model.__class__ = LastOnly
    for answers in (1, 2, 12):
        with pytest.raises(ValueError, match="last position only"):
            causal_lm_loss(model, with_answers_of(draw_tokens(), answers))


def test_a_forward_that_takes_something_else_is_named():
    class TakesBatch(Shaped):
        def forward(self, batch):
            return super().forward(batch["input_ids"])

    with pytest.raises((TypeError, IndexError)) as caught:
        causal_lm_loss(TakesBatch(None), {"input_ids": draw_tokens()})
    assert "TakesBatch.forward(input_ids), called with token ids (4, 12)" in caught.value.__notes__[0]


class Sampler(nn.Module):
    """Like nanoGPT: without targets only the logits of the last position are computed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 60)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        if targets is None:
            return logits[:, [-1], :], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("answers", [1, 2, 11])
def test_a_forward_that_wants_targets_for_all_logits_is_given_them(answers):
    model, batch = Sampler(), with_answers_of(draw_tokens(), answers)
    per_token = F.cross_entropy(
        model.table(batch["input_ids"])[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    for _ in range(2):  # the second time it is known
        assert torch.allclose(causal_lm_loss(model, batch), per_token.sum(1) / answers)


def test_an_encoder_decoder_is_refused_with_a_sentence():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(TypeError, match=r"T5ForConditionalGeneration is an encoder-decoder.*pass loss_fn|Pass loss_fn"):
        causal_lm_loss(model, {"input_ids": draw_tokens()})
