"""Each alarm is raised by a planted fault, and by nothing in a healthy run."""

import pytest
import torch
from fakes import FakeSource, fake_context, planted_source, play

from liveselect.decisions import DecisionLedger
from liveselect.grammar import InfluenceEstimator, Selection, Selector
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Alarm, Ledger
from liveselect.preserve import bit_sum
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, UCBSelector, UniformSelector
from liveselect.watch import Watch

BUDGET = 30


class TokenCount(InfluenceEstimator):
    """Influence: the share of a candidate's tokens that the reference set uses, times ``sign`` in a round."""

    def __init__(self, signs=(1, 1, 1, 1), fault=None) -> None:
        self.signs, self.fault = signs, fault

    def fit(self, model, round):
        self.sign = self.signs[round.index]
        return {}

    def score(self, model, batch):
        if self.fault is not None:
            self.fault(model)
        return self.sign * (batch["input_ids"] < 20).float().mean(-1)


class Regressor(HashedRidgeRegressor):
    """Reports the given rank correlation."""

    def __init__(self, *spearman, held_out=80.0) -> None:
        super().__init__()
        self.spearman, self.held_out = spearman, held_out

    def fit(self, round, ids, influence):
        found = self.spearman[min(round.index, len(self.spearman) - 1)]
        return {**super().fit(round, ids, influence), "spearman": found, "held_out": self.held_out}


class Fixed(Selector):
    """Chooses the given ids."""

    def __init__(self, ids, scores=None) -> None:
        self.ids, self.scores = ids, scores

    def select(self, round, budget):
        scored = None if self.scores is None else self.ids[: len(self.scores)]
        return Selection(self.ids, scored, self.scores)


def regression(**settings):
    regressor = settings.pop("regressor", None) or HashedRidgeRegressor()
    return RegressionSelector(regressor, **{"probes": 80, "ratio": 0.2, "min_spearman": None, **settings})


def alarms(folder, selector, estimator=None, rounds=1, source=None, watch=None, budget=BUDGET, **context):
    source = source or planted_source(1000)[0]
    decisions = DecisionLedger(folder / "decisions")
    run = SelectionRun(selector, estimator, UniformSelector(), 0, source, decisions=decisions, watch=watch or Watch())
    for _ in range(rounds):
        play(run, budget, fake_context(source, **context))
    return run, [(alarm.round, alarm.kind) for record in run.ledger.rounds for alarm in record.alarms]


def grouped(share=0.1, **settings):
    """A planted source whose first ``share`` of candidates is the group 'a'."""
    source, planted = planted_source(1000, **settings)
    groups = (torch.arange(1000) >= 1000 * share).long()
    return FakeSource(source.tokens, source.references, groups=groups, group_names=("a", "b")), planted


def test_a_healthy_regression_raises_none(tmp_path):
    run, found = alarms(tmp_path, regression(probes=400), TokenCount(), rounds=4)
    assert found == []
    assert run.ledger.rounds[1].metrics["drift/rank_correlation"] > 0.5
    assert "canary/reference" not in run.ledger.rounds[0].metrics  # eight of 400 would be too many
    assert "canary/reference" in run.ledger.rounds[1].metrics


def test_a_healthy_bandit_raises_none(tmp_path):
    source, _ = planted_source(1000)
    groups = torch.arange(1000) % 10
    source = FakeSource(source.tokens, source.references, groups=groups, group_names=tuple("abcdefghij"))
    selector = UCBSelector(pulls=10, at_once=5, probes=8, controls=16, arms=4, tau=None)
    _, found = alarms(tmp_path, selector, TokenCount(), rounds=4, source=source)
    assert found == []


def test_a_healthy_uniform_run_raises_none(tmp_path):
    _, found = alarms(tmp_path, UniformSelector(), rounds=4, source=grouped()[0])
    assert found == []


@pytest.mark.parametrize("value", [0.0, 2.5, float("nan")])
def test_influence_without_differences_is_an_alarm(tmp_path, value):
    class Constant(TokenCount):
        def score(self, model, batch):
            return torch.full((len(batch["id"]),), value)

    run, found = alarms(tmp_path, regression(), Constant())
    assert found == [(0, "constant")]
    assert "measured influences" in run.ledger.rounds[0].alarms[0].text


def test_constant_scores_and_constant_predictions_are_alarms(tmp_path):
    class Blind(HashedRidgeRegressor):
        def predict(self, round, batch):
            return torch.ones(len(batch["id"]))

    assert alarms(tmp_path / "a", regression(regressor=Blind()), TokenCount())[1] == [(0, "constant")]
    ids = torch.arange(BUDGET)
    assert alarms(tmp_path / "b", Fixed(ids, torch.zeros(BUDGET)))[1] == [(0, "constant")]


def test_scores_that_turn_around_are_an_alarm(tmp_path):
    forgets = HashedRidgeRegressor(forgetting=0.0, damping=1.0)  # one that remembers is told that it guesses instead
    turning = TokenCount(signs=(1, 1, -1, -1))
    run, found = alarms(tmp_path, regression(ratio=0.05, regressor=forgets), turning, rounds=4)
    assert (2, "flip") in found
    assert {kind for _, kind in found} <= {"flip", "canary"}
    assert [index for index, kind in found if kind == "flip"] == [2]
    assert run.ledger.rounds[2].metrics["drift/rank_correlation"] < -0.5


def test_rewards_of_arms_that_turn_around_are_an_alarm(tmp_path):
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(1000) % 10
    tokens = torch.where(
        torch.rand(1000, 24, generator=generator) < groups[:, None] / 10,
        torch.randint(0, 20, (1000, 24), generator=generator),
        torch.randint(20, 60, (1000, 24), generator=generator),
    )
    source = FakeSource(tokens, groups=groups, group_names=tuple("abcdefghij"))
    settings = {"pulls": 10, "at_once": 10, "probes": 8, "controls": 16, "arms": 4, "tau": None, "discount": 0.001}
    watch = Watch(canaries=0, passage=10_000)
    _, found = alarms(
        tmp_path, UCBSelector(**settings), TokenCount((1, 1, -1, -1)), rounds=4, source=source, watch=watch
    )
    assert (2, "flip") in found


def test_a_regressor_below_its_floor_is_an_alarm(tmp_path):
    assert alarms(tmp_path / "a", regression(regressor=Regressor(-0.01)), TokenCount())[1] == [(0, "regressor")]
    high = alarms(tmp_path / "b", regression(regressor=Regressor(0.3)), TokenCount(), watch=Watch(min_spearman=0.4))
    assert high[1] == [(0, "regressor")]


def test_what_few_held_out_measurements_say_is_no_alarm_until_several_rounds_say_it(tmp_path):
    few = {"rounds": 4, "watch": Watch(canaries=0, flip=-1.0, passage=10_000)}
    one = regression(regressor=Regressor(0.5, -0.4, 0.4, 0.4, held_out=24.0))
    assert "regressor" not in {kind for _, kind in alarms(tmp_path / "a", one, TokenCount(), **few)[1]}
    all_ = regression(regressor=Regressor(-0.1, held_out=24.0))
    found = [round for round, kind in alarms(tmp_path / "b", all_, TokenCount(), **few)[1] if kind == "regressor"]
    assert found == [2, 3]  # 72 and 96 measurements
    unknown = regression(regressor=Regressor(float("nan"), held_out=0.0))
    assert (0, "regressor") in alarms(tmp_path / "c", unknown, TokenCount())[1]


def test_a_small_group_that_fills_the_plan_is_an_alarm_and_a_large_one_is_not(tmp_path):
    few = Fixed(torch.arange(BUDGET))
    assert alarms(tmp_path / "a", few, source=grouped(0.1)[0])[1] == [(0, "takeover")]
    assert alarms(tmp_path / "b", few, source=grouped(0.6)[0])[1] == []


def test_a_candidate_that_comes_too_often_is_an_alarm(tmp_path):
    source = planted_source(40)[0]
    _, found = alarms(tmp_path, UniformSelector(), rounds=6, source=source, budget=40)
    assert found == [(4, "repeats"), (5, "repeats")]


def test_chosen_text_from_the_reference_is_an_alarm(tmp_path):
    source, _ = planted_source(1000, length=48, vocab=600)
    source.references = source.tokens[100:104].clone()
    source.references[:, :10] = 0  # the rest, 38 tokens, is shared
    source.reference_labels = source.references
    ids = torch.arange(90, 90 + BUDGET)
    run, found = alarms(tmp_path / "a", Fixed(ids), source=source)
    assert found == [(0, "duplicate")]
    shared = [index for index in run.plan.ids.tolist() if 100 <= index < 104]  # in training order
    (text,) = source.decode(source.tokens[shared[:1], 10:42])
    named = ", ".join(map(str, shared))
    assert f"(candidates {named}; such as '{text[:60]}" in run.ledger.rounds[0].alarms[0].text
    source.pool.uses.zero_()
    source.references[:, ::20] = 0  # now at most 19 in a row
    assert alarms(tmp_path / "b", Fixed(ids), source=source)[1] == []


def test_padding_is_no_duplicate(tmp_path):
    source, _ = planted_source(1000, length=48)
    source.tokens[:, 8:] = 0
    source.references[:, 8:] = 0
    assert alarms(tmp_path, Fixed(torch.arange(BUDGET)), source=source)[1] == []


def test_canaries_that_rank_wrongly_are_an_alarm(tmp_path):
    run, found = alarms(tmp_path, regression(probes=800), TokenCount(signs=(-1,)))
    assert found == [(0, "canary")]
    metrics = run.ledger.rounds[0].metrics
    assert metrics["canary/reference"] < metrics["canary/random"]
    assert alarms(tmp_path / "none", regression(probes=800), TokenCount((-1,)), watch=Watch(canaries=0))[1] == []


def small_model():
    torch.manual_seed(0)  # noqa: TID251 - the weights of the test's model
    return torch.nn.Sequential(torch.nn.Embedding(60, 8), torch.nn.Linear(8, 60))


def test_a_measurement_that_leaves_a_trace_is_an_alarm(tmp_path):
    def spoil_weights(model):
        with torch.no_grad():
            model.module[1].bias[3] += 1e-6

    def spoil_moments(model):
        for state in model.optimizer.state.values():
            state["exp_avg"].view(-1)[0] += 1e-6

    for name, fault in (("weights", spoil_weights), ("moments", spoil_moments)):
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters())
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        settings = {"model": model, "optimizer": optimizer}
        assert (0, "restore") in alarms(tmp_path / name, regression(), TokenCount(fault=fault), **settings)[1]
        _, found = alarms(tmp_path / f"{name}-healthy", regression(), OneStepInfluence(step="in_batch"), **settings)
        assert "restore" not in {kind for _, kind in found}


def test_a_round_that_measures_nothing_restores_nothing(tmp_path):
    drawn, _ = alarms(tmp_path / "drawn", UniformSelector(), rounds=2)
    assert all("check restore" not in record.seconds for record in drawn.ledger.rounds)
    measured, _ = alarms(tmp_path / "measured", regression(), TokenCount())
    assert "check restore" in measured.ledger.rounds[0].seconds


def test_the_cheap_checksum_sees_every_single_change():
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    before = bit_sum(model, optimizer)
    assert bit_sum(model, optimizer) == before
    with torch.no_grad():
        for parameter in model.parameters():
            value = parameter.view(-1)[0].clone()
            parameter.view(-1)[0] = torch.nextafter(value, torch.tensor(torch.inf))
            assert bit_sum(model, optimizer) != before
            parameter.view(-1)[0] = value
    assert bit_sum(model, optimizer) == before
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    exchanged = torch.nn.ModuleList([second, first])
    assert bit_sum(torch.nn.ModuleList([first, second]), optimizer) != bit_sum(exchanged, optimizer)


def test_ranks_that_hold_other_scores_but_choose_alike_are_an_alarm(tmp_path, monkeypatch):
    monkeypatch.setattr("liveselect.distributed.world_size", lambda: 2)
    monkeypatch.setattr("liveselect.distributed.check_agreement", lambda what, value: None)
    monkeypatch.setattr("liveselect.distributed.gather_shards", lambda local, total: local)
    monkeypatch.setattr("liveselect.distributed.shard", lambda total, index=None, count=None: slice(0, total))
    ids, scores = torch.arange(BUDGET), torch.arange(float(BUDGET))
    monkeypatch.setattr("liveselect.distributed.gather_objects", lambda value: [value, value])
    assert alarms(tmp_path / "a", Fixed(ids, scores))[1] == []
    other = lambda value: [value, value if isinstance(value, dict) else "another"]  # noqa: E731
    monkeypatch.setattr("liveselect.distributed.gather_objects", other)
    assert alarms(tmp_path / "b", Fixed(ids, scores))[1] == [(0, "ranks")]


def test_alarms_stand_in_the_ledger_and_in_its_file(tmp_path):
    run, _ = alarms(tmp_path, regression(regressor=Regressor(-0.5)), TokenCount())
    alarm = run.ledger.rounds[0].alarms[0]
    assert alarm == Alarm(0, 0, "regressor", alarm.text)
    run.ledger.write(tmp_path / "ledger.jsonl")
    assert Ledger.read(tmp_path / "ledger.jsonl").rounds[0].alarms == [alarm]
    restored = Ledger()
    restored.load_state_dict(run.ledger.state_dict())
    assert restored.rounds[0].alarms == [alarm]


def test_a_ledger_from_before_there_were_alarms_is_read(tmp_path):
    run, _ = alarms(tmp_path, UniformSelector())
    run.ledger.write(tmp_path / "ledger.jsonl")
    text = (tmp_path / "ledger.jsonl").read_text().replace(', "alarms": []', "")
    assert "alarms" not in text
    (tmp_path / "ledger.jsonl").write_text(text)
    assert Ledger.read(tmp_path / "ledger.jsonl").rounds == run.ledger.rounds


def test_a_watch_that_fails_is_noted_and_ends_nothing(tmp_path):
    class Failing(Watch):
        def look(self, scene):
            raise KeyError("lost")

    run, found = alarms(tmp_path, UniformSelector(), watch=Failing())
    assert found == []
    assert run.ledger.rounds[0].notes == ["the watch failed: KeyError('lost')"]


@pytest.mark.parametrize(("name", "value"), [("flip", 0.1), ("max_share", 0.0), ("max_uses", 0), ("canaries", -1)])
def test_bounds_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match="expected"):
        Watch(**{name: value})
