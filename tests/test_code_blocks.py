"""Every Python block of the documents runs, in the order of its page; every command names options that exist."""

import json
import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from small_run import SmallLM, rows

from liveselect.callbacks import MATES
from liveselect.cli import COMMANDS, main, score
from liveselect.cli.model import CausalLM
from liveselect.datamodules import SelectionDataModule
from liveselect.ledger import Ledger
from liveselect.regressors import HashedRidgeRegressor

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("", "docs", "docs/how-to", "docs/tutorials", "docs/api", "examples")
    for path in sorted((ROOT / folder).glob("*.md"))
}
ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/scoring.md": "scoring/test_engines.py",
    "docs/tutorials/hugging-face.md": "test_example_scripts.py",
    "docs/formats.md": "test_formats_page.py",
    "docs/loops.md": "loops/test_page.py",
    **{f"docs/how-to/{name}.md": "test_how_to.py" for name in ("selector", "estimator", "regressor", "preset")},
}
"""Pages whose blocks another file runs."""

NETWORK = {"model_type": "gpt_neox", "vocab_size": 400, "hidden_size": 8, "num_hidden_layers": 1}
NETWORK |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
PROXY = {
    "model": {"class_path": "liveselect.cli.model.CausalLM", "init_args": {"config": NETWORK}},
    "data": {
        "class_path": "liveselect.datamodules.SelectionDataModule",
        "init_args": {"pool": "pool", "reference": "reference.jsonl", "batch_size": 4},
    },
}
SMALLER = {
    "20_000": "4",
    "every_n_steps=1000": "every_n_steps=2",
    "every_n_steps=100": "every_n_steps=2",
    "every_n_steps=20": "every_n_steps=2",
    "every_n_train_steps=1000": "every_n_train_steps=2",
    "--clusters 1000": "--clusters 5",
    "pulls=8, arms=16": "pulls=2, arms=2",
    "bpe:2000": "bpe:400",
}
"""Numbers of the documents, and what a test can train."""

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "and", "old", "men", "told", "long", "tales")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def shrink(code: str) -> str:
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return code


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 120), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


def write_lines(path: str, found: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in found))


class Model(SmallLM):
    def training_step(self, batch, batch_index):
        return super().training_step({"labels": batch["input_ids"], **batch}, batch_index)

    validation_step = None


@pytest.fixture
def reader(tmp_path, monkeypatch) -> dict:
    """What a reader has before the first block of a page: a folder, a model, data, and a selection."""
    monkeypatch.chdir(tmp_path)
    write_lines("reference.jsonl", texts(8, 2))
    init = pl.Trainer.__init__
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    monkeypatch.setattr(pl.Trainer, "__init__", lambda self, **given: init(self, **{**quiet, **given}))
    Path("checkpoints").mkdir()
    proxy = CausalLM(NETWORK)
    state = {"state_dict": proxy.state_dict(), "global_step": 10, "hyper_parameters": {"config": NETWORK}}
    torch.save({**state, "pytorch-lightning_version": pl.__version__}, "checkpoints/last.ckpt")
    torch.save(state, "proxy.ckpt")
    row = {"input_ids": torch.arange(12), "labels": torch.arange(12)}
    return {
        "model": Model(),
        "data": SelectionDataModule(pool=rows(80, seed=0), reference=rows(6, seed=3), batch_size=2),
        "selection": MATES(every_n_steps=2, probes=8, regressor=HashedRidgeRegressor()),
        "validation_loader": torch.utils.data.DataLoader([row, row], batch_size=2),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_blocks_of_a_page_compile(page):
    for block in blocks(page, "python"):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE])
def test_the_blocks_of_a_page_run_one_after_another(page, reader):
    if page == "docs/resume.md":
        Path("checkpoints/last.ckpt").unlink()  # so that the first call begins, and the second goes on
        exec(shrink(blocks(page, "python")[0]), reader)
        reader["selection"] = MATES(every_n_steps=2, probes=8, regressor=HashedRidgeRegressor())
        exec(shrink(blocks(page, "python")[0]).replace("max_steps=4", "max_steps=6"), reader)
        assert reader["trainer"].global_step == 6
        assert [record.selector for record in reader["selection"].run.ledger.rounds] == [
            "UniformSelector",
            *["RegressionSelector"] * 2,
        ]
    if page == "docs/monitoring.md":  # replays a run
        own = MATES(every_n_steps=2, probes=8, regressor=HashedRidgeRegressor(), dirpath="runs/a")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_steps=4, accelerator="cpu", callbacks=[own], **quiet).fit(Model(), datamodule=reader["data"])
    for block in blocks(page, "python"):
        exec(shrink(block) if page != "docs/resume.md" else block.split("trainer.fit")[0], reader)


def test_the_files_that_run_the_other_blocks_exist():
    for page, file in ELSEWHERE.items():
        assert (ROOT / "tests" / file).exists(), page


def test_every_command_of_the_documents_names_a_verb_and_options_that_exist():
    known, verb = {}, None
    for line in (ROOT / "tests" / "public_names.txt").read_text().splitlines():
        if not line.startswith(" "):
            verb = known.setdefault(line.removeprefix("liveselect "), set())
        elif line.strip().startswith("--"):
            verb.add(line.strip())
    seen = 0
    for page in PAGES:
        for line in "\n".join([*blocks(page, "bash"), *blocks(page, "")]).splitlines():
            found = re.match(r"(?:.*--no-python |srun )?liveselect (\S+)(.*)", line)
            if not found:
                continue
            seen += 1
            assert found[1] in COMMANDS, (page, line)
            for option in re.findall(r"(?<=\s)--[\w.]+[\w-]*", found[2]):
                first = option.partition(".")[0]
                passed_on = known["fit"] if found[1] == "plan" else set()
                assert first in known[found[1]] | passed_on | {"--print_config"}, (page, line, option)
    assert seen > 20


@pytest.mark.long
def test_the_commands_of_the_page_about_data_make_what_its_blocks_train_on(reader, monkeypatch, capsys):
    import pyarrow
    import pyarrow.parquet

    write_lines("web.jsonl", texts(300, 0))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(200, 1)}), "books.parquet")
    Path("proxy.yaml").write_text(yaml.safe_dump(PROXY))
    small = {"dynamics": "sgd", "learning_rate": 0.008, "batch_size": 4, "steps": 2, "score_every": 1}
    monkeypatch.setattr(score, "PUBLISHED", small)
    page = "docs/data.md"
    for line in "".join(blocks(page, "bash")).splitlines():
        program, *arguments = shlex.split(shrink(line))
        assert program == "liveselect"
        monkeypatch.setattr("sys.argv", ["liveselect", *arguments])
        assert not main(arguments), (line, capsys.readouterr().err)
    trained = {}
    for block in blocks(page, "python"):
        exec(shrink(block), reader)
        for preset, selector in (("quad", "UCBSelector"), ("pds", "ScoredSelector")):
            if preset in reader and preset not in trained:
                trained[preset] = selection = reader[preset]
                selection.warmup_rounds, selection.dirpath = 1, Path(preset)
                trainer = pl.Trainer(max_steps=6, callbacks=[selection])
                trainer.fit(CausalLM(NETWORK), datamodule=reader["data"])
                assert {record.selector for record in selection.run.ledger.rounds[1:]} == {selector}
    assert set(trained) == {"quad", "pds"}
    Ledger(about={"preset": "MATES"}).write(Path("RUN/ledger.jsonl"))
    assert main(["report", "RUN", "--out", "report.html"]) == 0
