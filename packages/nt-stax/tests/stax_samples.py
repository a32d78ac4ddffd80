"""Inputs of tests, without a compilation for every shape."""

import jax.numpy as jnp
import numpy as np


def normal(seed, shape, dtype=None):
    """Returns standard normal numbers, by default of JAX's default type."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
