"""Runs of small models on a device, for tests that a CPU does by default and a GPU with ``-m gpu``.

As a script it trains with FSDP2 on one device, in a process of its own because process groups outlive a Trainer:

    python tests/device_runs.py FOLDER DEVICE
"""

import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from small_run import SIMPLE, SmallLM, small_data, small_trainer
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from liveselect.callbacks import DataSelection
from liveselect.functional.sharding import local
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

STEPS = 5
ESTIMATORS = {
    "one step": lambda: OneStepInfluence(step="in_batch"),
    "hooks": lambda: FirstOrderInfluence("hooks"),
    "central difference": lambda: FirstOrderInfluence("central_difference"),
    "forward mode": lambda: FirstOrderInfluence("forward_mode"),
    "optimizer step": lambda: FirstOrderInfluence("optimizer_step"),
    "K-FAC": lambda: KFACInfluence(factor_examples=8),
    "EK-FAC": lambda: KFACInfluence("ekfac", factor_examples=8),
    "PMP": lambda: PMPInfluence(3, 2, batch_size=2),
}


class LlamaLM(SmallLM):
    """Grouped queries and fused attention, which GPUs have kernels of their own for."""

    attention = "sdpa"

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=32,
            attn_implementation=self.attention,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)  # noqa: TID251 - the initial weights, not selection
            self.model = LlamaForCausalLM(config)


class EagerLM(LlamaLM):
    attention = "eager"


class CompiledLM(SmallLM):
    """Compiled; with kernels of its own on a GPU."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        backend = "inductor" if torch.cuda.is_available() else "aot_eager"
        self.model = torch.compile(self.model, backend=backend)


class ShardedLM(SmallLM):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.gpt_neox.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Weights(Callback):
    """Notes the candidates of every batch and the bits of the weights after it."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        digest = hashlib.blake2b(digest_size=8)
        for parameter in pl_module.parameters():
            digest.update(local(parameter).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.seen.append([batch["id"].tolist(), digest.hexdigest()])


def regression() -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)


def trained(
    folder, device, selector, estimator=None, module=SmallLM, dropout=0.1, ckpt_path=None, overhear=0, **settings
):
    """Train on a device; returns what was trained on with the bits of the weights, and the rounds."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or sums on a GPU differ from run to run
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(
        selector, estimator, every_n_steps=2, warmup_rounds=0, dirpath=folder / "selection", overhear=overhear
    )
    weights, more = Weights(), settings.pop("callbacks", [])
    defaults = {"max_steps": STEPS, "precision": "32-true", "deterministic": "warn", **SIMPLE}
    defaults |= {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1}
    trainer = small_trainer(folder, [selection, weights, *more], **{**defaults, **settings})
    try:
        trainer.fit(module(dropout), datamodule=small_data(), ckpt_path=ckpt_path)
    finally:
        torch.use_deterministic_algorithms(False)
    return weights.seen, selection.run.ledger.rounds


def sharded_alone(folder: Path, device: str) -> dict:
    """Train with FSDP2 on one device, and without; returns the batches and the influence of both."""
    found = {}
    for name, module in (("whole", SmallLM), ("sharded", ShardedLM)):
        for estimator in ("one step", "hooks", "K-FAC"):
            place, settings = folder / name / estimator, {}
            if name == "sharded":
                settings["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
            seen, rounds = trained(place, device, regression(), ESTIMATORS[estimator](), module, 0.0, **settings)
            found[f"{name}, {estimator}"] = [[ids for ids, _ in seen], [record.influence for record in rounds]]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.stdout.write(json.dumps(sharded_alone(Path(sys.argv[1]), sys.argv[2])))
