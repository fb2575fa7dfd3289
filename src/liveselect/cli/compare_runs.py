"""The runs of a comparison: their settings, and training them, in several processes and with interruptions."""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from liveselect.callbacks.arguments import RunArguments
from liveselect.cli.output import say
from liveselect.json_lines import whole_file
from liveselect.ledger import Ledger

if TYPE_CHECKING:
    from lightning.pytorch import Callback

CONFIG, LEDGER = "run.yaml", Path("selection") / "ledger.jsonl"
MIXTURE_SAMPLE = 64
PRESETS = {"random": "random.yaml", "prior": "prior.yaml"}
"""Methods that are files of the package; others are presets of ``liveselect.callbacks``, or files."""

CONFIGURED = "configured"
"""The method that the configuration files themselves name under ``select``."""

OF_EVERY_RUN = {"every_n_steps", "warmup_rounds", "seed", "estimator", *RunArguments.__annotations__}
"""Settings of a DataSelection; others are settings of the selector that it is given."""

Settings = dict[str, Any]  # YAML


@dataclass(frozen=True)
class Method:
    """One way to select.

    Attributes:
        name: in the table.
        preset: ``random``, ``prior``, ``configured``, a preset of ``liveselect.callbacks`` or a YAML file.
        settings: of the preset; dots lead into parts, as in ``selector.init_args.ratio``.
        steps: training steps beside those of other methods: 1.1 trains a tenth longer.
    """

    name: str
    preset: str
    settings: Mapping[str, object] = field(default_factory=dict)
    steps: float = 1.0

    @classmethod
    def of(cls, text: str, name: str = "") -> "Method":
        """Read ``NAME=PRESET:KEY=VALUE,KEY=VALUE``, of which all but the preset may be left out.

        Raises:
            ValueError: a setting is none.
        """
        head, _, rest = text.partition(":")
        before, equals, preset = head.partition("=")
        settings: Settings = {}
        for part in filter(None, rest.split(",")):
            key, sign, value = part.partition("=")
            if not sign:
                raise ValueError(f"expected settings of a method as KEY=VALUE,KEY=VALUE, got {part!r} in {text!r}")
            settings[key.strip()] = yaml.safe_load(value)
        steps = float(settings.pop("steps", 1.0))
        preset = preset if equals else before
        short = Path(preset).stem + "".join(f" {key}={value}" for key, value in settings.items())
        return cls(name or (before if equals else short), preset, settings, steps)

    @classmethod
    def from_yaml(cls, name: str, value: object) -> "Method":
        """Read a method from a comparison file: a text as in :meth:`of`, or a mapping with ``preset``."""
        if isinstance(value, str):
            return cls.of(value, name)
        if not isinstance(value, Mapping) or set(value) - {"preset", "settings", "steps"} or "preset" not in value:
            raise ValueError(
                f"expected method {name!r} as a preset or a file, or as {{preset: ..., settings: ..., steps: ...}}, "
                f"got {value!r}"
            )
        return cls(name, str(value["preset"]), value.get("settings") or {}, float(value.get("steps", 1.0)))


@dataclass(frozen=True)
class Task:
    """A pool and what is aimed at.

    Attributes:
        name: in the table.
        data: ``pool``, ``reference`` and ``validation`` (and other settings of the datamodule) that differ from those
            of the configuration files.
        elsewhere: texts that nothing aims at, None for none.
    """

    name: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    elsewhere: str | None = None


@dataclass(frozen=True)
class Planned:
    """One run of a comparison, with all of its settings.

    Attributes:
        task: its name.
        method: its name.
        seed: of weights and selection.
        folder: of its configuration, checkpoints and records.
        config: what ``liveselect fit`` is given.
    """

    task: str
    method: str
    seed: int
    folder: Path
    config: Settings

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.task, self.method, f"seed {self.seed}"]))

    @property
    def last_checkpoint(self) -> Path:
        """What an interrupted run goes on from, and a finished one ends with."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def finished(self) -> bool:
        """Whether it was judged at its last step."""
        ledger = self.folder / LEDGER
        if not ledger.is_file():
            return False
        last = max((entry.step for entry in Ledger.read(ledger).evaluations), default=0)
        return bool(last >= self.config["trainer"]["max_steps"])

    def check(self) -> None:
        """Raise ValueError when its folder holds a run of other settings."""
        path = self.folder / CONFIG
        if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != self.config:
            raise ValueError(
                f"{self.folder} holds a run with other settings than this comparison has: choose another folder with "
                "--out, or delete that one to run it again"
            )

    def train(self, quietly: bool = False, look: "Callback | None" = None) -> None:
        """Train it, from its last checkpoint if there is one; ``look`` comes last among its callbacks."""
        from liveselect.cli.fit import SelectionCLI  # after a worker process has set its threads

        with whole_file(self.folder / CONFIG) as file:
            file.write(yaml.safe_dump(self.config, sort_keys=False).encode("utf-8"))
        last = self.last_checkpoint
        with quiet_logs(*(["liveselect"] if quietly else [])):
            cli = SelectionCLI([f"--config={self.folder / CONFIG}"], run=False)
            cli.trainer.callbacks.extend([] if look is None else [look])  # type: ignore[attr-defined]
            try:
                cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
            except SystemExit as end:  # Lightning raises it after Ctrl-C, once it has cleaned up
                raise KeyboardInterrupt from end


@dataclass(frozen=True)
class Comparison:
    """Methods, tasks and seeds, each with each.

    Attributes:
        folder: of the runs and the results.
        configs: files of ``liveselect fit`` that describe model, trainer and data of all runs.
        methods: ways to select.
        tasks: pools and references; by default those of the files.
        seeds: of weights and selection; those of one number make a pair.
        steps: training steps, by default those of the files; rounds, probes and intervals shrink alike.
        mixture_sample: candidates held out of each pool, the same for all methods.
    """

    folder: Path
    configs: Sequence[Path]
    methods: Sequence[Method]
    tasks: Sequence[Task] = (Task(),)
    seeds: Sequence[int] = (0,)
    steps: int | None = None
    mixture_sample: int = MIXTURE_SAMPLE

    def __post_init__(self) -> None:
        for what, names in (
            ("methods", [_file_name(each.name) for each in self.methods]),
            ("tasks", [_file_name(each.name) for each in self.tasks]),
            ("seeds", [str(each) for each in self.seeds]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if not names or twice:
                got = f"{', '.join(twice)} twice: give one another name (NAME=...)" if twice else "none"
                raise ValueError(f"expected {what} that differ in their names, got {got}")

    def runs(self) -> list[Planned]:
        """Return all runs, those of the first seed first, so that a comparison that is stopped has seen all methods."""
        return [
            self.planned(task, method, seed) for seed in self.seeds for task in self.tasks for method in self.methods
        ]

    def planned(self, task: Task, method: Method, seed: int) -> Planned:
        """Return one run with all of its settings."""
        folder = self.folder / "runs" / _file_name(task.name) / f"{_file_name(method.name)}-{seed}"
        config: Settings = {}
        for path in self.configs:
            _put_on_top(config, _read(path))
        for name, value in task.data.items():
            data = config["data"]["init_args"]
            if isinstance(data.get(name), dict) and isinstance(value, str):  # another source, read in the same way
                data[name]["source"] = value
            else:
                data[name] = deepcopy(value)
        _choose(config, method)
        if self.steps is not None:
            shorten(config, self.steps)
        trainer, select = config["trainer"], config["select"]["init_args"]
        interval = trainer.get("val_check_interval", 1.0)
        if method.steps != 1.0:
            trainer["max_steps"] = round(method.steps * trainer["max_steps"])
        if isinstance(interval, int):  # the end is where runs are judged
            trainer["max_steps"] = interval * -(-trainer["max_steps"] // interval)
        config["seed_everything"] = select["seed"] = seed
        select |= {"dirpath": str(folder / "selection"), "mixture_sample": self.mixture_sample}
        if "seed" in config["model"].get("init_args", {}):
            config["model"]["init_args"]["seed"] = seed
        trainer |= {"default_root_dir": str(folder), "callbacks": self._callbacks(trainer, task, folder)}
        trainer.setdefault("logger", False)
        return Planned(task.name, method.name, seed, folder, config)

    def _callbacks(self, trainer: Settings, task: Task, folder: Path) -> list[object]:
        """Return the callbacks of the files, with checkpoints of this run and its judges."""
        given = [each for each in trainer.get("callbacks") or [] if "ModelCheckpoint" not in str(each)]
        keep = {"dirpath": str(folder / "checkpoints"), "save_last": True, "save_on_train_epoch_end": False}
        return [
            *given,
            {"class_path": "liveselect.cli.judges.Judges", "init_args": {"elsewhere": task.elsewhere}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep},
        ]

    @property
    def baseline(self) -> str:
        """The method that the others are compared with: the first one that draws at random, or else the first."""
        return next((each.name for each in self.methods if each.preset == "random"), self.methods[0].name)

    def train(self, processes: int = 1, quietly: bool = True, look: "Callback | None" = None) -> dict[str, str]:
        """Train what is not finished; return why runs have failed.

        ``look`` is a callback that sees all runs, where they are trained in this process.

        Raises:
            ValueError: the folder holds runs of other settings.
        """
        runs = self.runs()
        for run in runs:
            run.check()
        left = [run for run in runs if not run.finished]
        if len(left) < len(runs):
            say(f"{len(runs) - len(left)} of {len(runs)} runs are finished already")
        return _in_this_process(left, quietly, look) if processes == 1 else _in_processes(left, processes)


def load_comparison(path: Path) -> dict[str, Any]:
    """Return the arguments of a :class:`Comparison` that a YAML file names: configs, methods, tasks, seeds, steps.

    Paths in ``configs`` are relative to the file, or names of files of ``liveselect.configs``.

    Raises:
        ValueError: it has other keys.
    """
    found = _read(path)
    known = {"configs", "methods", "tasks", "seeds", "steps", "mixture_sample"}
    if unknown := set(found) - known:
        raise ValueError(f"expected the keys {', '.join(sorted(known))} in {path}, got {sorted(unknown)}")
    given: Settings = {key: found[key] for key in ("seeds", "steps", "mixture_sample") if key in found}
    given["configs"] = [path.parent / name if (path.parent / name).exists() else name for name in found["configs"]]
    given["methods"] = [Method.from_yaml(name, value) for name, value in found.get("methods", {}).items()]
    tasks = {name: dict(value) for name, value in found.get("tasks", {}).items()}
    if tasks:
        given["tasks"] = [Task(name, value, value.pop("elsewhere", None)) for name, value in tasks.items()]
    return given


def config_path(name: str | Path) -> Path:
    """Return the path of a configuration file: one that exists, or one of the package."""
    packaged = Path(str(resources.files("liveselect.configs").joinpath(Path(name).name)))
    if Path(name).exists() or not packaged.is_file():
        return Path(name)
    return packaged


def shorten(config: Settings, steps: int) -> None:
    """Set the training steps, and shrink rounds, probes and intervals alike."""
    trainer, model = config["trainer"], config["model"].get("init_args", {})
    share = steps / trainer["max_steps"]
    trainer["max_steps"] = steps
    for settings, names in (
        (trainer, ("val_check_interval",)),
        (model, ("warmup_steps", "decay_steps")),
        (config["select"]["init_args"], ("every_n_steps",)),
    ):
        for name in names:
            if isinstance(settings.get(name), int) and settings[name]:
                settings[name] = max(1, round(share * settings[name]))
    select = config["select"]
    if isinstance(select["init_args"].get("probes"), int) and not select["class_path"].endswith("Quad"):
        select["init_args"]["probes"] = max(16, round(share * select["init_args"]["probes"]))


@contextmanager
def quiet_logs(*others: str) -> Iterator[None]:
    """Silence Lightning's messages about settings that are made on purpose, and lines of other loggers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", *others)]
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


# ---- processes -------------------------------------------------------------------------------------------------


def _in_this_process(runs: Sequence[Planned], quietly: bool, look: "Callback | None") -> dict[str, str]:
    failed = {}
    for number, run in enumerate(runs, 1):
        say(f"[{number}/{len(runs)}] {run}")
        try:
            run.train(quietly, look)
        except Exception as error:
            failed[str(run)] = _say_failure(run, error)
    return failed


def _in_processes(runs: Sequence[Planned], processes: int) -> dict[str, str]:
    """Train several runs at a time, each with its share of the machine's threads: more of them only wait for others."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    failed = {}
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_set_threads, initargs=(threads,))
    try:
        futures = {pool.submit(Planned.train, run, True): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                future.result()
            except Exception as error:
                failed[str(run)] = _say_failure(run, error)
            else:
                say(f"[{number}/{len(runs)}] {run}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


def _set_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _say_failure(run: Planned, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    say(f"{run} has failed, the others go on: {said}")
    return said


# ---- settings --------------------------------------------------------------------------------------------------


def _read(path: Path | str) -> Settings:
    path = config_path(path)
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected sections of settings in {path}, got {type(found).__name__}")
    return found


def _choose(config: Settings, method: Method) -> None:
    """Put a method in place of what the files have under ``select``; rounds and seed stay theirs."""
    if method.preset in PRESETS or Path(method.preset).suffix in (".yaml", ".yml"):
        _put_on_top(config, _read(PRESETS.get(method.preset, method.preset)))
    elif method.preset != CONFIGURED:
        from liveselect import callbacks

        known = [name for name in callbacks.__all__ if isinstance(getattr(callbacks, name), type)]
        if method.preset not in known and "." not in method.preset:
            raise ValueError(
                f"expected a method as {', '.join([*PRESETS, CONFIGURED])}, a preset of liveselect.callbacks, a class "
                f"path or a YAML file, got {method.preset!r}"
            )
        path = method.preset if "." in method.preset else f"liveselect.callbacks.{method.preset}"
        before = _with_class(config.get("select") or {}).get("init_args", {})
        config["select"] = {"class_path": path, "init_args": _shared(before)}
    if not config.get("select"):
        raise ValueError(f"method {method.name!r} is {CONFIGURED!r}, but the files have no section `select`")
    select = config["select"] = _with_class(config["select"])
    arguments = select.setdefault("init_args", {})
    if "selector" in arguments:
        arguments["selector"] = _with_class(arguments["selector"])
    for name, value in method.settings.items():
        *way, last = name.split(".")
        place = arguments
        if "selector" in arguments and not way and name not in OF_EVERY_RUN | {"selector"}:
            way = ["selector", "init_args"]
        for step in way:
            place = place.setdefault(step, {})
        place[last] = deepcopy(value)


def _put_on_top(below: Settings, above: Mapping[str, object]) -> None:
    """Merge settings as ``liveselect fit`` merges files: another class leaves only what all selections have."""
    for name, value in above.items():
        new = deepcopy(value)
        if name in ("select", "model", "data") and new:
            new = _with_class(new)
            old = _with_class(below.get(name) or {})
            if "class_path" in new and new["class_path"] != old.get("class_path", new["class_path"]):
                below[name] = {"init_args": _shared(old.get("init_args", {}))} if name == "select" else {}
            else:
                below[name] = old
        if isinstance(new, dict) and isinstance(below.get(name), dict):
            _put_on_top(below[name], new)
        else:
            below[name] = new


def _with_class(part: object) -> Settings:
    return {"class_path": part} if isinstance(part, str) else dict(part)  # type: ignore[call-overload]


def _shared(arguments: Mapping[str, object]) -> Settings:
    return {name: arguments[name] for name in ("every_n_steps", "seed") if name in arguments}


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_.=" else "-" for letter in name)


def save_results(path: Path, results: object) -> None:
    """Write results as JSON, as a whole."""
    with whole_file(path) as file:
        file.write(json.dumps(results, indent=1, allow_nan=False).encode("utf-8"))
