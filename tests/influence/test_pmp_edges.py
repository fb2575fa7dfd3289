"""What unrolling leaves behind, where it keeps things, how it goes on after a crash, and what it refuses."""

import pytest
import torch
from fakes import fake_context, random_source
from probing import VOCAB, restless_context, tiny_model
from ranks import on_ranks
from torch import nn
from unrolled_language_model import BATCH, CANDIDATES, RATE, warm_context

from liveselect import distributed
from liveselect.functional.updates import ClipNorm, ClipValue
from liveselect.grammar import NotMeasurableError
from liveselect.influence.pmp import PMPInfluence
from liveselect.influence.pmp.dynamics import find_clip, moving_parameters
from liveselect.influence.pmp.unroll import unrolled_ids
from liveselect.influence.pmp.vault import DiskVault
from liveselect.preserve import checksum, measuring

IDS = torch.arange(CANDIDATES)
SETTINGS = {"steps": 7, "score_every": 2, "batch_size": BATCH}


def solved(context, **settings):
    estimator = PMPInfluence(**{**SETTINGS, **settings})
    context.fit(estimator)
    return context.score_ids(estimator, IDS)


class Failing:
    """A loss function that counts its calls, and fails at one of them."""

    def __init__(self, loss_fn, fails_at=None):
        self.loss_fn, self.fails_at, self.calls = loss_fn, fails_at, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.loss_fn(model, batch)


# ---- traces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hessian", ["double_backward", "central_difference"])
def test_the_live_run_is_left_as_it_was(hessian):
    context = warm_context()
    gradients = [torch.randn_like(parameter) for parameter in context.model.parameters()]
    for parameter, gradient in zip(context.model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    context.model.train()
    before, random_state = checksum(context.model, context.optimizer), torch.get_rng_state()
    solved(context, hessian=hessian)
    assert checksum(context.model, context.optimizer) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(a.grad is b for a, b in zip(context.model.parameters(), gradients, strict=True))
    assert all(module.training for module in context.model.modules())


def test_a_model_with_dropout_buffers_ties_and_frozen_parts_is_left_as_it_was():
    context = restless_context()
    before = checksum(context.model, context.optimizer)
    first = solved(context, products="central_difference")
    assert checksum(context.model, context.optimizer) == before
    assert torch.equal(solved(context, products="central_difference"), first)
    assert first.isfinite().all()


@pytest.mark.parametrize("fails_at", [1, 4, 12, 20])
def test_an_error_in_the_middle_leaves_the_live_run_as_it_was(fails_at):
    context = warm_context()
    before = checksum(context.model, context.optimizer)
    with pytest.raises(KeyboardInterrupt):
        solved(context.but(loss_fn=Failing(context.loss_fn, fails_at)))
    assert checksum(context.model, context.optimizer) == before


def test_a_later_fit_forgets_the_one_before():
    context = warm_context()
    estimator = PMPInfluence(**SETTINGS)
    context.fit(estimator)
    first = context.score_ids(estimator, IDS)
    with torch.no_grad():
        for parameter in context.model.parameters():
            parameter.mul_(1.1)
    context.fit(estimator)
    assert not torch.equal(context.score_ids(estimator, IDS), first)
    assert torch.equal(context.score_ids(estimator, IDS), solved(context))


# ---- memory and disk --------------------------------------------------------------------------------------------


def test_a_folder_gives_the_same_bits_as_memory(tmp_path):
    context = warm_context()
    assert torch.equal(solved(context, directory=tmp_path), solved(context))


@pytest.mark.long
def test_a_finished_fit_is_not_repeated_and_an_interrupted_one_goes_on(tmp_path):
    context = warm_context()
    expected = solved(context)
    whole = Failing(context.loss_fn)
    context.but(loss_fn=whole).fit(PMPInfluence(**SETTINGS))
    for fails_at in (3, 8, 10, 14, 18, whole.calls):
        folder = tmp_path / str(fails_at)
        with pytest.raises(KeyboardInterrupt):
            solved(context.but(loss_fn=Failing(context.loss_fn, fails_at)), directory=folder)
        rest = Failing(context.loss_fn)
        estimator = PMPInfluence(**SETTINGS, directory=folder)
        context.but(loss_fn=rest).fit(estimator)
        assert torch.equal(context.score_ids(estimator, IDS), expected)
        assert rest.calls < whole.calls or fails_at == 3
        again = Failing(context.loss_fn)
        context.but(loss_fn=again).fit(PMPInfluence(**SETTINGS, directory=folder))
        assert again.calls == 1  # the reference loss of the live model


def _resumed_on_this_rank(folder):
    context = warm_context()
    estimator = PMPInfluence(**SETTINGS, directory=folder)
    context.fit(estimator)
    if distributed.rank() == 1:  # as if this one had been stopped before the last stretch
        vault = estimator._solved[0]
        for name in ("pair-0", "costate"):
            vault.drop(name)
    estimator = PMPInfluence(**SETTINGS, directory=folder)
    context.fit(estimator)
    return context.score_ids(estimator, IDS)


@pytest.mark.long
def test_ranks_that_were_stopped_at_different_places_begin_again_together(tmp_path):
    found = on_ranks(_resumed_on_this_rank, 2, tmp_path)
    expected = solved(warm_context())
    for values in found:
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("below", [6, 5, 2])
def test_a_stop_in_the_pull_back_may_be_followed_by_other_intervals_between_kept_states(tmp_path, monkeypatch, below):
    context, put = warm_context(), DiskVault.put

    def stop(self, name, value):
        put(self, name, value)
        if name == "costate" and value[0] == below:
            raise KeyboardInterrupt

    monkeypatch.setattr(DiskVault, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        solved(context, directory=tmp_path, snapshot_every=1)
    monkeypatch.setattr(DiskVault, "put", put)
    assert torch.equal(solved(context, directory=tmp_path, snapshot_every=3), solved(context))


def test_a_fit_whose_folder_another_one_took_says_so(tmp_path):
    context = warm_context()
    first = PMPInfluence(**SETTINGS, directory=tmp_path)
    context.fit(first)
    second = solved(context, directory=tmp_path, score_every=1)
    with pytest.raises(RuntimeError, match="a directory of its own"):
        context.score_ids(first, IDS)
    assert torch.equal(second, solved(context, score_every=1))


@pytest.mark.long
def test_other_clipping_and_other_losses_are_other_fits(tmp_path):
    context = warm_context()

    def doubled(model, batch):
        return 2 * context.loss_fn(model, batch)

    for other in (context, context.but(loss_fn=doubled), context.but(clip_gradients=lambda parameters: None)):
        assert torch.equal(solved(other, directory=tmp_path), solved(other))


def test_a_full_disk_is_told_with_what_to_do_and_loses_nothing(tmp_path, monkeypatch):
    context, save = warm_context(), torch.save
    saved = []

    def full(value, file):
        save(value, file)
        saved.append(file)
        if len(saved) == 5:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="make room, or choose another directory"):
        solved(context, directory=tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert torch.equal(solved(context, directory=tmp_path), solved(context))


def test_what_a_killed_process_left_half_written_goes_away_and_damaged_files_are_named(tmp_path):
    context = warm_context()
    expected = solved(context, directory=tmp_path)
    left = tmp_path / "rank-0" / "state-2.vault.1234.tmp"
    left.write_bytes(b"half")
    assert torch.equal(solved(context, directory=tmp_path), expected)
    assert not left.exists()
    kept = tmp_path / "rank-0" / "pair-0.vault.pt"
    kept.write_bytes(kept.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"pair-0.vault.pt is damaged .*: delete .*rank-0, and fit again"):
        solved(context, directory=tmp_path)


def test_a_model_whose_loss_is_not_finite_is_told_before_anything_is_unrolled():
    context = warm_context()
    with torch.no_grad():
        next(context.model.parameters()).fill_(torch.nan)
    loss_fn = Failing(context.loss_fn, fails_at=2)
    with pytest.raises(NotMeasurableError, match="nan before anything is unrolled"):
        context.but(loss_fn=loss_fn).fit(PMPInfluence(**SETTINGS))


def test_a_folder_left_by_another_model_or_other_settings_is_not_taken_for_this_one(tmp_path):
    context = warm_context()
    solved(context, directory=tmp_path)
    assert torch.equal(solved(context, directory=tmp_path, steps=5), solved(context, steps=5))
    with torch.no_grad():
        next(context.model.parameters()).add_(0.1)
    assert torch.equal(solved(context, directory=tmp_path), solved(context))


def test_unrolled_candidates_repeat_only_when_there_are_not_enough():
    context = warm_context()
    ids = torch.cat(unrolled_ids(context.round, 5, 8))
    assert sorted(ids.tolist()) == list(range(40))
    assert [len(part) for part in unrolled_ids(context.round, 7, 8)] == [8] * 7
    counts = torch.cat(unrolled_ids(context.round, 7, 8)).bincount(minlength=40)
    assert counts.min() == 1
    assert counts.max() == 2
    few = context.but(candidates=torch.tensor([3, 11]))
    assert set(torch.cat(unrolled_ids(few.round, 2, 3)).tolist()) == {3, 11}
    assert not torch.equal(ids, torch.cat(unrolled_ids(context.but(index=1).round, 5, 8)))


# ---- what the live run does with gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-3, 0.5, 100.0])
@pytest.mark.parametrize("kind", [ClipNorm, ClipValue])
def test_clipping_is_found_by_trying_it(kind, limit):
    clips = {ClipNorm: nn.utils.clip_grad_norm_, ClipValue: nn.utils.clip_grad_value_}
    context = warm_context().but(clip_gradients=lambda parameters: clips[kind](parameters, limit))
    with measuring(context.model, context.optimizer):
        found = find_clip(context.live, moving_parameters(context.live))
    assert type(found) is kind
    assert found.limit == pytest.approx(limit, rel=1e-9)


def test_no_clipping_is_found_as_none():
    context = warm_context(clipped=False)
    with measuring(context.model, context.optimizer):
        assert find_clip(context.live, moving_parameters(context.live)) is None


def halve(parameters):
    for parameter in parameters:
        parameter.grad.mul_(0.5)


def cut_the_first_half(parameters):
    nn.utils.clip_grad_norm_(parameters[: len(parameters) // 2], 1.0)


@pytest.mark.parametrize("clip", [halve, cut_the_first_half])
def test_clipping_of_another_kind_is_refused(clip):
    with pytest.raises(TypeError, match='dynamics="sgd"'):
        solved(warm_context().but(clip_gradients=clip))


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda parameters: torch.optim.NAdam(parameters), "NAdam, whose adjoint is not known"),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), "AdamW with amsgrad"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, maximize=True), "SGD with maximize"),
    ],
)
def test_optimizers_without_an_adjoint_are_refused_and_plain_sgd_is_offered(optimizer, message):
    context = warm_context()
    context = context.but(optimizer=optimizer(context.model.parameters()))
    with pytest.raises(TypeError, match=message):
        solved(context)
    assert solved(context, dynamics="sgd", learning_rate=RATE).isfinite().all()


def test_a_learning_rate_of_zero_is_refused():
    context = warm_context()
    context.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="positive learning rate to unroll"):
        solved(context)


def test_parameters_in_16_bits_are_refused():
    source = random_source(candidates=8, length=8, vocab=VOCAB)
    with pytest.raises(TypeError, match="16 bits"):
        solved(fake_context(source, model=tiny_model(torch.bfloat16)))


def test_an_unroll_that_diverges_says_so():
    with pytest.raises(ValueError, match="lower learning_rate"):
        solved(warm_context("sgd", clipped=False), learning_rate=1e30)


class Opaque(torch.autograd.Function):
    """Squares, by a kernel that autograd cannot look into: its backward is right, and a constant to a second one."""

    @staticmethod
    def forward(context, x):
        context.x = x.detach()
        return context.x**2

    @staticmethod
    def backward(context, gradient):
        return 2 * context.x * gradient


def test_a_kernel_that_hides_its_curvature_is_found_out():
    context = warm_context("sgd", clipped=False)
    plain = context.loss_fn
    context = context.but(loss_fn=lambda model, batch: Opaque.apply(plain(model, batch)))
    with pytest.raises(RuntimeError, match='hessian="central_difference"'):
        solved(context)
    assert solved(context, hessian="central_difference").isfinite().all()


def test_scoring_before_fitting_and_after_letting_go_is_an_error():
    with pytest.raises(RuntimeError, match="before fit"):
        warm_context().score(PMPInfluence(), {})
    context, estimator = warm_context(), PMPInfluence(steps=2)
    context.fit(estimator)
    assert context.score_ids(estimator, IDS).isfinite().all()
    estimator.release()
    with pytest.raises(RuntimeError, match="before fit"):
        context.score_ids(estimator, IDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"score_every": 0},
        {"batch_size": 0},
        {"dynamics": "adam"},
        {"hessian": "exact"},
        {"products": "ghost"},
        {"reference_weighting": "words"},
        {"learning_rate": 0.0},
        {"denominator_floor": -0.1},
        {"steps": 2.5},
        {"steps": 3, "schedule": [1.0]},
        {"steps": 2, "schedule": [1.0, float("nan")]},
        {"steps": 2, "schedule": [1.0, -1.0]},
    ],
)
def test_impossible_settings_are_refused_at_construction(settings):
    with pytest.raises(ValueError, match="expected"):
        PMPInfluence(**settings)


def test_a_candidate_without_a_finite_loss_has_no_number_and_disturbs_no_other():
    context = warm_context()
    estimator = PMPInfluence(**SETTINGS)
    context.fit(estimator)
    plain = context.score_ids(estimator, IDS)

    def spoiled(model, batch):
        losses = context.loss_fn(model, batch)
        return losses * torch.where(batch["id"] == 2, torch.nan, 1.0).to(losses)

    found = context.but(loss_fn=spoiled).score_ids(estimator, IDS)
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(found.nan_to_num(), plain.where(IDS != 2, 0.0), rtol=1e-12, atol=0)


def test_the_cost_of_unrolling_is_charged():
    context = warm_context()
    solved(context)
    assert context.meter.flops["unroll training"] > 0
    assert context.meter.flops["pull back"] > context.meter.flops["unroll training"]
