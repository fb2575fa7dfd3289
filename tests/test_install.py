"""The sdist and the wheel, each installed into an environment of its own, run the README's quickstart."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "callbacks", "datamodules", "configs")


def run(command, **settings):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_runs_the_quickstart_where_it_is_installed(kind, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
    run([sys.executable, "-c", code], cwd=copy)
    (built,) = [*tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz")]

    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    # dependencies are borrowed from this environment; its liveselect is not, because it comes by a .pth of its own,
    # which is not read in a folder that another .pth names
    (site,) = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # the setuptools that a new environment of Python 3.11 brings is older than what builds an sdist
    run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"])
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", built], env=alone)

    folder = tmp_path / "work"
    folder.mkdir()
    settings = {"cwd": folder, "env": {**alone, "PATH": f"{place / 'bin'}{os.pathsep}{alone['PATH']}"}}
    where = run([python, "-c", "import liveselect; print(liveselect.__file__)"], **settings)
    assert str(site) in where
    prepare, report = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    (quickstart,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run(["bash", "-e", "-c", prepare], **settings)
    run([python, "-c", quickstart], **settings)
    run(["bash", "-e", "-c", report], **settings)
    assert "LiveSelection" in (folder / "report.html").read_text()
