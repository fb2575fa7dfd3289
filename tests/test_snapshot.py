"""Snapshot and measuring: what they put back, to the last bit."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from liveselect.snapshot import Snapshot, checksum, measuring

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adamw with a tensor as learning rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "adam with amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "adafactor": torch.optim.Adafactor,
}


class Nested(torch.optim.Optimizer):
    """Keeps its state in every form that a snapshot knows, counts on itself and changes its groups."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {"lr": 0.1, "d": 1.0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        self.last_call = "now"
        for group in self.param_groups:
            group["d"] *= 1.5
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, inner={"sum": torch.zeros_like(parameter)}, past=[], pair=(torch.zeros(2), 1))
                state["step"] += 1
                state["inner"]["sum"].add_(parameter.grad)
                state["past"].append(parameter.grad.clone())
                state["pair"][0].add_(1)
                state["average"] = state["inner"]["sum"] / state["step"]  # a new tensor every time
                parameter.sub_(state["average"], alpha=group["lr"] * group["d"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 4)
        self.second.weight = nn.Parameter(self.first.weight.detach().t().clone())
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("spread", torch.zeros(1).expand(5))
        self.register_buffer("absent", None)

    def forward(self, x):
        return self.tied(self.second(self.norm(self.first(x)))) * self.frozen[0]


def setting(optimizer=torch.optim.AdamW, steps=3):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = Net()
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        for _ in range(steps):
            step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 3], ids=["cold", "warm"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.values(), Nested], ids=[*OPTIMIZERS, "nested state"])
def test_restoring_undoes_optimizer_steps_to_the_last_bit(optimizer, steps):
    model, optimizer = setting(optimizer, steps)
    before = checksum(model, optimizer)
    snapshot = Snapshot(model, optimizer)
    for _ in range(2):  # twice: what was restored can be changed and restored again
        step(model, optimizer)
        step(model, optimizer)
        assert checksum(model, optimizer) != before
        snapshot.restore()
        assert checksum(model, optimizer) == before


def test_steps_after_restoring_are_those_that_would_have_been():
    batches = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        return checksum(model, optimizer)

    for make in OPTIMIZERS.values():
        model, optimizer = setting(make)
        untouched = copy.deepcopy((model, optimizer))
        snapshot = Snapshot(model, optimizer)
        step(model, optimizer)
        snapshot.restore()
        assert train(model, optimizer) == train(*untouched)


def test_restoring_writes_into_the_same_storage_and_the_same_state_tensors():
    model, optimizer = setting(Nested)
    tensors = [*model.parameters(), *(optimizer.state[p]["average"] for p in optimizer.param_groups[0]["params"])]
    places = [tensor.data_ptr() for tensor in tensors]
    past = optimizer.state[model.first.weight]["past"]
    snapshot = Snapshot(model, optimizer)
    step(model, optimizer)
    snapshot.restore()
    now = [*model.parameters(), *(optimizer.state[p]["average"] for p in optimizer.param_groups[0]["params"])]
    assert [tensor.data_ptr() for tensor in now] == places
    assert optimizer.state[model.first.weight]["past"] is past
    assert len(past) == 3


def test_what_a_step_adds_to_the_optimizer_is_taken_away():
    model, optimizer = setting(Nested, steps=0)
    snapshot = Snapshot(model, optimizer)
    step(model, optimizer)
    snapshot.restore()
    assert len(optimizer.state) == 0
    assert optimizer.calls == 0
    assert not hasattr(optimizer, "last_call")
    assert optimizer.param_groups[0]["d"] == 1.0


def test_values_that_became_not_a_number_are_put_back():
    model, optimizer = setting()
    before = checksum(model, optimizer)
    snapshot = Snapshot(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert model.first.weight.isnan().all()
    snapshot.restore()
    assert checksum(model, optimizer) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: model.first.weight.data.flatten()[0].mul_(1 + 1e-7),
        lambda model, optimizer: model.frozen.data.neg_(),
        lambda model, optimizer: model.norm.running_mean.add_(1e-6),
        lambda model, optimizer: optimizer.state[model.first.bias]["exp_avg"].neg_(),
        lambda model, optimizer: optimizer.state[model.first.bias]["step"].add_(1),
        lambda model, optimizer: optimizer.param_groups[0].update(lr=0.2),
        lambda model, optimizer: optimizer.state.pop(model.first.bias),
    ],
)
def test_the_checksum_sees_the_smallest_change(change):
    model, optimizer = setting()
    before = checksum(model, optimizer)
    assert checksum(*copy.deepcopy((model, optimizer))) == before
    change(model, optimizer)
    assert checksum(model, optimizer) != before


def test_an_optimizer_whose_step_needs_a_closure_is_refused():
    model = Net()
    with pytest.raises(TypeError, match=r"LBFGS.step needs a closure.*AdamW, SGD"):
        Snapshot(model, torch.optim.LBFGS(model.parameters()))


def test_state_that_cannot_be_put_back_is_refused():
    model, optimizer = setting()
    optimizer.state[model.first.bias]["helper"] = nn.Identity()
    with pytest.raises(TypeError, match=r"the optimizer keeps a Identity, which cannot be put back exactly"):
        Snapshot(model, optimizer)


def disturb(model, optimizer):
    """Do all that measuring has to put right."""
    model.train()
    model.norm.eval()
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.norm.running_mean.add_(1)
    model.norm.num_batches_tracked = torch.tensor(7)
    model.register_buffer("late", torch.ones(1))


def observe(model, optimizer):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, None if p.grad is None else id(p.grad), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(buffer)) for name, buffer in model.named_buffers()],
        checksum(model, optimizer),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )


@pytest.mark.parametrize("raises", [False, True])
def test_measuring_puts_back_all_that_its_body_disturbed(raises):
    model, optimizer = setting()
    model.norm.eval()
    model.frozen.grad = None
    gradient = model.first.weight.grad
    values = gradient.clone()
    before = observe(model, optimizer)
    try:
        with measuring(model, optimizer):
            assert not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            disturb(model, optimizer)
            assert observe(model, optimizer) != before
            if raises:
                raise RuntimeError
    except RuntimeError:
        pass
    assert observe(model, optimizer) == before
    assert model.first.weight.grad is gradient
    assert torch.equal(gradient, values)


def test_modules_that_do_work_in_train_are_not_called():
    class Merging(Net):
        def train(self, mode=True):
            raise AssertionError("measuring must set flags, not call train()")

    model = Merging()
    with measuring(model, torch.optim.SGD(model.parameters())):
        assert not model.norm.training
    assert model.norm.training


def test_hooks_on_the_optimizers_step_are_silent_while_measuring():
    model, optimizer = setting()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("before any")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after any")),
    ]
    with measuring(model, optimizer):
        optimizer.step()
    assert calls == []
    optimizer.step()
    assert calls == ["before any", "before", "after", "after any"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4


def test_a_snapshot_taken_while_measuring_does_not_take_the_hooks_away():
    model, optimizer = setting()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with measuring(model, optimizer):
        snapshot = Snapshot(model, optimizer)
    snapshot.restore()
    optimizer.step()
    assert calls == [1]


def test_a_scheduler_does_not_notice_the_steps_of_a_measurement():
    model, optimizer = setting(steps=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = dict(vars(optimizer))
    with measuring(model, optimizer):
        snapshot = Snapshot(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        snapshot.restore()
    assert vars(optimizer).keys() == before.keys()
    assert scheduler.last_epoch == 0


def test_a_compiled_model_is_run_without_its_compiler_while_measuring():
    model, optimizer = setting()
    compiled_calls = []

    def backend(graph, inputs):
        compiled_calls.append(1)
        return graph.forward

    model.compile(backend=backend)
    with measuring(model, optimizer):
        model(torch.randn(3, 4))
    assert compiled_calls == []
    model(torch.randn(3, 4))
    assert compiled_calls


def test_gradients_are_available_while_measuring_from_a_block_without_them():
    model, optimizer = setting()
    with torch.no_grad(), measuring(model, optimizer):
        assert model(torch.randn(3, 4)).requires_grad
