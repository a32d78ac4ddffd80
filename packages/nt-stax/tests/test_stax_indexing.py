"""Index: the kernels of parts of activations are parts of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_core import explain
from nt_stax import Conv, Dense, Flatten, GlobalAvgPool, ImageResize, Index, Relu, Slice, serial
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

INDICES = [
    Slice[:, 1:, ::2],
    Slice[..., -1, :],
    Slice[:, 0],
    Slice[:, 2, 1],
    Slice[1:],
    Slice[..., ::-1, :],
    Slice[:, 5:],
    ...,
    Slice[::2, np.int64(1), -2:],
]


def inputs(seed, shape):
    return normal(seed, shape, "float64")


@pytest.mark.parametrize("idx", INDICES)
def test_parts_of_kernels(idx, covariances, full, x64):
    x1, x2 = inputs(1, (3, 3, 4, 2)), inputs(2, (2, 3, 4, 2))
    init_fn, apply_fn, kernel_fn = Index(idx)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    np.testing.assert_array_equal(y1, x1[idx])
    assert init_fn(random.key(0), x1.shape) == (y1.shape, ())
    kernel = kernel_fn(x1, x2)
    assert (kernel.shape1, kernel.shape2) == (y1.shape, y2.shape)
    assert kernel.ntk.ndim == 0 and not kernel.is_gaussian
    np.testing.assert_allclose(full(kernel.nngp, kernel), covariances(y1, y2, 0, y1.ndim - 1), atol=1e-14)


@pytest.mark.parametrize("idx", [Slice[:, 1:, ::2], Slice[1:, 0]])
def test_in_networks(idx, finite_kernels, full, x64):
    """After layers that reverse axes, and before layers of either kind."""
    x1, x2 = inputs(1, (3, 3, 4, 2)), inputs(2, (2, 3, 4, 2))
    conv = Conv(1, (2, 2), None, "SAME", 1.3, 0.4)
    layer = serial(conv, Index(idx))
    nngp, ntk = finite_kernels(layer, x1, x2, 0, -1)
    kernel = layer[2](x1, x2)
    assert kernel.is_reversed and kernel.is_gaussian
    np.testing.assert_allclose(full(kernel.nngp, kernel), nngp, atol=1e-13)
    np.testing.assert_allclose(full(kernel.ntk, kernel), ntk, atol=1e-13)
    network = serial(layer, Relu(), Dense(1), GlobalAvgPool())[2]
    indexed = serial(Relu(), Dense(1), GlobalAvgPool())[2](kernel)
    np.testing.assert_allclose(network(x1, x2).ntk, indexed.ntk, rtol=1e-12)
    equal = serial(layer, Relu(), Flatten())[2]
    np.testing.assert_allclose(
        equal(x1, x2).ntk, equal(x1, x2, None, diagonal_spatial=False, diagonal_batch=False).ntk, rtol=1e-12
    )


@pytest.mark.parametrize("idx", [Slice[:, 1:, ::-2], Slice[:, -1, 2], Slice[...]])
def test_networks_with_parts_of_images_are_one_program(idx, full, x64):
    x1, x2 = inputs(1, (2, 3, 4, 2)), inputs(2, (1, 3, 4, 2))
    first = serial(Conv(1, (2, 2), None, "SAME", 1.3, 0.4), Relu(), Dense(1, b_std=0.3))
    rest = serial(Relu(), GlobalAvgPool() if first[2](x1)[idx].spec.space else Dense(1))
    network = serial(first, Index(idx), rest)[2]
    assert "program 2" not in explain(network, x1.shape)
    for layout in ({}, {"diagonal_spatial": False}):
        expected = rest[2](first[2](x1, x2)[idx])
        kernel = network(x1, x2, **layout)
        for name in ("nngp", "ntk", "cov1", "cov2"):
            np.testing.assert_allclose(getattr(kernel, name), getattr(expected, name), rtol=1e-12, err_msg=name)


def test_parts_of_more_images_than_lanes():
    """In the native engine, by name: every copy is a step."""
    x = normal(1, (19, 3, 4, 2), "float32")
    conv = Conv(1, (2, 2), None, "SAME", 1.3, 0.4)
    copies = ImageResize((-1, 5, 3, -1), "nearest"), Index(Slice[:, 1:, ::-1]), Index(Slice[:, -1, 1])
    network = serial(*(layer for copy in copies for layer in (conv, Relu(), copy)), Dense(1, b_std=0.3), Relu())[2]
    kernel, expected = (network(x, None, ("nngp", "ntk"), implementation=name) for name in ("cpu", "xla"))
    np.testing.assert_allclose(kernel.nngp, expected.nngp, rtol=0, atol=2e-6 * np.abs(expected.nngp).max())
    np.testing.assert_allclose(kernel.ntk, expected.ntk, rtol=0, atol=2e-6 * np.abs(expected.ntk).max())


def test_axes_may_come_in_any_order(covariances, full, x64):
    x1, x2 = inputs(1, (4, 2, 3, 3)), inputs(2, (4, 2, 2, 3))
    init_fn, apply_fn, kernel_fn = Index(Slice[1, :, ::2, 1:], batch_axis=2, channel_axis=1)
    with pytest.warns(UserWarning, match="batch_axis"):
        kernel = kernel_fn(x1, x2)
    y1, y2 = apply_fn((), x1), apply_fn((), x2)
    assert kernel.shape1 == y1.shape == init_fn(random.key(0), x1.shape)[0] == (2, 2, 2)
    assert (kernel.batch_axis, kernel.channel_axis) == (1, 0)
    np.testing.assert_allclose(full(kernel.nngp, kernel), covariances(y1, y2, 1, 0), atol=1e-14)


def test_masks(x64):
    x = np.array(inputs(1, (2, 3, 4, 2)))
    x[0, 1:], x[1, :, 2:] = np.inf, np.inf
    init_fn, apply_fn, kernel_fn = serial(Conv(1, (1, 1), b_std=1.0), Index(Slice[:, 1, 1:]))
    outputs = apply_fn(init_fn(random.key(0), x.shape)[1], x, mask_constant=np.inf)
    kernel = kernel_fn(x, None, mask_constant=np.inf)
    assert outputs.mask[..., 0].tolist() == [[True, True, True], [False, True, True]]
    np.testing.assert_array_equal(kernel.mask1, outputs.mask)
    assert np.count_nonzero(kernel.nngp) == 1
    alone = jax.jit(lambda x: Index(Slice[:, 1, 1:])[2](x, None, mask_constant=np.inf))(x)
    np.testing.assert_array_equal(alone.mask1[..., :1], outputs.mask)


def test_unknown_sizes():
    init_fn, _, _ = Index(Slice[:, 1:])
    assert init_fn(random.key(0), (-1, 4, -1)) == ((-1, 3, -1), ())
    assert Index(Slice[..., 0, :])[0](random.key(0), (-1, -1, 4, 3))[0] == (-1, -1, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: Index(Slice[0])[2](x), NotImplementedError, "would remove batch axis 0"),
        (lambda x: Index(Slice[..., :1])[2](x), NotImplementedError, "channel axis"),
        (lambda x: Index(Slice[..., 0])[2](x), NotImplementedError, "channel axis"),
        (lambda x: Index(Slice[:, np.array([0, 1])])[1]((), x), NotImplementedError, "integers, slices"),
        (lambda x: Index(Slice[:, 7])[1]((), x), IndexError, "out of bounds"),
        (lambda x: Index(Slice[:, 1:])[0](random.key(0), (2, -1, 3)), ValueError, "unknown size"),
        (lambda x: Index(Slice[:, 0])[0](random.key(0), (2, -1, 3)), ValueError, "unknown size"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(jnp.ones((2, 3, 4)))
