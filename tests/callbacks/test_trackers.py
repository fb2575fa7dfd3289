"""MLflow (in a local store) and Comet (a fake of what it offers) get settings, numbers and files of a run."""

import json

import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger
from small_run import SIMPLE, ProbingUniform, SmallLM, small_data, small_trainer

from liveselect.callbacks import DataSelection, SelectionMonitor
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Alarm
from liveselect.monitoring.artifact_sink import ArtifactSink, CometStore

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(folder, logger):
    selection = DataSelection(ProbingUniform(), OneStepInfluence(), every_n_steps=2, warmup_rounds=0)
    plain = {**SIMPLE, "precision": "32-true", "gradient_clip_val": None}
    trainer = small_trainer(folder, [selection, SelectionMonitor()], max_steps=4, logger=logger, **plain)
    trainer.fit(SmallLM(), datamodule=small_data())
    return selection.run.ledger


def test_an_mlflow_run_gets_params_numbers_and_artifacts_and_its_own_folder_of_records(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3.18 asks for it, or for a database
    logger = MLFlowLogger("selection", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    ledger = fit(tmp_path, logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params["selection/every_n_steps"] == "2"
    assert run.data.params["selection/selector"] == "ProbingUniform"
    assert run.data.metrics["selection/round"] == 1
    found = {entry.path for entry in logger.experiment.list_artifacts(logger.run_id, "selection/decisions")}
    assert found == {f"selection/decisions/round-{index:06d}.parquet" for index in range(2)}
    local = logger.experiment.download_artifacts(logger.run_id, "selection/examples/round-00001.json", str(tmp_path))
    with open(local) as file:
        table = json.load(file)
    assert [row[table["columns"].index("id")] for row in table["data"]] == [
        example.id for example in ledger.rounds[1].examples
    ]
    assert logger.run_id in ledger.about["folder"]
    assert (tmp_path / "mlruns").exists()


class FakeComet:
    """The methods of a Comet experiment that are used, with their arguments as its documentation has them."""

    def __init__(self):
        self.assets, self.data, self.others = {}, {}, {}

    def log_asset(self, file_data, file_name=None, overwrite=False, copy_to_tmp=True, step=None, metadata=None):
        self.assets[file_name] = file_data

    def log_asset_data(self, data, name=None, overwrite=False, step=None, metadata=None, file_name=None, epoch=None):
        self.data[name] = data

    def log_other(self, key, value):
        self.others[key] = value


class OfflineComet(CometLogger):
    """A logger around the fake: the package itself wants an account."""

    def __init__(self):
        self.fake, self.numbers, self.settings = FakeComet(), {}, {}
        self._id = self._project_name = None

    experiment = property(lambda self: self.fake)
    save_dir = name = version = property(lambda self: None)

    def log_metrics(self, metrics, step=None):
        self.numbers.update(metrics)

    def log_hyperparams(self, params, *others):
        self.settings.update(params)

    def finalize(self, status):
        pass

    def log_graph(self, *others):
        pass


def test_a_comet_experiment_gets_settings_numbers_and_assets(tmp_path):
    logger = OfflineComet()
    ledger = fit(tmp_path, logger)
    assert logger.settings["selection"]["every_n_steps"] == 2
    assert logger.numbers["selection/round"] == 1
    assert set(logger.fake.assets) == {f"selection/decisions/round-{index:06d}.parquet" for index in range(2)}
    table = json.loads(logger.fake.data["selection/examples/round-00000.json"])
    assert len(table["data"]) == len(ledger.rounds[0].examples) > 0


def test_alarms_are_a_growing_file_and_a_verdict_is_a_fact():
    fake = FakeComet()
    sink = ArtifactSink(CometStore(fake))
    alarms = [Alarm(1, 10, "drift", "one"), Alarm(2, 20, "cost", "two")]
    for alarm in alarms:
        sink.alert(f"Selection: {alarm.kind}", alarm.text)
    assert fake.data["selection/alarms.txt"].splitlines() == ["Selection: drift. one", "Selection: cost. two"]
    sink.verdict("paying", "because")
    assert fake.others == {"selection/verdict": "paying", "selection/verdict_because": "because"}
