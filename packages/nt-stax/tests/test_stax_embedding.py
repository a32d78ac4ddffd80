"""Embeddings of tokens, against dense layers of vectors with a single 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_core import batch, explain
from nt_stax import (
    Conv,
    Dense,
    Embedding,
    FanInSum,
    FanOut,
    Flatten,
    GlobalAvgPool,
    GlobalSelfAttention,
    Relu,
    parallel,
    serial,
    unmask_fn,
)

VOCAB = 6
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (5, 4, 1))
FIRST, SECOND = TOKENS[:3], TOKENS[2:]


def one_hot(tokens):
    return np.eye(VOCAB)[tokens[..., 0]]


BODIES = {
    "Flatten": lambda: (Conv(8, (3,), padding="SAME"), Relu(), Flatten(), Dense(1)),
    "GlobalAvgPool": lambda: (Relu(), Conv(8, (2,)), Relu(), GlobalAvgPool(), Dense(1)),
    "GlobalSelfAttention": lambda: (
        GlobalSelfAttention(8, 4, 4, 2, linear_scaling=False, attention_mechanism="IDENTITY"),
        GlobalAvgPool(),
    ),
    "nothing": tuple,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("second", [SECOND, None])
def test_kernels_are_those_of_vectors_with_a_single_one(name, second, x64):
    layers = BODIES[name]()
    found = serial(Embedding(VOCAB, 8, 1.3), *layers)[2](FIRST, second)
    dense = serial(Dense(8, 1.3 * VOCAB**0.5), *layers)[2]
    expected = dense(one_hot(FIRST), None if second is None else one_hot(second))
    for field in ("nngp", "ntk", "cov1", "cov2"):
        a, b = getattr(found, field), getattr(expected, field)
        assert (a is None) == (b is None)
        if b is not None:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14, err_msg=field)
    assert found.shape1 == expected.shape1 and found.is_reversed == expected.is_reversed


def test_finite_network_is_a_table(x64):
    init_fn, apply_fn, _ = Embedding(VOCAB, 8, 1.3)
    shape, params = init_fn(random.key(0), (-1, 4, 1))
    assert shape == (-1, 4, 8)
    np.testing.assert_allclose(apply_fn(params, TOKENS), 1.3 * params[TOKENS[..., 0]])
    init_fn, apply_fn, _ = Embedding(VOCAB, 8, channel_axis=1)
    assert init_fn(random.key(0), (2, 1, 4))[0] == (2, 8, 4)
    outputs = apply_fn(params, np.moveaxis(TOKENS, -1, 1))
    np.testing.assert_allclose(outputs, np.moveaxis(params[TOKENS[..., 0]], -1, 1))


def test_padding_is_masked(x64):
    network = serial(Embedding(VOCAB, 8), Relu(), GlobalAvgPool())
    padded = np.concatenate([FIRST, np.full((3, 2, 1), 5)], 1)
    tokens = np.where(FIRST == 5, 4, FIRST)
    padded[:, :4] = tokens
    for x2 in (None, padded[:2]):
        short = None if x2 is None else tokens[:2]
        found = network[2](padded, x2, ("nngp", "ntk"), mask_constant=5)
        for a, b in zip(found, network[2](tokens, short, ("nngp", "ntk")), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    params = network[0](random.key(0), padded.shape)[1]
    apply_fn = unmask_fn(network[1])
    np.testing.assert_allclose(apply_fn(params, padded, mask_constant=5), apply_fn(params, tokens), rtol=1e-12)


def test_in_cells_under_jit_and_explained(x64):
    kernel_fn = serial(Embedding(VOCAB, 8), Relu(), GlobalAvgPool())[2]
    expected = kernel_fn(TOKENS, None, "ntk")
    np.testing.assert_allclose(batch(kernel_fn, batch_size=2)(TOKENS, None, "ntk"), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda x: kernel_fn(x, None, "ntk"))(TOKENS), expected, rtol=1e-12)
    assert "program 1" in explain(kernel_fn, TOKENS.shape)


def test_errors():
    kernel_fn = Embedding(VOCAB, 8)[2]
    with pytest.raises(ValueError, match=r"`tokens\[..., None\]`"):
        kernel_fn(TOKENS[..., 0])
    for wrong in (TOKENS + 1, TOKENS - 1, TOKENS + 0.5):
        with pytest.raises(ValueError, match="integers from 0 to 5"):
            kernel_fn(wrong)
    with pytest.raises(ValueError, match="integers from 0 to 5"):
        Embedding(VOCAB, 8)[1](jnp.ones((VOCAB, 8)), TOKENS + 1)
    with pytest.raises(ValueError, match="at most 16777216, got 33554432"):
        Embedding(2**25, 8)
    with pytest.raises(ValueError, match="the first layer"):
        serial(FanOut(2), parallel(Embedding(1, 4), Embedding(1, 4)), FanInSum())[2](0 * TOKENS)
    branches = parallel(Embedding(VOCAB, 8), Embedding(VOCAB, 8))[2]
    for inner in (serial(Dense(VOCAB), Embedding(VOCAB, 8))[2], lambda x: branches((x, x))):
        with pytest.raises(ValueError, match="the first layer"):
            inner(TOKENS)
