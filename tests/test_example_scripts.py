"""The examples run, each as a reader starts it, and the documents show what they hold."""

import contextlib
import difflib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from liveselect.ledger import Ledger

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts and a tokenizer, as `python examples/texts.py texts` makes them."""
    folder = tmp_path_factory.mktemp("examples")
    subprocess.run([sys.executable, EXAMPLES / "texts.py", folder / "texts"], check=True)
    return folder


def start(name: str, folder: Path, monkeypatch, steps: int = 21) -> list[Ledger]:
    """Run an example in its own folder, and return the ledgers that it wrote."""
    place = folder / name
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = ["--text", "../texts", "--tokenizer", "../texts/tokenizer", "--steps", str(steps)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return [Ledger.read(path) for path in sorted(place.glob("lightning_logs/*/selection/ledger.jsonl"))]


def test_a_script_without_selection_trains(folder, monkeypatch):
    assert start("train.py", folder, monkeypatch, steps=3) == []


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        ("train_with_selection.py", "PriorSelector"),
        ("hugging_face_data.py", "PriorSelector"),
        ("own_selector.py", "BetterHalf"),
        ("lora.py", "PriorSelector"),
    ],
)
def test_a_script_with_selection_measures_and_chooses(name, selector, folder, monkeypatch):
    if name == "lora.py":
        pytest.importorskip("peft")
    (ledger,) = start(name, folder, monkeypatch)
    assert [record.step for record in ledger.rounds] == [0, 20]
    assert ledger.rounds[1].selector == selector
    assert ledger.rounds[1].measured


@pytest.mark.slow
def test_two_processes_train_and_go_on(folder):
    arguments = ["--text", "texts", "--tokenizer", "texts/tokenizer"]
    command = [sys.executable, str(EXAMPLES / "several_gpus.py"), *arguments]
    surroundings = {**os.environ, "ACCELERATOR": "cpu"}
    for steps in ("20", "22"):
        done = subprocess.run(
            [*command, "--steps", steps], cwd=folder, env=surroundings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    first, last = (Ledger.read(path) for path in sorted(folder.glob("lightning_logs/version_*/selection/ledger.jsonl")))
    assert [record.step for record in first.rounds] == [0]
    assert [record.step for record in last.rounds] == [0, 20]


def test_the_cells_of_the_notebook_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "selection.ipynb").read_text())["cells"]
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert Path(printed.getvalue().split()[-1]).exists()
    assert names["decisions"]["chosen"].any()


def body(name: str) -> str:
    """Return an example without its docstring."""
    return (EXAMPLES / name).read_text().split('"""\n\n', 1)[1]


def test_the_tutorials_show_what_the_examples_hold():
    tutorials = ROOT / "docs" / "tutorials"
    (shown,) = re.findall(r"```diff\n(.*?)```", (tutorials / "your-own-trainer.md").read_text(), re.DOTALL)
    before, after = (body(name).splitlines(True) for name in ("train.py", "train_with_selection.py"))
    assert shown == "".join(list(difflib.unified_diff(before, after, n=2))[2:])
    assert body("hugging_face_data.py") in (tutorials / "hugging-face.md").read_text()
    selector = re.search(r"class BetterHalf.*?\n\n\n", body("own_selector.py"), re.DOTALL)[0]
    assert selector.strip() in (tutorials / "own-selector.md").read_text()
