"""Labels drawn from the model, and the tokens that count."""

import torch
import torch.nn.functional as F
from probing import VOCAB, tiny_model

from liveselect.influence.fisher import active_tokens, with_sampled_labels
from liveselect.losses import causal_lm_loss, target_counts


def batch_of(rows=3, length=8):
    tokens = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :3] = labels[1:2, 5:] = -100
    return {"id": torch.arange(rows), "input_ids": tokens, "labels": labels}


def draw(model, batch, seed=0):
    return with_sampled_labels(model, batch, torch.Generator().manual_seed(seed))


def test_labels_are_drawn_where_there_were_some_and_inputs_stay():
    model, batch = tiny_model().eval(), batch_of()
    drawn = draw(model, batch)
    assert torch.equal(drawn["input_ids"], batch["input_ids"])
    assert torch.equal(drawn["labels"][:, 1:] == -100, batch["labels"][:, 1:] == -100)
    assert torch.equal(target_counts(drawn), target_counts(batch))
    assert int(drawn["labels"].max()) < VOCAB
    assert torch.equal(draw(model, batch)["labels"], drawn["labels"])
    assert not torch.equal(draw(model, batch, seed=1)["labels"], drawn["labels"])


def test_labels_follow_the_predictions_of_the_model():
    model, batch = tiny_model().eval(), batch_of(rows=1)
    logits = model(batch["input_ids"]).logits[0, :-1]
    expected = logits.softmax(dim=-1)
    many = {key: value.expand(20_000, *value.shape[1:]) for key, value in batch.items()}
    labels = draw(model, many)["labels"][:, 1:]
    for position in range(2, 7):
        share = torch.bincount(labels[:, position], minlength=VOCAB) / len(labels)
        sd = (expected[position] * (1 - expected[position]) / len(labels)).sqrt()
        assert ((share - expected[position]).abs() < 5 * sd).all()


def test_on_drawn_labels_the_mean_gradient_vanishes():
    model, batch = tiny_model().eval(), batch_of(rows=1)
    many = {key: value.expand(4_000, *value.shape[1:]) for key, value in batch.items()}
    weight = model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight

    def gradient(labelled):
        return torch.autograd.grad(causal_lm_loss(model, labelled).mean(), weight)[0].norm()

    assert gradient(draw(model, many)) < 0.1 * gradient(many)


def test_active_tokens_end_at_the_last_target_and_heed_the_mask():
    batch = batch_of()
    expected = torch.ones(3, 8, dtype=torch.bool)
    expected[:, 7] = False
    expected[1, 4:] = False  # token 3 predicts the last label, token 4
    assert torch.equal(active_tokens(batch), expected)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[2, :2] = 0
    expected[2, :2] = False
    assert torch.equal(active_tokens({**batch, "attention_mask": mask}), expected)
    longer = {"input_ids": F.pad(batch["input_ids"], (0, 3)), "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    assert int(active_tokens(longer).sum()) == int(active_tokens(batch).sum())


def test_without_targets_no_token_is_active():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.full((2, 4), -100)}
    assert not active_tokens(batch).any()
