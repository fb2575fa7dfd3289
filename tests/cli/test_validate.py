"""A checkpoint is evaluated as the run evaluated it, and nothing of the run changes."""

import re

import pytest
import yaml
from two_vocabularies import COMMON, NETWORK, RARE, config_of, write_texts

from liveselect import cli
from liveselect.ledger import Ledger


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    write_texts(folder, {"pool": [COMMON] * 60 + [RARE] * 30, "reference": [RARE] * 12, "validation": [RARE] * 8})
    checkpoint = {"every_n_train_steps": 4, "dirpath": str(folder / "checkpoints"), "save_last": True}
    trainer = {
        "max_steps": 8,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "default_root_dir": str(folder / "run"),
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}],
    }
    data = {"validation": str(folder / "validation.jsonl")}
    config = config_of(folder, NETWORK, trainer, data, {"every_n_steps": 4, "dirpath": str(folder / "selection")})
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert cli.main(["fit", "--config", str(folder / "run.yaml")]) == 0
    return folder


def test_the_loss_is_that_of_the_run_and_its_files_stay_as_they_are(run, capsys):
    def files():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = files()
    config, last = str(run / "run.yaml"), str(run / "checkpoints" / "last.ckpt")
    assert cli.main(["validate", "--config", config, "--ckpt_path", last]) == 0
    said = capsys.readouterr().out
    found = float(re.search(r"val_loss\D*([\d.]+)", said)[1])
    evaluated = Ledger.read(run / "selection" / "ledger.jsonl").evaluations[-1]
    assert evaluated.step == 8
    assert found == pytest.approx(evaluated.metrics["val_loss"], rel=1e-6)
    assert files() == before


def test_weights_that_were_not_trained_are_not_evaluated_by_mistake(run, capsys):
    assert cli.main(["validate", "--config", str(run / "run.yaml")]) == 1
    assert "expected --ckpt_path" in capsys.readouterr().err
