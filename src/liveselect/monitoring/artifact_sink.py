"""Shows rounds in trackers that keep files and facts of a run: MLflow and Comet. Scalars go through the logger."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from liveselect.monitoring.view import EXAMPLE_COLUMNS, PREFIX, RoundView, example_rows

if TYPE_CHECKING:
    from comet_ml import CometExperiment
    from mlflow.tracking import MlflowClient

FOLDER = PREFIX.rstrip("/")


class Store(Protocol):
    """What a tracker takes of a run beside numbers."""

    def file(self, path: Path, folder: str) -> None:
        """Store a file in a folder of the run."""

    def text(self, text: str, name: str) -> None:
        """Store a text as a file of that name, which may have folders."""

    def fact(self, name: str, value: str) -> None:
        """Note a fact about the run, in place of what was noted under its name."""


class MLflowStore:
    """The artifacts and tags of an MLflow run.

    Args:
        client: ``MLFlowLogger.experiment``.
        run_id: of the run.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def file(self, path: Path, folder: str) -> None:
        """See :class:`Store`."""
        self._client.log_artifact(self._run_id, str(path), folder)

    def text(self, text: str, name: str) -> None:
        """See :class:`Store`."""
        self._client.log_text(self._run_id, text, name)

    def fact(self, name: str, value: str) -> None:
        """See :class:`Store`."""
        self._client.set_tag(self._run_id, name, value)


class CometStore:
    """The assets and other values of a Comet experiment.

    Args:
        experiment: ``CometLogger.experiment``.
    """

    def __init__(self, experiment: "CometExperiment") -> None:
        self._experiment = experiment

    def file(self, path: Path, folder: str) -> None:
        """See :class:`Store`."""
        self._experiment.log_asset(str(path), file_name=f"{folder}/{path.name}")

    def text(self, text: str, name: str) -> None:
        """See :class:`Store`."""
        self._experiment.log_asset_data(text, name=name)

    def fact(self, name: str, value: str) -> None:
        """See :class:`Store`."""
        self._experiment.log_other(name, value)


class ArtifactSink:
    """Writes examples, decisions, alarms and the verdict of a run to a store.

    Args:
        store: of the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._alarms: list[str] = []

    def round(self, view: RoundView, rich: bool) -> None:
        """Show a round; ``rich`` adds its examples and the file of its decisions."""
        if not rich:
            return
        name = f"round-{view.record.round:05d}"
        if view.examples:  # in the form of MLflow's tables
            table = {"columns": [*EXAMPLE_COLUMNS], "data": example_rows(view)}
            self._store.text(json.dumps(table), f"{FOLDER}/examples/{name}.json")
        if view.decisions is not None and view.decisions.is_file():
            self._store.file(view.decisions, f"{FOLDER}/decisions")

    def alert(self, title: str, text: str) -> None:
        """Add an alarm to the run's list of them."""
        self._alarms.append(f"{title}. {text}")
        self._store.text("\n".join(self._alarms), f"{FOLDER}/alarms.txt")

    def verdict(self, said: str, sentence: str) -> None:
        """Note the verdict as a fact of the run."""
        self._store.fact(f"{PREFIX}verdict", said)
        self._store.fact(f"{PREFIX}verdict_because", sentence)
