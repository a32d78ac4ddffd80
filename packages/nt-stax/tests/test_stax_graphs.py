"""Aggregate: finite functions written out, and kernels that equal those of the finite networks exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_core import batch
from nt_stax import Aggregate, AggregateImplementation, Conv, Dense, GlobalAvgPool, Relu, serial
from stax_samples import normal

pytestmark = [pytest.mark.filterwarnings("ignore:Aggregate with implementation='SPARSE'"), pytest.mark.unoptimised]
SPARSE = "SPARSE"


def inputs(seed, shape):
    return normal(seed, shape, "float64")


def weights(seed, n, nodes):
    return np.array(inputs(seed, (n, *nodes, *nodes)))


def edges(seed, n, nodes, n_edges=7):
    """Random edges, some of them several times; the first sample has one less, and another sample none."""
    coordinates = [np.random.default_rng(seed).integers(0, size, (n, n_edges, 2)) for size in nodes]
    pattern = np.stack(coordinates, 2)
    pattern[:, 1] = pattern[:, 0]
    pattern[0, 2, -1, 1] = -1
    pattern[1] = -1
    return pattern


def as_weights(pattern, nodes):
    """Counts edges: the definition of sparse patterns."""
    A = np.zeros((len(pattern), *nodes, *nodes))
    for n, sample in enumerate(pattern):
        for edge in sample:
            if edge.min() >= 0:
                A[(n, *edge[:, 0], *edge[:, 1])] += 1
    return A


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1.0))


@pytest.mark.parametrize("implementation", ["DENSE", AggregateImplementation.SPARSE])
@pytest.mark.parametrize(
    ("aggregate_axis", "equation"),
    [(None, "nhwc,nhwij->nijc"), (1, "nhwc,nhi->niwc"), ((2,), "nhwc,nwj->nhjc"), ((-2, 1), "nhwc,nwhji->nijc")],
)
def test_function_and_kernels(aggregate_axis, equation, implementation, covariances, full, x64):
    x1, x2 = inputs(1, (3, 2, 3, 2)), inputs(2, (2, 2, 3, 2))
    nodes = {None: (2, 3), 1: (2,), (2,): (3,), (-2, 1): (3, 2)}[aggregate_axis]
    if implementation == "DENSE":
        patterns = matrices = weights(3, 3, nodes), weights(4, 2, nodes)
    else:
        patterns = edges(3, 3, nodes), edges(4, 2, nodes)
        matrices = tuple(as_weights(pattern, nodes) for pattern in patterns)
    init_fn, apply_fn, kernel_fn = Aggregate(aggregate_axis, implementation=implementation)
    assert init_fn(random.key(0), (-1, 2, 3, 2)) == ((-1, 2, 3, 2), ())
    y1, y2 = (np.einsum(equation, x, A) for x, A in zip((x1, x2), matrices, strict=True))
    assert_close(apply_fn((), x1, pattern=patterns[0]), y1)
    if len(nodes) == 1 and implementation != "DENSE":
        assert_close(apply_fn((), x1, pattern=patterns[0][:, :, 0]), y1)
    for diagonal_batch in (True, False):
        kernel = kernel_fn(x1, x2, pattern=patterns, diagonal_batch=diagonal_batch)
        assert_close(full(kernel.nngp, kernel), covariances(y1, y2, 0, 3))
        own = covariances(y1, y1, 0, 3)
        assert_close(kernel.cov1, np.einsum("nn...->n...", own) if diagonal_batch else own)
        assert kernel.ntk.ndim == 0 and kernel.shape1 == x1.shape


@pytest.mark.parametrize("implementation", ["DENSE", SPARSE])
def test_after_convolutions(implementation, finite_kernels, full, x64):
    """Which leave axes reversed."""
    x1, x2 = inputs(1, (2, 2, 3, 2)), inputs(2, (2, 2, 3, 2))
    make = weights if implementation == "DENSE" else edges
    patterns = make(3, 2, (3,)), make(4, 2, (3,))
    conv, aggregate = Conv(1, (2, 2), None, "SAME", 1.3, 0.4), Aggregate(2, implementation=implementation)
    layer = serial(conv, aggregate)

    def finite(x1, x2, patterns):
        pattern = {id(x): p for x, p in zip((x1, x2), patterns, strict=True)}
        apply_fn = lambda params, x: layer[1](params, x, pattern=pattern[id(x)])  # noqa: E731
        return finite_kernels((layer[0], apply_fn, None), x1, x2, 0, -1)

    kernel = layer[2](x1, x2, pattern=patterns)
    nngp, ntk = finite(x1, x2, patterns)
    assert kernel.is_reversed and kernel.is_gaussian
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    # The same inputs under two graphs are two batches.
    network = serial(layer, Relu(), GlobalAvgPool())[2]
    copied = jnp.array(x1)
    for pattern in (patterns, (patterns[0], patterns[0].copy())):
        assert_close(network(x1, None, pattern=pattern).ntk, network(x1, copied, pattern=pattern).ntk)
        jitted = jax.jit(lambda x, p: network(x, None, "ntk", pattern=p))(x1, pattern)
        assert_close(jitted, network(x1, copied, "ntk", pattern=pattern))


def test_axes_may_come_in_any_order(covariances, full, x64):
    x1, x2 = inputs(1, (2, 3, 4, 3)), inputs(2, (2, 3, 4, 3))
    patterns = weights(3, 3, (3, 4)), weights(4, 3, (3, 4))
    layer = Aggregate((1, 2), batch_axis=3, channel_axis=0)
    y1, y2 = (np.einsum("chwn,nhwij->cijn", x, A) for x, A in zip((x1, x2), patterns, strict=True))
    assert_close(layer[1]((), x1, pattern=patterns[0]), y1)
    with pytest.warns(UserWarning, match="batch_axis"):
        kernel = layer[2](x1, x2, pattern=patterns)
    assert_close(full(kernel.nngp, kernel), covariances(y1, y2, 3, 0))


def test_without_a_pattern_it_is_the_identity(x64):
    x = inputs(1, (2, 3, 2))
    _, apply_fn, kernel_fn = serial(Dense(4), Aggregate(), Relu(), GlobalAvgPool())
    expected = serial(Dense(4), Relu(), GlobalAvgPool())
    params = serial(Dense(4), Aggregate(), Relu(), GlobalAvgPool())[0](random.key(0), x.shape)[1]
    assert_close(apply_fn(params, x), expected[1]([params[0], (), ()], x))
    for kwargs in ({}, {"pattern": None}, {"pattern": (None, None)}):
        assert_close(kernel_fn(x, None, "ntk", **kwargs), expected[2](x, None, "ntk"))


def test_masks(x64):
    x = np.array(inputs(1, (2, 3, 2)))
    x[0, 2], x[1, :2] = np.inf, np.inf
    pattern = weights(3, 2, (3,))
    layer = serial(Conv(1, (1,), b_std=1.0), Aggregate())
    outputs = layer[1](layer[0](random.key(0), x.shape)[1], x, pattern=pattern, mask_constant=np.inf)
    kernel = layer[2](x, None, pattern=(pattern, pattern), mask_constant=np.inf)
    counts = np.isfinite(x[..., 0])
    np.testing.assert_array_equal(outputs.mask[..., 0], ~counts)
    np.testing.assert_array_equal(kernel.mask1[..., 0], ~counts)
    valid = np.where(counts[..., None], x, 0)
    k = np.einsum("nic,mjc->nmij", valid, valid) / 2 + 1
    k = np.einsum("nip,nmij,mjq,np,mq->nmpq", *(pattern, k * counts[:, None, :, None] * counts[None, :, None], pattern),
                  counts, counts)  # fmt: skip
    assert_close(kernel.nngp, k)


def test_to_dense_transformations_and_batches(x64):
    x = inputs(1, (4, 3, 2))
    pattern, adjacency = edges(3, 4, (3,)), as_weights(edges(3, 4, (3,)), (3,))
    network = lambda **kwargs: serial(Dense(4), Relu(), Aggregate(1, **kwargs), Dense(4), Relu(), GlobalAvgPool())[2]  # noqa: E731
    expected = network()(x, None, pattern=(adjacency, adjacency))
    by_function = network(to_dense=lambda p: p[0])(x, None, "ntk", pattern=([adjacency], [adjacency]))
    assert_close(by_function, expected.ntk)
    sparse = network(implementation=SPARSE)
    jitted = jax.jit(lambda x, p: sparse(x, None, "ntk", pattern=(p, p)))
    assert_close(jitted(x, pattern), expected.ntk)
    cells = batch(sparse, batch_size=2)(x, None, ("nngp", "ntk"), pattern=(pattern, pattern))
    assert_close(cells.ntk, expected.ntk)
    cells = batch(sparse, batch_size=2)(x, x[:2], "nngp", pattern=(pattern, pattern[:2]))
    assert_close(cells, expected.nngp[:, :2])
    gradient = jax.grad(lambda a: jnp.sum(network()(x, None, "ntk", pattern=(a, a))))(adjacency)
    step = 1e-6 * inputs(5, adjacency.shape)
    total = lambda a: jnp.sum(network()(x, None, "ntk", pattern=(a, a)))  # noqa: E731
    np.testing.assert_allclose(
        jnp.sum(gradient * step), (total(adjacency + step) - total(adjacency - step)) / 2, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: Aggregate(implementation="RAGGED"), ValueError, "'RAGGED' is unknown, use one of DENSE, SPARSE"),
        (lambda x: Aggregate(2)[0](random.key(0), x.shape), ValueError, "aggregate_axis=2"),
        (lambda x: Aggregate((1, 1))[1]((), x, pattern=jnp.ones((2, 3, 3))), ValueError, "different spatial axes"),
        (lambda x: Aggregate()[1]((), x, pattern=jnp.ones((2, 4, 4))), ValueError, r"shape \(2, 3, 3\), got \(2, 4, 4"),
        (lambda x: Aggregate()[2](x, pattern=jnp.ones((2, 3, 3))), ValueError, "pattern=\\(pattern1, pattern2\\)"),
        (lambda x: Aggregate()[2](x, pattern=(jnp.ones((2, 3, 3)), None)), NotImplementedError, "for one of them"),
        (lambda x: sparse(x, np.ones((2, 5, 3), int)), ValueError, r"\(2, edges, 1, 2\) or \(2, edges, 2\)"),
        (lambda x: sparse(x, np.ones((2, 5, 2, 2), int)), ValueError, r"\(2, edges, 1, 2\)"),
        (lambda x: sparse(x, np.ones((1, 5, 2), int)), ValueError, r"\(2, edges, 1, 2\)"),
        (lambda x: sparse(x, np.ones((2, 2), int)), ValueError, r"\(2, edges, 1, 2\)"),
        (lambda x: sparse(x, np.ones((2, 5, 2))), ValueError, "pairs of integers"),
        (lambda x: sparse(x, np.full((2, 5, 2), 3)), ValueError, "beyond"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(jnp.ones((2, 3, 4)))


def sparse(x, pattern):
    return Aggregate(implementation=SPARSE)[1]((), x, pattern=pattern)


def test_sparse_says_what_it_leaves_out():
    with pytest.warns(UserWarning, match="leaves out edges with negative coordinates"):
        Aggregate(implementation=SPARSE)


@pytest.mark.parametrize("n", [None, 2])
def test_known_graphs_under_jit(n, x64):
    """Two arrays for the same graphs, which are no arguments of the jitted function."""
    x1, x2 = inputs(1, (3, 2, 3, 2)), None if n is None else inputs(2, (2, 2, 3, 2))
    graphs = (weights(3, 3, (2, 3)), weights(3, 3, (2, 3)) if n is None else weights(4, 2, (2, 3)))
    kernel_fn = serial(Dense(2), Aggregate((1, 2)), Relu())[2]

    def kernel(x1, x2):
        return kernel_fn(x1, x2, "nngp", pattern=tuple(map(jnp.asarray, graphs)))

    assert_close(jax.jit(kernel)(x1, x2), kernel(x1, x2))


@pytest.mark.parametrize("implementation", ["DENSE", SPARSE])
def test_batches_without_samples(implementation):
    x, nothing = np.ones((2, 3, 2), np.float32), np.ones((0, 3, 2), np.float32)
    pattern = np.ones((2, 3, 3), np.float32) if implementation == "DENSE" else np.ones((2, 4, 2), int)
    _, apply_fn, kernel_fn = Aggregate(implementation=implementation)
    assert apply_fn((), nothing, pattern=pattern[:0]).shape == nothing.shape
    assert kernel_fn(nothing, x, "nngp", pattern=(pattern[:0], pattern)).shape == (0, 2, 3, 3)
    assert kernel_fn(nothing, None, "nngp", pattern=(pattern[:0],) * 2).shape == (0, 0, 3, 3)
