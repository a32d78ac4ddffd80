"""Gated linear units against networks of two branches, whose weights are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_core import explain
from nt_stax import (
    GEGLU,
    GLU,
    Conv,
    Dense,
    Elementwise,
    FanInProd,
    FanOut,
    Flatten,
    Gelu,
    GlobalAvgPool,
    GlobalSelfAttention,
    Relu,
    Sigmoid,
    Silu,
    SwiGLU,
    parallel,
    serial,
)
from stax_samples import normal

LAYERS = {"GLU": (GLU, Sigmoid), "SwiGLU": (SwiGLU, Silu), "GEGLU": (GEGLU, Gelu)}


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_those_of_two_branches(name, dtype):
    gated, activation = LAYERS[name]
    x = normal(1, (3, 4), dtype)
    found = serial(Dense(6, 1.3, 0.2), gated(), Dense(1))[2](x, None, ("nngp", "ntk"))
    branches = parallel(Dense(3, 1.3, 0.2), serial(Dense(3, 1.3, 0.2), activation()))
    expected = serial(FanOut(2), branches, FanInProd(), Dense(1))[2](x, None, ("nngp", "ntk"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_finite_function(name):
    gated, activation = LAYERS[name]
    init_fn, apply_fn, _ = gated(channel_axis=1)
    assert init_fn(random.key(0), (-1, 6, 5)) == ((-1, 3, 5), ())
    x = normal(1, (2, 6, 5))
    np.testing.assert_allclose(apply_fn((), x), x[:, :3] * activation()[1]((), x[:, 3:]), rtol=1e-6)
    np.testing.assert_allclose(GLU()[1]((), x[..., :4]), jax.nn.glu(x[..., :4]), rtol=1e-6)


def test_network_of_images_is_one_program(x64):
    """With masks, and another nonlinearity after it."""
    block = serial(Conv(8, (3, 3), padding="SAME"), GLU(Relu()))
    network = serial(block, block, GlobalAvgPool(), Dense(1))[2]
    x1, x2 = (np.array(normal(n, (n, 5, 4, 3))) for n in (2, 3))
    x1[0, 2:], x2[1, :, 3] = np.nan, np.nan
    kernels = [network(x1, x2, ("nngp", "ntk"), mask_constant=np.nan, implementation=name) for name in (None, "xla")]
    for a, b in zip(*kernels, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert str(explain(network, (2, 5, 4, 3))).count("program") == 1


def test_mask_of_either_half_masks(x64):
    x = np.array(normal(1, (2, 3, 4)))
    x[0, 1], x[1, 2, 0], x[1, 0, 3] = np.nan, np.nan, np.nan
    outputs = GLU()[1]((), jnp.asarray(x), mask_constant=np.nan)
    expected = np.isnan(x[..., :2]) | np.isnan(x[..., 2:])
    np.testing.assert_array_equal(outputs.mask, expected)


def test_errors():
    x = normal(1, (2, 5))
    with pytest.raises(TypeError, match=r"Elementwise\(fn\)"):
        GLU(jnp.tanh)
    with pytest.raises(ValueError, match="5 channels: an odd number"):
        GLU()[1]((), x)
    with pytest.raises(ValueError, match="5 channels: an odd number"):
        serial(Dense(5), GLU())[2](x)
    with pytest.raises(ValueError, match="put a Dense or Conv layer before"):
        serial(Dense(6), Relu(), GLU())[2](x)
    with pytest.raises(ValueError, match="a layer that has parameters"):
        GLU(Dense(2))[0](random.key(0), (2, 4))
    with pytest.raises(NotImplementedError, match="a nonlinearity"):
        serial(Dense(6), GLU(Dense(2)))[2](x)
    attention = GlobalSelfAttention(4, 2, 2, 1, linear_scaling=False)
    with pytest.raises(NotImplementedError, match="a nonlinearity"):
        serial(Dense(6), GLU(attention))[2](normal(1, (2, 3, 5)))


def test_gates_of_users():
    x = normal(1, (2, 4))
    found, expected = (serial(Dense(4), GLU(f))[2](x, None, "ntk") for f in (Elementwise(jax.nn.silu), Silu()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert serial(Dense(4), Flatten(), Dense(6), GLU())[0](random.key(0), (2, 3))[0] == (2, 3)
