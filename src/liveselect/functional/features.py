"""What Adam makes of a gradient: the features of candidates in LESS."""

from torch import Tensor


def adam_feature(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    betas: tuple[float, float],
    eps: float,
    steps: int | None = None,
    momentum: bool = True,
) -> Tensor:
    r"""Return the direction of Adam's next step on a gradient.

    With :math:`m' = \beta_1 m + (1 - \beta_1) g` and :math:`v' = \beta_2 v + (1 - \beta_2) g^2` it is
    :math:`m' / \sqrt{v' + \epsilon}`, the form of the released code; with ``steps`` Adam's own, bias-corrected and
    with :math:`\epsilon` outside of the root. Without ``momentum`` it is :math:`g / \sqrt{v + \epsilon}`, or the same
    with Adam's corrections: the part that differs between candidates, with their own share of the denominator left out.

    Args:
        gradient: of any shape.
        mean: Adam's first moment m, of that shape.
        square: its second moment v.
        betas: of Adam.
        eps: of Adam.
        steps: that Adam has taken, for its own form.
        momentum: whether the first moment takes part.

    Source: Xia et al. 2024, "LESS", arXiv 2402.04333, and its released code.
    """
    first, second = betas
    if momentum:
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient.square()
    else:
        mean = gradient
    if steps is None:
        return mean / (square + eps).sqrt()
    taken = steps + 1 if momentum else max(steps, 1)
    correction = 1 - first**taken if momentum else 1.0
    return mean / correction / ((square / (1 - second**taken)).sqrt() + eps)
