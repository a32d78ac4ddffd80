"""nt-predict in an environment of its own: a kernel matrix in, predictions out."""

import jax.numpy as jnp
import numpy as np
from nt_predict import Gram, fit, gradient_descent, gradient_descent_mse

k_train, y_train, k_test = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([[1.0], [0.0]]), jnp.array([[1.0, 1.0]])
train, test = gradient_descent_mse(k_train, y_train)(fx_train_0=0.0, fx_test_0=0.0, k_test_train=k_test)
np.testing.assert_allclose(train, y_train, atol=1e-6)
np.testing.assert_allclose(test, [[1 / 3]], rtol=1e-6)
np.testing.assert_allclose(fit(Gram(k_train), y_train).mean(k_test), [[1 / 3]], rtol=1e-6)
try:
    gradient_descent(lambda fx, y: jnp.sum((fx - y) ** 2), k_train, y_train)
except ImportError as error:
    assert "needs diffrax" in str(error) and "pip install 'nt-predict[diffrax]'" in str(error), error
else:
    raise AssertionError("diffrax is an extra")
