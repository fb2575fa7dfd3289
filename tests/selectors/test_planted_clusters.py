"""The bandit on a real small model: which clusters lower the reference loss is known, and has to be found."""

import copy

import pytest
import torch
from fakes import fake_context, play
from planted_clusters import planted_clusters, small_lm, train

from liveselect.influence import KFACInfluence, OneStepInfluence
from liveselect.rounds import SelectionRun
from liveselect.selectors import UCBSelector, UniformSelector

pytestmark = pytest.mark.long

torch.set_num_threads(1)
CLUSTERS, WANTED, TRAINED = 8, (2, 5), 1280

# probes with which one pull of each tells the clusters apart: one under curvature, a few without
ESTIMATORS = {
    "k-fac": (KFACInfluence, 1),
    "identity": (lambda: KFACInfluence(curvature="identity"), 8),
    "one step": (lambda: OneStepInfluence(step="in_batch"), 8),
}


@pytest.fixture(scope="module")
def trained():
    """The source, the model and the optimizer of a seed after training: each is trained once, and copied to a test."""
    kept = {}

    def of(seed, width=32, inner=64, **data):
        key = (seed, width, *data.items())
        if key not in kept:
            source, _ = planted_clusters(CLUSTERS, WANTED, rows=200, seed=seed, **data)
            model = small_lm(seed, width, inner)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            train(model, optimizer, source, torch.arange(TRAINED))
            kept[key] = source, model, optimizer
        return copy.deepcopy(kept[key])

    return of


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_clusters_of_the_reference_set_are_found_when_every_arm_was_pulled_once(trained, estimator, seed):
    make, probes = ESTIMATORS[estimator]
    source, model, optimizer = trained(seed, length=64, sharpness=4.0)
    source.pool.record_use(torch.arange(TRAINED))
    selector = UCBSelector(pulls=CLUSTERS, at_once=CLUSTERS, probes=probes, controls=16, arms=2)
    run = SelectionRun(selector, make(), UniformSelector(), 0, source, seed=seed)
    plan = play(run, 24, fake_context(source, model=model, optimizer=optimizer))
    rows = run.ledger.rounds[0].groups
    assert all(row["pulls"] == 1.0 for row in rows.values())
    best = sorted(rows, key=lambda name: -rows[name]["reward"])[:2]
    assert set(best) == {f"chain {index}" for index in WANTED}
    assert source.pool.groups[plan.ids].unique().tolist() == list(WANTED)


def share_of_hits(influence: torch.Tensor, arms: torch.Tensor, draws: torch.Generator, repetitions: int = 400) -> float:
    """How often one random candidate of each arm puts the wanted arms in front."""
    one_each = torch.stack(
        [
            each[torch.randint(len(each), (repetitions,), generator=draws)]
            for each in (influence[arms == arm] for arm in range(CLUSTERS))
        ]
    )
    first_two = one_each.topk(2, dim=0).indices.sort(dim=0).values
    return float((first_two == torch.tensor(WANTED)[:, None]).all(dim=0).double().mean())


# as large a model as that of which an independent study reports 0.97 and 1.00
@pytest.mark.parametrize(("curvature", "at_least"), [("identity", 0.92), ("kfac", 0.99)])
def test_one_probe_of_each_arm_finds_the_clusters_of_the_reference_set(trained, curvature, at_least):
    shares = []
    for seed in range(3):
        source, model, optimizer = trained(seed, width=64, inner=256, length=32, sharpness=3.0)
        rest = torch.arange(TRAINED, source.pool.size)
        context = fake_context(source, seed=seed, model=model, optimizer=optimizer, candidates=rest)
        estimator = KFACInfluence(curvature=curvature, factors_of="candidates")
        context.fit(estimator)
        influence = torch.cat([context.score(estimator, batch) for batch in context.round.batches(rest)])
        shares.append(share_of_hits(influence, source.pool.groups[rest], context.round.generator("probes")))
    assert sum(shares) / len(shares) >= at_least
