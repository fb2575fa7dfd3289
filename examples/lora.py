"""Train adapters only, with LoRA from peft: influence is measured on what is trained, which makes it cheaper.

Needs `pip install 'liveselect[lora]'`. Run `python examples/lora.py --text texts --tokenizer gpt2`.
"""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from train import Llama, Texts, arguments

from liveselect.callbacks import LiveSelection, SelectionMonitor
from liveselect.datamodules import SelectionDataModule


class Adapted(Llama):
    """A Llama whose weights are frozen, with adapters of rank 8 beside its attention."""

    def __init__(self, vocabulary):
        super().__init__(vocabulary)
        self.model = get_peft_model(self.model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))

    def configure_optimizers(self):
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=1e-3)


def main():
    """Train."""
    options = arguments()
    data = Texts(options.text, options.tokenizer)
    selected = SelectionDataModule.wrap(data, reference=f"{options.text}/reference", overlap="drop")
    callbacks = [LiveSelection(every_n_steps=20), SelectionMonitor()]
    trainer = pl.Trainer(
        max_steps=options.steps, val_check_interval=20, check_val_every_n_epoch=None, callbacks=callbacks
    )
    trainer.fit(Adapted(len(data.tokenizer)), datamodule=selected)


if __name__ == "__main__":
    main()
