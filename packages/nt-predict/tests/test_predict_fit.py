"""Gaussian processes given labels: against refits without each point, scipy, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_predict import Cholesky, Gram, fit, gp_inference, regularisation_path
from scipy.stats import multivariate_normal

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X, X_TEST, Y = RNG.normal(size=(7, 3)), RNG.normal(size=(4, 3)), RNG.normal(size=(7, 2))
NOISE = 0.3


def kernel_fn(x1, x2, get, scale=1.0):
    x2 = x1 if x2 is None else x2
    return scale * jnp.exp(-((x1[:, None] - x2[None]) ** 2).sum(-1) / 4)


def over_space(x1, x2, get):
    """Two outputs per point, which depend on each other: (n1, n2, 2, 2)."""
    return jnp.einsum("ij,pq->ijpq", kernel_fn(x1, x2, get), jnp.array([[1.0, 0.4], [0.4, 2.0]], x1.dtype))


def made_for(dtype):
    return X.astype(dtype), X_TEST.astype(dtype), Y.astype(dtype), 200 * float(np.finfo(dtype).eps)


def matrix(kernel):
    kernel = np.array(kernel, np.float64)
    return kernel if kernel.ndim == 2 else kernel.transpose(0, 2, 1, 3).reshape(2 * len(kernel), -1)


def test_predictions_are_those_of_inference(dtype):
    x, x_test, y, tolerance = made_for(dtype)
    kernels = [kernel_fn(a, b, "nngp") for a, b in ((x, None), (x_test, x), (x_test, None))]
    expected = gp_inference(kernels[0], y, diag_reg=NOISE)("nngp", *kernels[1:])
    by_function = fit(Gram(kernel_fn, x, diag_reg=NOISE), y)
    by_matrix = fit(Gram(kernels[0], diag_reg=NOISE), y, Cholesky())
    for means, covariance in (
        (by_function.mean(x_test), by_function.covariance(x_test)),
        (by_matrix.mean(kernels[1]), by_matrix.covariance(*kernels[1:])),
    ):
        np.testing.assert_allclose(means, expected.mean, atol=tolerance)
        np.testing.assert_allclose(covariance, expected.covariance, atol=tolerance)


def test_large_matrices_are_factored_in_parts(x64, monkeypatch):
    """LAPACK is not given matrices that it dies of."""

    def results(scale):
        fitted = fit(Gram(functools.partial(kernel_fn, scale=scale), X, diag_reg=NOISE), Y)
        return fitted.log_evidence().value, fitted.mean(X_TEST), fitted.covariance(X_TEST), fitted.leave_one_out()

    expected, derivatives = results(1.0), jax.jacfwd(results)(1.0)
    monkeypatch.setattr("nt_predict._factored._LARGEST", 2)
    for actual, before in ((results(1.0), expected), (jax.jacfwd(results)(1.0), derivatives)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), actual, before)


def test_large_matrices_that_are_indefinite(x64, monkeypatch):
    monkeypatch.setattr("nt_predict._factored._LARGEST", 2)
    with pytest.raises(np.linalg.LinAlgError, match="not positive semi-definite"):
        fit(Gram(kernel_fn, X, diag_reg=-1.5), Y).log_evidence()


@pytest.mark.parametrize("function", [kernel_fn, over_space], ids=["points", "space"])
def test_test_points_in_blocks(function, x64, monkeypatch):
    """The kernels of test points are never computed as a whole."""
    y = Y if function is kernel_fn else RNG.normal(size=(7, 2, 3))
    fitted = fit(Gram(function, X, diag_reg=NOISE), y)
    mean, covariance = fitted.mean(X_TEST), fitted.covariance(X_TEST)
    assert mean.shape == (4, *y.shape[1:])
    monkeypatch.setattr("nt_predict._gram._BLOCK_BYTES", 2 * 8 * y[..., 0].size)
    np.testing.assert_allclose(fitted.mean(X_TEST), mean, atol=1e-13)
    np.testing.assert_allclose(fitted.covariance(X_TEST), covariance, atol=1e-13)


def test_samples_have_mean_and_covariance(x64):
    fitted = fit(Gram(over_space, X, diag_reg=NOISE), RNG.normal(size=(7, 2, 1)))
    draws = fitted.sample(jax.random.key(0), X_TEST, 40000)
    assert draws.shape == (40000, 4, 2, 1)
    errors = (draws - fitted.mean(X_TEST)[None]).reshape(40000, 8)
    covariance = matrix(fitted.covariance(X_TEST))
    deviation = np.sqrt((covariance**2 + np.outer(*[np.diag(covariance)] * 2)) / 40000)
    assert (np.abs(errors.mean(0)) < 5 * np.sqrt(np.diag(covariance) / 40000)).all()
    assert (np.abs(errors.T @ errors / 40000 - covariance) < 5 * deviation).all()


def test_the_evidence_is_a_density(dtype):
    x, _, y, tolerance = made_for(dtype)
    for function, labels in ((kernel_fn, y), (over_space, np.stack([y, 2 * y], 1))):
        a = matrix(function(x, None, "nngp"))
        a += NOISE * np.trace(a) / len(a) * np.eye(len(a))
        columns = labels.reshape(len(a), -1).T.astype(np.float64)
        expected = multivariate_normal(cov=a).logpdf(columns).sum()
        value, error = fit(Gram(function, x, diag_reg=NOISE), labels).log_evidence()
        np.testing.assert_allclose(value, expected, rtol=tolerance)
        assert error == 0


@pytest.mark.parametrize("function", [kernel_fn, over_space], ids=["points", "space"])
def test_leaving_one_out_is_a_fit_without_it(function, x64):
    y = Y if function is kernel_fn else np.stack([Y, RNG.normal(size=Y.shape)], 1)
    gram = functools.partial(Gram, function, diag_reg=NOISE, diag_reg_absolute_scale=True)
    actual = fit(gram(X), y).leave_one_out()
    for i in range(len(X)):
        others = np.arange(len(X)) != i
        without = fit(gram(X[others]), y[others])
        mean = without.mean(X[i : i + 1])[0]
        covariance = matrix(without.covariance(X[i : i + 1]))
        covariance += NOISE * np.eye(len(covariance))
        np.testing.assert_allclose(actual.mean[i], mean, atol=1e-12)
        np.testing.assert_allclose(actual.variance[i].ravel(), np.diag(covariance), atol=1e-12)
        errors = (y[i] - mean).reshape(len(covariance), -1).T
        density = multivariate_normal(cov=covariance).logpdf(errors).sum()
        np.testing.assert_allclose(actual.log_density[i], density, rtol=1e-12)


def test_generalised_cross_validation_is_its_definition(dtype):
    x, _, y, tolerance = made_for(dtype)
    kernel = np.asarray(kernel_fn(x, None, "nngp"), np.float64)
    smoother = kernel @ np.linalg.inv(kernel + NOISE * np.eye(len(kernel)))
    expected = len(kernel) * ((y - smoother @ y) ** 2).sum(0) / (len(kernel) - np.trace(smoother)) ** 2
    fitted = fit(Gram(kernel_fn, x, diag_reg=NOISE, diag_reg_absolute_scale=True), y)
    np.testing.assert_allclose(fitted.generalised_cross_validation(), expected.mean(), rtol=tolerance)


@pytest.mark.parametrize("function", [kernel_fn, over_space], ids=["points", "space"])
def test_a_path_of_regularisation_is_many_fits(function, dtype):
    x, _, y, tolerance = made_for(dtype)
    y = y if function is kernel_fn else np.stack([y, 2 * y], 1)
    path = regularisation_path(Gram(function, x), y, [0.01, NOISE, 3.0])
    for i, diag_reg in enumerate(path.diag_reg):
        fitted = fit(Gram(function, x, diag_reg=diag_reg), y)
        np.testing.assert_allclose(path.log_evidence[i], fitted.log_evidence().value, rtol=10 * tolerance)
        expected = fitted.leave_one_out().log_density.sum()
        np.testing.assert_allclose(path.leave_one_out[i], expected, rtol=10 * tolerance)
        expected = fitted.generalised_cross_validation()
        np.testing.assert_allclose(path.generalised_cross_validation[i], expected, rtol=10 * tolerance)
    for criterion in ("log_evidence", "leave_one_out"):
        assert path.best(criterion) == path.diag_reg[np.argmax(getattr(path, criterion))]
    assert path.best("generalised_cross_validation") == path.diag_reg[np.argmin(path.generalised_cross_validation)]


def test_gradients_are_finite_differences(x64):
    """Of evidence and leave-one-out score, with respect to the kernel's scale, the noise and the labels; under jit."""

    @jax.jit
    def scores(scale, noise, slope):
        fitted = fit(Gram(functools.partial(kernel_fn, scale=scale), X, diag_reg=noise), Y + slope * X[:, :1])
        return jnp.stack([fitted.log_evidence().value, fitted.leave_one_out().log_density.sum()])

    at = (1.3, NOISE, 0.2)
    step = 1e-5
    for argument, gradient in enumerate(jax.jacrev(scores, argnums=(0, 1, 2))(*at)):
        moved = [[value + sign * step * (i == argument) for i, value in enumerate(at)] for sign in (1, -1)]
        expected = (scores(*moved[0]) - scores(*moved[1])) / (2 * step)
        np.testing.assert_allclose(gradient, expected, rtol=1e-7)


def test_predictions_under_jit(x64):
    fitted = fit(Gram(kernel_fn, X, diag_reg=NOISE), Y)
    expected = fitted.mean(X_TEST), fitted.covariance(X_TEST)

    def predict(x, y, x_test):
        inside = fit(Gram(kernel_fn, x, diag_reg=NOISE), y)
        return inside.mean(x_test), inside.covariance(x_test)

    for actual in (
        jax.jit(predict)(X, Y, X_TEST),
        jax.jit(functools.partial(predict, X, Y))(X_TEST),
        jax.jit(lambda x_test: (fitted.mean(x_test), fitted.covariance(x_test)))(X_TEST),
    ):
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-13)


# Matrices and labels that are not as they should be


def test_a_singular_kernel_predicts_and_has_no_evidence(dtype):
    x = np.concatenate([X, X[:1]]).astype(dtype)
    y = np.concatenate([Y, Y[:1]])
    fitted = fit(Gram(kernel_fn, x), y)
    for method in (fitted.log_evidence, fitted.leave_one_out, fitted.generalised_cross_validation):
        with pytest.raises(np.linalg.LinAlgError, match=r"has rank 7.*no density.*`diag_reg=\S+` would"):
            method()
    with pytest.warns(UserWarning, match="has rank 7"):
        mean = fitted.mean(X_TEST.astype(dtype))
    expected = fit(Gram(kernel_fn, x[:-1]), y[:-1]).mean(X_TEST.astype(dtype))
    np.testing.assert_allclose(mean, expected, atol=5e3 * float(np.finfo(dtype).eps))
    path = regularisation_path(Gram(kernel_fn, x), y, [0.0, 0.1])
    assert path.log_evidence[0] == path.leave_one_out[0] == -np.inf
    assert path.best() == path.diag_reg[1]


def test_an_indefinite_kernel_is_an_error(dtype):
    fitted = fit(Gram(np.array([[1.0, 2.0], [2.0, 1.0]], dtype)), Y[:2])
    for method in (fitted.log_evidence, functools.partial(fitted.mean, np.ones((1, 2)))):
        with pytest.raises(np.linalg.LinAlgError, match=r"not positive semi-definite.*Increase `diag_reg`"):
            method()


def test_badly_scaled_kernels(dtype):
    """Nothing depends on units: of the kernel, with the labels."""
    x, x_test, y, tolerance = made_for(dtype)
    expected = fit(Gram(kernel_fn, x, diag_reg=NOISE), y)
    for scale in (1e-20, 1e20):
        fitted = fit(Gram(functools.partial(kernel_fn, scale=scale), x, diag_reg=NOISE), y)
        np.testing.assert_allclose(fitted.mean(x_test), expected.mean(x_test), atol=tolerance)
        np.testing.assert_allclose(fitted.leave_one_out().mean, expected.leave_one_out().mean, atol=10 * tolerance)


def test_one_point_and_labels_of_other_types(x64):
    single = fit(Gram(kernel_fn, X[:1], diag_reg=NOISE), np.array([[3]]))
    np.testing.assert_allclose(single.mean(X[:1]), [[3 / (1 + NOISE)]])
    np.testing.assert_allclose(single.leave_one_out().mean, [[0.0]], atol=1e-15)
    integers = fit(Gram(kernel_fn, X), np.round(Y).astype(int)).mean(X)
    assert integers.dtype == np.float64
    np.testing.assert_allclose(integers, np.round(Y), atol=1e-10)
    assert fit(Gram(kernel_fn, X), Y.astype(np.float32)).mean(X).dtype == np.float64


def test_what_is_refused():
    kernel = kernel_fn(X, None, "nngp")
    with pytest.raises(
        TypeError, match=r"Give `Gram` a kernel function and training inputs.*or the train-train kernel"
    ):
        Gram(kernel_fn)
    with pytest.raises(TypeError, match=r"Give `Gram` a kernel function"):
        Gram(kernel, X)
    with pytest.raises(ValueError, match=r"`k_train_train` has shape \(7, 7\).*`y_train` of shape \(6, 2\)"):
        fit(Gram(kernel), Y[:6])
    with pytest.raises(ValueError, match="`y_train` is infinite or not a number"):
        fit(Gram(kernel), np.full((7, 1), np.nan))
    with pytest.raises(ValueError, match="infinite or not a number"):
        fit(Gram(kernel_fn, np.where(X > 1, np.nan, X)), Y)
    with pytest.raises(ValueError, match="needs `k_test_test`"):
        fit(Gram(kernel, diag_reg=0.1), Y).covariance(kernel)
    with pytest.raises(ValueError, match="give the test inputs alone"):
        fit(Gram(kernel_fn, X), Y).covariance(X_TEST, kernel)
