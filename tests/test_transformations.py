"""`kernel_fn` under jit, vmap and grad, with respect to inputs and to traced `W_std` and `b_std`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from neural_tangents import stax
from test_monte_carlo import NONLINEARITIES

X1 = np.random.default_rng(0).normal(size=(3, 4, 2))
X2 = np.random.default_rng(1).normal(size=(2, 4, 2))
WEIGHTS = np.random.default_rng(2).normal(size=(2, 3, 2))  # of the entries of both kernels, in a sum to differentiate


def residual(W_std, b_std):
    block = stax.serial(stax.Relu(), stax.Conv(1, (3,), padding="SAME", W_std=W_std, b_std=b_std))
    return stax.serial(
        stax.Conv(1, (2,), padding="CIRCULAR", W_std=W_std, b_std=b_std),
        stax.FanOut(2),
        stax.parallel(block, stax.Identity()),
        stax.FanInSum(),
        stax.LayerNorm((1, -1), eps=0.1),
        stax.Relu(),
        stax.GlobalAvgPool(),
        stax.Dense(1, W_std, b_std),
    )


def fully_connected(W_std, b_std):
    return stax.serial(
        stax.Flatten(),
        *[layer for _ in range(3) for layer in (stax.Dense(1, W_std, b_std), stax.Relu())],
        stax.Dense(1, W_std, b_std, parameterization="standard"),
    )


def attention(W_std, b_std):
    return stax.serial(
        stax.Dense(1, W_std, b_std),
        stax.GlobalSelfAttention(
            1, 1, 1, 2, linear_scaling=False, attention_mechanism="IDENTITY", W_value_std=W_std, b_std=b_std
        ),
        stax.Erf(),
        stax.GlobalSumPool(),
    )


NETWORKS = [residual, fully_connected, attention]
pytestmark = [pytest.mark.filterwarnings("ignore:FanInSum"), pytest.mark.unoptimised]


def kernels(network, x1, x2, W_std, b_std):
    both = network(W_std, b_std)[2](x1, x2, ("nngp", "ntk"))
    return jnp.stack(both)


@pytest.mark.parametrize("network", NETWORKS)
def test_derivatives_are_those_of_finite_differences(network):
    def total(x1, W_std, b_std):
        return jnp.sum(WEIGHTS * kernels(network, x1, X2, W_std, b_std))

    with jax.enable_x64(True):
        point = (jnp.asarray(X1), jnp.asarray(1.3), jnp.asarray(0.4))
        gradients = jax.grad(total, argnums=(0, 1, 2))(*point)
        direction = np.random.default_rng(3).normal(size=X1.shape)
        for i, tangent in enumerate((direction, 1.0, 1.0)):
            step = 1e-5
            above, below = (
                total(*(p + s * tangent if i == j else p for j, p in enumerate(point))) for s in (step, -step)
            )
            derivative = np.sum(gradients[i] * tangent)
            np.testing.assert_allclose(derivative, (above - below) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_jit_and_vmap(network):
    """Over inputs and over coefficients."""
    x1, x2 = X1.astype(np.float32), X2.astype(np.float32)
    W_stds, b_stds = jnp.array([0.9, 1.4]), jnp.array([0.0, 0.5])
    expected = np.stack([kernels(network, x1, x2, W_std, b_std) for W_std, b_std in zip(W_stds, b_stds, strict=True)])

    def traced(x1, W_std, b_std):
        return kernels(network, x1, x2, W_std, b_std)

    jitted = jax.jit(traced)(x1, W_stds[1], b_stds[1])
    np.testing.assert_allclose(jitted, expected[1], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(traced, (None, 0, 0))(x1, W_stds, b_stds), expected, rtol=1e-5)
    inputs = np.stack([2 * x1, x1])
    np.testing.assert_allclose(jax.vmap(traced, (0, None, None))(inputs, 1.4, 0.5)[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("itself", [False, True])
def test_gradients_are_finite_in_degenerate_cases(network, itself):
    """Equal, opposite and zero inputs; zero variance, where inputs are zero and there is no bias."""
    x1 = np.stack([X1[0], 0 * X1[0]]).astype(np.float32)
    x2 = None if itself else np.concatenate([x1, -x1[:1]])

    def total(x1, W_std, b_std):
        return jnp.sum(kernels(network, x1, x2, W_std, b_std))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))
    for b_std in (0.0, 0.4):
        assert all(np.isfinite(g).all() for g in gradients(x1, 1.3, b_std))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NONLINEARITIES)
def test_gradients_of_nonlinearities_are_finite(name):
    """With and without a bias, at equal, opposite and zero inputs at once."""
    x1 = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    x2 = np.array([[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]], np.float32)

    def total(x1, W_std, b_std):
        _, _, kernel_fn = stax.serial(stax.Dense(1, W_std, b_std), NONLINEARITIES[name], stax.Dense(1, W_std))
        return jnp.sum(jnp.stack(kernel_fn(x1, x2, ("nngp", "ntk"))))

    assert np.isfinite(jax.jacfwd(total)(x1, 1.3, None)).all()
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))
    for b_std in (0.0, 0.4):
        assert all(np.isfinite(g).all() for g in gradients(x1, 1.3, b_std))
