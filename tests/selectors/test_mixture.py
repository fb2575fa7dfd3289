"""The mixture on planted pools: what is found, what is left alone, and that its bounds hold without oscillation."""

import csv
import io
import json

import pytest
import torch
from fakes import FakeSource, fake_context, play
from torch import Tensor

from liveselect.grammar import InfluenceEstimator
from liveselect.pool import Grouping
from liveselect.rounds import SelectionRun
from liveselect.selectors import MixtureSelector, PriorSelector, UCBSelector, UniformSelector

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")

NAMES = tuple("abcdefgh")
BUDGET, SIZE = 80, 8000


def a_source(size=SIZE, groups=8, seed=0, sources=0) -> FakeSource:
    """Candidates in groups of unequal size; token 0 of each is its group."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(1.0, groups + 1)
    codes = torch.multinomial(shares, size, replacement=True, generator=generator)
    tokens = torch.randint(0, 50, (size, 4), generator=generator)
    tokens[:, 0] = codes
    source = FakeSource(tokens, groups=codes.int(), group_names=NAMES[:groups])
    if sources:
        source.pool.sources = Grouping(torch.arange(size) % sources, tuple(f"source {s}" for s in range(sources)))
    return source


class Worth(InfluenceEstimator):
    """Influence with a mean for each group and heavy tails, which falls with how much of the group was trained on."""

    def __init__(self, source, means, saturation=0.0, scale=1.0) -> None:
        self.groups = source.pool.groups.long()
        self.means = torch.tensor(means, dtype=torch.float64)
        draws = torch.randn(source.pool.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.noise = draws * draws.abs()
        self.saturation, self.scale = saturation, scale
        self.learned = torch.zeros(len(means), dtype=torch.float64)

    def fit(self, model, round):
        if round.trained is not None:
            share = torch.bincount(self.groups[round.trained], minlength=len(self.means)) / len(round.trained)
            self.learned = 0.3 * self.learned + share
        return {}

    def score(self, model, batch) -> Tensor:
        group = self.groups[batch["id"]]
        worth = self.means[group] - self.saturation * self.learned[group] + self.noise[batch["id"]]
        return self.scale * worth


def run_of(source, estimator, rounds, change=None, **settings):
    """Play rounds; returns the run, and the share of each group in each plan, ``(rounds, G)``."""
    run = SelectionRun(MixtureSelector(**settings), estimator, UniformSelector(), 0, source)
    return run, torch.stack([played(run, index == rounds // 2 and change) for index in range(rounds)])


def played(run, change=None) -> Tensor:
    if change:
        change()
    plan = play(run, BUDGET, fake_context(run.source))
    return torch.bincount(run.pool.groups[plan.ids], minlength=len(run.pool.group_names)) / BUDGET


def pool_share(source) -> Tensor:
    return torch.bincount(source.pool.groups, minlength=len(source.pool.group_names)).double() / source.pool.size


def changes(shares):
    return (shares[1:] - shares[:-1]).abs().sum(dim=1) / 2


def test_the_kind_that_is_worth_more_gets_weight_and_no_more_than_its_cap():
    source = a_source()
    run, shares = run_of(source, Worth(source, [0, 2, 0, 0, 0, 0, 0, 0]), 8, strength=4.0)
    weights, share = run.selector._weights, pool_share(source)
    assert weights[1] == pytest.approx(4 * float(share[1]))  # the cap
    assert shares[5:, 1].mean() > 3.5 * share[1]
    others = torch.arange(8) != 1
    torch.testing.assert_close(
        (weights / share)[others], torch.full((7,), float((1 - weights[1]) / (1 - share[1])), dtype=torch.float64),
        atol=0.4, rtol=0.0,
    )  # fmt: skip
    row = run.ledger.rounds[-1].groups["b"]
    assert row["weight"] == pytest.approx(float(weights[1]))
    assert row["chosen"] / BUDGET == pytest.approx(row["weight"], abs=1 / BUDGET)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_exchangeable_pool_is_left_at_its_mixture(seed):
    source = a_source(seed=seed)
    run, shares = run_of(source, Worth(source, [5.0] * 8), 10)
    share = pool_share(source)
    assert (run.selector._weights / share - 1).abs().max() < 0.35
    assert (shares - share).abs().sum(dim=1).max() / 2 < 0.1


def test_a_reference_that_moves_half_way_is_followed_and_the_first_is_let_go():
    source = a_source()
    estimator = Worth(source, [0, 2, 0, 0, 0, 0, 0, 0])

    def move():
        estimator.means = torch.tensor([0, 0, 2, 0, 0, 0, 0, 0]).double()

    _, shares = run_of(source, estimator, 16, change=move)
    share = pool_share(source)
    assert shares[5:8, 1].mean() > 2.5 * share[1]
    assert shares[13:, 2].mean() > 2.5 * share[2]
    assert shares[13:, 1].mean() < 1.3 * share[1]


def test_bounds_hold_in_every_round_whatever_is_measured():
    source = a_source()
    run = SelectionRun(
        MixtureSelector(strength=50.0, rate=1.0, floor=0.2, cap=2.5),
        Worth(source, [9, -9, 0, 5, -5, 1, 0, 3]), UniformSelector(), 0, source,
    )  # fmt: skip
    share = pool_share(source)
    for _ in range(6):
        chosen = played(run)
        weights = run.selector._weights
        assert bool((weights >= 0.2 * share - 1e-12).all())
        assert bool((weights <= 2.5 * share + 1e-12).all())
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
        assert (chosen - weights).abs().max() <= 1 / BUDGET  # the plan is the weights, but for rounding
    assert weights.div(share).max() == pytest.approx(2.5)
    assert weights.div(share).min() == pytest.approx(0.2)


def test_sources_that_saturate_are_left_without_oscillation():
    source = a_source()
    _, shares = run_of(source, Worth(source, [1.5, 1.2, 0, 0, 0, 0, 0, 0], saturation=6.0), 14)
    assert changes(shares)[1:].max() < 0.3
    assert changes(shares)[6:].mean() < 0.12
    assert shares[6:, :2].sum(dim=1).min() > pool_share(source)[:2].sum()


def test_the_unit_of_what_is_measured_changes_nothing():
    found = []
    for settings in ({}, {"scale": 2.0**-20}):
        source = a_source()
        found.append(run_of(source, Worth(source, [0, 2, 0, 0, 1, 0, 0, 0], **settings), 4)[1])
    assert torch.equal(*found)


def test_what_training_steps_have_shown_moves_the_weights_without_probes():
    source = a_source()
    estimator = Worth(source, [0, 2, 0, 0, 0, 0, 0, 0])
    run = SelectionRun(MixtureSelector(probes=0), None, UniformSelector(), 0, source)
    assert not run.selector.needs_estimator
    for _ in range(8):
        played(run)
        ids = run.plan.ids
        run.selector.observe_step(ids, estimator.score(None, {"id": ids}))
    share = pool_share(source)
    assert run.selector._weights[1] > 3 * share[1]
    assert not any(record.measured for record in run.ledger.rounds)


def test_probes_go_where_least_is_known_and_lie_in_front_of_what_training_takes():
    source = a_source()
    run, _ = run_of(source, Worth(source, [0.0] * 8), 2, probes=40)
    measured = [torch.tensor(record.measured) for record in run.ledger.rounds]
    assert all(len(ids.unique()) == 40 for ids in measured)
    counts = torch.stack([torch.bincount(source.pool.groups[ids], minlength=8) for ids in measured])
    assert counts.min() >= 2
    assert counts[0, 7] > counts[0, 0]
    used = source.pool.uses[torch.cat(measured)] > 0
    assert used.double().mean() > 0.6


def test_all_of_a_cell_are_equally_likely():
    drawn = torch.zeros(60)
    for seed in range(300):
        source = a_source(60, 2)
        run = SelectionRun(MixtureSelector(probes=0), None, UniformSelector(), 0, source, seed=seed)
        drawn[play(run, 20).ids] += 1
    share = 20 / 60
    assert ((drawn / 300 - share).abs() < 4.5 * (share * (1 - share) / 300) ** 0.5 + 0.02).all()


def test_cells_are_source_by_group_by_part_of_the_prior():
    source = a_source(1000, 3, sources=2)
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    scores[::100] = -torch.inf
    selector = MixtureSelector(prior=scores, parts=4, probes=0)
    play(SelectionRun(selector, None, UniformSelector(), 0, source), 100)
    cells = selector._cells
    assert [factor.name for factor in cells.factors] == ["source", "group", "prior"]
    assert len(cells) == 2 * 3 * 4
    for cell in range(len(cells)):
        mine = cells.codes == cell
        levels = [int(factor.of_cells[cell]) for factor in cells.factors]
        assert source.pool.sources.codes[mine].unique().tolist() == [levels[0]]
        assert source.pool.groups[mine].unique().tolist() == [levels[1]]
    parts = torch.bincount(cells.codes % 4, minlength=4)
    assert (parts - torch.tensor([257, 247, 248, 248])).abs().max() <= 1
    finite = scores.where(scores.isfinite(), torch.nan)
    for part in range(3):
        above, below = finite[cells.codes % 4 == part + 1], finite[cells.codes % 4 == part]
        assert below[~below.isnan()].max() <= above.min()
    assert not source.pool.uses[~scores.isfinite()].any()
    assert float(selector._share.sum()) == pytest.approx(1.0)


def test_a_prior_of_ngrams_makes_cells_whose_best_part_is_found():
    """The reference set has words of its own; what has them is worth more, which the group does not say."""
    generator = torch.Generator().manual_seed(0)
    near = torch.rand(4000, generator=generator) < 0.2
    tokens = torch.randint(0, 50, (4000, 12), generator=generator) + 100 * near[:, None]
    reference = torch.randint(0, 50, (16, 12), generator=generator) + 100
    source = FakeSource(tokens, reference, groups=(torch.arange(4000) % 3).int(), group_names=("a", "b", "c"))
    draws = torch.randn(4000, generator=generator)

    class Near(InfluenceEstimator):
        def score(self, model, batch):
            return 2.0 * near[batch["id"]] + draws[batch["id"]]

    run = SelectionRun(MixtureSelector(prior=True), Near(), UniformSelector(), 0, source)
    for _ in range(6):
        play(run, BUDGET)
    best = [row for row in run.selector.table() if row["prior"] == "5"]
    assert min(row["weight"] / row["share"] for row in best) > 2
    assert near[run.plan.ids].double().mean() > 0.5


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_an_exported_table_is_imported_with_the_same_weights(tmp_path, kind):
    source = a_source()
    run, _ = run_of(source, Worth(source, [0, 2, 0, 0, 1, 0, 0, 0]), 4)
    run.selector.export(tmp_path / f"weights.{kind}")
    fixed = MixtureSelector(weights=tmp_path / f"weights.{kind}", probes=0)
    other = SelectionRun(fixed, None, UniformSelector(), 0, a_source())
    chosen = played(other)
    torch.testing.assert_close(fixed._weights, run.selector._weights, rtol=1e-9, atol=1e-9)
    assert (chosen - fixed._weights).abs().max() <= 1 / BUDGET
    text = run.selector.files()["mixture.csv"]
    assert {row["group"]: float(row["weight"]) for row in rows_of(text)} == dict(
        zip(NAMES, run.selector._weights.tolist(), strict=True)
    )
    assert sum(float(row["share"]) for row in rows_of(text)) == pytest.approx(1.0)


def test_a_table_by_hand_is_a_mixture_and_lines_may_be_about_several_cells(tmp_path):
    (tmp_path / "mine.csv").write_text("group,prior,weight\na,,1\nb,2,3\n")
    scores = torch.arange(1000.0)
    source = a_source(1000, 3)
    selector = MixtureSelector(tmp_path / "mine.csv", scores, parts=2, floor=0.0, cap=1000.0, probes=0)
    plan = play(SelectionRun(selector, None, UniformSelector(), 0, source), 40)
    groups = source.pool.groups[plan.ids]
    assert torch.bincount(groups, minlength=3).tolist() == [10, 30, 0]
    assert bool((plan.ids[groups == 1] >= 500).all())
    eligible = selector.eligible(source.pool, 10)
    assert torch.equal(eligible, (source.pool.groups == 0) | ((source.pool.groups == 1) & (scores >= 500)))
    (tmp_path / "mine.json").write_text(json.dumps([{"group": "a", "weight": 1}, {"group": "b", "weight": 1}]))
    pair = MixtureSelector(tmp_path / "mine.json", floor=0.0, cap=1000.0, probes=0)
    plan = play(SelectionRun(pair, None, UniformSelector(), 0, a_source(1000, 3)), 40)
    assert torch.bincount(source.pool.groups[plan.ids], minlength=3).tolist() == [20, 20, 0]
    by_name = MixtureSelector({"a": 1.0, "b": 1.0}, floor=0.0, cap=1000.0, probes=0)
    again = play(SelectionRun(by_name, None, UniformSelector(), 0, a_source(1000, 3)), 40)
    assert torch.equal(again.ids, plan.ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor": 1.5}, "floor in 0..1"),
        ({"cap": 0.5}, "cap of at least"),
        ({"rate": 0.0}, "rate"),
        ({"probes": -1}, "probes"),
        ({"prior": [1.0], "parts": 1}, "leave the prior out"),
        ({"strength": float("inf")}, "strength"),
        ({"shrinkage": 0.0}, "shrinkage"),
        ({"forgetting": 1.5}, "forgetting"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureSelector(**arguments)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"z": 1.0}, "names the group 'z', and the pool has 'a', 'b', 'c'"),
        ({"a": -1.0}, "expected a weight of at least 0"),
        ({"a": 0.0}, "weight above 0"),
        ([{"weight": 1.0}], "to name group"),
    ],
)
def test_tables_that_do_not_fit_are_refused_before_training(tmp_path, table, message):
    if isinstance(table, list):
        (tmp_path / "weights.json").write_text(json.dumps(table))
        table = tmp_path / "weights.json"
    with pytest.raises(ValueError, match=message):
        MixtureSelector(table).check(fake_context(a_source(100, 3)).round, 4)


def test_files_that_are_no_tables_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a run writes mixture\.csv"):
        MixtureSelector(tmp_path / "missing.csv")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no table of weights"):
        MixtureSelector(tmp_path / "broken.json")
    (tmp_path / "weights.txt").write_text("a")
    with pytest.raises(ValueError, match=r"in a .csv, .json or .parquet file"):
        MixtureSelector(tmp_path / "weights.txt")
    with pytest.raises(ValueError, match="several cells"):
        MixtureSelector().check(fake_context(FakeSource(torch.zeros(9, 3).long())).round, 4)
    with pytest.raises(RuntimeError, match="no cells before the first round"):
        MixtureSelector().export(tmp_path / "weights.csv")


def test_half_a_run_goes_on_as_the_whole_with_what_steps_have_shown():
    def new(means=(0, 2, 0, 0, 1, 0, 0, 0)):
        source = a_source(2000)
        return SelectionRun(MixtureSelector(), Worth(source, means), UniformSelector(), 0, source)

    first = new()
    for _ in range(3):
        played(first)
        first.selector.observe_step(first.plan.ids[:20], torch.linspace(0, 1, 20))
    state = first.state_dict()
    expected = []
    for _ in range(3):
        played(first)
        expected.append(first.plan.ids)
    resumed = new()
    resumed.load_state_dict(state)
    for ids in expected:
        played(resumed)
        assert torch.equal(resumed.plan.ids, ids)
    assert torch.equal(resumed.selector._weights, first.selector._weights)
    other = SelectionRun(MixtureSelector(), None, UniformSelector(), 0, a_source(2000, seed=1))
    other.selector.load_state_dict(state["selector"]["state"])
    with pytest.raises(ValueError, match="the checkpoint was made with the cells 8/"):
        other.selector.check(fake_context(other.source).round, 4)


def test_a_cell_that_runs_out_gives_all_and_the_pool_is_used_up_once():
    source = a_source(400, 3)
    run = SelectionRun(MixtureSelector(probes=16), Worth(source, [9, 0, 0]), UniformSelector(), 0, source)
    for _ in range(5):
        played(run)
    assert source.pool.uses.tolist() == [1] * 400
    assert any(record.metrics["weights/short"] > 0 for record in run.ledger.rounds)


def test_the_offset_of_a_prior_beneath_is_added_to_what_a_cell_is_worth():
    source = a_source()
    scores = (source.pool.groups == 1).float()
    selector = PriorSelector(MixtureSelector(probes=0), scores, ratio=1.0, offset=1.0)
    run = SelectionRun(selector, None, UniformSelector(), 0, source)
    share = pool_share(source)
    assert played(run)[1] == pytest.approx(min(4 * float(share[1]), 1.0), abs=1 / BUDGET)
    torch.testing.assert_close(selector.selector._weights, share, rtol=1e-6, atol=1e-6)


def test_a_bandit_pulls_cells_of_a_prior():
    """Only the better half of one group is worth something: no arm of whole groups shows it."""
    source = a_source(2000, 4)
    scores = torch.rand(2000, generator=torch.Generator().manual_seed(5))
    wanted = (source.pool.groups == 2) & (scores > scores.median())

    class Half(InfluenceEstimator):
        def score(self, model, batch):
            return 3.0 * wanted[batch["id"]] + torch.sin(37.0 * batch["id"])

    selector = UCBSelector(pulls=4, probes=4, controls=16, arms=1, prior=scores, parts=2)
    run = SelectionRun(selector, Half(), UniformSelector(), 0, source)
    for _ in range(6):
        play(run, 40)
    assert wanted[run.plan.ids].all()
    assert "reward" in run.ledger.rounds[-1].groups["c"]
    state = run.state_dict()
    resumed = SelectionRun(
        UCBSelector(pulls=4, probes=4, controls=16, arms=1, prior=scores, parts=2), Half(), UniformSelector(), 0,
        a_source(2000, 4),
    )  # fmt: skip
    resumed.load_state_dict(state)
    assert torch.equal(play(resumed, 40).ids, play(run, 40).ids)
