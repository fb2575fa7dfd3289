"""The demo's model and configs on several ranks: whether all of them decide alike.

Random data, MATES, Quad, PDS with ready scores and PDS on the live model are trained on four processes over gloo, each
with the settings of ``configs/demo*.yaml`` for fewer steps. After every optimizer step each rank notes what it trained
on and the bits of its weights; at the end, its rounds. All ranks must have decided alike, hold the same weights, and
have trained together on exactly the plans.

    python tests/demo_ranks.py --ranks 4 --steps 60

Prints a line for each method; exits with 1 when ranks differ.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import yaml
from lightning.pytorch.callbacks import Callback
from ranks import free_port
from small_run import weights_hash

from liveselect.callbacks import DataSelection
from liveselect.cli.demo import METHODS
from liveselect.cli.demo_runs import Demo
from liveselect.cli.fit import SelectionCLI

LIVE_PDS = {
    "select": {
        "class_path": "liveselect.callbacks.LivePDS",
        "init_args": {
            "every_n_steps": 80,
            "warmup_rounds": 1,
            "probes": 64,
            "ratio": 0.4,
            "temperature": 0.5,
            "regressor": "liveselect.regressors.HashedRidgeRegressor",
            "estimator": {
                "class_path": "liveselect.influence.PMPInfluence",
                "init_args": {"steps": 4, "score_every": 2},
            },
            "seed": 0,
        },
    }
}
RUNS = ["random", "mates", "quad", "pds", "live pds"]


class Witness(Callback):
    """Notes what this rank trains on, its weights, and the plan of every round."""

    def __init__(self, selection: DataSelection) -> None:
        self.selection = selection
        self.batches: list[list[int]] = []
        self.weights: list[str] = []
        self.plans: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        plan = self.selection.plan
        self.plans[plan.round] = plan.ids.tolist()
        self.batches.append(batch["id"].tolist())

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights.append(weights_hash(pl_module))


def arguments(folder: Path, run: str, steps: int) -> list[str]:
    """Return the arguments of ``liveselect fit`` for a run of the demo that lies in ``folder``."""
    method = {"random": "mates", "live pds": "mates"}.get(run, run)
    runs = {each.method: each for each in Demo(folder, METHODS[method], method, steps).comparison().runs()}
    config = runs["random" if run == "random" else method].config
    config["trainer"]["callbacks"] = []  # a comparison is judged on one device
    for name in ("dirpath", "mixture_sample"):
        del config["select"]["init_args"][name]
    path = folder / f"{run.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    found = [f"--config={path}"]
    if run == "live pds":
        on_top = folder / "live_pds.yaml"
        part = {"every_n_steps": max(1, round(80 * steps / 400)), "probes": 16}
        settings = {**LIVE_PDS["select"], "init_args": {**LIVE_PDS["select"]["init_args"], **part}}
        on_top.write_text(yaml.safe_dump({"select": settings}), encoding="utf-8")
        found.append(f"--config={on_top}")
    return [*found, f"--trainer.default_root_dir={folder / run}", "--trainer.enable_progress_bar=false"]


def train(folder: Path, run: str, ranks: int, steps: int) -> dict[str, Any]:
    """Train on this rank and return what it saw."""
    shared = ["--data.init_args.batch_size", str(16 // ranks)]
    shared += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto"]
    cli = SelectionCLI([*arguments(folder, run, steps), *shared], run=False)
    selection = next(each for each in cli.trainer.callbacks if isinstance(each, DataSelection))
    witness = Witness(selection)
    cli.trainer.callbacks.insert(0, witness)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    rounds = [[r.plan, r.measured, r.influence, r.notes] for r in selection.run.ledger.rounds]
    selector = selection.run.state_dict()["selector"]
    return {
        "rounds": rounds,
        "plans": list(witness.plans.values()),
        "selector": hashlib.sha256(repr(_listed(selector)).encode()).hexdigest(),
        "batches": witness.batches,
        "weights": witness.weights,
    }


def _listed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in sorted(value.items(), key=str)}
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value


def quiet() -> None:
    import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "liveselect"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _rank(rank: int, folder: Path, run: str, ranks: int, steps: int, port: int) -> None:
    quiet()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    found = train(folder, run, ranks, steps)
    (folder / f"{run}-{rank}.json").write_text(json.dumps(found))


def prepare(folder: Path, steps: int, runs: list[str]) -> None:
    """Make the pool, its clusters and its scores, by the demo itself."""
    demo = Demo(folder, METHODS["pds"], "pds", steps)
    folder.mkdir(parents=True, exist_ok=True)
    demo.make_pool()
    if "quad" in runs:
        demo.make_clusters()
    if "pds" in runs:
        demo.make_scores()


def differences(seen: list[dict[str, Any]], global_batch: int = 16) -> list[str]:
    """Return in what the ranks differ from the first, and from their plans."""
    found = [
        f"rank {rank} has other {what}"
        for rank, each in enumerate(seen)
        for what in ("rounds", "plans", "selector", "weights")
        if each[what] != seen[0][what]
    ]
    together = [i for parts in zip(*(each["batches"] for each in seen), strict=True) for part in parts for i in part]
    planned = [i for plan in seen[0]["plans"] for i in plan]
    if together != planned:
        found.append(f"{len(together)} candidates were trained on, which are not the {len(planned)} of the plans")
    if len(together) % global_batch:
        found.append(f"{len(together)} candidates are no whole steps")
    return found


def compare(folder: Path, run: str, ranks: int, steps: int) -> list[str]:
    """Train one run on so many ranks, print what was seen, and return what differs."""
    mp.start_processes(_rank, (folder, run, ranks, steps, free_port()), nprocs=ranks, start_method="fork")
    seen = [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(ranks)]
    found = differences(seen)
    measured = sum(len(ids) for _, ids, *_ in seen[0]["rounds"])
    trained = sum(map(len, seen[0]["plans"]))
    verdict = "; ".join(found) or "equal"
    print(f"{run}: {len(seen[0]['rounds'])} rounds, {measured} measured, {trained} trained on: {verdict}", flush=True)  # noqa: T201
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS)
    parser.add_argument("--folder", type=Path, help="of an earlier call, whose pool and scores are used again")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "pool").exists():
            prepare(folder, options.steps, options.runs)
        failed = [run for run in options.runs if compare(folder, run, options.ranks, options.steps)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
