"""One small run with everything that a resume must restore, and a way to kill it.

Dropout, warm AdamW moments, a learning-rate schedule, accumulation over three batches, bf16-mixed, clipping, an epoch
that ends between two rounds, validation, and a selection that depends on the live weights; for Quad, on what its last
rounds and its training steps told of the arms, and for PDS on the round.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from cases import VOCABULARY, Bigrams, tiny_neox
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import Tensor

from liveselect.callbacks import PDS, DataSelection, Quad
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import NO_IDS, Batch, InfluenceEstimator, LiveModel, Round
from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector

TOKENS = 12
STEPS, ROUND, ACCUMULATE, BATCH = 14, 4, 3, 2
SIMPLE = {
    "accumulate_grad_batches": 1,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "limit_val_batches": 0,
}
POOL = 60  # 30 batches, 10 optimizer steps: the epoch ends inside the third round


class SmallLM(pl.LightningModule):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.model = tiny_neox(max_position_embeddings=TOKENS, hidden_dropout=dropout, attention_dropout=dropout)

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        self.log("val_loss", loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BigramLM(SmallLM):
    """Quick to train: the next token depends on the last one only."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Bigrams()

    def training_step(self, batch, batch_index):
        return causal_lm_loss(self.model, batch).mean()


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)} for _ in range(count)]


def weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in module.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ProbingUniform(UniformSelector):
    """Measures some candidates and then ignores what it learned."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self.influence: list[Tensor] = []

    def propose(self, round: Round) -> Tensor:
        self.asked = not self.asked
        return round.candidates[:6] if self.asked else NO_IDS

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        self.influence.append(influence)


class Trace(Callback):
    """Appends what every batch trained on, and the weights after it, to a file that survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        place = trainer.callbacks[0].trace_key if hasattr(trainer.callbacks[0], "trace_key") else None
        line = json.dumps([place, trainer.global_step, batch["id"].tolist(), weights_hash(pl_module)])
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (line + "\n").encode())
        os.close(descriptor)


def trace_of(folder: Path) -> list:
    """Return the lines of the trace of a run."""
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


class Place(Callback):
    """Notes the batch's place in the plan before the selection callback moves on. Must be the first callback."""

    trace_key = None

    def __init__(self, selection: DataSelection) -> None:
        self.selection = selection

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trace_key = [self.selection.plan.round, self.selection.plan.cursor]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    """Kills the process at a named hook once the optimizer has done ``step`` steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer, *arguments, **keywords):
        if trainer.global_step == self.step:
            die()


def dying(estimator: InfluenceEstimator, round_index: int) -> InfluenceEstimator:
    """Let it die while it measures the second batch of a round, with a foreign model in place of the live one."""

    class Dying(type(estimator)):
        batches = round = 0

        def fit(self, model: LiveModel, round: Round):
            self.round = round.index
            return super().fit(model, round)

        def score(self, model: LiveModel, batch: Batch) -> Tensor:
            self.batches += self.round == round_index
            if self.batches == 2:
                with torch.no_grad():
                    for parameter in model.module.parameters():
                        parameter.zero_()
                die()
            return super().score(model, batch)

    Dying.__name__ = type(estimator).__name__  # checkpoints name the class
    estimator.__class__ = Dying
    return estimator


# name -> (hook, global step at which it strikes); the step-8 checkpoint is the border of a round, step 10 of an epoch;
# Quad listens to the step after step 8, and the step-10 checkpoint holds what it heard
HOOKS = {
    "inside an accumulation window in mid-round": ("on_train_batch_start", 7),
    "last batch of a round, before the round": ("before_selection", 8),
    "first batch of a new round": ("on_train_batch_start", 8),
    "first batch of a new epoch": ("on_train_batch_start", 10),
    "during validation": ("on_validation_batch_start", 6),
    "before the first checkpoint": ("on_train_batch_start", 1),
}
LISTENING = {"inside the step that is listened to": ("on_after_backward", 8)}
KILLS = [*HOOKS, "during a measurement", "during a checkpoint"]

# method, loader workers, and where its runs are killed
CASES = [("regression", 2 * (index % 2), kill) for index, kill in enumerate(KILLS)]
CASES += [("regression", 2, KILLS[0]), ("regression", 0, "during a checkpoint")]
CASES += [("quad", 0, kill) for kill in (*LISTENING, "first batch of a new epoch", "during a measurement")]
CASES += [("quad", 2, "last batch of a round, before the round")]
CASES += [("pds", 2, kill) for kill in ("inside an accumulation window in mid-round", "first batch of a new round")]
CASES += [("pds", 0, kill) for kill in ("during a checkpoint", "before the first checkpoint")]


def small_data(workers: int = 0, clusters: int = 0) -> SelectionDataModule:
    pool = rows(POOL, seed=1)
    if clusters:
        pool = [{**row, "cluster": f"cluster {index % clusters}"} for index, row in enumerate(pool)]
    return SelectionDataModule(
        pool=pool,
        reference=rows(6, seed=2),
        batch_size=BATCH,
        num_workers=workers,
        probe_batch_size=4,
        groups="cluster" if clusters else None,
    )


def small_trainer(folder: Path, callbacks: list[Callback], **settings) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "max_epochs": -1,
        "accumulate_grad_batches": ACCUMULATE,
        "gradient_clip_val": 1.0,
        "precision": "bf16-mixed",
        "val_check_interval": 9,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }
    return pl.Trainer(callbacks=callbacks, default_root_dir=folder, **{**defaults, **settings})


def regression(folder: Path, **settings) -> DataSelection:
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    return DataSelection(selector, **settings)


def quad(folder: Path, **settings) -> Quad:
    sizes = {"pulls": 2, "at_once": 1, "probes": 4, "controls": 4, "arms": 2, "discount": 0.9}
    return Quad(**sizes, **settings)


def pds(folder: Path, **settings) -> PDS:
    """Draw from a file, with noise that changes from round to round."""
    if not (folder / "scores.npy").exists():
        np.save(folder / "scores.npy", np.sin(np.arange(POOL, dtype=np.float32)))
    noise = {"temperature": 1.0, "final_temperature": 0.1, "anneal_rounds": 3, "random_share": 0.25}
    return PDS(folder / "scores.npy", ratio=0.9, **noise, **settings)


METHODS = {"regression": regression, "quad": quad, "pds": pds}
MEASURING = {
    "regression": lambda: OneStepInfluence(step="in_batch"),
    "quad": lambda: KFACInfluence(factor_examples=8, factors_every=2),
}


def run(folder: Path, method: str, workers: int, kill: str | None = None) -> None:
    """Train to the end, from the last checkpoint if there is one, or until killed."""
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    settings = {"every_n_steps": ROUND, "warmup_rounds": 1, "dirpath": folder / "selection"}
    if method in MEASURING:
        estimator = MEASURING[method]()
        settings["estimator"] = dying(estimator, 2) if kill == "during a measurement" else estimator
    selection = METHODS[method](folder, **settings)
    callbacks = [Place(selection), selection, Trace(folder / "trace")]
    if kill in {**HOOKS, **LISTENING}:
        hook, step = {**HOOKS, **LISTENING}[kill]
        if hook == "before_selection":
            callbacks.insert(1, Killer("on_train_batch_end", step))
        else:
            callbacks.append(Killer(hook, step))
    if kill == "during a checkpoint":
        die_inside_the_checkpoint_of_step_8()
    callbacks.append(ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True))
    trainer = small_trainer(folder, callbacks)
    trainer.fit(SmallLM(), datamodule=small_data(workers, clusters=4), ckpt_path="last")
    torch.save(trainer.optimizers[0].state_dict(), folder / "optimizer.pt")


def die_inside_the_checkpoint_of_step_8() -> None:
    save = torch.save

    def half_a_save(state, file, *arguments, **keywords):
        if isinstance(state, dict) and state.get("global_step") == 8:
            save({"half": torch.zeros(1000)}, file)
            die()
        return save(state, file, *arguments, **keywords)

    torch.save = half_a_save


def share_of_cases(rank: int, ranks: int, _, folder: Path, cases: list[tuple]) -> dict[str, list[int]]:
    """Run a share of the cases, each run in a forked child; returns the exit codes of each by its folder."""
    codes = {}
    whole = dict.fromkeys((method, workers, None) for method, workers, _ in CASES)
    for method, workers, kill in [*whole, *cases][rank::ranks]:
        place = case(folder, method, workers, kill)
        place.mkdir(parents=True)
        codes[str(place.relative_to(folder))] = [forked(run, place, method, workers, kill)]
        if kill is not None:
            codes[str(place.relative_to(folder))].append(forked(run, place, method, workers))
    return codes


def case(folder: Path, method: str, workers: int, kill: str | None) -> Path:
    """Return the folder of one run; without a kill it is the run that was left alone."""
    return folder / method / f"{workers}" / str(kill).replace(" ", "_").replace(",", "")


def forked(function, *arguments) -> int:
    """Return the exit status of ``function`` in a child: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
