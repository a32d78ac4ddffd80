"""Run by `test_empirical_devices.py`, with several devices: kernels under `jax.shard_map`, and of sharded batches."""

import functools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import empirical_functions
import jax
import jax.numpy as jnp
import numpy as np
from empirical_networks import assert_close, mlp, mlp_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from nt_empirical import (
    NtkImplementation,
    empirical_ntk_diagonal_fn,
    empirical_ntk_fn,
    empirical_ntk_vp_fn,
    monte_carlo_kernel_fn,
    ntk_operator,
)

jax.config.update("jax_numpy_rank_promotion", "raise")
RNG = np.random.default_rng(0)
MESH = jax.make_mesh((4,), ("samples",), axis_types=(AxisType.Auto,))
WHOLE, CUT = PartitionSpec(), PartitionSpec("samples")
X = RNG.normal(size=(8, 6)).astype("float32")
PARAMS = mlp_params(6, 2, dtype="float32")


def check_shard_map(f, params, x, implementation, vmap_axes):
    """Each device has the kernel of its samples with all: what all devices hold is not summed over them."""
    ntk_fn = empirical_ntk_fn(f, (), vmap_axes=vmap_axes, implementation=implementation, scale=0.5)
    diagonal_fn = empirical_ntk_diagonal_fn(f, (), vmap_axes, implementation)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(WHOLE, CUT), out_specs=CUT)
    def rows(params, x):
        return ntk_fn(x, jax.lax.all_gather(x, "samples", tiled=True), params), diagonal_fn(x, params)

    kernel, diagonal = rows(params, x)
    assert_close(kernel, 0.5 * empirical_ntk_fn(f, (), vmap_axes=0)(x, x, params), 1e-6)
    assert_close(diagonal, 2 * np.einsum("aabb->ab", kernel), 1e-6)


def check_products_under_shard_map():
    """A product with a vector that is cut is with all of it."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(WHOLE, CUT, CUT), out_specs=CUT)
    def product(params, x, v):
        return empirical_ntk_vp_fn(mlp, x, None, params)(v)

    v = RNG.normal(size=(8, 2)).astype("float32")
    kernel = empirical_ntk_fn(mlp, ())(X, None, PARAMS)
    assert_close(product(PARAMS, X, v), np.einsum("nmab,mb->na", kernel, v), 1e-6)


def check_operator():
    """The samples stay where they are, and gradients are summed over devices."""
    x = jax.device_put(X, NamedSharding(MESH, CUT))
    v = jax.device_put(RNG.normal(size=8).astype("float32"), NamedSharding(MESH, CUT))
    operator = ntk_operator(mlp, PARAMS, x)
    product = operator @ v
    assert product.sharding.spec == CUT, product.sharding
    kernel = empirical_ntk_fn(mlp)(X, None, PARAMS)
    assert_close(product, kernel @ np.asarray(v), 1e-6)
    text = jax.jit(operator).lower(v).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    np.testing.assert_allclose(operator.eigenpairs(2).values, np.linalg.eigvalsh(kernel)[::-1][:2], rtol=1e-5)


def check_monte_carlo():
    """The same estimate on one device and on four, of which not all have a network in the last round."""

    def init_fn(key, shape):
        return shape, jax.random.normal(key, (shape[-1], 8))

    def kernel_fn(device_count, n):
        options = {"device_count": device_count, "standard_errors": True}
        return monte_carlo_kernel_fn(init_fn, lambda w, x, rng: jnp.tanh(x @ w), jax.random.key(0), n, **options)

    for one, four in zip(kernel_fn(1, [6, 9])(X), kernel_fn(-1, [6, 9])(X), strict=True):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), four, one)
        assert len(four.value.ntk.devices()) == 1
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), kernel_fn(4, 2)(X), kernel_fn(1, 2)(X))  # too few: in cells


for implementation in NtkImplementation:
    check_shard_map(mlp, PARAMS, X, implementation, 0)
check_shard_map(mlp, PARAMS, X, NtkImplementation.JACOBIAN_CONTRACTION, None)
overlapping, shape, _ = empirical_functions.TABLE["arrangements"]["overlapping parts"]
weights = jnp.asarray(RNG.normal(size=shape), "float32")
check_shard_map(overlapping, weights, X[:, :3], NtkImplementation.STRUCTURED_DERIVATIVES, 0)
check_products_under_shard_map()
check_operator()
check_monte_carlo()
for name in ("stacked and tied", "branches in a scan", "scan in a branch"):
    looped, shapes, shape = empirical_functions.TABLE["loops"][name]
    weights = jax.tree.map(
        lambda s: jnp.asarray(RNG.normal(size=s), "float32"), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    check_shard_map(looped, weights, X[:, :3], NtkImplementation.STRUCTURED_DERIVATIVES, 0)
