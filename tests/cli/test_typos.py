"""Help and misspelled settings are answered before torch is imported; explain lists, and diff ends as diff(1)."""

import subprocess
import sys
import time

import pytest

from liveselect import cli
from liveselect.cli.overviews import OVERVIEWS
from liveselect.cli.typos import arguments_of, refuse_typos

HEAVY = "{'torch', 'numpy', 'lightning', 'transformers', 'jsonargparse'}"


def light(arguments):
    """Run a command in a new process that may import nothing heavy."""
    code = f"import sys; from liveselect.cli import main; status = main({arguments}); "
    code += f"sys.exit('heavy' if {HEAVY} & set(sys.modules) else status)"
    began = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.monotonic() - began[1] < 30
    return done


@pytest.mark.parametrize("command", OVERVIEWS)
def test_help_opens_with_the_sections_and_imports_nothing_heavy(command):
    done = light([command, "--help"])
    assert done.returncode == 0, done.stderr
    opening = done.stdout.splitlines()[:12]
    for section in ("select", "data", "model"):
        assert any(section in line for line in opening)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("selct:\n  class_path: liveselect.callbacks.MATES\n", "there is no section 'selct'. Did you mean 'select'?"),
        ("select: MATE\n", "liveselect.callbacks holds no 'MATE'. Did you mean 'MATES'?"),
        (
            "select:\n  class_path: liveselect.callbacks.MATES\n  init_args: {every_n_step: 3}\n",
            "MATES has no setting 'every_n_step'. Did you mean 'every_n_steps'?",
        ),
        ("trainer: {max_step: 3}\n", "Trainer has no setting 'max_step'. Did you mean 'max_steps'?"),
        (
            "data:\n  class_path: liveselect.datamodules.SelectionDataModule\n  init_args: {validaton: x}\n",
            "SelectionDataModule has no setting 'validaton'. Did you mean 'validation'?",
        ),
        (
            "select:\n  class_path: liveselect.callbacks.LiveSelection\n  init_args:\n    regressor:\n"
            "      class_path: liveselect.regressors.HashedRidgeRegressor\n      init_args: {bucket: 64}\n",
            "select.regressor: HashedRidgeRegressor has no setting 'bucket'. Did you mean 'buckets'?",
        ),
        ("select:\n  class_path: liveselect.callbacks.MATES\n  init_arg: {}\n", "Did you mean 'init_args'?"),
    ],
)
def test_a_misspelled_setting_of_a_file_is_answered_with_the_nearest_name(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="Did you mean") as raised:
        refuse_typos(["--config", str(path)])
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


def test_options_are_looked_at_too_with_the_class_of_the_files_before_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("select:\n  class_path: liveselect.callbacks.MATES\n")
    refuse_typos(["--config", str(path), "--select.init_args.ratio=0.1", "--trainer.max_steps", "3"])
    with pytest.raises(ValueError, match=r"MATES has no setting 'ratios'. Did you mean 'ratio'"):
        refuse_typos(["--config", str(path), "--select.ratios=0.1"])
    with pytest.raises(ValueError, match=r"no option 'modle'. Did you mean 'model'"):
        refuse_typos(["--modle=mine.Model"])


def test_the_answer_comes_without_an_import(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {max_step: 3}\n")
    done = light(["fit", "--config", str(path)])
    assert "Did you mean 'max_steps'?" in done.stderr
    assert "heavy" not in done.stderr
    assert done.returncode == 1


def test_the_names_that_are_read_are_those_of_the_classes():
    import inspect

    from lightning.pytorch import Trainer

    from liveselect import callbacks, datamodules

    assert arguments_of("lightning.pytorch.Trainer") == set(inspect.signature(Trainer).parameters)
    for name in ("LiveSelection", "MATES", "Quad", "PDS"):
        own = set(inspect.signature(getattr(callbacks, name)).parameters) - {"run"}
        assert own < arguments_of(f"liveselect.callbacks.{name}")
    own = set(inspect.signature(datamodules.SelectionDataModule).parameters) - {"settings"}
    assert own < arguments_of("liveselect.datamodules.SelectionDataModule")


def test_every_file_of_the_package_passes():
    from importlib import resources

    for file in resources.files("liveselect.configs").iterdir():
        if file.name.endswith(".yaml"):
            refuse_typos(["--config", str(file)], cli.SCORE_SETTINGS)


def test_diff_ends_with_2_where_something_is_wrong(tmp_path, capsys):
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert cli.main(["explain", str(tmp_path / "a"), "1"]) == 1
    capsys.readouterr()
