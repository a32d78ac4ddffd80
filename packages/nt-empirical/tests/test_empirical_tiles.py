"""Kernels within a bound on memory."""

import jax
import jax.numpy as jnp
import nt_core
import numpy as np
import pytest
from empirical_networks import assert_close, mlp, mlp_kernels, mlp_params, reduce
from nt_core.tracing import is_traced
from nt_empirical import NtkImplementation, empirical_ntk_fn

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(20, 6)).astype("float32"), RNG.normal(size=(13, 6)).astype("float32")
PARAMS = mlp_params(6, 2, dtype="float32")


def sizes_of(monkeypatch):
    """Returns a list of the sizes of tiles that are used from now on."""
    sizes = []

    def batch(kernel_fn, size, **kwargs):
        sizes.append(size)
        return nt_core.batch(kernel_fn, size, **kwargs)

    monkeypatch.setattr("nt_empirical._tiles.batch", batch)
    return sizes


@pytest.mark.parametrize("implementation", [NtkImplementation.AUTO, NtkImplementation.JACOBIAN_CONTRACTION])
def test_tiles_give_the_same_kernels(implementation, monkeypatch):
    sizes = sizes_of(monkeypatch)
    options = {"vmap_axes": 0, "implementation": implementation}
    bounded, free = (empirical_ntk_fn(mlp, max_bytes=b, **options) for b in (5_000, 10**9))
    expected = reduce(mlp_kernels(PARAMS, X1, X2)[1], (-1,), ())
    assert_close(free(X1, X2, PARAMS), expected, 2e-6)
    assert sizes == []
    assert_close(bounded(X1, X2, PARAMS), expected, 2e-6)
    assert sizes
    assert max(sizes) < 20
    symmetric = jax.jit(bounded)(X1, None, PARAMS)
    np.testing.assert_array_equal(symmetric, symmetric.T)
    assert_close(symmetric, reduce(mlp_kernels(PARAMS, X1, X1)[1], (-1,), ()), 2e-6)


def deep(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


@pytest.mark.parametrize("n2", [None, 8])
def test_jacobians_are_contracted_array_by_array(n2, monkeypatch):
    """Ten arrays of the same size: Jacobians of two batches by one fit, and copies of them, but not those by all."""
    sizes = sizes_of(monkeypatch)
    params = [jnp.asarray(RNG.normal(size=(32, 32)) / 6, "float32") for _ in range(10)]
    x1, x2 = (None if n is None else jnp.asarray(RNG.normal(size=(n, 32)), "float32") for n in (8, n2))
    jacobian = 4 * 8 * 32 * 32**2
    bounded = empirical_ntk_fn(deep, vmap_axes=0, max_bytes=6 * jacobian)
    compiled = jax.jit(bounded).lower(x1, x2, params).compile()
    assert sizes == []
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * jacobian

    def rows(x):
        return np.concatenate([np.reshape(j, (8 * 32, -1)) for j in jax.jacobian(deep)(params, x)], 1)

    full = (rows(x1) @ rows(x1 if x2 is None else x2).T).reshape(8, 32, 8, 32)
    assert_close(bounded(x1, x2, params), np.einsum("aibi->ab", full) / 32, 2e-6)


def test_what_fits_is_compiled():
    """Equation by equation, the Jacobians by all arrays would be in memory at once."""
    traced = []

    def f(params, x):
        traced.append(is_traced(jnp.add(0, 0)))
        return mlp(params, x)

    empirical_ntk_fn(f, vmap_axes=0, max_bytes=10**9)(X1, X2, PARAMS)
    assert traced
    assert all(traced)


def test_keywords_scale_and_arrays_in_tiles():
    """Keywords with samples are cut, others are not."""

    def f(params, x, *, weights, factor, flag):
        assert flag == "a"
        return mlp(params, x) * jnp.expand_dims(weights, 1) * factor

    kwargs = {"weights": (X1[:, 0], X2[:, 0]), "factor": jnp.array(2.0), "flag": "a"}
    options = {"vmap_axes": (0, 0, {"weights": 0}), "scale": {"W": 0, "b": 2.0, "V": 1.0}, "per_leaf": True}
    bounded, free = (empirical_ntk_fn(f, max_bytes=b, **options)(X1, X2, PARAMS, **kwargs) for b in (12_000, None))
    jax.tree.map(lambda a, e: assert_close(a, e, 2e-6), bounded, free)


def test_bounds_that_cannot_be_kept():
    with pytest.raises(ValueError, match=r"of one sample takes some [\d,]+ bytes, more than max_bytes=100"):
        empirical_ntk_fn(mlp, vmap_axes=0, max_bytes=100)(X1, X2, PARAMS)
    with pytest.raises(ValueError, match="`vmap_axes` must say that samples are independent"):
        empirical_ntk_fn(mlp, max_bytes=10**6)
    with pytest.raises(ValueError, match="along the first axis"):
        empirical_ntk_fn(mlp, vmap_axes=1, max_bytes=10**6)
    with pytest.raises(ValueError, match="networks must not be random"):
        empirical_ntk_fn(mlp, vmap_axes=0, max_bytes=10**6)(X1, X2, PARAMS, rng=jax.random.key(0))
