"""The blocks of docs/loops.md, for a few steps each."""

import json
import re
from pathlib import Path

import pytest
import torch
from cases import tiny_neox
from lightning.fabric import Fabric
from small_run import rows
from transformers import Trainer, TrainingArguments

from liveselect.losses import causal_lm_loss

PAGE = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()
PLAIN, FABRIC, HUGGING_FACE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def small(block):
    """Return a block with a few steps, and the data of the test."""
    block = re.sub(r"data = SelectionDataModule\(.*\)\n", "", block)
    for large, few in {"2000": "4", "every_n_steps=100": "every_n_steps=2", "% 500 == 499": "% 2 == 1"}.items():
        block = block.replace(large, few)
    return block.replace("LiveSelection()", "LiveSelection(every_n_steps=2)")


@pytest.fixture
def names(tmp_path, monkeypatch):
    from liveselect.callbacks import LiveSelection
    from liveselect.datamodules import SelectionDataModule
    from liveselect.loops import Driver

    monkeypatch.chdir(tmp_path)
    model = tiny_neox()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {
        "torch": torch,
        "LiveSelection": LiveSelection,
        "Driver": Driver,
        "data": SelectionDataModule(rows(200, seed=1), reference=rows(16, seed=3), batch_size=8),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "loss_of": lambda module, batch: causal_lm_loss(module, batch).mean(),
    }


def rounds_in(folder):
    (ledger,) = folder.rglob("ledger.jsonl")
    return [record["round"] for record in map(json.loads, ledger.read_text().splitlines()) if "round" in record]


@pytest.mark.filterwarnings("ignore")
def test_the_plain_loop_of_the_page_trains_and_saves(names, tmp_path):
    exec(small(PLAIN), names)
    assert names["driver"].global_step == 4
    assert {"model", "optimizer", "selection"} == set(torch.load("last.pt", weights_only=True))
    assert rounds_in(tmp_path)[:2] == [0, 1]


@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_fabric_make_a_driver_whose_state_fabric_saves_and_loads(names):
    names["fabric"] = fabric = Fabric(accelerator="cpu", devices=1)
    exec(small(FABRIC), names)
    for _ in range(2):
        for batch in names["driver"].before_step():
            fabric.backward(names["loss_of"](names["model"], batch))
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        names["driver"].after_step()
    fabric.save("fabric.ckpt", names["state"])
    names["fabric"] = Fabric(accelerator="cpu", devices=1)
    assert "selection" in torch.load("fabric.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_hugging_face_train(names, tmp_path):
    names |= {"Trainer": Trainer}
    names["TrainingArguments"] = lambda *where, **options: TrainingArguments(
        *where, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    exec(small(HUGGING_FACE), names)
    assert names["trainer"].state.global_step == 4
    assert rounds_in(tmp_path)[:2] == [0, 1]
