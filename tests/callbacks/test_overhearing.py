"""Any selector inside Trainer.fit learns what training steps tell of the influence of their own examples."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from hand_flops import forward
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_run import SIMPLE, TOKENS, ProbingUniform, SmallLM, Trace, rows, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.cli.fit import SelectionCLI
from liveselect.datamodules import SelectionDataModule
from liveselect.functional.gradients import example_dot
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.influence.training_step import TrainingStepScores
from liveselect.ledger import Ledger
from liveselect.preserve import measuring
from liveselect.regressors import HashedRidgeRegressor, TokenTableRegressor
from liveselect.selectors import PriorSelector, RegressionSelector

torch.set_num_threads(1)
STEPS, ROUND, BATCH = 8, 3, 4
ESTIMATORS = {"first order": lambda: FirstOrderInfluence(sampled=4), "kfac": lambda: KFACInfluence(factor_examples=8)}


def regression() -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(2**6), probes=8, ratio=0.5, min_spearman=None)


def selection(folder, selector=None, estimator="first order", **settings) -> DataSelection:
    settings = {"every_n_steps": ROUND, "overhear": ROUND, **settings}
    return DataSelection(selector or regression(), ESTIMATORS[estimator](), dirpath=folder / "selection", **settings)


def fit(folder, chosen, *callbacks, ckpt_path=None, **settings) -> Ledger:
    pl.seed_everything(1, verbose=False)
    simple = {**SIMPLE, "precision": "32-true", "max_steps": STEPS, **settings}
    trainer = small_trainer(folder, [chosen, *callbacks], **simple)
    data = SelectionDataModule(pool=rows(120, seed=1), reference=rows(6, seed=2), batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(SmallLM(dropout=0.0), datamodule=data, ckpt_path=ckpt_path)
    return Ledger.read(folder / "selection" / "ledger.jsonl")


class Measured(Callback):
    """Measures every batch with the live model and the direction of the round, in a pass of its own."""

    def __init__(self, chosen: DataSelection) -> None:
        self.chosen, self.influence, self.ids = chosen, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(batch["id"].tolist())
        if self.chosen.plan.round >= self.chosen.warmup_rounds:
            with measuring(pl_module, trainer.optimizers[0]):
                found = example_dot(pl_module, self.chosen.loss_fn, batch, self.chosen.estimator.direction())
            self.influence |= dict(zip(batch["id"].tolist(), found.tolist(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_training_example_gets_the_influence_that_a_pass_of_its_own_measures(tmp_path, estimator, accumulate):
    chosen = selection(tmp_path, estimator=estimator)
    measured = Measured(chosen)
    ledger = fit(tmp_path, chosen, measured, accumulate_grad_batches=accumulate, max_steps=STEPS // accumulate)
    heard = {}
    for record in ledger.rounds:
        heard |= dict(zip(record.overheard, record.overheard_influence, strict=True))
    assert heard.keys() == measured.influence.keys()
    assert len(heard) == BATCH * (STEPS - ROUND * accumulate)  # all but the warm-up
    expected = torch.tensor([measured.influence[i] for i in heard])
    torch.testing.assert_close(torch.tensor(list(heard.values())), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_listening_costs_is_selection_s_and_not_training_s(tmp_path, accumulate):
    ledgers = {}
    for overhear in (0, 1):
        chosen = selection(tmp_path / str(overhear), ProbingUniform(), overhear=overhear)
        steps = STEPS // accumulate
        ledgers[overhear] = fit(tmp_path / str(overhear), chosen, accumulate_grad_batches=accumulate, max_steps=steps)
    silent, heard = ledgers[0], ledgers[1]
    assert "overhearing" not in silent.around_seconds
    assert all("overhearing" not in record.flops for record in silent.rounds)
    assert heard.training_flops == silent.training_flops
    assert heard.around_seconds["overhearing"] > 0.0
    # all examples of a batch but the last are multiplied with the direction's matrices; the last is the rest of a sum
    sizes = {name: each.numel() for name, each in chosen.estimator.direction().items() if each is not None}
    matrices = sum(
        size
        for name, size in sizes.items()
        if name.endswith("weight") and "norm" not in name and "embed_in" not in name
    )
    batch = 2.0 * TOKENS * (BATCH - 1) * matrices + 2.0 * sum(sizes.values())
    looked_once = forward(SmallLM(), BATCH, TOKENS)
    for index, record in enumerate(heard.rounds[1:]):
        expected = accumulate * batch + (looked_once if index == 0 else 0.0)
        assert record.flops["overhearing"] == pytest.approx(expected, rel=0.01)  # products with biases as well


def test_only_the_first_steps_of_a_round_are_heard_on_request(tmp_path):
    chosen = selection(tmp_path, overhear=1)
    measured = Measured(chosen)
    ledger = fit(tmp_path, chosen, measured)
    firsts = {record.step: record.overheard for record in ledger.rounds[1:]}
    assert firsts == {step: measured.ids[step] for step in (3, 6)}


def test_a_direction_that_is_none_ends_the_run_with_a_sentence_where_it_is_asked_for(tmp_path):
    class Later(FirstOrderInfluence):
        """Cannot be tried before training starts."""

        rehearsed = False

        def direction(self):
            return torch.ones(3)

    chosen = DataSelection(PriorSelector(regression(), torch.arange(120.0), ratio=1.0), Later(), 3, overhear=1)
    with pytest.raises(TypeError, match=r"expected Later\.direction to return a mapping .*, got an object of Tensor"):
        fit(tmp_path, chosen)


def test_scores_of_a_training_step_refuse_a_direction_that_is_none():
    model = SmallLM()
    name, _ = next(model.named_parameters())
    for direction in (torch.ones(3), {name: 3.0}):
        with pytest.raises(TypeError, match="expected a direction"):
            TrainingStepScores(model, direction)


def test_a_regressor_learns_from_what_was_heard_also_behind_a_prior(tmp_path):
    prior = PriorSelector(regression(), torch.arange(120.0), ratio=1.0)
    for name, selector in {"alone": regression(), "behind a prior": prior}.items():
        folder = tmp_path / name
        ledger = fit(folder, selection(folder, selector))
        assert "overheard" not in ledger.rounds[1].metrics  # the warm-up tells nothing
        assert ledger.rounds[2].metrics["overheard"] == BATCH * ROUND


class Taught(TokenTableRegressor):
    """Notes what it learned from."""

    def __init__(self):
        super().__init__(2**8)
        self.lessons = []

    def fit_tokens(self, round, ids, influence, tokens):
        self.lessons.append((ids, influence, tokens))
        return super().fit_tokens(round, ids, influence, tokens)


def test_a_regressor_of_tokens_learns_the_tokens_that_steps_have_shown(tmp_path):
    regressor = Taught()
    selector = RegressionSelector(regressor, probes=8, ratio=0.5, min_spearman=None)
    fit(tmp_path, selection(tmp_path, selector))
    assert len(regressor.lessons) == 2
    ids, influence, tokens = regressor.lessons[-1]
    assert len(ids) == len(influence) == len(tokens) == 8 + BATCH * ROUND
    known = tokens.isfinite()
    assert known.any(dim=1).all()  # of what was measured and of what was captured
    torch.testing.assert_close(tokens.nanmean(dim=1), influence, rtol=1e-3, atol=1e-4)


def test_listening_to_every_step_does_not_change_the_training(tmp_path):
    traces = []
    for overhear in (0, ROUND):
        folder = tmp_path / str(overhear)
        folder.mkdir()
        fit(folder, selection(folder, ProbingUniform(), overhear=overhear), Trace(folder / "trace"))
        traces.append((folder / "trace").read_text())
    assert traces[0] == traces[1]


def test_equally_long_examples_are_looked_at_once_to_know_what_the_training_loss_is(tmp_path):
    chosen, calls = selection(tmp_path), []
    capture = chosen.overhearing.capture
    loss_fn = capture.loss_fn
    capture.loss_fn = lambda *given: calls.append(1) or loss_fn(*given)
    ledger = fit(tmp_path, chosen)
    assert sum(len(record.overheard) for record in ledger.rounds) == BATCH * (STEPS - ROUND)
    assert len(calls) == 1


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The folder of checkpoints and the ledger of a run that nothing stopped, for each estimator."""
    found = {}
    for estimator in ESTIMATORS:
        folder = tmp_path_factory.mktemp("whole")
        saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
        found[estimator] = folder / "checkpoints", fit(folder, selection(folder, estimator=estimator), saver)
    return found


@pytest.mark.parametrize(("estimator", "step"), [("first order", 3), ("first order", 6), ("kfac", 4)])
def test_a_run_that_goes_on_from_any_step_of_a_round_hears_and_chooses_the_same(tmp_path, wholes, estimator, step):
    checkpoints, whole = wholes[estimator]
    chosen = selection(tmp_path / "resumed", estimator=estimator)
    resumed = fit(tmp_path / "resumed", chosen, ckpt_path=checkpoints / f"step={step}.ckpt")
    assert [r.plan for r in resumed.rounds] == [r.plan for r in whole.rounds]
    assert [r.overheard for r in resumed.rounds] == [r.overheard for r in whole.rounds]
    assert [r.overheard_influence for r in resumed.rounds] == [r.overheard_influence for r in whole.rounds]


def test_any_selector_listens_from_a_configuration_file_too(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        """
        model: {class_path: small_run.SmallLM}
        data:
          class_path: liveselect.datamodules.SelectionDataModule
          init_args: {pool: pool, reference: reference, batch_size: 4}
        select:
          class_path: liveselect.callbacks.DataSelection
          init_args:
            overhear: 5
            selector:
              class_path: liveselect.selectors.RegressionSelector
              init_args: {regressor: liveselect.regressors.HashedRidgeRegressor, probes: 16}
            estimator: {class_path: liveselect.influence.FirstOrderInfluence, init_args: {step: published}}
        """
    )
    (chosen,) = [
        each
        for each in SelectionCLI([f"--config={config}"], run=False).trainer.callbacks
        if isinstance(each, DataSelection)
    ]
    assert chosen.overhearing.steps == 5
    assert chosen.estimator.step == "published"


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        (lambda: OneStepInfluence(), {"overhear": 1}, "OneStepInfluence compares gradients with no direction"),
        (lambda: FirstOrderInfluence(engine="optimizer_step"), {"overhear": 1}, "another engine than optimizer_step"),
        (lambda: None, {"overhear": 1}, "no direction"),
        (KFACInfluence, {"overhear": -1}, "zero or more optimizer steps"),
        (KFACInfluence, {"overhear": 2, "probes_between_steps": 4}, "at most 1 together with probes_between_steps"),
    ],
)
def test_what_cannot_be_heard_is_refused_at_construction(estimator, settings, message):
    with pytest.raises(ValueError, match=message):
        DataSelection(regression(), estimator(), **settings)


class FailsOnce(Callback):
    """Ends the first fit inside of a captured step."""

    failed = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4 and not self.failed:
            self.failed = True
            raise OSError("the first fit fails")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_fit_after_one_that_failed_in_a_captured_step_knows_nothing_of_it(tmp_path, wholes, resumed):
    checkpoints, whole = wholes["first order"]
    ckpt_path = checkpoints / "step=3.ckpt" if resumed else None
    twice = selection(tmp_path / "twice")
    with pytest.raises(OSError, match="the first fit fails"):
        fit(tmp_path / "twice", twice, FailsOnce())
    again = fit(tmp_path / "twice", twice, ckpt_path=ckpt_path)
    for one, other in zip(whole.rounds, again.rounds, strict=True):
        assert (one.plan, one.overheard, one.overheard_influence) == (
            other.plan,
            other.overheard,
            other.overheard_influence,
        )
