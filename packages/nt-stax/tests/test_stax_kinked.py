"""Nonlinearities with kinks, against quadrature; those with closed forms are tested in test_core_clip.py, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_stax import Celu, Dense, Elu, HardSigmoid, HardSilu, HardSwish, HardTanh, Relu6, Selu, serial
from scipy.special import ndtr
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

FUNCTIONS = {
    "HardTanh": (HardTanh, jax.nn.hard_tanh),
    "HardSigmoid": (HardSigmoid, jax.nn.hard_sigmoid),
    "Relu6": (Relu6, jax.nn.relu6),
    "Elu": (lambda: Elu(0.7), lambda x: jax.nn.elu(x, 0.7)),
    "Selu": (Selu, jax.nn.selu),
    "Celu": (lambda: Celu(2.0), lambda x: jax.nn.celu(x, 2.0)),
    "HardSilu": (HardSilu, jax.nn.hard_silu),
    "HardSwish": (HardSwish, jax.nn.hard_silu),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_functions(name):
    layer, f = FUNCTIONS[name]
    x = 4 * normal(1, (3, 5))
    np.testing.assert_allclose(layer()[1]((), x), f(x), rtol=1e-6, atol=1e-6)


def exponential(alpha, scale, slope):
    """`scale x` for positive `x`, else `alpha (exp(slope x) - 1)`, and the derivative."""
    return (
        lambda x: np.where(x > 0, scale * x, alpha * np.expm1(slope * np.minimum(x, 0))),
        lambda x: np.where(x > 0, scale, alpha * slope * np.exp(slope * np.minimum(x, 0))),
    )


SELU = 1.0507009873554805, 1.6732632423543772
# With the largest errors of NNGP and NTK, relative to those of equal inputs. All kinks are at 0.
KINKED = {
    "Elu": (lambda: Elu(0.7), exponential(0.7, 1.0, 1.0), 1e-11, 1e-7),
    "Selu": (Selu, exponential(SELU[0] * SELU[1], SELU[0], 1.0), 1e-11, 1e-7),
    "Celu": (lambda: Celu(2.0), exponential(2.0, 1.0, 0.5), 1e-11, 1e-7),
}


def mean(integrand, std1, std2, angle):
    """E integrand(u, v), in polar coordinates: kinks at 0 are at four angles."""
    borders = np.unique([-np.pi / 2, 0, angle - np.pi / 2, np.pi / 2, angle + np.pi / 2, np.pi, 1.5 * np.pi])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half, middle = 0.5 * np.diff(borders)[:, None], 0.5 * (borders[1:] + borders[:-1])[:, None]
    turns, turn_weights = (middle + half * nodes).ravel(), (half * weights).ravel()
    radii = (6 * (np.arange(2)[:, None] + 0.5 * (nodes + 1))).ravel()
    radius_weights = np.tile(3 * weights, 2) * radii * np.exp(-0.5 * radii**2) / (2 * np.pi)
    u, v = std1 * radii[:, None] * np.cos(turns), std2 * radii[:, None] * np.cos(turns - angle)
    return radius_weights @ integrand(u, v) @ turn_weights


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_kernels_are_expectations(name, implementation, x64):
    """Also where terms beyond the coefficients count: for nearly equal inputs."""
    layer, (f, slope), nngp_error, ntk_error = KINKED[name]
    angles = np.array([np.pi, 2.5, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 0.0])
    x1 = np.sqrt(2 * 4.0) * np.array([[1.0, 0.0]])
    x2 = np.sqrt(2 * 2.0) * np.stack([np.cos(angles), np.sin(angles)], 1)
    kernel = serial(Dense(1), layer())[2](x1, x2, ("nngp", "ntk"), implementation=implementation)
    expected = np.array([mean(lambda u, v: f(u) * f(v), 2.0, 2**0.5, angle) for angle in angles])
    factor = np.array([mean(lambda u, v: slope(u) * slope(v), 2.0, 2**0.5, angle) for angle in angles])
    ntk = factor * 8**0.5 * np.cos(angles)
    np.testing.assert_allclose(kernel.nngp[0], expected, rtol=0, atol=nngp_error * expected[-1])
    np.testing.assert_allclose(kernel.ntk[0], ntk, rtol=0, atol=ntk_error * ntk[-1])


def test_hard_silu(x64):
    """On a fine grid: the slope is only piecewise continuous."""
    x1, x2 = 2**0.5 * np.array([[1.0, 0.0]]), 2**0.5 * np.array([[0.8, 0.6]])
    kernel = serial(Dense(1), HardSilu())[2](x1, x2, ("nngp", "ntk"))
    z = np.linspace(-8, 8, 2001)
    density = np.exp(-0.5 * z**2) / np.sum(np.exp(-0.5 * z**2))
    u, v = z[:, None], 0.8 * z[:, None] + 0.6 * z
    nngp = density @ (_hard_silu(u) * _hard_silu(v)) @ density
    ntk = 0.8 * (density @ (_hard_silu_slope(u) * _hard_silu_slope(v)) @ density)
    np.testing.assert_allclose(kernel.nngp[0, 0], nngp, rtol=2e-5)
    np.testing.assert_allclose(kernel.ntk[0, 0], ntk, rtol=1e-4)


def test_nearly_equal_inputs_of_hard_silu(x64):
    """At a variance of 10, where much of the mass is at the kinks: of the second slope the mean given the first."""
    std, correlation = 10**0.5, 0.9999
    rest = std * (1 - correlation**2) ** 0.5
    x1, x2 = 20**0.5 * np.array([[1.0, 0.0]]), 20**0.5 * np.array([[correlation, (1 - correlation**2) ** 0.5]])
    ntk = serial(Dense(1), HardSilu())[2](x1, x2, "ntk")
    z = (np.arange(400_000) + 0.5) / 400_000 * 16 - 8
    mean, density = std * correlation * z, np.exp(-0.5 * z**2) / np.sum(np.exp(-0.5 * z**2))
    begin, end = (-3 - mean) / rest, (3 - mean) / rest
    slope = (2 * mean + 3) / 6 * (ndtr(end) - ndtr(begin)) + ndtr(-end)
    slope += rest / 3 * (np.exp(-0.5 * begin**2) - np.exp(-0.5 * end**2)) / (2 * np.pi) ** 0.5
    expected = 10 * correlation * (density @ (_hard_silu_slope(std * z) * slope))
    np.testing.assert_allclose(ntk[0, 0], expected, rtol=1e-5)


def _hard_silu(x):
    return x * np.clip(x + 3, 0, 6) / 6


def _hard_silu_slope(x):
    return np.where(np.abs(x) < 3, (2 * x + 3) / 6, x > 0)


def test_equal_networks_are_compiled_once():
    x = normal(1, (2, 3))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **kwargs: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    for repeat in range(2):
        jax.block_until_ready(serial(Dense(4), Elu(0.6))[2](x, None, "nngp"))
        if repeat == 0:
            assert compiled
            compiled.clear()
    assert not compiled


def test_parameters_that_are_arrays():
    found, expected = (serial(Dense(3), Celu(alpha))[2](np.eye(2), None, "nngp") for alpha in (jnp.array(0.5), 0.5))
    np.testing.assert_array_equal(found, expected)


def test_learnt_parameters():
    def loss(alpha):
        return jnp.sum(serial(Dense(3), Elu(alpha))[2](jnp.ones((1, 3)), None, "nngp"))

    np.testing.assert_allclose(jax.grad(loss)(0.8), (loss(0.81) - loss(0.79)) / 0.02, rtol=1e-3)
