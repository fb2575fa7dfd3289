"""Quad inside Trainer.fit: it finds the arms of the reference set, survives a kill, and follows what changes."""

import json
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from fakes import fake_context
from lightning.pytorch.callbacks import ModelCheckpoint
from planted_clusters import planted_clusters, small_lm, train, walk
from small_run import SIMPLE, Killer, Place, SmallLM, Trace, forked, small_trainer

from liveselect.callbacks import Quad
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.rounds import SelectionRun, run_round
from liveselect.selectors import UCBSelector, UniformSelector

torch.set_num_threads(1)
CLUSTERS, LIKE_REFERENCE, TOKENS = 5, 3, 12
STEPS, KILLED_AT = 16, 9


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
    return Quad(**{**defaults, **settings}, estimator=OneStepInfluence(step="in_batch"), dirpath=folder / "selection")


def fit(folder, selection, *callbacks, **settings) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    simple = {**SIMPLE, "precision": "32-true", "max_steps": STEPS, **settings}
    trainer = small_trainer(folder, [Place(selection), selection, *callbacks], **simple)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(SmallLM(), datamodule=clustered_data(), ckpt_path=settings.pop("ckpt_path", None) or "last")
    return trainer


def test_the_mixture_turns_to_the_cluster_of_the_reference_set(tmp_path):
    selection = quad(tmp_path)
    fit(tmp_path, selection)
    ledger = Ledger.read(tmp_path / "selection" / "ledger.jsonl")
    assert ledger.about["preset"] == "Quad"
    wanted = f"cluster {LIKE_REFERENCE}"
    last = ledger.rounds[-1]
    assert last.groups[wanted]["chosen"] == last.chosen
    assert max(last.groups, key=lambda name: last.groups[name].get("reward", -9.0)) == wanted
    assert sum(row.get("pulls", 0.0) for row in last.groups.values()) == 3.0 * (STEPS // 2 - 1)
    assert {"arms/known", "influence/level"} <= set(last.metrics)


def lines(folder):
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


def killed_or_whole(folder, kill):
    callbacks = [Trace(folder / "trace")]
    if kill:
        callbacks.append(Killer("on_train_batch_start", KILLED_AT))
    callbacks.append(ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_top_k=-1, save_last=True))
    fit(folder, quad(folder, discount=0.9), *callbacks)


def test_a_killed_run_pulls_the_same_arms_and_ends_with_the_same_weights(tmp_path):
    for name in ("whole", "killed"):
        os.mkdir(tmp_path / name)
    assert forked(killed_or_whole, tmp_path / "whole", False) == 0
    assert forked(killed_or_whole, tmp_path / "killed", True) == -9
    assert forked(killed_or_whole, tmp_path / "killed", False) == 0
    whole = {tuple(place): rest for place, *rest in lines(tmp_path / "whole")}
    for place, *rest in lines(tmp_path / "killed"):
        assert whole[tuple(place)] == rest
    ledgers = [Ledger.read(tmp_path / name / "selection" / "ledger.jsonl") for name in ("whole", "killed")]
    pulled = [[(record.measured, record.influence, record.plan) for record in ledger.rounds] for ledger in ledgers]
    assert pulled[0] == pulled[1]


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
    selector = UCBSelector(pulls=4, at_once=4, probes=6, controls=8, arms=2, discount=0.8)
    run = SelectionRun(selector, OneStepInfluence(step="in_batch"), UniformSelector(), 0, source.pool)
    draws = torch.Generator().manual_seed(99)
    swapped = torch.cat([walk(chains[index], 8, 16, draws) for index in after.tolist()])
    trained = []
    for index in range(ROUNDS + ROUNDS // plans_ahead):
        if index == ROUNDS and plans_ahead == 1:
            source.references = source.reference_labels = swapped
        budget = ROWS * STEPS_EACH * (plans_ahead if index >= ROUNDS else 1)
        candidates = source.pool.available(budget)
        live = {"model": model, "optimizer": optimizer, "seed": seed}
        plan = run_round(run, fake_context(source, round_index=index, candidates=candidates, **live), budget)
        train(model, optimizer, source, plan.ids, ROWS)
        trained.append(plan.ids)
    end = torch.cat(trained)[-3 * ROWS * STEPS_EACH :]
    return float(torch.isin(source.pool.groups[end], after).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_short_rounds_follow_a_swapped_reference_set_within_three_and_one_long_round_does_not(seed):
    assert share_of_the_new_clusters(seed, plans_ahead=1) >= 0.75
    assert share_of_the_new_clusters(seed, plans_ahead=ROUNDS) <= 0.25
