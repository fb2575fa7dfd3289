"""YAML files of liveselect 0.1, refused with the change that they need."""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from liveselect.callbacks import PDS, LivePDS

LIVE_ARGUMENTS = inspect.signature(LivePDS).parameters.keys() - inspect.signature(PDS).parameters.keys()
"""Arguments that PDS had in 0.1 to solve on the live model, beside ``live``."""


def refuse_old_files(arguments: Sequence[str]) -> None:
    """Raise ValueError if a configuration file of the command line selects with PDS as in liveselect 0.1.

    jsonargparse would only say that an option is not accepted. Files that cannot be read are left to it.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config", action="append", default=[])
    class_path = None
    for file in options.parse_known_args(arguments)[0].config:
        try:
            settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if not isinstance(settings, Mapping):
            continue
        trainer = settings.get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
        for callback in callbacks if isinstance(callbacks, list) else []:
            if isinstance(callback, Mapping):
                _check_class(file, callback.get("class_path"), callback.get("init_args"))
        select = settings.get("select")
        if isinstance(select, Mapping):
            class_path = select.get("class_path", class_path)  # a later file may only change some arguments
            _check_class(file, class_path, select.get("init_args"))


def _check_class(file: str, class_path: object, given: object) -> None:
    if class_path not in ("PDS", "liveselect.callbacks.PDS") or not isinstance(given, Mapping):
        return
    if given.get("live"):
        raise ValueError(
            f"{file}: `live: true` of liveselect 0.1 is the preset LivePDS since 0.2: write class_path: "
            "liveselect.callbacks.LivePDS without live"
        )
    if old := [f"`{name}`" for name in given if name == "live" or name in LIVE_ARGUMENTS]:
        raise ValueError(
            f"{file}: {', '.join(old)} of PDS in liveselect 0.1 belong to the preset LivePDS since 0.2: leave out what "
            "is named here to draw from scores, or write class_path: liveselect.callbacks.LivePDS to solve on the live "
            "model"
        )
