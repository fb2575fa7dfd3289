"""The lines of docs/formats.md, with those of the README, select from a nanoGPT file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import tiny_neox
from small_run import SmallLM

from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.pools.tokenizers import train_bpe

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "formats.md").read_text(), re.DOTALL)
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "and", "old", "men", "told", "long", "tales"]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """The tokenizer of a train.bin in the working folder, and of reference sets beside it."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    text = [" ".join(generator.choice(WORDS, 40)) for _ in range(500)]
    found = train_bpe(text, 300)
    np.asarray(found(" ".join(text))["input_ids"][: 1024 * 18], np.uint16).tofile("train.bin")
    line = json.dumps({"text": "an old cat told the men of rain and of the sea"}) + "\n"
    for name in ("reference", "arc", "lambada"):
        (tmp_path / f"{name}.jsonl").write_text(line * 4)
    return found


class Model(SmallLM):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_neox(vocabulary=300, max_position_embeddings=1024)


def selected(folder, data, lines):
    """Run the README's callbacks and Trainer with the datamodule of the page, for two rounds."""
    names = {"data": data, "model": Model()}
    kept = [
        line for line in lines.splitlines() if line.startswith(("import", "from liveselect", "callbacks", "trainer"))
    ]
    options = "accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, "
    text = "\n".join(kept).replace("every_n_steps=20", "every_n_steps=1")
    text = text.replace(
        "max_steps=100, val_check_interval=20, check_val_every_n_epoch=None, ", f"max_steps=2, {options}"
    )
    exec(text.replace("max_steps=2, ", f"max_steps=2, default_root_dir={str(folder)!r}, "), names)
    return names["trainer"], names["callbacks"][0]


def test_the_lines_of_the_page_select_from_a_nanogpt_file(tokenizer, tmp_path):
    names = {"tokenizer": tokenizer}
    exec(BLOCKS[0].replace("block_size=1024", "block_size=64").replace("batch_size=16", "batch_size=4"), names)
    trainer, live = selected(tmp_path, names["data"], README)
    assert trainer.global_step == 2
    assert [record.round for record in live.run.ledger.rounds] == [0, 1]
    assert live.run.pool.size == len(names["pool"]) > 100


def test_a_mixture_of_the_page_records_the_loss_of_each_set(tokenizer, tmp_path):
    names = {"tokenizer": tokenizer}
    exec(BLOCKS[0].replace("block_size=1024", "block_size=64"), names)
    exec(BLOCKS[1], names)
    data = SelectionDataModule(names["pool"], names["reference"], 4, tokenizer=tokenizer)
    _, live = selected(tmp_path, data, README)
    metrics = live.run.ledger.rounds[1].metrics
    arc, lambada = metrics["reference_loss/arc"], metrics["reference_loss/lambada"]
    assert metrics["reference_loss_zero_step"] == pytest.approx((2 * arc + lambada) / 3, rel=1e-5)
    assert torch.isfinite(torch.tensor([arc, lambada])).all()
