"""Gradient flow on any loss, against closed forms and independent integrations."""

import sys
import types

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_predict import ODEState, gradient_descent, gradient_descent_mse
from scipy.integrate import solve_ivp
from scipy.linalg import expm

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.unoptimised]

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(7, 9))
KERNEL, TEST_TRAIN = FEATURES[:4] @ FEATURES[:4].T, FEATURES[4:] @ FEATURES[:4].T
Y, F_0, F_TEST_0 = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3))
PROBABILITIES = np.exp(Y) / np.exp(Y).sum(1, keepdims=True)
TIMES = np.array([[0.0, 3.0], [0.4, 0.4]])  # in no order


def mse(fx, y):
    return 0.5 * jnp.mean((fx - y) ** 2)


def cross_entropy(fx, y):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(fx) * y, axis=-1))


def test_mean_squared_error_is_the_closed_form():
    expected = gradient_descent_mse(KERNEL, Y, 0.7)(TIMES, F_0, F_TEST_0, TEST_TRAIN)
    actual = gradient_descent(mse, KERNEL, Y, 0.7)(TIMES, F_0, F_TEST_0, TEST_TRAIN)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_layout_of_several_kernel_axes():
    kernel = np.kron(KERNEL, [[1.0, 0.5], [0.5, 2.0]]).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3)
    y = RNG.normal(size=(4, 3, 2))
    expected = gradient_descent_mse(kernel, y, trace_axes=1)(2.0)
    np.testing.assert_allclose(gradient_descent(mse, kernel, y, trace_axes=1)(2.0), expected, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_the_matrix_exponential(momentum):
    """d/ds (f, q) and the same at test points as one linear system, homogeneous in (f, f*, q, q*, 1)."""
    rate, time, q_0 = 0.3, 2.0, RNG.normal(size=(7, 1))
    y, f_0 = Y[:, :1], np.concatenate([F_0, F_TEST_0])[:, :1]
    kernel = np.concatenate([KERNEL, TEST_TRAIN]) / y.size
    system = np.zeros((15, 15))
    system[:7, 7:14] = np.eye(7)
    system[7:14, :4], system[7:14, 14:] = -kernel, kernel @ y
    system[7:14, 7:14] = np.eye(7) * (momentum - 1) / rate**0.5
    expected = expm(system * rate**0.5 * time) @ np.concatenate([f_0, q_0, [[1.0]]])
    state = ODEState(f_0[:4], f_0[4:], q_0[:4], q_0[4:])
    end = gradient_descent(mse, KERNEL, y, rate, momentum)(time, state, None, TEST_TRAIN)
    actual = np.concatenate([end.fx_train, end.fx_test, end.qx_train, end.qx_test])
    np.testing.assert_allclose(actual, expected[:14], atol=1e-6)
    limit = gradient_descent(mse, KERNEL, y, rate, momentum)(None, state, None, TEST_TRAIN)
    expected = expm(system * 1e4) @ np.concatenate([f_0, q_0, [[1.0]]])
    np.testing.assert_allclose(np.concatenate([limit.fx_train, limit.fx_test]), expected[:7], atol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_cross_entropy_is_the_integral(momentum):
    kernel, f_0 = np.concatenate([KERNEL, TEST_TRAIN]), np.concatenate([F_0, F_TEST_0])

    def velocity(_, state):
        f, q = state.reshape(2, 7, 3)
        odds = np.exp(f[:4])
        force = kernel @ (odds / odds.sum(1, keepdims=True) - PROBABILITIES) / 4
        if momentum is None:
            return np.stack([-0.5 * force, 0 * q]).ravel()
        return np.stack([0.5**0.5 * q, (momentum - 1) * q - 0.5**0.5 * force]).ravel()

    start = np.stack([f_0, 0 * f_0]).ravel()
    expected = solve_ivp(velocity, (0, 3.0), start, "DOP853", rtol=1e-11, atol=1e-11, max_step=0.05).y[:, -1]
    predict_fn = gradient_descent(cross_entropy, KERNEL, PROBABILITIES, 0.5, momentum)
    actual = np.concatenate(predict_fn(3.0, F_0, F_TEST_0, TEST_TRAIN))
    np.testing.assert_allclose(actual, expected.reshape(2, 7, 3)[0], atol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_state_goes_on(momentum):
    predict_fn = gradient_descent(cross_entropy, KERNEL, PROBABILITIES, 1.0, momentum)
    once = predict_fn(5.0, ODEState(F_0, F_TEST_0), None, TEST_TRAIN)
    twice = predict_fn(3.0, predict_fn(2.0, ODEState(F_0, F_TEST_0), None, TEST_TRAIN), None, TEST_TRAIN)
    assert (once.qx_test is None) == (momentum is None)
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_which_outputs_are_returned():
    predict_fn = gradient_descent(mse, KERNEL, Y)
    train, test = predict_fn(1.0, 0.0, 0.0, TEST_TRAIN)
    np.testing.assert_allclose(predict_fn(1.0), train, atol=1e-7)
    np.testing.assert_allclose(predict_fn(1.0, None, 0.0, TEST_TRAIN), test, atol=1e-7)
    state = predict_fn(1.0, ODEState(0.0))
    np.testing.assert_allclose(state.fx_train, train, atol=1e-7)
    assert state.fx_test is None


# Infinite time


def test_limit_of_the_squared_error():
    expected = gradient_descent_mse(KERNEL, Y)(None, F_0, F_TEST_0, TEST_TRAIN)
    actual = gradient_descent(mse, KERNEL, Y)(None, F_0, F_TEST_0, TEST_TRAIN)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


@pytest.mark.parametrize("singular", [False, True])
def test_limit_of_the_cross_entropy_is_that_of_long_training(singular):
    """The loss does not change if all logits of a point do; that part of the outputs stays where it was."""
    repeat = np.array([0, 1, 2, 3, 3]) if singular else np.arange(4)
    y = PROBABILITIES[[0, 1, 2, 3, 1]] if singular else PROBABILITIES
    kernel, test_train = KERNEL[np.ix_(repeat, repeat)], TEST_TRAIN[:, repeat]
    predict_fn = gradient_descent(cross_entropy, kernel, y)
    limit = predict_fn(None, F_0[repeat], F_TEST_0, test_train)
    late = predict_fn(1e4, F_0[repeat], F_TEST_0, test_train)
    for one, other in zip(limit, late, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_losses_without_a_limit_are_refused():
    hard = np.eye(3)[[0, 1, 2, 0]]
    hinge = lambda fx, y: jnp.mean(jnp.maximum(0, 1 - fx * y) ** 2)  # noqa: E731
    for loss, y in ((cross_entropy, hard), (hinge, np.sign(Y)), (lambda fx, y: jnp.sum(jnp.sin(fx) * y), Y)):
        with pytest.raises(RuntimeError, match=r"no limit that can be found.*Give a finite `t`"):
            gradient_descent(loss, KERNEL, y)()
        with pytest.raises(RuntimeError, match="no limit that can be found"):
            jax.block_until_ready(jax.jit(lambda k, loss=loss, y=y: gradient_descent(loss, k, y)())(KERNEL))


# Transformations


def prediction(kernel, y, t, momentum=None):
    predict_fn = gradient_descent(cross_entropy, kernel, y, 1.0, momentum, rtol=1e-10, atol=1e-10)
    return predict_fn(t, F_0, F_TEST_0, TEST_TRAIN)[1]


def test_jit_and_vmap():
    expected = prediction(KERNEL, PROBABILITIES, 2.0)
    np.testing.assert_allclose(jax.jit(prediction)(KERNEL, PROBABILITIES, 2.0), expected, atol=1e-8)
    many = jax.vmap(prediction, (0, None, None))(np.stack([KERNEL, 2 * KERNEL]), PROBABILITIES, 2.0)
    np.testing.assert_allclose(many[0], expected, atol=1e-8)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "time, momentum, argnum",
    [
        *((time, momentum, argnum) for time, momentum in [(2.0, None), (2.0, 0.5)] for argnum in (0, 1, 2)),
        *((None, None, argnum) for argnum in (0, 1)),
    ],
)
def test_derivatives(time, momentum, argnum):
    arguments = [KERNEL, PROBABILITIES, time]
    direction = np.asarray(RNG.normal(size=np.shape(arguments[argnum])))
    if argnum == 0:
        direction = direction + direction.T

    def moved(step):
        shifted = [*arguments]
        shifted[argnum] = shifted[argnum] + step * direction
        return prediction(*shifted, momentum)[0, 1]

    expected = (moved(1e-4) - moved(-1e-4)) / 2e-4
    np.testing.assert_allclose(jax.grad(moved)(0.0), expected, rtol=1e-4, atol=1e-6)


def test_single_precision():
    with jax.enable_x64(False):
        single = gradient_descent(mse, KERNEL.astype("float32"), Y.astype("float32"))(TIMES, F_0, F_TEST_0, TEST_TRAIN)
        limit = gradient_descent(cross_entropy, KERNEL, PROBABILITIES)()
    assert single[0].dtype == limit.dtype == "float32"
    double = gradient_descent_mse(KERNEL, Y)(TIMES, F_0, F_TEST_0, TEST_TRAIN)
    np.testing.assert_allclose(single[1], double[1], atol=1e-3)
    np.testing.assert_allclose(limit, gradient_descent(cross_entropy, KERNEL, PROBABILITIES)(), atol=1e-3)


# Refusals


def test_initial_outputs_that_do_not_fit():
    predict_fn = gradient_descent(mse, KERNEL, Y)
    with pytest.raises(ValueError, match="nothing to predict"):
        predict_fn(1.0, None)
    with pytest.raises(ValueError, match="need `k_test_train`"):
        predict_fn(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"`fx_train` has shape \(3, 3\), which does not broadcast to \(4, 3\)"):
        predict_fn(1.0, F_TEST_0)
    with pytest.raises(ValueError, match=r"`k_test_train` has shape"):
        predict_fn(1.0, 0.0, 0.0, TEST_TRAIN.T)
    with pytest.raises(ValueError, match="`fx_test_0` must be None if an `ODEState` is given"):
        predict_fn(1.0, ODEState(0.0), 0.0, TEST_TRAIN)
    with pytest.raises(ValueError, match="has no `momentum`"):
        predict_fn(1.0, ODEState(0.0, None, 0.0))


@pytest.mark.parametrize("time, message", [(-1.0, "at least 0"), (np.inf, "`t=None`"), (np.nan, "at least 0")])
def test_times(time, message):
    with pytest.raises(ValueError, match=message):
        gradient_descent(mse, KERNEL, Y)([0.0, time])


def test_settings():
    with pytest.raises(TypeError, match="must be a real scalar"):
        gradient_descent(lambda fx, y: (fx - y) ** 2, KERNEL, Y)
    with pytest.raises(ValueError, match=r"`k_train_train` has shape"):
        gradient_descent(mse, KERNEL[:3], Y)
    with pytest.raises(ValueError, match="not a number"):
        gradient_descent(mse, KERNEL * np.nan, Y)
    with pytest.raises(ValueError, match="`momentum` must be in"):
        gradient_descent(mse, KERNEL, Y, momentum=1.0)


def test_too_few_steps():
    predict_fn = gradient_descent(mse, KERNEL, Y, max_steps=10)
    with pytest.raises(RuntimeError, match="10 steps are not enough"):
        predict_fn(100.0)
    with pytest.raises(RuntimeError, match="10 steps are not enough"):
        jax.block_until_ready(jax.jit(predict_fn)(100.0))


def test_a_bar_shows_how_far_it_is(monkeypatch):
    """On a terminal, when a second is over: up to 100 per cent, once, in whatever order times are."""
    shown = []

    class Bar:
        def __init__(self, initial, total, **kwargs):
            shown.append(("of", total))

        def update(self, *_):
            shown.append("one")

        def close(self):
            shown.append("closed")

    clock = iter(range(1000))
    monkeypatch.setattr(sys.modules["nt_core.progress"], "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    outputs = gradient_descent(mse, KERNEL, Y)(TIMES)
    assert shown[0] == ("of", 101) and shown[-1] == "closed" and 95 < shown.count("one") <= 101
    shown.clear()
    np.testing.assert_array_equal(gradient_descent(mse, KERNEL, Y, progress=False)(TIMES), outputs)
    assert not shown


def test_another_solver():
    outputs = gradient_descent(mse, KERNEL, Y, solver=diffrax.Dopri8())(TIMES)
    np.testing.assert_allclose(outputs, gradient_descent_mse(KERNEL, Y)(TIMES), atol=1e-6)


def test_without_diffrax_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nt_predict._dual_flow", None)
    with pytest.raises(ImportError, match=r"pip install 'nt-predict\[diffrax\]'"):
        gradient_descent(mse, KERNEL, Y)
