"""What a contributor is offered: the targets of the Makefile, the workflows, the files for citing and for issues."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def printed_by_make(*target: str) -> str:
    command = ["make", "--no-print-directory", *target]  # which `make test` would print otherwise
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def targets() -> set[str]:
    """The targets that ``make`` lists when it is called without one."""
    return set(re.findall(r"^  make (\S+) +\S", printed_by_make(), re.MULTILINE))


def test_make_lists_every_target_with_a_line():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert targets() == set(phony)


def test_every_target_that_documents_and_workflows_name_exists():
    steps = [step for each in WORKFLOWS.values() for job in each["jobs"].values() for step in job["steps"]]
    commands = "\n".join(f"`{step['run']}`" for step in steps if "run" in step)
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")]
    text = commands + "".join(path.read_text() for path in documents)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert {"lint", "test", "test-slow", "build", "public-names"} <= named
    assert named <= targets()


def test_make_lists_every_benchmark():
    assert {line.split()[0] for line in printed_by_make("bench").splitlines()} == {
        path.stem for path in ROOT.glob("benchmarks/*.py")
    }


def test_the_workflows_test_the_oldest_and_the_newest_python_of_the_project():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    versions = sorted(named, key=lambda version: int(version.split(".")[1]))
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert WORKFLOWS["tests.yml"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    found = {key: citation[key] for key in ("title", "version", "license", "abstract")}
    asked = {"title": "name", "version": "version", "license": "license", "abstract": "description"}
    assert found == {key: PROJECT[name] for key, name in asked.items()}


def test_every_issue_form_has_unique_fields_and_asks_for_something():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        if path.name == "config.yml":
            continue
        form = yaml.safe_load(path.read_text())
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)), path.name
        assert any(field.get("validations", {}).get("required") for field in form["body"]), path.name
