"""The same measurement by one process on a whole model, and by several on one whose parameters they share (FSDP2)."""

from functools import partial

import torch
from fakes import fake_context, random_source
from probing import CLIP, VOCAB, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liveselect import distributed
from liveselect.functional.sharding import is_sharded, local
from liveselect.snapshot import checksum

CANDIDATES = 7  # shares of two and three ranks are uneven
OPTIMIZER = partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def whole_model(dtype=torch.float64):
    # sizes that three ranks cannot share evenly, and some of which leave a rank with nothing
    return tiny_model(dtype, use_parallel_residual=False)


def shard_layers(model):
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for layer in model.gpt_neox.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def warm(sharded, dtype=torch.float64, optimizer=OPTIMIZER, source=None):
    """A context whose optimizer has done four steps, on the same data whether sharded or not."""
    source = source or random_source(candidates=32, length=12, vocab=VOCAB, rows=2)
    source.references = torch.cat([source.references, source.tokens[:1]])  # five: three batches
    source.reference_labels = source.references
    model = whole_model(dtype)
    model = shard_layers(model) if sharded else model
    live = optimizer(model.parameters())
    for batch in source.tokens[-16:].split(4):
        live.zero_grad()
        model(batch, labels=batch).loss.backward()
        clip(list(model.parameters()))
        live.step()
    live.zero_grad()
    return fake_context(source, model=model, optimizer=live, clip_gradients=clip, candidates=torch.arange(20))


def clip(parameters):
    nn.utils.clip_grad_norm_(parameters, CLIP)


def measured(estimator, context):
    """The influence of the first candidates, as a round measures it; and whether nothing of the model moved."""
    before = checksum(context.model, context.optimizer)
    metrics = dict(estimator.fit(context))
    ids = torch.arange(CANDIDATES)
    mine = ids[distributed.shard(CANDIDATES)]
    batches = distributed.in_step(
        context.candidate_batches(mine), lambda: next(context.candidate_batches(ids[:1])), is_sharded(context.model)
    )
    scores = [torch.empty(0)]
    for batch, counts in batches:
        influence = estimator.score(context, batch)
        scores += [influence] if counts else []
    found = distributed.gather_shards(torch.cat(scores), CANDIDATES)
    return found, metrics, checksum(context.model, context.optimizer) == before


def local_sizes(context):
    return [local(parameter).numel() for parameter in context.model.parameters()]
