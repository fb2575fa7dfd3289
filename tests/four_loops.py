"""One small training of the same tiny model in four loops: a Trainer, a plain loop, Fabric, and Hugging Face's."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from cases import VOCABULARY
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_run import TOKENS, small_data, small_trainer, weights_hash
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from liveselect.callbacks import DataSelection
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.loops import Driver
from liveselect.loops.hugging_face import HuggingFaceSelection
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

STEPS, ROUND, ACCUMULATE, CUT = 8, 3, 2, 4  # the checkpoint lies inside of the second round, which measures


def seed() -> None:
    """Let dropout draw the same in every loop; what was drawn before training begins is a loop's own."""
    torch.random.default_generator.manual_seed(3)


def model() -> nn.Module:
    """Return the model; no GPT-NeoX, whose head the Trainer of transformers 5 saves by a name that it does not load."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        attention_dropout=0.1,
    )
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return LlamaForCausalLM(config)


def optimizer_of(module: nn.Module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))


def selection(folder: Path, **settings) -> DataSelection:
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    estimator = OneStepInfluence(step="in_batch")
    return DataSelection(selector, estimator, every_n_steps=ROUND, dirpath=folder / "selection", **settings)


def loss_of(module: nn.Module, batch) -> torch.Tensor:
    return module(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss


def clip(parameters) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def found(folder: Path, module: nn.Module, ids: list) -> dict:
    """Return what a run did: its ids, what it measured, and the weights that it ended with."""
    rounds = Ledger.read(folder / "selection" / "ledger.jsonl").rounds
    return {
        "ids": ids,
        "plans": [record.plan for record in rounds],
        "measured": [record.measured for record in rounds],
        "influence": [record.influence for record in rounds],
        "weights": weights_hash(module),
    }


class InLightning(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = model()
        self.ids = []

    def on_train_start(self) -> None:
        if not self.trainer.global_step:
            seed()

    def training_step(self, batch, batch_index):
        self.ids.append(batch["id"].tolist())
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        optimizer, schedule = optimizer_of(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def with_lightning(folder: Path, cut: bool) -> dict:
    plain = {"accumulate_grad_batches": ACCUMULATE, "precision": "32-true", "limit_val_batches": 0}

    def fit(until: int, checkpoint: Path | None = None, *callbacks: Callback) -> InLightning:
        module = InLightning()
        chosen = selection(folder)
        trainer = small_trainer(folder, [chosen, *callbacks], max_steps=until, val_check_interval=6, **plain)
        trainer.fit(module, datamodule=small_data(), ckpt_path=checkpoint)
        return module

    if not cut:
        module = fit(STEPS)
        return found(folder, module.model, module.ids)
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=CUT, save_top_k=-1, filename="{step}")
    first = fit(STEPS, None, saving)
    second = fit(STEPS, folder / f"step={CUT}.ckpt")
    return found(folder, second.model, first.ids[: CUT * ACCUMULATE] + second.ids)


def with_a_plain_loop(folder: Path, cut: bool, fabric: Fabric | None = None) -> dict:
    ids = []

    def train(until: int, saved: Path | None) -> nn.Module:
        module = model()
        optimizer, schedule = optimizer_of(module)
        if fabric is not None:
            module, optimizer = fabric.setup(module, optimizer)
        settings = {} if fabric is None else {"autocast": fabric.autocast, "log": fabric.log_dict}
        driver = Driver(
            selection(folder),
            small_data(),
            module,
            optimizer,
            max_steps=STEPS,
            accumulate=ACCUMULATE,
            clip_gradients=clip,
            **settings,
        )
        state = {"model": module, "optimizer": optimizer, "schedule": schedule, "selection": driver}
        if saved is not None:
            held = torch.load(saved, weights_only=True) if fabric is None else fabric.load(saved, state)
            for name in state if fabric is None else ():
                state[name].load_state_dict(held[name])
        module.train()
        driver.begin()
        if saved is None:
            seed()
        for _ in range(driver.global_step, until):
            for batch in driver.before_step():
                ids.append(batch["id"].tolist())
                loss = loss_of(module, batch) / ACCUMULATE
                loss.backward() if fabric is None else fabric.backward(loss)
            clip(module.parameters())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            driver.after_step()
        if until < STEPS:
            if fabric is None:
                torch.save({name: part.state_dict() for name, part in state.items()}, folder / "saved.pt")
            else:
                fabric.save(folder / "saved.pt", state)
            driver.session.release()
        return getattr(module, "module", module)

    if cut:
        train(CUT, None)
    return found(folder, train(STEPS, folder / "saved.pt" if cut else None), ids)


def with_fabric(folder: Path, cut: bool) -> dict:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return with_a_plain_loop(folder, cut, fabric)


class Seeded(TrainerCallback):
    def on_train_begin(self, args, state, control, **others) -> None:
        if not state.global_step:
            seed()


def mean_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1]) / ACCUMULATE


def with_hugging_face(folder: Path, cut: bool) -> dict:
    ids = []

    class Noting(Trainer):
        def training_step(self, module, inputs, *others):
            ids.append(inputs["input_ids"].tolist())
            return super().training_step(module, inputs, *others)

    def train(until: int, resumes: bool) -> nn.Module:
        module = model()
        args = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ACCUMULATE,
            max_grad_norm=1.0,
            save_strategy="steps",
            save_steps=CUT,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Noting(module, args, optimizers=optimizer_of(module), compute_loss_func=mean_loss)
        HuggingFaceSelection(selection(folder), small_data()).attach(trainer)
        trainer.add_callback(Seeded())
        if until < STEPS:
            trainer.add_callback(Stops(until))
        trainer.train(resume_from_checkpoint=resumes)
        return module

    if cut:
        train(CUT, resumes=False)
    return found(folder, train(STEPS, resumes=cut), ids)


class Stops(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **others) -> None:
        control.should_training_stop = state.global_step == self.at


LOOPS: dict[str, Callable[[Path, bool], dict]] = {
    "Lightning": with_lightning,
    "plain": with_a_plain_loop,
    "Fabric": with_fabric,
    "Hugging Face": with_hugging_face,
}
