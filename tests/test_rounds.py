import io
import math
import warnings

import numpy as np
import pytest
import torch
from fakes import fake_context, play, random_source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from liveselect.grammar import (
    Batch,
    InfluenceEstimator,
    LiveModel,
    NotMeasurableError,
    Round,
    Selection,
    Selector,
)
from liveselect.measurement import Measurement
from liveselect.preserve import checksum
from liveselect.rounds import GROUPS_RECORDED, SelectionRun, finish_round
from liveselect.selectors import ScoredSelector, UniformSelector

PER_PROPOSAL = 10


class TwoQuestions(Selector):
    """Proposes two batches of candidates, then takes the best of what it observed, ties by id."""

    needs_estimator = True

    def __init__(self) -> None:
        self.observed: dict[int, float] = {}
        self.asked = self.answered = 0

    def propose(self, round: Round) -> Tensor:
        self.asked += 1
        if self.asked > 2:
            return torch.empty(0, dtype=torch.int64)
        order = torch.randperm(len(round.candidates), generator=round.generator(f"ask {self.asked}"))
        return round.candidates[order[:PER_PROPOSAL]]

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        self.answered += 1
        self.observed.update(zip(ids.tolist(), influence.tolist(), strict=True))

    def select(self, round: Round, budget: int) -> Selection:
        ids = torch.tensor(sorted(self.observed))
        scores = torch.tensor([self.observed[i] for i in ids.tolist()])
        best = scores.argsort(descending=True, stable=True)[:budget]
        return Selection(ids[best], scored=ids, scores=scores, metrics={"observed": float(len(ids))})


class TokenSum(InfluenceEstimator):
    """Calls a candidate's token sum its influence, and disturbs the model as an exact probe does."""

    fitted = 0

    def fit(self, model: LiveModel, round: Round) -> dict[str, float]:
        self.fitted += 1
        return {"reference_loss": 3.0}

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        assert not model.module.training
        for parameter in model.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.rand(3)
        return batch["input_ids"].sum(dim=1).double()


class Fixed(Selector):
    """Chooses the same ids whatever the round."""

    def __init__(self, ids: Tensor, **shown) -> None:
        self.ids, self.shown = ids, shown

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        raise NotImplementedError

    def select(self, round: Round, budget: int) -> Selection:
        return Selection(self.ids, **self.shown)


def a_run(selector=None, estimator=None, warmup_rounds=0, **source_arguments):
    source = random_source(candidates=60, rows=4, **source_arguments)
    run = SelectionRun(selector or TwoQuestions(), estimator, Fixed(torch.arange(5)), warmup_rounds, source)
    return run, source


def test_the_selector_observes_the_influence_of_exactly_what_it_asked_for():
    run, source = a_run(estimator=TokenSum())
    play(run, 5)
    truth = source.tokens.sum(dim=1)
    assert len(run.selector.observed) >= PER_PROPOSAL
    assert run.selector.observed == {i: float(truth[i]) for i in run.selector.observed}
    record = run.ledger.rounds[0]
    assert record.influence == [float(truth[i]) for i in record.measured]
    assert len(record.measured) == 2 * PER_PROPOSAL
    assert run.estimator.fitted == 1


def test_the_plan_is_what_the_selector_chose_and_every_use_is_counted():
    run, source = a_run(estimator=TokenSum())
    plan = play(run, 5)
    truth = source.tokens.sum(dim=1)
    expected = sorted(run.selector.observed, key=lambda i: (-truth[i], i))[:5]
    assert sorted(plan.ids.tolist()) == sorted(expected)
    assert run.plan is plan
    assert source.pool.uses.nonzero().flatten().tolist() == sorted(expected)


def test_the_record_adds_up():
    groups = torch.arange(60) % 3
    run, source = a_run(estimator=TokenSum(), groups=groups, group_names=("a", "b", "c"))
    plan = play(run, 5)
    record = run.ledger.rounds[0]
    for name, code in (("a", 0), ("b", 1), ("c", 2)):
        assert record.groups[name]["available"] == 20
        assert record.groups[name]["chosen"] == int((groups[plan.ids] == code).sum())
        assert record.groups[name]["measured"] == sum(int(groups[i]) == code for i in record.measured)
    observed = float(len(run.selector.observed))
    assert record.metrics == {"reference_loss": 3.0, "observed": observed, "effective_epochs": 1.0}
    assert sum(record.histogram.chosen) == 5
    shown = {example.id for example in record.examples if example.chosen}
    assert shown == set(plan.ids.tolist())
    for example in record.examples:
        assert example.text == source.decode(source.tokens[example.id : example.id + 1])[0]
    assert record.seconds["measure influence"] >= 0
    assert record.plan == plan.fingerprint


def test_of_many_groups_the_record_keeps_those_that_the_round_touched():
    names = tuple(f"cluster {i}" for i in range(GROUPS_RECORDED + 1))
    groups = torch.arange(60) % len(names)
    run, _ = a_run(estimator=TokenSum(), groups=groups, group_names=names)
    plan = play(run, 5)
    record = run.ledger.rounds[0]
    touched = {names[groups[i]] for i in [*plan.ids.tolist(), *record.measured]}
    assert set(record.groups) == touched
    assert sum(row["chosen"] for row in record.groups.values()) == 5


def test_what_a_selector_knows_of_a_group_stands_in_its_row_where_it_is_finite():
    class Knows(Fixed):
        def select(self, round, budget):
            return Selection(self.ids, group_metrics={"reward": torch.tensor([0.5, torch.nan, torch.inf])})

    run, _ = a_run(selector=Knows(torch.arange(5)), groups=torch.arange(60) % 3, group_names=("a", "b", "c"))
    play(run, 5)
    rows = run.ledger.rounds[0].groups
    assert rows["a"]["reward"] == 0.5
    assert "reward" not in rows["b"]
    assert "reward" not in rows["c"]


def test_between_slices_the_model_is_as_training_left_it():
    run, source = a_run(estimator=TokenSum())
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = checksum(model, optimizer), torch.get_rng_state()
    context = fake_context(source, model=model, optimizer=optimizer)
    measurement = Measurement(run.estimator, run.selector)
    pieces = 0
    while not measurement.complete:
        measurement.advance(context.live, context.round, limit=4)
        pieces += 1
        assert checksum(model, optimizer) == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert model.training
        assert run.plan is None
        assert not source.pool.uses.any()
    assert pieces == 2 * PER_PROPOSAL // 4 + 1  # the last finds that nothing more is asked
    assert finish_round(run, measurement, context.live, context.round, budget=5) is run.plan


class Heavy(TokenSum):
    """Keeps what it fitted until it is released."""

    kept = False

    def fit(self, model: LiveModel, round: Round) -> dict[str, float]:
        self.kept = True
        return super().fit(model, round)

    def release(self) -> None:
        self.kept = False


class Looks:
    """A watch that notes whether the estimator could still measure."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def look(self, scene) -> list:
        self.found.append(scene.estimator.kept)
        return []


def test_an_estimator_lets_go_of_what_it_keeps_after_every_round_and_not_before_the_watch_has_looked():
    run, _ = a_run(estimator=Heavy())
    run.watch = Looks()
    for _ in range(2):
        run.selector = TwoQuestions()
        play(run, 5)
        assert not run.estimator.kept
    assert run.watch.found == [True, True]


def test_warm_up_rounds_use_the_other_selector():
    run, _ = a_run(estimator=TokenSum(), warmup_rounds=1)
    assert sorted(play(run, 5).ids.tolist()) == list(range(5))
    assert run.ledger.rounds[0].selector == "Fixed"
    assert run.next_round == 1
    play(run, 5)
    assert run.ledger.rounds[1].selector == "TwoQuestions"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.arange(4), r"to choose \(5,\) int64 ids, got \(4,\)"),
        (torch.arange(5).float(), "float32"),
        (torch.tensor([0, 1, 2, 2, 3]), "1 ids more than once"),
        (torch.tensor([0, 1, 2, 3, 60]), "not among the round's 60 candidates"),
        (torch.tensor([0, 1, 2, 3, -1]), "not among the round's 60 candidates"),
    ],
)
def test_a_choice_that_is_no_plan_is_refused_and_changes_nothing(ids, message):
    run, source = a_run(selector=Fixed(ids))
    with pytest.raises(ValueError, match=message):
        play(run, 5)
    assert run.plan is None
    assert not source.pool.uses.any()
    assert not run.ledger.rounds


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"scored": torch.arange(5), "scores": torch.zeros(4)}, r"scored \(5,\) and scores \(4,\)"),
        ({"scored": torch.arange(5)}, r"scored \(5,\) and scores None"),
        ({"scores": torch.zeros(5)}, r"scored None and scores \(5,\)"),
        ({"notes": "all alike"}, "got the text 'all alike'"),
        ({"group_metrics": {"reward": torch.zeros(99)}}, r"number of reward for each of \d+ groups, got 99"),
    ],
)
def test_a_selection_that_cannot_be_recorded_is_refused_and_changes_nothing(shown, message):
    run, source = a_run(selector=Fixed(torch.arange(5), **shown))
    with pytest.raises(ValueError, match=message):
        play(run, 5)
    assert run.plan is None
    assert not source.pool.uses.any()
    assert not run.ledger.rounds


def test_a_proposal_without_an_estimator_is_refused():
    run, _ = a_run()
    with pytest.raises(ValueError, match="there is no estimator"):
        play(run, 5)


class Counting(TwoQuestions):
    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_the_state_of_a_run_survives_a_checkpoint():
    run, _ = a_run(selector=Counting(), estimator=TokenSum())
    play(run, 5)
    run.plan.advance(2)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    restored, _ = a_run(selector=Counting(), estimator=TokenSum())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.plan.fingerprint == run.plan.fingerprint
    assert restored.plan.cursor == 2
    assert restored.selector.asked == 3
    assert restored.ledger == run.ledger
    assert torch.equal(restored.pool.uses, run.pool.uses)
    assert restored.next_round == 1


def test_resuming_with_other_parts_is_refused():
    run, _ = a_run(selector=Counting())
    other, _ = a_run(selector=TwoQuestions())
    with pytest.raises(ValueError, match="state of the selector Counting, but this run uses TwoQuestions"):
        other.load_state_dict(run.state_dict())


class Unready(TokenSum):
    def fit(self, model: LiveModel, round: Round) -> dict[str, float]:
        self.fitted += 1
        raise NotMeasurableError("the reference loss is nan")


def test_when_nothing_can_be_measured_the_selector_is_given_nothing_and_the_round_goes_on():
    class Careful(TwoQuestions):
        def select(self, round: Round, budget: int) -> Selection:
            assert self.answered == 2  # both questions were answered
            assert not self.observed
            return Selection(round.candidates[:budget])

    estimator = Unready()
    run, _ = a_run(Careful(), estimator)
    play(run, 5)
    assert estimator.fitted == 1  # once a round, however often the selector asks
    record = run.ledger.rounds[0]
    assert record.notes == ["nothing could be measured: the reference loss is nan"]
    assert len(record.measured) == len(record.influence) == 2 * PER_PROPOSAL
    assert all(math.isnan(value) for value in record.influence)


class Holes(TokenSum):
    """Finds no finite influence in the candidates of even id."""

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        odd = batch["id"] % 2 == 1
        return super().score(model, batch).where(odd, torch.where(batch["id"] % 4 == 0, torch.nan, -torch.inf))


def test_a_selector_observes_finite_influence_only_and_the_record_counts_the_rest():
    run, source = a_run(estimator=Holes())
    play(run, 5)
    truth = source.tokens.sum(dim=1)
    record = run.ledger.rounds[0]
    odd = {i for i in record.measured if i % 2}
    assert 5 <= len(odd) < len(set(record.measured))
    assert run.selector.observed == {i: float(truth[i]) for i in odd}
    broken = sum(i % 2 == 0 for i in record.measured)
    assert record.notes == [f"{broken} of 20 measured influences are not finite and were left out"]
    assert {math.isfinite(value) for i, value in zip(record.measured, record.influence, strict=True) if i % 2} == {True}


def test_the_engine_trains_in_an_order_of_its_own_unless_the_selector_keeps_its_order():
    class Recorded(Fixed):
        engine_orders = False

    orders = []
    for kind in (Fixed, Fixed, Recorded):
        run, _ = a_run(kind(torch.arange(30)))
        orders.append(play(run, 30).ids.tolist())
    assert orders[0] == orders[1] != list(range(30)) == sorted(orders[0])
    assert orders[2] == list(range(30))
    other = SelectionRun(Fixed(torch.arange(30)), None, Fixed(torch.arange(5)), 0, random_source(60), seed=1)
    assert play(other, 30).ids.tolist() != orders[0]


def test_what_a_pass_left_over_is_trained_on_before_anything_comes_again():
    class First(Selector):
        def select(self, round: Round, budget: int) -> Selection:
            return Selection(round.candidates[:budget], metrics={"asked for": float(budget)})

    run = SelectionRun(First(), None, First(), 0, random_source(20))
    for _ in range(3):
        plan = play(run, 8)
    left_over = list(range(16, 20))
    assert sorted(plan.ids.tolist()) == [*range(4), *left_over]
    assert plan.ids.tolist() != sorted(plan.ids.tolist())  # in no place of their own
    record = run.ledger.rounds[-1]
    assert record.metrics == {"asked for": 4.0, "left_over": 4.0, "effective_epochs": 24 / 20}
    assert record.candidates == 20


class AnyChoice(Selector):
    """Chooses by made-up scores in an arbitrary order, and checks what the engine promises about its round."""

    def __init__(self, seed: int, may: Tensor | None, bare: bool, best: bool) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        self.may, self.bare, self.best = may, bare, best
        self.ids: list[int] = []

    def eligible(self, pool, budget: int) -> Tensor | None:
        return self.may

    def select(self, round: Round, budget: int) -> Selection | Tensor:
        uses = round.pool.uses
        assert len(uses[round.candidates].unique()) == 1  # used equally often
        assert torch.equal(round.candidates, round.candidates.sort().values)
        assert not torch.isin(round.leftovers, round.candidates).any()
        assert (uses[round.leftovers] < uses[round.candidates[0]]).all()
        assert 0 < budget <= len(round.candidates)
        scores = torch.randint(4, (len(round.candidates),), generator=self.draws).float()
        best = scores.argsort(descending=self.best)[:budget]  # ties are common
        ids = round.candidates[best[torch.randperm(budget, generator=self.draws)]]
        self.ids = ids.tolist()
        return ids if self.bare else Selection(ids, round.candidates, scores)


@st.composite
def whole_runs(draw):
    size = draw(st.integers(1, 16))
    may = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    budgets = draw(st.lists(st.integers(1, size if may is None else sum(may)), min_size=1, max_size=12))
    choice = AnyChoice(
        draw(st.integers(0, 99)), None if may is None else torch.tensor(may), *draw(st.tuples(*2 * [st.booleans()]))
    )
    return size, choice, budgets


@settings(max_examples=150, deadline=None)
@given(whole_runs())
def test_whatever_a_selector_chooses_no_candidate_comes_again_before_each_has_come(whole_run):
    size, choice, budgets = whole_run
    run = SelectionRun(choice, None, choice, 0, random_source(size, length=2))
    pool, may = run.pool, torch.ones(size, dtype=torch.bool) if choice.may is None else choice.may
    trained = [0] * size
    for step, budget in enumerate(budgets):
        ids = play(run, budget, step=step).ids.tolist()
        assert len(ids) == len(set(ids)) == budget
        assert set(choice.ids) <= set(ids)
        for i in ids:  # in training order, over all plans
            trained[i] += 1
        assert pool.uses.tolist() == trained
        assert not pool.uses[~may].any()
        assert int(pool.uses[may].max()) - int(pool.uses[may].min()) <= 1


def test_what_may_never_be_chosen_is_not_trained_on_in_the_warm_up_either():
    source = random_source(candidates=60)
    scores = torch.where(torch.arange(60) < 30, -torch.inf, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = SelectionRun(ScoredSelector(scores), None, UniformSelector(), 2, source)
        for _ in range(3):
            play(run, 9)
    assert not source.pool.uses[:30].any()
    assert int(source.pool.uses[30:].sum()) == 27


@pytest.mark.parametrize("returned", [[1, 2, 3], (1, 2, 3), None, np.arange(3)], ids=["list", "tuple", "none", "numpy"])
def test_a_choice_that_is_no_tensor_is_refused_with_what_it_is(returned):
    class Lists(Selector):
        def select(self, round, budget):
            return returned

    with pytest.raises(ValueError, match=r"Lists.select to return a tensor of ids or a Selection, got \w+"):
        play(SelectionRun(Lists(), None, UniformSelector(), 0, random_source()), 3)


@pytest.mark.parametrize(
    "mask",
    [torch.arange(64), torch.ones(64), [True] * 64, torch.ones(63).bool()],
    ids=["ids", "floats", "list", "short"],
)
def test_what_is_no_mask_of_the_pool_is_refused(mask):
    class Masks(UniformSelector):
        def eligible(self, pool, budget):
            return mask

    with pytest.raises(ValueError, match=r"Masks.eligible to return None or a mask \(64,\) bool of the pool"):
        play(SelectionRun(Masks(), None, UniformSelector(), 0, random_source()), 3)
