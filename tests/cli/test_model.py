"""The language model of the configs: its weights, loss and schedule."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from liveselect.cli.model import CausalLM, build_model, warmup_stable_decay

TINY = {
    "model_type": "gpt_neox",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def rows(*lengths: int) -> dict[str, torch.Tensor]:
    """Return a batch whose rows carry loss on their first ``lengths`` tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(50, (len(lengths), 12), generator=generator)
    kept = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    return {"id": torch.arange(len(lengths)), "input_ids": ids, "labels": ids.masked_fill(~kept, -100)}


def trainer(tmp_path, **settings) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **quiet, **settings)


def test_new_weights_depend_on_the_seed_alone_and_leave_the_global_generator_where_it_was():
    first = CausalLM(TINY, seed=3).state_dict()
    torch.rand(7)
    before = torch.get_rng_state()
    second = CausalLM(TINY, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in CausalLM(TINY, seed=4).state_dict().items())


def test_overrides_win_over_the_configuration():
    assert CausalLM(TINY, overrides={"hidden_size": 8}).model.config.hidden_size == 8


def test_saved_weights_come_back_in_float32_and_in_training_mode(tmp_path):
    model = build_model(TINY, {}, pretrained=False, seed=1)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = build_model(str(tmp_path), {}, pretrained=True, seed=9)
    assert again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight.float())
    # the configuration on disk says bfloat16; new weights are float32 all the same
    assert {p.dtype for p in build_model(str(tmp_path), {}, False, seed=9).parameters()} == {torch.float32}


def test_the_training_loss_is_the_one_that_hugging_face_computes():
    module = CausalLM(TINY).eval()
    batch = rows(12, 5, 9)
    reference = AutoModelForCausalLM.from_config(module.model.config)
    reference.load_state_dict(module.model.state_dict())
    expected = reference.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss, tokens = module._loss(batch)
    torch.testing.assert_close(loss, expected)
    assert tokens == 11 + 4 + 8


def test_the_validation_loss_weights_tokens_not_batches(tmp_path):
    module = CausalLM(TINY)
    batches = [rows(12, 12, 12), rows(3)]
    run = trainer(tmp_path)
    run.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    log_likelihood, tokens = 0.0, 0
    for batch in batches:
        logits = module.model(batch["input_ids"]).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        log_likelihood += losses.sum().item()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    assert run.callback_metrics["val_loss"].item() == pytest.approx(log_likelihood / tokens, rel=1e-5)


def test_the_schedule_rises_stays_and_falls():
    shares = [warmup_stable_decay(step, warmup=4, decay=2, total=10) for step in range(10)]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert [warmup_stable_decay(step, 0, 0, 0) for step in range(3)] == [1.0, 1.0, 1.0]


def test_the_optimizer_follows_the_schedule_of_optimizer_steps(tmp_path):
    class Rates(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    module = CausalLM(TINY, lr=0.1, warmup_steps=2, decay_steps=2)
    loader = DataLoader([rows(12)] * 10, batch_size=None)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[rates]).fit(module, loader)
    assert rates.seen == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.05])
    group = module.trainer.optimizers[0].param_groups[0]
    assert len(group["params"]) == len(list(module.parameters()))  # norms and biases decay too


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"hidden_size": 3}}, r"model_type.*got the keys \['hidden_size'\]"),
        ({"config": TINY, "pretrained": True}, "hub name or a folder"),
        ({"config": TINY, "warmup_steps": -1}, "zero or more"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**settings)


def test_a_checkpoint_holds_what_is_needed_to_build_the_module_again(tmp_path):
    module = CausalLM(TINY, lr=0.01, betas=(0.8, 0.9))
    loader = DataLoader([rows(12)], batch_size=None)
    run = pl.Trainer(default_root_dir=tmp_path, max_steps=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert (again.lr, tuple(again.betas)) == (0.01, (0.8, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
