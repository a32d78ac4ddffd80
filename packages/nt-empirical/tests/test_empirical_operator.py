"""Tangent kernels as linear maps, and their diagonals, against the matrices."""

import contextlib
import functools
import gc
import math
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_functions import with_derivative_of_its_own
from empirical_networks import TOLERANCE, assert_close, mlp, mlp_kernels, mlp_params, quickly_compiled, reduce
from nt_empirical import (
    NtkImplementation,
    empirical_ntk_diagonal_fn,
    empirical_ntk_fn,
    ntk_operator,
)

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 6))
KEY = jax.random.key(0)
SCALE = {"W": RNG.random((6, 1)), "b": 2.0, "V": 0}


def matrix(params, trace_axes=(-1,)):
    """Returns the kernel, as a matrix."""
    kernel = reduce(mlp_kernels(params, X, X)[1], trace_axes, ())
    return kernel if kernel.ndim == 2 else kernel.transpose(0, 2, 1, 3).reshape(14, 14)


@pytest.mark.parametrize("trace_axes", [(-1,), ()])
def test_products(trace_axes, dtype):
    params = mlp_params(6, 2, dtype=dtype)
    x = jnp.asarray(X, dtype)
    operator = ntk_operator(mlp, params, x, trace_axes)
    assert operator.shape == ((7,) if trace_axes else (7, 2))
    v = RNG.normal(size=operator.shape)
    product = operator @ v
    assert product.dtype == dtype
    assert_close(product.ravel(), matrix(params, trace_axes) @ v.ravel(), TOLERANCE[dtype])
    assert_close(jax.jit(operator)(v), product, TOLERANCE[dtype])


def test_products_with_scale_and_keywords(x64):
    """And a derivative of its own; the operator can be made under `jit`."""
    params = mlp_params(6, 2)

    def f(params, x, *, factor, flag):
        assert flag == "a"
        return factor * mlp(params, x)

    ntk_fn = jax.jit(empirical_ntk_fn(lambda p, x: f(p, x, factor=3.0, flag="a"), scale=SCALE))
    v = RNG.normal(size=7)

    @jax.jit
    def product(params, factor):
        return ntk_operator(f, params, X, scale=SCALE, factor=factor, flag="a") @ v

    assert_close(product(params, jnp.array(3.0)), ntk_fn(X, None, params) @ v, 1e-13)
    own = with_derivative_of_its_own("vjp")
    w = RNG.normal(size=(6, 2))
    assert_close(ntk_operator(own, w, X) @ v, empirical_ntk_fn(own)(X, None, w) @ v, 1e-13)


@contextlib.contextmanager
def compilations():
    """Gives a list of the events of compilation by XLA, which grows within the context."""
    events = []

    def listen(name, _, **kwargs):
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_products_are_compiled_once(x64):
    """By an operator for all vectors, and in a function of the user's for all scales and parameters."""
    vectors = RNG.normal(size=(3, 7))
    params = [mlp_params(6, 2, seed=seed) for seed in (0, 1)]
    scales = [{"W": RNG.random((6, 1)), "b": b, "V": 1.0} for b in (2.0, 3.0)]
    kernels = [empirical_ntk_fn(mlp, scale=s)(X, None, p) for p, s in zip(params, scales, strict=True)]

    @jax.jit
    def product(params, scale, v):
        return ntk_operator(mlp, params, X, scale=scale) @ v

    operator = ntk_operator(mlp, params[0], X, scale=scales[0])
    with compilations() as events:
        assert_close(operator @ vectors[0], kernels[0] @ vectors[0], 1e-13)
        assert_close(product(params[0], scales[0], vectors[0]), kernels[0] @ vectors[0], 1e-13)
        assert events
        events.clear()
        products = [operator @ v for v in vectors]
        others = [product(p, s, vectors[0]) for p, s in zip(params, scales, strict=True)]
        assert events == []
    assert_close(products, vectors @ kernels[0], 1e-13)
    assert_close(others, [kernel @ vectors[0] for kernel in kernels], 1e-13)


class Times:
    """A network that is multiplied by an attribute, and is equal to all others."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, w, x):
        return self.factor * (x @ w)

    def __eq__(self, other):
        return isinstance(other, Times)

    def __hash__(self):
        return 0


class Unhashable(Times):
    __hash__ = None


W, ROWS = np.ones((6, 1), "float32"), X.astype("float32")


def test_operators_are_of_the_function_as_it_is():
    """Whatever it is equal to, holds, and was before."""
    kernel, v = ROWS @ ROWS.T, np.ones(7, "float32")
    for network in (Times(1.0), Times(True), Times(3), Unhashable(2.0), Times(np.full((1, 1), 5, "float32"))):
        assert_close(ntk_operator(network, W, ROWS) @ v, np.squeeze(network.factor) ** 2 * kernel @ v, 2e-6)
    network = Times(2.0)
    ntk_operator(network, W, ROWS) @ v
    network.factor = 3.0
    operator = ntk_operator(network, W, ROWS)
    assert_close(operator @ v, 9 * kernel @ v, 2e-6)
    assert operator.trace() == pytest.approx(9 * np.trace(kernel), rel=2e-6)


def test_functions_may_hold_what_is_traced():
    """A factor under `jit` and `grad`, the second time as the first; nothing is left of it."""
    v = np.ones(7, "float32")
    square = v @ ROWS @ ROWS.T @ v

    def form(factor):
        return v @ (ntk_operator(Times(factor), W, ROWS) @ v)

    def local_form(factor):
        return v @ (ntk_operator(lambda w, x: factor * (x @ w), W, ROWS) @ v)

    for of_factor in (form, local_form, form):
        with jax.checking_leaks():
            value, slope = jax.jit(jax.value_and_grad(of_factor))(3.0)
        assert value == pytest.approx(9 * square, rel=1e-5)
        assert slope == pytest.approx(6 * square, rel=1e-5)


def test_functions_are_not_kept():
    def network(w, x):
        return x @ w

    operator = ntk_operator(network, W, ROWS)
    operator @ np.ones(7, "float32")
    reference = weakref.ref(network)
    del network, operator
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("scale", [10**10, np.int64(2**33), np.array(3, "int8")])
def test_scales_of_integers(scale):
    operator, v = ntk_operator(lambda w, x: x @ w, W, ROWS, scale=scale), np.ones(7, "float32")
    assert_close(operator @ v, float(scale) * ROWS @ ROWS.T @ v, 2e-6)
    assert operator.trace() == pytest.approx(float(scale) * np.sum(ROWS**2), rel=2e-6)


@jax.tree_util.register_pytree_node_class
class Masked:
    """Weights, and a mask of NumPy that is no leaf."""

    def __init__(self, w, mask):
        self.w, self.mask = w, mask

    def tree_flatten(self):
        return (self.w,), self.mask

    @classmethod
    def tree_unflatten(cls, mask, leaves):
        return cls(*leaves, mask)


def masked(params, x):
    return x @ (params.w * params.mask)


def test_parameters_with_arrays_that_are_no_leaves():
    for factor in (1.0, 2.0):
        mask = factor * np.arange(6, dtype="float32").reshape(6, 1)
        operator, rows = ntk_operator(masked, Masked(W, mask), ROWS), ROWS * mask.T
        for v in (np.ones(7, "float32"), np.arange(7, dtype="float32")):
            assert_close(operator @ v, rows @ rows.T @ v, 2e-6)


def test_numbers_are_exact_with_enough_products(x64):
    """The trace always is."""
    params = mlp_params(6, 2)
    operator, kernel = ntk_operator(mlp, params, X), matrix(params)
    trace, (norm, error), rank = quickly_compiled(
        lambda key: (operator.trace(), operator.frobenius_norm(key, 21), operator.effective_rank(key, 21))
    )(KEY)
    assert_close(trace, np.trace(kernel), 1e-13)
    assert norm == pytest.approx(np.linalg.norm(kernel), rel=1e-12)
    assert error < 1e-12
    assert rank.value == pytest.approx(np.trace(kernel) ** 2 / np.linalg.norm(kernel) ** 2, rel=1e-12)


def centred_alignment(kernel, labels):
    centre = np.eye(len(labels)) - 1 / len(labels)
    kernels = [centre @ k @ centre for k in (kernel, labels @ labels.T)]
    return np.sum(kernels[0] * kernels[1]) / np.prod([np.linalg.norm(k) for k in kernels])


def test_alignment(x64):
    params = mlp_params(6, 2)
    labels = RNG.normal(size=(7, 3))
    operator, kernel = ntk_operator(mlp, params, X), matrix(params)
    both_outputs = ntk_operator(mlp, params, X, ())
    several, one, all_outputs = quickly_compiled(
        lambda key: (
            operator.alignment(labels, key, 21),
            operator.alignment(labels[:, 0], key, 21),
            both_outputs.alignment(labels[:, :2], key, 42),
        )
    )(KEY)
    assert several.value == pytest.approx(centred_alignment(kernel, labels), rel=1e-10)
    assert one.value == pytest.approx(centred_alignment(kernel, labels[:, :1]), rel=1e-10)
    # With all outputs, centred each for itself: as the kernel of two tasks.
    full = reduce(mlp_kernels(params, X, X)[1], (), ()).transpose(0, 2, 1, 3)
    full = full - full.mean(0, keepdims=True)
    full = full - full.mean(2, keepdims=True)
    y = labels[:, :2] - labels[:, :2].mean(0)
    expected = np.einsum("ia,iajb,jb", y, full, y) / (np.linalg.norm(full) * np.sum(y**2))
    assert all_outputs.value == pytest.approx(expected, rel=1e-10)


def test_estimates_are_within_their_errors():
    """Of a kernel with many eigenvalues of the same size, of which few products find no more than a part."""
    x, w = RNG.normal(size=(60, 200)).astype("float32"), np.zeros((200, 1), "float32")
    kernel = x @ x.T
    operator, keys = ntk_operator(lambda w, x: x @ w, w, x, vmap_axes=0), jax.random.split(KEY, 20)
    labels = RNG.normal(size=(60, 2))
    norms, rank, alignment = quickly_compiled(
        lambda keys: (
            jax.vmap(lambda key: operator.frobenius_norm(key, 30))(keys),
            operator.effective_rank(keys[0], 30),
            operator.alignment(labels, keys[0], 30),
        )
    )(keys)
    z = (norms.value - np.linalg.norm(kernel)) / norms.standard_error
    assert abs(np.mean(z)) < 5 / np.sqrt(len(z))
    assert 0.5 < np.std(z) < 2
    assert np.mean(norms.standard_error) < 0.1 * np.linalg.norm(kernel)
    assert abs(rank.value - np.trace(kernel) ** 2 / np.linalg.norm(kernel) ** 2) < 5 * rank.standard_error
    assert abs(alignment.value - centred_alignment(kernel, labels)) < 5 * alignment.standard_error


@pytest.mark.parametrize("by", ["arpack", "matfree", "matfree under jit"])
def test_leading_eigenpairs(by, dtype):
    params = mlp_params(6, 2, dtype=dtype)
    for trace_axes in ((-1,), ()):
        operator = ntk_operator(mlp, params, jnp.asarray(X, dtype), trace_axes)
        find = functools.partial(operator.eigenpairs, 3)
        if by != "arpack":
            find = functools.partial(find, n_products=math.prod(operator.shape))
        values, vectors = map(np.asarray, jax.jit(find)() if by == "matfree under jit" else find())
        expected = np.linalg.eigvalsh(matrix(params, trace_axes))[::-1][:3]
        np.testing.assert_allclose(values, expected, rtol=10 * TOLERANCE[dtype])
        assert vectors.shape == (3, *operator.shape)
        flat = vectors.reshape(3, -1)
        np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-5)
        residuals = matrix(params, trace_axes) @ flat.T - flat.T * values
        assert np.max(np.abs(residuals)) < 30 * TOLERANCE[dtype] * values[0]


@pytest.mark.parametrize(("samples", "rank"), [(40, 3), (100, 5), (12, 2), (7, 0)])
def test_eigenpairs_of_low_rank(samples, rank, dtype):
    """More products than the space has dimensions: the rank, and one of the eigenvalue 0. What is left is 0."""
    x, w = jnp.asarray(RNG.normal(size=(samples, max(rank, 1))), dtype), jnp.ones((max(rank, 1), 1), dtype)
    operator = ntk_operator(lambda w, x: x @ w, w, x, scale=jnp.asarray(float(rank > 0)))
    values, vectors = map(np.asarray, operator.eigenpairs(rank + 2, n_products=samples))
    expected = np.linalg.eigvalsh(np.asarray(x, "float64") @ np.asarray(x, "float64").T)[::-1] * (rank > 0)
    np.testing.assert_allclose(values, expected[: rank + 2], atol=100 * TOLERANCE[dtype] * expected[0])
    np.testing.assert_allclose(vectors[:rank] @ vectors[:rank].T, np.eye(rank), atol=1e-5)
    assert not np.any(vectors[rank + 1 :])


def test_half_precision():
    """Vectors have single precision."""
    x, w = X.astype("bfloat16"), jnp.ones((6, 2), "bfloat16")
    operator = ntk_operator(lambda w, x: x @ w, w, x)
    product, norm = quickly_compiled(lambda key: (operator(np.ones(7)), operator.frobenius_norm(key, 21)))(KEY)
    assert product.dtype == norm.value.dtype == operator.dtype == "float32"
    kernel = x.astype("float32") @ x.astype("float32").T
    assert_close(product, kernel @ np.ones(7), 0.03)
    assert norm.value == pytest.approx(np.linalg.norm(kernel), rel=0.03)


@pytest.mark.parametrize("implementation", list(NtkImplementation)[1:])
@pytest.mark.parametrize("vmap_axes", [None, 0])
def test_diagonal(vmap_axes, implementation, dtype):
    """More samples than are computed at once, and axes of positions."""
    params = mlp_params(6, 2, dtype=dtype)
    x = jnp.asarray(RNG.normal(size=(34 if vmap_axes == 0 else 4, 2, 6)), dtype)
    expected = np.einsum("abcabc->abc", mlp_kernels(params, x, x)[1])
    diagonal_fn = jax.jit(empirical_ntk_diagonal_fn(mlp, (-1,), vmap_axes, implementation))
    actual = diagonal_fn(x, params)
    assert actual.dtype == dtype
    assert_close(actual, expected.mean(-1), TOLERANCE[dtype])


@pytest.mark.parametrize("trace_axes", [(), (0,), (1,), (-1, 0)])
def test_diagonal_of_samples_along_any_axis(trace_axes, x64):
    """And of several outputs, with a scale."""
    params = mlp_params(6, 2)

    def f(p, x):
        return {"first": (mlp(p, x.T),), "second": mlp(p, 2 * x.T).T}

    vmap_axes = (1, {"first": 0, "second": 1}, None)
    x = RNG.normal(size=(6, 3))
    diagonal_fn = empirical_ntk_diagonal_fn(f, trace_axes, vmap_axes, scale=SCALE)
    ntk_fn = empirical_ntk_fn(f, (), scale=SCALE)
    actual, kernel = quickly_compiled(lambda params, x: (diagonal_fn(x, params), ntk_fn(x, None, params)))(params, x)
    expected = jax.tree.map(lambda k: np.einsum("aabb->ab", k).mean(trace_axes), kernel)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-13), actual, expected)


def test_what_is_refused():
    params, x = mlp_params(6, 2, dtype="float32"), X.astype("float32")
    operator = ntk_operator(mlp, params, x)
    with pytest.raises(ValueError, match=r"takes arrays of shape \(7,\), got \(7, 2\)"):
        operator @ np.ones((7, 2))
    for k in (0, 7):
        with pytest.raises(ValueError, match="`k` must be from 1 to 6"):
            operator.eigenpairs(k)
    for n in (1, 8):
        with pytest.raises(ValueError, match=f"`n_products` must be from 2 to 7, got {n}"):
            operator.eigenpairs(2, n_products=n)
    with pytest.raises(ValueError, match="Give `tolerance` or `n_products`, not both"):
        operator.eigenpairs(2, 1e-3, n_products=5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ImportError, match=r"`n_products` needs matfree"):
        patch.setitem(sys.modules, "matfree", None)
        operator.eigenpairs(2, n_products=5)
    with pytest.raises(ValueError, match=r"Labels must have shape \(7,\), or more axes after these, got \(6,\)"):
        operator.alignment(np.ones(6), KEY)
    with pytest.raises(ValueError, match="Labels are the same for all samples"):
        operator.alignment(np.ones(7), KEY)
    with pytest.raises(ValueError, match="The kernel is 0"):
        ntk_operator(mlp, params, x, scale=np.zeros(())).effective_rank(KEY, 6)
    with pytest.raises(ValueError, match="`n_products` must be at least 6, got 5"):
        operator.frobenius_norm(KEY, 5)
    with pytest.raises(TypeError, match="must return one array"):
        ntk_operator(lambda p, x: (mlp(p, x), x), params, x)
    with pytest.raises(TypeError, match="real floating-point arrays, got complex64 in params"):
        ntk_operator(lambda w, x: x @ w, jnp.ones((6, 1), "complex64"), x)
    with pytest.raises(ValueError, match="`trace_axes` contains 2"):
        ntk_operator(mlp, params, x, 2)


def test_what_is_zero_but_for_rounding():
    operator = ntk_operator(mlp, mlp_params(6, 2, dtype=np.float32), jnp.asarray(X, np.float32))
    with pytest.raises(ValueError, match="Labels are the same for all samples"):
        operator.alignment(jnp.full(7, 0.1), KEY)
    with pytest.raises(TypeError, match="the real and the imaginary part"):
        operator @ (1j * np.ones(7))
    constant = ntk_operator(lambda p, x: 0.3 * jnp.sum(p) * jnp.ones((len(x), 1)), 0.7 * jnp.ones(3), jnp.ones((7, 2)))
    with pytest.raises(ValueError, match="the same for all pairs of samples"):
        constant.alignment(jnp.arange(7.0), KEY)
