"""A tiny network, its training written out so that autograd can go through all of it, and our recursion beside it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from liveselect.functional.adjoint import Dynamics, State, Transition, final_costate, walk_back
from liveselect.functional.updates import AdamRule, ClipNorm, SGDRule

RATE = 0.1
FEATURES, HIDDEN, CLASSES, POINTS = 5, 7, 3, 12

SETTINGS = {
    "sgd": {},
    "sgd with decay": {"weight_decay": 0.2},
    "momentum": {"momentum": 0.9},
    "damped momentum with decay": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "adam": {"betas": (0.9, 0.99), "eps": 1e-8},
    "adam with coupled decay": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True},
}


def torch_optimizer(name, parameters, rate=RATE):
    settings = dict(SETTINGS[name])
    if "betas" not in settings:
        return torch.optim.SGD(parameters, lr=rate, **settings)
    kind = torch.optim.AdamW if settings.pop("decoupled", False) else torch.optim.Adam
    return kind(parameters, lr=rate, **settings)


def our_rule(name, rate=RATE):
    settings = dict(SETTINGS[name])
    if "betas" not in settings:
        return SGDRule(rate, **settings)
    beta1, beta2 = settings.pop("betas")
    return AdamRule(rate, beta1, beta2, **{"decoupled": False, **settings})


def losses(parameters, x, y):
    """Cross-entropy of each point, (n,)."""
    return F.cross_entropy(torch.tanh(x @ parameters["inner"].T) @ parameters["outer"].T, y, reduction="none")


@dataclass
class Problem:
    """Training on weighted points, and another set of points to be good at."""

    name: str = "sgd"
    steps: int = 7
    limit: float | None = None
    warm: bool = False
    schedule: tuple = ()
    dtype: torch.dtype = torch.float64
    scored: tuple | None = None  # the steps in which candidates take part; all by default
    points: dict = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        self.x, self.reference_x = normal(POINTS, FEATURES), normal(6, FEATURES)
        self.y = torch.randint(0, CLASSES, (POINTS,), generator=generator)
        self.reference_y = torch.randint(0, CLASSES, (6,), generator=generator)
        self.gamma = torch.rand(self.steps, POINTS, generator=generator, dtype=torch.float64).to(self.dtype) / POINTS
        self.start = {"inner": normal(HIDDEN, FEATURES) / 2, "outer": normal(CLASSES, HIDDEN)}
        self.rule = our_rule(self.name)
        kinds = self.rule.moments
        self.count = 3 if self.warm and kinds else 0
        self.moments = {
            name: tuple(normal(*value.shape) * 0.1 for _ in range(kinds)) for name, value in self.start.items()
        }
        if kinds == 2:
            self.moments = {name: (first, second.abs()) for name, (first, second) in self.moments.items()}
        if not self.warm:
            self.moments = {k: tuple(torch.zeros_like(value) for value in v) for k, v in self.moments.items()}
        if self.scored is None:
            self.scored = tuple(range(self.steps))

    def rate(self, step):
        return RATE * (self.schedule[step] if self.schedule else 1.0)

    def train_loss(self, parameters, step):
        return losses(parameters, self.x, self.y) @ self.gamma[step]

    def reference_loss(self, parameters):
        return losses(parameters, self.reference_x, self.reference_y).mean()

    def exact_scores(self):
        """- dF / d epsilon_n by autograd through the whole of training, (n,); epsilon enters at the scored steps."""
        epsilon = torch.zeros(POINTS, dtype=self.dtype, requires_grad=True)
        parameters = {name: value.clone().requires_grad_() for name, value in self.start.items()}
        moments, total = self.moments, 0.0
        for step in range(self.steps):
            loss = self.train_loss(parameters, step)
            if step in self.scored:
                loss = loss + losses(parameters, self.x, self.y) @ epsilon
            gradients = torch.autograd.grad(loss, parameters.values(), create_graph=True)
            gradient = dict(zip(parameters, gradients, strict=True))
            parameters, moments = written_out(self, parameters, gradient, moments, step)
            total = total + self.reference_loss(parameters)
        return -torch.autograd.grad(total, epsilon)[0]

    def dynamics(self):
        clip = None if self.limit is None else ClipNorm(self.limit)
        return Dynamics(dict.fromkeys(self.start, self.rule), clip, self.schedule)

    def forward(self):
        """All transitions, first to last."""
        state = State(self.start, self.moments, dict.fromkeys(self.start, self.count))
        transitions = []
        for step in range(self.steps):
            gradient = gradient_of(lambda parameters, step=step: self.train_loss(parameters, step), state.parameters)
            after = self.dynamics().step(state, gradient, step)
            transitions.append(Transition(step, state, gradient, after))
            state = after
        return transitions

    def reference_gradient(self, state):
        return gradient_of(self.reference_loss, state.parameters)

    def hessian_product(self, transition, vector):
        return hessian_product(
            lambda parameters: self.train_loss(parameters, transition.index), transition.before.parameters, vector
        )

    def products(self, transition, toward):
        """Inner products of every point's gradient with a direction, (n,)."""
        at = transition.before.parameters
        return torch.func.jvp(lambda parameters: losses(parameters, self.x, self.y), (at,), (toward,))[1]

    def scores(self):
        """The same as exact_scores by the costate recursion."""
        transitions = self.forward()
        end = transitions[-1].after
        walk = walk_back(
            self.dynamics(),
            final_costate(self.reference_gradient(end), end),
            reversed(transitions),
            self.reference_gradient,
            self.hessian_product,
        )
        return -sum(self.products(step, toward) for step, toward, _ in walk if step.index in self.scored)


def gradient_of(function, parameters):
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    return dict(zip(leaves, torch.autograd.grad(function(leaves), leaves.values()), strict=True))


def hessian_product(function, parameters, vector):
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    first = torch.autograd.grad(function(leaves), leaves.values(), create_graph=True)
    products = torch.autograd.grad(first, leaves.values(), list(vector.values()))
    return dict(zip(leaves, products, strict=True))


def guarded_sqrt(value):
    """The square root with slope zero at zero, where autograd's own would be infinite."""
    return torch.sqrt(value.where(value > 0, 1.0)).where(value > 0, 0.0)


def written_out(problem, parameters, gradient, moments, step, sqrt=torch.sqrt):
    """One update of SGD, momentum, Adam or AdamW in formulas of the textbook, open to autograd."""
    settings, rate, count = SETTINGS[problem.name], problem.rate(step), problem.count + step + 1
    if problem.limit is not None:
        length = torch.sqrt(sum((value**2).sum() for value in gradient.values()))
        factor = (problem.limit / (length + 1e-6)).clamp(max=1.0)
        gradient = {name: value * factor for name, value in gradient.items()}
    decay = settings.get("weight_decay", 0.0)
    decoupled = settings.get("decoupled", False)
    after, moments_after = {}, {}
    for name, theta in parameters.items():
        g = gradient[name] if decoupled else gradient[name] + decay * theta
        if "betas" in settings:
            (beta1, beta2), eps = settings["betas"], settings["eps"]
            m = beta1 * moments[name][0] + (1 - beta1) * g
            v = beta2 * moments[name][1] + (1 - beta2) * g**2
            update = (m / (1 - beta1**count)) / (sqrt(v / (1 - beta2**count)) + eps)
            moments_after[name] = (m, v)
        elif "momentum" in settings:
            beta = settings["momentum"]
            gain = 1.0 if count == 1 else 1.0 - settings.get("dampening", 0.0)
            m = beta * moments[name][0] + gain * g
            update = g + beta * m if settings.get("nesterov") else m
            moments_after[name] = (m,)
        else:
            update, moments_after[name] = g, ()
        shrink = rate * decay if decoupled else 0.0
        after[name] = theta - rate * update - shrink * theta
    return after, moments_after
