"""However a selector chooses, of one document no more is taken than the cap lets through."""

import pytest
import torch
from fakes import FakeSource, fake_context, play

from liveselect.datamodules import TokenStore, write_store
from liveselect.datamodules.rows.groups import open_pool
from liveselect.datamodules.rows.rows import StoreRows
from liveselect.rounds import SelectionRun
from liveselect.selectors import CappedSelector, PriorSelector, ScoredSelector, UniformSelector

torch.set_num_threads(1)
DOCUMENTS = torch.arange(240) // 12  # twenty documents of twelve candidates
BEST = torch.arange(240.0)  # the last document is the best


def a_source(documents=DOCUMENTS):
    source = FakeSource(torch.arange(len(documents)).view(-1, 1).expand(-1, 3))
    source.pool.documents = documents
    return source


def counts_of(ids):
    return torch.bincount(DOCUMENTS[ids], minlength=20)


def run_of(selector, source=None):
    return SelectionRun(selector, None, UniformSelector(), 0, source or a_source())


@pytest.mark.parametrize("make", [UniformSelector, lambda: ScoredSelector(BEST, ratio=0.2, temperature=0.0)])
def test_no_round_takes_more_of_a_document_than_it_may(make):
    run = run_of(CappedSelector(make(), per_document=2))
    for _ in range(3):
        ids = play(run, 30).ids
        assert counts_of(ids).max() <= 2
        assert run.ledger.rounds[-1].metrics["documents/most_of_one"] == 2
        assert run.ledger.rounds[-1].metrics["documents/chosen"] == len(DOCUMENTS[ids].unique())
        assert not any("let through" in note for note in run.ledger.rounds[-1].notes)


def test_without_the_cap_the_best_document_is_taken_whole_and_with_it_the_best_of_each():
    whole = play(run_of(ScoredSelector(BEST, ratio=0.05, temperature=0.0)), 12).ids
    assert counts_of(whole)[19] == 12
    capped = play(run_of(CappedSelector(ScoredSelector(BEST, ratio=0.5, temperature=0.0), 3)), 12).ids
    assert counts_of(capped).max() <= 3
    assert DOCUMENTS[capped].min() >= 10  # of the better half


def test_a_pass_takes_no_more_of_a_document_until_nothing_else_is_left():
    run = run_of(CappedSelector(UniformSelector(), per_document=3, over="pass"))
    taken = torch.zeros(20, dtype=torch.int64)
    for _ in range(3):
        taken += counts_of(play(run, 20).ids)
        assert taken.max() <= 3
    assert taken.tolist() == [3] * 20
    last = play(run, 20)
    assert "up to 4 were let through" in run.ledger.rounds[-1].notes[0]
    taken += counts_of(last.ids)
    assert taken.tolist() == [4] * 20  # the cap is raised by no more than is needed
    for _ in range(8):
        play(run, 20)
    assert run.pool.uses.tolist() == [1] * 240


def test_all_candidates_of_a_document_are_equally_likely():
    drawn = torch.zeros(240)
    for seed in range(200):
        source = a_source()
        selector = CappedSelector(UniformSelector(), per_document=1)
        drawn[play(SelectionRun(selector, None, UniformSelector(), 0, source, seed=seed), 20).ids] += 1
    assert drawn.view(20, 12).sum(dim=1).tolist() == [200.0] * 20
    share = 1 / 12
    assert (drawn / 200 - share).abs().max() < 4.5 * (share * (1 - share) / 200) ** 0.5


def test_leftovers_count_and_a_prior_and_the_general_part_keep_to_the_cap():
    source = a_source()
    leftovers = torch.arange(3)  # of the first document
    rest = torch.arange(3, 240)
    round_ = fake_context(source, candidates=rest, leftovers=leftovers).round
    ids = CappedSelector(UniformSelector(), per_document=3).select(round_, 57).ids
    assert counts_of(torch.cat([leftovers, ids])).tolist() == [3] * 20
    prior = PriorSelector(UniformSelector(), BEST, ratio=0.5, temperature=0.0, keep_general=0.5)
    chosen = play(run_of(CappedSelector(prior, per_document=2)), 24).ids
    assert counts_of(chosen).max() <= 2
    assert DOCUMENTS[chosen].min() < 10


def test_caps_that_cannot_be_kept_are_refused_before_training():
    with pytest.raises(ValueError, match="per_document of at least 1"):
        CappedSelector(UniformSelector(), 0)
    with pytest.raises(ValueError, match="expected over to be one of"):
        CappedSelector(UniformSelector(), over="epoch")
    source = FakeSource(torch.zeros(9, 3).long())
    with pytest.raises(ValueError, match="liveselect prepare"):
        CappedSelector(UniformSelector()).check(fake_context(source).round, 4)


def test_a_prepared_pool_knows_the_document_that_most_tokens_of_a_candidate_are_of(tmp_path):
    write_store(tmp_path / "pool", torch.arange(1, 41).view(10, 4), block_size=4, vocab_size=50)
    store = TokenStore(tmp_path / "pool")
    pool = open_pool(StoreRows(store), None)
    for row in range(len(store)):
        spans = {entry["id"]: entry["end"] - entry["start"] for entry in store.documents_of(row)}
        found = store.document(int(pool.documents[row]))["id"]
        assert spans[found] == max(spans.values())
