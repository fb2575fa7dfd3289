"""Tiny models with warm optimizers, shared by the tests of influence."""

from functools import partial

import torch
import torch.nn.functional as F
from cases import VOCABULARY as VOCAB
from cases import Restless, tiny_neox
from fakes import FakeSource, fake_context, random_source
from torch import nn

from liveselect.influence import OneStepInfluence

CLIP = 0.5
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "sgd with momentum and decay": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw without foreach": partial(torch.optim.AdamW, lr=2e-3, foreach=False),
    "adam with amsgrad": partial(torch.optim.Adam, lr=2e-3, amsgrad=True, weight_decay=0.01),
    "nadam": partial(torch.optim.NAdam, lr=2e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2, weight_decay=0.01),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
}


def tiny_model(dtype=torch.float64, **settings):
    return tiny_neox(initializer_range=0.2, **settings).to(dtype)


def clip(parameters):
    nn.utils.clip_grad_norm_(parameters, CLIP)


def train(model, optimizer, tokens, steps=4):
    """Warm the moments up as training does."""
    for batch in tokens[: 4 * steps].split(4):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        clip(list(model.parameters()))
        optimizer.step()
    optimizer.zero_grad()


def warm_context(optimizer="adamw", model=None, source=None, **kwargs):
    source = source or random_source(candidates=32, length=12, vocab=VOCAB)
    model = model or tiny_model()
    optimizer = OPTIMIZERS.get(optimizer, optimizer)(model.parameters())
    train(model, optimizer, source.tokens[-16:])
    return fake_context(source, model=model, optimizer=optimizer, clip_gradients=clip, **kwargs)


def candidate_batch(context, count=4):
    return next(iter(context.round.batches(torch.arange(count))))


def measure(context, batch, step="published", **kwargs):
    """The one-step influence of the rows of a batch."""
    estimator = OneStepInfluence(step=step, **kwargs)
    context.fit(estimator)
    return context.score(estimator, batch)


def mean_loss(model, tokens):
    """Mean over all tokens, from full logits; the models' own loss would round to float32."""
    output = model(tokens)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Regression(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)


def squared_error(model, batch):
    return (batch["x"] @ model.weights - batch["y"]) ** 2 / 2


class RegressionSource(FakeSource):
    """Points of a regression; every point counts as one token."""

    def __init__(self, x, y, reference_x, reference_y):
        super().__init__(torch.zeros(len(x), 2, dtype=torch.int64))
        self.points, self.reference_points = (x, y), (reference_x, reference_y)

    @staticmethod
    def _batch(x, y):
        return {"id": torch.arange(len(x)), "input_ids": torch.zeros(len(x), 2, dtype=torch.int64), "x": x, "y": y}

    def candidates(self, ids):
        yield self._batch(*(values[ids] for values in self.points))

    def reference(self):
        yield self._batch(*self.reference_points)


def regression_context(weights, x, y, reference_x, reference_y, optimizer):
    model = Regression(torch.tensor(weights, dtype=torch.float64))
    source = RegressionSource(*(torch.as_tensor(v, dtype=torch.float64) for v in (x, y, reference_x, reference_y)))
    return fake_context(source, model=model, optimizer=optimizer(model.parameters()), loss_fn=squared_error)


def restless_context(**kwargs):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = Restless().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    source = random_source(candidates=32, length=8, vocab=VOCAB)
    context = fake_context(source, model=model, optimizer=optimizer, **kwargs)
    for rows in source.tokens[-8:].split(4):
        step_of_training(context, rows)
    return context


def step_of_training(context, rows):
    context.optimizer.zero_grad()
    loss = backward(context, rows)
    context.optimizer.step()
    return loss


def backward(context, rows):
    loss = mean_loss(context.model, rows)
    loss.backward()
    return loss.item()
