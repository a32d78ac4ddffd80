"""Entries of the inputs that are masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import MaskedArray, unmask_fn
from nt_core.masks import get_masked_array

pytestmark = pytest.mark.unoptimised

CONSTANTS = [0.1, -3.0, 0.0, 100, np.float64(0.1), jnp.inf, -jnp.inf, jnp.nan]


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("x64", [False, True])
def test_entries_equal_to_the_constant_are_zeroed_and_tracked(constant, dtype, x64):
    with jax.enable_x64(x64):
        x = np.array([[1.0, constant], [constant, -2.0]], dtype)
        masked = get_masked_array(x, constant)
        np.testing.assert_array_equal(masked.mask, [[False, True], [True, False]])
        np.testing.assert_array_equal(masked.masked_value, [[1.0, 0.0], [0.0, -2.0]])
        assert masked.masked_value.dtype == jnp.asarray(x).dtype
        assert (masked.shape, masked.ndim) == ((2, 2), 2)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_constants_that_are_traced(dtype):
    x = np.array([[1, 7], [7, -2]], dtype)
    masked = jax.jit(get_masked_array)(x, 7.0)
    np.testing.assert_array_equal(masked.mask, [[False, True], [True, False]])
    assert not jax.jit(get_masked_array)(x, jnp.nan).mask.any()
    assert not jax.jit(get_masked_array)(x, 10**9 + 7).mask.any()
    assert not get_masked_array(x, 10**10).mask.any()
    with pytest.raises(ValueError, match=r"one number, got an array of shape \(2,\)"):
        get_masked_array(x, jnp.ones(2))


def test_infinities_of_the_other_sign_and_nan_are_kept():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(get_masked_array(x, jnp.inf).masked_value, [0.0, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(get_masked_array(x, jnp.nan).masked_value, [jnp.inf, -jnp.inf, 0.0])


@pytest.mark.parametrize("dtype", [int, bool])
def test_arrays_of_integers(dtype):
    x = np.array([0, 1, 1], dtype)
    np.testing.assert_array_equal(get_masked_array(x, 1.0).mask, [False, True, True])
    np.testing.assert_array_equal(get_masked_array(x, jnp.nan).mask, [False, False, False])


def test_without_a_constant_nothing_is_masked():
    x = np.ones(3)
    assert get_masked_array(x, None) is x
    assert get_masked_array(x) is x


def test_what_is_masked_already_stays_so():
    masked = get_masked_array(jnp.array([1.0, 2.0]), 2.0)
    assert get_masked_array(masked, 1.0) is masked
    assert get_masked_array(None, 1.0) is None


def test_masking_has_the_gradient_of_the_entries_that_are_left():
    gradient = jax.grad(lambda x: jnp.sum(get_masked_array(x, jnp.nan).masked_value ** 2))(jnp.array([3.0, jnp.nan]))
    np.testing.assert_array_equal(gradient, [6.0, 0.0])


def test_masked_array_is_a_frozen_dataclass_and_a_pytree():
    masked = get_masked_array(jnp.array([1.0, 2.0]), 2.0)
    assert [f.name for f in dataclasses.fields(masked)] == ["masked_value", "mask"]
    assert list(masked.asdict()) == ["masked_value", "mask"]
    assert masked.astuple() == (masked.masked_value, masked.mask)
    np.testing.assert_array_equal(masked.replace(mask=None).masked_value, masked.masked_value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        masked.mask = None
    doubled = jax.jit(lambda m: m.replace(masked_value=2 * m.masked_value))(masked)
    assert isinstance(doubled, MaskedArray)
    np.testing.assert_array_equal(doubled.masked_value, [2.0, 0.0])
    batched = jax.vmap(lambda x: get_masked_array(x, 2.0))(jnp.array([[1.0, 2.0], [2.0, 3.0]]))
    np.testing.assert_array_equal(batched.mask, [[False, True], [True, False]])


def test_unmask_fn_returns_arrays_in_any_container():
    def fn(x, scale=1.0):
        # Values under a mask need not be zero, and a mask may be smaller than its array.
        return {"masked": [MaskedArray(scale * x, jnp.array([[True, False]]))], "plain": x, "none": None}

    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    out = unmask_fn(fn)(x, scale=10.0)
    np.testing.assert_array_equal(out["masked"][0], [[0.0, 20.0], [0.0, 40.0]])
    np.testing.assert_array_equal(out["plain"], x)
    assert out["none"] is None


def test_unmask_fn_keeps_the_name():
    def apply_fn(params, inputs):
        """Documented."""

    assert unmask_fn(apply_fn).__name__ == "apply_fn"
    assert unmask_fn(apply_fn).__doc__ == "Documented."
