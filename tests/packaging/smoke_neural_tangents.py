"""neural-tangents in an environment of its own: layers, kernel, predictions."""

import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from neural_tangents import stax

_, _, kernel_fn = stax.serial(stax.Dense(64), stax.Relu(), stax.Dense(1))
x_train, y_train = jnp.eye(3, 4), jnp.array([[1.0], [0.0], [-1.0]])
predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
for get in ("nngp", "ntk"):
    np.testing.assert_allclose(predict_fn(x_test=x_train, get=get), y_train, atol=1e-5)
assert nt.__version__.startswith("0.7")
