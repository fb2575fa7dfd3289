r"""Kronecker-factored curvature of linear layers: covariances, eigenbases, damping, and the inverse.

A layer maps inputs :math:`x` (I entries, a constant 1 among them where the layer has a bias) to outputs (O entries);
:math:`\delta` is the gradient of one token's or one example's *summed* loss in the outputs. With the activation
covariance :math:`A = E[x x^\top]` and the gradient covariance :math:`S = E[\delta \delta^\top]`, both over tokens, the
Fisher block of the weights ``(O, I)`` in row-major order is approximated by :math:`S \otimes A`. All matrices that act
on weights are applied from the two sides; the Kronecker product is never formed.

Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_GRAM_STRIPES = 4  # 10 of 16 blocks are computed; more stripes would save little more
_MIN_STRIPE_COLUMNS = 64  # a narrower stripe costs more than it saves
_MAX_FLOAT64_ROWS = 2048  # accelerators are slow in float64: larger matrices are solved in float32 there


class Eigen(NamedTuple):
    """The eigendecomposition of a covariance: ``values (n,)`` ascending and not negative, ``vectors (n, n)``."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Curvature:
    r"""A curvature block that is diagonal in a product of two bases, :math:`(Q_S \otimes Q_A)\, D\, (Q_S \otimes
    Q_A)^\top`.

    Attributes:
        eigenvalues: the diagonal D as ``(O, I)``, or of a shape that broadcasts to it.
        outputs: :math:`Q_S (O, O)` with eigenvectors in columns; None is the identity.
        inputs: :math:`Q_A (I, I)` in the same form.
    """

    eigenvalues: Tensor
    outputs: Tensor | None = None
    inputs: Tensor | None = None


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``total (n, n)``; entries below the diagonal are left undefined.

    The sum over ``rows (N, n)`` is computed in stripes that end at the diagonal, which saves three eighths of the work.
    :func:`mirrored` makes the sum whole.
    """
    n = rows.shape[1]
    width = max(_MIN_STRIPE_COLUMNS, -(-n // _GRAM_STRIPES))
    rows = rows.to(total.dtype)
    for start in range(0, n, width):
        stop = min(start + width, n)
        total[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])


def mirrored(upper: Tensor) -> Tensor:
    """Return the symmetric matrix ``(n, n)`` whose upper triangle is given."""
    return upper.triu() + upper.triu(1).t()


def eigen(covariance: Tensor) -> Eigen:
    """Return the eigendecomposition of a covariance ``(n, n)``, which rounding may have made slightly indefinite.

    Raises:
        ValueError: an entry is not finite.
    """
    if not covariance.isfinite().all():
        raise ValueError(
            f"a covariance of {len(covariance)} entries holds values that are not finite: expected finite activations "
            "and gradients; leave out the batch that made them, or measure in a wider number format"
        )
    double = covariance.device.type == "cpu" or len(covariance) <= _MAX_FLOAT64_ROWS
    exact = covariance.to(torch.float64 if double else torch.float32)
    values, vectors = torch.linalg.eigh((exact + exact.t()) / 2)
    return Eigen(values.clamp(min=0).to(covariance.dtype), vectors.to(covariance.dtype))


def kfac(inputs: Eigen, outputs: Eigen) -> Curvature:
    r"""Return :math:`S \otimes A` from the eigendecompositions of A and S."""
    return Curvature(torch.outer(outputs.values, inputs.values), outputs.vectors, inputs.vectors)


def ekfac(inputs: Eigen, outputs: Eigen, second_moments: Tensor) -> Curvature:
    r"""Return the curvature with the eigenvectors of :math:`S \otimes A` and the best diagonal in them.

    ``second_moments (O, I)`` are the means of :func:`rotated_squares` over examples or tokens: of all diagonals in this
    basis the nearest to the Fisher matrix in Frobenius norm.
    """
    return Curvature(second_moments, outputs.vectors, inputs.vectors)


def output_only(outputs: Eigen, mean_input: Tensor | float) -> Curvature:
    r"""Return :math:`S \otimes a I`: A replaced by the multiple of the identity that has the same trace.

    ``mean_input`` is :math:`a = \operatorname{tr} A / I`, the mean square of the inputs' entries.
    """
    return Curvature((outputs.values * mean_input).unsqueeze(1), outputs.vectors)


def diagonal(second_moments: Tensor) -> Curvature:
    """Return the curvature whose diagonal ``(O, I)`` holds the mean squares of the gradient's entries."""
    return Curvature(second_moments)


def identity(like: Tensor) -> Curvature:
    """Return the curvature 1, of the type and on the device of ``like``."""
    return Curvature(like.new_ones(1, 1))


def relative_damping(curvature: Curvature, share: float) -> Tensor:
    """Return ``share`` of the mean eigenvalue: a damping that does not depend on how the loss was scaled.

    Grosse et al. 2023, arXiv 2308.03296, use a share of 0.1; between 0.01 and 1 ranks hardly change.
    """
    return share * curvature.eigenvalues.mean()


def solve(curvature: Curvature, gradient: Tensor, damping: Tensor | float) -> Tensor:
    r"""Return :math:`(F + \lambda)^{-1}` times a gradient ``(O, I)``, of its shape.

    :math:`Q_S [(Q_S^\top G Q_A) / (D + \lambda)] Q_A^\top`, in units of the gradient per unit of curvature.
    Directions in which curvature and damping are both zero come out as zero.
    """
    denominator = (curvature.eigenvalues + damping).to(gradient.dtype)
    inverse = torch.where(denominator > 0, denominator.reciprocal(), 0.0)
    moved = rotated(curvature, gradient) * inverse
    if curvature.outputs is not None:
        moved = curvature.outputs.to(gradient.dtype) @ moved
    if curvature.inputs is not None:
        moved = moved @ curvature.inputs.to(gradient.dtype).t()
    return moved


def rotated(curvature: Curvature, gradient: Tensor) -> Tensor:
    r"""Return a gradient ``(..., O, I)`` in the curvature's basis, :math:`Q_S^\top G Q_A`."""
    if curvature.outputs is not None:
        gradient = curvature.outputs.to(gradient.dtype).t() @ gradient
    if curvature.inputs is not None:
        gradient = gradient @ curvature.inputs.to(gradient.dtype)
    return gradient


def rotated_squares(curvature: Curvature, inputs: Tensor, deltas: Tensor) -> Tensor:
    r"""Return :math:`\sum_i (Q_S^\top G_i Q_A)^2` over examples, entry by entry, ``(O, I)``.

    The gradient of an example is :math:`G_i = \sum_t \delta_{it} x_{it}^\top`, from ``inputs (B, T, I)`` and ``deltas
    (B, T, O)``. Tokens or gradients are rotated, whichever is less work; one gradient is held at a time.
    """
    tokens, width, height = inputs.shape[1], inputs.shape[2], deltas.shape[2]
    of_tokens = tokens * (width**2 + height**2)
    of_gradients = width * height * (width + height)
    if of_tokens <= of_gradients:
        inputs = inputs if curvature.inputs is None else inputs @ curvature.inputs.to(inputs.dtype)
        deltas = deltas if curvature.outputs is None else deltas @ curvature.outputs.to(deltas.dtype)
        basis = Curvature(curvature.eigenvalues)
    else:
        basis = curvature
    total = deltas.new_zeros(height, width)
    for x, delta in zip(inputs, deltas, strict=True):
        gradient = rotated(basis, delta.t() @ x)
        total.addcmul_(gradient, gradient)
    return total
