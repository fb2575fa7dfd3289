"""Select from a Hugging Face dataset: tokenise and pack it with `map`, save it, and pass it as the pool.

    python examples/hugging_face_data.py --text texts --tokenizer gpt2

The dataset here is made of text files. For one of the hub write `load_dataset("wikitext", "wikitext-103-raw-v1")`.
"""

from pathlib import Path

import lightning.pytorch as pl
from datasets import load_dataset, load_from_disk
from train import BLOCK, Llama, arguments
from transformers import AutoTokenizer

from liveselect.callbacks import LiveSelection, SelectionMonitor
from liveselect.datamodules import SelectionDataModule


def pack(batch, tokenizer):
    """Return blocks of token ids from a batch of texts."""
    ids = [i for text in batch["text"] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return {"input_ids": [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]}


def main():
    """Train."""
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    files = sorted(map(str, Path(options.text, "train").glob("*.txt")))
    texts = load_dataset("text", data_files=files, split="train", sample_by="document")
    packed = texts.map(pack, batched=True, remove_columns=["text"], fn_kwargs={"tokenizer": tokenizer})
    packed.save_to_disk(f"{options.text}/packed")  # once; a run that is resumed reads the same rows

    data = SelectionDataModule(
        pool=load_from_disk(f"{options.text}/packed"),
        reference=f"{options.text}/reference",
        validation=f"{options.text}/held_out",
        tokenizer=tokenizer,
        batch_size=8,
        overlap="drop",
    )
    callbacks = [LiveSelection(every_n_steps=20), SelectionMonitor()]
    trainer = pl.Trainer(
        max_steps=options.steps, val_check_interval=20, check_val_every_n_epoch=None, callbacks=callbacks
    )
    trainer.fit(Llama(len(tokenizer)), datamodule=data)


if __name__ == "__main__":
    main()
