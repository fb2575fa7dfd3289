"""Every method scores a pool: a planted signal is found, and the folder says what made it."""

import json

import pytest
import torch
import yaml
from fakes import FakeSource, fake_context, planted_source
from ranks import on_ranks
from unrolled_language_model import warm_context

from liveselect import cli
from liveselect.cli.score_method import MethodJob
from liveselect.cli.score_methods import METHODS, NEEDS_MODEL, build
from liveselect.datamodules import write_store
from liveselect.ledger import Ledger
from liveselect.scores import read_scores, write_scores
from liveselect.selectors import PriorSelector, ScoredSelector, UniformSelector

SETTINGS = {
    "dsir": {"terms": "words"},
    "embed": {"dimensions": 16},
    "rho": {"steps": 8, "learning_rate": 1e-2},
    "tap": {"steps": 8, "learning_rate": 1e-2},
    "less": {"dimensions": 256},
    "perplexity": {"band": "low"},
}


def planted(candidates=120):
    return planted_source(candidates=candidates, share=0.25, length=24, vocab=50, rows=16)


def job(folder, name, context=None, settings=None, **options):
    context = context or warm_context("adamw", source=planted()[0])
    method, chosen, (part, finish) = build(name, settings or SETTINGS.get(name, {}), context.source)
    options = {"shard_size": 50, **options}
    model = context.live if name in NEEDS_MODEL else None
    return MethodJob(
        model=model, round=context.round, method=part, card=method.card, chosen=chosen, finish=finish, folder=folder,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"near-duplicates", "perplexity"}))
def test_a_method_finds_the_rows_that_are_like_the_reference_set(name, tmp_path):
    source, wanted = planted()
    scores = job(tmp_path, name, warm_context("adamw", source=source)).run()
    best = wanted[scores.values.topk(30).indices].double().mean()
    assert best > 0.5  # twice their share of the pool
    said = scores.about["method"]
    assert said["name"] == name
    assert said["published"]
    assert set(said["settings"]) == set(METHODS[name].defaults())
    assert scores.about["cost"]["seconds"]["score the pool"] >= 0
    assert (sum(scores.about["cost"]["flops"].values()) > 0) is (name in NEEDS_MODEL)
    chosen = ScoredSelector(tmp_path, ratio=0.25, standardize=True).select(fake_context(source).round, 20).ids
    assert wanted[chosen].double().mean() > 0.5
