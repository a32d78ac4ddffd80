"""The use of variational Monte Carlo: kernels of the logarithm of a complex wave function, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import assert_close, quickly_compiled
from nt_empirical import NtkImplementation, empirical_ntk_fn

RNG = np.random.default_rng(0)
SPINS = RNG.choice([-1.0, 1.0], size=(6, 4))
PARAMS = {name: RNG.normal(size=shape) for name, shape in {"re": (4, 3), "im": (4, 3), "bias": (3,)}.items()}


def log_psi(params, spins):
    """A restricted Boltzmann machine: the real part and the phase, along the last axis."""
    theta = spins @ (params["re"] + 1j * params["im"]) + jnp.expand_dims(params["bias"], 0)
    log = jnp.sum(jnp.log(jnp.cosh(theta)), -1)
    return jnp.stack([log.real, log.imag], -1)


def jacobian(params, spins):
    """Returns the derivatives of the complex logarithm, by finite differences of it."""

    def log(name, index, step):
        shifted = {**params, name: params[name].copy()}
        shifted[name][index] += step
        return np.log(np.prod(np.cosh(spins @ (shifted["re"] + 1j * shifted["im"]) + shifted["bias"]), -1))

    return np.stack(
        [
            (log(name, index, 1e-5) - log(name, index, -1e-5)) / 2e-5
            for name, w in sorted(params.items())
            for index in np.ndindex(w.shape)
        ],
        -1,
    )


@pytest.mark.parametrize("implementation", list(NtkImplementation))
def test_complex_kernel_from_two_real_outputs(implementation, x64):
    """J J^+ = (Re Re' + Im Im') + i (Im Re' - Re Im'), from the kernel of both outputs, without a trace."""
    ntk_fn = empirical_ntk_fn(log_psi, trace_axes=(), vmap_axes=0, implementation=implementation)
    kernel = quickly_compiled(lambda x, p: ntk_fn(x, None, p))(SPINS, PARAMS)
    actual = kernel[..., 0, 0] + kernel[..., 1, 1] + 1j * (kernel[..., 1, 0] - kernel[..., 0, 1])
    rows = jacobian(PARAMS, SPINS)
    np.testing.assert_allclose(actual, rows @ rows.conj().T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("implementation", list(NtkImplementation)[1:])
def test_kernels_in_a_loop(implementation):
    """Rows by `lax.map`, rectangular; one compilation for all parameters, and no values are fetched."""
    params = jax.tree.map(lambda w: w.astype("float32"), PARAMS)
    spins = SPINS.astype("float32")
    ntk_fn = empirical_ntk_fn(log_psi, trace_axes=(), vmap_axes=0, implementation=implementation)
    compilations = []

    @jax.jit
    def steps(params, spins):
        compilations.append(None)

        def rows(chunk):
            return ntk_fn(chunk, spins, params)

        chunked = jax.lax.map(rows, spins.reshape(3, 2, 4))

        def step(params, _):
            kernel = ntk_fn(spins, None, params)
            return jax.tree.map(lambda w: w - 1e-3 * jnp.mean(kernel), params), kernel

        return chunked.reshape(6, 6, 2, 2), jax.lax.scan(step, params, None, length=2)[1]

    with jax.transfer_guard_device_to_host("disallow"):
        chunked, kernels = steps(params, spins)
        steps(jax.tree.map(lambda w: 2 * w, params), spins)
    assert len(compilations) == 1
    assert_close(chunked, kernels[0], 1e-6)
    assert np.max(np.abs(kernels[1] - kernels[0])) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [NtkImplementation.JACOBIAN_CONTRACTION, NtkImplementation.AUTO])
def test_thousands_of_samples(implementation):
    """Steps of natural gradient with 4000 samples of 40 spins, compiled once: J J^+ solves for the step."""
    n, sites, hidden = 4000, 40, 40
    spins = RNG.choice([-1.0, 1.0], size=(n, sites)).astype("float32")
    shapes = {"re": (sites, hidden), "im": (sites, hidden), "bias": (hidden,)}
    params = {name: (0.1 * RNG.normal(size=shape)).astype("float32") for name, shape in shapes.items()}
    ntk_fn = empirical_ntk_fn(log_psi, trace_axes=(), vmap_axes=0, implementation=implementation)
    compilations = []

    @jax.jit
    def step(params, spins):
        compilations.append(None)
        k = ntk_fn(spins, None, params)
        kernel = k[..., 0, 0] + k[..., 1, 1] + 1j * (k[..., 1, 0] - k[..., 0, 1])
        force = jax.scipy.linalg.solve(kernel / n + 0.1 * jnp.eye(n), jnp.ones(n, kernel.dtype), assume_a="pos")
        return jax.tree.map(lambda w: w - 1e-3 * jnp.mean(force.real), params), kernel

    with jax.transfer_guard_device_to_host("disallow"):
        following, kernel = step(params, spins)
        step(following, spins)
    assert len(compilations) == 1
    some = RNG.choice(n, 5, replace=False)
    derivatives = jax.vmap(jax.jacobian(lambda p, s: log_psi(p, s[None])[0]), (None, 0))(params, spins[some])
    rows = np.concatenate([np.asarray(d).reshape(5, 2, -1) for d in jax.tree.leaves(derivatives)], 2)
    rows = rows[:, 0] + 1j * rows[:, 1]
    expected = rows @ rows.conj().T
    assert np.max(np.abs(np.asarray(kernel)[np.ix_(some, some)] - expected)) < 1e-5 * np.max(np.abs(expected))
