"""Train and select on several GPUs with DDP. With ACCELERATOR=cpu two processes share the CPU, over gloo.

    python examples/several_gpus.py --text texts --tokenizer gpt2
    ACCELERATOR=cpu python examples/several_gpus.py --text texts --tokenizer gpt2

Measured candidates are shared out over the ranks, and all ranks make the same choice. The same script runs under
`torchrun` and SLURM, where `devices` and `num_nodes` follow the launcher.
"""

import os

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from train import Llama, Texts, arguments

from liveselect.callbacks import LiveSelection, SelectionMonitor
from liveselect.datamodules import SelectionDataModule


def main():
    """Train."""
    options = arguments()
    accelerator = os.environ.get("ACCELERATOR", "gpu")
    data = Texts(options.text, options.tokenizer)
    selected = SelectionDataModule.wrap(data, reference=f"{options.text}/reference", overlap="drop")
    keep = ModelCheckpoint(f"{options.text}/checkpoints", every_n_train_steps=20, save_last=True)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=2 if accelerator == "cpu" else "auto",
        strategy="ddp",
        max_steps=options.steps,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        callbacks=[LiveSelection(every_n_steps=20), SelectionMonitor(), keep],
    )
    trainer.fit(Llama(len(data.tokenizer)), datamodule=selected, ckpt_path="last")  # goes on where it was stopped


if __name__ == "__main__":
    main()
