"""What `kernel_fn` takes, whatever the network: types of inputs, and `get`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import explain
from nt_stax import Dense, FanOut, Relu, parallel, serial

X = np.arange(6.0).reshape(2, 3)
KERNEL_FN = serial(Dense(1, 1.3, 0.2), Relu(), Dense(1))[2]


@pytest.mark.parametrize(
    "x1, x2, error, message",
    [
        ([[1.0, 2.0]], None, TypeError, "Wrong input types given: x1 is a float"),
        (X + 1j, None, TypeError, "x1 is complex .complex128."),
        (X, 1j * X, TypeError, "x2 is complex"),
        (X[0], None, ValueError, r"rank at least 2, got shape \(3,\)"),
        (X, X[:, :2], ValueError, r"differ in the batch axis \(0\) only, got shapes \(2, 3\) and \(2, 2\)"),
        ([X, X], X, ValueError, "list of length 2 where another has a leaf"),
    ],
)
def test_inputs_that_are_refused(x1, x2, error, message):
    with pytest.raises(error, match=message):
        KERNEL_FN(x1, x2, "nngp")


def test_a_kernel_with_second_inputs_is_refused():
    with pytest.raises(TypeError, match=r"x1 is a Kernel.*without x2"):
        KERNEL_FN(KERNEL_FN(X, X), X, "nngp")


def test_parallel_of_a_single_input_is_refused():
    with pytest.raises(ValueError, match=r"takes a list or tuple of 2 inputs, e.g. from FanOut\(2\), got a single one"):
        parallel(Dense(1), Dense(1))[2](X, None, "nngp")
    with pytest.raises(ValueError, match=r"2 inputs.*got 3"):
        serial(FanOut(3), parallel(Dense(1), Dense(1)))[2](X, None, "nngp")


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "bool"])
def test_real_inputs_are_computed_with_in_the_default_precision(dtype, x64):
    with jax.enable_x64(x64):
        kernel = KERNEL_FN(np.asarray(X, jnp.dtype(dtype)), None, "ntk")
        expected = KERNEL_FN(np.asarray(X, jnp.dtype(dtype)).astype(float), None, "ntk")
        assert kernel.dtype == (np.float64 if x64 else np.float32)
        np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
    "get, error, message",
    [
        ((), ValueError, "must be non-empty"),
        (("nngp", "NNGP"), ValueError, "must be unique"),
        ("covariance", KeyError, "`get` asks for covariance, and there are nngp, ntk"),
    ],
)
def test_get_that_is_refused(get, error, message):
    with pytest.raises(error, match=message):
        KERNEL_FN(X, None, get)
    with pytest.raises(error, match=message):
        explain(KERNEL_FN, X.shape, get=get)


def test_get_in_the_order_that_was_asked_for():
    kernels = KERNEL_FN(X, X[:1], ["NTK", "cov2", "nngp", "shape1"])
    assert type(kernels).__name__ == "AnalyticKernel" and kernels._fields == ("ntk", "cov2", "nngp", "shape1")
    assert kernels.ntk.shape == kernels.nngp.shape == (2, 1) and kernels.cov2.shape == (1,)
    assert kernels.shape1 == (2, 1) == KERNEL_FN(X, X[:1], "shape1")
    assert KERNEL_FN(X, None, "nngp").shape == (2, 2)
    assert KERNEL_FN(X, None).cov2 is None
