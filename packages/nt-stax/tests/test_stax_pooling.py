"""Pools: the finite functions written out, and kernels that equal covariances of pooled activations exactly."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_stax import AvgPool, Conv, Dense, Flatten, GlobalAvgPool, GlobalSumPool, Relu, SumPool, serial, unmask_fn
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}
AXES = [(0, -1), (0, 1), (2, 0), (-1, 1)]


def inputs(seed, shape, dtype="float64"):
    return normal(seed, shape, dtype)


def assert_close(actual, expected, dtype="float64"):
    scale = max(np.abs(expected).max(initial=0), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def warn_of_batch_axis(batch_axis, ndim=4):
    return pytest.warns(UserWarning, match="batch_axis") if batch_axis % ndim else contextlib.nullcontext()


def pooled(x, window, strides, padding, divide_by):
    """Windows of `(n, *space, channels)`, in plain loops. `divide_by` is 'nothing', 'window' or 'inside'."""
    space, starts = [], []
    for n, w, s in zip(x.shape[1:-1], window, strides, strict=True):
        count = (n - w) // s + 1 if padding == "VALID" else -(-n // s)
        low = 0 if padding == "VALID" else max((count - 1) * s + w - n, 0) // 2
        space.append(count)
        starts.append([i * s - low for i in range(count)])
    y = np.zeros((x.shape[0], *space, x.shape[-1]))
    for p in np.ndindex(*space):
        n_inside = 0
        for d in np.ndindex(*window):
            q = [start[i] + j for start, i, j in zip(starts, p, d, strict=True)]
            inside = all(0 <= i < n for i, n in zip(q, x.shape[1:-1], strict=True))
            if padding == "CIRCULAR":
                q = [i % n for i, n in zip(q, x.shape[1:-1], strict=True)]
            if inside or padding == "CIRCULAR":
                y[(slice(None), *p)] += x[(slice(None), *q)]
                n_inside += 1
        y[(slice(None), *p)] /= {"nothing": 1, "window": np.prod(window), "inside": n_inside}[divide_by]
    return y


LAYERS = {"nothing": SumPool, "window": AvgPool, "inside": lambda *a, **k: AvgPool(*a, normalize_edges=True, **k)}
CASES = [
    (divide_by, padding, strides, axes)
    for (divide_by, padding, strides), axes in zip(
        itertools.product(LAYERS, ["SAME", "VALID", "CIRCULAR"], [None, [2, 1], (3, 2)]), itertools.cycle(AXES)
    )
    if divide_by != "inside" or padding == "SAME"
]


@pytest.mark.parametrize(("divide_by", "padding", "strides", "axes"), CASES)
def test_pools(divide_by, padding, strides, axes, covariances, full, x64):
    batch_axis, channel_axis = axes
    window = (2, 3)
    canonical1, canonical2 = np.asarray(inputs(1, (2, 5, 4, 3))), np.asarray(inputs(2, (3, 5, 4, 3)))
    expected1, expected2 = (pooled(x, window, strides or (1, 1), padding, divide_by) for x in (canonical1, canonical2))

    def move(x):
        return np.moveaxis(x, (0, -1), (batch_axis, channel_axis))

    layer = LAYERS[divide_by](window, strides, padding, batch_axis=batch_axis, channel_axis=channel_axis)
    init_fn, apply_fn, kernel_fn = layer
    x1, x2 = move(canonical1), move(canonical2)
    assert_close(apply_fn((), x1), move(expected1))
    assert init_fn(random.key(0), x1.shape) == (move(expected1).shape, ())
    with warn_of_batch_axis(batch_axis):
        kernel = kernel_fn(x1, x2)
    assert_close(full(kernel.nngp, kernel), covariances(expected1, expected2, 0, -1))
    assert (kernel.shape1, kernel.shape2) == (move(expected1).shape, move(expected2).shape)
    assert kernel.ntk.ndim == 0


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "layer", [AvgPool((2, 2), (1, 2), "SAME", True), SumPool((2, 3)), AvgPool((3, 1), padding="CIRCULAR")]
)
@pytest.mark.parametrize("n_convs", [1, 2])
def test_pool_of_both_layouts(layer, n_convs, finite_kernels, full, dtype):
    """After one convolution covariances are stored with their axes reversed, after two they are not."""
    x1, x2 = inputs(1, (2, 4, 5, 3), dtype), inputs(2, (3, 4, 5, 3), dtype)
    ones = serial(*[Conv(1, (1, 1))] * (n_convs - 1))
    network = serial(Conv(1, (2, 3), padding="SAME", W_std=1.5, b_std=0.5), layer)
    nngp, ntk = finite_kernels(network, x1, x2, 0, -1)
    kernel = serial(ones, network)[2](x1, x2)
    assert kernel.is_reversed == (n_convs == 1)
    assert_close(full(kernel.nngp, kernel), nngp, dtype)
    if n_convs == 1:
        assert_close(full(kernel.ntk, kernel), ntk, dtype)


def test_pool_of_diagonal_storage(x64):
    """Where entries off the diagonal vanish, storing the diagonal alone is enough."""
    x1, x2 = inputs(1, (2, 4, 5, 3)), inputs(2, (3, 4, 5, 3))
    conv_fn = Conv(8, (1, 1), W_std=1.5)[2]
    k_full, diagonal = conv_fn(x1, x2), conv_fn(x1, x2, diagonal_spatial=True)
    eye = np.einsum("ij,kl->ijkl", np.eye(5), np.eye(4))  # reversed, after one convolution
    independent = k_full.replace(**{n: np.asarray(getattr(k_full, n)) * eye for n in ("nngp", "ntk", "cov1", "cov2")})
    average = AvgPool((2, 3), (1, 1), "SAME", normalize_edges=True)
    for layer in (average, SumPool((2, 2)), GlobalAvgPool(), GlobalSumPool()):
        expected, actual = layer[2](independent), layer[2](diagonal)
        for name in ("nngp", "ntk", "cov1", "cov2"):
            k = np.asarray(getattr(expected, name))
            start = 1 if name.startswith("cov") else 2
            if k.ndim > start:
                k = np.einsum("...wwhh->...hw", k)
            assert_close(getattr(actual, name), k)


@pytest.mark.parametrize("axes", [*AXES, (1, 0)])
@pytest.mark.parametrize("layer", [GlobalAvgPool, GlobalSumPool])
def test_global_pools(axes, layer, covariances, dtype):
    batch_axis, channel_axis = axes
    canonical1, canonical2 = inputs(1, (2, 5, 4, 3), dtype), inputs(2, (3, 5, 4, 3), dtype)
    x1, x2 = (np.moveaxis(np.asarray(x), (0, -1), (batch_axis, channel_axis)) for x in (canonical1, canonical2))
    init_fn, apply_fn, kernel_fn = layer(batch_axis, channel_axis)
    reduce = np.mean if layer is GlobalAvgPool else np.sum
    rows1, rows2 = (reduce(np.asarray(x), (1, 2)) for x in (canonical1, canonical2))
    batch_first = batch_axis % 4 < channel_axis % 4
    assert_close(apply_fn((), x1), rows1 if batch_first else rows1.T, dtype)
    assert init_fn(random.key(0), x1.shape) == ((2, 3) if batch_first else (3, 2), ())
    with warn_of_batch_axis(batch_axis):
        kernel = kernel_fn(x1, x2)
    assert_close(kernel.nngp, covariances(rows1, rows2, 0, -1), dtype)
    assert kernel.shape1 == ((2, 3) if batch_first else (3, 2))
    assert (kernel.batch_axis, kernel.channel_axis) == ((0, 1) if batch_first else (1, 0))


def test_sizes_that_are_not_needed_may_be_unknown():
    assert AvgPool((2, 2), (2, 2))[0](random.key(0), (-1, 8, -1, 3))[0] == (-1, 4, -1, 3)
    assert GlobalAvgPool()[0](random.key(0), (-1, -1, -1, 3))[0] == (-1, 3)


# Masks


def masked(x, seed):
    """Masks some positions of `(n, *space, channels)`, all of the first sample's."""
    x = np.array(x)
    where = np.array(random.bernoulli(random.key(seed), 0.4, x.shape[:-1]))
    where[0] = True
    x[where] = np.nan
    return x, where


@pytest.mark.parametrize("diagonal_batch", [True, False])
@pytest.mark.parametrize("diagonal_spatial", [False, True])
def test_global_average_counts_what_is_not_masked(diagonal_batch, diagonal_spatial, x64):
    x1, where1 = masked(inputs(1, (3, 4, 3, 2)), 3)
    x2, where2 = masked(inputs(2, (2, 4, 3, 2)), 4)
    network = Conv(2, (1, 1), W_std=1.5, b_std=0.5)
    layout = {"mask_constant": np.nan, "diagonal_batch": diagonal_batch, "diagonal_spatial": diagonal_spatial}
    before = network[2](x1, x2, **layout)
    counts = [np.maximum((~where).sum((1, 2)), 1) for where in (where1, where2)]
    sums = GlobalSumPool()[2](before)
    after = GlobalAvgPool()[2](before)
    np.testing.assert_allclose(after.nngp, sums.nngp / counts[0][:, None] / counts[1][None], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(after.ntk, sums.ntk / counts[0][:, None] / counts[1][None], rtol=1e-12, atol=1e-14)
    for name, n in (("cov1", counts[0]), ("cov2", counts[1])):
        n = n * n if diagonal_batch else n[:, None] * n[None]
        np.testing.assert_allclose(getattr(after, name), getattr(sums, name) / n, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(after.mask1, np.all(where1, (1, 2))[:, None])
    assert np.all(np.abs(after.nngp[0]) < 1e-14)  # nothing is left of the first sample
    of_one_batch = GlobalAvgPool()[2](network[2](x1, None, **layout))
    assert of_one_batch.cov2 is None
    of_two = GlobalAvgPool()[2](network[2](x1, jnp.array(x1), **layout))
    np.testing.assert_allclose(of_one_batch.ntk, of_two.ntk, rtol=1e-12, atol=1e-14)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "layer",
    [
        GlobalAvgPool(),
        GlobalSumPool(),
        AvgPool((2, 2), (2, 1)),
        AvgPool((3, 2), (2, 2), "SAME", normalize_edges=True),
        SumPool((2, 3), padding="CIRCULAR"),
    ],
)
def test_pools_with_masks(layer, finite_kernels, full, x64):
    x1, x2 = masked(inputs(1, (3, 4, 5, 2)), 3)[0], masked(inputs(2, (2, 4, 5, 2)), 4)[0]
    network = serial(Conv(1, (1, 1), W_std=1.5, b_std=0.5), layer)
    nngp, ntk = finite_kernels(network, x1, x2, 0, -1, mask_constant=np.nan)
    kernel = network[2](x1, x2, mask_constant=np.nan)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    outputs = network[1](network[0](random.key(0), x1.shape)[1], x1, mask_constant=np.nan)
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, outputs.shape), outputs.mask)


def test_a_window_is_masked_where_its_centre_is():
    x = np.ones((1, 6, 1))
    x[0, 3:] = np.nan
    for window, padding, centres in [
        (2, "VALID", [0, 2, 4]),
        (3, "VALID", [1, 3]),
        (3, "SAME", [1, 3, 5]),
        (4, "SAME", [0, 2, 4]),
    ]:
        outputs = AvgPool((window,), (2,), padding)[1]((), x, mask_constant=np.nan)
        np.testing.assert_array_equal(outputs.mask[0, :, 0], [centre >= 3 for centre in centres])


def test_masks_of_single_channels():
    """The finite network averages each channel on its own; its kernel has no limit here."""
    x = np.ones((2, 3, 2), "float32")
    x[0, :2, 1] = np.nan
    outputs = unmask_fn(GlobalAvgPool()[1])((), np.where(np.isnan(x), x, 3.0), mask_constant=np.nan)
    np.testing.assert_array_equal(outputs, 3.0)
    with pytest.raises(NotImplementedError, match="Dense or Conv"):
        GlobalAvgPool()[2](x, None, mask_constant=np.nan)
    with pytest.raises(NotImplementedError, match="channels"):
        AvgPool((2,))[2](x, None, mask_constant=np.nan)


# Inside of networks


@pytest.mark.parametrize("layer", [AvgPool((2, 2), padding="SAME", normalize_edges=True), GlobalAvgPool()])
def test_finite_networks_transform(layer, x64):
    x = inputs(1, (3, 4, 4, 2))
    y = layer[1]((), x)
    assert_close(jax.jit(lambda x: layer[1]((), x))(x), y)
    assert_close(jax.vmap(lambda z: layer[1]((), z[None])[0])(x), y)

    def apply(x):
        return layer[1]((), x)

    _, tangent = jax.jvp(apply, (x,), (2 * x,))
    assert_close(tangent, 2 * y)
    _, pullback = jax.vjp(apply, x)
    assert_close(jnp.sum(pullback(y)[0] * x), jnp.sum(y * y))  # the adjoint: <A^T y, x> = <y, A x>


def test_global_pool_needs_entries_off_the_diagonal():
    network = serial(Conv(4, (3, 3)), Relu(), GlobalAvgPool(), Dense(1))
    x = jnp.ones((2, 5, 5, 1))
    with pytest.raises(ValueError, match="diagonal_spatial"):
        network[2](x, diagonal_spatial=True)
    diagonal = serial(Conv(4, (3, 3)), Relu(), Flatten(), Dense(1))[2](x)
    assert not diagonal.diagonal_spatial  # there is no space any more
    before = serial(Conv(4, (3, 3)), Relu())[2]
    with pytest.raises(ValueError, match="ill-defined"):
        GlobalAvgPool(channel_axis=1)[2](before(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AvgPool((2,), padding="FULL"), "AvgPool: padding='FULL'"),
        (lambda: SumPool((2, 2), (1,)), "SumPool: strides"),
        (lambda: SumPool((2, 0)), "positive integers"),
        (lambda: AvgPool((2,))[0](random.key(0), (2, 4, 4, 3)), "1 spatial axes"),
        (lambda: AvgPool((2,))[2](jnp.ones((2, 4, 4, 3))), "spatial axes"),
        (lambda: AvgPool((5,))[1]((), jnp.ones((2, 4, 3))), "does not fit"),
        (lambda: GlobalAvgPool(batch_axis=3)[1]((), jnp.ones((2, 4, 3))), "no batch axis 3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
