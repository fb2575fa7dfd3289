"""Runs of the small model on several forked ranks under ModelParallelStrategy (FSDP2), over gloo."""

import hashlib
import json
import os

import lightning.pytorch as pl
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import free_port
from small_run import BATCH, POOL, SIMPLE, SmallLM, rows, small_trainer
from torch.distributed.fsdp import fully_shard

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.functional.sharding import local


class ShardedLM(SmallLM):
    """The small model; every layer, and the rest, sharded over all ranks."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.gpt_neox.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def bits(module, optimizer):
    """A hash of this rank's parts of the parameters and moments."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in module.parameters():
        for tensor in (parameter, *(v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))):
            digest.update(local(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Steps(Callback):
    """Notes after every batch what it trained on and the bits of this rank's shards and moments."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([trainer.global_step, batch["id"].tolist(), bits(pl_module, trainer.optimizers[0])])


def fit(folder, ranks, selector, estimator=None, *, dropout=0.0, ckpt_path=None, whole_checkpoint=False, **settings):
    """Train on this rank; return what every batch trained on, the rounds, and the trainer."""
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, estimator, every_n_steps=2, dirpath=folder / "selection")
    steps = Steps()
    data = SelectionDataModule(pool=rows(POOL, 1), reference=rows(6, 2), batch_size=BATCH // ranks, probe_batch_size=4)
    if ranks > 1:
        settings["strategy"] = ModelParallelStrategy(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=not whole_checkpoint,
            process_group_backend="gloo",
        )
    extra = settings.pop("callbacks", [])
    defaults = {"precision": "32-true", "max_steps": 6, "devices": ranks, **SIMPLE}
    trainer = small_trainer(folder, [selection, steps, *extra], **{**defaults, **settings})
    trainer.fit(ShardedLM(dropout) if ranks > 1 else SmallLM(dropout), datamodule=data, ckpt_path=ckpt_path)
    rounds = [[record.plan, record.measured, record.influence] for record in selection.run.ledger.rounds]
    return steps.seen, rounds, trainer


def on_lightning_ranks(function, ranks: int, *arguments) -> list:
    """Run ``function(ranks, *arguments)`` on forked ranks; return what each of them returned, by way of JSON."""
    with mp.get_context("fork").Manager() as manager:
        results = manager.dict()
        mp.start_processes(
            _worker, (function, ranks, free_port(), results, arguments), nprocs=ranks, start_method="fork"
        )
        return [json.loads(results[rank]) for rank in range(ranks)]


def _worker(rank, function, ranks, port, results, arguments):
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks)
    )
    results[rank] = json.dumps(function(ranks, *arguments))
