"""FanOut and the layers that join branches, in finite networks and in kernels."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_stax import (
    Conv,
    Dense,
    FanInConcat,
    FanInSum,
    FanOut,
    Flatten,
    GlobalAvgPool,
    Identity,
    LayerNorm,
    Relu,
    Scale,
    parallel,
    serial,
)
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

FIELDS = ("nngp", "ntk", "cov1", "cov2")


def inputs(seed, shape, dtype="float64"):
    return normal(seed, shape, dtype)


def assert_kernels_close(actual, expected, rtol=1e-12):
    """Compares covariances, whatever the order in which their axes are stored."""
    if not expected.diagonal_spatial and actual.is_reversed != expected.is_reversed:
        actual = actual.reverse()
    for name in FIELDS:
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12, err_msg=name)


def branches_of(*layers):
    """Kernels of branches, computed apart."""
    return [layer[2] for layer in layers]


def test_fan_out(x64):
    init_fn, apply_fn, kernel_fn = FanOut(3)
    assert init_fn(random.key(0), (-1, 3)) == ([(-1, 3)] * 3, ())
    x = inputs(1, (2, 3))
    assert [y is x for y in apply_fn((), x)] == [True] * 3
    kernels = kernel_fn(x, None, "nngp")
    assert isinstance(kernels, list) and len(kernels) == 3
    for nngp in kernels:
        np.testing.assert_allclose(nngp, x @ x.T / 3, rtol=1e-14)
    with pytest.raises(ValueError, match="at least one branch"):
        FanOut(0)


# FanInSum


@pytest.mark.parametrize("n_convs", [1, 2, 3])
@pytest.mark.parametrize("diagonal", [False, True])
def test_sum_adds_kernels(n_convs, diagonal, x64):
    """Of `n_convs` branches with one convolution among four, most are stored reversed, or not, or there is a tie."""
    x1, x2 = inputs(1, (2, 3, 4, 2)), inputs(2, (3, 3, 4, 2))
    conv = [Conv(8, (2, 3), padding="SAME", W_std=1.0 + i, b_std=0.1) for i in range(n_convs)]
    dense = [serial(Dense(8, 1.5), Relu(), Dense(8, 1.0, 0.3 * i)) for i in range(4 - n_convs)]
    kernel = serial(FanOut(4), parallel(*conv, *dense), FanInSum())[2](x1, x2, diagonal_spatial=diagonal)
    parts = [fn(x1, x2, diagonal_spatial=diagonal) for fn in branches_of(*conv, *dense)]
    if not diagonal:
        assert kernel.is_reversed == (n_convs == 3)
        parts = [part.reverse() if part.is_reversed else part for part in parts]
        expected = parts[0].replace(**{name: sum(getattr(part, name) for part in parts) for name in FIELDS})
    else:
        expected = parts[0].replace(**{name: sum(getattr(part, name) for part in parts) for name in FIELDS})
    assert_kernels_close(kernel, expected)
    assert kernel.is_gaussian


def test_sum_of_one_branch_need_not_be_gaussian(x64):
    x = inputs(1, (2, 3))
    relu = serial(Dense(4), Relu())
    kernel = serial(relu, FanOut(1), FanInSum())[2](x)
    np.testing.assert_allclose(kernel.nngp, relu[2](x, None, "nngp"), rtol=1e-13)
    assert not kernel.is_gaussian


def test_residual_network_by_hand(x64):
    """`x + Dense(Relu(x))` after `Dense`: `K' = K + (arc-cosine kernel of K)`."""
    x = inputs(1, (4, 3))
    network = serial(Dense(8, 1.5, 0.5), FanOut(2), parallel(serial(Relu(), Dense(8, 1.2)), Identity()), FanInSum())
    k = 1.5**2 * x @ x.T / 3 + 0.5**2
    s = np.sqrt(np.diag(k)[:, None] * np.diag(k)[None])
    theta = np.arccos(np.clip(k / s, -1, 1))
    relu, step = (s * np.sin(theta) + (np.pi - theta) * k) / (2 * np.pi), (np.pi - theta) / (2 * np.pi)
    kernel = network[2](x, None)
    np.testing.assert_allclose(kernel.nngp, k + 1.2**2 * relu, atol=1e-7)
    np.testing.assert_allclose(kernel.ntk, k + 1.2**2 * (relu + k * step), atol=1e-7)


def test_sum_in_the_finite_network():
    init_fn, apply_fn, _ = FanInSum()
    a, b, c = (inputs(i, (2, 3), "float32") for i in range(3))
    assert init_fn(random.key(0), [(-1, 3)] * 3) == ((-1, 3), ())
    np.testing.assert_allclose(apply_fn((), (a, b, c)), a + b + c, rtol=1e-6)


def test_weighted_sum(x64):
    """Of layers that are scaled, or that have scaled parameters."""
    x1, x2 = inputs(1, (2, 3)), inputs(2, (3, 3))
    relu = serial(Relu(), Dense(8, 1.2))
    weighted = serial(FanOut(2), parallel(Dense(8, 1.5, 0.5), relu), FanInSum(weights=(0.5, -2.0)))
    scaled = serial(FanOut(2), parallel(Dense(8, 0.75, 0.25), serial(relu, Scale(2.0))), FanInSum())
    assert_kernels_close(serial(Dense(4), weighted)[2](x1, x2), serial(Dense(4), scaled)[2](x1, x2))
    _, apply_fn, _ = FanInSum(weights=(0.5, -2.0))
    np.testing.assert_allclose(apply_fn((), [x1, x1]), -1.5 * x1)
    np.testing.assert_allclose(Scale(-3.0)[1]((), x1), -3 * x1)
    three = serial(FanOut(3), parallel(Dense(4), Dense(4), Dense(4)), FanInSum(weights=(1.0, 2.0)))
    for call in (lambda: apply_fn((), [x1] * 3), lambda: three[2](x1)):
        with pytest.raises(ValueError, match=r"a weight for each of the 3 branches, got weights=\("):
            call()


def test_sum_with_masks(x64):
    """Masked is what is masked in all branches. Here the second input has masks of its own."""
    x = [np.array(inputs(i, (3, 4, 2))) for i in (1, 2)]
    x[0][:, 1:3], x[1][1, 2:] = np.nan, np.nan
    network = serial(parallel(Dense(8, 1.5, 0.5), Dense(8, 1.2)), FanInSum())
    kernel = network[2](x, None, mask_constant=np.nan)
    layers = (Dense(8, 1.5, 0.5), Dense(8, 1.2))
    parts = [layer[2](a, None, mask_constant=np.nan) for layer, a in zip(layers, x, strict=True)]
    np.testing.assert_allclose(kernel.nngp, parts[0].nngp + parts[1].nngp, rtol=1e-12)
    mask = np.zeros((3, 4, 1), bool)
    mask[1, 2] = True
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, mask.shape), mask)
    params = network[0](random.key(0), [a.shape for a in x])[1]
    outputs = network[1](params, x, mask_constant=np.nan)
    np.testing.assert_array_equal(outputs.mask[..., :1], mask)


def residual():
    return serial(FanOut(2), parallel(Dense(4), Identity()), FanInSum())


@pytest.mark.parametrize("branches", [(Identity(), Identity()), (Dense(4), residual(), residual())])
def test_sum_warns_of_branches_that_share_weights(branches):
    with pytest.warns(UserWarning, match="weights of the same layer"):
        serial(Dense(4), FanOut(len(branches)), parallel(*branches), FanInSum())[2](jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "branches",
    [
        (Identity(), Dense(4)),
        (serial(Relu(), Dense(4)), serial(Relu(), Dense(4)), Identity()),
        (serial(Dense(4), LayerNorm()), serial(Dense(4), LayerNorm())),
    ],
)
def test_sum_does_not_warn_of_independent_branches(branches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serial(Dense(4), FanOut(len(branches)), parallel(*branches), FanInSum())[2](jnp.ones((2, 4)))


# FanInConcat


def test_concatenated_channels_average(x64):
    x1, x2 = inputs(1, (2, 3, 4, 2)), inputs(2, (3, 3, 4, 2))
    layers = [Conv(4, (2, 3), padding="SAME"), serial(Dense(12, 1.5), Relu()), Dense(8, 1.2, 0.3)]
    kernel = serial(FanOut(3), parallel(*layers), FanInConcat())[2](x1, x2)
    parts = [fn(x1, x2) for fn in branches_of(*layers)]
    parts = [part.reverse() if part.is_reversed else part for part in parts]
    weights = np.array([4, 12, 8]) / 24
    expected = {name: sum(w * getattr(part, name) for w, part in zip(weights, parts, strict=True)) for name in FIELDS}
    assert_kernels_close(kernel, parts[0].replace(**expected))
    assert kernel.shape1 == (2, 3, 4, 24) and not kernel.is_gaussian


@pytest.mark.parametrize("channel_axis", [1, 2])
def test_the_channel_axis_may_be_anywhere(channel_axis, x64):
    x = inputs(1, (2, 3, 3))
    layers = [Dense(n, std, channel_axis=channel_axis) for n, std in ((2, 1.0), (6, 2.0))]
    for axis in (channel_axis, channel_axis - 3):
        kernel = serial(FanOut(2), parallel(*layers), FanInConcat(axis))[2](x)
        k = layers[0][2](x, None, "nngp")
        np.testing.assert_allclose(kernel.nngp, (2 * k + 6 * 4 * k) / 8, rtol=1e-12)


@pytest.mark.sample(5)
@pytest.mark.parametrize("n_convs", [1, 2, 3])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("axis", [1, -2])
def test_concatenated_positions_of_branches_are_independent(n_convs, diagonal, axis, full, x64):
    x1, x2 = inputs(1, (2, 3, 4, 2)), inputs(2, (3, 3, 4, 2))
    conv = [Conv(8, (2, 3), padding="SAME", W_std=1.0 + i, b_std=0.1) for i in range(n_convs)]
    layers = [*conv, *[Dense(8, 1.5, 0.3 * i) for i in range(3 - n_convs)]]
    network = serial(FanOut(3), parallel(*layers), FanInConcat(axis))
    kernel = network[2](x1, x2, diagonal_spatial=diagonal)
    parts = [fn(x1, x2, diagonal_spatial=diagonal) for fn in branches_of(*layers)]
    assert kernel.shape1 == ((2, 9, 4, 8) if axis == 1 else (2, 3, 12, 8))
    for name in ("nngp", "ntk"):
        actual = np.asarray(getattr(kernel, name)) if diagonal else full(getattr(kernel, name), kernel)
        blocks = [getattr(p, name) if diagonal else full(getattr(p, name), p) for p in parts]
        expected = np.zeros(actual.shape)
        size = 3 if axis == 1 else 4
        for i, block in enumerate(blocks):
            at = slice(i * size, (i + 1) * size)
            if diagonal:
                expected[(slice(None),) * (2 if axis == 1 else 3) + (at,)] = block
            else:
                expected[(slice(None),) * (2 if axis == 1 else 4) + (at, at)] = block
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)
    assert kernel.is_gaussian
    # As a whole it is a kernel like any other: a nonlinearity and a readout follow.
    after = serial(network, Relu(), Flatten(), Dense(1))[2](x1, x2, "nngp")
    np.testing.assert_allclose(after, np.mean([serial(p, Relu(), Flatten())[2](x1, x2, "nngp") for p in layers], 0))


def test_concatenated_batches(x64):
    x = inputs(1, (2, 3))
    layers = [Dense(8, 1.5, 0.5), Dense(8, 1.2)]
    with pytest.warns(UserWarning, match="batch axis"):
        kernel = serial(FanOut(2), parallel(*layers), FanInConcat(0))[2](x)
    parts = [fn(x) for fn in branches_of(*layers)]
    zeros = np.zeros((2, 2))
    np.testing.assert_allclose(kernel.nngp, np.block([[parts[0].nngp, zeros], [zeros, parts[1].nngp]]), rtol=1e-13)
    np.testing.assert_allclose(kernel.cov1, np.concatenate([part.cov1 for part in parts]), rtol=1e-13)
    assert kernel.shape1 == (4, 8)


def test_concatenation_inside_of_branches(x64):
    """A concatenation that is no step, inside of a branch."""
    x = inputs(1, (2, 3, 4, 2))
    apart = serial(FanOut(2), parallel(Conv(8, (1, 1)), Dense(8)), FanInConcat(1), Conv(8, (6, 1), padding="CIRCULAR"))
    together = serial(apart, Relu(), GlobalAvgPool(), Dense(8))
    expected = together[2](x, None, "ntk")
    doubled = serial(FanOut(2), parallel(together, together), FanInSum())[2](x, None, "ntk")
    np.testing.assert_allclose(doubled, 2 * expected, rtol=1e-12)


def test_concatenation_in_the_finite_network():
    init_fn, apply_fn, _ = FanInConcat(1)
    a, b = inputs(1, (2, 3, 4), "float32"), inputs(2, (2, 5, 4), "float32")
    assert init_fn(random.key(0), [(-1, 3, 4), (-1, 5, 4)])[0] == (-1, 8, 4)
    assert init_fn(random.key(0), ((-1, 3, 4), (-1, -1, 4)))[0] == (-1, -1, 4)
    np.testing.assert_array_equal(apply_fn((), [a, b]), np.concatenate([a, b], 1))


@pytest.mark.parametrize("axis", [1, 2])
def test_concatenation_with_masks(axis, x64):
    x = np.array(inputs(1, (3, 4, 2)))
    x[0, 1:], x[2, :2] = np.nan, np.nan
    layers = [Dense(1, 1.5, 0.5), Dense(3 if axis == 2 else 1, 1.2)]
    network = serial(FanOut(2), parallel(*layers), FanInConcat(axis))
    kernel = network[2](x, None, mask_constant=np.nan)
    outputs = network[1](network[0](random.key(0), x.shape)[1], x, mask_constant=np.nan)
    np.testing.assert_array_equal(np.broadcast_to(kernel.mask1, outputs.shape), outputs.mask)
    parts = [fn(x, None, mask_constant=np.nan) for fn in branches_of(*layers)]
    if axis == 2:
        np.testing.assert_allclose(kernel.nngp, (parts[0].nngp + 3 * parts[1].nngp) / 4, rtol=1e-12)
    else:
        np.testing.assert_allclose(kernel.nngp[..., :4, :4], parts[0].nngp, rtol=1e-12)
        assert np.all(kernel.nngp[..., 4:, :4] == 0)


def test_concatenation_of_masked_and_unmasked_inputs():
    x = [np.ones((2, 3, 1)), np.ones((2, 3, 1))]
    x[1][0] = np.nan
    outputs = FanInConcat(1)[1]((), x, mask_constant=np.nan)
    np.testing.assert_array_equal(outputs.mask[..., 0], [[0, 0, 0, 1, 1, 1], [0] * 6])


# Errors


def kernel_of(*branches, join):
    return serial(FanOut(len(branches)), parallel(*branches), join)[2](jnp.ones((2, 3, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kernel_of(Dense(3), Dense(4), join=FanInSum()), ValueError, "equal shapes"),
        (lambda: kernel_of(Dense(3), Identity(), join=FanInSum()), NotImplementedError, r"branches \[1\] are not"),
        (lambda: kernel_of(Dense(3), Identity(), join=FanInConcat(1)), NotImplementedError, r"branches \[1\] are not"),
        (
            lambda: kernel_of(Dense(3), serial(Flatten(), Dense(3)), join=FanInSum()),
            NotImplementedError,
            "same channel",
        ),
        (lambda: kernel_of(Dense(3), Dense(4), join=FanInConcat(1)), ValueError, "differ in that axis only"),
        (lambda: kernel_of(Dense(3), Dense(4), join=FanInConcat(3)), ValueError, "no axis 3"),
        (lambda: FanInSum()[1]((), [jnp.ones((2, 3)), jnp.ones((2, 1))]), ValueError, "equal shapes"),
        (lambda: FanInSum()[0](random.key(0), [(2, 3), (2, 4)]), ValueError, "equal shapes"),
        (lambda: FanInSum()[0](random.key(0), (2, 3)), ValueError, "list or tuple of branches"),
        (lambda: FanInSum()[1]((), jnp.ones((2, 3))), ValueError, "list or tuple of branches"),
        (lambda: FanInSum()[2](jnp.ones((2, 3))), ValueError, "list or tuple of branches"),
        (lambda: FanInConcat()[1]((), [jnp.ones((2, 3)), jnp.ones((1, 3))]), ValueError, "differ in that axis only"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_branches_of_different_layouts(x64):
    x = inputs(1, (2, 3, 2))
    kernels = [Dense(4)[2](x, diagonal_spatial=diagonal) for diagonal in (True, False)]
    for join in (FanInSum(), FanInConcat(), FanInConcat(1)):
        with pytest.raises(NotImplementedError, match="same diagonal_spatial"):
            join[2](kernels)
