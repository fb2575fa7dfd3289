"""YAML files and options of liveselect 0.1, refused with the change that they need."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from liveselect.callbacks import PDS, LivePDS
from liveselect.cli.typos import options_of

LIVE_ARGUMENTS = inspect.signature(LivePDS).parameters.keys() - inspect.signature(PDS).parameters.keys()
"""Arguments that PDS had in 0.1 to solve on the live model, beside ``live``."""

_PDS = ("PDS", "liveselect.callbacks.PDS", "liveselect.callbacks.pds.PDS")
_LIVE_PDS = "liveselect.callbacks.LivePDS"
_SECTIONS = ("--select", "--trainer.callbacks")
"""Where a selection may stand on a command line."""


def refuse_old_files(arguments: Sequence[str]) -> None:
    """Raise ValueError if a command line, or a configuration file on it, selects with PDS as in liveselect 0.1.

    jsonargparse would only say that an option is not accepted. Files that cannot be read are left to it.
    """
    classes: dict[str, object] = dict.fromkeys(_SECTIONS)  # a later file or option may only change some arguments
    for name, value in options_of(arguments):
        if name in ("-c", "--config"):
            classes["--select"] = _check_file(value, classes["--select"])
        for section in _SECTIONS:
            if name.rstrip("+") == section:
                classes[section] = _check_section(name, _loaded(value), classes[section])
            elif name.startswith(f"{section}."):
                argument = name.removeprefix(f"{section}.").removeprefix("init_args.").split(".")[0]
                if argument == "class_path":
                    classes[section] = value
                else:
                    _check_option(section, name, argument, value, classes[section])


def _loaded(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _check_file(file: str, class_path: object) -> object:
    """Check a file, or a configuration in its place; returns the class that is selected with after it."""
    try:
        settings = _loaded(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = _loaded(file)
    if not isinstance(settings, Mapping):
        return class_path
    trainer = settings.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        _check_section(file, callback, None)
    return _check_section(file, settings.get("select"), class_path)


def _check_section(where: str, section: object, class_path: object) -> object:
    """Check a class path, or a mapping with one; returns the class path after it."""
    for each in section if isinstance(section, list) else []:
        _check_section(where, each, None)
    if isinstance(section, str):
        return section
    if not isinstance(section, Mapping):
        return class_path
    class_path = section.get("class_path", class_path)
    given = section.get("init_args")
    if class_path not in _PDS or not isinstance(given, Mapping):
        return class_path
    if given.get("live"):
        raise ValueError(
            f"{where}: `live: true` of liveselect 0.1 is the preset LivePDS since 0.2: write class_path: "
            f"{_LIVE_PDS} without live"
        )
    if old := [f"`{name}`" for name in given if name == "live" or name in LIVE_ARGUMENTS]:
        raise ValueError(
            f"{where}: {', '.join(old)} of PDS in liveselect 0.1 belong to the preset LivePDS since 0.2: leave out "
            f"what is named here to draw from scores, or write class_path: {_LIVE_PDS} to solve on the live model"
        )
    return class_path


def _check_option(section: str, name: str, argument: str, value: str, class_path: object) -> None:
    """Raise ValueError for an option that only PDS of 0.1 had."""
    was_pds = class_path in _PDS or (argument == "live" and class_path in (None, "LivePDS", _LIVE_PDS))
    if not was_pds or (argument != "live" and argument not in LIVE_ARGUMENTS):
        return
    if argument == "live" and _loaded(value) is not False:
        raise ValueError(
            f"{name}={value}: `live` of PDS in liveselect 0.1 is the preset LivePDS since 0.2: write "
            f"{section}={_LIVE_PDS} without {name}"
        )
    raise ValueError(
        f"{name}={value}: `{argument}` of PDS in liveselect 0.1 belongs to the preset LivePDS since 0.2: leave it out "
        f"to draw from scores, or write {section}={_LIVE_PDS} to solve on the live model"
    )
