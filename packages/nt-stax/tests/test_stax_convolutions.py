"""ConvTranspose, ConvLocal and dilated convolutions: finite functions against those that they are adjoints or special
cases of, and kernels that equal those of the finite networks exactly."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from nt_stax import (
    AvgPool,
    Conv,
    ConvLocal,
    ConvTranspose,
    Dense,
    Erf,
    FanInConcat,
    FanOut,
    Flatten,
    GlobalAvgPool,
    Identity,
    Relu,
    parallel,
    serial,
)
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

DIMENSION_NUMBERS = [("NHWC", "HWIO", "NHWC"), ("NWHC", "HWIO", "NCWH"), ("CHNW", "IWOH", "WNHC")]
SHAPE = {"N": 2, "C": 2, "H": 2, "W": 3}
# Filters smaller and larger than their strides, even and odd, larger than the image, with gaps.
WINDOWS = [
    ((3, 2), (1, 1), None),
    ((2, 3), (2, 1), None),
    ((3, 1), (2, 3), None),
    ((5, 4), (1, 2), None),
    ((2, 3), (1, 3), (2, 1)),
]
PADDINGS = ["SAME", "VALID", "CIRCULAR"]


def inputs(seed, shape, dtype="float64"):
    return normal(seed, shape, dtype)


def assert_close(actual, expected, tolerance=1e-12):
    scale = max(np.abs(expected).max(initial=0), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def warn_of_batch_axis(batch_axis):
    return pytest.warns(UserWarning, match="batch_axis") if batch_axis else contextlib.nullcontext()


def assert_kernels_are_those_of_finite_networks(layer, x1, x2, axes, finite_kernels, full, variances=(1.0, 1.0)):
    """`axes` are the batch axis of the inputs, and batch and channel axis of the outputs."""
    nngp, ntk = finite_kernels(layer, x1, x2, *axes[1:], variances)
    with warn_of_batch_axis(axes[0]):
        kernel = layer[2](x1, x2, diagonal_spatial=False)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    assert kernel.shape1 == layer[0](random.key(0), x1.shape)[0]
    assert (kernel.batch_axis, kernel.channel_axis) == axes[1:]
    assert kernel.is_gaussian
    return kernel


def assert_diagonal_storage_is_the_diagonal(kernel_fn, x):
    whole, equal = kernel_fn(x, diagonal_spatial=False), kernel_fn(x, diagonal_spatial=True)
    whole = whole.reverse() if whole.is_reversed else whole
    for name in ("nngp", "ntk"):
        assert_close(getattr(equal, name), np.einsum("nmhhww->nmhw", getattr(whole, name)))


# Transposed


@pytest.mark.sample(5)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", WINDOWS)
def test_transposed_function(window, padding, x64):
    """It is the adjoint of a convolution, with the filter turned around; the kernel does not see the turn."""
    filter_shape, strides, dilation = window
    init_fn, apply_fn, _ = ConvTranspose(3, filter_shape, strides, padding, 1.5, 0.5, rhs_dilation=dilation)
    x = inputs(1, (2, 2, 3, 2))
    shape, (W, b) = init_fn(random.key(0), x.shape)
    _, conv_fn, _ = Conv(2, filter_shape, strides, padding, rhs_dilation=dilation)
    turned = jnp.swapaxes(W[::-1, ::-1], -1, -2)
    outputs = jax.ShapeDtypeStruct(shape, "float64")
    (adjoint,) = jax.linear_transpose(lambda y: conv_fn((turned, None), y) * (3 * W[..., 0, 0].size) ** 0.5, outputs)(x)
    assert_close(apply_fn((W, b), x), 1.5 / (2 * W[..., 0, 0].size) ** 0.5 * adjoint + 0.5 * b)
    assert b.shape == (1, 1, 1, 3)
    if padding != "CIRCULAR":
        y = lax.conv_transpose(x, W, strides, padding, dilation, ("NHWC", "HWIO", "NHWC"))
        assert_close(apply_fn((W, 0 * b), x), 1.5 / (2 * W[..., 0, 0].size) ** 0.5 * y)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("window", "padding"), list(zip(WINDOWS * 2, PADDINGS * 3, strict=False)))  # 9 of all 15
def test_transposed_kernels(window, padding, finite_kernels, full, x64):
    filter_shape, strides, dilation = window
    x1, x2 = inputs(1, (2, 2, 3, 2)), inputs(2, (1, 2, 3, 2))
    layer = ConvTranspose(1, filter_shape, strides, padding, 1.5, 0.5, rhs_dilation=dilation)
    assert_kernels_are_those_of_finite_networks(layer, x1, x2, (0, 0, 3), finite_kernels, full)


@pytest.mark.parametrize("dimension_numbers", DIMENSION_NUMBERS[1:])
@pytest.mark.parametrize("transpose", [True, False])
def test_orders_of_axes(dimension_numbers, transpose, finite_kernels, full, x64):
    lhs, rhs, out = dimension_numbers
    x1 = inputs(1, [SHAPE[letter] for letter in lhs])
    x2 = jnp.delete(inputs(2, x1.shape), 0, lhs.index("N"))
    make = ConvTranspose if transpose else ConvLocal
    layer = make(1, (2, 1), (2, 1), "SAME", 1.5, 0.5, dimension_numbers)
    axes = lhs.index("N"), out.index("N"), out.index("C")
    kernel = assert_kernels_are_those_of_finite_networks(layer, x1, x2, axes, finite_kernels, full)
    assert kernel.is_reversed == transpose
    # The same as with channels last.
    _, (W, b) = layer[0](random.key(0), x1.shape)
    heights_first = (2, 1) if rhs.index("H") < rhs.index("W") else (1, 2)
    canonical = make(1, heights_first, heights_first, "SAME", 1.5, 0.5)
    W_canonical = jnp.transpose(W, [rhs.index(letter) for letter in "HWIO"])
    b_canonical = jnp.transpose(b, [out.index(letter) for letter in "NHWC"])
    y = canonical[1]((W_canonical, b_canonical), jnp.transpose(x1, [lhs.index(letter) for letter in "NHWC"]))
    assert_close(layer[1]((W, b), x1), jnp.transpose(y, ["NHWC".index(letter) for letter in out]))


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", [ConvTranspose, ConvLocal])
@pytest.mark.parametrize("b_std", [None, 0.0, 0.5])
def test_standard_parameterization(make, b_std, finite_kernels, full, x64):
    x1, x2 = inputs(1, (2, 3, 2)), inputs(2, (1, 3, 2))
    layer = make(1, (3,), (2,), "SAME", 1.5, b_std, None, "standard", s=(2, 1))
    variances = 1.5**2 * 2 / 6, None if b_std is None else b_std**2
    assert_kernels_are_those_of_finite_networks(layer, x1, x2, (0, 0, 2), finite_kernels, full, variances)
    assert make(3, (3,), parameterization="standard", s=(2, 4))[0](random.key(0), (1, 3, 2))[0][-1] == 12


@pytest.mark.parametrize("make", [ConvTranspose, ConvLocal])
@pytest.mark.parametrize("n_space", [0, 3])
def test_any_number_of_spatial_axes(make, n_space, finite_kernels, full, x64):
    space = (2, 1, 3)[:n_space]
    x1, x2 = inputs(1, (2, *space, 2)), inputs(2, (1, *space, 2))
    layer = make(1, (2,) * n_space, (2,) * n_space, "CIRCULAR", 1.5, 0.5)
    assert_kernels_are_those_of_finite_networks(layer, x1, x2, (0, 0, n_space + 1), finite_kernels, full)


@pytest.mark.parametrize("layer", [ConvTranspose(1, (2,), (2,), "SAME", b_std=1.0), ConvTranspose(1, (3,), (1,))])
def test_transposed_masks(layer, finite_kernels, full, x64):
    """An output is masked where any input is that it is a sum over."""
    x1, x2 = np.array(inputs(1, (2, 4, 2))), np.array(inputs(2, (1, 4, 2)))
    x1[0, :2], x1[1, 3, 1], x2[:, 3:] = np.inf, np.inf, np.inf
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1, mask_constant=np.inf)
    kernel = layer[2](x1, x2, mask_constant=np.inf)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    init_fn, apply_fn, _ = layer
    outputs = apply_fn(init_fn(random.key(0), x1.shape)[1], x1, mask_constant=np.inf)
    assert np.broadcast_to(kernel.mask1, outputs.shape).tolist() == outputs.mask.tolist()
    expected = {8: [1, 1, 1, 1, 0, 0, 0, 0], 6: [1, 1, 1, 1, 0, 0]}
    assert outputs.mask[0, :, 0].astype(int).tolist() == expected[outputs.shape[1]]
    assert not outputs.mask[1].any()


def test_transposed_in_a_network(x64):
    """Layouts, one batch and two, a kernel in between: all agree."""
    x = inputs(1, (2, 2, 3, 2))
    first = serial(Conv(8, (2, 2), None, "SAME", 1.4, 0.3), Relu())
    rest = serial(ConvTranspose(8, (3, 2), (1, 2), "SAME", 1.3, 0.2), Erf(), Conv(8, (2, 2)))
    network = serial(first, rest)[2]
    kernel = network(x)
    for other in (network(x, jnp.array(x)), rest[2](first[2](x))):
        assert_close(other.ntk, kernel.ntk)
    assert_close(network(x, None, "nngp", diagonal_batch=False), kernel.nngp)
    np.testing.assert_array_equal(kernel.ntk, np.einsum("nmwjhi->mnjwih", kernel.ntk))
    assert_close(kernel.cov1, np.einsum("nnwjhi->nwjhi", kernel.nngp))
    assert_diagonal_storage_is_the_diagonal(network, x)


# Local


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [((2, 1), (1, 2), None), ((2, 2), (2, 1), (1, 2))])
def test_local_function_and_kernels(window, padding, finite_kernels, full, x64):
    """With the same weights everywhere it is a convolution."""
    filter_shape, strides, dilation = window
    x1, x2 = inputs(1, (2, 2, 3, 2)), inputs(2, (1, 2, 3, 2))
    layer = ConvLocal(1, filter_shape, strides, padding, 1.5, 0.5, rhs_dilation=dilation)
    assert_kernels_are_those_of_finite_networks(layer, x1, x2, (0, 0, 3), finite_kernels, full)
    init_fn, apply_fn, _ = layer
    shape, (W, b) = init_fn(random.key(0), x1.shape)
    assert W.shape == (*shape[1:3], 2 * np.prod(filter_shape), 1) and b.shape == (1, *shape[1:])
    shared = inputs(3, (*filter_shape, 2, 1))
    _, conv_fn, _ = Conv(1, filter_shape, strides, padding, 1.5, 0.5, rhs_dilation=dilation)
    # The channels of a patch come first, its positions after them.
    everywhere = jnp.broadcast_to(jnp.moveaxis(shared, 2, 0).reshape(-1, 1), W.shape)
    ones = jnp.ones((1, 1, 1, 1))
    assert_close(apply_fn((everywhere, jnp.broadcast_to(ones, b.shape)), x1), conv_fn((shared, ones), x1))


def test_local_in_networks(x64):
    """Nonlinearities without a mean leave positions independent, others do not."""
    x = inputs(1, (2, 2, 3, 2))
    first, local = Conv(8, (2, 1), None, "SAME", 1.4, 0.3), ConvLocal(8, (2, 2), None, "CIRCULAR", 1.3, 0.2)
    shared = Conv(8, (2, 2), None, "CIRCULAR", 1.3, 0.2)
    assert serial(local, Flatten())[2](x).nngp.shape == (2, 2)
    pooled = serial(first, local, GlobalAvgPool())[2]  # needs no pairs of positions, as they are 0
    positions = serial(first, shared)[2](x, None, ("nngp", "ntk"), diagonal_spatial=True)
    for name in ("nngp", "ntk"):
        expected = getattr(positions, name).sum((2, 3)) / 36
        assert_close(pooled(x, None, name, diagonal_spatial=False), expected)
        assert_close(pooled(x, None, name), expected)
    network = serial(first, local, Relu(), shared)[2]
    assert_diagonal_storage_is_the_diagonal(network, x)
    untied = serial(first, local)[2](x, diagonal_spatial=False)
    assert untied.is_reversed and untied.nngp.shape == (2, 2, 3, 3, 2, 2)
    assert_close(network(x).ntk, serial(Relu(), shared)[2](untied).ntk)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_local_masks(padding, finite_kernels, full, x64):
    x1, x2 = np.array(inputs(1, (2, 5, 2))), np.array(inputs(2, (1, 5, 2)))
    x1[0, :2], x2[:, 3:] = np.inf, np.inf
    layer = ConvLocal(1, (2,), (2,), padding, b_std=1.0)
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1, mask_constant=np.inf)
    kernel = layer[2](x1, x2, diagonal_spatial=False, mask_constant=np.inf)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)


# Dilated


@pytest.mark.parametrize("padding", PADDINGS)
def test_dilated(padding, finite_kernels, full, x64):
    x1, x2 = inputs(1, (2, 4, 5, 2)), inputs(2, (1, 4, 5, 2))
    layer = Conv(1, (2, 3), (2, 1), padding, 1.5, 0.5, rhs_dilation=(3, 2))
    assert_kernels_are_those_of_finite_networks(layer, x1, x2, (0, 0, 3), finite_kernels, full)
    init_fn, apply_fn, _ = layer
    _, (W, b) = init_fn(random.key(0), x1.shape)
    with_gaps = jnp.zeros((4, 5, 2, 1)).at[::3, ::2].set(W)
    _, conv_fn, _ = Conv(1, (4, 5), (2, 1), padding, 1.5 * (20 / 6) ** 0.5, 0.5)
    assert_close(apply_fn((W, b), x1), conv_fn((with_gaps, b), x1))
    masked = np.array(x1)
    masked[0, 1:, :2] = np.nan
    mask = layer[2](masked, None, mask_constant=np.nan).mask1
    expected = Conv(1, (4, 5), (2, 1), padding)[2](masked, None, mask_constant=np.nan).mask1
    np.testing.assert_array_equal(mask, expected)


# Transformations


@pytest.mark.parametrize("make", [ConvTranspose, ConvLocal])
def test_transformations(make, x64):
    x, direction = inputs(1, (2, 3, 2)), inputs(2, (2, 3, 2))
    layers = make(1, (2,), (2,), "SAME", 1.3, 0.2), Erf(), Conv(1, (2,), None, "SAME"), Erf(), GlobalAvgPool()
    kernel_fn = serial(Conv(1, (2,), None, "CIRCULAR"), *layers)[2]
    ntk = lambda x: kernel_fn(x, None, "ntk")  # noqa: E731
    expected = ntk(x)
    assert_close(jax.jit(ntk)(x), expected)
    assert_close(jax.vmap(ntk)(jnp.stack([x, 2 * x]))[0], expected)
    _, derivative = jax.jvp(ntk, (x,), (direction,))
    assert_close(derivative, (ntk(x + 1e-6 * direction) - ntk(x - 1e-6 * direction)) / 2e-6, 1e-8)


@pytest.mark.sample(4)
@pytest.mark.parametrize("make", [Conv, ConvTranspose, ConvLocal])
@pytest.mark.parametrize("seed", range(24))
def test_random_orders_of_axes(seed, make, finite_kernels, full, x64):
    """Of inputs, filter and outputs; every other time with masks."""
    rng = np.random.default_rng(seed)
    lhs, rhs, out = ("".join(rng.permutation(list(letters))) for letters in ("NHWC", "HWIO", "NHWC"))
    window, strides = ([sizes[c] for c in rhs if c in sizes] for sizes in ({"H": 2, "W": 1}, {"H": 1, "W": 2}))
    layer = make(1, window, strides, PADDINGS[seed % 3], dimension_numbers=(lhs, rhs, out))
    x1, x2 = (rng.normal(size=[{"N": n, "H": 3, "W": 4, "C": 2}[c] for c in lhs]) for n in (2, 3))
    kwargs = {}
    if seed % 2:
        kwargs["mask_constant"] = np.nan
        for x in (x1, x2):
            is_masked = rng.random([1 if c == "C" else n for c, n in zip(lhs, x.shape, strict=True)]) < 0.3
            x[np.broadcast_to(is_masked, x.shape)] = np.nan
    nngp, ntk = finite_kernels(layer, x1, x2, out.index("N"), out.index("C"), **kwargs)
    with warn_of_batch_axis(lhs.index("N")):
        kernel = layer[2](x1, x2, diagonal_spatial=False, **kwargs)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)


# Groups


@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
def test_groups(parameterization, x64):
    """Of inputs whose groups are equal: every group sees what a convolution without groups does."""
    z = inputs(1, (2, 3, 4, 2))
    x = jnp.concatenate([z, z, z], -1)
    arguments = 6, (2, 2), (1, 2), "SAME", 1.5, 0.5, None, parameterization, (2, 1)
    (init_fn, apply_fn, kernel_fn), conv = Conv(*arguments, feature_group_count=3), Conv(*arguments)
    shape, params = init_fn(random.key(0), x.shape)
    assert shape == (2, 3, 2, 6) and params[0].shape == (2, 2, 2, 6)
    assert_close(params[0], conv[0](random.key(0), z.shape)[1][0])
    assert_close(apply_fn(params, x), conv[1](params, z))
    kernel = Identity()[2](x)
    kernel, expected = kernel_fn(kernel.replace(is_input=False)), conv[2](z)
    assert_close(kernel.nngp, expected.nngp)
    assert_close(kernel.ntk, expected.ntk)


# Errors

GROUPED = Conv(4, (2,), feature_group_count=2)
CONCATENATED = serial(FanOut(2), parallel(Dense(4), serial(Dense(4), Erf())), FanInConcat(-1), AvgPool((2,)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvTranspose(3, (3, 3), (1,)), ValueError, "ConvTranspose: strides"),
        (lambda: ConvTranspose(3, (3,), padding="FULL"), ValueError, "'FULL' is unknown"),
        (lambda: ConvTranspose(3, (3,), dimension_numbers=("NHWC", "HWIO", "NHWC")), ValueError, "ConvTranspose with"),
        (lambda: ConvTranspose(3, (3, 3))[0](random.key(0), (2, 8, 3)), ValueError, "rank 4"),
        (lambda: ConvLocal(3, (3, 3))[1]((), jnp.ones((2, 8, 3))), ValueError, "takes inputs of rank 4, got shape"),
        (lambda: Conv(3, (3, 3))[2](jnp.ones((2, 8))), ValueError, "channel_axis=3.*a convolution over n axes"),
        (lambda: ConvLocal(3, (9,))[0](random.key(0), (2, 8, 3)), ValueError, "ConvLocal: a window"),
        (lambda: ConvLocal(3, (2,))[0](random.key(0), (2, -1, 3)), ValueError, "at every position"),
        (lambda: Conv(3, (3, 3), rhs_dilation=(2,)), ValueError, "rhs_dilation"),
        (lambda: Conv(3, (3,), feature_group_count=2), ValueError, "divide the 3 output channels"),
        (lambda: GROUPED[0](random.key(0), (2, 8, 3)), ValueError, "divide the 3 channels"),
        (lambda: GROUPED[2](jnp.ones((2, 4, 4))), ValueError, "no kernel: groups of channels"),
        (lambda: serial(AvgPool((2,)), GROUPED)[2](jnp.ones((2, 4, 4))), ValueError, "no kernel: groups of channels"),
        (lambda: serial(CONCATENATED, GROUPED)[2](jnp.ones((2, 4, 4))), ValueError, "no kernel: groups"),
        (lambda: Conv(3, (3,), rhs_dilation=(0,)), ValueError, "rhs_dilation must be positive integers"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:FanInConcat")
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unknown_sizes():
    assert ConvTranspose(6, (3, 3), (2, 1))[0](random.key(0), (-1, -1, 4, 2))[0] == (-1, -1, 6, 6)
    assert ConvLocal(6, (3,))[0](random.key(0), (-1, 4, 2))[0] == (-1, 2, 6)
