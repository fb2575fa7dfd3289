"""`liveselect fit` on several ranks."""

import pytest
import torch
from lightning_ranks import on_lightning_ranks

from liveselect.callbacks import DataSelection
from liveselect.cli.fit import SelectionCLI

LOGGERS = {"none": "false", "csv": "lightning.pytorch.loggers.CSVLogger"}


def _fit(folder, logger) -> list:
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 4, "max_epochs": -1}
    options |= {"enable_progress_bar": False, "limit_val_batches": 0, "logger": LOGGERS[logger]}
    if logger != "none":
        options["logger.save_dir"] = folder
    model = ["--model=small_run.SmallLM", "--data=lightning_ranks.SmallPool"]
    select = ["--select=liveselect.callbacks.DataSelection", "--select.every_n_steps=2"]
    select += ["--select.selector=liveselect.selectors.UniformSelector"]
    trainer = [f"--trainer.{name}={value}" for name, value in {**options, "default_root_dir": folder}.items()]
    cli = SelectionCLI(["fit", *model, *select, *trainer])
    selection = next(each for each in cli.trainer.callbacks if isinstance(each, DataSelection))
    return [record.plan for record in selection.run.ledger.rounds]


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_command_trains_on_two_ranks_and_writes_its_settings_beside_the_ledger(tmp_path, logger):
    torch.set_num_threads(1)
    first, second = on_lightning_ranks(_fit, 2, tmp_path, logger)
    assert first == second
    assert len(first) == 2
    (ledger,) = tmp_path.rglob("ledger.jsonl")
    assert (ledger.parents[1] / "config.yaml").exists()
