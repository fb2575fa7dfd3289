"""The steps of the demo: texts, pool, two runs, verdict."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from liveselect.cli import corpus
from liveselect.cli.fit import SelectionCLI
from liveselect.cli.output import say, show_progress_lines
from liveselect.datamodules.pools.pool_files import MANIFEST
from liveselect.datamodules.pools.prepare import prepare
from liveselect.report import Run, load_runs, verdict, words, write_report
from liveselect.report.runs import Axis

BASELINE = "random"
METRIC = "val_loss"
MARKER = "demo.json"
PLACES: dict[Axis, str] = {
    "step": "after {}",
    "seconds": "at equal total time, {}",
    "flops": "at equal total cost, {}",
}


@dataclass(frozen=True)
class Demo:
    """A demo in a folder.

    Attributes:
        folder: where texts, pool, runs and report are.
        configs: file names in ``liveselect.configs`` that describe the run with selection.
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
        """Do everything, or what is missing of it.

        Raises:
            ValueError: the folder is in use by something else, or there is nothing (or another demo) to resume.
        """
        started = time.monotonic()
        self._claim_folder(resume)
        show_progress_lines()
        say(f"[1/4] Texts of this machine, and a pool of them in {self.folder}")
        self._make_pool(resume)
        for number, name in ((2, BASELINE), (3, self.method)):
            say(f"[{number}/4] Training on {'random data' if name == BASELINE else f'data selected live by {name}'}")
            self._train(name)
        say("[4/4] Report")
        runs = load_runs([self.folder / name for name in (BASELINE, self.method)])
        page = write_report([self.folder / run.name for run in runs], self.folder / "report.html", METRIC)
        show_verdict(runs, self.seed)
        say(f"The whole demo took {words.duration(time.monotonic() - started)}. Open {page.resolve().as_uri()}")

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of ``liveselect fit`` that make the run ``name`` in this folder."""
        texts = self.folder / "texts"
        found = [f"--config={config_path(file)}" for file in self.configs]
        found += [
            f"--seed_everything={self.seed}",
            f"--model.init_args.seed={self.seed}",
            f"--select.init_args.seed={self.seed}",
            f"--trainer.default_root_dir={self.folder / name}",
            f"--data.init_args.pool={self.folder / 'pool'}",
            f"--data.init_args.reference.source={texts / 'held_out_reference.jsonl'}",
            f"--data.init_args.validation.source={texts / 'held_out_validation.jsonl'}",
            *self._shortened(),
        ]
        # on top of all that, because some of it is about the selector that the baseline replaces
        return [*found, f"--config={config_path('random.yaml')}"] if name == BASELINE else found

    def _shortened(self) -> list[str]:
        """Return arguments that shrink rounds, probes and intervals with the number of steps."""
        steps = self.steps
        if steps is None:
            return []
        whole = self._settings()
        trainer, select = whole["trainer"], whole["select"]["init_args"]

        def part(amount: int, least: int = 1) -> int:
            return max(least, round(amount * steps / trainer["max_steps"]))

        return [
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={part(trainer['val_check_interval'])}",
            f"--model.init_args.warmup_steps={part(whole['model']['init_args']['warmup_steps'])}",
            f"--select.init_args.every_n_steps={part(select['every_n_steps'])}",
            f"--select.init_args.probes={part(select['probes'], least=16)}",
        ]

    def _claim_folder(self, resume: bool) -> None:
        marker = self.folder / MARKER
        settings = {**asdict(self), "folder": None, "configs": list(self.configs)}
        if resume:
            found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
            if found != settings:
                told = "there is none" if found is None else f"it was made with {found}, not with {settings}"
                raise ValueError(f"cannot resume the demo in {self.folder}: {told}. Leave --resume out to start anew")
            return
        if self.folder.exists() and any(self.folder.iterdir()) and not marker.exists():
            raise ValueError(f"{self.folder} holds other files: choose a new folder with --out")
        for name in (BASELINE, self.method):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings), encoding="utf-8")

    def _make_pool(self, resume: bool) -> None:
        if (self.folder / "pool" / MANIFEST).exists() and resume:
            return
        found = corpus.find_corpus()
        files = corpus.write_corpus(found, self.folder / "texts")
        say(corpus.describe(found))
        model = self._settings()["model"]["init_args"]["config"]
        prepare(
            [f"{source}={path}" for source, path in files.items()],
            self.folder / "pool",
            tokenizer=f"bpe:{model['vocab_size']}",
            block_size=model["max_position_embeddings"],
            workers=1,  # starting more takes longer than they save
            overwrite=True,
        )

    def _settings(self) -> dict[str, Any]:
        """Return the first config, which says what the runs share."""
        settings: dict[str, Any] = yaml.safe_load(config_path(self.configs[0]).read_text(encoding="utf-8"))
        return settings

    def _train(self, name: str) -> None:
        last = self.folder / name / "checkpoints" / "last.ckpt"
        with _quiet_lightning():
            cli = SelectionCLI(self.arguments(name), run=False)
            try:
                cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
            except SystemExit as end:  # what Lightning makes of Ctrl-C, once it has cleaned up
                raise KeyboardInterrupt from end


def config_path(name: str) -> Path:
    """Return the path of a config of the package."""
    return Path(str(resources.files("liveselect.configs").joinpath(name)))


def show_verdict(runs: list[Run], seed: int) -> None:
    """Print what came out, whichever way."""
    baseline, other = runs
    table = Table(title=f"Held-out prose, loss in nats per token (seed {seed})", title_justify="left")
    for column in ("", baseline.name, other.name):
        table.add_column(column, justify="left" if not column else "right")
    for axis, text in PLACES.items():
        found = verdict.compare(baseline, other, METRIC, axis)
        if found is not None:
            where = text.format(words.place(axis, found.at))
            table.add_row(where, words.loss(found.baseline), words.loss(found.other))
    table.add_section()
    table.add_row("total time, validation aside", *(words.duration(run.total_seconds) for run in runs))
    table.add_row("of it selection", *(words.percent(run.ledger.selection_share) for run in runs))
    Console().print(table)
    say(verdict.headline(runs, METRIC))
    for text in verdict.caveats(runs, METRIC):
        say(text)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says about settings that the demo made on purpose."""
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
