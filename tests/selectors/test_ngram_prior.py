"""The prior of words: what it scores, that it is the same everywhere, and how selectors draw by it."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
from fakes import FakeSource, fake_context, planted_source, play, random_source
from ranks import on_ranks

from liveselect.cost import CostMeter
from liveselect.grammar import REFERENCE_SET, InfluenceEstimator, Selection, Selector
from liveselect.rounds import SelectionRun
from liveselect.selectors import NGramPrior, PriorSelector, ScoredSelector, UCBSelector, UniformSelector


def made(source, **settings):
    prior = NGramPrior(**settings)
    prior.prepare(source, CostMeter())
    return prior


def counted(rows):
    return Counter(itertools.chain.from_iterable([*((t,) for t in row), *itertools.pairwise(row)] for row in rows))


def test_a_score_is_the_mean_log_ratio_of_words_and_pairs_counted_by_hand():
    source = random_source(candidates=40, length=9, vocab=12)
    strength = 30.0
    pool, reference = counted(source.tokens.tolist()), counted(source.references.tolist())
    totals = {
        length: [sum(n for gram, n in counts.items() if len(gram) == length) for counts in (pool, reference)]
        for length in (1, 2)
    }

    def ratio(gram):
        pool_total, reference_total = totals[len(gram)]
        likely = pool[gram] / pool_total
        return math.log((reference[gram] + strength * likely) / (reference_total + strength) / likely)

    expected = [sum(ratio(gram) * n for gram, n in counted([row]).items()) / len(row) for row in source.tokens.tolist()]
    found = made(source, smoothing=strength, buckets=2**20).scores.values
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


def test_the_kind_of_the_reference_set_is_found_without_any_measurement():
    source, planted = planted_source(candidates=600, share=0.1)
    run = SelectionRun(ScoredSelector(True, ratio=0.1), None, UniformSelector(), 0, source)
    chosen = play(run, 40).ids
    assert planted[chosen].float().mean() > 0.9
    assert run.ledger.rounds[0].seconds["prior"] > 0  # a cost of selection


def test_an_exchangeable_pool_is_drawn_from_almost_at_random():
    source, _ = planted_source(candidates=600, share=1.0)
    scores = made(source).scores.values
    told_apart, _ = planted_source(candidates=600, share=0.1)
    assert scores.std() < 0.35 * made(told_apart).scores.values.std()


def test_scores_are_the_same_bits_in_batches_of_any_size():
    tokens = torch.randint(0, 50, (100, 33), generator=torch.Generator().manual_seed(0))
    found = [made(FakeSource(tokens, rows=rows)).scores.values for rows in (1, 7, 100)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_padding_counts_neither_behind_a_mask_nor_behind_the_last_target():
    plain = random_source(candidates=30)
    width = plain.tokens.shape[1]
    padded = torch.nn.functional.pad(plain.tokens, (0, 5))
    text = torch.arange(width + 5).expand(30, -1) < width
    expected = made(plain).scores.values
    masked = FakeSource(padded, plain.references, mask=text.long())
    unlabelled = FakeSource(padded, plain.references, labels=padded.masked_fill(~text, -100))
    for source in (masked, unlabelled):
        assert torch.allclose(made(source).scores.values, expected, atol=1e-6)


def kinds(share, references, seed=0, candidates=3000, length=24):
    """A source whose rows are of two kinds; a ``share`` is of the reference set's kind."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.rand(candidates, generator=generator) < share

    def of_kind(rows, first):
        return first + torch.randint(0, 30, (rows, length), generator=generator)

    tokens = torch.where(planted[:, None], of_kind(candidates, 0), of_kind(candidates, 15))
    return FakeSource(tokens, of_kind(references, 0))


def documents(count, seed, rows=16, length=24, words=1000):
    """Documents of rows in a row, each with words of its own beside those of all."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(100, 100 + words, (count, 1, 1, 4), generator=generator).expand(-1, rows, length, -1)
    drawn = own.gather(3, torch.randint(0, 4, (count, rows, length, 1), generator=generator)).squeeze(3)
    common = torch.randint(0, 100, (count, rows, length), generator=generator)
    return torch.where(torch.rand(count, rows, length, generator=generator) < 0.5, drawn, common).flatten(0, 1)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_the_width_is_the_share_of_the_pool_that_is_of_the_reference_sets_kind(share):
    prior = made(kinds(share, references=200))
    assert prior.width == pytest.approx(share, abs=0.04)
    assert prior.strength == 1.0


def test_a_pool_that_is_like_the_reference_set_is_kept_whole():
    prior = made(kinds(1.0, references=400))
    assert prior.width > 0.9
    assert prior.strength < 0.1


def test_no_share_narrower_than_a_twentieth_is_found():
    assert made(kinds(0.01, references=200)).width == 0.05


def test_documents_of_the_pools_own_kind_are_no_evidence_though_their_rows_share_words():
    priors = [made(FakeSource(documents(2000, seed), documents(24, seed + 1))) for seed in range(0, 8, 2)]
    assert sum(prior.strength for prior in priors) < 0.5 * len(priors)  # chance, and not each time the whole of it
    assert min(prior.width for prior in priors) > 0.8


class Recorded(FakeSource):
    """A source whose reference rows say of which record they are, and of which set."""

    def __init__(self, tokens, references, records, sets=None):
        super().__init__(tokens, references)
        self.records, self.sets = records, sets

    def reference(self):
        for batch in super().reference():
            marks = {"record": self.records[batch["id"]]}
            yield {**batch, **marks} if self.sets is None else {**batch, **marks, REFERENCE_SET: self.sets[batch["id"]]}


def test_rows_of_one_record_do_not_vouch_for_each_other_in_whatever_order_they_come():
    rows, order = documents(24, 1), torch.randperm(24 * 16, generator=torch.Generator().manual_seed(0))
    pool, records = documents(2000, 0), torch.arange(24).repeat_interleave(16)
    known, unknown = made(Recorded(pool, rows[order], records[order])), made(FakeSource(pool, rows[order]))
    assert known.strength < 0.5 < unknown.strength
    assert known.width > 0.8


@pytest.mark.parametrize("records", [torch.arange(192), torch.arange(192) // 8, torch.arange(192) % 96])
def test_a_reference_set_in_the_order_of_its_kinds_is_told_apart(records):
    """Rows of their own, documents, and two sets that count their records each: one kind after the other."""
    source = kinds(0.5, references=0)
    generator = torch.Generator().manual_seed(3)
    of_kinds = [first + torch.randint(0, 15, (96, 24), generator=generator) for first in (0, 60)]
    tokens = torch.cat([source.tokens, 45 + torch.randint(0, 30, (3000, 24), generator=generator)])
    sets = torch.arange(192) // 96 if records[-1] == 95 else None
    assert made(Recorded(tokens, torch.cat(of_kinds), records, sets)).strength == 1.0


def test_a_few_rows_of_reference_text_find_no_width():
    assert made(kinds(0.5, references=15)).width == 0.1


def test_a_selector_keeps_the_width_that_was_found_and_a_gate_its_multiple():
    source = kinds(0.3, references=200, candidates=1000)
    width = made(source).width
    plain, gated = ScoredSelector(True, ratio=None), PriorSelector(UniformSelector(), True, ratio=None, gate=2.5)
    for selector in (plain, gated):
        record = SelectionRun(selector, None, UniformSelector(), 0, source)
        play(record, 50)
        share = record.ledger.rounds[0].metrics["prior/ratio"]
        assert share == pytest.approx(width if selector is plain else 2.5 * width)
        assert selector.distinct_share() == pytest.approx(width)  # the gate lets the selector choose, and no more
    assert gated.warmup().distinct_share() == pytest.approx(width)
    for make in (ScoredSelector, partial(PriorSelector, UniformSelector())):
        with pytest.raises(ValueError, match="only an n-gram prior"):
            make([0.0], ratio=None)


def _scores(_: int) -> list[float]:
    source, _ = planted_source(candidates=101)
    prior = made(source)
    return [*prior.scores.values.tolist(), prior.strength, prior.width]


def test_two_ranks_make_the_same_prior_as_one_to_the_bit():
    one = _scores(0)
    assert on_ranks(_scores, 2, 0) == [one, one]


def test_it_is_made_once_and_again_when_the_reference_set_changes():
    source, _ = planted_source(candidates=200)
    prior, meter = NGramPrior(), CostMeter()
    assert prior.prepare(source, meter)
    before, read = prior.scores.values, source.read
    assert not prior.prepare(source, meter)
    assert source.read == read
    source.references = torch.randint(40, 60, (8, 24), generator=torch.Generator().manual_seed(5))
    assert prior.prepare(source, meter)
    assert torch.corrcoef(torch.stack([before, prior.scores.values]))[0, 1] < 0.5


def test_a_reference_that_moves_half_way_is_followed():
    source, planted = planted_source(candidates=600, share=0.1)
    run = SelectionRun(ScoredSelector(True, ratio=0.1, repeat=False), None, UniformSelector(), 0, source)
    assert planted[play(run, 30).ids].float().mean() > 0.9
    source.references = torch.randint(40, 60, (8, 24), generator=torch.Generator().manual_seed(5))
    assert planted[play(run, 30).ids].float().mean() < 0.1


def test_a_checkpoint_of_another_prior_is_refused_and_its_own_goes_on():
    source, _ = planted_source(candidates=200)
    saved = made(source).digest
    again = NGramPrior()
    again.expect(saved)
    assert again.digest == saved  # a checkpoint before the first round after a resume says the same
    again.prepare(source, CostMeter())
    assert again.digest == saved
    other = NGramPrior(smoothing=3.0)
    other.expect(saved)
    with pytest.raises(ValueError, match="not the one that the checkpoint was made with"):
        other.prepare(source, CostMeter())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"smoothing": 0.0}, "smoothing above 0"), ({"buckets": 1000}, "power of two")],
)
def test_what_makes_no_prior_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NGramPrior(**arguments)
    with pytest.raises(ValueError, match="leave column out"):
        ScoredSelector(NGramPrior(), column="edu")
    with pytest.raises(ValueError, match="got False"):
        ScoredSelector(False)


class Sees(Selector):
    """Takes the first of what it is given, and remembers it."""

    def select(self, round, budget):
        self.round = round
        return Selection(round.candidates[:budget])


def test_as_a_gate_it_narrows_and_as_an_offset_it_adds_standardised_scores():
    source, planted = planted_source(candidates=600, share=0.1)
    inner = Sees()
    selector = PriorSelector(inner, True, ratio=0.2, offset=2.0)
    play(SelectionRun(selector, None, UniformSelector(), 0, source), 40)
    kept, offset = inner.round.candidates, inner.round.offset
    assert len(kept) == 120
    assert planted[kept].sum() == 60
    assert offset[kept].mean().abs() < 1e-5
    assert offset[kept].std(correction=0).item() == pytest.approx(2.0, rel=1e-5)
    scores = made(source).scores.values
    assert torch.equal(offset[kept].argsort(stable=True), scores[kept].argsort(stable=True))
    outside = torch.ones(600, dtype=torch.bool)
    outside[kept] = False
    assert not offset[outside].any()


@pytest.mark.parametrize(("share", "uniform"), [(0.25, 0.2), (0.5, 0.2), (0.75, 0.6), (1.0, 1.0)])
def test_what_a_gate_cannot_let_through_is_drawn_uniformly(share, uniform):
    """Inside of an open gate one of two is chosen: that is 0.75 of the pool when half of the budget is uniform."""
    inner, prior = Sees(), NGramPrior()
    selector = PriorSelector(inner, prior, ratio=None, gate=2.0, keep_general=0.2)
    run = SelectionRun(selector, None, UniformSelector(), 0, kinds(0.5, references=60, candidates=1000))
    prior.prepare(run.source, CostMeter())
    prior.width = share
    play(run, 200)
    metrics = run.ledger.rounds[0].metrics
    assert metrics["prior/ratio"] == min(1.0, 2 * share)
    assert metrics["prior/uniform"] == pytest.approx(uniform, abs=1.01 / 200)  # one is left to the selector


def test_an_offset_alone_moves_even_a_uniform_draw_towards_the_reference_set():
    source, planted = planted_source(candidates=600, share=0.1)
    shares = {}
    for weight in (0.0, 2.0):
        selector = PriorSelector(UniformSelector(), True, ratio=1.0, offset=weight)
        chosen = play(SelectionRun(selector, None, UniformSelector(), 0, source), 60).ids
        shares[weight] = float(planted[chosen].float().mean())
    assert shares[0.0] < 0.25
    assert shares[2.0] > 0.6


def test_a_share_of_the_budget_is_kept_general():
    source, planted = planted_source(candidates=1000, share=0.2)
    selector = PriorSelector(UniformSelector(), True, ratio=0.2, keep_general=0.25)
    run = SelectionRun(selector, None, UniformSelector(), 0, source)
    chosen = play(run, 100).ids
    assert len(chosen.unique()) == 100
    general = 25
    assert (~planted[chosen]).sum() > 0.5 * general
    assert planted[chosen].sum() > 0.9 * (100 - general)


def test_the_warm_up_is_drawn_by_the_prior_and_not_at_random():
    source, planted = planted_source(candidates=600, share=0.1)
    run = SelectionRun(PriorSelector(UniformSelector(), True, ratio=0.2, gate=2.0), None, UniformSelector(), 1, source)
    assert planted[play(run, 50).ids].float().mean() > 0.8
    assert run.ledger.rounds[0].selector == "ScoredSelector"


def test_candidates_are_repeated_no_more_often_than_allowed():
    source, _ = planted_source(candidates=400, share=0.1)
    for most in (1, 2):
        source.pool.uses.zero_()
        selector = PriorSelector(UniformSelector(), True, ratio=0.1, temperature=0.0, max_uses=most)
        run = SelectionRun(selector, None, UniformSelector(), 0, source)
        for _ in range(3):
            play(run, 40)
        assert int(source.pool.uses.max()) == most


def test_a_run_that_is_resumed_draws_the_same_candidates():
    def run_on(source):
        return SelectionRun(PriorSelector(UniformSelector(), True, ratio=0.3), None, UniformSelector(), 1, source)

    first = run_on(planted_source(candidates=300)[0])
    plans = [play(first, 30).ids for _ in range(2)]
    state = first.state_dict()
    plans.append(play(first, 30).ids)
    resumed = run_on(planted_source(candidates=300)[0])
    resumed.load_state_dict(state)
    assert torch.equal(play(resumed, 30).ids, plans[2])


def test_a_round_that_nobody_prepared_says_who_would():
    with pytest.raises(RuntimeError, match="open_round calls prepare"):
        ScoredSelector(True).select(fake_context(random_source()).round, 4)


class Level(InfluenceEstimator):
    """Every candidate is worth the same, but for noise of its own."""

    def score(self, model, batch):
        return torch.sin(batch["id"].float() * 12.9898)


def test_arms_take_the_prior_as_an_offset_of_their_rewards():
    shares = {}
    for weight in (0.0, 5.0):
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randint(0, 4, (800,), generator=generator)
        tokens = torch.randint(0, 10, (800, 12), generator=generator) + 10 * kinds[:, None]
        names = tuple(f"kind {k}" for k in range(4))
        source = FakeSource(
            tokens, torch.randint(0, 10, (12, 12), generator=generator), groups=kinds, group_names=names
        )
        arms = UCBSelector(pulls=8, at_once=4, probes=4, controls=0, arms=1, tau=None, alpha=0.5)
        selector = PriorSelector(arms, True, ratio=1.0, offset=weight)
        run = SelectionRun(selector, Level(), UniformSelector(), 0, source)
        chosen = torch.cat([play(run, 20).ids for _ in range(3)])
        shares[weight] = float((kinds[chosen] == 0).float().mean())
    assert shares[5.0] > 0.9
    assert shares[5.0] > shares[0.0]
