"""Smooth nonlinearities, whose covariances have no closed form and come from Hermite coefficients.

See `nt_core.activations.ElementwiseNumerical`. All have 100 coefficients, `Tanh` has 250 and `QuickGelu` 130: in single
precision they are enough up to variances of 10. Kernels lose digits beyond: docs/numerics.md says from where on.
"""

import jax
import jax.numpy as jnp
from jax import Array
from nt_core import layer, supports_masking

from nt_stax.elementwise import RectifiedMonomial, by_coefficients


@layer
@supports_masking(remask_kernel=True)
def Tanh():
    """Hyperbolic tangent.

    >>> from nt_stax import Dense, Tanh, serial
    >>> _, _, kernel_fn = serial(Dense(512), Tanh())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.3943]]
    """
    return by_coefficients(jnp.tanh, 125)


@layer
@supports_masking(remask_kernel=True)
def Sigmoid():
    """Logistic function, `f(x) = 1 / (1 + exp(-x))`.

    >>> from nt_stax import Dense, Sigmoid, serial
    >>> _, _, kernel_fn = serial(Dense(512), Sigmoid())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.2934]]
    """
    return by_coefficients(jax.nn.sigmoid)


@layer
@supports_masking(remask_kernel=True)
def LogSigmoid():
    """Logarithm of the logistic function, `f(x) = -log(1 + exp(-x))`.

    >>> from nt_stax import LogSigmoid
    >>> _, apply_fn, _ = LogSigmoid()
    >>> print(apply_fn((), jnp.array([[0.0]])).round(4))
    [[-0.6931]]
    """
    return by_coefficients(jax.nn.log_sigmoid)


@layer
@supports_masking(remask_kernel=True)
def Silu():
    """Sigmoid-weighted linear unit, `f(x) = x / (1 + exp(-x))`, also known as Swish; see arXiv:1702.03118.

    >>> from nt_stax import Dense, Silu, serial
    >>> _, _, kernel_fn = serial(Dense(512), Silu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.3558]]
    """
    return by_coefficients(jax.nn.silu)


def Swish():
    """Another name of `Silu`.

    >>> from nt_stax import Swish
    >>> _, apply_fn, _ = Swish()
    >>> print(apply_fn((), jnp.array([[1.0]])).round(4))
    [[0.7311]]
    """
    return Silu()


@layer
@supports_masking(remask_kernel=True)
def Softplus():
    """Smooth rectifier, `f(x) = log(1 + exp(x))`.

    >>> from nt_stax import Dense, Softplus, serial
    >>> _, _, kernel_fn = serial(Dense(512), Softplus())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.9212]]
    """
    return by_coefficients(jax.nn.softplus)


@layer
@supports_masking(remask_kernel=True)
def Mish():
    """`f(x) = x tanh(log(1 + exp(x)))`; see arXiv:1908.08681.

    >>> from nt_stax import Dense, Mish, serial
    >>> _, _, kernel_fn = serial(Dense(512), Mish())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.4523]]
    """
    return by_coefficients(jax.nn.mish)


@layer
@supports_masking(remask_kernel=True)
def Squareplus():
    """Smooth rectifier without exponentials, `f(x) = (x + sqrt(x^2 + 4)) / 2`; see arXiv:2112.11687.

    >>> from nt_stax import Squareplus
    >>> _, apply_fn, _ = Squareplus()
    >>> print(apply_fn((), jnp.array([[0.0]])))
    [[1.]]
    """
    return by_coefficients(jax.nn.squareplus)


@layer
@supports_masking(remask_kernel=True)
def QuickGelu():
    """Gaussian error linear unit with a logistic function, `f(x) = x / (1 + exp(-1.702 x))`; see arXiv:1606.08415.

    >>> from nt_stax import QuickGelu
    >>> _, apply_fn, _ = QuickGelu()
    >>> print(apply_fn((), jnp.array([[1.0]])).round(4))
    [[0.8458]]
    """
    return by_coefficients(_quick_gelu, 65)


def SquaredRelu():
    """Square of positive inputs, `f(x) = max(x, 0)^2`, in closed form; see `RectifiedMonomial`.

    >>> from nt_stax import Dense, SquaredRelu, serial
    >>> _, _, kernel_fn = serial(Dense(512), SquaredRelu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[1.5]]
    """
    return RectifiedMonomial(2)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)
