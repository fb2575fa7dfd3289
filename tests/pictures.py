"""Draws the two pictures of the README from real runs: `make pictures`.

Trains the demo's model on its texts twice, on random data and with LiveSelection, each with an offline W&B logger.
The report of both runs is photographed in a headless Chromium; the scalars are read back from the files
that `wandb sync` would send, and drawn with matplotlib.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import matplotlib as mpl
import yaml
from browser import Browser
from wandb_files import OfflineRun

from liveselect.cli.demo import METHODS
from liveselect.cli.demo_runs import Demo

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COMMAND = "import sys; from liveselect.cli import main; sys.exit(main(sys.argv[1:]))"
FLOPS, STEP = "*/total_flops", "*/step"
PANELS = (
    ("Held-out loss against total FLOPs, selection included", "*by_flops/val_loss", FLOPS),
    ("Loss on a sample of the pool's own mixture", "*by_flops/mixture_loss", FLOPS),
    ("Selection's share of the FLOPs", "*/flops_share", STEP),
    ("Regressor: held-out rank correlation", "*/spearman", STEP),
    ("What a round trains on", "*/mixture/*", STEP),
    ("Chosen influence above random", "*/influence/excess", STEP),
)
"""Title, keys and axis of what is drawn; the names of scalars are in docs/monitoring.md."""


def liveselect(*arguments: str | Path) -> None:
    """Run a command of liveselect in a process of its own."""
    subprocess.run([sys.executable, "-c", COMMAND, *map(str, arguments)], check=True)


def train(folder: Path, name: str, configs: Sequence[str], steps: int) -> Path:
    """Train with the demo's configurations and an offline W&B logger, and return the folder of the logger."""
    place, texts = folder / name, folder / "texts"
    above = {
        "trainer": {
            "max_steps": steps,
            "val_check_interval": 20,
            "default_root_dir": str(place),
            "logger": {
                "class_path": "lightning.pytorch.loggers.WandbLogger",
                "init_args": {"offline": True, "save_dir": str(place), "project": "pictures", "id": name},
            },
        },
    }
    place.mkdir(parents=True, exist_ok=True)
    (place / "above.yaml").write_text(yaml.safe_dump(above))
    files = [*(ROOT / "configs" / each for each in configs), place / "above.yaml"]
    liveselect(
        "fit",
        *(f"--config={each}" for each in files),
        "--select.init_args.every_n_steps=20",
        "--select.init_args.mixture_sample=64",
        f"--data.init_args.pool={folder / 'pool'}",
        f"--data.init_args.reference.source={texts / 'held_out_reference.jsonl'}",
        f"--data.init_args.validation.source={texts / 'held_out_validation.jsonl'}",
    )
    return place


def photograph(runs: Sequence[Path], page: Path, picture: Path) -> None:
    """Write the report of some runs, and a picture of what is seen first."""
    liveselect("report", *(run / "wandb" / "latest-run" for run in runs), "--out", page)
    browser = Browser(page.parent / "profile")
    browser.open(page, width=1100, height=900)
    browser.picture(picture, whole=False)
    browser.close()


def points(run: OfflineRun, key: str, axis: str) -> list[tuple[float, float]]:
    """Return what was logged under a key, against the axis that was logged with it."""
    found = []
    for row in run.history:
        places = [row[each] for each in row if fnmatch(each, axis)]
        if key in row and places:
            found.append((places[0], row[key]))
    return found


def draw(runs: Mapping[str, OfflineRun], picture: Path) -> None:
    """Draw the panels, a line for each run, or for each key of the last run where a panel has several."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    *_, last = runs
    colours = {name: f"C{i}" for i, name in enumerate(runs)}
    figure, axes = plt.subplots(-(-len(PANELS) // 2), 2, figsize=(11, 9), dpi=90)
    for axis, (title, wanted, x) in zip(axes.flat, PANELS, strict=True):
        keys = sorted({key for row in runs[last].history for key in row if fnmatch(key, wanted)})
        for key in keys:
            shown = {key.rpartition("/")[2]: runs[last]} if len(keys) > 1 else runs
            for label, run in shown.items():
                if found := points(run, key, x):
                    axis.plot(
                        *zip(*found, strict=True), marker="o", markersize=3, label=label, color=colours.get(label)
                    )
        if not axis.lines:
            raise ValueError(f"the run logged nothing that fits {wanted!r}: found {keys}")
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(x.rpartition("/")[2].replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)


def main() -> None:
    """Train, and write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: docs/images)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        Demo(folder, METHODS["live"]).make_pool(resume=True)
        random = train(folder, "random", ("demo.yaml", "random.yaml"), arguments.steps)
        live = train(folder, "LiveSelection", ("demo.yaml",), arguments.steps)
        arguments.out.mkdir(parents=True, exist_ok=True)
        photograph([random, live], folder / "report.html", arguments.out / "report.png")
        draw({place.name: OfflineRun(place) for place in (random, live)}, arguments.out / "scalars.png")


if __name__ == "__main__":
    main()
