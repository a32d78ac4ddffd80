"""DotGeneral and ImageResize: kernels that equal the covariances of the mapped inputs, and those of finite networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from jax.image import ResizeMethod
from nt_core import batch, explain
from nt_stax import Conv, Dense, DotGeneral, Flatten, GlobalAvgPool, Identity, ImageResize, Relu, serial
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

NOTHING = ((), ())


def inputs(seed, shape):
    return normal(seed, shape, "float64")


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1.0))


def assert_kernels_are_those_of_finite_networks(layer, x1, x2, finite_kernels, full):
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1)
    kernel = layer[2](x1, x2)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    assert kernel.is_gaussian and kernel.shape1 == layer[0](random.key(0), x1.shape)[0]


# DotGeneral

# The constant's shape, dimension numbers with it on the right, axes of batch and channels after it.
PRODUCTS = {
    "number": ((), ((), ()), NOTHING, (0, 3)),
    "contraction": ((3, 5), ((2,), (0,)), NOTHING, (0, 2)),
    "contraction of two": ((3, 2), ((1, 2), (1, 0)), NOTHING, (0, 1)),
    "shared position": ((3, 2), ((), ()), ((2,), (0,)), (1, 3)),
    "shared and contracted": ((3, 2, 4), ((2,), (0,)), ((1,), (1,)), (1, 2)),
    "shared samples": ((2, 3), ((2,), (1,)), ((0,), (0,)), (0, 2)),
}


@pytest.mark.parametrize("is_lhs", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, is_lhs, covariances, full, x64):
    shape, contracted, shared, _ = PRODUCTS[name]
    x1, x2, other = inputs(1, (2, 2, 3, 4)), inputs(2, (2, 2, 3, 4)), inputs(3, shape)
    numbers = (contracted[::-1], shared[::-1]) if is_lhs else (contracted, shared)
    constant = {"lhs" if is_lhs else "rhs": other}
    init_fn, apply_fn, kernel_fn = DotGeneral(**constant, dimension_numbers=numbers)
    dot = lambda x: lax.dot_general(*((other, x) if is_lhs else (x, other)), numbers)  # noqa: E731
    y1, y2 = dot(x1), dot(x2)
    assert_close(apply_fn((), x1), y1)
    assert init_fn(random.key(0), x1.shape) == (y1.shape, ())
    kernel = kernel_fn(x1, x2)
    assert kernel.shape1 == y1.shape and kernel.diagonal_batch
    assert_close(full(kernel.nngp, kernel), covariances(y1, y2, kernel.batch_axis, kernel.channel_axis))
    if not is_lhs:
        assert (kernel.batch_axis, kernel.channel_axis) == PRODUCTS[name][3]


def test_product_in_a_network(finite_kernels, full, x64):
    x1, x2, other = inputs(1, (2, 2, 3, 2)), inputs(2, (1, 2, 3, 2)), inputs(3, (3, 2, 4))
    conv = Conv(1, (2, 2), None, "SAME", 1.3, 0.4)
    product = DotGeneral(rhs=other, dimension_numbers=(((1, 2), (1, 0)), NOTHING), batch_axis=0, channel_axis=3)
    nngp, ntk = finite_kernels(serial(conv, product), x1, x2, 0, 1)
    kernel = serial(conv, product)[2](x1, x2)  # (batch, channels, 4)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    rest = serial(Relu(), Conv(1, (2,), dimension_numbers=("NCH", "HIO", "NCH")), GlobalAvgPool(channel_axis=1))
    network = serial(conv, product, rest)[2]
    assert_close(network(x1, x2, "ntk"), rest[2](kernel).ntk)
    assert_close(jax.jit(network, static_argnames="get")(x1, x2, "ntk"), rest[2](kernel).ntk)
    own = network(x1, None, "ntk")
    assert_close(own, network(x1, jnp.array(x1), "ntk"))
    assert_close(batch(network, batch_size=1)(x1, None, "ntk"), own)


def test_contraction_of_samples_comes_last(covariances, x64):
    x1, x2, other = inputs(1, (3, 2, 4)), inputs(2, (3, 2, 4)), inputs(3, (5, 3))
    _, apply_fn, kernel_fn = DotGeneral(lhs=other, dimension_numbers=(((1,), (0,)), NOTHING))
    kernel = kernel_fn(x1, x2)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    # Covariances of all remaining axes, in pairs.
    assert_close(kernel.nngp, np.einsum("ipc,jqc->ijpq", y1, y2) / 4)


def test_masks_of_products(x64):
    x = np.array(inputs(1, (2, 3, 2)))
    x[0, :2], x[1] = np.inf, np.inf
    halves = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    layer = serial(Dense(2), DotGeneral(rhs=halves, dimension_numbers=(((1,), (1,)), NOTHING)))  # (batch, channels, 2)
    outputs = layer[1](layer[0](random.key(0), x.shape)[1], x, mask_constant=np.inf)
    assert outputs.mask[:, 0].tolist() == [[True, False], [True, True]]
    kernel = layer[2](x, None, mask_constant=np.inf)
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, (2, 2, 2)), outputs.mask)
    assert np.count_nonzero(kernel.nngp) == 1


def test_no_constant_is_the_identity(x64):
    x = inputs(1, (2, 3, 4))
    init_fn, apply_fn, kernel_fn = serial(DotGeneral(), Dense(2))
    expected = Dense(2)
    _, (_, params) = init_fn(random.key(0), x.shape)
    assert_close(apply_fn(((), params), x), expected[1](params, x))
    assert_close(kernel_fn(x).ntk, expected[2](x).ntk)
    masked = np.array(x)
    masked[0, 0] = np.nan
    assert_close(kernel_fn(masked, mask_constant=np.nan).ntk, expected[2](masked, mask_constant=np.nan).ntk)


def test_unknown_sizes():
    layer = DotGeneral(rhs=np.ones((4, 6)), dimension_numbers=(((1,), (0,)), NOTHING))
    assert layer[0](random.key(0), (-1, 4, -1))[0] == (-1, -1, 6)
    with pytest.raises(ValueError, match="unknown size"):
        layer[0](random.key(0), (2, -1, 3))
    assert ImageResize((-1, 4, -1), "linear")[0](random.key(0), (-1, -1, 3))[0] == (-1, 4, 3)


# ImageResize


@pytest.mark.parametrize("method", ["nearest", "linear", "bicubic", "lanczos3", ResizeMethod.LANCZOS5])
@pytest.mark.parametrize(("shape", "antialias"), [((-1, 5, 2, -1), True), ((-1, -1, 2, 2), False)])
def test_resized_kernels(method, shape, antialias, covariances, full, x64):
    x1, x2 = inputs(1, (3, 3, 4, 2)), inputs(2, (2, 3, 4, 2))
    init_fn, apply_fn, kernel_fn = ImageResize(shape, method, antialias)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    wanted = tuple(n if size == -1 else size for size, n in zip(shape, x1.shape, strict=True))
    assert_close(y1, jax.image.resize(x1, wanted, method, antialias))
    assert init_fn(random.key(0), x1.shape) == (wanted, ())
    kernel = kernel_fn(x1, x2)
    assert_close(full(kernel.nngp, kernel), covariances(y1, y2, 0, 3))
    assert kernel.shape1 == y1.shape and kernel.diagonal_batch and not kernel.diagonal_spatial


def test_resize_after_a_convolution(finite_kernels, full, x64):
    """Which leaves axes reversed; to an image that is no square."""
    x1, x2 = inputs(1, (2, 2, 3, 2)), inputs(2, (1, 2, 3, 2))
    conv, resize = Conv(1, (2, 2), None, "SAME", 1.3, 0.4), ImageResize((-1, 5, 2, -1), "linear")
    assert_kernels_are_those_of_finite_networks(serial(conv, resize), x1, x2, finite_kernels, full)
    rest = serial(Relu(), Conv(1, (2, 2)), GlobalAvgPool())
    network = serial(conv, resize, rest)[2]
    between = rest[2](serial(conv, resize)[2](x1))
    assert_close(network(x1).ntk, between.ntk)
    assert_close(network(x1, jnp.array(x1)).ntk, between.ntk)
    twice = serial(conv, resize, ImageResize((-1, 3, 3, -1), "linear"))[2](x1)
    assert twice.diagonal_batch


@pytest.mark.parametrize("layer", [ImageResize((-1, 5, 2, -1), "nearest"), DotGeneral(rhs=0.7)])
def test_networks_with_copies_and_multiples_are_one_program(layer, finite_kernels, full, x64):
    x1, x2 = inputs(1, (2, 2, 3, 2)), inputs(2, (1, 2, 3, 2))
    conv = Conv(1, (2, 2), None, "SAME", 1.3, 0.4)
    assert_kernels_are_those_of_finite_networks(serial(conv, layer), x1, x2, finite_kernels, full)
    network, rest = serial(conv, layer, Relu(), Flatten())[2], serial(Relu(), Flatten())[2]
    assert "program 2" not in explain(network, x1.shape)
    assert_close(network(x1, x2).ntk, rest(serial(conv, layer)[2](x1, x2)).ntk)


@pytest.mark.parametrize("number", [-0.7, 0.0, np.float32(0.3)])
def test_numbers(number, x64):
    x = inputs(1, (2, 3, 2))
    kernel, expected = DotGeneral(lhs=number)[2](x), Identity()[2](x)
    np.testing.assert_allclose(kernel.nngp, float(number) ** 2 * expected.nngp, rtol=1e-14)


@pytest.mark.parametrize("number", [1e200, 1j])
def test_numbers_without_a_real_square_have_finite_networks(number, x64):
    np.testing.assert_array_equal(DotGeneral(rhs=number)[1]((), np.ones((2, 3))), np.full((2, 3), number))


def test_copies_of_all_positions_are_no_step():
    resize = ImageResize((-1, 3, -1, -1), "nearest")
    assert "Gather" not in explain(serial(Conv(1, (2, 2)), resize, Relu(), Flatten())[2], (2, 4, 3, 2))


def test_samples_are_resized_in_the_last_layer(covariances, full, x64):
    x1, x2 = inputs(1, (3, 2, 4)), inputs(2, (2, 2, 4))
    _, apply_fn, kernel_fn = ImageResize((5, 3, -1), "linear")
    kernel = kernel_fn(x1, x2)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    assert_close(full(kernel.nngp, kernel), covariances(y1, y2, 0, 2))
    assert not kernel.diagonal_batch
    assert_close(full(kernel.cov1, kernel), covariances(y1, y1, 0, 2))
    assert_close(full(kernel.cov2, kernel), covariances(y2, y2, 0, 2))
    only_samples = ImageResize((5, -1, -1), "linear")[2](x1, None, "nngp", diagonal_spatial=True)
    assert only_samples.shape == (5, 5, 2)


@pytest.mark.parametrize("method", ["nearest", "linear", "lanczos3"])
def test_masks_of_resized_images(method, finite_kernels, full, x64):
    x1, x2 = np.array(inputs(1, (2, 4, 2))), np.array(inputs(2, (1, 4, 2)))
    x1[0, 1:], x1[1], x2[:, :2] = np.inf, np.inf, np.inf
    layer = serial(Dense(1, b_std=1.0), ImageResize((-1, 8, -1), method))
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1, mask_constant=np.inf)
    kernel = layer[2](x1, x2, mask_constant=np.inf)
    assert_close(full(kernel.nngp, kernel), nngp)
    assert_close(full(kernel.ntk, kernel), ntk)
    outputs = layer[1](layer[0](random.key(0), x1.shape)[1], x1, mask_constant=np.inf)
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, outputs.shape), outputs.mask)
    weights = np.asarray(jax.image.resize(jnp.eye(4), (8, 4), method))
    assert outputs.mask[0, :, 0].tolist() == (np.abs(weights[:, 0]) < 1e-6).tolist()
    assert outputs.mask[1].all()


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: DotGeneral(lhs=2.0, rhs=3.0), ValueError, "`lhs` or `rhs`, not both"),
        (lambda x: DotGeneral(rhs=0.7, dimension_numbers=(((2,), (0,)), NOTHING))[2](x), ValueError, "channel"),
        (lambda x: DotGeneral(rhs=0.7, dimension_numbers=(((1,), (0,)), NOTHING))[2](x), TypeError, "nonnegative"),
        (lambda x: DotGeneral(rhs=np.ones(4), dimension_numbers=(((2,), (0,)), NOTHING))[2](x), ValueError, "channel"),
        (lambda x: ImageResize((-1, 3, -1), "cubist"), ValueError, "'cubist' is unknown, use 'nearest'"),
        (lambda x: ImageResize((-1, 3), "linear")[1]((), x), ValueError, "rank 2"),
        (lambda x: ImageResize((-1, 3, 5), "linear")[2](x), ValueError, "channel axis"),
        (lambda x: ImageResize((-1, 3, 5), "nearest")[2](x), ValueError, "channel axis"),
        (lambda x: ImageResize((-1, 2, -1), "linear")[2](x, diagonal_spatial=True), ValueError, "diagonal_spatial"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(jnp.ones((2, 3, 4)))
