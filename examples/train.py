"""Pretrain a small Llama on text files, without selection: the script that the other examples start from.

Run `python examples/train.py --text texts --tokenizer gpt2`.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BLOCK = 64


def blocks(files, tokenizer):
    """Return a dataset of blocks of token ids, packed one text after another."""
    ids = [i for file in files for i in tokenizer(file.read_text())["input_ids"]]
    rows = [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]
    return Dataset.from_dict({"input_ids": rows}).with_format("torch")


class Texts(pl.LightningDataModule):
    """Trains on the text files of a folder, and validates on those of another."""

    def __init__(self, text, tokenizer, batch_size=8):
        super().__init__()
        self.text, self.batch_size = Path(text), batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def setup(self, stage):
        self.train = blocks(sorted((self.text / "train").glob("*.txt")), self.tokenizer)
        self.held_out = blocks(sorted((self.text / "held_out").glob("*.txt")), self.tokenizer)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=self.batch_size)


class Llama(pl.LightningModule):
    """A small Llama."""

    def __init__(self, vocabulary):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=BLOCK, **sizes))

    def training_step(self, batch, batch_index):
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val_loss", self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder with train/*.txt, held_out/*.txt and reference/*.txt")
    parser.add_argument("--tokenizer", required=True, help="name or path of a Hugging Face tokenizer")
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args()


def main():
    """Train."""
    options = arguments()
    data = Texts(options.text, options.tokenizer)
    callbacks = [LearningRateMonitor()]
    trainer = pl.Trainer(
        max_steps=options.steps, val_check_interval=20, check_val_every_n_epoch=None, callbacks=callbacks
    )
    trainer.fit(Llama(len(data.tokenizer)), datamodule=data)


if __name__ == "__main__":
    main()
