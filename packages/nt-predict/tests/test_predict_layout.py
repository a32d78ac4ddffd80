"""Outputs of any rank, with any trace axes: the kernel is the identity along those."""

import itertools

import numpy as np
import pytest
from nt_core import Kernel
from nt_predict import gp_inference, gradient_descent_mse, gradient_descent_mse_ensemble

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.unoptimised]

TRAIN, TEST = (3, 2, 4), (5, 2, 3)  # sizes of the axes of training and test outputs, if they are in the kernel


def problem(trace_axes, seed=0):
    """Returns kernels of the axes that are not traced, in zipped layout, and labels."""
    rng = np.random.default_rng(seed)
    kept = [axis for axis in range(3) if axis not in trace_axes]
    train, test = ([sizes[axis] for axis in kept] for sizes in (TRAIN, TEST))
    features = int(np.prod(train) + np.prod(test)) + 2
    j_train, j_test = rng.normal(size=(*train, features)), rng.normal(size=(*test, features))

    def kernel(j1, j2):
        product = np.tensordot(j1, j2, (-1, -1)) / features
        order = [axis + offset for axis in range(len(kept)) for offset in (0, len(kept))]
        return product.transpose(order)

    return kernel(j_train, j_train), kernel(j_test, j_train), kernel(j_test, j_test), rng.normal(size=TRAIN)


def with_identity(kernel, trace_axes):
    """Returns a kernel of all three axes: the given one times the identity along the trace axes."""
    for axis in sorted(trace_axes):
        identity = np.eye(TRAIN[axis])
        position = 2 * axis  # all axes before it are in the kernel by now
        kernel = np.moveaxis(np.tensordot(kernel, identity, 0), (-2, -1), (position, position + 1))
    return kernel


SUBSETS = [axes for count in range(4) for axes in itertools.combinations(range(3), count)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("trace_axes", SUBSETS)
@pytest.mark.parametrize("time", [2.5, None])
def test_trace_axes_stand_for_an_identity(trace_axes, time):
    train_train, test_train, test_test, y = problem(trace_axes)
    test_shape = tuple(TRAIN[axis] if axis in trace_axes else TEST[axis] for axis in range(3))
    f_0, g_0 = np.random.default_rng(1).normal(size=TRAIN), np.random.default_rng(2).normal(size=test_shape)

    train, test = gradient_descent_mse(train_train, y, trace_axes=trace_axes)(time, f_0, g_0, test_train)
    mean, covariance = gp_inference(train_train, y, trace_axes=trace_axes)("nngp", test_train, test_test)
    assert train.shape == TRAIN
    assert test.shape == mean.shape == test_shape
    assert covariance.shape == test_test.shape

    full = [with_identity(kernel, trace_axes) for kernel in (train_train, test_train, test_test)]
    full_train, full_test = gradient_descent_mse(full[0], y, trace_axes=())(time, f_0, g_0, full[1])
    full_mean, full_covariance = gp_inference(full[0], y, trace_axes=())("nngp", full[1], full[2])
    np.testing.assert_allclose(train, full_train, atol=1e-11)
    np.testing.assert_allclose(test, full_test, atol=1e-11)
    np.testing.assert_allclose(mean, full_mean, atol=1e-11)
    np.testing.assert_allclose(with_identity(np.asarray(covariance), trace_axes), full_covariance, atol=1e-11)


def test_kernel_of_all_axes_is_one_matrix():
    train_train, test_train, test_test, y = problem(())

    def matrix(kernel, rows, columns):
        return kernel.transpose(0, 2, 4, 1, 3, 5).reshape(np.prod(rows), np.prod(columns))

    k, k_td, k_tt = matrix(train_train, TRAIN, TRAIN), matrix(test_train, TEST, TRAIN), matrix(test_test, TEST, TEST)
    mean, covariance = gp_inference(train_train, y, trace_axes=())("nngp", test_train, test_test)
    np.testing.assert_allclose(mean, (k_td @ np.linalg.solve(k, y.ravel())).reshape(TEST), atol=1e-11)
    np.testing.assert_allclose(matrix(covariance, TEST, TEST), k_tt - k_td @ np.linalg.solve(k, k_td.T), atol=1e-11)


@pytest.mark.parametrize(
    "axes, same", [(-1, (2,)), (2, (2,)), ((-1, 2), (2,)), ([0, -1, 2, -3], (0, 2)), ((2, 0), (0, 2))]
)
def test_trace_axes_may_be_negative_or_repeated_in_any_order(axes, same):
    train_train, test_train, _, y = problem(same)
    expected = gradient_descent_mse(train_train, y, trace_axes=same)(1.0, 0.0, 0.0, test_train)
    actual = gradient_descent_mse(train_train, y, trace_axes=axes)(1.0, 0.0, 0.0, test_train)
    for first, second in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.sample(1)
@pytest.mark.parametrize("trace_axes", [(-1,), (), (1, 2), (0, 1, 2)])
def test_ensemble(trace_axes):
    axes = tuple(axis % 3 for axis in trace_axes)
    train_train, test_train, test_test, y = problem(axes)

    def kernel_fn(x1, x2, get):
        return {("train", None): train_train, ("test", "train"): test_train, ("test", None): test_test}[x1, x2]

    predict_fn = gradient_descent_mse_ensemble(kernel_fn, "train", y, trace_axes=trace_axes)
    mean, covariance = predict_fn(None, "test", "nngp", compute_cov=True)
    expected = gp_inference(train_train, y, trace_axes=trace_axes)("nngp", test_train, test_test)
    np.testing.assert_array_equal(mean, expected.mean)
    np.testing.assert_array_equal(covariance, expected.covariance)
    mean, covariance = predict_fn(np.zeros((2, 3)), "test", "nngp", compute_cov=True)
    assert mean.shape == (2, 3, *expected.mean.shape)
    np.testing.assert_allclose(covariance, np.broadcast_to(test_test, covariance.shape), atol=1e-13)
    mean, covariance = predict_fn(np.zeros(2), None, "nngp", compute_cov=True)
    assert mean.shape == (2, *TRAIN)
    np.testing.assert_allclose(covariance, np.broadcast_to(train_train, covariance.shape), atol=1e-12)


def test_labels_of_rank_one():
    train_train, test_train = np.diag([2.0, 1.0]), np.array([[1.0, 1.0]])
    mean = gp_inference(train_train, np.array([2.0, 3.0]), trace_axes=())("nngp", test_train)
    np.testing.assert_allclose(mean, [4.0])


def test_initial_outputs_are_broadcast():
    train_train, test_train, _, y = problem((2,))
    predict_fn = gradient_descent_mse(train_train, y)
    bias = np.arange(4.0)
    expected = predict_fn(1.0, np.broadcast_to(bias, TRAIN), np.broadcast_to(bias, (5, 2, 4)), test_train)
    for first, second in zip(predict_fn(1.0, bias, bias, test_train), expected, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32"])
def test_low_precision_is_promoted(dtype):
    kernel, y = np.diag([2, 1]).astype(dtype), np.array([[2], [3]])
    mean = gp_inference(kernel, y)("nngp", np.ones((1, 2)))
    np.testing.assert_allclose(mean, [[4]], rtol=1e-6)
    assert mean.dtype == ("float64" if dtype == "int32" else "float32")


def test_kernels_in_reversed_order_are_put_in_order():
    """A `Kernel` may hold its pairs of spatial axes last to first, as after a convolution."""
    train_train, test_train, test_test, y = problem(())

    def reversed_kernel(k):
        kernel = Kernel(
            nngp=k, ntk=None, cov1=None, cov2=None, x1_is_x2=False, is_gaussian=True, is_reversed=False, is_input=False,
            diagonal_batch=True, diagonal_spatial=False, shape1=(*k.shape[::2], 1), shape2=(*k.shape[1::2], 1),
            batch_axis=0, channel_axis=3,
        )  # fmt: skip
        return kernel.reverse()

    expected = gp_inference(train_train, y, trace_axes=())("nngp", test_train, test_test)
    kernels = map(reversed_kernel, (train_train, test_train, test_test))
    predict_fn = gp_inference(next(kernels), y, trace_axes=())
    for actual, value in zip(predict_fn("nngp", *kernels), expected, strict=True):
        np.testing.assert_allclose(actual, value)
