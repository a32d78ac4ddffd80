"""Distributions in the course of training, against explicit gradient descent and arithmetic with 50 digits."""

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from nt_predict import gp_inference, gradient_descent_mse, gradient_descent_mse_ensemble, max_learning_rate

pytestmark = pytest.mark.unoptimised

mpmath.mp.dps = 50


class LinearModel:
    """f(x) = x w with random initial weights of covariance `prior`: NNGP x prior x', NTK x x'.

    The two kernels share no eigenvectors.
    """

    def __init__(self, features=8, train=5, test=3, outputs=2, seed=0):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(features, features))
        self.prior = root @ root.T / features
        self.x_train, self.x_test = rng.normal(size=(train, features)), rng.normal(size=(test, features))
        self.y_train = rng.normal(size=(train, outputs))

    def kernel_fn(self, x1, x2, get):
        x2 = x1 if x2 is None else x2
        kernels = {"ntk": x1 @ x2.T, "nngp": x1 @ jnp.asarray(self.prior, x1.dtype) @ x2.T}
        return kernels[get] if isinstance(get, str) else Kernels(kernels)

    def train(self, get, learning_rate, steps):
        """Returns mean and covariance of the weights after discrete gradient descent."""
        # Training the last layer of a network is training the weights of features whose prior is the identity.
        root = np.linalg.cholesky(self.prior) if get == "nngp" else np.eye(len(self.prior))
        x = self.x_train @ root
        step = np.eye(len(root)) - learning_rate * x.T @ x / self.y_train.size
        mean, transition = np.zeros((len(root), self.y_train.shape[1])), np.eye(len(root))
        for _ in range(steps):
            mean = step @ mean + learning_rate * x.T @ self.y_train / self.y_train.size
            transition = step @ transition
        initial = np.eye(len(root)) if get == "nngp" else self.prior
        return root @ mean, root @ transition @ initial @ transition.T @ root.T


class Kernels:
    def __init__(self, kernels):
        self.nngp, self.ntk = kernels["nngp"], kernels["ntk"]


def max_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize("points", ["test", "train"])
def test_ensemble_is_the_limit_of_discrete_gradient_descent(get, points, x64):
    model = LinearModel()
    x = model.x_test if points == "test" else model.x_train

    def discrete(steps):
        mean, covariance = model.train(get, learning_rate=12.0 / steps, steps=steps)
        return x @ mean, x @ covariance @ x.T

    predict_fn = gradient_descent_mse_ensemble(model.kernel_fn, model.x_train, model.y_train, learning_rate=0.5)
    predictions = predict_fn(24.0, model.x_test if points == "test" else None, get, compute_cov=True)
    coarse, fine, finest = discrete(2_000), discrete(4_000), discrete(8_000)
    for prediction, *values in zip(predictions, coarse, fine, finest, strict=True):
        errors = [max_error(prediction, value) for value in values]
        assert errors[2] < 1e-3
        # The error is that of the discrete steps, of first order.
        np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, rtol=0.05)
        extrapolated = (values[0] - 6 * values[1] + 8 * values[2]) / 3
        assert max_error(prediction, extrapolated) < 1e-7


@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_single_network_is_the_limit_of_discrete_gradient_descent(get, x64):
    model = LinearModel()
    w = np.random.default_rng(1).normal(size=(8, 2))
    x_train, x_test = model.x_train, model.x_test
    fx_train_0, fx_test_0 = x_train @ w, x_test @ w

    def discrete(steps):
        weights = w
        for _ in range(steps):
            weights = weights - 4.0 / steps * x_train.T @ (x_train @ weights - model.y_train) / model.y_train.size
        return x_train @ weights, x_test @ weights

    predict_fn = gradient_descent_mse(x_train @ x_train.T, model.y_train, learning_rate=2.0)
    predictions = predict_fn(2.0, fx_train_0, fx_test_0, x_test @ x_train.T)
    for prediction, *values in zip(predictions, discrete(1_000), discrete(2_000), discrete(4_000), strict=True):
        extrapolated = (values[0] - 6 * values[1] + 8 * values[2]) / 3
        assert max_error(prediction, values[2]) < 1e-3
        assert max_error(prediction, extrapolated) < 1e-8


def test_learning_rate_and_time_enter_by_their_product(x64):
    model = LinearModel()
    kernel, test_train = model.x_train @ model.x_train.T, model.x_test @ model.x_train.T
    one = gradient_descent_mse(kernel, model.y_train, learning_rate=0.1)(30.0, 0.0, 0.0, test_train)
    other = gradient_descent_mse(kernel, model.y_train, learning_rate=3.0)(1.0, 0.0, 0.0, test_train)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-12)


def exact_gain(matrix, time):
    """Returns A^-1 (1 - exp(-A t)) with 50 digits, and exp(-A t)."""
    size = matrix.rows
    decay = mpmath.expm(-matrix * time) if time is not None else mpmath.zeros(size)
    return matrix**-1 * (mpmath.eye(size) - decay), decay


def to_numpy(matrix):
    return np.array(matrix.tolist(), dtype=float)


@pytest.mark.sample(6)
@pytest.mark.parametrize("time", [1e-3, 1.7, None])
@pytest.mark.parametrize("regularisation", [{}, {"diag_reg": 0.1}, {"diag_reg": 0.3, "diag_reg_absolute_scale": True}])
def test_closed_forms(time, regularisation, dtype):
    model = LinearModel(seed=3)
    x_train, x_test, y = (getattr(model, name).astype(dtype) for name in ("x_train", "x_test", "y_train"))
    kernels = {}
    for name, first, second in (("dd", x_train, x_train), ("td", x_test, x_train), ("tt", x_test, x_test)):
        for get in ("nngp", "ntk"):
            kernels[get, name] = mpmath.matrix(np.asarray(model.kernel_fn(first, second, get), "float64").tolist())
    size = len(x_train)

    def regularised(matrix):
        scale = sum(matrix[i, i] for i in range(size)) / size
        scale = 1 if regularisation.get("diag_reg_absolute_scale") else scale
        return matrix + mpmath.mpf(regularisation.get("diag_reg", 0)) * scale * mpmath.eye(size)

    labels = mpmath.matrix(y.astype("float64").tolist())
    tau = None if time is None else mpmath.mpf(0.7) * time / y.size
    k_td, k_dd = kernels["nngp", "td"], kernels["nngp", "dd"]
    gain, decay = exact_gain(regularised(kernels["ntk", "dd"]), tau)
    a = kernels["ntk", "td"] * gain
    doubled, _ = exact_gain(regularised(k_dd), None if tau is None else 2 * tau)
    nngp_gain, nngp_decay = exact_gain(regularised(k_dd), tau)
    test = {
        "ntk": (a * labels, kernels["nngp", "tt"] + a * k_dd * a.T - a * k_td.T - k_td * a.T),
        "nngp": (k_td * nngp_gain * labels, kernels["nngp", "tt"] - k_td * doubled * k_td.T),
    }
    train = {
        "ntk": (labels - decay * labels, decay * k_dd * decay),
        "nngp": (labels - nngp_decay * labels, nngp_decay * regularised(k_dd) * nngp_decay),
    }

    def kernel_fn(x1, x2, get):  # the very numbers that the exact values are made of
        name = ("d" if x1 is x_train else "t") + ("d" if x1 is x_train or x2 is x_train else "t")
        values = {kind: np.asarray(to_numpy(kernels[kind, name]), dtype) for kind in ("nngp", "ntk")}
        return values[get] if isinstance(get, str) else Kernels(values)

    predict_fn = gradient_descent_mse_ensemble(kernel_fn, x_train, y, learning_rate=0.7, **regularisation)
    # Condition numbers are up to a few hundred here.
    tolerance = {"float64": 1e-11, "float32": 3e-3}[dtype]
    for x, expected in ((x_test, test), (None, train)):
        prediction = predict_fn(time, x, None, compute_cov=True)
        for get in ("nngp", "ntk"):
            gaussian = getattr(prediction, get)
            mean, covariance = map(to_numpy, expected[get])
            assert gaussian.mean.dtype == gaussian.covariance.dtype == dtype
            np.testing.assert_allclose(gaussian.mean, mean, atol=tolerance)
            np.testing.assert_allclose(gaussian.covariance, covariance, atol=tolerance)


def test_time_may_have_any_shape(x64):
    model = LinearModel()
    predict_fn = gradient_descent_mse_ensemble(model.kernel_fn, model.x_train, model.y_train)
    times = np.array([[0.0, 0.5, 3.0], [1e3, 1e9, np.inf]])
    all_at_once = predict_fn(times, model.x_test, None, compute_cov=True)
    for index in np.ndindex(times.shape):
        one = predict_fn(float(times[index]), model.x_test, None, compute_cov=True)
        for get in ("nngp", "ntk"):
            expected, actual = getattr(one, get), getattr(all_at_once, get)
            assert actual.mean.shape == (2, 3, 3, 2)
            assert actual.covariance.shape == (2, 3, 3, 3)
            np.testing.assert_allclose(actual.mean[index], expected.mean, atol=1e-13)
            np.testing.assert_allclose(actual.covariance[index], expected.covariance, atol=1e-13)
    train, test = gradient_descent_mse(model.x_train @ model.x_train.T, model.y_train)(
        times, 0.0, 0.0, model.x_test @ model.x_train.T
    )
    assert train.shape == (2, 3, 5, 2)
    assert test.shape == (2, 3, 3, 2)
    assert predict_fn(np.zeros((0,)), model.x_test, "ntk").shape == (0, 3, 2)


def test_beginning_and_end(dtype):
    model = LinearModel()
    x_train, x_test, y = (getattr(model, name).astype(dtype) for name in ("x_train", "x_test", "y_train"))
    predict_fn = gradient_descent_mse_ensemble(model.kernel_fn, x_train, y)
    eps = float(np.finfo(dtype).eps)
    for get in ("nngp", "ntk"):
        start = predict_fn(0.0, x_test, get, compute_cov=True)
        assert (start.mean == 0).all()
        np.testing.assert_allclose(start.covariance, model.kernel_fn(x_test, None, "nngp"), rtol=20 * eps)
        train_start = predict_fn(0, None, get, compute_cov=True)
        np.testing.assert_allclose(train_start.mean, 0, atol=20 * eps)
        np.testing.assert_allclose(train_start.covariance, model.kernel_fn(x_train, None, "nngp"), atol=100 * eps)
        train_end = predict_fn(None, None, get, compute_cov=True)
        np.testing.assert_array_equal(train_end.mean, y)
        assert (train_end.covariance == 0).all()
        # Infinity by eigenvalues, by Cholesky, and a time long enough agree.
        end = predict_fn(None, x_test, get, compute_cov=True)
        for time in (np.inf, 1e8):
            other = predict_fn(time, x_test, get, compute_cov=True)
            np.testing.assert_allclose(other.mean, end.mean, atol=500 * eps)
            np.testing.assert_allclose(other.covariance, end.covariance, atol=1000 * eps)
            np.testing.assert_allclose(predict_fn(time, None, get), y, atol=20 * eps)


@pytest.mark.sample(2)
@pytest.mark.parametrize("time", [0.3, None, np.inf])
def test_covariances_are_exactly_symmetric(time, dtype):
    model = LinearModel(features=40, train=23, test=17)
    predict_fn = gradient_descent_mse_ensemble(
        model.kernel_fn, model.x_train.astype(dtype), model.y_train.astype(dtype), diag_reg=1e-3
    )
    for x in (model.x_test.astype(dtype), None):
        for gaussian in predict_fn(time, x, None, compute_cov=True):
            np.testing.assert_array_equal(gaussian.covariance, gaussian.covariance.T)
            eigenvalues = np.linalg.eigvalsh(np.asarray(gaussian.covariance, "float64"))
            assert eigenvalues[0] > -1e3 * np.finfo(dtype).eps


def test_ensemble_at_infinite_time_is_gp_inference(x64):
    model = LinearModel()
    options = {"diag_reg": 0.05}
    ensemble = gradient_descent_mse_ensemble(model.kernel_fn, model.x_train, model.y_train, **options)
    both = ("nngp", "ntk")
    inference = gp_inference(model.kernel_fn(model.x_train, None, both), model.y_train, **options)
    expected = inference(
        None, model.kernel_fn(model.x_test, model.x_train, both), model.kernel_fn(model.x_test, None, both)
    )
    actual = ensemble(None, model.x_test, None, compute_cov=True)
    for get in both:
        np.testing.assert_allclose(getattr(actual, get).mean, getattr(expected, get).mean, rtol=1e-12)
        np.testing.assert_allclose(getattr(actual, get).covariance, getattr(expected, get).covariance, atol=1e-12)


def test_ntkgp_is_inference_with_the_ntk_as_covariance(x64):
    model = LinearModel()
    both = ("nngp", "ntk")
    train, test_train, test = (
        model.kernel_fn(*x, both) for x in ((model.x_train, None), (model.x_test, model.x_train), (model.x_test, None))
    )
    actual = gp_inference(train, model.y_train, diag_reg=0.1)("ntkgp", test_train, test)
    expected = gp_inference(train.ntk, model.y_train, diag_reg=0.1)("nngp", test_train.ntk, test.ntk)
    np.testing.assert_array_equal(actual.mean, expected.mean)
    np.testing.assert_array_equal(actual.covariance, expected.covariance)


def test_posterior_is_that_of_the_conditional_distribution(x64):
    """Drawn from the prior jointly with noisy labels, test outputs minus the posterior mean have its covariance."""
    model = LinearModel(outputs=1)
    noise, count = 0.2, 40_000
    rng = np.random.default_rng(9)
    weights = np.linalg.cholesky(model.prior) @ rng.normal(size=(8, count))
    labels = model.x_train @ weights + noise**0.5 * rng.normal(size=(5, count))
    predict_fn = gp_inference(
        model.kernel_fn(model.x_train, None, "nngp"), labels, diag_reg=noise, diag_reg_absolute_scale=True
    )
    posterior = predict_fn(
        "nngp", model.kernel_fn(model.x_test, model.x_train, "nngp"), model.kernel_fn(model.x_test, None, "nngp")
    )
    errors = np.linalg.cholesky(posterior.covariance) @ np.eye(3)
    whitened = np.linalg.solve(errors, model.x_test @ weights - posterior.mean)
    # Means and second moments of count independent standard normal vectors.
    z_mean = whitened.mean(1) * count**0.5
    z_second = (whitened @ whitened.T / count - np.eye(3)) * (count / (1 + np.eye(3))) ** 0.5
    assert np.abs(z_mean).max() < 4.5
    assert np.abs(z_second).max() < 4.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_max_learning_rate_is_where_gradient_descent_begins_to_diverge(momentum, x64):
    model = LinearModel()
    limit = max_learning_rate(model.x_train @ model.x_train.T, model.y_train.size, momentum)

    def final_loss(learning_rate):
        f, previous = np.zeros_like(model.y_train), np.zeros_like(model.y_train)
        for _ in range(5_000):
            gradient = model.x_train @ model.x_train.T @ (f - model.y_train) / model.y_train.size
            f, previous = f - learning_rate * gradient + momentum * (f - previous), f
            if np.abs(f).max() > 1e6:
                return np.inf
        return np.abs(f - model.y_train).max()

    assert final_loss(0.99 * limit) < 1e-3
    assert final_loss(1.01 * limit) == np.inf


def test_max_learning_rate_of_kernels_with_many_axes(dtype):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix = (root @ root.T).astype(dtype)
    kernel = matrix.reshape(2, 3, 2, 3).transpose(0, 2, 1, 3)
    expected = 2 * 6 / np.linalg.eigvalsh(matrix)[-1]
    assert max_learning_rate(kernel).dtype == dtype
    np.testing.assert_allclose(max_learning_rate(kernel), expected, rtol=1e-5)
