"""The recommended preset in a Lightning run: what it chooses, what it costs, and what it leaves alone."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import BATCH, POOL, SIMPLE, SmallLM, Trace, rows, small_trainer, weights_hash
from two_ranks import batches, trained

from liveselect.callbacks import MATES, PDS, DataSelection, LivePDS, LiveSelection, Quad
from liveselect.callbacks.ahead import Pace
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import FirstOrderInfluence, PMPInfluence
from liveselect.regressors import HashedRidgeRegressor, TokenTableRegressor
from liveselect.selectors import PriorSelector, RegressionSelector, UniformSelector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
MANY = 600
ROUND = 5


def a_pool(count=MANY):
    """Rows of which every fifth has the words of the reference set, and the reference set."""
    pool, reference = rows(count, 1), rows(12, 2)
    for i, row in enumerate(pool):
        row["input_ids"] = row["input_ids"] % 15 if i % 5 == 0 else 15 + row["input_ids"] % 30
    for row in reference:
        row["input_ids"] = row["input_ids"] % 15
    return pool, reference


def live(folder, **settings):
    return LiveSelection(every_n_steps=ROUND, dirpath=folder / "selection", probes=12, **settings)


def fit(folder, selection, *callbacks, ckpt_path=None, **settings):
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    trainer = small_trainer(
        folder, [selection, Trace(folder / "trace"), *callbacks], **{**SIMPLE, "max_steps": 20, **settings}
    )
    module = SmallLM()
    pool, reference = a_pool()
    data = SelectionDataModule(pool=pool, reference=reference, validation=rows(8, 3), batch_size=BATCH)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    lines = [json.loads(line) for line in (folder / "trace").read_text().splitlines()]
    return trainer, module, [i for line in lines for i in line[2]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    selection = live(folder)
    settings = {"limit_val_batches": 1.0, "val_check_interval": 10, "check_val_every_n_epoch": None}
    half = ModelCheckpoint(folder, "half", every_n_train_steps=13, save_top_k=-1)
    _, module, trained_on = fit(folder, selection, half, **settings)
    return selection, module, trained_on


def test_the_kind_of_the_reference_set_is_found_from_the_first_round_on(whole):
    trained_on = whole[2]
    kind = (torch.tensor(trained_on) % 5 == 0).float()
    budget = ROUND * BATCH
    assert float(kind[:budget].mean()) >= 0.8  # the prior alone, a tenth of it general
    assert float(kind.mean()) > 0.65  # of a gate that is half of this kind, and a pool that is a fifth of it
    assert len(set(trained_on)) == len(trained_on)


def test_only_rounds_after_the_first_measure_and_say_how_well_they_predict(whole):
    records = whole[0].run.ledger.rounds
    assert not records[0].measured
    assert "prior" in records[0].seconds
    for record in records[1:]:
        assert len(record.measured) == 12
        assert {"regressor/spearman", "regressor/top_fifth", "regressor/held_out"} <= set(record.metrics)
        assert {"influence/trained", "influence/random", "effective_epochs"} <= set(record.metrics)


def test_a_sample_of_the_pools_own_mixture_is_held_out_and_evaluated(whole):
    selection, _, trained_on = whole
    held_out = selection.run.held_out
    assert len(held_out) == MANY // 50
    assert not set(held_out.tolist()) & set(trained_on)
    evaluations = selection.run.ledger.evaluations
    assert len(evaluations) == 2
    for entry in evaluations:
        assert {"val_loss", "mixture_loss"} <= set(entry.metrics)
        assert 0 < entry.metrics["mixture_loss"] < 10


def test_the_mixture_loss_is_the_token_mean_of_the_held_out_rows(whole):
    selection, module, _ = whole
    pool, _ = a_pool()
    tokens = torch.stack([pool[i]["input_ids"] for i in selection.run.held_out.tolist()])
    module.eval()
    with torch.no_grad():
        expected = float(module.model(input_ids=tokens, labels=tokens).loss)
    assert selection.session.mixture_loss() == pytest.approx(expected, rel=1e-2)


def test_measuring_leaves_training_bit_identical(tmp_path, whole):
    """The same plans trained on without any measuring end in the same weights."""
    from liveselect.callbacks import Replay

    selection, module, trained_on = whole
    folder = selection.dirpath
    _, again, replayed = fit(tmp_path, Replay(folder / "decisions", every_n_steps=ROUND, dirpath=tmp_path / "s"))
    assert replayed == trained_on
    assert weights_hash(again) == weights_hash(module)


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path, whole):
    selection, module, trained_on = whole
    half = selection.dirpath.parent / "half.ckpt"
    saved = torch.load(half, weights_only=True)["callbacks"]["DataSelection"]["run"]["estimator"]["state"]
    assert 0 < saved["rows"] < 8  # in the middle of a fit
    _, resumed, rest = fit(tmp_path, live(tmp_path), ckpt_path=half)
    assert rest == trained_on[13 * BATCH :]
    assert weights_hash(resumed) == weights_hash(module)


def test_measuring_is_spread_over_the_last_steps_of_a_round(whole):
    for record in whole[0].run.ledger.rounds[1:]:
        assert record.metrics["staleness/max"] == 1.0  # the step before took a part of the fit
        assert record.metrics["reference_examples"] == 8.0


def test_where_nothing_can_be_spread_all_is_measured_between_rounds():
    assert not LiveSelection(every_n_steps=1).ahead.pace
    assert not LiveSelection(estimator=PMPInfluence()).ahead.pace
    assert LiveSelection(max_overhead=0.05).ahead.pace == Pace(max_overhead=0.05)
    assert LiveSelection(cost=0.01).ahead.pace == Pace(last_share=0.04)


def two_ranks_parts():
    estimator = FirstOrderInfluence(engine="central_difference", slope_over="reference", reference_rows=4)
    inner = RegressionSelector(TokenTableRegressor(2**10), probes=13, ratio=0.5, temperature=0.0, trained_share=0.25)
    return {"selector": PriorSelector(inner, True, ratio=0.6, offset=1.0, keep_general=0.1), "estimator": estimator}


def test_two_ranks_choose_what_one_chooses(tmp_path):
    one = trained(tmp_path / "one", 1, **two_ranks_parts())
    two = trained(tmp_path / "two", 2, **two_ranks_parts())
    assert two[0] == two[1]
    assert batches(tmp_path / "two", 2)[0] == batches(tmp_path / "one", 1)[0]
    plans_one, plans_two = ([plan for plan, _, _ in each[0][0]] for each in (one, two))
    assert plans_one[0] == plans_two[0]  # drawn by the prior
    assert [measured for _, measured, _ in one[0][0]][1] == [measured for _, measured, _ in two[0][0]][1]
    for first, second in zip(one[0][0][1][2], two[0][0][1][2], strict=True):
        assert first == pytest.approx(second, rel=0.05, abs=1e-4)


@pytest.mark.parametrize(
    "selection",
    [
        lambda **a: MATES(regressor=HashedRidgeRegressor(), **a),
        lambda **a: PDS(torch.arange(float(POOL)), **a),
        lambda **a: LivePDS(regressor=HashedRidgeRegressor(), **a),
        lambda **a: Quad(**a),
    ],
    ids=["MATES", "PDS", "LivePDS", "Quad"],
)
def test_every_preset_takes_a_prior(selection):
    assert not isinstance(selection().selector, PriorSelector)
    with_prior = selection(prior=True, prior_ratio=0.3)
    assert isinstance(with_prior.selector, PriorSelector)
    assert with_prior.selector.ratio == 0.3
    assert isinstance(with_prior.selector.selector, type(selection().selector))


@pytest.mark.filterwarnings("error::liveselect.grammar.SelectionWarning")
def test_the_recommended_settings_warn_of_nothing_and_a_hard_choice_without_memory_does():
    LiveSelection()
    LiveSelection(prior=None)
    with pytest.raises(SelectionWarning, match="goes back and forth"):
        LiveSelection(regressor=TokenTableRegressor(forgetting=0.0))


def test_the_width_is_the_priors_own_where_it_has_one():
    own, scores, wide = LiveSelection(), LiveSelection(prior=torch.arange(9.0).numpy()), LiveSelection(ratio=0.8)
    assert (own.selector.ratio, own.selector.gate) == (None, 2.0)
    assert (scores.selector.ratio, scores.selector.gate) == (pytest.approx(0.2), 2.0)
    assert (wide.selector.ratio, wide.selector.gate) == (pytest.approx(1.0), 1.25)  # no gate is wider than the pool
    assert wide.selector.selector.ratio == pytest.approx(0.8)


def test_the_default_costs_what_it_says():
    budget = 1000 * 512
    selector, estimator = (part := LiveSelection(cost=0.02)).selector, part.estimator
    assert isinstance(selector, PriorSelector)
    probes = min(2048, selector.selector.probes * budget)
    rows_ = min(estimator.reference_rows, estimator.reference_share * budget)
    assert (2 * probes + 3 * rows_) / (3 * budget) <= 0.02
    small = 1600
    share = (2 * selector.selector.probes * small + 3 * estimator.reference_share * small) / (3 * small)
    assert share == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"ratio": 0.0}, "expected ratio"), ({"gate": 0.5}, "expected gate"), ({"cost": 1.0}, "expected cost")],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiveSelection(**arguments)
    with pytest.raises(ValueError, match="expected mixture_sample"):
        DataSelection(UniformSelector(), mixture_sample=-1)
