"""What `liveselect plan` predicts for each preset, against what then happens: time, selection's time, memory, FLOPs.

Each plan and each run is a process of its own, one after the other, of the same configuration. Validation, loggers and
checkpoints are off in the run: a plan does not predict them.

    python benchmarks/plan.py [--steps 160] [--seconds 30] [--presets MATES Quad]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml

from liveselect.callbacks import DataSelection
from liveselect.cli import main as command
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.plan_trial import peak_memory
from liveselect.datamodules.pools.prepare import prepare

EVERY = 40
TOKENS = 128
TABLE = {"class_path": "liveselect.regressors.TokenTableRegressor"}
PRESETS: dict[str, dict[str, Any]] = {
    "random": {"class_path": "DataSelection", "init_args": {"selector": "liveselect.selectors.UniformSelector"}},
    "prior": {
        "class_path": "DataSelection",
        "init_args": {
            "warmup_rounds": 0,
            "selector": {
                "class_path": "liveselect.selectors.ScoredSelector",
                "init_args": {"scores": True, "ratio": 0.2},
            },
        },
    },
    "LiveSelection": {"class_path": "LiveSelection", "init_args": {}},
    "MATES": {"class_path": "MATES", "init_args": {"probes": 64, "regressor": TABLE}},
    "LivePDS": {"class_path": "LivePDS", "init_args": {"probes": 64, "regressor": TABLE}},
    "Quad": {"class_path": "Quad", "init_args": {}},
}


def write_texts(folder: Path, documents: int) -> None:
    """Write and prepare a pool of eight sources with words of their own, and a reference set of the first one's."""
    draw = random.Random(0)
    common = [f"word{i}" for i in range(1000)]
    sources = []
    for source in range(8):
        own = [f"term{source}x{i}" for i in range(100)]
        lines = [
            json.dumps({"text": " ".join(draw.choices(common + 5 * own, k=TOKENS // 2))}) for _ in range(documents)
        ]
        (folder / f"s{source}.jsonl").write_text("\n".join(lines))
        sources.append(f"s{source}={folder / f's{source}.jsonl'}")
        if not source:
            held = [" ".join(draw.choices(common + 5 * own, k=TOKENS // 2)) for _ in range(96)]
            (folder / "reference.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in held))
    prepare(sources, folder / "pool", tokenizer="bpe:4096", block_size=TOKENS, workers=1)


def write_config(folder: Path, preset: str, steps: int) -> Path:
    """Write the configuration of a preset; returns its file."""
    select = PRESETS[preset]
    every = {} if preset == "Quad" else {"every_n_steps": EVERY}  # its own rounds are of 20 steps
    network = {"model_type": "gpt_neox", "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 2}
    network |= {"num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": TOKENS}
    off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "default_root_dir": str(folder / preset),
            **off,
        },
        "model": {"class_path": "liveselect.cli.model.CausalLM", "init_args": {"config": network, "lr": 0.002}},
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(folder / "pool"),
                "batch_size": 16,
                "reference": {"source": str(folder / "reference.jsonl")},
            },
        },
        "select": {
            "class_path": f"liveselect.callbacks.{select['class_path']}",
            "init_args": {**select["init_args"], **every},
        },
    }
    file = folder / f"{preset}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def train(config: str) -> dict[str, float]:
    """Train, and return what happened."""
    done = SelectionCLI(["fit", "--config", config])
    ledger = next(each for each in done.trainer.callbacks if isinstance(each, DataSelection)).run.ledger
    return {
        "seconds": ledger.training_seconds + ledger.selection_seconds,
        "selection_seconds": ledger.selection_seconds,
        "flops": ledger.training_flops + ledger.selection_flops,
        "memory": peak_memory(done.model.device),
    }


def in_a_process(*arguments: object) -> None:
    subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a plan")
    parser.add_argument("--documents", type=int, default=1500, help="of each of eight sources")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plan", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.train:
        config, out = arguments.train
        Path(out).write_text(json.dumps(train(config)))
        return
    if arguments.plan:
        config, seconds, out = arguments.plan
        sys.exit(command(["plan", "--config", config, "--seconds", seconds, "--json", out]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder, arguments.documents)
        print("| preset | time, predicted / happened | selection's time | FLOPs | memory |")
        print("| --- | --- | --- | --- | --- |")
        for preset in arguments.presets:
            config, said, done = write_config(folder, preset, arguments.steps), folder / "said", folder / "done"
            in_a_process("--plan", config, arguments.seconds, said)
            in_a_process("--train", config, done)
            print(row(preset, json.loads(said.read_text())["trial"], json.loads(done.read_text())), flush=True)


def row(preset: str, said: dict[str, float], done: dict[str, float]) -> str:
    """Return a line of the table."""
    cells = [preset]
    units = (("seconds", 1.0, "s"), ("selection_seconds", 1.0, "s"), ("flops", 1e12, "TFLOP"))
    for name, unit, word in (*units, ("memory", 2.0**20, "MiB")):
        cells.append(f"{said[name] / unit:,.3g} / {done[name] / unit:,.3g} {word} ({said[name] / done[name] - 1:+.0%})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
