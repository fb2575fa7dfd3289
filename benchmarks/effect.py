"""Does selection pay, and which part of it? Methods at equal total cost on three targets of real text.

The texts are those of any machine with this package: Python files, split into code, docstrings and comments, of the
library and of installed packages, in two halves that share no package. What was tuned was tuned on one half (``--half
tuning``: the standard library, torch, sympy and pandas); what is reported comes from the other. Each half is one pool,
and three targets that are held out of it by file:

``words``   docstrings of one package that is rare in the pool: its words give it away
``far``     prose that is nowhere in the pool: the language reference, or what installed packages say of themselves
``blind``   the pool's own mixture: there is nothing to select

Losses elsewhere are on C++ headers. Everything else is a comparison (``liveselect compare``): runs that are finished
are kept in ``--out``, so a benchmark that was stopped goes on.

    python benchmarks/effect.py --short          # ten minutes on two cores
    python benchmarks/effect.py                  # about an hour
"""

import argparse
import importlib.util
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path

import yaml

from liveselect.cli.compare import run_comparison
from liveselect.cli.compare_runs import Comparison, Method, Task
from liveselect.cli.corpus import KB, language_reference, parts_of, without_copies
from liveselect.datamodules.pools.prepare import prepare

LIBRARY = "library"
HALVES = {
    "tuning": (LIBRARY, "torch", "sympy", "pandas"),
    "reporting": (
        *("transformers", "scipy", "sklearn", "numpy", "networkx", "matplotlib", "lightning", "datasets"),
        *("torchmetrics", "huggingface_hub", "wandb"),
    ),
}
RARE = {"tuning": "sympy", "reporting": "networkx"}
"""The package whose docstrings are the target ``words``."""

KINDS = {"code": 0.5, "docstrings": 0.35, "comments": 0.15}
"""Shares of the pool."""

RARE_SHARE = 0.02
"""Of the pool: docstrings of the rare package."""

HELD_OUT = 192 * KB
"""Characters of a target, half of them for selection and half for the verdict."""

LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "testing", "idle_test", "encodings"}

BLOCK, VOCABULARY, STEPS = 64, 4096, 250
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 50,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "liveselect.cli.model.CausalLM",
        "init_args": {
            "config": {
                "model_type": "gpt_neox",
                "vocab_size": VOCABULARY,
                "hidden_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 384,
                "max_position_embeddings": BLOCK,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "warmup_steps": 25,
            "seed": 0,
        },
    },
    "data": {
        "class_path": "liveselect.datamodules.SelectionDataModule",
        "init_args": {
            "batch_size": 32,
            "pool": "",
            "reference": {"source": "", "max_examples": 512},
            "validation": {"source": "", "max_examples": 128},
            "overlap": "drop",
        },
    },
    "select": {"class_path": "liveselect.callbacks.LiveSelection", "init_args": {"every_n_steps": 50, "seed": 0}},
}


def prior_over_uniform(ratio: float | None, **settings: object) -> dict[str, object]:
    """Return a gate that keeps what is chosen, and nothing that chooses inside it."""
    inside = {"class_path": "liveselect.selectors.UniformSelector"}
    gate = {"selector": inside, "scores": True, "ratio": ratio, "gate": 1.0, **settings}
    return {
        "warmup_rounds": 0,
        "selector": {"class_path": "liveselect.selectors.PriorSelector", "init_args": gate},
    }


RIDGE = {
    "class_path": "liveselect.regressors.HashedRidgeRegressor",
    "init_args": {"targets": "standardized", "forgetting": 0.0, "damping": 1.0},
}
OLD = {
    "estimator": {"class_path": "liveselect.influence.FirstOrderInfluence"},
    "selector": {
        "class_path": "liveselect.selectors.RegressionSelector",
        "init_args": {"regressor": RIDGE, "probes": 48, "ratio": 0.2, "temperature": 0.5},
    },
}
DEFAULT = "default"
ARMS = [
    Method("random", "random"),
    Method("prior 0.05", "prior", {"ratio": 0.05}),
    Method("prior 0.2", "prior", {"ratio": 0.2}),
    Method("prior 0.5", "prior", {"ratio": 0.5}),
    Method("prior", "prior"),
    Method("prior 0.2, a tenth more steps", "prior", {"ratio": 0.2}, steps=1.1),
    Method("random half of the gate", "DataSelection", prior_over_uniform(0.4)),
    Method("old live default", "DataSelection", OLD),
    Method(DEFAULT, "LiveSelection"),
    Method("default with a fixed width", "LiveSelection", {"find_width": False}),
    Method("default with a width of 0.1", "LiveSelection", {"ratio": 0.1}),
    Method("default without live influence", "DataSelection", prior_over_uniform(None, keep_general=0.1, max_uses=4)),
    Method("default without the prior", "LiveSelection", {"prior": None}),
    Method("default without the prior's weight", "LiveSelection", {"prior_weight": 0.0}),
    Method("default without a general share", "LiveSelection", {"keep_general": 0.0}),
    Method("default without token scores", "LiveSelection", {"regressor": {**RIDGE, "init_args": {}}}),
]
SHORT = ("random", "prior", "random half of the gate", DEFAULT)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--half", choices=HALVES, default="reporting", help="of the sources (default: %(default)s)")
    add("--short", action="store_true", help=f"two seeds of {', '.join(SHORT)}, for 150 steps")
    add("--seeds", type=int, nargs="+", metavar="N", help="(default: 0 1 2)")
    add("--steps", type=int, metavar="N", help=f"(default: {STEPS})")
    add("--arms", nargs="+", choices=[each.name for each in ARMS], metavar="ARM", help="(default: all)")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="(default: all)")
    add("--megabytes", type=float, default=16.0, help="size of the pool (default: %(default)s)")
    add("--processes", type=int, default=2, metavar="N", help="runs at a time (default: %(default)s)")
    add("--out", type=Path, default=Path("effect"), metavar="FOLDER", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    arms = options.arms or (SHORT if options.short else [each.name for each in ARMS])
    texts = options.out / f"texts-{options.half}"
    if not (texts / "done").exists():
        make_texts(options.half, int(options.megabytes * 1024 * KB), texts)
    config = options.out / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    comparison = Comparison(
        options.out / options.half,
        [config],
        [each for each in ARMS if each.name in arms],
        [task(name, texts) for name in options.targets],
        options.seeds or ([0, 1] if options.short else [0, 1, 2]),
        options.steps or (150 if options.short else None),
    )
    return run_comparison(comparison, options.processes)


# ---- texts -----------------------------------------------------------------------------------------------------

TARGETS = ("words", "far", "blind")


def task(name: str, texts: Path) -> Task:
    """Return a target: its held-out texts beside the pool of its half."""
    data = {"pool": str(texts / "pool")}
    data |= {part: str(texts / f"{name}-{part}.jsonl") for part in ("reference", "validation")}
    return Task(name, data, str(texts / "elsewhere.jsonl"))


def make_texts(half: str, size: int, folder: Path) -> None:
    """Write the held-out texts of every target, and prepare the pool without them."""
    seen: set[str] = set()
    room = min(HELD_OUT, size // 8)
    far = first(without_copies(far_texts(half), seen), room)
    rare = RARE[half]
    words: list[str] = []
    kept_in: dict[int, list[tuple[str, str]]] = {}  # source and text of each file
    left = {kind: share * size for kind, share in KINDS.items()}
    rare_left, words_room = RARE_SHARE * size, room
    for number, (package, path) in enumerate(files_of(HALVES[half])):
        for kind, text in parts_of(path).items():
            if kind not in left or left[kind] <= 0:
                continue
            is_rare = (package, kind) == (rare, "docstrings")
            if is_rare and words_room <= 0 and rare_left <= 0:
                continue
            for kept in without_copies([text], seen):
                if is_rare and words_room > 0:
                    words.append(kept)
                    words_room -= len(kept)
                else:
                    kept_in.setdefault(number, []).append((f"{package}-{kind}", kept))
                    left[kind] -= len(kept)
                    rare_left -= len(kept) if is_rare else 0
        if max(left.values()) <= 0:
            break
    # whole files, drawn from all of the pool: its own mixture
    drawn = (
        text for number in random.Random(0).sample(sorted(kept_in), len(kept_in)) for _, text in kept_in.pop(number)
    )
    blind = first(drawn, room)
    pool: dict[str, list[str]] = {}
    for source, text in (each for texts in kept_in.values() for each in texts):
        pool.setdefault(source, []).append(text)
    for name, texts in {"words": words, "far": far, "blind": blind}.items():
        write(folder / f"{name}-reference.jsonl", texts[::2])
        write(folder / f"{name}-validation.jsonl", texts[1::2])
    write(folder / "elsewhere.jsonl", first(headers(), room // 2))
    for source, texts in pool.items():
        write(folder / f"{source}.jsonl", texts)
    prepare(
        [f"{source}={folder / source}.jsonl" for source in sorted(pool)],
        folder / "pool",
        tokenizer=f"bpe:{VOCABULARY}",
        block_size=BLOCK,
        workers=1,
        overwrite=True,
    )
    (folder / "done").write_text("")


def files_of(packages: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield Python files of the packages in turn, each with the name of its package; the order is always the same."""
    found = []
    for package in packages:
        folder = folder_of(package)
        inside = folder.parent if package != LIBRARY else folder
        paths = [path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(inside).parts[:-1])]
        found.append([(package, path) for path in random.Random(0).sample(sorted(paths), len(paths))])
    for turn in zip_longest(*found):
        yield from (each for each in turn if each is not None)


def folder_of(package: str) -> Path:
    """Return where a package is installed, without importing it."""
    if package == LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"expected the package {package}, which liveselect needs, to be installed")
    return Path(spec.submodule_search_locations[0])


def far_texts(half: str) -> list[str]:
    """Return prose that is not in the pool."""
    if half == "tuning":
        return language_reference()
    about = {found.name: found.metadata.get_payload() for found in distributions()}
    texts = [text for _, text in sorted(about.items()) if isinstance(text, str) and len(text) > 2 * KB]
    return [text[: 12 * KB] for text in random.Random(0).sample(texts, len(texts))]  # no package fills the target


def headers() -> Iterator[str]:
    """Yield C++ headers."""
    paths = sorted((folder_of("torch") / "include" / "ATen").rglob("*.h"))
    for path in random.Random(0).sample(paths, len(paths)):
        yield path.read_text(encoding="utf-8", errors="replace")[: 4 * KB]


def first(texts: Iterable[str], size: int) -> list[str]:
    """Return the first texts, until they have so many characters."""
    kept: list[str] = []
    for text in texts:
        if sum(map(len, kept)) >= size:
            break
        kept.append(text)
    return kept


def write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
