"""The console script at its edge: help, unknown commands, errors for users."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liveselect import cli


def in_a_new_process(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["nonsense"], ["report", "--help"]])
def test_what_needs_no_model_imports_neither_torch_nor_anything_else_heavy(arguments):
    done = in_a_new_process(
        "import sys\n"
        "from liveselect.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'lightning', 'transformers', 'datasets', 'matplotlib', 'rich', 'jsonargparse'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_the_package_is_a_command_too():
    command = [sys.executable, "-m", "liveselect", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "liveselect")


def test_the_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_module(command):
    assert callable(__import__(f"liveselect.cli.{command}", fromlist=["main"]).main)


def test_every_module_with_a_main_is_a_command():
    folder = Path(cli.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if "\ndef main(argv" in path.read_text(encoding="utf-8")}
    assert found - {"__init__"} == set(cli.COMMANDS)


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys):
    assert cli.main(["reprot"]) == 2
    assert "there is no command 'reprot'. Did you mean 'report'?" in capsys.readouterr().err


def test_an_expected_problem_is_told_in_a_paragraph_without_a_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(cli.TRACEBACK_FLAG, raising=False)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("liveselect report: ")
    assert "does not exist" in said
    assert "Traceback" not in said


def test_the_flag_brings_the_traceback_back(monkeypatch, tmp_path):
    monkeypatch.setenv(cli.TRACEBACK_FLAG, "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["report", str(tmp_path / "nowhere")])


def test_an_error_that_liveselect_did_not_raise_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.delenv(cli.TRACEBACK_FLAG, raising=False)
    monkeypatch.setattr("liveselect.report.write_report", lambda *arguments: int("not ours"))
    with pytest.raises(ValueError, match="not ours"):  # raised in this file, not in liveselect
        cli.main(["report", str(tmp_path)])


def test_ctrl_c_ends_a_command_with_the_usual_status(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("liveselect.report.write_report", interrupt)
    assert cli.main(["report", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err


def test_the_report_command_writes_a_page_from_nested_runs(tmp_path, capsys):
    from report.ledgers import ledger_of

    ledger_of("UniformSelector", [5.0, 4.0]).write(tmp_path / "runs" / "random" / "ledger.jsonl")
    ledger_of("RegressionSelector", [5.0, 3.0]).write(tmp_path / "runs" / "mates" / "ledger.jsonl")
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert "mates has a lower val_loss than random" in out.read_text(encoding="utf-8")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    from report.ledgers import ledger_of

    ledger_of("UniformSelector", [5.0]).write(tmp_path / "ledger.jsonl")
    code = f"import sys; from liveselect.cli import main; sys.exit(main(['report', {str(tmp_path)!r}, '--out', "
    code += f"{str(tmp_path / 'page.html')!r}]))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""
