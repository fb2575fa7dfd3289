"""A dataset class in YAML survives being written down: print_config, the saved configuration, and replay."""

import sys
from pathlib import Path

import pytest
import yaml

from liveselect import cli
from liveselect.decisions.files import read_rows

MINE = """
import torch
from torch.utils.data import Dataset


class MyData(Dataset):
    def __init__(self, n: int = 40, seed: int = 1):
        self.n, self.seed = n, seed

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return {"input_ids": torch.randint(0, 50, (12,), generator=generator)}
"""


def dataset(**arguments):
    return {"class_path": "mine_of_yaml.MyData", "init_args": arguments}


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "mine_of_yaml.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine_of_yaml", None)
    settings = {
        "select": {
            "class_path": "liveselect.callbacks.DataSelection",
            "init_args": {"selector": {"class_path": "liveselect.selectors.UniformSelector"}, "every_n_steps": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "max_steps": 4,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path / "runs"),
        },
        "model": {"class_path": "small_run.SmallLM"},
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": dataset(n=40),
                "reference": dataset(n=8, seed=7),
                "validation": dataset(n=4, seed=8),
                "batch_size": 2,
            },
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def printed(capsys, path) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["fit", f"--config={path}", "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_what_is_printed_is_what_was_given_and_can_be_read_again(tmp_path, config, capsys):
    once = printed(capsys, config)
    arguments = once["data"]["init_args"]
    assert arguments["pool"] == dataset(n=40, seed=1)
    assert arguments["reference"] == dataset(n=8, seed=7)
    assert arguments["validation"] == dataset(n=4, seed=8)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(once))
    assert printed(capsys, again) == once


def test_a_path_is_printed_as_it_was_given(tmp_path, config, capsys):
    settings = yaml.safe_load(config.read_text())
    settings["data"]["init_args"]["pool"] = "a/pool"
    config.write_text(yaml.safe_dump(settings))
    assert printed(capsys, config)["data"]["init_args"]["pool"] == "a/pool"


def test_the_saved_configuration_trains_again_and_replays(tmp_path, config):
    assert cli.main(["fit", f"--config={config}"]) == 0
    saved = min(Path(tmp_path / "runs").rglob("config.yaml"), key=lambda path: len(path.parts))  # not its copy
    assert yaml.safe_load(saved.read_text())["data"]["init_args"]["pool"] == dataset(n=40, seed=1)
    assert cli.main(["fit", f"--config={saved}", f"--trainer.default_root_dir={tmp_path / 'again'}"]) == 0
    assert cli.main(["replay", str(saved.parent), "--out", str(tmp_path / "replayed")]) == 0
    plans = [
        [read_rows(path) for path in sorted(folder.rglob("decisions/*.parquet"))]
        for folder in (tmp_path / "runs", tmp_path / "again")
    ]
    assert plans[0] == plans[1] != []
