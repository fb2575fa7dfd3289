"""Optimizers that step together are measured as the step that they take together."""

import copy

import pytest
import torch
from fakes import fake_context, random_source
from probing import candidate_batch, mean_loss, tiny_model

from liveselect.functional.several_optimizers import SeveralOptimizers
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.preserve import Snapshot, checksum

RATE = 1e-3


def matrices_and_rest(model):
    named = list(model.named_parameters())
    is_matrix = {name: value.ndim == 2 and "emb" not in name and "head" not in name for name, value in named}
    return [value for name, value in named if is_matrix[name]], [value for name, value in named if not is_matrix[name]]


def muon_and_adamw(model):
    matrices, rest = matrices_and_rest(model)
    assert matrices
    assert rest
    return [torch.optim.Muon(matrices, lr=RATE), torch.optim.AdamW(rest, lr=RATE)]


@pytest.fixture
def context():
    model = tiny_model()
    source = random_source(16, vocab=20)
    optimizers = muon_and_adamw(model)
    for _ in range(3):
        mean_loss(model, source.tokens[:4]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return fake_context(source, model=model, optimizer=SeveralOptimizers(optimizers), global_batch=1)


def stepped(context, row):
    """Return the reference loss after both have stepped on a copy; ``row`` None is a step on zeros."""
    model, optimizers = copy.deepcopy((context.model, context.optimizer.inner))
    if row is not None:
        mean_loss(model, row).backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for optimizer in optimizers:
        optimizer.step()
    return mean_loss(model, context.source.references).item()


def test_the_one_step_probe_is_what_stepping_both_on_a_copy_gives(context):
    batch = candidate_batch(context)
    before = checksum(context.model, context.optimizer)
    estimator = OneStepInfluence(step="published")
    context.fit(estimator)
    found = context.score(estimator, batch)
    rest = stepped(context, None)
    expected = torch.tensor([(rest - stepped(context, row)) / RATE for row in batch["input_ids"].split(1)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert checksum(context.model, context.optimizer) == before


def test_the_step_that_is_taken_orders_candidates_as_the_probe_does(context):
    batch = candidate_batch(context)
    found = []
    for estimator in (OneStepInfluence(step="published"), FirstOrderInfluence("optimizer_step", step="published")):
        context.fit(estimator)
        found.append(context.score(estimator, batch))
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.99


def test_a_snapshot_puts_the_state_of_each_back(context):
    before = checksum(context.model, context.optimizer)
    snapshot = Snapshot(context.model, context.optimizer)
    mean_loss(context.model, context.source.references).backward()
    context.optimizer.step()
    for each in context.optimizer.inner:
        each.param_groups[0]["lr"] = 5.0
        each.added = 1
    assert checksum(context.model, context.optimizer) != before
    snapshot.restore()
    assert checksum(context.model, context.optimizer) == before
    assert not any(hasattr(each, "added") for each in context.optimizer.inner)


def test_groups_are_those_of_the_optimizers_after_a_state_was_loaded_too(context):
    matrices, rest = context.optimizer.inner
    rest.load_state_dict(copy.deepcopy(rest.state_dict()))
    rest.param_groups[0]["lr"] = 7.0
    assert [group["lr"] for group in context.optimizer.param_groups] == [RATE, 7.0]
    assert context.optimizer.param_groups[0] is matrices.param_groups[0]
