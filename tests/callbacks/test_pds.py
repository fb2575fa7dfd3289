"""PDS in a Lightning run: drawing from ready scores, and solving on the live model."""

import inspect
import json

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_run import POOL, SIMPLE, STEPS, SmallLM, Trace, small_data, small_trainer, weights_hash

from liveselect.callbacks import PDS, DataSelection, LivePDS, Replay
from liveselect.grammar import SelectionWarning
from liveselect.influence import FirstOrderInfluence, PMPInfluence
from liveselect.ledger import Ledger
from liveselect.regressors import HashedRidgeRegressor
from liveselect.scores import write_scores
from liveselect.selectors import PriorSelector, RegressionSelector, ScoredSelector, UniformSelector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


def fit(folder, selection, *callbacks, **settings):
    pl.seed_everything(1, verbose=False)  # of the dropout
    trainer = small_trainer(folder, [selection, Trace(folder / "trace"), *callbacks], **{**SIMPLE, **settings})
    module = SmallLM()
    trainer.fit(module, datamodule=small_data())
    lines = [json.loads(line) for line in (folder / "trace").read_text().splitlines()]
    return trainer, module, [i for line in lines for i in line[2]]


def live(**settings):
    estimator = PMPInfluence(**{"steps": 3, "score_every": 2, **settings})
    return LivePDS(estimator=estimator, regressor=HashedRidgeRegressor(), probes=12, every_n_steps=5, min_spearman=None)


def written_scores(folder):
    data = small_data()
    data.setup("fit")
    values = torch.arange(POOL, dtype=torch.float32)
    write_scores(folder, values, data.pool.fingerprint, {"method": "a test"})
    return folder


def test_a_run_trains_on_the_best_scored_share_and_no_candidate_twice(tmp_path):
    scores = written_scores(tmp_path / "scores")
    selection = PDS(str(scores), every_n_steps=4, ratio=0.5, temperature=0.0, dirpath=tmp_path / "s")
    _, _, trained_on = fit(tmp_path, selection)
    assert len(set(trained_on)) == len(trained_on) == 2 * STEPS
    assert set(trained_on) <= set(range(POOL // 2, POOL))
    assert [record.selector for record in selection.run.ledger.rounds] == ["ScoredSelector"] * 4


SOME = torch.where(torch.arange(POOL) < 20, torch.arange(POOL).float(), -torch.inf)


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
@pytest.mark.parametrize("settings", [{}, {"random_share": 0.25}, {"warmup_rounds": 1}], ids=str)
def test_candidates_with_a_score_are_used_equally_often_and_others_never(tmp_path, settings):
    selection = PDS(SOME, every_n_steps=4, repeat=False, dirpath=tmp_path / "s", **settings)
    _, _, trained_on = fit(tmp_path, selection, max_steps=24)  # rounds of 8, of 20
    first = 8 if settings.get("warmup_rounds") else 0
    assert set(trained_on[first:]) == set(range(20))
    counts = torch.tensor(trained_on).bincount(minlength=POOL)[:20]
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
def test_a_prior_whose_round_is_measured_between_steps_sees_only_candidates_with_a_score(tmp_path):
    selector = PriorSelector(RegressionSelector(HashedRidgeRegressor(), probes=8, min_spearman=None), SOME, ratio=1.0)
    selection = DataSelection(
        selector,
        FirstOrderInfluence(),
        every_n_steps=4,
        warmup_rounds=0,
        probes_between_steps=2,
        dirpath=tmp_path / "s",
    )
    _, _, trained_on = fit(tmp_path, selection, max_steps=20)
    counts = torch.tensor(trained_on).bincount(minlength=POOL)
    assert counts[:20].tolist() == [2] * 20
    assert {i for record in selection.run.ledger.rounds for i in record.measured} <= set(range(20))


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
def test_a_replay_comes_back_to_the_candidates_that_the_run_came_back_to(tmp_path):
    selection = PDS(SOME, every_n_steps=4, warmup_rounds=1, dirpath=tmp_path / "run" / "selection")
    (tmp_path / "run").mkdir()
    _, _, order = fit(tmp_path / "run", selection, max_steps=24)
    (tmp_path / "again").mkdir()
    _, _, again = fit(tmp_path / "again", Replay(tmp_path / "run", dirpath=tmp_path / "again"), max_steps=24)
    assert again == order


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
@pytest.mark.parametrize("warmup_rounds", [0, 2])
@pytest.mark.parametrize("as_prior", [False, True])
def test_fewer_scores_than_a_round_needs_are_told_before_training(tmp_path, warmup_rounds, as_prior):
    few = torch.where(torch.arange(POOL) < 7, 0.0, -torch.inf)
    selector = PriorSelector(UniformSelector(), few) if as_prior else ScoredSelector(few)
    selection = DataSelection(selector, every_n_steps=4, warmup_rounds=warmup_rounds, dirpath=tmp_path / "s")
    with pytest.raises(ValueError, match="needs 8 distinct candidates but the pool holds 60, of which 7 may be chosen"):
        fit(tmp_path, selection)
    assert selection.plan is None


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
def test_a_short_last_round_needs_no_more_than_it_trains_on(tmp_path):
    few = torch.where(torch.arange(POOL) < 7, 0.0, -torch.inf)
    for steps in (3, 4):  # a round of 4 steps would take 8 candidates
        folder = tmp_path / str(steps)
        folder.mkdir()
        selection = PDS(few, every_n_steps=4, dirpath=folder / "s")
        if steps == 3:
            fit(folder, selection, max_steps=steps)
        else:
            with pytest.raises(ValueError, match=r"needs 8 distinct candidates .* of which 7 may be chosen"):
                fit(folder, selection, max_steps=steps)


def test_a_warm_up_trains_on_nothing_that_may_never_be_chosen(tmp_path):
    known = torch.arange(POOL) < 9
    selection = PDS(torch.where(known, 0.0, -torch.inf), every_n_steps=4, warmup_rounds=1, dirpath=tmp_path / "s")
    _, _, trained_on = fit(tmp_path, selection, max_steps=6)
    assert known[torch.tensor(trained_on)].all()


def test_what_making_the_scores_cost_is_part_of_what_selection_costs(tmp_path):
    data = small_data()
    data.setup("fit")
    cost = {"seconds": {"train the proxy": 30.0, "pull back": 12.0}, "flops": {"pull back": 1e9}}
    write_scores(tmp_path / "scores", torch.zeros(POOL), data.pool.fingerprint, {"cost": cost})
    selection = PDS(tmp_path / "scores", every_n_steps=4, dirpath=tmp_path / "s")
    fit(tmp_path, selection)
    for ledger in (selection.run.ledger, Ledger.read(tmp_path / "s" / "ledger.jsonl")):
        assert (ledger.before_seconds, ledger.before_flops) == (cost["seconds"], cost["flops"])
        rounds = sum(record.total_seconds for record in ledger.rounds)
        around = sum(ledger.around_seconds.values())
        assert ledger.selection_seconds == pytest.approx(42.0 + rounds + around)
        around = sum(ledger.around_flops.values())
        assert ledger.selection_flops == pytest.approx(1e9 + around + sum(each.total_flops for each in ledger.rounds))


def test_scores_of_another_pool_end_the_run_before_it_trains(tmp_path):
    write_scores(tmp_path / "scores", torch.zeros(POOL), "another pool", {})
    with pytest.raises(ValueError, match="another pool"):
        fit(tmp_path, PDS(tmp_path / "scores", warmup_rounds=2, dirpath=tmp_path / "s"))
    assert not (tmp_path / "trace").exists()


def test_a_column_of_a_file_made_elsewhere_is_drawn_from(tmp_path):
    pq.write_table(pa.table({"edu": [float(i) for i in range(POOL)]}), tmp_path / "edu.parquet")
    scores = tmp_path / "edu.parquet"
    selection = PDS(scores, column="edu", every_n_steps=4, ratio=0.5, temperature=0.0, dirpath=tmp_path / "s")
    with pytest.warns(SelectionWarning, match=r"edu.parquet does not say of which pool"):
        _, _, trained_on = fit(tmp_path, selection)
    assert set(trained_on) <= set(range(POOL // 2, POOL))


def test_a_prior_of_another_pool_ends_the_run_before_it_trains(tmp_path):
    write_scores(tmp_path / "scores", torch.zeros(POOL), "another pool", {})
    prior = PriorSelector(UniformSelector(), tmp_path / "scores")
    with pytest.raises(ValueError, match="another pool"):
        fit(tmp_path, DataSelection(prior, warmup_rounds=2, dirpath=tmp_path / "s"))
    assert not (tmp_path / "trace").exists()


def test_solving_on_the_live_model_leaves_training_bit_for_bit_as_it_was(tmp_path):
    class Watching(PMPInfluence):
        """Solves and scores, and changes nothing about what is chosen."""

        rounds = 0

        def fit(self, model, round):
            Watching.rounds += 1
            return super().fit(model, round)

    hashes = []
    for watched in (True, False):
        folder = tmp_path / str(watched)
        folder.mkdir()
        selection = LivePDS(
            estimator=Watching(steps=3, score_every=2, snapshot_every=3),
            regressor=HashedRidgeRegressor(),
            probes=12,
            every_n_steps=5,
            min_spearman=0.999,  # no regressor is trusted: rounds are drawn uniformly after all was measured
            warmup_rounds=1 if watched else 99,
            dirpath=folder / "s",
        )
        _, module, trained_on = fit(folder, selection, accumulate_grad_batches=3)
        hashes.append((weights_hash(module), trained_on))
    assert Watching.rounds == 1 + 2  # a small fit is timed before training, then two rounds
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("dynamics", ["live", "sgd"])
def test_a_round_on_the_live_model_records_what_it_saw(tmp_path, dynamics):
    selection = live(dynamics=dynamics)
    selection.dirpath = tmp_path / "s"
    fit(tmp_path, selection)
    first, *later = selection.run.ledger.rounds
    assert first.selector == "UniformSelector"
    assert {record.selector for record in later} == {"RegressionSelector"}
    for record in later:
        assert len(record.measured) == 12
        assert torch.tensor(record.influence).isfinite().all()
        assert record.metrics["reference_loss_unrolled"] > 0
        assert {"unroll training", "pull back", "measure influence"} <= set(record.seconds)
    rates = [record.metrics["unroll_learning_rate"] for record in later]
    assert rates == pytest.approx([0.008] * 2 if dynamics == "sgd" else [3e-3] * 2)


def test_the_defaults_are_the_published_values():
    selection = PDS(torch.zeros(4))
    assert isinstance(selection.selector, ScoredSelector)
    assert (selection.selector.ratio, selection.selector.temperature) == (0.4, 0.1)
    assert (selection.warmup_rounds, selection.estimator) == (0, None)
    solved = LivePDS()
    assert (solved.selector.ratio, solved.selector.temperature, solved.warmup_rounds) == (0.4, 0.1, 1)
    assert (solved.estimator.steps, solved.estimator.score_every) == (100, 10)


def arguments_of(preset):
    return set(inspect.signature(preset).parameters) - {"run"}


def test_no_argument_of_one_way_is_accepted_by_the_other():
    regressor = HashedRidgeRegressor()
    for name in arguments_of(LivePDS) - arguments_of(PDS):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            PDS([1.0], **{name: None})
    for name in arguments_of(PDS) - arguments_of(LivePDS):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            LivePDS(regressor=regressor, **{name: None})
    with pytest.raises(ValueError, match="expected scores"):
        PDS(None)
