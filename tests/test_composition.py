"""Methods compose from YAML: scores made before training narrow what MATES' parts or a bandit choose from."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

from liveselect import cli
from liveselect.datamodules import write_store
from liveselect.ledger import Ledger

VOCABULARY, TOKENS, ROWS, STEPS = 50, 16, 160, 6

ONE_STEP = {"class_path": "liveselect.influence.OneStepInfluence", "init_args": {"step": "in_batch"}}
KFAC = {"class_path": "liveselect.influence.KFACInfluence", "init_args": {"factor_examples": 8}}
REGRESSION = {
    "class_path": "liveselect.selectors.RegressionSelector",
    "init_args": {
        "regressor": "liveselect.regressors.HashedRidgeRegressor",
        "probes": 12,
        "ratio": 0.5,
        "min_spearman": None,
    },
}
ARMS = {
    "class_path": "liveselect.selectors.UCBSelector",
    "init_args": {"pulls": 2, "at_once": 2, "probes": 4, "controls": 4, "arms": 2},
}
MIXTURE = {
    "class_path": "liveselect.selectors.MixtureSelector",
    "init_args": {"weights": {"source 0": 2.0, "source 1": 1.0}, "probes": 8, "prior": True, "parts": 2},
}


@pytest.fixture
def run_file(tmp_path):
    """A file of `liveselect fit` without its selection; the pool has four sources."""
    blocks = torch.randint(1, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    sources = [f"source {index % 4}" for index in range(ROWS)]
    write_store(tmp_path / "pool", blocks, block_size=TOKENS, vocab_size=VOCABULARY, sources=sources)
    draws = torch.Generator().manual_seed(1)
    reference = [{"input_ids": torch.randint(1, VOCABULARY, (TOKENS,), generator=draws).tolist()} for _ in range(6)]
    (tmp_path / "reference.jsonl").write_text("\n".join(json.dumps(row) for row in reference))
    network = {"model_type": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1}
    network |= {"num_attention_heads": 2, "intermediate_size": 32}
    return {
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": STEPS, "save_last": True},
                }
            ],
        },
        "model": {"class_path": "liveselect.cli.model.CausalLM", "init_args": {"config": network}},
        "data": {
            "class_path": "liveselect.datamodules.SelectionDataModule",
            "init_args": {
                "pool": str(tmp_path / "pool"),
                "reference": str(tmp_path / "reference.jsonl"),
                "batch_size": 4,
            },
        },
    }


@pytest.mark.parametrize(
    ("selector", "estimator"),
    [(REGRESSION, ONE_STEP), (ARMS, KFAC), (MIXTURE, ONE_STEP)],
    ids=["mates", "arms", "mixture"],
)
def test_scores_are_a_prior_of_what_measures_the_live_model(run_file, tmp_path, selector, estimator):
    scores = np.random.default_rng(2).permutation(ROWS).astype(np.float32)
    np.save(tmp_path / "scores.npy", scores)
    prior = {"selector": selector, "scores": str(tmp_path / "scores.npy"), "ratio": 0.4}
    run_file["select"] = {
        "class_path": "liveselect.callbacks.DataSelection",
        "init_args": {
            "selector": {"class_path": "liveselect.selectors.PriorSelector", "init_args": prior},
            "estimator": estimator,
            "every_n_steps": 2,
            "warmup_rounds": 0,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file))
    assert cli.main(["fit", f"--config={tmp_path / 'run.yaml'}"]) == 0
    better = set(np.flatnonzero(scores >= 0.6 * ROWS).tolist())
    ledger = Ledger.read(tmp_path / "run" / "selection" / "ledger.jsonl")
    assert len(ledger.rounds) == STEPS // 2
    for record in ledger.rounds:
        assert record.measured
        assert set(record.measured) <= better
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    uses = checkpoint["callbacks"]["DataSelection"]["run"]["pool"]["uses"]
    assert int(uses.sum()) == 4 * STEPS
    assert set(uses.nonzero().flatten().tolist()) <= better
    if selector is ARMS:
        assert any("reward" in row for row in ledger.rounds[-1].groups.values())
    elif selector is MIXTURE:
        rows = list(csv.DictReader((tmp_path / "run" / "selection" / "mixture.csv").open()))
        assert list(rows[0])[:2] == ["group", "prior"]
        assert sum(float(row["weight"]) for row in rows) == pytest.approx(1.0)
        for name, row in ledger.rounds[-1].groups.items():
            of_table = [float(each["weight"]) for each in rows if each["group"] == name]
            assert sum(of_table) == pytest.approx(row["weight"])
    else:
        assert "regressor/spearman" in ledger.rounds[-1].metrics
