"""Policies that compete inside of a run: the best one is found and followed, resumes and ranks agree."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_ranks import fit, on_lightning_ranks
from sampling import mostly_slow
from small_run import SIMPLE, BigramLM, Place, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import DataSelection, Portfolio
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import Selector
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.losses import causal_lm_loss
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import PortfolioSelector, RegressionSelector, ReplaySelector, ScoredSelector, UniformSelector
from liveselect.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")

# ---- a planted pool whose right width nobody knows -----------------------------------------------------------------

ROWS, STEPS, EVERY, SHARE = 3200, 240, 8, 0.2
JUNK, PLANTED = 0.1, 0.3
"""Shares of the pool: the best scores are junk, below them is what the reference looks like."""


class QuickLM(BigramLM):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Judge(Callback):
    """Notes the loss on text like the reference after every step."""

    def __init__(self, batch) -> None:
        self.batch, self.losses = batch, []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        with torch.no_grad():
            self.losses.append(float(causal_lm_loss(pl_module.model, self.batch).mean()))


def planted():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.tensor([7, 9] * 6)

    def like_reference(row):
        return torch.where(torch.rand(12, generator=generator) < 0.5, pattern, row)

    pool = rows(ROWS, seed=1)
    first, last = int(JUNK * ROWS), int((JUNK + PLANTED) * ROWS)
    for place in range(first, last):
        pool[place] = {"input_ids": like_reference(pool[place]["input_ids"])}
    reference = [{"input_ids": like_reference(row["input_ids"])} for row in rows(48, 5)]
    judged = torch.stack([like_reference(row["input_ids"]) for row in rows(256, 6)])
    data = SelectionDataModule(pool=pool, reference=reference, batch_size=4)
    return data, {"input_ids": judged, "labels": judged}


def policies():
    scores = -torch.arange(ROWS).float()
    widths = {f"width {width:g}": ScoredSelector(scores, width, temperature=0.0) for width in (JUNK, 0.4)}
    return {**widths, "random": UniformSelector()}


def planted_run(folder, selector):
    data, judged = planted()
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, every_n_steps=EVERY, warmup_rounds=0, dirpath=folder, verdict=Verdict(rows=16))
    judge = Judge(judged)
    settings = {**SIMPLE, "max_steps": STEPS, "precision": "32-true"}
    small_trainer(folder, [selection, judge], **settings).fit(QuickLM(), datamodule=data)
    return judge.losses, Ledger.read(folder / "ledger.jsonl"), selection.selector


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The portfolio, begun with the worst policy, and every policy alone."""
    folder = tmp_path_factory.mktemp("played")
    alone = {name: planted_run(folder / name, policy)[0] for name, policy in policies().items()}
    return alone, planted_run(folder / "portfolio", PortfolioSelector(policies(), share=SHARE))


def test_the_portfolio_ends_within_its_exploration_of_the_best_policy(played):
    alone, (losses, ledger, selector) = played
    best = min(alone, key=lambda name: alone[name][-1])
    assert best == selector.following == "width 0.4"
    led = [record.metrics["portfolio/following"] for record in ledger.rounds]
    before = EVERY * led.index(list(policies()).index(best))
    assert before <= STEPS / 6
    # what it spent before it followed the best one, and on copies, is all that it is behind
    cost = int(before + selector._spent)
    assert losses[-1] <= alone[best][STEPS - 1 - cost] + 0.01
    worst = max(each[-1] for each in alone.values())
    assert worst - losses[-1] > 0.7 * (worst - alone[best][-1])


def test_contests_cost_no_more_than_their_share_and_stand_in_the_ledger(played):
    _, (_, ledger, selector) = played
    assert 0 < selector._spent <= SHARE * STEPS
    spent = sum(record.flops.get("contest", 0.0) for record in ledger.rounds)
    judging = 0.35  # beside the steps of the copies: rows of the held-out half, of a model as small as this
    assert selector._spent / STEPS == pytest.approx(spent / ledger.training_flops, rel=judging)
    assert ledger.selection_flops > spent


def test_choices_are_in_the_ledger_with_their_reasons(played):
    _, (_, ledger, selector) = played
    notes = [note for record in ledger.rounds for note in record.notes]
    assert notes[0] == "follows width 0.1, and lets it compete with width 0.4, random"
    followed = [note for note in notes if note.startswith("follows width 0.4 in place of width 0.1")]
    assert "nats a round more" in followed[0]
    assert "contests, cost included" in followed[0]
    assert selector.dropped
    for name in selector.dropped:
        assert any(note.startswith(f"drops {name}: ") for note in notes)
    assert "portfolio/worth/random" in ledger.rounds[-1].metrics


# ---- resumes, ranks, refusals --------------------------------------------------------------------------------------


def competing():
    live = RegressionSelector(HashedRidgeRegressor(), probes=8, ratio=0.5, min_spearman=None)
    return PortfolioSelector({"random": UniformSelector(), "live": live}, share=0.9)


def trained(folder, ckpt_path=None, steps=16):
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    estimator, verdict = OneStepInfluence(step="in_batch"), Verdict(share=0.9, steps=3, cost="flops", rows=4)
    selection = DataSelection(competing(), estimator, every_n_steps=2, warmup_rounds=1, dirpath=folder, verdict=verdict)
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = small_trainer(folder, [Place(selection), selection, Trace(folder / "trace"), keep], max_steps=steps)
    trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
    return (folder / "trace").read_text().splitlines(), selection


def memory(selection):
    state = selection.selector.state_dict()
    return {name: state[name] for name in ("following", "dropped", "results", "ends", "costs", "spent", "entered")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder)


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
@pytest.mark.parametrize("step", mostly_slow([1, 2, 3, 4, 7], [3, 4]))
def test_a_run_that_is_resumed_anywhere_chooses_the_same(whole, tmp_path, step):
    folder, trace, selection = whole
    resumed, again = trained(tmp_path, ckpt_path=folder / f"step={step}.ckpt")
    assert resumed == trace[3 * step :]
    assert memory(again) == memory(selection)
    assert len(memory(again)["results"]) >= 2


def test_copies_leave_training_as_it_was(whole, tmp_path, monkeypatch):
    # until the first contest has an influence on what is followed, training is that of the first policy alone
    _, trace, _ = whole
    monkeypatch.setattr(PortfolioSelector, "contestants", lambda self: {})
    without, other = trained(tmp_path, steps=4)
    assert without == trace[:12]
    assert memory(other)["results"] == []


def test_a_run_that_holds_no_contest_soon_stops_to_pay_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(PortfolioSelector, "contestants", lambda self: {})
    _, selection = trained(tmp_path)
    entered = [record.metrics.get("portfolio/contestants", 0.0) for record in selection.run.ledger.rounds]
    assert sum(entered) == 2
    assert selection.selector.following == "random"


def on_ranks(folder, strategy, ranks):
    selection = DataSelection(
        competing(),
        OneStepInfluence(step="in_batch"),
        every_n_steps=2,
        warmup_rounds=0,
        dirpath=folder,
        verdict=Verdict(share=0.9, steps=2, cost="flops", rows=4),
    )
    found = fit(folder, selection, strategy, ranks=ranks, max_steps=12)
    return {**found, "memory": memory(selection)}


@pytest.mark.long
def test_ranks_choose_alike(tmp_path):
    first, second = on_lightning_ranks(on_ranks, 2, tmp_path / "two", "ddp", 2)
    assert first["memory"] == second["memory"]
    alone = on_ranks(tmp_path / "one", None, 1)["memory"]
    assert first["memory"]["following"] == alone["following"]
    for ours, theirs in zip(first["memory"]["results"], alone["results"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_what_cannot_compete_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a verdict sets aside: pass verdict="):
        DataSelection(competing(), OneStepInfluence())
    with pytest.raises(ValueError, match="leave out probes_between_steps and max_overhead"):
        DataSelection(competing(), OneStepInfluence(), verdict=Verdict(), max_overhead=0.1)
    with pytest.raises(ValueError, match="at least two selectors"):
        PortfolioSelector({"only": UniformSelector()})
    with pytest.raises(ValueError, match="'replay' is a ReplaySelector, which cannot be one of several"):
        PortfolioSelector({"random": UniformSelector(), "replay": ReplaySelector(tmp_path)})
    with pytest.raises(ValueError, match="share, what contests may cost"):
        PortfolioSelector(policies(), share=1.5)


def test_the_preset_has_widths_live_influence_and_chance():
    preset = Portfolio(50, ratios=(0.3, 0.1), verdict=None)
    assert isinstance(preset.selector, PortfolioSelector)
    assert list(preset.selector.policies) == ["prior 0.3", "prior 0.1", "live 0.2", "random"]
    assert preset.verdict == Verdict()
    assert preset.estimator is not None
    assert Portfolio(50, live_ratio=None).estimator is None
    with pytest.raises(ValueError, match="different ratios"):
        Portfolio(ratios=(0.1, 0.1))


class Costly(Selector):
    """Chooses at random, and says that it has computed much."""

    def __init__(self, flops: float) -> None:
        self.flops = flops

    def select(self, round, budget):
        round.meter.add_flops(self.flops)
        return UniformSelector().select(round, budget)


def test_what_gains_less_than_it_costs_is_not_followed(tmp_path):
    data, _ = planted()
    pl.seed_everything(1, verbose=False)
    selector = PortfolioSelector({"dear": Costly(1e12), "random": UniformSelector()}, share=0.5)
    selection = DataSelection(
        selector, every_n_steps=EVERY, warmup_rounds=0, dirpath=tmp_path, verdict=Verdict(rows=16)
    )
    settings = {**SIMPLE, "max_steps": 64, "precision": "32-true"}
    small_trainer(tmp_path, [selection], **settings).fit(QuickLM(), datamodule=data)
    assert selector.following == "random"
    assert selector._share_of_cost("dear") > 10
    assert math.isfinite(selector._price("dear"))
