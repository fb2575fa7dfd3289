"""The steps of the demo: texts, pool, a comparison of runs, verdict."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml

from liveselect.callbacks.lines import show_lines
from liveselect.cli import corpus, score
from liveselect.cli.compare import show_results
from liveselect.cli.compare_runs import LEDGER, Comparison, Method, Planned, Settings, Task, config_path, quiet_logs
from liveselect.cli.output import say
from liveselect.datamodules.clusters.cluster import Clustering, cluster_pool
from liveselect.datamodules.pools.pool_files import MANIFEST
from liveselect.datamodules.pools.prepare import prepare
from liveselect.ledger import Ledger
from liveselect.looking import only_looking
from liveselect.report import words, write_report
from liveselect.scores import MANIFEST as SCORES_MANIFEST

MARKER = "demo.json"
CLUSTERS = 24
"""Arms of Quad: few enough to pull all of them within a few rounds."""

LIVE = "live"
"""The recommended default, which is compared with the prior alone too."""

PROXY, SCORING = "demo_pds_proxy.yaml", "demo_pds_score.yaml"
METRIC, PAGE = "val_loss", "report.html"
BUSY = 0.75
"""Load of each core from which on a second thread mostly waits for a core."""


class WritesPage(pl.Callback):
    """Writes the page about all runs of a demo before each validation, which follows each round, and after each run.

    It comes after DataSelection, whose clock of training stands still in both places.

    Args:
        runs: folders of the runs, those to come among them.
        folder: of the page.
    """

    def __init__(self, runs: Sequence[Path], folder: Path) -> None:
        self._runs, self._folder = runs, folder

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page with the last round."""
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page with the last validation."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            with only_looking("the page could not be written"):
                write_page(self._runs, self._folder)


def write_page(runs: Sequence[Path], folder: Path) -> None:
    """Write the page about those of the runs that have a record; none for none."""
    begun = [run for run in runs if (run / LEDGER).is_file()]
    if begun:
        evaluated = any(METRIC in entry.metrics for run in begun for entry in Ledger.read(run / LEDGER).evaluations)
        write_report(begun, folder / PAGE, METRIC if evaluated else None)


def use_one_thread_on_busy_cores() -> None:
    """Let torch use one thread where others keep the cores busy; where threads are set, they stay."""
    with suppress(AttributeError, OSError):  # not every system says how busy it is
        if "OMP_NUM_THREADS" not in os.environ and os.getloadavg()[0] >= BUSY * (os.cpu_count() or 1):
            torch.set_num_threads(1)
            say("The cores are busy with something else, so this uses one thread.")


@dataclass(frozen=True)
class Demo:
    """A demo in a folder.

    Attributes:
        folder: of texts, pool, runs and report.
        configs: file names in ``liveselect.configs`` of the run with selection.
        method: its name.
        steps: training steps of each run, None for those of the configs.
        seed: of weights and selection.
    """

    folder: Path
    configs: tuple[str, ...]
    method: str = LIVE
    steps: int | None = None
    seed: int = 0

    def run(self, resume: bool = False) -> None:
        """Run all stages, or with ``resume`` the missing ones.

        Raises:
            ValueError: the folder is in use by something else, or there is nothing (or another demo) to resume.
        """
        started = time.monotonic()
        self._claim_folder(resume)
        show_lines(always=True)
        stages: list[tuple[str, Callable[[], object]]] = [
            (f"Texts of Python's library, and a pool of them in {self.folder}", lambda: self.make_pool(resume)),
            ("Training", self._train),
            ("Report", self._report),
        ]
        if self.method == "quad":
            stages.insert(1, (f"Sorting the pool into {CLUSTERS} clusters, the arms", self.make_clusters))
        if self.method == "pds":
            stages.insert(1, ("Training a small proxy on random data, and scoring the pool on it", self.make_scores))
        for number, (title, stage) in enumerate(stages, 1):
            say(f"[{number}/{len(stages)}] {title}")
            stage()
        took = words.duration(time.monotonic() - started)
        say(f"This took {took}. Open {(self.folder / PAGE).resolve().as_uri()}")

    def comparison(self) -> Comparison:
        """Return the runs of this demo."""
        given = {"scores": str(self.folder / "scores")} if self.method == "pds" else {}
        methods = [Method("random", "random"), Method(self.method, "configured", given)]
        if self.method == LIVE:
            methods.insert(1, Method("prior", "prior"))
        return self._compared(self.folder, self.configs, methods, self.steps)

    def proxy(self) -> Planned:
        """Return the run of the small model that PDS scores the pool on."""
        configs = ("demo.yaml", PROXY)
        whole, proxy = (
            _read(*files)["trainer"]["max_steps"] for files in (("demo.yaml", self.configs[-1]), ("demo.yaml", PROXY))
        )
        steps = None if self.steps is None else max(1, round(self.steps * proxy / whole))
        return self._compared(self.folder / "proxy", configs, [Method("proxy", "configured")], steps).runs()[0]

    def scoring_arguments(self) -> list[str]:
        """Return the arguments of ``liveselect score`` that score the pool of this folder."""
        proxy = self.proxy()
        data = proxy.config["data"]["init_args"]
        found = [
            *(f"--config={config_path(name)}" for name in ("demo.yaml", PROXY, SCORING)),
            f"--model.init_args.seed={self.seed}",
            f"--data.init_args.pool={data['pool']}",
            f"--data.init_args.reference.source={data['reference']['source']}",
            f"--data.init_args.validation.source={data['validation']['source']}",
            f"--ckpt_path={proxy.last_checkpoint}",
            f"--out={self.folder / 'scores'}",
            f"--seed={self.seed}",
        ]
        if self.steps is None:
            return found
        whole = _read("demo.yaml", self.configs[-1])["trainer"]["max_steps"]
        return [*found, f"--probes={max(64, round(self.steps * _read(SCORING)['probes'] / whole))}"]

    # ---- the stages --------------------------------------------------------------------------------------------

    def make_pool(self, resume: bool = False) -> None:
        """Find the texts and prepare the pool."""
        if (self.folder / "pool" / MANIFEST).exists() and resume:
            return
        found = corpus.find_corpus()
        files = corpus.write_corpus(found, self.folder / "texts")
        say(str(found))
        model = _read("demo.yaml")["model"]["init_args"]["config"]
        prepare(
            [f"{source}={path}" for source, path in files.items()],
            self.folder / "pool",
            tokenizer=f"bpe:{model['vocab_size']}",
            block_size=model["max_position_embeddings"],
            workers=1,  # starting more processes takes longer than they save
            overwrite=True,
        )

    def make_clusters(self) -> None:
        """Cluster the pool, for Quad."""
        clusters = cluster_pool(self.folder / "pool", Clustering(CLUSTERS, seed=self.seed), overwrite=True)
        largest = ", ".join(name for name in clusters.names[:3])
        say(f"{len(clusters)} clusters, the largest: {largest}")

    def make_scores(self) -> None:
        """Train the proxy and score the pool on it, for PDS."""
        proxy = self.proxy()
        if not proxy.finished:
            proxy.train()
        if not (self.folder / "scores" / SCORES_MANIFEST).exists():
            with quiet_logs():
                score.main(self.scoring_arguments())

    def _train(self) -> None:
        use_one_thread_on_busy_cores()
        comparison = self.comparison()
        say(f"The page is written as the runs go on: {(self.folder / PAGE).resolve().as_uri()}")
        failed = comparison.train(
            quietly=False, look=WritesPage([run.folder for run in comparison.runs()], self.folder)
        )
        if failed:
            raise ValueError("; ".join(f"{name} has failed: {reason}" for name, reason in failed.items()))

    def _report(self) -> None:
        comparison = self.comparison()
        write_page([run.folder for run in comparison.runs()], self.folder)
        say("Held-out prose of the language reference:")
        show_results(comparison, beside=["prior"] if self.method == LIVE else [])

    def _compared(self, folder: Path, configs: tuple[str, ...], methods: list[Method], steps: int | None) -> Comparison:
        texts = self.folder / "texts"
        data = {
            "pool": str(self.folder / "pool"),
            "reference": str(texts / "held_out_reference.jsonl"),
            "validation": str(texts / "held_out_validation.jsonl"),
        }
        files = [config_path(name) for name in configs]
        return Comparison(folder, files, methods, [Task(data=data)], [self.seed], steps)

    def _claim_folder(self, resume: bool) -> None:
        marker = self.folder / MARKER
        settings = {**asdict(self), "folder": None, "configs": list(self.configs)}
        if resume:
            found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
            if found != settings:
                reason = "there is none" if found is None else f"it was made with {found}, not with {settings}"
                raise ValueError(f"cannot resume the demo in {self.folder}: {reason}. Omit --resume to start again")
            return
        if self.folder.exists() and any(self.folder.iterdir()) and not marker.exists():
            raise ValueError(f"{self.folder} holds other files: choose a new folder with --out")
        if marker.exists():
            say(f"The demo that is in {self.folder} is replaced; --out FOLDER keeps it.")
        for name in ("runs", "proxy", "scores"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings), encoding="utf-8")


def _read(*names: str) -> Settings:
    """Return the settings of files of the package, sections of later ones in place of earlier ones'."""
    found: Settings = {}
    for name in names:
        found |= yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
    return found
