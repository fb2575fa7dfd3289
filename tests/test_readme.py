"""Everything that the README shows is run."""

import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from small_run import SmallLM, rows

from liveselect.cli import main, score
from liveselect.cli.model import CausalLM
from liveselect.ledger import Ledger

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "and", "old", "men", "told", "long", "tales")


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 120), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


NETWORK = {"model_type": "gpt_neox", "vocab_size": 400, "hidden_size": 8, "num_hidden_layers": 1}
NETWORK |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
PROXY = {
    "model": {"class_path": "liveselect.cli.model.CausalLM", "init_args": {"config": NETWORK}},
    "data": {
        "class_path": "liveselect.datamodules.SelectionDataModule",
        "init_args": {"pool": "pool", "reference": "reference.jsonl", "batch_size": 4},
    },
}


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the README's commands name."""
    import json

    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    Path("web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, 0)))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(200, 1)}), "books.parquet")
    Path("reference.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(8, 2)))
    Path("configs").symlink_to(ROOT / "configs")
    Path("proxy.yaml").write_text(yaml.safe_dump(PROXY))
    proxy = CausalLM(NETWORK)
    torch.save({"state_dict": proxy.state_dict(), "global_step": 10}, "proxy.ckpt")
    return tmp_path


class Existing(pl.LightningDataModule):
    """A datamodule as a user has it."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows(80, seed=0), batch_size=2, shuffle=True)


def shrink(code: str) -> str:
    """Cut the README's numbers to what a test can train."""
    numbers = {
        "20_000": "4",
        "every_n_steps=1000": "every_n_steps=2",
        "every_n_steps=100": "every_n_steps=2",
        "every_n_steps=20": "every_n_steps=2",
        "train_steps=1000": "train_steps=2",
    }
    numbers |= {"--clusters 1000": "--clusters 5", "pulls=8, arms=16": "pulls=2, arms=2"}
    numbers |= {"probes=500": "probes=8", "probes=32": "probes=8", "devices=8": "devices=2", "2000": "400"}
    for large, small in numbers.items():
        code = code.replace(large, small)
    return code


def block(containing: str) -> str:
    (found,) = [code for code in PYTHON if containing in code]
    return shrink(found)


class Model(SmallLM):
    def training_step(self, batch, batch_index):
        return super().training_step({"labels": batch["input_ids"], **batch}, batch_index)

    validation_step = None


@pytest.fixture
def names(in_folder) -> dict:
    """What the reader has before the first line."""
    from liveselect.callbacks import MATES
    from liveselect.datamodules import SelectionDataModule

    trainer = type("Trainer", (pl.Trainer,), {})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    init = trainer.__init__
    trainer.__init__ = lambda self, **settings: init(self, **{"default_root_dir": str(in_folder), **quiet, **settings})
    lightning = type("pl", (), {"Trainer": trainer})
    return {
        "pl": lightning,
        "model": Model(),
        "datamodule": Existing(),
        "tokenizer": None,
        "MATES": MATES,
        "SelectionDataModule": SelectionDataModule,
    }


def test_the_five_lines_train_select_and_resume(names, in_folder):
    import json

    Path("reference.jsonl").write_text("")
    names["datamodule"].reference_rows = rows(6, seed=3)
    code = block("SelectionDataModule.wrap").replace('"reference.jsonl"', "datamodule.reference_rows")
    exec(code.replace("import lightning.pytorch as pl", ""), names)
    assert [record.selector for record in names["mates"].run.ledger.rounds] == ["UniformSelector", "RegressionSelector"]
    names["trainer"].save_checkpoint("checkpoints/last.ckpt")
    exec(block('ckpt_path="last"').replace("max_steps=4", "max_steps=6"), names)
    assert names["trainer"].global_step == 6
    assert json.dumps(names["mates"].run.ledger.state_dict())


def test_a_round_without_a_pause_runs(names):
    from liveselect.datamodules import SelectionDataModule
    from liveselect.regressors import HashedRidgeRegressor

    names["HashedRidgeRegressor"] = HashedRidgeRegressor
    exec(block("max_overhead"), names)
    data = SelectionDataModule(pool=rows(80, seed=0), reference=rows(6, seed=3), batch_size=2)
    names["pl"].Trainer(max_steps=6, callbacks=[names["mates"]]).fit(SmallLM(), datamodule=data)
    assert [record.step for record in names["mates"].run.ledger.rounds] == [0, 2, 4]


def test_a_run_that_validates_in_steps_has_a_curve(names, in_folder):
    from liveselect.datamodules import SelectionDataModule
    from liveselect.regressors import HashedRidgeRegressor

    names["mates"] = names["MATES"](
        every_n_steps=2, probes=8, regressor=HashedRidgeRegressor(), dirpath=in_folder / "watched"
    )
    exec(block("check_val_every_n_epoch").replace('"val_check_interval": 500', '"val_check_interval": 2'), names)
    data = SelectionDataModule(pool=rows(80, seed=0), reference=rows(6, seed=3), batch_size=2)
    names["trainer"].fit(SmallLM(), datamodule=data)
    assert [entry.step for entry in Ledger.read(in_folder / "watched" / "ledger.jsonl").evaluations] == [2, 4]


def test_the_selector_that_one_writes_oneself_runs(names):
    from liveselect.datamodules import SelectionDataModule

    exec(block("class BetterHalf"), names)
    data = SelectionDataModule(pool=rows(80, seed=0), reference=rows(6, seed=3), batch_size=2)
    trainer = names["pl"].Trainer(max_steps=6, callbacks=[names["selection"]])
    trainer.fit(SmallLM(), datamodule=data)
    records = names["selection"].run.ledger.rounds
    assert [len(record.measured) for record in records] == [0, 8, 8]


def test_the_selector_that_one_writes_oneself_is_named_in_a_configuration_file(tmp_path, monkeypatch):
    from liveselect.callbacks import DataSelection
    from liveselect.cli.fit import SelectionCLI

    (tmp_path / "better_half.py").write_text(block("class BetterHalf"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        """
        model: {class_path: small_run.SmallLM}
        data:
          class_path: liveselect.datamodules.SelectionDataModule
          init_args: {pool: p, reference: r, batch_size: 4}
        select:
          class_path: liveselect.callbacks.DataSelection
          init_args:
            selector: {class_path: better_half.BetterHalf, init_args: {probes: 9}}
            estimator: liveselect.influence.OneStepInfluence
        """
    )
    callbacks = SelectionCLI([f"--config={tmp_path / 'run.yaml'}"], run=False).trainer.callbacks
    (selection,) = [each for each in callbacks if isinstance(each, DataSelection)]
    assert selection.selector.probes == 9


def test_the_trainer_for_many_gpus_is_accepted(names):
    exec(
        block("SelectionDataModule.wrap")
        .split("trainer =")[0]
        .replace('"reference.jsonl"', "[]")
        .replace("import lightning.pytorch as pl", ""),
        names,
    )
    exec(block('strategy="ddp"'), names)
    assert names["trainer"].world_size == 2


def test_the_commands_run(in_folder, names, monkeypatch, capsys):
    Ledger(about={"preset": "MATES"}).write(in_folder / "RUN" / "ledger.jsonl")
    small = {"dynamics": "sgd", "learning_rate": 0.008, "batch_size": 4, "steps": 2, "score_every": 1}
    monkeypatch.setattr(score, "PUBLISHED", small)
    assert len(SHELL) >= 5
    for line in SHELL:
        program, *arguments = shlex.split(shrink(line))
        assert program == "liveselect"
        monkeypatch.setattr("sys.argv", ["liveselect", *arguments])
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        assert not code, (line, capsys.readouterr().err)
    assert "MATES" in capsys.readouterr().out
    assert Path("report.html").exists()
    (raw,) = [code for code in PYTHON if code.startswith('data = SelectionDataModule(pool="pool"')]
    exec(raw, names)
    names["data"].setup("fit")
    assert names["data"].pool.group_names == ("web", "books")
    for preset, selector in (("quad", "UCBSelector"), ("pds", "ScoredSelector")):
        exec(block(f"{preset} = "), names)
        selection = names[preset]
        selection.warmup_rounds = 1
        trainer = names["pl"].Trainer(max_steps=6, callbacks=[selection], default_root_dir=str(in_folder / preset))
        trainer.fit(CausalLM(NETWORK), datamodule=names["data"])
        assert {record.selector for record in selection.run.ledger.rounds[1:]} == {selector}


def test_the_two_commands_of_the_start_are_targets_of_the_makefile():
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].split("\n")
    assert commands[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
