import jax
import numpy as np
import pytest
from nt_stax import unmask_fn


@pytest.fixture
def finite_kernels():
    """The NNGP and NTK of a network that is linear in its parameters, e.g. one layer with weights and a pool.

    They need no limit: at any width they are `sum_p var(p) df1/dp df2/dp` and `sum_p df1/dp df2/dp`.
    """
    return _finite_kernels


def _finite_kernels(layer, x1, x2, batch_axis, channel_axis, variances=(1.0, 1.0), **kwargs):
    """Returns `(nngp, ntk)` of all pairs of output entries, as `(n1, n2, H, H, W, W, ...)`.

    Args:
      layer: with one output channel; its parameters are weights `W` and biases `b` (or None).
      x1, x2: inputs.
      batch_axis, channel_axis: of the outputs.
      variances: of the weights and of the biases.
      **kwargs: of `apply_fn`.
    """
    init_fn, apply_fn, _ = layer
    params = jax.tree.leaves(init_fn(jax.random.key(0), x1.shape)[1])
    structure = jax.tree.structure(init_fn(jax.random.key(0), x1.shape)[1])

    def jacobians(x):
        def outputs(leaves):
            return unmask_fn(apply_fn)(jax.tree.unflatten(structure, leaves), x, **kwargs)

        by_array = jax.jacobian(outputs)(params)
        return [_samples_first(j, batch_axis, channel_axis, p.ndim) for j, p in zip(by_array, params, strict=True)]

    pairs = [_outer(a, b) for a, b in zip(jacobians(x1), jacobians(x2), strict=True)]
    nngp = sum(var * k for var, k in zip(variances[: len(pairs)], pairs, strict=True))
    return nngp, sum(pairs)


@pytest.fixture
def covariances():
    """Covariances of two arrays of activations, `(n1, n2, H, H, W, W, ...)`: means of products over channels."""

    def covariance(y1, y2, batch_axis, channel_axis):
        y1, y2 = (np.moveaxis(np.asarray(y), (batch_axis, channel_axis), (0, -1)) for y in (y1, y2))
        return _outer(y1, y2) / y1.shape[-1]

    return covariance


def _samples_first(jacobian, batch_axis, channel_axis, n_params):
    """From `(*outputs, *parameters)`, with one channel, to `(n, *space, all parameters)`."""
    ndim = jacobian.ndim - n_params
    j = np.moveaxis(np.asarray(jacobian), (batch_axis % ndim, channel_axis % ndim), (0, ndim - 1))
    assert j.shape[ndim - 1] == 1
    return j.reshape(*j.shape[: ndim - 1], -1)


def _outer(a, b):
    """Sums over the last axis of `(n, *space, m)` arrays, for all pairs of the others, axis by axis."""
    n_space = a.ndim - 2
    k = np.tensordot(a, b, (-1, -1))  # (n1, *space, n2, *space)
    order = [0, n_space + 1] + [i + half for i in range(1, n_space + 1) for half in (0, n_space + 1)]
    return k.transpose(order)


@pytest.fixture
def full():
    """Lays a covariance of a `Kernel` between two batches out as `(n1, n2, H, H, W, W, ...)`."""

    def laid_out(k, kernel):
        k = np.asarray(k)
        pairs = [(a, a + 1) for a in range(2, k.ndim, 2)]
        return k.transpose(0, 1, *(a for pair in (pairs[::-1] if kernel.is_reversed else pairs) for a in pair))

    return laid_out
