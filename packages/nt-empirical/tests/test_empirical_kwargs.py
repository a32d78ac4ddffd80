"""Keywords for two inputs, and the keys of random numbers: that kernels are made of what belongs to each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_empirical import empirical_kernel_fn, empirical_nngp_fn, empirical_ntk_vp_fn

pytestmark = pytest.mark.unoptimised

X = np.arange(6.0, dtype="float32").reshape(2, 3)
OTHER = X + np.array([0, 0, 1], "float32")


def scaled(w, x, scale=1.0, rng=None):
    return w * x * (scale if rng is None else jax.random.uniform(rng))


def test_each_input_gets_its_value():
    w = jnp.ones(())
    kernel_fn = empirical_kernel_fn(scaled)
    plain, pair = (kernel_fn(X, OTHER, None, w, **kwargs) for kwargs in ({}, {"scale": (2.0, 5.0)}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 10 * b), pair, plain)
    assert empirical_ntk_vp_fn(scaled, X, OTHER, w, scale=(2.0, 5.0))(jnp.ones((2, 3)))[0, 1] == 10 * np.sum(OTHER)


def test_without_second_inputs_the_first_values_count():
    """As there is one network with one set of values, the kernel is symmetric."""
    w = jnp.ones(())
    kernel = empirical_kernel_fn(scaled)(X, None, "ntk", w, scale=(2.0, 5.0))
    np.testing.assert_allclose(kernel, 4 * empirical_kernel_fn(scaled)(X, None, "ntk", w))


@pytest.mark.parametrize("typed", [True, False])
def test_kernels_of_a_random_function(typed):
    """Under jit and without, the kernel is made of the outputs with the documented keys."""
    k, w = (jax.random.key if typed else jax.random.PRNGKey)(3), jnp.full((), 2.0)
    for x2, key2 in [(OTHER, jax.random.fold_in(k, 1)), (X + 0, k), (None, k)]:
        expected = scaled(w, X, rng=k) @ scaled(w, X if x2 is None else x2, rng=key2).T / 3
        for nngp_fn in (empirical_nngp_fn(scaled), jax.jit(empirical_nngp_fn(scaled))):
            np.testing.assert_allclose(nngp_fn(X, x2, w, rng=k), expected, rtol=1e-6)
