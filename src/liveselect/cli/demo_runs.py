"""The steps of the demo: texts, pool, two runs, verdict."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from liveselect.callbacks.lines import show_lines
from liveselect.cli import corpus, score
from liveselect.cli.demo_verdict import METRIC, show_verdict
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.output import say
from liveselect.datamodules.clusters.cluster import Clustering, cluster_pool
from liveselect.datamodules.pools.pool_files import MANIFEST
from liveselect.datamodules.pools.prepare import prepare
from liveselect.report import load_runs, words, write_report
from liveselect.scores import MANIFEST as SCORES_MANIFEST

BASELINE, PROXY = "random", "proxy"
MARKER = "demo.json"
CLUSTERS = 24
"""Arms of Quad: few enough to pull all of them within a few rounds."""

OVERRIDES = {BASELINE: ("random.yaml",), PROXY: ("demo_pds_proxy.yaml",)}
"""Configs on top of the method's that make another run of it."""

SCORING = "demo_pds_score.yaml"


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
    method: str
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
        stages: list[tuple[str, Callable[[], None]]] = [
            (f"Texts of Python's library, and a pool of them in {self.folder}", lambda: self._make_pool(resume)),
            ("Training on random data", lambda: self._train(BASELINE)),
            (f"Training on data selected live by {self.method}", lambda: self._train(self.method)),
            ("Report", self._report),
        ]
        if self.method == "quad":
            stages.insert(1, (f"Sorting the pool into {CLUSTERS} clusters, the arms", self._cluster))
        if self.method == "pds":
            stages.insert(2, ("Training a small proxy on random data", lambda: self._train(PROXY)))
            stages.insert(3, ("Scoring the pool on the proxy", self._score))
        for number, (title, stage) in enumerate(stages, 1):
            say(f"[{number}/{len(stages)}] {title}")
            stage()
        took = words.duration(time.monotonic() - started)
        say(f"The whole demo took {took}. Open {(self.folder / 'report.html').resolve().as_uri()}")

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of ``liveselect fit`` that make the run ``name`` in this folder."""
        found = [
            *self._files(*self.configs),
            f"--seed_everything={self.seed}",
            f"--model.init_args.seed={self.seed}",
            f"--select.init_args.seed={self.seed}",
            *self._data(),
        ]
        if self.method == "pds":
            found.append(f"--select.init_args.scores={self.folder / 'scores'}")
        found += self._shortened()
        # last, because these files replace the selector that some of the arguments above are about
        found += self._files(*OVERRIDES.get(name, ()))
        if name == PROXY:
            found += self._shortened_proxy()
        return [*found, f"--trainer.default_root_dir={self.folder / name}"]

    def scoring_arguments(self) -> list[str]:
        """Return the arguments of ``liveselect score`` that score the pool of this folder."""
        found = [
            *self._files("demo.yaml", *OVERRIDES[PROXY], SCORING),
            f"--model.init_args.seed={self.seed}",
            *self._data(),
            f"--ckpt_path={self._checkpoint(PROXY)}",
            f"--out={self.folder / 'scores'}",
            f"--seed={self.seed}",
        ]
        probes = _settings(SCORING)["probes"]
        return found if self.steps is None else [*found, f"--probes={self._part(probes, least=64)}"]

    # ---- groups of arguments -----------------------------------------------------------------------------------

    def _files(self, *names: str) -> list[str]:
        return [f"--config={config_path(name)}" for name in names]

    def _data(self) -> list[str]:
        texts = self.folder / "texts"
        return [
            f"--data.init_args.pool={self.folder / 'pool'}",
            f"--data.init_args.reference.source={texts / 'held_out_reference.jsonl'}",
            f"--data.init_args.validation.source={texts / 'held_out_validation.jsonl'}",
        ]

    def _shortened(self) -> list[str]:
        """Return arguments that shrink rounds, probes and intervals with the number of steps."""
        if self.steps is None:
            return []
        common, select = _settings("demo.yaml"), _settings(self.configs[-1])["select"]["init_args"]
        found = [
            f"--trainer.max_steps={self.steps}",
            f"--trainer.val_check_interval={self._part(common['trainer']['val_check_interval'])}",
            f"--model.init_args.warmup_steps={self._part(common['model']['init_args']['warmup_steps'])}",
            f"--select.init_args.every_n_steps={self._part(select['every_n_steps'])}",
        ]
        if self.method == "mates":
            found.append(f"--select.init_args.probes={self._part(select['probes'], least=16)}")
        return found

    def _shortened_proxy(self) -> list[str]:
        if self.steps is None:
            return []
        trainer = _settings(*OVERRIDES[PROXY])["trainer"]
        # checkpoints are written at validations, so the last step must be one
        interval = self._part(trainer["val_check_interval"])
        steps = interval * (trainer["max_steps"] // trainer["val_check_interval"])
        return [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={interval}"]

    def _part(self, amount: int, least: int = 1) -> int:
        whole: int = _settings("demo.yaml")["trainer"]["max_steps"]
        return max(least, round(amount * (self.steps or whole) / whole))

    def _checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoints" / "last.ckpt"

    # ---- the stages --------------------------------------------------------------------------------------------

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
        for name in (BASELINE, self.method, PROXY, "scores"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings), encoding="utf-8")

    def _make_pool(self, resume: bool) -> None:
        if (self.folder / "pool" / MANIFEST).exists() and resume:
            return
        found = corpus.find_corpus()
        files = corpus.write_corpus(found, self.folder / "texts")
        say(str(found))
        model = _settings("demo.yaml")["model"]["init_args"]["config"]
        prepare(
            [f"{source}={path}" for source, path in files.items()],
            self.folder / "pool",
            tokenizer=f"bpe:{model['vocab_size']}",
            block_size=model["max_position_embeddings"],
            workers=1,  # starting more processes takes longer than they save
            overwrite=True,
        )

    def _cluster(self) -> None:
        clusters = cluster_pool(self.folder / "pool", Clustering(CLUSTERS, seed=self.seed), overwrite=True)
        largest = ", ".join(name for name in clusters.names[:3])
        say(f"{len(clusters)} clusters, the largest: {largest}")

    def _train(self, name: str) -> None:
        last = self._checkpoint(name)
        with _quiet_lightning():
            # named, so that a run that is started over has no second folder for its records
            records = f"--select.init_args.dirpath={self.folder / name / 'selection'}"
            cli = SelectionCLI([*self.arguments(name), records], run=False)
            try:
                cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
            except SystemExit as end:  # Lightning raises it after Ctrl-C, once it has cleaned up
                raise KeyboardInterrupt from end

    def _score(self) -> None:
        if not (self.folder / "scores" / SCORES_MANIFEST).exists():
            with _quiet_lightning():
                score.main(self.scoring_arguments())

    def _report(self) -> None:
        runs = load_runs([self.folder / name for name in (BASELINE, self.method)])
        write_report([self.folder / run.name for run in runs], self.folder / "report.html", METRIC)
        show_verdict(runs, self.seed)


def config_path(name: str) -> Path:
    """Return the path of a config of the package."""
    return Path(str(resources.files("liveselect.configs").joinpath(name)))


def _settings(name: str) -> dict[str, Any]:  # YAML
    settings: dict[str, Any] = yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
    return settings


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about settings that the demo makes on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
