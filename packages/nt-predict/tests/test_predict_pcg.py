"""Conjugate gradients over tiles, against Cholesky."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_predict import PCG, Cholesky, Gram, fit
from nt_predict._conjugate_gradients import conjugate_gradients
from nt_predict._lanczos import lanczos
from nt_predict._preconditioner import Preconditioner, randomly_pivoted_cholesky
from nt_predict._tiles import Tiles

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X, X_TEST, Y = RNG.normal(size=(50, 3)), RNG.normal(size=(4, 3)), RNG.normal(size=(50, 2))
NOISE = 1e-2


def kernel_fn(x1, x2, get, scale=1.0):
    x2 = x1 if x2 is None else x2
    return scale * jnp.exp(-((x1[:, None] - x2[None]) ** 2).sum(-1) / 4)


def over_space(x1, x2, get):
    """Two outputs per point, which depend on each other: (n1, n2, 2, 2)."""
    return jnp.einsum("ij,pq->ijpq", kernel_fn(x1, x2, get), jnp.array([[1.0, 0.4], [0.4, 2.0]], x1.dtype))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr("nt_predict._tiles._TILE", 32)  # 50 points do not fill them


def tiles_of(matrix):
    block = lambda rows, columns: jnp.asarray(matrix[np.ix_(rows, rows if columns is None else columns)])  # noqa: E731
    return Tiles(len(matrix), 1, block, hold=False, progress=False)


@pytest.mark.parametrize(
    "function, source, dtype",
    [
        (kernel_fn, "recomputed", "float64"),
        (over_space, "recomputed", "float32"),
        (over_space, "held", "float64"),
        (kernel_fn, "matrix", "float32"),
        (over_space, "matrix", "float64"),
    ],
    indirect=["dtype"],
)
def test_predictions_are_those_of_cholesky(function, source, dtype):
    x, x_test = X.astype(dtype), X_TEST.astype(dtype)
    y = Y if function is kernel_fn else np.stack([Y, RNG.normal(size=Y.shape)], 1)
    solver = PCG(rank=10, rtol=1e-10, hold=source == "held")
    with jax.enable_x64(True):
        exact = fit(Gram(function, X, diag_reg=NOISE), y, Cholesky())
        expected_mean, expected_covariance = exact.mean(X_TEST), exact.covariance(X_TEST)
    if source == "matrix":
        fitted = fit(Gram(function(x, None, "nngp"), diag_reg=NOISE), y, solver)
        test, k_test_test = function(x_test, x, "nngp"), function(x_test, None, "nngp")
    else:
        fitted, test, k_test_test = fit(Gram(function, x, diag_reg=NOISE), y, solver), x_test, None
    stats = fitted.stats
    assert stats.status == "converged" and stats.rank == 10 and stats.passes < 100
    assert (stats.residuals <= 1e-10).all()
    # Rounding errors of the kernel, in units of the regularisation that the inverse is bounded by.
    tolerance = 1e-8 if dtype == "float64" else 10 * float(np.finfo(dtype).eps) / NOISE
    assert fitted.mean(test).dtype == dtype
    np.testing.assert_allclose(fitted.mean(test), expected_mean, atol=tolerance)
    np.testing.assert_allclose(fitted.covariance(test, k_test_test), expected_covariance, atol=tolerance)


def test_the_preconditioner_saves_passes(x64):
    passes = [fit(Gram(kernel_fn, X, diag_reg=NOISE), Y, PCG(rank=rank)).stats.passes for rank in (0, 10, 30)]
    assert passes[0] > 1.5 * passes[1] > 3 * passes[2]


@pytest.mark.parametrize("rank", [1, 20, 50])
def test_randomly_pivoted_cholesky(rank, x64):
    """Below the kernel, and about as near as the best approximation of a rank that is a little smaller."""
    matrix = np.array(kernel_fn(X, None, ""))
    factor = randomly_pivoted_cholesky(tiles_of(matrix), rank, np.random.default_rng(0))
    missing = np.linalg.eigvalsh(matrix - factor @ factor.T)
    assert factor.shape[1] <= rank
    assert missing[0] > -1e-12
    best = np.linalg.eigvalsh(matrix)[: len(matrix) - rank * 2 // 3].sum()
    assert missing.sum() <= 3 * best + 1e-10


def test_powers_of_the_preconditioner(x64):
    factor, vectors = RNG.normal(size=(9, 4)), RNG.normal(size=(9, 2))
    factor[:, 3] = factor[:, 2]
    matrix = factor @ factor.T + 0.3 * np.eye(9)
    preconditioner = Preconditioner(factor, 0.3)
    half = preconditioner.power(-0.5, vectors)
    np.testing.assert_allclose(matrix @ preconditioner.power(-0.5, half), vectors, atol=1e-12)
    np.testing.assert_allclose(preconditioner.power(-1.0, vectors), np.linalg.solve(matrix, vectors), atol=1e-12)
    np.testing.assert_allclose(preconditioner.log_determinant, np.linalg.slogdet(matrix)[1], rtol=1e-13)


def test_functions_by_lanczos(x64):
    matrix = np.diag([1.0, 2.0, 2.0, 5.0, 7.0])
    starts = RNG.normal(size=(5, 3))
    starts[1:, 2] = 0  # a space that the matrix does not leave
    *_, projection = lanczos(lambda v: matrix @ v, starts, 9)
    logarithm = np.diag(np.log(np.diag(matrix)))
    np.testing.assert_allclose(projection.product(np.log), logarithm @ starts, atol=1e-12)
    np.testing.assert_allclose(projection.quadratic_form(np.log), (starts * (logarithm @ starts)).sum(0), atol=1e-12)


def test_the_evidence_is_within_its_error(x64):
    expected = fit(Gram(kernel_fn, X, diag_reg=NOISE), Y).log_evidence().value
    scores = []
    for seed in range(8):
        value, error = fit(Gram(kernel_fn, X, diag_reg=NOISE), Y, PCG(rank=10, seed=seed)).log_evidence()
        assert 0 < error < 0.05 * abs(expected)
        scores.append((value - expected) / error)
    assert np.abs(scores).max() < 4 and 0.3 < np.std(scores) < 2.5


@pytest.mark.parametrize("source", ["function", "matrix"])
def test_samples_have_mean_and_covariance(source, x64):
    y, n = np.stack([Y[:, :1], Y[:, 1:]], 1), 1500
    exact = fit(Gram(over_space, X, diag_reg=NOISE), y)
    if source == "function":
        fitted = fit(Gram(over_space, X, diag_reg=NOISE), y, PCG(rtol=1e-3))
        draws = fitted.sample(jax.random.key(0), X_TEST, n)
    else:
        kernels = [over_space(*pair, "") for pair in ((X, None), (X_TEST, X), (X_TEST, None))]
        fitted = fit(Gram(kernels[0], diag_reg=NOISE), y, PCG(rtol=1e-3))
        draws = fitted.sample(jax.random.key(0), kernels[1], n, kernels[2])
    assert draws.shape == (n, 4, 2, 1)
    errors = (draws - exact.mean(X_TEST)[None]).reshape(n, 8)
    covariance = np.array(exact.covariance(X_TEST)).transpose(0, 2, 1, 3).reshape(8, 8)
    deviation = np.sqrt((covariance**2 + np.outer(*[np.diag(covariance)] * 2)) / n)
    assert (np.abs(errors.mean(0)) < 5 * np.sqrt(np.diag(covariance) / n)).all()
    assert (np.abs(errors.T @ errors / n - covariance) < 5 * deviation).all()


def test_the_true_residual_decides():
    """Where the recursion goes astray, it starts again; where that does not help, the status says so."""
    matrix, b = np.diag(np.linspace(1, 9, 30)), RNG.normal(size=(30, 2))
    in_single = lambda v: (matrix @ v).astype(np.float32).astype(float)  # noqa: E731
    solution = conjugate_gradients(in_single, lambda v: v, b, 1e-12, 1000)
    assert solution.status == "stagnated"
    assert 1e-12 < solution.residuals.max() < 1e-6
    # Products that are wrong once: the recursion never learns of it.
    calls = iter(range(1000))
    once_wrong = lambda v: matrix @ v + 1e-4 * (next(calls) == 3)  # noqa: E731
    solution = conjugate_gradients(once_wrong, lambda v: v, b, 1e-12, 1000)
    assert solution.status == "converged"
    np.testing.assert_allclose(matrix @ solution.x, b, atol=1e-11)


def test_passes_that_are_not_enough_are_announced(x64):
    with pytest.warns(UserWarning, match=r"relative residual of \S+ only, not `rtol=1e-06` \(out of passes, 3"):
        fitted = fit(Gram(kernel_fn, X, diag_reg=1e-6), Y, PCG(rank=2, max_passes=3))
    assert fitted.stats.status == "out of passes" and fitted.stats.residuals.max() > 1e-6


def test_duplicated_points(x64):
    x, y = np.concatenate([X[:9], X[:9]]), np.concatenate([Y[:9], Y[:9]])
    mean = fit(Gram(kernel_fn, x), y, PCG(rank=4)).mean(X_TEST)
    np.testing.assert_allclose(mean, fit(Gram(kernel_fn, X[:9]), Y[:9]).mean(X_TEST), atol=1e-4)


def test_badly_scaled_kernels_and_labels(x64):
    expected = fit(Gram(kernel_fn, X, diag_reg=NOISE), Y, Cholesky()).mean(X_TEST)
    units = np.array([1e-20, 1e20])
    for scale in (1e-20, 1e20):
        gram = Gram(functools.partial(kernel_fn, scale=scale), X, diag_reg=NOISE)
        np.testing.assert_allclose(np.array(fit(gram, Y * units, PCG()).mean(X_TEST)) / units, expected, atol=1e-5)


def test_one_point_and_labels_of_other_types(x64):
    np.testing.assert_allclose(fit(Gram(kernel_fn, X[:1], diag_reg=1.0), np.array([[3]]), PCG()).mean(X[:1]), [[1.5]])
    np.testing.assert_array_equal(fit(Gram(kernel_fn, X), 0 * Y, PCG()).mean(X_TEST), 0)


def test_what_is_refused(x64):
    kernel = np.array(kernel_fn(X, None, "nngp"))
    indefinite = np.diag(np.linspace(-1, 1, 50))
    with pytest.raises(np.linalg.LinAlgError, match=r"not positive semi-definite.*Increase `diag_reg`"):
        fit(Gram(indefinite), Y, PCG())
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="infinite or not a number"):
            fit(Gram(np.where(kernel == kernel[2, 3], bad, kernel)), Y, PCG(rank=2))
        with pytest.raises(ValueError, match="infinite or not a number"):
            fit(Gram(kernel_fn, np.where(X > 1, bad, X)), Y, PCG())
        with pytest.raises(ValueError, match="`y_train` is infinite or not a number"):
            fit(Gram(kernel), bad * Y, PCG())
    with pytest.raises(ValueError, match=r"`k_train_train` has shape \(50, 50\).*`y_train` of shape \(6, 2\)"):
        fit(Gram(kernel), Y[:6], PCG())
    with pytest.raises(ValueError, match=r"`x_train` has 50 samples, but `y_train` of shape \(6, 2\) 6"):
        fit(Gram(kernel_fn, X), Y[:6], PCG())
    with pytest.raises(ValueError, match=r"has shape \(1, 1, 2, 2\)"):
        fit(Gram(over_space, X), Y, PCG())
    with pytest.raises(TypeError, match=r"cannot be traced.*use `Cholesky\(\)`"):
        jax.jit(lambda x: fit(Gram(kernel_fn, x), Y, PCG()).mean(X_TEST))(X)
    for method in ("leave_one_out", "generalised_cross_validation"):
        with pytest.raises(NotImplementedError, match=r"use `Cholesky\(\)`"):
            getattr(fit(Gram(kernel, diag_reg=NOISE), Y, PCG()), method)()


def test_the_solver_is_chosen_by_memory(x64, monkeypatch):
    assert fit(Gram(kernel_fn, X, diag_reg=NOISE), Y).stats.solver == "Cholesky"
    monkeypatch.setattr("nt_predict._memory._memory_of_device", lambda: 50**2 * 8 * 5)
    assert fit(Gram(kernel_fn, X, diag_reg=NOISE), Y).stats.solver == "PCG"


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "hold, fits, read_per_second, kept",
    [
        (None, True, 1e30, "in memory"),
        (None, False, 1e30, "on disk"),
        (None, False, 0, "nowhere"),
        (True, False, 1e30, "in memory"),
        (False, True, 1e30, "nowhere"),
    ],
)
@pytest.mark.parametrize("function", [kernel_fn, over_space])
def test_where_kernels_are_between_passes(function, hold, fits, read_per_second, kept, monkeypatch, dtype):
    monkeypatch.setattr("nt_predict._tiles.fits_in_memory", lambda *args, **kwargs: fits)
    monkeypatch.setattr("nt_predict._tiles._READ_PER_SECOND", read_per_second)
    y = (Y if function is kernel_fn else np.stack([Y, Y], 1)).astype(dtype)
    fitted = fit(Gram(function, X.astype(dtype), diag_reg=NOISE), y, PCG(rank=5, hold=hold))
    expected = fit(Gram(function, X.astype(dtype), diag_reg=NOISE), y, Cholesky())
    np.testing.assert_allclose(fitted.mean(X_TEST.astype(dtype)), expected.mean(X_TEST.astype(dtype)), atol=1e-4)
    assert fitted.stats.kept == kept
    computed, compute = [], fitted._tiles._compute
    monkeypatch.setattr(fitted._tiles, "_compute", lambda cell: computed.append(cell) or compute(cell))
    fitted._tiles.multiply(np.ones((fitted._tiles.dimension, 1)))
    assert bool(computed) == (kept == "nowhere")


def test_disks_without_room_are_announced(monkeypatch, x64):
    monkeypatch.setattr("nt_predict._tiles.fits_in_memory", lambda *args, **kwargs: False)
    monkeypatch.setattr("nt_predict._tiles._READ_PER_SECOND", 1e30)
    monkeypatch.setattr("nt_predict._tiles_on_disk.shutil.disk_usage", lambda _: types.SimpleNamespace(free=2**10))
    with pytest.warns(UserWarning, match="computed again in every pass.* has room for 9.54e-07 GB.*TMPDIR"):
        fitted = fit(Gram(kernel_fn, X, diag_reg=NOISE), Y, PCG())
    assert fitted.stats.kept == "nowhere"


def test_kernels_that_are_read_are_not_written_again(monkeypatch, x64):
    monkeypatch.setattr("nt_predict._tiles.fits_in_memory", lambda *args, **kwargs: False)
    monkeypatch.setattr("nt_predict._tiles._READ_PER_SECOND", 1e30)
    assert fit(Gram(kernel_fn(X, None, "nngp"), diag_reg=NOISE), Y, PCG()).stats.kept == "nowhere"
