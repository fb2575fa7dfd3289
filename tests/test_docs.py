"""The documents: what they point to is there, the site builds without a dead link, and the prose is plain."""

import re
import subprocess
import sys
from pathlib import Path

import prose
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = prose.documents()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_of_the_documents_lead_to_files(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (document.parent / link).exists(), link
    for script in re.findall(r"python ((?:benchmarks|tests|examples)/\S+?\.py)", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_prose_is_plain(document):
    assert not list(prose.faults(document))


def test_a_fault_of_the_prose_is_found_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("A change is told.\n```\nwhatever\n```\n`told` to the bit. It cannot tell yet.\n")
    (fault,) = prose.faults(page)
    assert fault.startswith("page.md:1: 'told'")


def test_every_test_that_the_table_of_faults_names_exists():
    named = re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 20
    for name in named:
        assert (ROOT / "tests" / name).exists(), name


def pages_of(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(each)]


def test_every_page_has_its_place_in_the_navigation():
    settings = (ROOT / "mkdocs.yml").read_text()
    found = pages_of(yaml.safe_load(settings)["nav"])
    assert len(found) == len(set(found))
    assert set(found) == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


@pytest.mark.long
def test_the_site_builds_without_a_dead_link_and_documents_every_preset(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    callbacks = (tmp_path / "site" / "api" / "callbacks.html").read_text()
    for preset in ("LiveSelection", "MATES", "Quad", "PDS", "LivePDS", "DataSelection"):
        assert f'id="liveselect.callbacks.{preset}"' in callbacks
    assert "every_n_steps" in callbacks
    assert ":class:" not in callbacks
    assert ".. math::" not in callbacks
