"""Small networks, with kernels that are written out by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


def mlp(params, x):
    """tanh(x W + b) V / sqrt(width), along the last axis."""
    hidden = jnp.tanh(jnp.einsum("...i,ij->...j", x, params["W"]) + jnp.expand_dims(params["b"], range(x.ndim - 1)))
    return jnp.einsum("...j,jk->...k", hidden, params["V"]) / np.sqrt(params["V"].shape[0]).astype(x.dtype)


def mlp_params(inputs, outputs, width=11, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    shapes = {"W": (inputs, width), "b": (width,), "V": (width, outputs)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def mlp_kernels(params, x1, x2):
    """Returns outputs' products and tangent kernel, over all axes: those of the outputs for `x1`, then for `x2`."""
    W, b, V = (np.asarray(params[name], "float64") for name in "WbV")
    x1, x2 = (np.asarray(x, "float64") for x in (x1, x2))
    (n, k), flat1, flat2 = V.shape, x1.reshape(-1, x1.shape[-1]), x2.reshape(-1, x2.shape[-1])
    h1, h2 = np.tanh(flat1 @ W + b), np.tanh(flat2 @ W + b)
    y1, y2 = h1 @ V / np.sqrt(n), h2 @ V / np.sqrt(n)
    nngp = np.einsum("ak,bl->akbl", y1, y2)
    # d y_k / d V_jl = h_j delta_kl / sqrt(n) and d y_k / d W_ij = x_i (1 - h_j^2) V_jk / sqrt(n); x_i = 1 for b.
    readout = np.einsum("ab,kl->akbl", h1 @ h2.T / n, np.eye(k))
    slopes1, slopes2 = (np.einsum("aj,jk->akj", 1 - h**2, V) for h in (h1, h2))
    hidden = np.einsum("ab,akj,blj->akbl", flat1 @ flat2.T + 1, slopes1, slopes2) / n
    shape = (*x1.shape[:-1], k, *x2.shape[:-1], k)
    return nngp.reshape(shape), (readout + hidden).reshape(shape)


def reduce(kernel, trace_axes, diagonal_axes):
    """Takes means and diagonals, from all axes for `x1` and then all for `x2` to pairs of axes."""
    ndim = kernel.ndim // 2
    traced, diagonal = ({axis % ndim for axis in axes} for axes in (trace_axes, diagonal_axes))
    kernel = kernel.transpose([axis for pair in range(ndim) for axis in (pair, ndim + pair)])
    for axis in reversed(range(ndim)):
        if axis in traced:
            kernel = kernel.trace(axis1=2 * axis, axis2=2 * axis + 1) / kernel.shape[2 * axis]
        elif axis in diagonal:
            kernel = np.moveaxis(kernel.diagonal(axis1=2 * axis, axis2=2 * axis + 1), -1, 2 * axis)
    return kernel


def quickly_compiled(fn, **kwargs):
    """Compiles without the optimisation that small arrays do not need, which takes most of the time."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **kwargs)


def assert_close(actual, expected, tolerance):
    """Compares shapes, and values relative to the largest."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected), initial=0.0) <= tolerance * np.max(np.abs(expected), initial=0.0)


def operations(fn, *args):
    """Returns the operations of a function, as XLA counts them: for CPUs only."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(fn).lower(*args).cost_analysis()["flops"]
