"""The README is short, and what it shows runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from liveselect.cli import main
from liveselect.ledger import Ledger

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(QUICKSTART,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PREPARE, REPORT = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 130
    assert len([line for line in QUICKSTART.splitlines() if line]) <= 15


@pytest.mark.long
def test_the_quickstart_prepares_trains_and_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-e", "-c", PREPARE], check=True, env={**os.environ, "PATH": path}, timeout=200)
    names = {}
    exec(QUICKSTART.replace("max_steps=100", "max_steps=40, accelerator='cpu'"), names)
    ledger = Ledger.read(tmp_path / "lightning_logs" / "version_0" / "selection" / "ledger.jsonl")
    assert [record.step for record in ledger.rounds] == [0, 20]
    assert ledger.rounds[1].measured
    assert [entry.step for entry in ledger.evaluations] == [20, 40]
    (command,) = REPORT.splitlines()
    assert main(command.split()[1:]) == 0
    assert "LiveSelection" in (tmp_path / "report.html").read_text()


def test_the_two_commands_of_the_start_are_targets_of_the_makefile():
    commands = [block.splitlines() for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)]
    assert ["make demo", "make test"] in commands
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_extras_that_it_names_are_those_of_the_project():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = re.search(r"\| extra \|.*?\n\n", README, re.DOTALL)[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", table, re.MULTILINE)))) == set(extras)
