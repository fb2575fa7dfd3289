"""What watching costs: decisions, alarms and SelectionMonitor (W&B offline, TensorBoard, CSV) beside the training.

    python benchmarks/overhead.py [--steps 200] [--every 20]

Trains a small decoder on random tokens with a round every few steps, which is the worst case for watching: rounds are
as short as Quad's, and steps far shorter than those of a model worth watching. The time inside of each part is measured
in one run and told as a share of the training time of that run.
"""

import argparse
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.cli.model import CausalLM
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import FirstOrderInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

TOKENS, VOCABULARY = 128, 4096
NETWORK = {
    "model_type": "gpt_neox",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": TOKENS,
}


class TimedMonitor(SelectionMonitor):
    """A monitor that adds up the seconds inside of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        for hook in ("on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end"):
            setattr(self, hook, self._timed(hook, getattr(self, hook)))

    def _timed(self, hook: str, function: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> None:
            started = time.perf_counter()
            function(*arguments, **keywords)
            self.seconds[hook] += time.perf_counter() - started

        return timed


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": row} for row in torch.randint(0, VOCABULARY, (count, TOKENS), generator=generator)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps of a round")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loggers = [
            WandbLogger(project="overhead", save_dir=folder, offline=True),
            TensorBoardLogger(folder, "tb"),
            CSVLogger(folder, "csv"),
        ]
        selection = DataSelection(
            RegressionSelector(HashedRidgeRegressor(), probes=64, ratio=0.2, min_spearman=None),
            FirstOrderInfluence(),
            every_n_steps=arguments.every,
            dirpath=folder / "selection",
        )
        monitor = TimedMonitor()
        data = SelectionDataModule(
            pool=rows(arguments.steps * arguments.batch * 6, 1), reference=rows(16, 2), batch_size=arguments.batch
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=arguments.steps,
            max_epochs=-1,
            logger=loggers,
            callbacks=[selection, monitor],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(CausalLM(NETWORK), datamodule=data)
        tell(selection, monitor, arguments)


def tell(selection: DataSelection, monitor: TimedMonitor, arguments: argparse.Namespace) -> None:
    ledger = selection.run.ledger
    training = ledger.training_seconds - monitor.seconds["on_train_batch_end"]
    parts = {"monitor, opening the loggers (once)": monitor.seconds["on_fit_start"]}
    parts["monitor, rounds"] = monitor.seconds["on_train_start"] + monitor.seconds["on_train_batch_end"]
    parts["monitor, end (once)"] = monitor.seconds["on_train_end"]
    for phase in ("write decisions", "watch"):
        parts[phase] = sum(record.seconds.get(phase, 0.0) for record in ledger.rounds)
    print(
        f"{arguments.steps} steps of {1000 * training / arguments.steps:.0f} ms, {len(ledger.rounds)} rounds, "
        f"training {training:.1f} s, selection {ledger.selection_seconds:.1f} s"
    )
    for name, seconds in parts.items():
        print(
            f"{name:36} {seconds:7.3f} s  {1000 * seconds / len(ledger.rounds):7.1f} ms a round  "
            f"{seconds / training:7.2%} of training"
        )


if __name__ == "__main__":
    main()
