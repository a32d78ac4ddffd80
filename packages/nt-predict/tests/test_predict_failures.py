"""What is refused, and how; matrices that are singular or indefinite."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_predict import gp_inference, gradient_descent_mse, gradient_descent_mse_ensemble, max_learning_rate
from scipy.linalg import expm

pytestmark = pytest.mark.unoptimised

Kernels = collections.namedtuple("Kernels", ["nngp", "ntk"])
Y = np.array([[1.0], [3.0], [0.0]])
INDEFINITE = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
TEST_TRAIN = np.array([[0.3, 0.7, 0.2]])


def linear(x1, x2, get):
    kernel = x1 @ (x1 if x2 is None else x2).T
    return kernel if isinstance(get, str) else Kernels(kernel, kernel)


def duplicate_points(dtype, n=12, features=30, seed=0):
    """Returns training points one of which occurs twice, test points and labels that are the same for both."""
    rng = np.random.default_rng(seed)
    x, x_test = rng.normal(size=(n, features)), rng.normal(size=(3, features))
    x[-1] = x[4]
    y = rng.normal(size=(n, 2))
    y[-1] = y[4]
    return x.astype(dtype), x_test.astype(dtype), y.astype(dtype)


# Not positive definite


def infinite_time_predictions(kernel, y, test_train):
    def inference():
        return gp_inference(kernel, y)("nngp", test_train)

    def descent():
        return gradient_descent_mse(kernel, y)(None, None, 0.0, test_train)

    def ensemble():
        kernel_fn = lambda x1, x2, get: kernel if x1 == "train" else test_train  # noqa: E731
        return gradient_descent_mse_ensemble(kernel_fn, "train", y)(None, "test", "ntk")

    return inference, descent, ensemble


def test_indefinite_matrix_is_an_error(dtype):
    for predict in infinite_time_predictions(INDEFINITE.astype(dtype), Y, TEST_TRAIN):
        with pytest.raises(
            np.linalg.LinAlgError, match=rf"not positive semi-definite in {dtype}.* -1, the largest 3.*diag_reg"
        ):
            predict()
        with pytest.raises(ValueError, match="not positive semi-definite"):
            predict()


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(6))
def test_duplicate_training_points_have_no_share(seed, dtype):
    """The limit of gradient flow is that of the set without them, whatever the signs of rounding errors are."""
    x, x_test, y = duplicate_points(dtype, seed=seed)
    once = gp_inference(linear(x[:-1], None, ""), y[:-1])("nngp", linear(x_test, x[:-1], ""))
    for predict in infinite_time_predictions(linear(x, None, ""), y, linear(x_test, x, "")):
        with pytest.warns(
            UserWarning, match=rf"dimension 12 has rank 11 in {dtype}.*pseudo-inverse.*diag_reg=.*regular"
        ):
            mean = predict()
        np.testing.assert_allclose(mean, once, atol=2e4 * float(np.finfo(dtype).eps))


def test_more_points_than_features(dtype):
    """A linear network: least squares of the smallest norm. One warning for all calls."""
    random = np.random.default_rng(0)
    x, x_test, y = (random.normal(size=shape).astype(dtype) for shape in ((20, 5), (4, 5), (20, 2)))
    predict_fn = gp_inference(linear(x, None, ""), y)
    with pytest.warns(UserWarning, match="dimension 20 has rank 5") as warned:
        means = [predict_fn("nngp", linear(x_test, x, "")) for _ in range(2)]
    assert len(warned) == 1
    expected = x_test @ np.linalg.lstsq(x, y, rcond=None)[0]
    for mean in means:
        np.testing.assert_allclose(mean, expected, atol=2e3 * float(np.finfo(dtype).eps))
    posterior = predict_fn("nngp", linear(x_test, x, ""), linear(x_test, None, ""))
    np.testing.assert_allclose(posterior.covariance, 0, atol=2e3 * float(np.finfo(dtype).eps))


def test_a_kernel_of_zeros_teaches_nothing(dtype):
    with pytest.warns(UserWarning, match="has rank 0"):
        mean = gp_inference(np.zeros((3, 3), dtype), Y)("nngp", np.zeros((1, 3), dtype))
    np.testing.assert_array_equal(mean, 0)


@pytest.mark.parametrize("diagonal", [0.0, -2.0])
def test_an_indefinite_matrix_without_a_positive_diagonal(diagonal, dtype):
    kernel = np.array([[diagonal, 1.0], [1.0, diagonal]], dtype)
    with pytest.raises(np.linalg.LinAlgError, match=r"not positive semi-definite.*its smallest eigenvalue is -[13]"):
        gp_inference(kernel, Y[:2])("nngp", kernel)


def test_advice_suits_the_precision(x64):
    for dtype, in_double in (("float64", False), ("float32", True)):
        with pytest.raises(np.linalg.LinAlgError) as error:
            gp_inference(INDEFINITE.astype(dtype), Y)("nngp", TEST_TRAIN.astype(dtype))
        assert ("compute the kernel in float64" in str(error.value)) == in_double


def test_the_regularisation_that_is_recommended_is_enough(dtype):
    x, _, y = duplicate_points(dtype)
    indefinite, singular = INDEFINITE.astype(dtype), linear(x, None, "")
    with pytest.raises(np.linalg.LinAlgError) as error:
        gp_inference(indefinite, Y)("nngp", indefinite)
    with pytest.warns(UserWarning) as warned:
        gp_inference(singular, y)("nngp", singular)
    of_error = re.search(r"by about (\S+) of the mean", str(error.value)).group(1)
    of_warning = re.search(r"`diag_reg=(\S+)` would", str(warned[0].message)).group(1)
    for kernel, labels, diag_reg in ((indefinite, Y, of_error), (singular, y, of_warning)):
        assert np.isfinite(gp_inference(kernel, labels, diag_reg=float(diag_reg))("nngp", kernel)).all()


def test_error_is_raised_inside_jit_if_the_kernel_is_known():
    predict_fn = gp_inference(INDEFINITE, Y)
    with pytest.raises(np.linalg.LinAlgError, match="not positive semi-definite"):
        jax.jit(lambda k: predict_fn("nngp", k))(TEST_TRAIN)


def test_error_is_raised_on_every_call():
    predict_fn = gp_inference(INDEFINITE, Y)
    for _ in range(2):
        with pytest.raises(np.linalg.LinAlgError):
            predict_fn("nngp", TEST_TRAIN)


def test_traced_singular_matrix_gives_the_limit_of_gradient_flow(dtype):
    """Duplicate points with labels that agree: the solution is that of the set without the duplicate."""
    x, x_test, y = duplicate_points(dtype)

    def predict(x):
        return gp_inference(linear(x, None, ""), y)("nngp", linear(x_test, x, ""))

    once = gp_inference(linear(x[:-1], None, ""), y[:-1])("nngp", linear(x_test, x[:-1], ""))
    tolerance = 2e4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(jax.jit(predict)(x), once, atol=tolerance)
    np.testing.assert_allclose(jax.jit(jax.vmap(predict))(np.stack([x, 2 * x]))[0], once, atol=tolerance)
    eager = gradient_descent_mse(linear(x, None, ""), y)(jnp.inf, None, 0.0, linear(x_test, x, ""))
    np.testing.assert_allclose(eager, once, atol=tolerance)


def test_traced_indefinite_matrix_gives_no_nan(dtype):
    def predict(kernel):
        return gp_inference(kernel, Y)("nngp", TEST_TRAIN)

    # Eigenvalues 3, 1 and -1: the last direction is left out.
    vectors = np.array([[0.5**0.5, 0.5**0.5, 0.0], [0.0, 0.0, 1.0]])
    expected = TEST_TRAIN @ (vectors.T / [3.0, 1.0]) @ vectors @ Y
    kernel = jnp.asarray(INDEFINITE, dtype)
    np.testing.assert_allclose(jax.jit(predict)(kernel), expected, rtol=1e-5)
    assert jnp.isfinite(jax.jit(jax.grad(lambda kernel: predict(kernel).sum()))(kernel)).all()
    assert jnp.isfinite(jax.vmap(jax.grad(lambda kernel: predict(kernel).sum()))(kernel[None])).all()


@pytest.mark.parametrize("time", [0.0, 0.5, 30.0, 1e4])
def test_zero_eigenvalues_at_finite_time(time, x64):
    """As the integral of the flow says, also where the test points depend on a direction that is not learned."""
    kernel, test_train = np.ones((3, 3)), TEST_TRAIN
    # d/dtau (f, f*) = (K, K*) (y - f) as one linear system, homogeneous in (f, f*, 1).
    system = np.zeros((5, 5))
    system[:3, :3], system[:3, 4:] = -kernel, kernel @ Y
    system[3, :3], system[3, 4:] = -test_train, test_train @ Y
    expected = expm(system * time / 3)[:4, 4:]
    train, test = gradient_descent_mse(kernel, Y)(time, 0.0, 0.0, test_train)
    np.testing.assert_allclose(train, expected[:3], atol=1e-11)
    np.testing.assert_allclose(test, expected[3:], rtol=1e-11)


@pytest.mark.parametrize("time", [1.0, 1e6, 1e20, np.inf])
def test_duplicate_points_at_any_time(time, dtype):
    """Long training does not amplify the rounding errors of a singular kernel."""
    x, x_test, y = duplicate_points(dtype)
    y[-1] += 1  # labels that contradict each other: the mean of both is learned
    weights = np.ones(len(x) - 1)
    weights[4] = 2
    y_mean = y[:-1].copy()
    y_mean[4] = (y[4] + y[-1]) / 2
    # Gradient flow on a weighted loss, for the points without the duplicate.
    once, tau = x[:-1].astype("float64"), time / y.size
    root = weights[:, None] ** 0.5
    kernel = root * (once @ once.T) * root.T
    rates, vectors = np.linalg.eigh(kernel)
    gain = (vectors * (-np.expm1(-rates * tau) / rates)) @ vectors.T
    expected = x_test @ once.T @ (root * (gain @ (root * y_mean)))
    predict_fn = gradient_descent_mse_ensemble(linear, x, y)
    prediction = predict_fn(time, x_test, "ntk", compute_cov=True)
    tolerance = 2e4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(prediction.mean, expected, atol=tolerance)
    assert np.linalg.eigvalsh(prediction.covariance)[0] > -tolerance
    np.testing.assert_allclose(predict_fn(np.inf)[0][4], y_mean[4], atol=tolerance)


def test_negative_eigenvalues_are_announced(dtype):
    with pytest.warns(UserWarning, match="eigenvalue -1 .*the largest is 3"):
        train, test = gradient_descent_mse(INDEFINITE.astype(dtype), Y)(1e3, 0.0, 0.0, TEST_TRAIN)
    np.testing.assert_allclose(train, [[2.0], [2.0], [0.0]], atol=1e-5)  # the part along (1, -1, 0) stays at 0
    np.testing.assert_allclose(test, [[2 / 3]], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_kernels_that_are_not_finite_are_refused(bad):
    kernel = np.eye(3)
    kernel[1, 1] = bad
    for function in (gp_inference, gradient_descent_mse):
        with pytest.raises(ValueError, match="infinite or not a number"):
            function(kernel, Y)
    with pytest.raises(ValueError, match="infinite or not a number"):
        max_learning_rate(kernel)
    with pytest.raises(ValueError, match="infinite or not a number"):
        gp_inference(np.eye(3), Y, diag_reg=bad)


# Input that does not fit


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (3,), (3, 3, 1, 1), (2, 3, 3)])
def test_train_train_kernel_of_the_wrong_shape(shape):
    for function in (gp_inference, gradient_descent_mse):
        with pytest.raises(ValueError, match=r"`k_train_train` has shape .*`y_train` of shape \(3, 1\).*\(3, 3\)"):
            function(np.ones(shape), Y)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (3, 2, 1), (3, 3, 1, 1)])
def test_test_train_kernel_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"`k_test_train` has shape .*test-train kernel must have shape \(any, 3\)"):
        gp_inference(np.eye(3), Y)("nngp", np.ones(shape))


def test_test_test_kernel_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"`k_test_test` has shape \(3,\).*\(1, 1\)"):
        gp_inference(np.eye(3), Y)("nngp", TEST_TRAIN, np.ones(3))


def test_trace_axes_that_do_not_exist():
    with pytest.raises(ValueError, match=r"do not exist in `y_train` of shape \(3, 1\)"):
        gp_inference(np.eye(3), Y, trace_axes=(2,))
    with pytest.raises(ValueError, match=r"shape \(\).*shape \(n, 1\)"):
        gp_inference(np.eye(3), 1.0)


def test_labels_without_an_output_axis():
    with pytest.raises(
        ValueError, match=r"`y_train` of shape \(3,\) and trace axes \(0,\).*scalar labels the shape \(n, 1\)"
    ):
        gp_inference(np.eye(3), np.ones(3))


def test_no_labels():
    with pytest.raises(ValueError, match="no entries"):
        gp_inference(np.ones((0, 0)), np.ones((0, 1)))


def test_complex_kernels():
    with pytest.raises(TypeError, match="must be real"):
        gp_inference(np.eye(3) * 1j, Y)


def test_one_kernel_where_there_are_two():
    both = Kernels(np.eye(3), np.eye(3))
    with pytest.raises(TypeError, match=r"`k_train_train` must be one array.*`.ntk` or `.nngp`"):
        gradient_descent_mse(both, Y)
    with pytest.raises(TypeError, match=r"`k_test_train` must be one array"):
        gradient_descent_mse(np.eye(3), Y)(None, None, 0.0, both)
    with pytest.raises(TypeError, match="`ntk_train_train` must be one array"):
        max_learning_rate(both)


def test_max_learning_rate_of_a_rectangle():
    with pytest.raises(ValueError, match=r"pairs of axes of the same size, but has shape \(3, 2\)"):
        max_learning_rate(np.ones((3, 2)))


def test_initial_outputs():
    predict_fn = gradient_descent_mse(np.eye(3), Y)
    with pytest.raises(ValueError, match="nothing to predict"):
        predict_fn(1.0, None, None, TEST_TRAIN)
    with pytest.raises(ValueError, match="need `k_test_train`"):
        predict_fn(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"`fx_train_0` has shape \(4, 1\), which does not broadcast to \(3, 1\)"):
        predict_fn(1.0, np.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"`fx_test_0` has shape \(3, 1\), which does not broadcast to \(1, 1\)"):
        predict_fn(1.0, 0.0, np.zeros((3, 1)), TEST_TRAIN)


@pytest.mark.parametrize(
    "time, learning_rate", [(-1.0, 1.0), ([0.0, -1e-3], 1.0), (1.0, -1.0), (np.nan, 1.0), (np.inf, 0.0)]
)
def test_times(time, learning_rate):
    with pytest.raises(ValueError, match="`learning_rate \\* t` must be at least 0"):
        gradient_descent_mse(np.eye(3), Y, learning_rate)(np.asarray(time))


@pytest.mark.parametrize(
    "get, message",
    [((), "non-empty"), (("ntk", "NTK"), "must be unique"), ("cov1", "asks for cov1"), (("nngp", "x"), "asks for x")],
)
def test_get(get, message):
    with pytest.raises(ValueError, match=message):
        gp_inference(np.eye(3), Y)(get, TEST_TRAIN)
    with pytest.raises(ValueError, match=message):
        gradient_descent_mse_ensemble(linear, np.eye(3), Y)(None, TEST_TRAIN, get)


def test_ensemble_of_the_ntk_process():
    with pytest.raises(NotImplementedError, match="`gp_inference` predicts with it"):
        gradient_descent_mse_ensemble(linear, np.eye(3), Y)(None, TEST_TRAIN, "ntkgp")


def test_ntk_covariance_without_the_nngp():
    train, test_train, test_test = np.eye(3), TEST_TRAIN, np.eye(1)
    message = "needs the NNGP and the NTK"
    with pytest.raises(ValueError, match=message):
        gp_inference(train, Y)("ntk", test_train, test_test)
    with pytest.raises(ValueError, match=message):
        gp_inference(Kernels(train, train), Y)("ntk", test_train, test_test)
    with pytest.raises(ValueError, match=message):
        gp_inference(train, Y)(None, Kernels(test_train, test_train), test_test)
    with pytest.raises(ValueError, match=message):
        gp_inference(Kernels(None, train), Y)("ntk", Kernels(test_train, test_train), test_test)
    with pytest.raises(ValueError, match=r"`k_test_train.nngp` is None"):
        gp_inference(Kernels(train, train), Y)("ntk", Kernels(None, test_train), test_test)


def test_kernel_function_that_returns_one_kernel_for_two():
    predict_fn = gradient_descent_mse_ensemble(lambda x1, x2, get: linear(x1, x2, "ntk"), np.eye(3), Y)
    with pytest.raises(TypeError, match=r"`get=\('nngp', 'ntk'\)` and must return an object with these attributes"):
        predict_fn(1.0, TEST_TRAIN)


def test_kernels_that_are_missing():
    train, test_train = Kernels(np.eye(3), None), Kernels(TEST_TRAIN, None)
    with pytest.raises(
        ValueError, match=r"`k_train_train.ntk` is None or missing, and the prediction `'ntk'` needs it"
    ):
        gp_inference(train, Y)("ntk", test_train)
    with pytest.raises(ValueError, match=r"`k_train_train.ntk`"):
        gp_inference(train, Y)(None)
    with pytest.raises(ValueError, match=r"`k_test_train.ntk`"):
        gp_inference(np.eye(3), Y)("ntkgp", test_train)
    with pytest.raises(ValueError, match=r"`k_test_test.ntk`"):
        gp_inference(np.eye(3), Y)("ntkgp", TEST_TRAIN, Kernels(np.eye(1), None))
