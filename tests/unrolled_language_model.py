"""A small language model with a warm optimizer whose steps can be written out."""

from fakes import fake_context, random_source
from probing import VOCAB, clip, tiny_model, train
from unrolled import torch_optimizer

RATE, TRAINED, BATCH, CANDIDATES = 0.02, 4, 4, 6


def warm_context(name="adamw", clipped=True, **kwargs):
    source = kwargs.pop("source", None) or random_source(candidates=40, length=8, vocab=VOCAB)
    model = tiny_model(hidden_act="tanh", **kwargs.pop("model", {}))
    optimizer = torch_optimizer(name, model.parameters(), RATE)
    train(model, optimizer, source.tokens[-16:], steps=TRAINED)
    clipping = {"clip_gradients": clip} if clipped else {}
    return fake_context(source, model=model, optimizer=optimizer, **clipping, **kwargs)
