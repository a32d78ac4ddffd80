"""nt-empirical in an environment of its own: the tangent kernel of a linear model is the Gram matrix of its inputs."""

import jax.numpy as jnp
import numpy as np
from nt_empirical import empirical_ntk_fn, linearize, ntk_operator


def model(params, x):
    return x @ params


x, params = jnp.arange(6.0).reshape(3, 2), jnp.ones((2, 1))
np.testing.assert_allclose(empirical_ntk_fn(model)(x, None, params), x @ x.T)
np.testing.assert_allclose(linearize(model, params)(2 * params, x), model(2 * params, x))
np.testing.assert_allclose(ntk_operator(model, params, x).trace(), np.trace(x @ x.T))
