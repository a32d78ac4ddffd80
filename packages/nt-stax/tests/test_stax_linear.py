"""Dense, Conv, Flatten, Identity, Dropout: the finite functions written out, and kernels that equal those of the finite
networks exactly (they are linear in their parameters, and need no limit)."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_stax import (
    Conv,
    Dense,
    DotGeneral,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Identity,
    ImageResize,
    Index,
    Padding,
    Relu,
    Scale,
    Slice,
    serial,
)
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}
DIMENSION_NUMBERS = [
    None,
    ("NCHW", "OIHW", "NCHW"),
    ("NWHC", "HWIO", "NCWH"),
    ("CHNW", "IWOH", "WNHC"),
    ("ABNC", "IABO", "BACN"),
]
SHAPE = {"N": 2, "C": 3, "H": 4, "W": 5, "A": 4, "B": 5}  # H and A are 4 long, W and B 5


def inputs(seed, shape, dtype="float64"):
    return normal(seed, shape, dtype)


def assert_close(actual, expected, dtype):
    scale = max(np.abs(expected).max(initial=0), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


# Dense


@pytest.mark.sample(10)
@pytest.mark.parametrize("axes", [(0, -1), (0, 1), (1, 0), (2, 1), (-1, 2)])
@pytest.mark.parametrize("b_std", [None, 0.0, 0.7])
def test_dense_function(axes, b_std, dtype):
    batch_axis, channel_axis = axes
    x = np.asarray(inputs(1, (3, 4, 5, 6), dtype))
    init_fn, apply_fn, _ = Dense(7, 1.5, b_std, batch_axis, channel_axis)
    shape, (W, b) = init_fn(random.key(0), x.shape)
    expected = 1.5 / x.shape[channel_axis] ** 0.5 * np.moveaxis(x, channel_axis, -1) @ np.asarray(W)
    if b_std is not None:
        assert b.size == 7 and b.shape[channel_axis] == 7
        expected = expected + b_std * np.asarray(b).ravel()
    else:
        assert b is None
    y = apply_fn((W, b), x)
    assert y.shape == shape and y.dtype == dtype
    assert_close(y, np.moveaxis(expected, -1, channel_axis), dtype)


def test_dense_standard_parameterization_scales_the_initial_parameters():
    init_ntk, _, _ = Dense(8, W_std=1.5, b_std=0.7)
    init_standard, apply_fn, _ = Dense(4, W_std=1.5, b_std=0.7, parameterization="Standard", s=(3, 2))
    shape, (W, b) = init_standard(random.key(0), (-1, 12))
    _, (W_normal, b_normal) = init_ntk(random.key(0), (-1, 12))
    assert shape == (-1, 8)  # s[1] * out_dim
    np.testing.assert_allclose(W, W_normal * 1.5 / (12 / 3) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(b, b_normal * 0.7, rtol=1e-6)
    x = inputs(1, (5, 12), "float32")
    np.testing.assert_allclose(apply_fn((W, b), x), x @ W / 3**0.5 + b, rtol=1e-5, atol=1e-5)


def test_parameters_are_drawn_from_a_split_key():
    key_W, key_b = random.split(random.key(3))
    for layer, x_shape, W_shape, b_shape in [
        (Dense(7, b_std=1.0), (-1, 5), (5, 7), (1, 7)),
        (Conv(7, (2, 3), b_std=1.0), (-1, 4, 4, 5), (2, 3, 5, 7), (1, 1, 1, 7)),
    ]:
        _, (W, b) = layer[0](random.key(3), x_shape)
        np.testing.assert_array_equal(W, random.normal(key_W, W_shape))
        np.testing.assert_array_equal(b, random.normal(key_b, b_shape))


@pytest.mark.sample(10)
@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
@pytest.mark.parametrize("b_std", [None, 0.0, 0.7])
@pytest.mark.parametrize("axes", [(0, -1), (1, 0), (2, 1)])
def test_dense_kernels(parameterization, b_std, axes, finite_kernels, full, dtype):
    batch_axis, channel_axis = axes
    x1 = inputs(1, (3, 3, 3, 4), dtype)
    x2 = jnp.delete(inputs(2, x1.shape, dtype), 0, batch_axis)
    layer = Dense(1, 1.5, b_std, batch_axis, channel_axis, parameterization, s=(3, 1))
    fan_in = x1.shape[channel_axis]
    variances = (1.0, 1.0) if parameterization == "ntk" else (1.5**2 * 3 / fan_in, None if b_std is None else b_std**2)
    nngp, ntk = finite_kernels(layer, x1, x2, batch_axis, channel_axis, variances)
    with warn_of_batch_axis(batch_axis):
        kernel = layer[2](x1, x2)
    assert_close(full(kernel.nngp, kernel), nngp, dtype)
    assert_close(full(kernel.ntk, kernel), ntk, dtype)
    assert kernel.is_gaussian and kernel.batch_axis == batch_axis and kernel.channel_axis == channel_axis % 4


def warn_of_batch_axis(batch_axis):
    return pytest.warns(UserWarning, match="batch_axis") if batch_axis else contextlib.nullcontext()


def test_dense_takes_any_rank_and_unknown_sizes():
    init_fn, _, kernel_fn = Dense(6)
    assert init_fn(random.key(0), (-1, 3))[0] == (-1, 6)
    assert init_fn(random.key(0), (-1, -1, -1, -1, 3))[0] == (-1, -1, -1, -1, 6)
    assert kernel_fn(inputs(1, (2, 3), "float32"), None, "nngp").shape == (2, 2)


# Conv


def padded(x, window, strides, padding):
    """Pads the spatial axes of `(n, *space, channels)` so that a convolution stays inside."""
    for axis, (w, s) in enumerate(zip(window, strides, strict=True), 1):
        if padding == "VALID":
            continue
        n = x.shape[axis]
        total = max((-(-n // s) - 1) * s + w - n, 0)
        low = total // 2
        if padding == "CIRCULAR":
            x = np.take(x, np.arange(-low, n + total - low) % n, axis)
        else:
            x = np.pad(x, [(low, total - low) if a == axis else (0, 0) for a in range(x.ndim)])
    return x


def convolved(x, W, strides, padding):
    """`(n, *space, channels)` by a filter `(*window, channels, channels_out)`, in plain loops."""
    window = W.shape[:-2]
    x = padded(x, window, strides, padding)
    space = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:-1], window, strides, strict=True)]
    y = np.zeros((x.shape[0], *space, W.shape[-1]))
    for p in np.ndindex(*space):
        for d in np.ndindex(*window):
            q = [i * s + j for i, s, j in zip(p, strides, d, strict=True)]
            y[(slice(None), *p)] += x[(slice(None), *q)] @ W[d]
    return y


@pytest.mark.sample(8)
@pytest.mark.parametrize("dimension_numbers", DIMENSION_NUMBERS)
@pytest.mark.parametrize(
    ("padding", "strides"), [("SAME", None), ("SAME", (2, 3)), ("VALID", [2, 1]), (Padding.CIRCULAR, (1, 3))]
)
def test_conv_function(dimension_numbers, padding, strides, x64):
    filter_shape = (2, 3)  # in the order of the filter's letters, as the strides
    lhs, rhs, out = dimension_numbers or ("NHWC", "HWIO", "NHWC")
    x = np.asarray(inputs(1, [SHAPE[letter] for letter in lhs]))
    init_fn, apply_fn, _ = Conv(6, filter_shape, strides, padding, 1.5, 0.5, dimension_numbers)
    shape, (W, b) = init_fn(random.key(0), x.shape)
    letters = [letter for letter in rhs if letter not in "IO"]
    canonical = np.transpose(x, [lhs.index(letter) for letter in ("N", *letters, "C")])
    filters = np.transpose(np.asarray(W), [rhs.index(letter) for letter in (*letters, "I", "O")])
    assert filters.shape == (*filter_shape, 3, 6)
    name = padding.value if isinstance(padding, Padding) else padding
    y = 1.5 / (2 * 3 * 3) ** 0.5 * convolved(canonical, filters, strides or (1, 1), name) + 0.5 * np.asarray(b).ravel()
    expected = np.transpose(y, [["N", *letters, "C"].index(letter) for letter in out])
    assert shape == expected.shape and b.shape == tuple(6 if letter == "C" else 1 for letter in out)
    assert_close(apply_fn((W, b), x), expected, "float64")


@pytest.mark.sample(5)
@pytest.mark.parametrize("dimension_numbers", DIMENSION_NUMBERS)
@pytest.mark.parametrize(("padding", "strides"), [("SAME", (2, 1)), ("VALID", None), ("CIRCULAR", (1, 2))])
def test_conv_kernels(dimension_numbers, padding, strides, finite_kernels, full, x64):
    lhs, _, out = dimension_numbers or ("NHWC", "HWIO", "NHWC")
    x1 = inputs(1, [SHAPE[letter] for letter in lhs])
    x2 = jnp.delete(inputs(2, x1.shape), 0, lhs.index("N"))
    layer = Conv(1, (2, 3), strides, padding, 1.5, 0.5, dimension_numbers)
    nngp, ntk = finite_kernels(layer, x1, x2, out.index("N"), out.index("C"))
    with warn_of_batch_axis(lhs.index("N")):
        kernel = layer[2](x1, x2)
    assert_close(full(kernel.nngp, kernel), nngp, "float64")
    assert_close(full(kernel.ntk, kernel), ntk, "float64")
    init_fn, _, _ = layer
    assert kernel.shape1 == init_fn(random.key(0), x1.shape)[0]
    assert (kernel.batch_axis, kernel.channel_axis) == (out.index("N"), out.index("C"))


@pytest.mark.sample(5)
@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
@pytest.mark.parametrize("b_std", [None, 0.0, 0.5])
def test_conv_parameterizations(parameterization, b_std, finite_kernels, full, dtype):
    x1, x2 = inputs(1, (2, 5, 3), dtype), inputs(2, (3, 5, 3), dtype)
    layer = Conv(1, (3,), None, "SAME", 1.5, b_std, None, parameterization, s=(2, 1))
    variances = (1.0, 1.0) if parameterization == "ntk" else (1.5**2 * 2 / 9, None if b_std is None else b_std**2)
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1, variances)
    kernel = layer[2](x1, x2)
    assert_close(full(kernel.nngp, kernel), nngp, dtype)
    assert_close(full(kernel.ntk, kernel), ntk, dtype)


@pytest.mark.parametrize("n_space", [0, 1, 3])
def test_conv_of_any_number_of_spatial_axes(n_space, finite_kernels, full, x64):
    space = (3, 2, 4)[:n_space]
    x1, x2 = inputs(1, (2, *space, 3)), inputs(2, (3, *space, 3))
    layer = Conv(1, (2,) * n_space, None, "CIRCULAR", 1.5, 0.5)
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1)
    kernel = layer[2](x1, x2)
    assert_close(full(kernel.nngp, kernel), nngp, "float64")
    assert_close(full(kernel.ntk, kernel), ntk, "float64")


def test_convs_in_a_row_keep_the_order_of_axes(covariances, full, x64):
    """The layout of the covariance alternates, and 3-cycles of axes compose: expectations are taken by hand."""
    shuffle = ("NABDC", "ABDIO", "NBDAC")
    x = inputs(1, (2, 2, 3, 4, 3))
    identity = Conv(1, (1, 1, 1), dimension_numbers=shuffle)
    for n in (1, 2, 3, 4):
        kernel = serial(*[identity] * n)[2](x, x)
        y = np.asarray(x)
        for _ in range(n):
            y = np.transpose(y, [shuffle[0].index(letter) for letter in shuffle[2]])
        assert kernel.shape1 == (*y.shape[:-1], 1)
        assert_close(full(kernel.nngp, kernel), covariances(y, y, 0, -1), "float64")


def test_conv_that_follows_conv(full, x64):
    """`K'' = W_std^2 A(K') + b_std^2`, with the average over the taps written out."""
    x = np.asarray(inputs(1, (2, 4, 3, 3)))
    kernel = serial(Conv(8, (3, 1), padding="SAME"), Conv(8, (2, 3), (2, 1), "SAME", 1.3, 0.4))[2](x, None)

    def average(k, window, strides):
        """Averages `(n1, n2, H, H, W, W)` over the taps of a filter that moves both positions alike."""
        (n1, n2, h, _, w, _), (fh, fw), (sh, sw) = k.shape, window, strides
        high, wide = -(-h // sh), -(-w // sw)
        low = [max((c - 1) * s + f - n, 0) // 2 for c, s, f, n in ((high, sh, fh, h), (wide, sw, fw, w))]
        out = np.zeros((n1, n2, high, high, wide, wide))
        for i, j, p, q, a, b in itertools.product(*(range(n) for n in (high, high, wide, wide, fh, fw))):
            rows, columns = [u * sh + a - low[0] for u in (i, j)], [u * sw + b - low[1] for u in (p, q)]
            if min(rows + columns) >= 0 and max(rows) < h and max(columns) < w:
                out[:, :, i, j, p, q] += k[:, :, rows[0], rows[1], columns[0], columns[1]] / (fh * fw)
        return out

    k0 = np.einsum("nhwc,mijc->nmhiwj", x, x) / 3
    expected = 1.3**2 * average(average(k0, (3, 1), (1, 1)), (2, 3), (2, 1)) + 0.4**2
    assert_close(full(kernel.nngp, kernel), expected, "float64")


def test_diagonal_storage_holds_the_diagonal_of_the_full_one(x64):
    x = inputs(1, (2, 4, 5, 3))
    _, _, kernel_fn = serial(Conv(8, (3, 2), (2, 1), "SAME", 1.5, 0.5), Relu(), Conv(8, (1, 3), padding="CIRCULAR"))
    k_full, k_diagonal = kernel_fn(x), kernel_fn(x, diagonal_spatial=True)
    assert not k_full.is_reversed  # after two convolutions
    for name in ("nngp", "ntk"):
        expected = np.einsum("nmhhww->nmhw", getattr(k_full, name))
        assert_close(getattr(k_diagonal, name), expected, "float64")
    assert_close(k_diagonal.cov1, np.einsum("nhhww->nhw", k_full.cov1), "float64")


@pytest.mark.parametrize(
    "layer", [Dense(1, 1.5, 0.5), Conv(1, (3,), padding="SAME"), Conv(1, (2,), (2,), "SAME", b_std=1.0)]
)
def test_masks_of_layers_with_weights(layer, finite_kernels, full, x64):
    """A position is masked where all its channels are (after a convolution: at the centre of the window)."""
    x1, x2 = np.array(inputs(1, (2, 5, 3))), np.array(inputs(2, (3, 5, 3)))
    x1[0, :2], x1[1, 4, 1], x2[:, 3:] = np.inf, np.inf, np.inf
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1, mask_constant=np.inf)
    kernel = layer[2](x1, x2, mask_constant=np.inf)
    assert_close(full(kernel.nngp, kernel), nngp, "float64")
    assert_close(full(kernel.ntk, kernel), ntk, "float64")
    init_fn, apply_fn, _ = layer
    outputs = apply_fn(init_fn(random.key(0), x1.shape)[1], x1, mask_constant=np.inf)
    assert np.broadcast_to(kernel.mask1, outputs.shape).tolist() == outputs.mask.tolist()
    expected = {5: [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], 3: [[1, 0, 0], [0, 0, 0]]}
    assert outputs.mask[..., 0].astype(int).tolist() == expected[outputs.shape[1]]


def test_conv_mask_follows_the_axes():
    """Masks are re-sampled by the stride and permuted as the outputs are."""
    x = np.ones((2, 4, 6, 3))
    x[1, :, 4:] = np.nan
    layer = Conv(1, (1, 3), (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "WNCH"))
    kernel = layer[2](x, None, mask_constant=np.nan)
    mask = np.zeros((3, 2, 1, 4), bool)
    mask[2, 1] = True  # windows start at 0, 2, 4 and have their centre one further
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, mask.shape), mask)


def test_gradients_with_respect_to_traced_standard_deviations(x64):
    x = inputs(1, (2, 4, 3))

    def total(W_std, b_std):
        network = serial(Conv(4, (2,), W_std=W_std, b_std=b_std), Flatten(), Dense(1, W_std, b_std))
        return jnp.sum(network[2](x, None, "ntk"))

    for i in (0, 1):
        derivative = jax.grad(total, i)(1.2, 0.3)
        step = 1e-6 * np.eye(2)[i]
        difference = (total(*(np.array([1.2, 0.3]) + step)) - total(*(np.array([1.2, 0.3]) - step))) / 2e-6
        np.testing.assert_allclose(derivative, difference, rtol=1e-7)


@pytest.mark.parametrize("layer", [Dense(4, b_std=1.0), Conv(4, (2, 2), padding="CIRCULAR", b_std=1.0)])
def test_finite_networks_transform(layer, x64):
    init_fn, apply_fn, _ = layer
    x = inputs(1, (3, 4, 4, 2))
    _, params = init_fn(random.key(0), x.shape)
    y = apply_fn(params, x)
    assert_close(jax.jit(apply_fn)(params, x), y, "float64")
    one_by_one = jax.vmap(lambda z: apply_fn(params, z[None])[0])(x)
    assert_close(one_by_one, y, "float64")
    assert jax.grad(lambda p: jnp.sum(apply_fn(p, x) ** 2))(params)[0].shape == params[0].shape


def test_conv_takes_inputs_of_another_precision(x64):
    init_fn, apply_fn, _ = Conv(4, (2,))
    _, params = init_fn(random.key(0), (1, 5, 3))
    assert apply_fn(params, jnp.ones((1, 5, 3), "float32")).dtype == "float64"


# Flatten, Identity, Dropout


@pytest.mark.parametrize(("batch_axis", "batch_axis_out"), [(0, 0), (0, 1), (1, -2), (2, -1), (-1, 0)])
def test_flatten(batch_axis, batch_axis_out, covariances, dtype):
    x1 = np.asarray(inputs(1, (2, 3, 4), dtype))
    x2 = np.delete(np.asarray(inputs(2, (2, 3, 4), dtype)), 0, batch_axis)
    init_fn, apply_fn, kernel_fn = Flatten(batch_axis, batch_axis_out)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    rows = np.moveaxis(x1, batch_axis, 0).reshape(x1.shape[batch_axis], -1)
    np.testing.assert_array_equal(y1, rows if batch_axis_out in (0, -2) else rows.T)
    assert init_fn(random.key(0), x1.shape) == (y1.shape, ())
    with warn_of_batch_axis(batch_axis % 3):
        kernel = kernel_fn(x1, x2)
    assert_close(kernel.nngp, covariances(y1, y2, batch_axis_out % 2, 1 - batch_axis_out % 2), dtype)
    assert (kernel.shape1, kernel.shape2) == (y1.shape, y2.shape)
    assert (kernel.batch_axis, kernel.channel_axis) == (batch_axis_out % 2, 1 - batch_axis_out % 2)
    assert not kernel.is_gaussian and kernel.ntk.ndim == 0


@pytest.mark.parametrize("batch_axis_out", [0, 1])
def test_flatten_of_conv_with_masks(batch_axis_out, x64):
    """The mask of the flattened entries comes in their order."""
    x = np.array(inputs(1, (2, 3, 2, 3)))
    x[0, 1] = np.nan
    init_fn, apply_fn, kernel_fn = serial(Conv(2, (1, 1)), Flatten(batch_axis_out=batch_axis_out))
    outputs = apply_fn(init_fn(random.key(0), x.shape)[1], x, mask_constant=np.nan)
    kernel = kernel_fn(x, None, mask_constant=np.nan)
    rows = np.zeros((2, 3, 2, 2), bool)
    rows[0, 1] = True
    expected = rows.reshape(2, 12) if batch_axis_out == 0 else rows.reshape(2, 12).T
    np.testing.assert_array_equal(outputs.mask, expected)
    np.testing.assert_array_equal(kernel.mask1, expected)
    valid = np.where(np.isnan(x), 0, x)
    np.testing.assert_allclose(kernel.nngp, np.einsum("nhwc,mhwc->nm", valid, valid) / 18, rtol=1e-12)


def test_flatten_with_unknown_sizes():
    assert Flatten()[0](random.key(0), (-1, 4, 3))[0] == (-1, 12)
    assert Flatten(batch_axis_out=1)[0](random.key(0), (-1, -1, 3))[0] == (-1, -1)


def test_identity(x64):
    x = inputs(1, (2, 3))
    init_fn, apply_fn, kernel_fn = Identity()
    assert init_fn(random.key(0), (-1, 3)) == ((-1, 3), ())
    np.testing.assert_array_equal(apply_fn((), x, rng=None, keys=1, pattern=None), x)
    np.testing.assert_allclose(kernel_fn(x, None, "nngp"), x @ x.T / 3, rtol=1e-14)
    tree = [x, (x, x)]
    assert isinstance(apply_fn((), tree)[1], tuple)
    assert isinstance(kernel_fn(tree, None, "nngp")[1], tuple)


def test_dropout_function():
    x = jnp.arange(1.0, 100_001.0).reshape(1000, 100)
    _, apply_fn, _ = Dropout(0.8)
    y = np.asarray(apply_fn((), x, rng=random.key(0)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.8, rtol=1e-6)
    assert abs(kept.mean() - 0.8) < 5 * (0.8 * 0.2 / x.size) ** 0.5
    assert not np.array_equal(y, apply_fn((), x, rng=random.key(1)))
    np.testing.assert_array_equal(Dropout(0.8, "test")[1]((), x, rng=random.key(0)), x)


@pytest.mark.parametrize("diagonal_batch", [True, False])
@pytest.mark.parametrize("diagonal_spatial", [True, False])
def test_dropout_kernels(diagonal_batch, diagonal_spatial, x64):
    """Same sample and same position: `/ rate`; all else stays."""
    x1, x2 = inputs(1, (2, 3, 4)), inputs(2, (2, 3, 4))
    before, after = Conv(8, (1,), W_std=1.5, b_std=0.5), serial(Conv(8, (1,), W_std=1.5, b_std=0.5), Dropout(0.4))
    layout = {"diagonal_batch": diagonal_batch, "diagonal_spatial": diagonal_spatial}
    for second, same in ((x2, False), (None, True), (jnp.array(x1), True)):
        k0, k1 = before[2](x1, second, **layout), after[2](x1, second, **layout)
        same_position = 1 if diagonal_spatial else np.eye(3)
        same_sample = np.eye(2).reshape((2, 2) + (1,) * (1 if diagonal_spatial else 2))
        factor = 1 + (1 / 0.4 - 1) * same_sample * same_position
        for name in ("nngp", "ntk"):
            assert_close(getattr(k1, name), getattr(k0, name) * (factor if same else 1.0), "float64")
        own = np.broadcast_to(1 + (1 / 0.4 - 1) * same_position, k0.cov1.shape)
        assert_close(k1.cov1, k0.cov1 * (own if diagonal_batch else factor), "float64")
        assert (k1.cov2 is None) == (second is None)
        assert not k1.is_gaussian
        test_mode = serial(Conv(8, (1,), W_std=1.5, b_std=0.5), Dropout(0.4, "test"))
        assert_close(test_mode[2](x1, second, "ntk", **layout), k0.ntk, "float64")


def test_dropout_in_jit_knows_equal_inputs_by_their_values(x64):
    x1, x2 = inputs(1, (2, 3)), inputs(2, (2, 3))
    kernel_fn = serial(Dense(8), Dropout(0.5))[2]
    nngp = jax.jit(lambda a, b: kernel_fn(a, b, "nngp"))
    np.testing.assert_allclose(nngp(x1, x1), (x1 @ x1.T / 3) * (1 + np.eye(2)), rtol=1e-12)
    np.testing.assert_allclose(nngp(x1, x2), x1 @ x2.T / 3, rtol=1e-12)


# Errors


@pytest.mark.parametrize(
    "layer",
    [
        GlobalAvgPool(),
        Flatten(),
        Scale(0.5),
        DotGeneral(rhs=2.0),
        DotGeneral(rhs=np.ones((3, 2)), dimension_numbers=(((1,), (0,)), ((), ()))),
        Index(Slice[:, 1]),
        Index(Slice[1:]),
        ImageResize((-1, 5, -1), "nearest"),
    ],
)  # fmt: skip
def test_dropout_of_linear_maps_of_the_inputs(layer):
    """Without weights, as steps and as functions of kernels: channels remain as few as they are."""
    network = serial(layer, Dropout(0.5), Dense(1))[2]
    with pytest.raises(ValueError, match="cannot be applied to the inputs"):
        network(np.ones((2, 3, 4)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(3, parameterization="mup"), ValueError, "parameterization='mup'"),
        (lambda: Conv(3, (3, 3), (1,)), ValueError, "strides"),
        (lambda: Conv(3, (3, 0)), ValueError, "positive integers"),
        (lambda: Conv(3, (3,), padding="FULL"), ValueError, "'FULL' is unknown, use one of CIRCULAR, SAME, VALID"),
        (lambda: Conv(3, (3, 3), dimension_numbers=("NHWC", "HWIO")), ValueError, "dimension_numbers"),
        (lambda: Conv(3, (3, 3), dimension_numbers=("NHWC", "HWIO", "NHDC")), ValueError, "dimension_numbers"),
        (lambda: Conv(3, (3,), dimension_numbers=("NHWC", "HWIO", "NHWC")), ValueError, "1 spatial axes"),
        (lambda: Conv(3, (3, 3))[0](random.key(0), (2, 8, 3)), ValueError, "rank 4"),
        (lambda: Conv(3, (9, 3))[0](random.key(0), (2, 8, 8, 3)), ValueError, "does not fit"),
        (lambda: Conv(3, (3, 3))[2](jnp.ones((2, 8, 3))), ValueError, "channel_axis=3"),
        (lambda: Dense(3)[0](random.key(0), (2, -1)), ValueError, "size of the channel axis"),
        (lambda: Dense(3, channel_axis=2)[0](random.key(0), (2, 3)), ValueError, "no channel axis 2"),
        (lambda: Flatten(batch_axis_out=2), ValueError, "batch_axis_out must be 0 or 1"),
        (lambda: Dropout(0.0), ValueError, r"\(0, 1\], got 0.0"),
        (lambda: Dropout(1.5), ValueError, "got 1.5"),
        (lambda: Dropout(0.5, "predict"), ValueError, "'predict'"),
        (lambda: Dropout(0.5)[1]((), jnp.ones((2, 3))), ValueError, "needs a random key"),
        (lambda: Dropout(0.5)[2](jnp.ones((2, 3))), ValueError, "cannot be applied to the inputs"),
        (lambda: serial(Dropout(0.5, "test"), Dense(3), Dropout(0.5)), ValueError, "same mode"),
        (lambda: serial(Conv(3, (1,)), Dense(3, channel_axis=1))[2](jnp.ones((2, 3, 4))), ValueError, "ill-defined"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
