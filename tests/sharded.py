"""The same measurement by one process on a whole model, and by several on one whose parameters they share (FSDP2)."""

import torch
from fakes import fake_context, random_source
from probing import CLIP, VOCAB, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liveselect import distributed
from liveselect.functional.sharding import local
from liveselect.preserve import checksum

CANDIDATES = 7  # shares of two and three ranks are uneven


def by_layers(model):
    """The usual layout; three ranks cannot share all sizes evenly."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for layer in model.gpt_neox.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def kept_whole(model):
    """Layers that stay whole between forward and backward, and after a forward alone."""
    for layer in model.gpt_neox.layers:
        fully_shard(layer, reshard_after_forward=False)
    return fully_shard(model)


def without_root(model):
    """Modules sharded one by one, with nothing around them."""
    for module in (model.gpt_neox.embed_in, *model.gpt_neox.layers, model.gpt_neox.final_layer_norm, model.lm_head):
        fully_shard(module)
    return model


def warm(sharded, dtype=torch.float64, layout=by_layers, **settings):
    """A context whose optimizer has done four steps, on the same data whether sharded or not."""
    source = random_source(candidates=32, length=12, vocab=VOCAB, rows=2)
    source.references = torch.cat([source.references, source.tokens[:1]])  # five: three batches
    source.reference_labels = source.references
    model = tiny_model(dtype, **settings)
    model = layout(model) if sharded else model
    live = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
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
    metrics = dict(context.fit(estimator))
    ids = torch.arange(CANDIDATES)
    mine = ids[distributed.shard(CANDIDATES)]
    batches = context.live.view.in_step(context.round.batches(mine), lambda: next(context.round.batches(ids[:1])))
    scores = [torch.empty(0)]
    for batch, counts in batches:
        influence = context.score(estimator, batch)
        scores += [influence] if counts else []
    found = distributed.gather_shards(torch.cat(scores), CANDIDATES)
    return found, metrics, checksum(context.model, context.optimizer) == before


def local_sizes(context):
    return [local(parameter).numel() for parameter in context.model.parameters()]
