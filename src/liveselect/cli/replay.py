"""``liveselect replay``: train on the plans that a run recorded."""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liveselect.cli.report import RUN

SELECTION_FOLDER = re.compile(r"selection(-\d+)?")

DESCRIPTION = """\
Train on the plans that a run recorded, in the recorded order, without measuring anything: the settings are those of the
run (config.yaml in its own folder), with the selection replaced. The classes that this file names are imported and run,
as by 'liveselect fit': replay runs of people you trust. Other options are passed on to 'liveselect fit', such as
--model.init_args.lr=0.001 or --config larger.yaml to train another model on the same data.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="liveselect replay", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the new run writes")
    arguments, others = parser.parse_known_args(argv)

    import yaml

    from liveselect.cli import fit
    from liveselect.decisions import find_decisions

    decisions = find_decisions(arguments.run)
    config = own_config(decisions, arguments.run)
    if config is None and not any(word.startswith("--config") or word == "-c" for word in others):
        raise ValueError(
            f"there is no config.yaml beside {decisions}: the run was not made by `liveselect fit`, so say with "
            "--config what to train, or use liveselect.callbacks.Replay in your own script"
        )
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "replay.yaml"  # JSON is YAML
        select = {"class_path": "liveselect.callbacks.Replay", "init_args": {"run": str(decisions.resolve())}}
        own.write_text(json.dumps({"select": select, "trainer": {"default_root_dir": str(arguments.out)}}))
        base = []
        if config is not None:
            settings = Path(folder) / "settings.yaml"
            settings.write_text(json.dumps(redirected(yaml.safe_load(config.read_text()), arguments.out)))
            base = [f"--config={settings}"]
        return fit.main([*base, f"--config={own}", *others])


def own_config(decisions: Path, run: Path) -> Path | None:
    """Return the config.yaml in the folder of the run that wrote ``decisions``, or None: never one of a folder above.

    ``run`` is what the user named. The records lie in ``selection`` inside the folder of the run, or where the user
    wrote them, which counts as its folder too; the one above it only where the user named that one.
    """
    records = decisions.resolve().parent
    is_inside = SELECTION_FOLDER.fullmatch(records.name) or run.resolve() == records.parent
    folders = [records, *([records.parent] if is_inside else [])]
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


def redirected(settings: dict[str, Any], out: Path) -> dict[str, Any]:  # YAML
    """Return the settings of a run from the start that writes to the folder ``out``, without its selection."""
    trainer = settings.get("trainer") or {}
    for part in ("logger", "callbacks"):
        found = trainer.get(part)
        for each in found if isinstance(found, list) else [found]:
            arguments = each.get("init_args") if isinstance(each, dict) else None
            for name, place in (("save_dir", out), ("dirpath", out / "checkpoints")):
                if arguments and arguments.get(name) is not None:
                    arguments[name] = str(place)
    replaced = {"ckpt_path", "select"}
    return {name: value for name, value in settings.items() if name not in replaced} | {"trainer": trainer}
