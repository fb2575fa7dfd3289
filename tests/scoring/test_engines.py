"""The programs of docs/scoring.md run as they stand under datatrove, and what they make can be drawn from."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_configs import callback_of, from_yaml, without_a_network  # noqa: F401 - a fixture

from liveselect import cli
from liveselect.datamodules import TokenStore, write_store
from liveselect.scores import read_scores
from liveselect.scoring import DSIR, NgramRatio

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
DOCUMENTS_PROGRAM, PARTS_PROGRAM = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documents_carry_their_scores_to_the_pool(here, capsys):
    (here / "texts").mkdir()
    texts = [f"the cat sat on mat number {i}" if i % 3 else f"bonds fell as rate {i} rose again" for i in range(40)]
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        lines = [json.dumps({"text": text, "id": f"{name}{i}"}) for i, text in enumerate(part)]
        (here / "texts" / f"{name}.jsonl").write_text("\n".join(lines))
    (here / "reference.jsonl").write_text(json.dumps({"text": "rates rose and bonds fell"}))
    exec(compile(DOCUMENTS_PROGRAM, "scoring.md", "exec"), {"__name__": "scoring"})
    found = {}
    for file in sorted((here / "scored").rglob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[row["text"]] = row["dsir"]
    scorer = DSIR(terms="words")
    scorer.fit([{"text": ["rates rose and bonds fell"]}], [{"text": texts[:25]}])
    expected = scorer({"text": texts})
    assert [found[text] for text in texts] == pytest.approx(expected.tolist())
    command = ["prepare", "scored", "--tokenizer", "bpe:300", "--block-size", "8", "--out", "pool"]
    assert cli.main(command) == 0
    assert cli.main(["score", "--pool=pool", "--column=dsir", "--out=scores"]) == 0
    scores, store = read_scores("scores"), TokenStore("pool")
    scores.check_fit(store.rows, store.fingerprint)
    whole = [row for row in range(store.rows) if len(store.documents_of(row)) == 1]
    for row in whole:  # a block inside of one document has its score
        assert scores.values[row].item() == pytest.approx(store.documents_of(row)[0]["metadata"]["dsir"])
    assert whole


def test_parts_of_a_prepared_pool_are_joined_into_one_score_file(here):
    rows = torch.randint(0, 50, (30, 8), generator=torch.Generator().manual_seed(0))
    store = write_store(here / "pool", [row.numpy() for row in rows], block_size=8, vocab_size=50, eos_id=None)
    exec(compile(PARTS_PROGRAM, "scoring.md", "exec"), {"__name__": "scoring"})
    parts = json.dumps([f"part-{rank}.parquet" for rank in range(4)])
    assert cli.main(["score", "--pool=pool", f"--parts={parts}", "--out=scores"]) == 0
    scorer = NgramRatio()
    scorer.fit([{"input_ids": torch.tensor([[5, 6, 7, 8]])}], [{"input_ids": store.read(range(30))}])
    assert torch.equal(read_scores("scores").values, scorer({"input_ids": rows}))


def test_the_selection_that_the_document_shows_can_be_built(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert yaml.safe_load(block)
    (tmp_path / "live.yaml").write_text(block)
    callback = callback_of(from_yaml("pds.yaml", str(tmp_path / "live.yaml")))
    assert type(callback.estimator).__name__ == "LossDropInfluence"
    assert type(callback.selector.selector).__name__ == "RegressionSelector"
