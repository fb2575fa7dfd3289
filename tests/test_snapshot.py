"""Snapshot and measuring: what they put back, to the last bit."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from cases import VOCABULARY, Bigrams
from fakes import fake_context, random_source
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from liveselect.grammar import SelectionWarning
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.preserve import Snapshot, bit_sum, checksum, measuring
from liveselect.preserve.attributes import MAX_COPIED_ENTRIES, Attributes

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


class Counts:
    """A helper that is no module."""

    def __init__(self):
        self.calls, self.norms, self.mean = 0, [], None


class Remembering(Bigrams):
    """Its forward changes the attribute that ``keep`` makes, by ``change``, and its output depends on it."""

    def __init__(self, keep, change):
        super().__init__()
        self.change = change
        keep(self)

    def forward(self, input_ids):
        out = super().forward(input_ids)
        return out * (1 + 0.01 * self.change(self, out.detach().square().mean()))


def set_to(name, value):
    return lambda module: setattr(module, name, value() if callable(value) else value)


def rebind(module, x):
    module.state = 0.9 * module.state + 0.1 * x
    return module.state


def rebind_list(module, x):
    module.state = [*module.state, float(x)][-5:]
    return sum(module.state)


def make_when_needed(module, x):
    module.state = getattr(module, "state", 0) + 1
    return module.state


def in_a_helper(module, x):
    helper = module.state
    helper.calls += 1
    helper.norms.append(float(x))
    helper.mean = x if helper.mean is None else 0.9 * helper.mean + 0.1 * x
    return helper.calls + sum(helper.norms) + helper.mean


def inside_of_a_dict(module, x):
    module.state["mean"].mul_(0.9).add_(x, alpha=0.1)
    return module.state["mean"]


def in_place(module, x):
    module.state += 0.01
    return float(module.state.reshape(-1)[0])


def with_a_hook(module, x):
    module.embed.register_forward_hook(lambda *_: None)
    module.installed = True
    return len(module.embed._forward_hooks)


CHANGES = {
    "a tensor bound anew": (set_to("state", lambda: torch.tensor(0.5)), rebind),
    "a number that becomes a tensor": (set_to("state", 0.0), rebind),
    "a list bound anew": (set_to("state", list), rebind_list),
    "an attribute that the first forward makes": (lambda module: None, make_when_needed),
    "an attribute that hides one of the class": (
        lambda module: setattr(Remembering, "state", 0),
        make_when_needed,
    ),
    "a generator of torch": (
        set_to("state", lambda: torch.Generator().manual_seed(3)),
        lambda module, x: torch.rand((), generator=module.state),
    ),
    "a generator of Python": (set_to("state", lambda: random.Random(3)), lambda module, x: module.state.random()),
    "a generator of numpy": (
        set_to("state", lambda: np.random.default_rng(3)),
        lambda module, x: module.state.random(),
    ),
    "an older generator of numpy": (
        set_to("state", lambda: np.random.RandomState(3)),
        lambda module, x: module.state.rand(),
    ),
    "a helper": (set_to("state", Counts), in_a_helper),
    "a tensor in a dict": (set_to("state", lambda: {"mean": torch.zeros(())}), inside_of_a_dict),
    "a tensor of 70,000 entries": (set_to("state", lambda: torch.zeros(70_000)), in_place),
    "an array": (set_to("state", lambda: np.zeros(5)), in_place),
    "a hook, and the note that it is there": (lambda module: None, with_a_hook),
}


@pytest.fixture
def as_the_class_was():
    yield
    if "state" in vars(Remembering):
        del Remembering.state


def bits_of(value):
    """Return a value so that equal means the same bits."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: bits_of(item) for key, item in value.items()}
    if isinstance(value, Counts):
        return bits_of(vars(value))
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tolist(), value.get_state()[2]
    return copy.copy(value)


def kept_by(module):
    """Return to what names are bound, what that holds, and the hooks."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return (
        {name: id(value) for name, value in own.items()},
        {name: bits_of(value) for name, value in own.items()},
        list(module.embed._forward_hooks),
    )


@pytest.mark.parametrize("estimator", [OneStepInfluence, FirstOrderInfluence], ids=lambda each: each.__name__)
@pytest.mark.parametrize(("keep", "change"), CHANGES.values(), ids=CHANGES)
def test_measuring_puts_back_what_a_forward_changes(keep, change, estimator, as_the_class_was):
    model = Remembering(keep, change)
    source = random_source(candidates=8, vocab=VOCABULARY)
    context = fake_context(source, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    batch = next(context.round.batches(context.candidates))
    before, bits = kept_by(model), bit_sum(model, context.optimizer)
    measure = estimator()
    context.fit(measure)
    assert context.score(measure, batch).isfinite().all()
    assert kept_by(model) == before
    assert bit_sum(model, context.optimizer) == bits
    model(batch["input_ids"])
    assert kept_by(model) != before
    assert bit_sum(model, context.optimizer) != bits or (change is with_a_hook and not before[2])


def test_what_is_too_large_to_copy_is_warned_of_and_seen_by_the_sum():
    model, optimizer = setting()
    model.history = torch.zeros(MAX_COPIED_ENTRIES + 1)
    before = bit_sum(model, optimizer)
    with (
        pytest.warns(SelectionWarning, match=r"the model changes Net.history in its forward"),
        measuring(model, optimizer),
    ):
        model.history[0] = 1
    assert bit_sum(model, optimizer) != before


def test_views_of_parameters_and_of_buffers_are_left_to_those_who_keep_them():
    model, _ = setting()
    model.flat = model.first.weight.detach().flatten()
    model.listed = [model.norm.running_mean]
    kept = Attributes(model)
    assert kept.tensors == []


def test_attributes_that_validation_made_in_inference_mode_are_put_back():
    model, optimizer = setting()
    with torch.inference_mode():
        model.mean = torch.ones(3)
    with measuring(model, optimizer), torch.inference_mode():
        model.mean.zero_()
    assert model.mean.tolist() == [1, 1, 1]


def test_a_backward_that_is_to_come_may_use_attributes_that_were_put_back():
    model, optimizer = setting()
    model.scale = torch.ones(6)
    loss = (model.first.bias * model.scale).sum()
    with measuring(model, optimizer):
        pass
    loss.backward()


def test_objects_of_libraries_are_not_touched():
    model, optimizer = setting()
    model.progress = torch.utils.data.TensorDataset(torch.zeros(1))
    with measuring(model, optimizer):
        model.progress.seen = 3
    assert model.progress.seen == 3


LAYOUTS = {"COO": Tensor.to_sparse, "CSR": Tensor.to_sparse_csr, "CSC": Tensor.to_sparse_csc}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_buffers_are_put_back_and_seen(layout):
    model = nn.Linear(3, 3)
    model.register_buffer("graph", LAYOUTS[layout](torch.eye(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = checksum(model, optimizer), bit_sum(model, optimizer)
    with measuring(model, optimizer):
        snapshot = Snapshot(model, optimizer)
        model.graph.values().mul_(2) if layout != "COO" else model.graph._values().mul_(2)
        assert checksum(model, optimizer) != before[0]
        assert bit_sum(model, optimizer) != before[1]
        snapshot.restore()
    assert (checksum(model, optimizer), bit_sum(model, optimizer)) == before


def test_which_parameters_are_trained_is_put_back():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    with measuring(model, torch.optim.SGD([model.weight], lr=0.1)):
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
