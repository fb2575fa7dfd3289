"""What the ledger counts around the rounds and before training, and where a resumed run keeps its decisions."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_run import POOL, SIMPLE, TOKENS, VOCABULARY, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import DataSelection, Replay
from liveselect.cli import main
from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.clusters.cluster import Clustering, Clusters, cluster_pool
from liveselect.datamodules.pools.tokens import write_store
from liveselect.decisions import read_plan, rounds_in
from liveselect.influence import OneStepInfluence
from liveselect.selectors import PriorSelector, UCBSelector, UniformSelector

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
ROUND = 4


def fit(folder, selection, *callbacks, data=None, ckpt_path=None, **settings):
    trainer = small_trainer(folder, [selection, *callbacks], **{**SIMPLE, **settings})
    trainer.fit(SmallLM(), datamodule=data or small_data(), ckpt_path=ckpt_path)
    return selection.run.ledger, trainer


def every_step(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


def uniform(**settings):
    return DataSelection(UniformSelector(), every_n_steps=ROUND, **settings)


def test_a_resume_in_the_last_round_pays_for_its_rehearsal_and_its_look_at_the_data(tmp_path):
    fit(tmp_path, uniform(dirpath=tmp_path), every_step(tmp_path), max_steps=2 * ROUND)
    checkpoint = tmp_path / f"step={2 * ROUND - 2}.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["DataSelection"]
    before, data = state["run"]["ledger"]["around_seconds"], small_data()
    ledger, _ = fit(tmp_path, uniform(dirpath=tmp_path), data=data, ckpt_path=checkpoint, max_steps=2 * ROUND)
    assert len(ledger.rounds) == 2
    assert data.setup_seconds > 0
    assert ledger.around_seconds["check data"] == pytest.approx(before["check data"] + data.setup_seconds)
    assert ledger.around_seconds["rehearsal"] > before["rehearsal"]


@pytest.fixture
def clustered(tmp_path):
    tokens = torch.stack([row["input_ids"] for row in rows(POOL, 1)]).numpy()
    store = write_store(tmp_path / "pool", tokens, block_size=TOKENS, vocab_size=VOCABULARY)
    return cluster_pool(store, Clustering(4, dimensions=8), quiet=True), store


def bandit():
    return UCBSelector(pulls=2, at_once=1, probes=2, controls=2, arms=2)


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
@pytest.mark.parametrize(
    ("selector", "pays"),
    [
        (bandit, True),
        (lambda: PriorSelector(bandit(), torch.arange(POOL).float()), True),
        (UniformSelector, False),
    ],
    ids=["bandit", "bandit on the better part", "uniform"],
)
def test_runs_pay_for_the_clusters_that_they_choose_by(tmp_path, clustered, selector, pays):
    clusters, store = clustered
    data = SelectionDataModule(pool=store, reference=rows(6, 2), batch_size=2, groups="clusters")
    selection = DataSelection(selector(), OneStepInfluence(), every_n_steps=2, dirpath=tmp_path / "s")
    ledger, _ = fit(tmp_path, selection, data=data, max_steps=4)
    assert set(clusters.cost["seconds"]) == {"embed", "cluster"}
    assert ledger.before_seconds == (clusters.cost["seconds"] if pays else {})
    assert ledger.selection_seconds > sum(ledger.before_seconds.values())


def test_clusters_that_do_not_say_what_they_cost_are_counted_as_nothing(clustered):
    clusters, store = clustered
    manifest = clusters.path / "clusters.json"
    kinds = {"seconds", "flops", "uncounted"}
    found = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in kinds}
    manifest.write_text(json.dumps(found))
    assert Clusters(store).cost == {}


def test_a_run_resumed_in_a_new_folder_is_explained_and_replayed_from_there(tmp_path, capsys):
    """A logger gives every run a folder ``version_N`` of its own."""
    logger = CSVLogger(tmp_path)
    first = Trace(tmp_path / "first")
    fit(tmp_path, uniform(), every_step(tmp_path), first, logger=logger, max_steps=10)
    logger, second = CSVLogger(tmp_path), Trace(tmp_path / "second")
    ledger, trainer = fit(tmp_path, uniform(), second, logger=logger, ckpt_path=tmp_path / "step=8.ckpt", max_steps=16)
    folder = Path(trainer.loggers[0].log_dir)
    files = rounds_in(folder / "selection" / "decisions")
    assert list(files) == [record.round for record in ledger.rounds]
    plans = [read_plan(path) for path in files.values()]
    assert [plan.fingerprint for plan in plans] == [record.plan for record in ledger.rounds]

    assert main(["explain", str(folder), str(int(plans[0].ids[0]))]) == 0
    assert "round 0, step 0, UniformSelector: chosen, 1 of" in capsys.readouterr().out
    again = Trace(tmp_path / "again")
    fit(tmp_path, Replay(folder, dirpath=tmp_path / "replayed"), again, max_steps=16)
    trained = [[json.loads(line)[2] for line in Path(tmp_path / name).read_text().splitlines()]
               for name in ("first", "second", "again")]  # fmt: skip
    assert trained[0][:8] + trained[1] == trained[2]
