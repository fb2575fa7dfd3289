"""Ridge regression in closed form, with the prediction for every example by a fit without its fold."""

from typing import NamedTuple

import torch
from torch import Tensor


class RidgeFit(NamedTuple):
    """A linear function and how it was chosen.

    Attributes:
        weights: ``(D,)`` in the type of the features.
        intercept: added to every prediction.
        penalty: the chosen penalty, a multiple of the mean squared distance of an example from the mean features.
        held_out: ``(m,)`` float64, for each example the prediction of the fit without its fold.
    """

    weights: Tensor
    intercept: float
    penalty: float
    held_out: Tensor


def fit_ridge(
    features: Tensor, targets: Tensor, folds: Tensor, penalties: Tensor, importance: Tensor | None = None
) -> RidgeFit:
    """Fit a ridge regression whose penalty has the lowest squared error on held-out folds.

    Minimises ``|y - X w - b|^2 + p s |w|^2`` with ``s`` the mean squared norm of the centred features; the intercept b
    is not penalised. One eigendecomposition of the smaller of the Gram matrices, m x m or D x D, serves all penalties,
    and no fit is repeated: with ``H`` the matrix that maps targets to fitted values and F the rows of a fold, the
    residuals of the fit without them are ``(I - H_FF)^-1 (y - H y)_F``.

    Args:
        features: ``(m, D)`` floating point; centred in place, so pass a copy if you need them again.
        targets: ``(m,)``.
        folds: ``(m,)`` int64, the fold of each example, 0..folds - 1, at least two.
        penalties: ``(P,)`` positive multiples of s, compared in this order.
        importance: ``(m,)`` positive, how much the squared error of each example counts, with a mean of 1; all alike
            by default.
    """
    targets = targets.double()
    root = torch.ones_like(targets) if importance is None else (importance.double() / importance.double().mean()).sqrt()
    share = root / len(targets)  # of an example in a mean, over the root of its importance
    centre, level = (share * root).to(features) @ features, (share * root) @ targets
    # an example that counts twice has the square root of two times its length: what follows is a plain ridge of these
    centred = features.sub_(centre).mul_(root.to(features)[:, None])
    scale = float(torch.linalg.vector_norm(centred, dtype=torch.float64) ** 2 / len(features)) or 1.0
    spectrum, basis = _decompose(centred)
    wanted = root * (targets - level)
    members = [(folds == fold).nonzero().flatten() for fold in range(int(folds.max()) + 1)]
    best: tuple[float, float, Tensor, Tensor] | None = None
    for penalty in penalties.tolist():
        shrunk = basis / (spectrum + penalty * scale)
        residual = wanted - shrunk @ (basis.T @ wanted)
        missed = torch.empty_like(residual)
        for rows in members:
            hat = torch.outer(root[rows], share[rows]) + shrunk[rows] @ basis[rows].T
            missed[rows] = torch.linalg.solve(torch.eye(len(rows), dtype=hat.dtype) - hat, residual[rows])
        error = float(missed.square().mean())
        if best is None or error < best[0]:
            best = error, penalty, residual, targets - missed / root
    if best is None:
        raise ValueError("expected at least one penalty")
    _, penalty, residual, held_out = best
    # the normal equations say that the weights are the penalised residuals, whichever Gram matrix was used
    weights = centred.T @ (residual / (penalty * scale)).to(features.dtype)
    return RidgeFit(weights, float(level - centre.double() @ weights.double()), penalty, held_out)


def _decompose(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return s (r,) and A (m, r), float64, such that ``A diag(1 / (s + p)) A^T`` maps targets to fitted values."""
    if len(centred) <= centred.shape[1]:
        spectrum, vectors = torch.linalg.eigh((centred @ centred.T).double())
        spectrum = spectrum.clamp(min=0.0)
        return spectrum, vectors * spectrum.sqrt()
    spectrum, vectors = torch.linalg.eigh((centred.T @ centred).double())
    return spectrum.clamp(min=0.0), centred.double() @ vectors
