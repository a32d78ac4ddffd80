"""nt-stax in an environment of its own: a network, finite and infinite."""

import jax
import jax.numpy as jnp
import numpy as np
from nt_stax import Dense, Relu, serial

init_fn, apply_fn, kernel_fn = serial(Dense(64), Relu(), Dense(3))
x = jnp.eye(2, 4)
shape, params = init_fn(jax.random.key(0), x.shape)
assert shape == (2, 3) == apply_fn(params, x).shape
np.testing.assert_allclose(kernel_fn(x, None, "nngp"), [[1 / 8, 1 / (8 * np.pi)], [1 / (8 * np.pi), 1 / 8]], rtol=1e-6)
