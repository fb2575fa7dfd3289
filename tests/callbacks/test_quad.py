"""Quad inside Trainer.fit: it finds the arms of the reference set, survives a kill, and follows what changes."""

import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from fakes import fake_context, play
from lightning.pytorch.callbacks import Callback
from planted_clusters import planted_clusters, small_lm, train, walk
from small_run import SIMPLE, Place, SmallLM, Trace, small_trainer

from liveselect.callbacks import Quad
from liveselect.datamodules import SelectionDataModule
from liveselect.datamodules.clusters.cluster import Clustering, cluster_pool
from liveselect.datamodules.pools.tokens import write_store
from liveselect.functional.gradients import example_dot
from liveselect.grammar import SelectionWarning
from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.preserve import measuring
from liveselect.rounds import SelectionRun
from liveselect.selectors import UCBSelector, UniformSelector

torch.set_num_threads(1)
CLUSTERS, LIKE_REFERENCE, TOKENS = 5, 3, 12
STEPS = 16


def texts(cluster: int, count: int, draws: torch.Generator) -> list[torch.Tensor]:
    """Sequences that use ten tokens of their own."""
    return [10 * cluster + torch.randint(0, 10, (TOKENS,), generator=draws) for _ in range(count)]


def clustered_data(**settings) -> SelectionDataModule:
    draws = torch.Generator().manual_seed(0)
    pool = [{"input_ids": tokens, "cluster": f"cluster {c}"} for c in range(CLUSTERS) for tokens in texts(c, 80, draws)]
    reference = [{"input_ids": tokens} for tokens in texts(LIKE_REFERENCE, 6, draws)]
    return SelectionDataModule(pool=pool, reference=reference, batch_size=4, groups="cluster", **settings)


def quad(folder, **settings) -> Quad:
    defaults = {"every_n_steps": 2, "pulls": 3, "at_once": 2, "probes": 3, "controls": 6, "arms": 1, "warmup_rounds": 1}
    return Quad(**{**defaults, **settings}, dirpath=folder / "selection")


def fit(folder, selection, *callbacks, **settings) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    simple = {**SIMPLE, "precision": "32-true", "max_steps": STEPS, **settings}
    trainer = small_trainer(folder, [Place(selection), selection, *callbacks], **simple)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(SmallLM(), datamodule=clustered_data(), ckpt_path=settings.pop("ckpt_path", None) or "last")
    return trainer


def test_the_mixture_turns_to_the_cluster_of_the_reference_set(tmp_path):
    selection = quad(tmp_path, estimator=OneStepInfluence(step="in_batch"))
    fit(tmp_path, selection)
    ledger = Ledger.read(tmp_path / "selection" / "ledger.jsonl")
    assert ledger.about["preset"] == "Quad"
    wanted = f"cluster {LIKE_REFERENCE}"
    last = ledger.rounds[-1]
    assert last.groups[wanted]["chosen"] == last.chosen
    assert max(last.groups, key=lambda name: last.groups[name].get("reward", -9.0)) == wanted
    assert sum(row.get("pulls", 0.0) for row in last.groups.values()) == 3.0 * (STEPS // 2 - 1)
    assert {"arms/known", "influence/level"} <= set(last.metrics)


@pytest.mark.parametrize(
    ("groups", "changed", "message"),
    [
        ("three", {}, "checkpoint was made with the clusters .* this run has"),
        ("four", {"probes": 5}, "in standard errors of 3 probes, this run counts them in standard errors of 5"),
        (None, {}, "checkpoint was made with the clusters .* this run has None"),
        ("four", {"cutoff": 0.5}, r"list them only up to 0\.2: lower the cutoff"),
    ],
)
def test_a_resumed_run_that_cannot_go_on_is_told_so_before_it_trains(tmp_path, groups, changed, message):
    draws = torch.Generator().manual_seed(0)
    blocks = torch.stack([tokens for c in range(4) for tokens in texts(c, 30, draws)])
    store = write_store(tmp_path / "pool", blocks.numpy(), block_size=TOKENS, vocab_size=10 * CLUSTERS)
    for name, clusters in {"three": 3, "four": 4}.items():
        cluster_pool(store, Clustering(clusters, dimensions=8), name=name, quiet=True)
    reference = [{"input_ids": tokens} for tokens in texts(LIKE_REFERENCE, 6, draws)]

    def begin(groups, steps, **settings):
        simple = {**SIMPLE, "precision": "32-true", "max_steps": steps}
        data = SelectionDataModule(pool=store, reference=reference, batch_size=4, groups=groups)
        return small_trainer(tmp_path, [quad(tmp_path, **settings)], **simple), data

    first, data = begin("four", 6)
    first.fit(SmallLM(), datamodule=data)
    first.save_checkpoint(tmp_path / "six.ckpt")
    second, data = begin(groups, 12, **changed)
    with pytest.raises(ValueError, match=message):
        second.fit(SmallLM(), datamodule=data, ckpt_path=tmp_path / "six.ckpt")


def lines(folder):
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


class Noted(Callback):
    """Notes the influence of every batch with the live model and the direction of the round."""

    def __init__(self, selection: Quad) -> None:
        self.selection, self.influence = selection, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        examples = self.selection.session.global_batch(trainer)
        direction = self.selection.overhearing.direction(self.selection.run, examples)
        if direction is not None:
            with measuring(pl_module, trainer.optimizers[0]):
                found = example_dot(pl_module, self.selection.loss_fn, batch, direction)
            self.influence |= dict(zip(batch["id"].tolist(), found.tolist(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_step_of_a_round_tells_the_influence_of_what_it_trains_on(tmp_path, accumulate):
    selection = quad(tmp_path, arms=3, probes=4)
    heard = []
    selection.selector.observe_step = lambda ids, influence: heard.append((ids, influence))
    noted = Noted(selection)
    pl.seed_everything(1, verbose=False)
    trainer = small_trainer(
        tmp_path,
        [selection, noted],
        **{**SIMPLE, "precision": "32-true", "max_steps": 9, "accumulate_grad_batches": accumulate},
    )
    trainer.fit(SmallLM(dropout=0.0), datamodule=clustered_data())
    rounds = selection.run.ledger.rounds
    assert len(heard) == len(rounds) - 1  # no direction in the warm-up
    for ids, influence in heard:
        assert len(ids) == 4 * accumulate
        scored = influence.isfinite()
        assert int(scored.sum()) == accumulate * min(4, -(-12 // accumulate))
        expected = torch.tensor([noted.influence[i] for i in ids[scored].tolist()])
        torch.testing.assert_close(influence[scored], expected, rtol=1e-3, atol=1e-5)


def test_listening_does_not_change_the_training(tmp_path):
    for overhear in (False, True):
        folder = tmp_path / str(overhear)
        folder.mkdir()
        selection = quad(folder, overhear=overhear)
        selection.selector.observe_step = lambda ids, influence: None
        fit(folder, selection, Trace(folder / "trace"))
    assert lines(tmp_path / "False") == lines(tmp_path / "True")


def test_a_step_that_cannot_be_heard_costs_a_warning_and_its_arms_are_probed(tmp_path):
    class Odd(SmallLM):
        def training_step(self, batch, index):
            return 3.0 * super().training_step(batch, index)

    selection = quad(tmp_path, training_loss_differs=True)
    trainer = small_trainer(tmp_path, [selection], **{**SIMPLE, "precision": "32-true", "max_steps": 8})
    with pytest.warns(SelectionWarning, match="cannot be captured.*neither the mean over tokens"):
        trainer.fit(Odd(), datamodule=clustered_data())
    assert selection.run.ledger.rounds[-1].metrics["arms/overheard"] == 0.0


ROWS, STEPS_EACH, ROUNDS = 16, 2, 6


def share_of_the_new_clusters(seed: int, plans_ahead: int) -> float:
    """Swap the reference set after six rounds; return how much of the end of training is like the new one.

    The rounds after the swap cover ``plans_ahead`` times the steps of those before it; a plan that reaches over the
    swap was made before it.
    """
    before, after = (2, 5), torch.tensor([0, 7])
    source, chains = planted_clusters(wanted=before, rows=300, length=16, seed=seed)
    model = small_lm(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, source, torch.arange(160))
    selector = UCBSelector(pulls=4, at_once=4, probes=8, controls=16, arms=2, discount=0.7)
    estimator = KFACInfluence(factor_examples=32, factors_every=1)
    run = SelectionRun(selector, estimator, UniformSelector(), 0, source, seed=seed)
    context = fake_context(source, model=model, optimizer=optimizer)
    draws = torch.Generator().manual_seed(99)
    swapped = torch.cat([walk(chains[index], 8, 16, draws) for index in after.tolist()])
    trained = []
    for index in range(ROUNDS + ROUNDS // plans_ahead):
        if index == ROUNDS and plans_ahead == 1:
            source.references = source.reference_labels = swapped
        budget = ROWS * STEPS_EACH * (plans_ahead if index >= ROUNDS else 1)
        plan = play(run, budget, context)
        train(model, optimizer, source, plan.ids, ROWS)
        trained.append(plan.ids)
    end = torch.cat(trained)[-3 * ROWS * STEPS_EACH :]
    return float(torch.isin(source.pool.groups[end], after).float().mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_short_rounds_follow_a_swapped_reference_set_within_three_and_one_long_round_does_not(seed):
    assert share_of_the_new_clusters(seed, plans_ahead=1) >= 0.75
    assert share_of_the_new_clusters(seed, plans_ahead=ROUNDS) <= 0.25
