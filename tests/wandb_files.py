"""Reads what an offline W&B run wrote."""

import json
import struct
from collections import defaultdict
from pathlib import Path

BLOCK, HEADER, FIRST = 32768, 7, 7


def close_wandb() -> None:
    """End the run and its service: finish() alone may return before the last records are in the file."""
    import wandb

    wandb.finish()
    wandb.teardown()


def records(folder: Path):
    """Yield the records of the only offline run under ``folder``: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, part = path.read_bytes(), FIRST, b""
    while place + HEADER <= len(data):
        room = BLOCK - place % BLOCK
        if room < HEADER:  # a header never crosses the border of a block
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        part += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


class OfflineRun:
    """The history, metrics, artifacts and alerts of an offline run, and its media files by key."""

    def __init__(self, folder: Path) -> None:
        self.history, self.metrics, self.artifacts, self.alerts, self.charts = [], {}, [], [], set()
        self.config = {}
        (self.folder,) = folder.glob("wandb/offline-run-*")
        for record in records(folder):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(_row(record.history.item))
            elif kind == "metric":
                metric = record.metric
                self.metrics[metric.name or metric.glob_name] = metric.step_metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "alert":
                self.alerts.append(record.alert)
            elif kind == "config":
                self.charts |= {item.nested_key[2] for item in record.config.update if "visualize" in item.nested_key}
                self.config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}

    def series(self, key: str) -> list:
        """Return the values of a key in order."""
        return [row[key] for row in self.history if key in row]

    def tables(self, key: str) -> list[dict]:
        """Return the tables that were logged under a key, in order."""
        return [json.loads((self.folder / "files" / row["path"]).read_text()) for row in self.series(key)]

    def of_type(self, kind: str) -> list:
        """Return the artifacts of a type."""
        return [artifact for artifact in self.artifacts if artifact.type == kind]


def _row(items) -> dict:
    row = defaultdict(dict)
    for item in items:
        value = json.loads(item.value_json)
        if len(item.nested_key) > 1:
            row[item.nested_key[0]][item.nested_key[1]] = value
        else:
            row[item.key or item.nested_key[0]] = value
    return dict(row)
