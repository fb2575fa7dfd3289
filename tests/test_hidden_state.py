"""State that forwards and hooks keep where no ``state_dict`` shows it: measuring leaves it as it was."""

import array
import functools
import itertools
import warnings
from collections import OrderedDict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cases import VOCABULARY, Bigrams
from fakes import fake_context, random_source
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.preserve import bit_sum, measuring


class Slots:
    __slots__ = ("__hidden", "calls", "norms")

    def __init__(self):
        self.calls, self.norms = 0, []

    def tick(self):
        self.calls += 1
        self.norms.append(1.0)
        self.__hidden = self.calls  # a slot that was never set
        return self.calls + len(self.norms)


class SlotsAndMore(Slots):
    def tick(self):
        self.more = super().tick() + getattr(self, "more", 0)
        return self.more


class Tracker:
    def __init__(self):
        self.calls = 0

    def hook(self, module, inputs, output):
        self.calls += 1
        return output * scaled(self.calls)

    def of_gradient(self, gradient):
        self.calls += 1
        return gradient * scaled(self.calls)

    def of_parameter(self, parameter):
        parameter.grad = self.of_gradient(parameter.grad)


class TrackingCallback(Tracker, pl.Callback):
    """Its hooks are methods of a callback, as those of activation monitors are."""


class Deep:
    def __init__(self, depth):
        self.calls, self.inner = 0, Deep(depth - 1) if depth else None

    def innermost(self):
        return self.inner.innermost() if self.inner else self

    def tick(self):
        last = self.innermost()
        last.calls += 1
        return last.calls


def scaled(number):
    return 1 + 0.01 * (int(number) % 7)


def closure():
    calls = 0

    def tick():
        nonlocal calls
        calls += 1
        return calls

    return tick


def function_attribute():
    def tick():
        tick.calls = getattr(tick, "calls", 0) + 1
        return tick.calls

    return tick


def mutable_default():
    def tick(calls=[0]):  # noqa: B006 - what is tested
        calls[0] += 1
        return calls[0]

    return tick


def counted_in(held, start=0):
    """Count in place ``start`` of a container or buffer."""

    def tick(model):
        held = model.held
        held[start] += 1
        return held[start]

    return lambda model: setattr(model, "held", held()), tick


class Stateful(Bigrams):
    """A language model whose output is scaled by what ``tick`` returns."""

    calls = 0

    def __init__(self, prepare, tick):
        super().__init__()
        self.tick = tick
        prepare(self)

    def forward(self, input_ids):
        return super().forward(input_ids) * scaled(self.tick(self))


def in_class(model):
    type(model).calls += 1
    return model.calls


def with_helper(make):
    return lambda model: setattr(model, "helper", make()), lambda model: model.helper.tick()


def with_function(make):
    return lambda model: setattr(model, "function", make()), lambda model: model.function()


def hooked(register):
    """A hook that counts, which ``register`` puts somewhere."""
    return register, lambda model: 0


def moved_in_place(model):
    with torch.no_grad():
        model.code.mul_(0.9).add_(0.5)
    return 10 * model.code.sum()


def moved_past_the_version(model):
    model.code.data = 0.9 * model.code.data + 0.5
    model.code.data.add_(0.5)
    return 10 * model.code.sum()


def with_frozen(tick):
    return lambda model: setattr(model, "code", nn.Parameter(torch.zeros(4), requires_grad=False)), tick


def in_hidden(model):
    hidden = model.listed["a"][0]
    hidden.running_mean.add_(1)
    hidden.weight.data.add_(1)
    hidden.calls = getattr(hidden, "calls", 0) + 1
    return hidden.calls + hidden.running_mean.sum() + hidden.weight.sum()


def list_of_tensors(model):
    model.held[-1].add_(1)
    return model.held[-1]


def grown(model):
    """Add an entry to a tensor, in place, and return the sum of all."""
    model.held.resize_(len(model.held) + 1).fill_(1)
    return model.held.sum()


def moved_elsewhere(model):
    model.held.data = torch.cat([model.held.data, torch.ones(1)])
    return model.held.sum()


def in_buffer(tick):
    return lambda model: model.register_buffer("held", torch.zeros(2)), tick


def exchanged(model):
    """Use two layers in turn, of which a third name tells the last one."""
    model.last = model.head if model.last is model.embed else model.embed
    return 1 + (model.last is model.head)


def added(model):
    model.add_module(f"more_{len(model._modules)}", nn.Identity())
    return len(model._modules)


def global_hook(model):
    tracker = Tracker()
    model.handle = register_module_forward_hook(
        lambda module, inputs, output: tracker.hook(module, inputs, output) if module is model.head else None
    )


KINDS = {
    "a helper with slots": with_helper(Slots),
    "a helper with slots and more": with_helper(SlotsAndMore),
    "a helper far inside of helpers": with_helper(lambda: Deep(12)),
    "a variable of a closure": with_function(closure),
    "an attribute of a function": with_function(function_attribute),
    "a default of a function": with_function(mutable_default),
    "a closure in a partial": with_function(lambda: functools.partial(closure())),
    "a bytearray": counted_in(lambda: bytearray(4)),
    "an array of Python": counted_in(lambda: array.array("q", [0, 0])),
    "an array of a subclass": counted_in(lambda: np.ma.zeros(3)),
    "a list of 100,000 numbers": counted_in(lambda: [0] * 100_000, 99_999),
    "a dict of 100,000 numbers": counted_in(lambda: dict.fromkeys(range(100_000), 0), 99_999),
    "a tensor at the end of a long list": (
        lambda model: setattr(model, "held", [torch.zeros(()) for _ in range(3000)]),
        list_of_tensors,
    ),
    "an attribute of the class": (lambda model: None, in_class),
    "a tensor that grows": (lambda model: setattr(model, "held", torch.zeros(2)), grown),
    "a tensor that moves": (lambda model: setattr(model, "held", torch.zeros(2)), moved_elsewhere),
    "a buffer that grows": in_buffer(grown),
    "a buffer that moves": in_buffer(moved_elsewhere),
    "a name of a module": (lambda model: setattr(model, "last", model.head), exchanged),
    "a module that is added": (lambda model: None, added),
    "a frozen parameter": with_frozen(moved_in_place),
    "a frozen parameter, past its version": with_frozen(moved_past_the_version),
    "a module in a list in a dict": (
        lambda model: setattr(model, "listed", {"a": [nn.BatchNorm1d(2)]}),
        in_hidden,
    ),
    "a method of a helper as hook": hooked(lambda model: model.head.register_forward_hook(Tracker().hook)),
    "a method of a callback as hook": hooked(lambda model: model.head.register_forward_hook(TrackingCallback().hook)),
    "a partial as hook": hooked(
        lambda model, tracker=Tracker: model.head.register_forward_hook(functools.partial(tracker.hook, tracker()))
    ),
    "a hook of a parameter": hooked(lambda model: model.head.weight.register_hook(Tracker().of_gradient)),
    "a hook after accumulation": hooked(
        lambda model: model.head.weight.register_post_accumulate_grad_hook(Tracker().of_parameter)
    ),
    "a hook of all modules": hooked(global_hook),
}


def step(model, tokens):
    """Return the loss of a forward, and the gradients of its backward."""
    loss = model(tokens).log_softmax(-1).square().mean()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


def steps(prepare, tick, estimator=None):
    """Return what two steps give, between which an estimator has measured."""
    Stateful.calls = 0
    model = Stateful(prepare, tick)
    source = random_source(candidates=8, vocab=VOCABULARY)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    context = fake_context(source, model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3))
    batch = next(context.round.batches(context.candidates))
    found = [step(model, batch["input_ids"])]
    if estimator is not None:
        before = bit_sum(model, context.optimizer)
        context.fit(estimator)
        assert context.score(estimator, batch).isfinite().all()
        assert bit_sum(model, context.optimizer) == before
    found.append(step(model, batch["input_ids"]))
    if "handle" in vars(model):
        model.handle.remove()
    return [value for each in found for value in each]


@pytest.mark.parametrize("estimator", [OneStepInfluence, FirstOrderInfluence], ids=lambda each: each.__name__)
@pytest.mark.parametrize(("prepare", "tick"), KINDS.values(), ids=KINDS)
def test_the_step_after_a_measurement_is_that_of_a_run_without(prepare, tick, estimator):
    alone, measured = steps(prepare, tick), steps(prepare, tick, estimator())
    assert all(map(torch.equal, alone, measured))
    half = len(alone) // 2
    assert not all(map(torch.equal, alone[:half], alone[half:]))


class Holding(Bigrams):
    """Holds modules where ``model.modules()`` does not look."""

    def __init__(self):
        super().__init__()
        self.listed = [nn.Dropout(0.5), OrderedDict(teacher=nn.Linear(VOCABULARY, VOCABULARY))]

    def forward(self, input_ids):
        return self.listed[1]["teacher"](self.listed[0](super().forward(input_ids)))


def test_hidden_modules_are_in_eval_mode_while_measuring_and_keep_their_gradients():
    model = Holding()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dropout, teacher = model.listed[0], model.listed[1]["teacher"]
    teacher.weight.grad = kept = torch.ones_like(teacher.weight)
    tokens = torch.arange(4)[None] % VOCABULARY
    with measuring(model, optimizer):
        assert not dropout.training
        assert not teacher.training
        assert torch.equal(model(tokens), model(tokens))
        model(tokens).sum().backward()
        assert teacher.weight.grad is not kept
    assert dropout.training
    assert teacher.training
    assert teacher.weight.grad is kept
    assert (kept == 1).all()


def test_the_settings_of_the_optimizer_are_put_back():
    model = Bigrams()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    group = optimizer.param_groups[0]
    with measuring(model, optimizer):
        group["lr"] *= 0.5
        group["new"] = 1
    assert group["lr"] == 0.1
    assert "new" not in group
    assert optimizer.param_groups[0] is group


def test_modes_are_left_alone_where_that_is_asked():
    model = Holding()
    model.head.eval()
    with measuring(model, torch.optim.SGD(model.parameters(), 0.1), training_mode=True):
        assert [module.training for module in model.modules()].count(False) == 1
        assert model.listed[0].training


def test_large_frozen_parameters_are_warned_of_and_seen_by_the_sum(monkeypatch):
    monkeypatch.setattr("liveselect.preserve.attributes.MAX_FROZEN_ENTRIES", 10)
    model = Bigrams()
    model.small, model.large = (nn.Parameter(torch.zeros(size), requires_grad=False) for size in (10, 11))
    optimizer = torch.optim.SGD([model.head.weight], 0.1)
    before = bit_sum(model, optimizer)
    with warnings.catch_warnings(record=True) as warned, measuring(model, optimizer), torch.no_grad():
        model.small.add_(1)
        model.large.add_(1)
    assert "a frozen parameter" in str(warned[0].message)
    assert model.small.sum() == 0
    assert model.large.sum() == 11
    assert bit_sum(model, optimizer) != before


def test_a_module_that_holds_all_its_data_is_measured_at_little_cost():
    model = Bigrams()
    model.rows = [{"text": [str(number)], "meta": {"n": number}} for number in range(200_000)]
    model.counter = Slots()
    began = list(itertools.islice(model.rows, 3))
    with measuring(model, torch.optim.SGD(model.parameters(), 0.1)):
        model.counter.tick()
        model.rows.append({})
    assert model.counter.calls == 0
    assert len(model.rows) == 200_000
    assert model.rows[:3] == began
