import io
import math

import pytest
import torch
from fakes import fake_context, random_source
from torch import Tensor, nn

from liveselect.measurement import Measurement
from liveselect.protocols import Batch, NotMeasurableError, RoundContext, Selection
from liveselect.rounds import GROUPS_RECORDED, SelectionRun, finish_round, run_round
from liveselect.snapshot import checksum

PER_PROPOSAL = 10


class TwoQuestions:
    """Proposes two batches of candidates, then takes the best of what it was told, ties by id."""

    def __init__(self) -> None:
        self.told: dict[int, float] = {}
        self.asked = 0

    def propose(self, context: RoundContext) -> Tensor:
        self.asked += 1
        if self.asked > 2:
            return torch.empty(0, dtype=torch.int64)
        order = torch.randperm(len(context.candidates), generator=context.generator(f"ask {self.asked}"))
        return context.candidates[order[:PER_PROPOSAL]]

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        self.told.update(zip(ids.tolist(), influence.tolist(), strict=True))

    def select(self, context: RoundContext, budget: int) -> Selection:
        ids = torch.tensor(sorted(self.told))
        scores = torch.tensor([self.told[i] for i in ids.tolist()])
        best = scores.argsort(descending=True, stable=True)[:budget]
        return Selection(ids[best], scored=ids, scores=scores, metrics={"told": float(len(ids))})


class TokenSum:
    """Calls a candidate's token sum its influence, and disturbs the model as an exact probe does."""

    fitted = 0

    def fit(self, context: RoundContext) -> dict[str, float]:
        self.fitted += 1
        return {"reference_loss": 3.0}

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        assert not context.model.training
        for parameter in context.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.rand(3)
        return batch["input_ids"].sum(dim=1).double()


class Fixed:
    """Chooses the same ids whatever the context."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def propose(self, context: RoundContext) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        raise NotImplementedError

    def select(self, context: RoundContext, budget: int) -> Selection:
        return Selection(self.ids)


def a_run(selector=None, estimator=None, warmup_rounds=0, **source_arguments):
    source = random_source(candidates=60, rows=4, **source_arguments)
    run = SelectionRun(selector or TwoQuestions(), estimator, Fixed(torch.arange(5)), warmup_rounds, source.pool)
    return run, source


def test_the_selector_is_told_the_influence_of_exactly_what_it_asked_for():
    run, source = a_run(estimator=TokenSum())
    run_round(run, fake_context(source), budget=5)
    truth = source.tokens.sum(dim=1)
    assert len(run.selector.told) >= PER_PROPOSAL
    assert run.selector.told == {i: float(truth[i]) for i in run.selector.told}
    record = run.ledger.rounds[0]
    assert record.influence == [float(truth[i]) for i in record.measured]
    assert len(record.measured) == 2 * PER_PROPOSAL
    assert run.estimator.fitted == 1


def test_the_plan_is_what_the_selector_chose_and_every_use_is_counted():
    run, source = a_run(estimator=TokenSum())
    plan = run_round(run, fake_context(source), budget=5)
    truth = source.tokens.sum(dim=1)
    expected = sorted(run.selector.told, key=lambda i: (-truth[i], i))[:5]
    assert plan.ids.tolist() == expected
    assert run.plan is plan
    assert source.pool.uses.nonzero().flatten().tolist() == sorted(expected)


def test_the_record_adds_up():
    groups = torch.arange(60) % 3
    run, source = a_run(estimator=TokenSum(), groups=groups, group_names=("a", "b", "c"))
    plan = run_round(run, fake_context(source), budget=5)
    record = run.ledger.rounds[0]
    for name, code in (("a", 0), ("b", 1), ("c", 2)):
        assert record.groups[name]["available"] == 20
        assert record.groups[name]["chosen"] == int((groups[plan.ids] == code).sum())
        assert record.groups[name]["measured"] == sum(int(groups[i]) == code for i in record.measured)
    assert record.metrics == {"reference_loss": 3.0, "told": float(len(run.selector.told))}
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
    run, source = a_run(estimator=TokenSum(), groups=groups, group_names=names)
    plan = run_round(run, fake_context(source), budget=5)
    record = run.ledger.rounds[0]
    touched = {names[groups[i]] for i in [*plan.ids.tolist(), *record.measured]}
    assert set(record.groups) == touched
    assert sum(row["chosen"] for row in record.groups.values()) == 5


def test_what_a_selector_knows_of_a_group_stands_in_its_row_where_it_is_finite():
    class Knows(Fixed):
        def select(self, context, budget):
            return Selection(self.ids, group_metrics={"reward": torch.tensor([0.5, torch.nan, torch.inf])})

    run, source = a_run(selector=Knows(torch.arange(5)), groups=torch.arange(60) % 3, group_names=("a", "b", "c"))
    run_round(run, fake_context(source), budget=5)
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
        measurement.advance(context, limit=4)
        pieces += 1
        assert checksum(model, optimizer) == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert model.training
        assert run.plan is None
        assert not source.pool.uses.any()
    assert pieces == 2 * PER_PROPOSAL // 4 + 1  # the last finds that nothing more is asked
    assert finish_round(run, measurement, context, budget=5) is run.plan


class Heavy(TokenSum):
    """Keeps what it fitted until it is told to let go."""

    kept = False

    def fit(self, context: RoundContext) -> dict[str, float]:
        self.kept = True
        return super().fit(context)

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
    run, source = a_run(estimator=Heavy())
    run.watch = Looks()
    for round_index in range(2):
        run.selector = TwoQuestions()
        run_round(run, fake_context(source, round_index=round_index), 5)
        assert not run.estimator.kept
    assert run.watch.found == [True, True]


def test_warm_up_rounds_use_the_other_selector():
    run, source = a_run(estimator=TokenSum(), warmup_rounds=1)
    assert run_round(run, fake_context(source), budget=5).ids.tolist() == list(range(5))
    assert run.ledger.rounds[0].selector == "Fixed"
    assert run.next_round == 1
    run_round(run, fake_context(source, round_index=1), budget=5)
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
        run_round(run, fake_context(source), budget=5)
    assert run.plan is None
    assert not source.pool.uses.any()
    assert not run.ledger.rounds


def test_a_proposal_without_an_estimator_is_refused():
    run, source = a_run()
    with pytest.raises(ValueError, match="there is no estimator"):
        run_round(run, fake_context(source), budget=5)


class Counting(TwoQuestions):
    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_the_state_of_a_run_survives_a_checkpoint():
    run, source = a_run(selector=Counting(), estimator=TokenSum())
    run_round(run, fake_context(source), budget=5)
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
    def fit(self, context: RoundContext) -> dict[str, float]:
        self.fitted += 1
        raise NotMeasurableError("the reference loss is nan")


def test_when_nothing_can_be_measured_the_selector_is_told_so_and_the_round_goes_on():
    class Careful(TwoQuestions):
        def select(self, context: RoundContext, budget: int) -> Selection:
            assert len(self.told) > PER_PROPOSAL  # both questions were answered
            assert all(math.isnan(value) for value in self.told.values())
            return Selection(context.candidates[:budget])

    estimator = Unready()
    run, source = a_run(Careful(), estimator)
    run_round(run, fake_context(source), budget=5)
    assert estimator.fitted == 1  # once a round, however often the selector asks
    record = run.ledger.rounds[0]
    assert record.notes == ["nothing could be measured: the reference loss is nan"]
    assert len(record.measured) == len(record.influence) == 2 * PER_PROPOSAL
