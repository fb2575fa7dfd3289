"""Look-aheads with a model of a few weights: what is planted pays, what is exchangeable does not."""

import math
from dataclasses import replace

import pytest
import torch
from cases import Bigrams
from fakes import FakeSource, fake_context, planted_source, random_source

from liveselect.functional.confidence import MIN_VALUES
from liveselect.functional.curves import Curve, break_even
from liveselect.losses import causal_lm_loss
from liveselect.plan import Plan
from liveselect.preserve import checksum
from liveselect.verdict import Verdict
from liveselect.verdict.answer import HELD_OUT, POOL, Block, Costs, Look, judge, loss_slope
from liveselect.verdict.arms import TrainingSteps
from liveselect.verdict.looking import LookAhead
from liveselect.verdict.sets import HalfReference, first_rows

BATCH, LENGTH = 8, 4


def batch_of(source: FakeSource, ids):
    return {"id": ids, "input_ids": source.tokens[ids], "labels": source.tokens[ids]}


class Serving(FakeSource):
    """Serves training batches for a copy."""

    def training_batches(self, plan: Plan):
        return (batch_of(self, ids) for ids in plan.remaining(0, 1, self.batch_size))


def serving(source: FakeSource) -> Serving:
    return Serving(source.tokens, source.references, batch_size=BATCH)


class Run:
    """A training loop of rounds of ``LENGTH`` steps, with a look-ahead in each."""

    def __init__(self, source, chosen, seed=0, learning_rate=1e-3, **settings):
        self.source, self.chosen = source, chosen
        self.module = Bigrams()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=learning_rate)
        self.live = fake_context(source, model=self.module, optimizer=self.optimizer, global_batch=BATCH).live
        self.generator = torch.Generator().manual_seed(seed + 1)
        settings = {"share": 0.99, "steps": LENGTH, "rows": 16, **settings}
        self.look = LookAhead(Verdict(**settings), seed, 0, LENGTH)
        self.steps = TrainingSteps(lambda batch, index: causal_lm_loss(self.module, batch).mean())
        self.answers, self.step, self.total = [], 0, 10_000

    def train(self, rounds, overhead=0.0):
        for _ in range(rounds):
            self.begin_round()
            for _ in range(LENGTH):
                self.take_step(self.draw())
                if self.look.after_step(self.live, self.source, self.step):
                    self.answers.append(self.look.judge(Costs(overhead), self.step, self.total, 1))
        return self

    def draw(self):
        """Draw a batch of the chosen, or as the random arm does: none twice before all were drawn once."""
        if self.chosen is not None:
            return self.chosen[torch.randint(len(self.chosen), (BATCH,), generator=self.generator)]
        if self.step % LENGTH == 0:
            self.order = torch.randperm(self.source.pool.size, generator=self.generator)
        return self.order[self.step % LENGTH * BATCH :][:BATCH]

    def begin_round(self):
        index = self.step // LENGTH
        self.look.begin_block(index, self.step, self.total)
        if self.look.is_due(index, self.step, self.total, 1):
            candidates = torch.arange(self.source.pool.size)
            self.look.begin(self.live, self.steps, self.source, candidates, index, self.step, self.total)

    def take_step(self, ids):
        batch = batch_of(self.source, ids)
        causal_lm_loss(self.module, batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.look.note_batch(batch["input_ids"].numel())
        self.step += 1

    @property
    def said(self):
        return [answer.said for answer in self.answers]


@pytest.fixture(scope="module")
def planted():
    source, mask = planted_source(candidates=400, share=0.2, vocab=50)
    return Run(serving(source), mask.nonzero().flatten()).train(50)


def test_planted_data_pay(planted):
    said = planted.said
    assert said[-1] == "paying"
    first = planted.answers[said.index("paying")]
    assert first.blocks <= 12
    assert first.low > 0
    assert first.gains[HELD_OUT] > 0 > first.gains[POOL]  # narrowing costs where selection does not aim
    assert "paying: chosen data gained +" in first.sentence()


def test_nothing_is_said_before_the_noise_is_known(planted):
    early = [answer for answer in planted.answers if answer.looks < MIN_VALUES]
    assert {answer.said for answer in early} == {"cannot tell yet"}
    # the rule of thumb for the step of the answer is of the right size
    expected = planted.answers[8].expected_step
    found = planted.answers[planted.said.index("paying")].step
    assert found / 4 < expected < 4 * found


def test_data_that_spoil_the_reference_do_not_pay():
    source, mask = planted_source(candidates=400, share=0.5, vocab=50)
    run = Run(serving(source), (~mask).nonzero().flatten(), on_not_paying="random").train(40)
    assert run.said[-1] == "not paying"


def exchangeable(seed: int, rounds: int) -> Run:
    source = random_source(200, length=8, seed=seed, batch_size=BATCH)
    source = Serving(source.tokens, source.tokens[:16], batch_size=BATCH)
    return Run(source, None, seed=seed).train(rounds)


def test_exchangeable_candidates_hardly_ever_pay():
    runs = [exchangeable(seed, 20) for seed in range(12)]
    assert sum("paying" in run.said for run in runs) <= 1
    assert all(run.answers for run in runs)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_exchangeable_candidates_pay_in_a_twentieth_of_the_runs_at_most():
    runs = [exchangeable(1000 + seed, 40) for seed in range(400)]
    assert sum("paying" in run.said for run in runs) <= 20


def test_an_arm_on_the_chosen_data_ends_where_training_does(monkeypatch):
    source = serving(random_source(200))
    run = Run(source, torch.arange(200)).train(1)
    ids = torch.randint(200, (LENGTH * BATCH,), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr("liveselect.verdict.looking.random_ids", lambda *arguments: ids)
    run.look.forget()
    run.look._spent = -10.0  # so that one is due
    run.begin_round()
    for part in ids.split(BATCH):
        run.take_step(part)
        run.look.after_step(run.live, source, run.step)
    (look,) = run.look.looks
    assert look.chosen == look.random


def test_the_copy_leaves_no_trace(planted):
    before = checksum(planted.module, planted.optimizer), torch.get_rng_state()
    planted.begin_round()
    after = checksum(planted.module, planted.optimizer), torch.get_rng_state()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


def test_the_share_is_spent_and_not_exceeded():
    run = Run(serving(random_source(200)), torch.arange(200), share=0.25).train(60)
    assert run.look._spent == pytest.approx(len(run.look.looks) * run.look._price(LENGTH, 1), abs=7)
    assert 0.2 * run.step < run.look._spent <= 0.25 * run.step


def test_a_state_goes_on_as_if_it_had_not_stopped():
    stopped = Run(serving(random_source(200)), torch.arange(200)).train(4)
    stopped.look._spent = 0.0  # so that one is due
    stopped.begin_round()
    stopped.take_step(torch.arange(BATCH))
    again = LookAhead(stopped.look.settings, 0, 0, LENGTH)
    again.load_state_dict(stopped.look.state_dict())
    assert again.state_dict().keys() == stopped.look.state_dict().keys()
    for look in (stopped.look, again):
        twin = Run(serving(random_source(200)), torch.arange(200))
        twin.module.load_state_dict(stopped.module.state_dict())
        for step in range(stopped.step, stopped.step + LENGTH):
            look.after_step(twin.live, twin.source, step)
    assert again.looks == stopped.look.looks
    assert len(again.looks) > len(stopped.answers)


# ---- halves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 7, 30])
def test_the_halves_are_the_reference_set_cut_in_two(count):
    source = FakeSource(torch.arange(4 * count).view(count, 4), torch.arange(4 * count).view(count, 4), rows=3)
    seen, held_out = (
        [int(row[0]) for batch in HalfReference(source, 5, held).reference() for row in batch["input_ids"]]
        for held in (False, True)
    )
    assert sorted(seen + held_out) == [4 * index for index in range(count)]
    assert len(held_out) == count // 2
    assert HalfReference(source, 6, True).reference_fingerprint is None


def test_each_pair_of_neighbours_is_shared_out():
    source = FakeSource(torch.zeros(40, 4).long(), torch.arange(160).view(40, 4))
    held_out = [int(i) for batch in HalfReference(source, 5, True).reference() for i in batch["id"]]
    assert sorted(i // 2 for i in held_out) == list(range(20))
    assert len({i % 2 for i in held_out}) == 2


def test_first_rows_cut_the_last_batch():
    batches = [{"input_ids": torch.ones(3, 2)}, {"input_ids": torch.ones(3, 2)}]
    assert [len(batch["input_ids"]) for batch in first_rows(batches, 4)] == [3, 1]
    assert len(first_rows(batches, 3)) == 1


# ---- what the numbers say ------------------------------------------------------------------------------------------


def looks(gains, length=10, slope=0.0):
    return [
        Look(20 * i, length, {HELD_OUT: 5 - slope * i - gain, POOL: 4.0}, {HELD_OUT: 5 - slope * i, POOL: 4.0})
        for i, gain in enumerate(gains)
    ]


def noisy(mean, count, noise=0.01):
    return [mean + noise * (1 if i % 2 else -1) for i in range(count)]


def test_the_gain_is_set_against_what_the_cost_would_buy():
    series = looks(noisy(0.05, 24), slope=0.5)
    cheap, dear = (judge(series, Costs(share), 480, 20, 10_000) for share in (0.01, 5.0))
    assert (cheap.said, dear.said) == ("paying", "not paying")
    assert cheap.gain == pytest.approx(0.05) == dear.gain
    assert dear.price == pytest.approx(dear.slope * 5 * 10)
    assert dear.effect == pytest.approx((dear.gain - dear.price) / dear.noise)
    assert "its cost of 500.0% is worth" in dear.sentence()


def test_the_slope_is_that_of_a_loss_that_falls_with_the_logarithm_of_steps():
    series = [Look(s, 10, {HELD_OUT: 0.0}, {HELD_OUT: 7 - 0.3 * math.log(s + 10)}) for s in range(20, 200, 20)]
    assert loss_slope(series, 400) == pytest.approx(0.3 / 400)
    assert math.isnan(loss_slope(series[:2], 400))
    rising = [Look(look.step, 10, look.chosen, {HELD_OUT: -look.random[HELD_OUT]}) for look in series]
    assert loss_slope(rising, 400) == 0


def test_without_a_slope_nothing_is_said():
    same_place = [Look(5, 10, {HELD_OUT: 1.0 + i % 2 / 100}, {HELD_OUT: 3.0}) for i in range(30)]
    answer = judge(same_place, Costs(0.1), 480, 20, 10_000)
    assert answer.said == "cannot tell yet"
    assert "before the slope of the loss is known" in answer.sentence()


def looks_along(curve, length, gain, count):
    """Look-aheads whose random arms lie on a curve, and whose chosen ones gain as much in each."""
    spacing = 20
    found = []
    for index in range(count):
        step = spacing * (index + 1)
        loss = -float(curve.score(step + length))
        jitter = 1e-4 * (-1) ** index
        found.append(Look(step, length, {HELD_OUT: loss - gain + jitter}, {HELD_OUT: loss}))
    return found


def test_the_break_even_is_that_of_the_curve():
    # a curve of losses from 6 to 3 whose time constant is 200 steps
    curve, length = Curve(-6.0, -3.0, 1.0, 200.0), 10
    looks = looks_along(curve, length, gain=0.01, count=30)
    costs = Costs(running=0.02, once=0.1, once_steps=30.0)
    answer = judge(looks, costs, 600, 20, 10_000)
    assert not answer.doubt
    fall = float(curve.left(610)) / 200 * length
    faster = replace(curve, rate=1 + 0.01 / fall, selection_flops=30.0, overhead=0.02)
    there = break_even(faster, curve).flops
    assert answer.break_even["step"] == pytest.approx((there - 30) / 1.02, rel=0.02)
    assert answer.break_even["low"] <= answer.break_even["step"] <= answer.break_even["high"]
    assert f"ahead from step {answer.break_even['step']:,.0f} on" in answer.sentence()
    dear = judge(looks, Costs(running=5.0), 600, 20, 10_000)
    assert dear.break_even["step"] == math.inf
    assert "never ahead" in dear.sentence()
    assert dear.record()["break_even"]["step"] is None


def test_no_break_even_is_given_where_the_curve_cannot_be_known():
    few = judge(looks_along(Curve(-6.0, -3.0, 1.0, 200.0), 10, 0.01, 4), Costs(0.02), 600, 20, 10_000)
    assert (few.break_even, few.doubt) == ({}, "4 of 5 look-aheads so far")
    slow = judge(looks_along(Curve(-6.0, -3.0, 1.0, 100_000.0), 10, 0.01, 30), Costs(0.02), 600, 20, 10_000)
    assert not slow.break_even
    assert "time constants" in slow.doubt


def test_an_answer_that_the_run_is_too_short_for_is_not_promised():
    series = looks(noisy(0.001, 24, 0.05))
    far, near = judge(series, Costs(0.0), 480, 20, 600), judge(series, Costs(0.0), 480, 20, math.inf)
    assert far.expected_step is None
    assert "no answer is expected in this run" in far.sentence()
    assert near.expected_step > 600
    assert f"by step {near.expected_step}" in near.sentence()


def test_the_record_holds_builtins_only_and_no_infinities():
    record = judge(looks([0.1, 0.2]), Costs(0.1), 40, 20, 1000).record()
    assert record["low"] is None
    assert record["said"] == "cannot tell yet"
    assert record["gains"][HELD_OUT] == pytest.approx(0.15)
    assert record["sentence"].startswith("cannot tell yet: ")


# ---- switchback ----------------------------------------------------------------------------------------------------


def test_of_every_two_blocks_a_coin_draws_one_at_random():
    look = LookAhead(Verdict(switchback=2), 3, 1, LENGTH)
    rounds = [look.at_random(index) for index in range(1, 81)]
    blocks = [rounds[i : i + 2] for i in range(0, 80, 2)]
    assert all(first == second for first, second in blocks)
    assert all(blocks[i][0] != blocks[i + 1][0] for i in range(0, 40, 2))
    assert len({blocks[i][0] for i in range(0, 40, 2)}) == 2
    assert not look.at_random(0)  # the warm-up is random by itself


def test_alternating_blocks_are_watched_after_the_first_steps():
    run = Run(serving(random_source(200)), torch.arange(200), switchback=3).train(12)
    assert [block.index for block in run.look.blocks] == [0, 1, 2, 3]
    assert {block.steps for block in run.look.blocks} == {3 * LENGTH - LENGTH}
    assert sum(block.random for block in run.look.blocks) == 2
    assert all(block.after < block.before for block in run.look.blocks)


def test_both_estimates_stand_side_by_side():
    blocks = [Block(i, bool(i % 2), 10, 5.0, 4.9 if i % 2 else 4.8) for i in range(8)]
    answer = judge(looks([0.01]), Costs(0.1), 40, 20, 1000, blocks=blocks)
    assert answer.switchback["gain"] == pytest.approx(0.1)
    assert answer.switchback["pairs"] == 4
    assert "alternating blocks of rounds say +0.1000" in answer.sentence()
    assert answer.numbers()["switchback/gain"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share between 0 and 1"),
        ({"steps": 0}, "steps of at least 1"),
        ({"on_not_paying": "weep"}, "on_not_paying to be one of"),
        ({"cost": "dollars"}, "cost to be one of"),
        ({"switchback": -1}, "switchback"),
        ({"rows": 0}, "rows of at least 1"),
        ({"error": 1.0}, "error between 0 and 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Verdict(**settings)
