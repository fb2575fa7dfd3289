"""Texts in common and in rare words, a pool of them, and a small `liveselect fit` on both."""

import json
import random
from pathlib import Path

from liveselect.datamodules.pools.prepare import prepare

COMMON = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
RARE = ["uno", "dos", "tres", "cuatro", "cinco", "seis", "siete"]
NETWORK = {"model_type": "gpt_neox", "vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1}
NETWORK |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}


def write_texts(folder: Path, kinds: dict) -> None:
    """Write a file of texts for each name, of the words given for each text, and prepare the one called ``pool``."""
    draw = random.Random(0)
    for name, words in kinds.items():
        lines = [json.dumps({"text": " ".join(draw.choices(each, k=50))}) for each in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    prepare([f"all={folder / 'pool.jsonl'}"], folder / "pool", tokenizer="bpe:300", block_size=16, workers=1)


def config_of(folder: Path, network: dict, trainer: dict, data: dict, select: dict) -> dict:
    """Return a configuration of `liveselect fit` on the texts of a folder."""
    shared = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "val_check_interval": 2}
    source = {"source": str(folder / "reference.jsonl"), "max_examples": 32}
    return {
        "trainer": {**shared, "check_val_every_n_epoch": None, **trainer},
        "model": {
            "class_path": "liveselect.cli.model.CausalLM",
            "init_args": {"config": network, "lr": 0.01, "seed": 7},
        },
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(folder / "pool"),
                "batch_size": 4,
                "overlap": "allow",
                "reference": source,
                **data,
            },
        },
        "select": {"class_path": "liveselect.callbacks.LiveSelection", "init_args": select},
    }
