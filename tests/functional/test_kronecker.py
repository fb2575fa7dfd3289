"""Kronecker-factored curvature against dense matrices, closed forms and limits."""

import pytest
import torch

from liveselect.functional.kronecker import (
    Curvature,
    add_gram_,
    diagonal,
    eigen,
    ekfac,
    identity,
    kfac,
    mirrored,
    output_only,
    relative_damping,
    rotated,
    rotated_squares,
    solve,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(examples=6, length=5, width=4, height=3, seed=0):
    """Inputs ``(B, T, I)`` and output gradients ``(B, T, O)`` that depend on each other."""
    x = draw(examples, length, width, seed=seed)
    delta = draw(examples, length, height, seed=seed + 1) + (x @ draw(width, height, seed=seed + 2)).tanh()
    return x, delta * (1 + x[..., :1].square())


def covariances(x, delta):
    x, delta = x.flatten(0, 1), delta.flatten(0, 1)
    return x.t() @ x / len(x), delta.t() @ delta / len(x)


def example_gradients(x, delta):
    return torch.einsum("bto,bti->boi", delta, x)


def fisher(gradients):
    """The dense second moment of gradients ``(n, O, I)`` in row-major order."""
    flat = gradients.flatten(1)
    return flat.t() @ flat / len(flat)


def basis(curvature):
    return torch.kron(curvature.outputs, curvature.inputs)


def dense(curvature):
    return basis(curvature) @ torch.diag(curvature.eigenvalues.flatten()) @ basis(curvature).t()


def kfac_of(x, delta):
    a, s = covariances(x, delta)
    return kfac(eigen(a), eigen(s))


def ekfac_of(x, delta):
    a, s = covariances(x, delta)
    start = kfac(eigen(a), eigen(s))
    return ekfac(eigen(a), eigen(s), rotated_squares(start, x, delta) / len(x))


def dense_solve(matrix, gradient, damping):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(shifted, gradient.flatten()).view_as(gradient)


def test_two_samples_by_hand():
    # W is 1x2; samples x = (1, 0), (0, 2) with delta = 2, 1: A = diag(1/2, 2), S = 5/2, Lambda = (2, 2)
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    delta = torch.tensor([[[2.0]], [[1.0]]], dtype=torch.float64)
    a, s = covariances(x, delta)
    assert a.tolist() == [[0.5, 0.0], [0.0, 2.0]]
    assert s.tolist() == [[2.5]]
    ones = torch.ones(1, 2, dtype=torch.float64)
    expected = torch.tensor([[1 / 1.75, 1 / 5.5]], dtype=torch.float64)
    torch.testing.assert_close(solve(kfac_of(x, delta), ones, 0.5), expected, **EXACT)
    best = ekfac_of(x, delta)
    torch.testing.assert_close(solve(best, ones, 0.5), torch.full_like(ones, 0.4), **EXACT)
    exact = fisher(example_gradients(x, delta))
    torch.testing.assert_close(exact, 2 * torch.eye(2, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(solve(best, ones, 0.5), dense_solve(exact, ones, 0.5), **EXACT)


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (6, 2), (70, 3)])
def test_the_inverse_is_that_of_the_damped_kronecker_product_in_row_major_order(shape):
    height, width = shape
    x, delta = tokens(length=40, width=width, height=height)
    a, s = covariances(x, delta)
    gradient = draw(height, width, seed=9)
    found = solve(kfac(eigen(a), eigen(s)), gradient, 0.3)
    torch.testing.assert_close(found, dense_solve(torch.kron(s, a), gradient, 0.3), **EXACT)


@pytest.mark.parametrize("curvature_of", [kfac_of, ekfac_of])
def test_one_example_of_one_token_gives_the_exact_damped_fisher_inverse(curvature_of):
    x, delta = tokens(examples=1, length=1)
    gradient = draw(3, 4, seed=9)
    expected = dense_solve(fisher(example_gradients(x, delta)), gradient, 0.1)
    torch.testing.assert_close(solve(curvature_of(x, delta), gradient, 0.1), expected, rtol=1e-9, atol=1e-10)


def test_inputs_that_meet_every_gradient_have_a_fisher_that_factorises():
    x, delta = draw(5, 4), draw(7, 3, seed=1)
    x, delta = x.repeat_interleave(7, dim=0).unsqueeze(1), delta.repeat(5, 1).unsqueeze(1)
    expected = fisher(example_gradients(x, delta))
    torch.testing.assert_close(dense(kfac_of(x, delta)), expected, **EXACT)
    torch.testing.assert_close(dense(ekfac_of(x, delta)), expected, **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_no_diagonal_in_the_eigenbasis_is_nearer_to_the_fisher_than_ekfac(seed):
    x, delta = tokens(examples=30, length=1, seed=10 * seed)
    exact = fisher(example_gradients(x, delta))
    best = ekfac_of(x, delta)
    error = (exact - dense(best)).norm()
    assert error <= (exact - dense(kfac_of(x, delta))).norm()
    for other in range(3):
        nudged = best.eigenvalues + 1e-3 * draw(3, 4, seed=other)
        assert error <= (exact - dense(Curvature(nudged, best.outputs, best.inputs))).norm()


def test_ekfac_eigenvalues_are_the_diagonal_of_the_rotated_fisher_and_sum_to_the_mean_squared_gradient():
    x, delta = tokens()
    best = ekfac_of(x, delta)
    exact = fisher(example_gradients(x, delta))
    rotation = basis(best)
    torch.testing.assert_close(best.eigenvalues.flatten(), (rotation.t() @ exact @ rotation).diagonal(), **EXACT)
    squared = example_gradients(x, delta).square().sum(dim=(1, 2)).mean()
    torch.testing.assert_close(best.eigenvalues.sum(), squared, **EXACT)


@pytest.mark.parametrize(("width", "height", "length"), [(4, 3, 1), (4, 3, 50), (40, 30, 2)])
def test_rotating_tokens_or_gradients_gives_the_same_squares(width, height, length):
    x, delta = tokens(length=length, width=width, height=height)
    curvature = Curvature(
        torch.ones(height, width),
        eigen(covariances(*tokens(length=60, width=width, height=height))[1]).vectors,
        eigen(covariances(*tokens(length=60, width=width, height=height))[0]).vectors,
    )
    expected = (curvature.outputs.t() @ example_gradients(x, delta) @ curvature.inputs).square().sum(dim=0)
    torch.testing.assert_close(rotated_squares(curvature, x, delta), expected, rtol=1e-9, atol=1e-10)


def test_the_diagonal_is_that_of_the_fisher():
    x, delta = tokens()
    second = rotated_squares(identity(x), x, delta) / len(x)
    exact = fisher(example_gradients(x, delta)).diagonal().view(3, 4)
    torch.testing.assert_close(second, exact, **EXACT)
    gradient = draw(3, 4, seed=9)
    torch.testing.assert_close(solve(diagonal(second), gradient, 0.2), gradient / (exact + 0.2), **EXACT)


def test_output_only_is_kfac_with_inputs_of_equal_size_in_all_directions():
    x, delta = tokens(length=40)
    a, s = covariances(x, delta)
    gradient = draw(3, 4, seed=9)
    flat = a.trace() / 4 * torch.eye(4, dtype=torch.float64)
    found = solve(output_only(eigen(s), a.trace() / 4), gradient, 0.2)
    torch.testing.assert_close(found, dense_solve(torch.kron(s, flat), gradient, 0.2), **EXACT)


def test_the_identity_divides_by_one_plus_damping():
    gradient = draw(3, 4)
    torch.testing.assert_close(solve(identity(gradient), gradient, 1.0), gradient / 2, **EXACT)


@pytest.mark.parametrize("curvature_of", [kfac_of, ekfac_of])
def test_with_growing_damping_the_inverse_tends_to_a_multiple_of_the_identity(curvature_of):
    curvature = curvature_of(*tokens())
    gradient = draw(3, 4, seed=9)
    errors = []
    for share in (1e3, 1e4, 1e5):
        damping = relative_damping(curvature, share)
        errors.append((damping * solve(curvature, gradient, damping) - gradient).norm() / gradient.norm())
    assert errors[2] < 1e-4
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.05)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.05)


def test_relative_damping_makes_the_result_a_multiple_that_does_not_depend_on_the_scale_of_the_loss():
    x, delta = tokens()
    gradient = draw(3, 4, seed=9)
    results = []
    for scale in (1.0, 1e-3):
        curvature = kfac_of(x, scale * delta)
        results.append(scale**2 * solve(curvature, gradient, relative_damping(curvature, 0.1)))
    torch.testing.assert_close(results[0], results[1], **EXACT)


def transposed(curvature):
    return Curvature(curvature.eigenvalues, curvature.outputs.t(), curvature.inputs.t())


def multiplied(curvature, gradient, damping):
    """What a code computes that divides by the inverse."""
    inside = rotated(curvature, gradient) * (curvature.eigenvalues + damping)
    return curvature.outputs @ inside @ curvature.inputs.t()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda curvature, gradient, damping: multiplied(curvature, gradient, damping),
        lambda curvature, gradient, damping: solve(transposed(curvature), gradient, damping),
        # a loss averaged over 32 tokens under the absolute damping of a summed one
        lambda curvature, gradient, damping: solve(
            Curvature(curvature.eigenvalues / 32**2, curvature.outputs, curvature.inputs), gradient, damping
        ),
    ],
    ids=["inverted preconditioner", "transposed eigenvectors", "mean loss with absolute damping"],
)
def test_known_mistakes_fail_the_comparison_with_the_dense_inverse(wrong):
    x, delta = tokens(length=40)
    curvature = kfac_of(x, delta)
    a, s = covariances(x, delta)
    gradient = draw(3, 4, seed=9)
    damping = relative_damping(curvature, 0.1)
    expected = dense_solve(torch.kron(s, a), gradient, damping)
    found = wrong(curvature, gradient, damping)
    found = found * (found * expected).sum() / found.square().sum()  # whatever its scale
    assert (found - expected).norm() > 0.05 * expected.norm()
    torch.testing.assert_close(solve(curvature, gradient, damping), expected, **EXACT)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gram_matrices_are_summed_over_batches_of_any_size(width, dtype):
    parts = [draw(rows, width, seed=rows).to(dtype) for rows in (1, 7, 30)]
    total = torch.zeros(width, width, dtype=torch.float64)
    for part in parts:
        add_gram_(total, part)
    rows = torch.cat(parts).double()
    torch.testing.assert_close(mirrored(total), rows.t() @ rows, **EXACT)


def test_eigenvalues_are_never_negative_and_vectors_stay_orthonormal():
    rows = draw(3, 10).float()  # rank 3 of 10: seven eigenvalues are rounding
    values, vectors = eigen(rows.t() @ rows)
    assert values.dtype == torch.float32
    assert (values >= 0).all()
    torch.testing.assert_close(vectors.t() @ vectors, torch.eye(10), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((vectors * values) @ vectors.t(), rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_directions_without_curvature_and_damping_come_out_as_zero():
    curvature = kfac(eigen(torch.diag(torch.tensor([0.0, 1.0]))), eigen(torch.eye(1)))
    assert solve(curvature, torch.ones(1, 2), 0.0).tolist() == [[0.0, 1.0]]


def test_covariances_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="covariance of 2 entries holds values that are not finite"):
        eigen(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))
