"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_of_the_documents_lead_to_files(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (document.parent / link).exists(), link
    for script in re.findall(r"python ((?:benchmarks|tests)/\S+?\.py)", text):
        assert (ROOT / script).exists(), script


def test_every_test_that_the_table_of_faults_names_exists():
    named = re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 20
    for name in named:
        assert (ROOT / "tests" / name).exists(), name
