"""Faults that were found in the archived neural-tangents 0.6.5, by their numbers; here the results are right.

Judges are closed forms, and finite networks of one layer with weights: such a network is linear in its parameters, and
its empirical tangent kernel is the covariance of its outputs at any width. What is said of a layer after a convolution
is judged by a convolution that changes no kernel, `Conv(1, (1, 1))` with `W_std=1`: it leaves spatial axes reversed.
"""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from jax.image import ResizeMethod
from neural_tangents import stax

pytestmark = pytest.mark.usefixtures("x64")


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def unchanged(n_space):
    return stax.Conv(1, (1,) * n_space)


def full(kernel):
    return (kernel.reverse() if kernel.is_reversed else kernel).nngp


def covariance(layer, x1, x2, **kwargs):
    """Of the outputs of a layer with weights, at any width."""
    _, params = layer[0](jax.random.key(0), x1.shape)
    return nt.empirical_ntk_fn(layer[1], trace_axes=(-1,))(x1, x2, params, **kwargs)


def assert_close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def masked_images():
    x = inputs(3, 3, 2, 4)
    return x.at[0, 2].set(jnp.nan).at[1, :, 1].set(jnp.nan)


def test_fault_1_sign_of_covariances_that_are_not_variances():
    x = inputs(3, 2, 2, 4)
    kernel = stax.Sign()[2](stax.Conv(1, (2, 2), padding="SAME")[2](x, diagonal_batch=False, diagonal_spatial=False))
    before = stax.Conv(1, (2, 2), padding="SAME")[2](x, diagonal_batch=False, diagonal_spatial=False).cov1
    variance = np.einsum("nnhhww->nhw", before)
    scale = np.sqrt(variance[:, None, :, None, :, None] * variance[None, :, None, :, None, :])
    assert_close(kernel.cov1, 2 / np.pi * np.arcsin(np.clip(before / scale, -1, 1)), 1e-7)


@pytest.mark.parametrize("degree, moment", [(0, 1), (1, 1), (2, 3), (3, 15)])
def test_fault_2_rectified_monomials_of_equal_inputs(degree, moment):
    x = inputs(3, 5)
    variance = jnp.mean(x**2, 1)
    kernel = stax.serial(stax.Dense(1), stax.RectifiedMonomial(degree))[2](x)
    assert np.isfinite(kernel.ntk).all()
    assert_close(np.diag(kernel.nngp), moment / 2 * variance**degree)


@pytest.mark.parametrize(
    "layer, at_zero",
    [
        (stax.Polynomial([0.5, 2.0, 1.0]), 0.25),
        (stax.ElementwiseNumerical(jnp.cos, 20, lambda x: -jnp.sin(x)), 1.0),
        (stax.RectifiedMonomial(2), 0.0),
    ],
)
def test_fault_2_zero_inputs(layer, at_zero):
    kernel = stax.serial(stax.Dense(1), layer, stax.Dense(1))[2](jnp.zeros((2, 5)))
    assert np.isfinite(kernel.ntk).all()
    assert_close(kernel.nngp, np.full((2, 2), at_zero))


@pytest.mark.parametrize("layer", [stax.Monomial(0), stax.Polynomial([0.5, 1.0]), stax.RectifiedMonomial(0)])
def test_fault_3_masks_before_functions_that_are_not_0_at_0(layer):
    x = masked_images()
    network = stax.serial(stax.Conv(8, (1, 1)), layer)
    kernel = network[2](x, mask_constant=jnp.nan)
    _, params = network[0](jax.random.key(0), x.shape)
    outputs = stax.unmask_fn(network[1])(params, x, mask_constant=jnp.nan)
    variances = np.einsum("nnhhww->nhw", full(kernel))
    np.testing.assert_array_equal(variances[np.isnan(x[..., 0])], 0)
    np.testing.assert_array_equal(outputs[np.isnan(x[..., 0])], 0)


@pytest.mark.parametrize("method", ["linear", ResizeMethod.NEAREST])
def test_fault_4_resizing_to_an_image_that_is_no_square(method):
    x1, x2 = inputs(2, 3, 4, 2), inputs(1, 3, 4, 2, seed=1)
    resize = stax.ImageResize((-1, 5, 2, -1), method)
    expected = covariance(stax.serial(stax.Conv(1, (2, 2)), resize), x1, x2)
    assert_close(full(stax.serial(stax.Conv(1, (2, 2)), resize)[2](x1, x2)), expected)
    assert_close(full(stax.serial(stax.Conv(1, (2, 2)), unchanged(2), resize)[2](x1, x2)), expected)


def test_fault_5_local_convolution_after_a_convolution():
    x1, x2 = inputs(2, 4, 5, 3), inputs(1, 4, 5, 3, seed=1)
    local = stax.ConvLocal(1, (3, 1), (1, 3), "VALID", 1.3, 0.4)
    expected = covariance(stax.ConvLocal(1, (3, 1), (1, 3), "VALID", 1.0, None), x1, x2) * 1.3**2
    biases = np.broadcast_to(0.16 * np.einsum("hH,wW->hHwW", np.eye(2), np.eye(2)), expected.shape)
    assert_close(full(local[2](x1, x2, diagonal_spatial=False)), expected + biases)
    assert_close(full(stax.serial(unchanged(2), local)[2](x1, x2, diagonal_spatial=False)), expected + biases)


def test_fault_5_local_convolution_scales_its_width():
    x = inputs(3, 1, 1, 4)
    kwargs = {"parameterization": "standard", "s": (1, 3)}
    after = stax.serial(stax.Relu(), stax.Flatten(), stax.Dense(1, parameterization="standard", s=(3, 1)))
    local = stax.serial(stax.ConvLocal(8, (1, 1), W_std=1.2, b_std=0.3, **kwargs), after)
    dense = stax.serial(stax.Dense(8, W_std=1.2, b_std=0.3, **kwargs), after)
    assert_close(local[2](x, None, "ntk"), dense[2](x, None, "ntk"))


@pytest.mark.filterwarnings("ignore:Aggregate with implementation='SPARSE'")
def test_fault_6_sparse_graphs_after_a_convolution():
    x = inputs(2, 3, 2, 4)
    edges = np.array([[[[0, 1], [0, 1]], [[1, 2], [0, 0]], [[2, 2], [1, 0]]]] * 2)  # (batch, edges, axes, from and to)
    weights = np.zeros((2, 3, 2, 3, 2))
    for (h1, h2), (w1, w2) in edges[0]:
        weights[:, h1, w1, h2, w2] += 1
    conv = stax.Conv(1, (2, 2), padding="SAME")
    dense, sparse = (stax.serial(conv, stax.Aggregate((1, 2), implementation=i)) for i in ("DENSE", "SPARSE"))
    expected = covariance(dense, x, x, pattern=weights)
    assert_close(full(dense[2](x, x, pattern=(weights, weights))), expected)
    assert_close(full(sparse[2](x, x, pattern=(edges, edges))), expected)


def test_fault_6_no_graph_is_the_identity():
    x = inputs(2, 3, 4)
    network, without = stax.serial(stax.Dense(2), stax.Aggregate(1)), stax.Dense(2)
    assert_close(network[2](x).nngp, without[2](x).nngp)


def test_fault_7_convolution_that_permutes_three_axes():
    x1, x2 = inputs(2, 2, 3, 4, 2), inputs(1, 2, 3, 4, 2, seed=1)
    conv = stax.Conv(1, (1, 2, 2), padding="VALID", dimension_numbers=("NHWDC", "HWDIO", "NDHWC"))
    assert_close(full(conv[2](x1, x2)), covariance(conv, x1, x2))


def test_fault_8_averages_of_what_is_not_masked():
    x = masked_images()
    network = stax.serial(stax.Conv(1, (1, 1)), stax.GlobalAvgPool())
    before = stax.Conv(1, (1, 1))[2](x, mask_constant=jnp.nan, diagonal_spatial=True)
    counts = np.sum(~np.isnan(x[..., 0]), (1, 2))
    expected = np.sum(before.nngp, (2, 3)) / np.outer(counts, counts)
    assert_close(stax.GlobalAvgPool()[2](before).nngp, expected)
    expected = covariance((network[0], stax.unmask_fn(network[1])), x, x, mask_constant=jnp.nan)
    assert_close(network[2](x, mask_constant=jnp.nan).nngp, expected)


@pytest.mark.filterwarnings("ignore:The inputs have batch_axis=1")
@pytest.mark.parametrize("batch_axis", [1, -3])
def test_fault_8_other_batch_axes(batch_axis):
    x = masked_images()[..., 0, :]  # (batch, positions, channels)
    kwargs = {"mask_constant": jnp.nan}

    def network(batch_axis):
        axes = {"batch_axis": batch_axis, "channel_axis": -1}
        pool = stax.GlobalAvgPool(**axes)
        return stax.serial(stax.Dense(1, **axes), stax.LayerNorm((1 - batch_axis % 3, -1), **axes), stax.Relu(), pool)

    expected = network(0)[2](x, None, "nngp", **kwargs)
    moved = x if batch_axis == -3 else x.swapaxes(0, 1)
    assert_close(network(batch_axis)[2](moved, None, "nngp", **kwargs), expected)


def test_fault_8_masks_after_flatten():
    x = masked_images()
    kernel = stax.Flatten(batch_axis=0, batch_axis_out=1)[2](stax.Conv(2, (1, 1))[2](x, mask_constant=jnp.nan))
    layer = stax.serial(stax.Conv(2, (1, 1)), stax.Flatten(batch_axis=0, batch_axis_out=1))
    _, params = layer[0](jax.random.key(0), x.shape)
    outputs = layer[1](params, x, mask_constant=jnp.nan)
    assert kernel.shape1 == outputs.masked_value.shape == (12, 3)
    assert outputs.mask.shape == (12, 3)
    expected = np.repeat(np.isnan(x[..., 0]).reshape(3, 6), 2, axis=1)  # two channels at each of six positions
    np.testing.assert_array_equal(outputs.mask, expected.T)


def test_fault_9_two_products_in_a_row():
    x1, x2 = inputs(4, 3, 2), inputs(2, 3, 2, seed=1)
    products = [stax.DotGeneral(lhs=inputs(4, 3, 3), dimension_numbers=(((2,), (1,)), ((0,), (0,))))] * 2
    _, _, kernel_fn = stax.serial(stax.Dense(1), *(stax.ImageResize((-1, n, -1), "linear") for n in (4, 2)))
    kernel = kernel_fn(x1, x2)
    assert kernel.diagonal_batch and kernel.cov1.shape[0] == 4
    assert_close(nt.batch(kernel_fn, 2)(x1, x2).nngp, kernel.nngp)
    assert stax.serial(stax.Dense(1), *products)[2](x1).diagonal_batch


def test_fault_10_batches_with_masks():
    x1, x2 = masked_images(), inputs(2, 3, 2, 4, seed=1)
    _, _, kernel_fn = stax.serial(stax.Conv(1, (2, 2)), stax.Relu(), stax.GlobalAvgPool())
    expected = kernel_fn(x1, x2, mask_constant=jnp.nan)
    for size in (1, 2, 5):
        kernel = nt.batch(kernel_fn, size)(x1, x2, mask_constant=jnp.nan)
        assert_close(kernel.nngp, expected.nngp)
    assert_close(nt.batch(kernel_fn, 2)(x1, x2, "cov1", mask_constant=jnp.nan), expected.cov1)


def test_fault_11_slices_of_full_covariances():
    x = inputs(4, 3)
    kernel = stax.Dense(1)[2](x, diagonal_batch=False)
    assert kernel.slice(slice(1, 3), slice(None)).cov1.shape == (2, 2)
    assert_close(kernel.slice(slice(1, 3), slice(None)).cov1, kernel.cov1[1:3, 1:3])


def test_fault_11_dropout_of_inputs_is_refused():
    with pytest.raises(ValueError, match="Dropout"):
        stax.serial(stax.Dropout(0.5), stax.Dense(1))[2](inputs(2, 3))


def test_fault_11_index_of_unknown_sizes():
    assert stax.Index(stax.Slice[:, 1:])[0](jax.random.key(0), (-1, 3, -1)) == ((-1, 2, -1), ())


def test_fault_12_first_call_under_jit():
    x, y = inputs(4, 3), inputs(4, 1)
    _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, y, diag_reg=1e-3)
    traced = jax.jit(lambda x: predict_fn(x_test=x, get="ntk"))(x[:2])
    assert_close(predict_fn(x_test=x[:2], get="ntk"), traced, 1e-8)


def test_fault_13_zero_eigenvalues():
    x, y = inputs(2, 3), inputs(2, 1)
    x, y = jnp.concatenate([x, x]), jnp.concatenate([y, y])
    k = x @ x.T
    fx_train, fx_test = nt.predict.gradient_descent_mse(k, y)(3.0, 0.0, 0.0, k[:2])
    assert np.isfinite(fx_train).all() and np.isfinite(fx_test).all()


def test_fault_14_functions_with_trees_and_silence(capsys):
    x = inputs(2, 3)
    theta = nt.empirical_ntk_fn(lambda w, x: {"a": x @ w, "b": 2 * x @ w})(x, None, inputs(3, 4))
    assert_close(theta["b"], 4 * theta["a"])
    assert capsys.readouterr().out == ""


def test_fault_15_lists_and_types():
    x = inputs(2, 4, 4, 3)
    pooled = [
        stax.serial(stax.Conv(1, (2, 2)), stax.AvgPool([2, 2], strides))[2](x).nngp for strides in ([1, 1], (1, 1))
    ]
    assert_close(*pooled)
    with pytest.raises(TypeError, match="complex"):
        stax.Dense(1)[2](x + 1j)


def test_fault_16_what_is_imported():
    code = "import sys, neural_tangents; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    rate = nt.predict.max_learning_rate(jnp.diag(jnp.array([1.0, 2.0])), y_train_size=2)
    assert math.isclose(rate, 2, rel_tol=1e-6)  # 2 outputs, and the largest eigenvalue is 2


def test_fault_17_nothing_is_compiled_twice():
    x = inputs(2, 2, 2, 3)
    events = []
    network = stax.serial(*[stax.Conv(4, (2, 2), padding="SAME"), stax.Relu()] * 20, stax.Flatten())
    network[2](x)

    def listen(name, _, **kwargs):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        network[2](x)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not events


def test_channels_behind_a_nested_layer():
    """Of a layer that has no finite network. In the standard parameterization they weigh the tangent kernel."""
    x = inputs(2, 6)
    dense = stax.Dense(8)
    nested = stax.serial(stax.serial(dense, stax.ExpNormalized()), stax.Dense(1, parameterization="standard"))
    kernel = nested[2](x)
    before = stax.serial(dense, stax.ExpNormalized())[2](x)
    assert_close(kernel.ntk, 8 * before.nngp + before.ntk)
