"""How far an optimizer's step moves with its gradient, coordinate by coordinate."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from liveselect.functional.several_optimizers import owner_of
from liveselect.functional.sharding import local

# the single-tensor code of torch.optim takes float64 tensors of any device; the fast ones do not
_PLAIN_LOOP_OPTIONS = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_COUPLING_TOLERANCE = 1e-6  # of the longest move: far above rounding in float64, far below any real coupling


@torch.no_grad()
def step_slope(optimizer: torch.optim.Optimizer, parameter: Tensor, amplitude: Tensor) -> Tensor:
    r"""Return the slope of the next step in the gradient of one parameter, over a given amplitude.

    With :math:`A(g)` the parameter after one step of the live optimizer on the gradient g, entry j is

    .. math:: \frac{A_j(a) - A_j(-a)}{2 a_j}

    For plain SGD that is minus the learning rate for any amplitude. Where the step saturates, as that of Adam does
    in coordinates whose second moment is small against :math:`a_j^2`, it is the slope that a gradient of this size
    meets; as :math:`a \to 0` it becomes the derivative at a zero gradient. That of torch's own Adam and AdamW is a
    formula. Any other step is taken by the optimizer's own code on copies in float64, with the live moments, counters
    and settings. Nothing of the optimizer is touched. Of a parameter that ranks hold in parts, it is that of this
    rank's part.

    Args:
        optimizer: any that treats the coordinates of a parameter apart.
        parameter: one of the optimizer's.
        amplitude: of the shape of the parameter's local part, positive.

    Returns:
        Of the same shape, float32 or finer.

    Raises:
        TypeError: the step of one coordinate depends on the gradients of others.
    """
    slope = _slope_of_adam(optimizer, parameter, amplitude)
    if slope is not None:
        return slope
    amplitude = amplitude.double()
    owner = owner_of(optimizer, parameter)
    if _holds_others(owner):  # a twin would step with the live ones
        raise TypeError(
            f"{type(owner).__name__} takes its steps by other optimizers that it holds, so they cannot be taken on a "
            'copy of one parameter: take the steps themselves with engine="optimizer_step", or let '
            "configure_optimizers return the others as a list, with manual optimization"
        )
    forth, back = (_stepped(optimizer, parameter, sign * amplitude) for sign in (1, -1))
    if amplitude.numel() > 1:
        half = _scattered_half(amplitude)
        alone = _stepped(optimizer, parameter, (2 * half - 1) * amplitude)  # half of the coordinates forth, others back
        apart = torch.where(half == 1, forth, back)
        if float((alone - apart).abs().max()) > _COUPLING_TOLERANCE * float((forth - back).abs().max()):
            raise TypeError(
                f"the step that {type(owner).__name__} takes in one coordinate depends on the gradients of others, "
                'so it has no slope for each of them: take the steps themselves with engine="optimizer_step"'
            )
    return (forth - back) / (2 * amplitude)


@torch.no_grad()
def first_moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the mean of a parameter's last gradients, as the optimizer keeps it; None before its first step.

    That of Adam and its kin is corrected for its start at zero; a momentum buffer, which is a sum, is made a mean. Of a
    parameter that ranks hold in parts, this rank's part.

    Raises:
        TypeError: the optimizer keeps no such moment.
    """
    optimizer = owner_of(optimizer, parameter)
    state = optimizer.state.get(parameter, {})
    if not state:
        return None
    group = _group_of(optimizer, parameter)
    if "exp_avg" in state and "betas" in group:
        return local(state["exp_avg"]) / (1 - group["betas"][0] ** float(state["step"]))
    buffer = state.get("momentum_buffer")
    if isinstance(buffer, Tensor) and "momentum" in group:
        return local(buffer) * (1 - group["momentum"]) / (1 - group.get("dampening", 0.0))
    raise TypeError(
        f"{type(optimizer).__name__} keeps no mean of the last gradients to subtract: expected exp_avg, as in Adam, or "
        "momentum_buffer, as in SGD with momentum. Leave contrast at 0"
    )


def _slope_of_adam(optimizer: torch.optim.Optimizer, parameter: Tensor, amplitude: Tensor) -> Tensor | None:
    r"""Return the slope of a step of Adam, :math:`-\eta' / (\sqrt{\beta_2 v + (1 - \beta_2) a^2} / c + \epsilon)`.

    Differences of steps would need float64 and ten times as long. None for other optimizers, and for settings with
    which the second moment depends on more than the amplitude.
    """
    group = _group_of(optimizer, parameter)
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or group["amsgrad"]:
        return None
    if type(optimizer) is torch.optim.Adam and float(group["weight_decay"]):
        return None  # it is added to the gradient, unless another setting says otherwise
    state = optimizer.state.get(parameter, {})
    first, second = map(float, group["betas"])
    step = 1 + float(state.get("step", 0))
    amplitude = amplitude.to(torch.promote_types(amplitude.dtype, torch.float32))
    size = amplitude.abs() * (1 - second) ** 0.5
    if "exp_avg_sq" in state:  # the root of a sum of squares, of which none may vanish in float32
        size = torch.hypot(local(state["exp_avg_sq"]).to(size.dtype).mul(second).sqrt_(), size)
    size.div_((1 - second**step) ** 0.5).add_(float(group["eps"]))
    rate = float(group["lr"]) * (1 - first) / (1 - first**step)
    return size.reciprocal_().mul_(rate if group["maximize"] else -rate)


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))


def _stepped(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the parameter after one step on a gradient, float64, from a twin of the optimizer that holds it alone."""
    optimizer = owner_of(optimizer, parameter)
    value = local(parameter).to(torch.float64, copy=True)
    value.grad = gradient
    group = _group_of(optimizer, parameter)
    twin = object.__new__(type(optimizer))  # copy.copy would lose attributes of a subclass outside of its state
    vars(twin).update({name: item for name, item in vars(optimizer).items() if name != "step"})  # schedulers wrap step
    twin.param_groups = [{**group, **{k: v for k, v in _PLAIN_LOOP_OPTIONS.items() if k in group}, "params": [value]}]
    twin.state = defaultdict(dict)
    if parameter in optimizer.state:
        twin.state[value] = {name: _copied(item) for name, item in optimizer.state[parameter].items()}
    type(optimizer).step(twin)
    return value


def _holds_others(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer keeps others among its attributes."""
    items: list[object] = []
    for item in vars(optimizer).values():
        items.extend(item if isinstance(item, (list, tuple)) else item.values() if isinstance(item, dict) else [item])
    return any(isinstance(item, torch.optim.Optimizer) for item in items)


def _scattered_half(like: Tensor) -> Tensor:
    """Return 0 or 1 for each coordinate, in no order of rows or columns.

    Orthogonalised steps (Muon) on a gradient with the signs of whole columns turned are the same steps with these signs
    turned, so columns would not show that coordinates are coupled.
    """
    places = torch.arange(like.numel(), device=like.device)
    return ((places * 2654435761 >> 31) & 1).view(like.shape)  # multiplicative hashing


def _copied(item: object) -> object:
    if isinstance(item, list):  # SOAP and Shampoo keep a matrix for each dimension
        return [_copied(each) for each in item]
    if isinstance(item, dict):
        return {name: _copied(each) for name, each in item.items()}
    if not isinstance(item, Tensor):
        return item
    item = local(item)
    # counters keep their type: some optimizers ask for float32
    return item.to(torch.float64, copy=True) if item.is_floating_point() and item.dim() else item.clone()
