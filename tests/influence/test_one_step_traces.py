"""The one-step probe leaves no trace in the run that it measures."""

import pytest
import torch
import torch.nn.functional as F
from probing import backward, candidate_batch, measure, restless_context, step_of_training

from liveselect.preserve import checksum


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_measuring_in_the_middle_of_accumulation_leaves_everything_as_it_was():
    context = restless_context()
    context.optimizer.zero_grad()
    backward(context, context.source.tokens[:4])
    gradients = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in context.model.parameters()}
    before = checksum(context.model, context.optimizer), modes(context.model), torch.get_rng_state()
    measure(context, candidate_batch(context))
    after = checksum(context.model, context.optimizer), modes(context.model), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    for parameter, (kept, values) in gradients.items():
        assert parameter.grad is kept
        assert values is None or torch.equal(kept, values)


def test_training_after_measuring_is_training_without_measuring():
    def losses(measured):
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(1)  # of the dropout
            context = restless_context()
            found = []
            for rows in context.source.tokens[:16].split(4):
                found.append(step_of_training(context, rows))
                if measured:
                    measure(context, candidate_batch(context))
        return found, checksum(context.model, context.optimizer)

    assert losses(True) == losses(False)


@pytest.mark.parametrize("breaks_at", [1, 2, 3, 4, 5])
def test_an_exception_in_the_loss_leaves_everything_as_it_was(breaks_at):
    calls = []

    def fragile(model, batch):
        calls.append(1)
        if len(calls) == breaks_at:
            raise RuntimeError("out of luck")
        return F.cross_entropy(
            model(batch["input_ids"])[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        ).mean(1)

    context = restless_context(loss_fn=fragile)
    before = checksum(context.model, context.optimizer), modes(context.model)
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(context, candidate_batch(context))
    assert (checksum(context.model, context.optimizer), modes(context.model)) == before
    assert len(calls) == breaks_at
