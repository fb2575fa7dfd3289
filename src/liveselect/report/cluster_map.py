"""A map of the pool: its clusters in two dimensions, coloured by influence, sized by their share of the plan."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from liveselect.ledger import RoundRecord, spread
from liveselect.report import charts, words
from liveselect.report.runs import Run, Section

MAPS_DRAWN = 4
CLUSTERS_NAMED = 3
"""Clusters below a map that gave most to the plan."""
DEFAULT_CLUSTERS = "clusters"


@dataclass(frozen=True)
class ClusterMap:
    """Where the clusters of a pool lie.

    Attributes:
        names: of the clusters.
        places: ``(K, 2)``, the first two principal components of their centroids.
    """

    names: tuple[str, ...]
    places: npt.NDArray[np.float64]


def find_map(config: str, near: Path | None = None) -> ClusterMap | None:
    """Return the map of the pool that a configuration file names, None when it has no clusters or lies elsewhere.

    A relative path starts where the run was started, which is not recorded: the current folder and all folders above
    ``near``, the folder of the run, are tried.
    """
    try:
        data = yaml.safe_load(config)["data"]["init_args"]
        folder = Path(data["pool"]) / str(data["groups"] or DEFAULT_CLUSTERS)
        above = [] if near is None or folder.is_absolute() else [parent / folder for parent in near.parents]
        folder = next((each for each in (folder, *above) if each.is_dir()), folder)
        names = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))["names"]
        centroids = np.load(folder / "centroids.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    if centroids.ndim != 2 or len(centroids) != len(names) or len(names) < 3:
        return None
    return ClusterMap(tuple(names), flattened(centroids))


def flattened(points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the first two principal components of ``points (K, D)``, ``(K, 2)``, with signs that do not depend on the
    machine.
    """
    centred = np.asarray(points, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    directions *= np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    places = centred @ directions.T
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def map_section(run: Run) -> Section | None:
    """Return the section with maps of some rounds; None when the pool has no clusters that can be found."""
    found = find_map(run.config, run.folder)
    if found is None:
        return None
    rounds = [record for record in run.ledger.rounds if any(name in found.names for name in record.groups)]
    # rounds of a warm-up know no rewards, and their maps would have colours of another meaning
    rounds = [record for record in rounds if _rewards(record)] or rounds
    figures, what = [], ""
    for record in spread(rounds, MAPS_DRAWN):
        title = f"Round {record.round}, step {words.number(record.step)}"
        values, what = _values(record, found.names)
        sizes = [record.share(name) for name in found.names]
        labels = [f"{name}: {words.percent(size)} of the plan" for name, size in zip(found.names, sizes, strict=True)]
        chart = charts.scatter(found.places.tolist(), values, sizes, labels, f"{title}: clusters of {run.name}")
        figures.append((chart, title, _most(record)))
    return Section(f"Where {run.name} looked", "map", {"figures": figures, "what": what}) if figures else None


def _most(record: RoundRecord) -> str:
    """Return the sentence about the clusters that gave most to the plan."""
    worth = _rewards(record)
    order = sorted(record.groups, key=lambda name: (-record.groups[name].get("chosen", 0), -worth.get(name, 0.0)))
    named = [name for name in order[:CLUSTERS_NAMED] if record.groups[name].get("chosen", 0)]
    return f"most came from {', '.join(named)}" if named else ""


def _rewards(record: RoundRecord) -> dict[str, float]:
    return {name: row["reward"] for name, row in record.groups.items() if "reward" in row}


def _values(record: RoundRecord, names: Sequence[str]) -> tuple[list[float], str]:
    """Return a number in -1..1 for each cluster, NaN where nothing is known, and what it means."""
    rewards = _rewards(record)
    if rewards:
        middle = sum(rewards.values()) / len(rewards)
        known = {name: value - middle for name, value in rewards.items()}
        what = "the mean reward of the cluster, against the average of all"
    else:
        known = {name: _lift(record, name) for name, row in record.groups.items() if row.get("available")}
        what = "how much more of it was chosen than it is of the pool"
    largest = max((abs(value) for value in known.values()), default=0.0) or 1.0
    return [known.get(name, math.nan) / largest for name in names], what


def _lift(record: RoundRecord, name: str) -> float:
    return math.log2((record.share(name) + 1e-4) / (record.share(name, "available") + 1e-4))
