"""Runs of the small model under every strategy, on several forked ranks over gloo."""

import hashlib
import json
import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import forked, free_port
from small_run import BATCH, POOL, SIMPLE, SmallLM, rows, small_trainer
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import clip_grads_with_norm_
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from liveselect import distributed
from liveselect.datamodules import SelectionDataModule
from liveselect.functional.sharding import local
from liveselect.losses import causal_lm_loss

STEPS = 6


class DoubleLM(SmallLM):
    """The small model in double precision: what remains between one rank and several is not rounding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.double()

    def training_step(self, batch, batch_index):
        return causal_lm_loss(self, batch).mean()


class ShardedLM(DoubleLM):
    """Every layer, and the rest, sharded over all ranks."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.gpt_neox.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class FlatLM(DoubleLM):
    """Wrapped as a whole by FSDP1, under which Lightning leaves clipping by norm to the module."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        square = sum((p.grad.square().sum() for p in given), torch.zeros((), dtype=torch.float64))
        # FSDP's own clip_grad_norm_ refuses double precision
        clip_grads_with_norm_(given, gradient_clip_val, distributed.sum_over_ranks(square).sqrt())


MODULES = {"fsdp": FlatLM, "fsdp2": ShardedLM}


class FlatOnCPU(FSDPStrategy):
    """FSDP1, which Lightning refuses without a GPU, and torch unless it is told to compute on CPU."""

    def _setup_model(self, model):
        layers = ModuleWrapPolicy({GPTNeoXLayer})
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=layers, **self.kwargs)


class AsItIs(FSDPPrecision):
    """Leaves a module in double precision."""

    def convert_module(self, module):
        return module


def bits(module, optimizer):
    """A hash of this rank's parts of the parameters and moments."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in module.parameters():
        if not local(parameter).numel():
            continue  # some checkpoints leave out the moments of nothing
        state = sorted(optimizer.state[parameter].items())
        for tensor in (parameter, *(value for _, value in state if isinstance(value, torch.Tensor))):
            digest.update(local(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Steps(Callback):
    """Notes after every batch what it trained on and the bits of this rank's part of the model and its moments."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([trainer.global_step, batch["id"].tolist(), bits(pl_module, trainer.optimizers[0])])


def data_of(ranks: int, batch: int = BATCH) -> SelectionDataModule:
    pool = [{**row, "cluster": "abc"[index % 3]} for index, row in enumerate(rows(POOL, 1))]
    return SelectionDataModule(
        pool=pool, reference=rows(6, 2), batch_size=batch // ranks, probe_batch_size=4, groups="cluster"
    )


def fit(
    folder,
    selection,
    strategy=None,
    *,
    ranks=2,
    dropout=0.0,
    ckpt_path=None,
    whole_checkpoint=False,
    batch=BATCH,
    module=None,
    **settings,
) -> dict:
    """Train on this rank, by ``strategy`` (ddp, fsdp, fsdp2) on several or alone; return its batches, and the rounds.

    ``batch`` is the global batch; ``module`` replaces the module of the strategy.
    """
    pl.seed_everything(1, verbose=False)
    ranks = ranks if strategy else 1
    if strategy == "ddp":
        settings["strategy"] = DDPStrategy(process_group_backend="gloo")
    if strategy == "fsdp":
        settings["strategy"] = FlatOnCPU(
            process_group_backend="gloo",
            use_orig_params=True,
            state_dict_type="sharded",  # torch's full state dicts of FSDP1 end in a segmentation fault on CPU
        )
        settings |= {"plugins": [AsItIs("32-true")], "precision": None}
    if strategy == "fsdp2":
        settings["strategy"] = ModelParallelStrategy(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=not whole_checkpoint,
            process_group_backend="gloo",
        )
    steps = Steps()
    extra = settings.pop("callbacks", [])
    defaults = {"precision": "32-true", "max_steps": STEPS, "devices": ranks, **SIMPLE}
    trainer = small_trainer(folder, [selection, steps, *extra], **{**defaults, **settings})
    module = module or MODULES.get(strategy, DoubleLM)
    trainer.fit(module(dropout), datamodule=data_of(ranks, batch), ckpt_path=ckpt_path)
    ledger = selection.run.ledger.rounds
    return {
        "steps": steps.seen,
        "rounds": [[record.plan, record.measured, record.influence] for record in ledger],
        "metrics": [dict(record.metrics) for record in ledger],
    }


class SmallPool(SelectionDataModule):
    """The data of the small run, as a command names it."""

    def __init__(self, batch_size: int = 1) -> None:
        super().__init__(rows(POOL, 1), rows(6, 2), batch_size)


def batches(parts) -> list:
    """The global batches of a run, from what each rank trained on."""
    return [[i for _, ids, _ in steps for i in ids] for steps in zip(*(part["steps"] for part in parts), strict=True)]


def on_lightning_ranks(function, ranks: int, *arguments) -> list:
    """Run ``function(*arguments)`` on forked ranks for Trainers; return what each returned, by way of JSON."""
    return forked(_for_a_trainer, ranks, free_port(), function, arguments)


def _for_a_trainer(rank, ranks, folder, port, function, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    return json.loads(json.dumps(function(*arguments)))
