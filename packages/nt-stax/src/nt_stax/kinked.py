"""Nonlinearities with kinks, beyond those of the ReLU family.

What is linear in pieces has exact kernels (`nt_core.activations.Clip`), and so has its product with the argument
(`ClipGate`). The kernels of others come from Hermite coefficients (`nt_core.activations.ElementwiseNumerical`), which
decay slowly: docs/numerics.md has the errors.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from nt_core import activations, layer, supports_masking
from nt_core.authoring import is_traced

from nt_stax.elementwise import by_coefficients, elementwise

_DEGREE = 150  # the largest number of coefficients that there is, 300


@layer
@supports_masking(remask_kernel=True)
def HardTanh():
    """Tanh made of straight lines, `f(x) = min(max(x, -1), 1)`.

    >>> from nt_stax import Dense, HardTanh, serial
    >>> _, _, kernel_fn = serial(Dense(512), HardTanh())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # 1 - sqrt(2 / (pi e))
    [[0.5161]]
    """
    return _clip(1.0, -1.0, 1.0, 0.0)


@layer
@supports_masking(remask_kernel=True)
def HardSigmoid():
    """Logistic function made of straight lines, `f(x) = min(max(x + 3, 0), 6) / 6`.

    >>> from nt_stax import Dense, HardSigmoid, serial
    >>> _, _, kernel_fn = serial(Dense(512), HardSigmoid())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.2776]]
    """
    return _clip(1 / 6, -3.0, 3.0, 0.5)


@layer
@supports_masking(remask_kernel=True)
def Relu6():
    """Rectified linear unit with a bound, `f(x) = min(max(x, 0), 6)`.

    >>> from nt_stax import Dense, Relu6, serial
    >>> _, _, kernel_fn = serial(Dense(512), Relu6())
    >>> print(kernel_fn(4 * jnp.ones((1, 3)), None, "nngp").round(4))
    [[6.2277]]
    """
    return _clip(1.0, 0.0, 6.0, 0.0)


@layer
@supports_masking(remask_kernel=True)
def Elu(alpha: float = 1.0):
    """Exponential linear unit, `f(x) = x` for positive `x`, else `alpha (exp(x) - 1)`; see arXiv:1511.07289.

    >>> from nt_stax import Dense, Elu, serial
    >>> _, _, kernel_fn = serial(Dense(512), Elu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.6449]]
    """
    return by_coefficients(_with_alpha(jax.nn.elu, alpha), _DEGREE)


@layer
@supports_masking(remask_kernel=True)
def Selu():
    """Scaled exponential linear unit, which keeps a variance of 1 (arXiv:1706.02515).

    >>> from nt_stax import Dense, Selu, serial
    >>> _, _, kernel_fn = serial(Dense(512), Selu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[1.]]
    """
    return by_coefficients(jax.nn.selu, _DEGREE)


@layer
@supports_masking(remask_kernel=True)
def Celu(alpha: float = 1.0):
    """Exponential linear unit without a kink in its slope, `alpha (exp(x / alpha) - 1)` for negative `x`, else `x`.

    See arXiv:1704.07483.

    >>> from nt_stax import Celu
    >>> _, apply_fn, _ = Celu(2.0)
    >>> print(apply_fn((), jnp.array([[-1.0, 1.0]])).round(4))
    [[-0.7869  1.    ]]
    """
    return by_coefficients(_with_alpha(jax.nn.celu, alpha), _DEGREE)


@layer
@supports_masking(remask_kernel=True)
def HardSilu():
    """Sigmoid-weighted linear unit with a hard sigmoid, `f(x) = x min(max(x + 3, 0), 6) / 6`; see arXiv:1905.02244.

    >>> from nt_stax import Dense, HardSilu, serial
    >>> _, _, kernel_fn = serial(Dense(512), HardSilu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.3316]]
    """
    return elementwise(jax.nn.hard_silu, activations.ClipGate(1 / 6, 3.0, 0.5))


def HardSwish():
    """Another name of `HardSilu`.

    >>> from nt_stax import HardSwish
    >>> _, apply_fn, _ = HardSwish()
    >>> print(apply_fn((), jnp.array([[3.0]])))
    [[3.]]
    """
    return HardSilu()


@dataclasses.dataclass(frozen=True)
class _WithAlpha:
    """A function with a parameter. Equal ones compare equal, so that networks with them are compiled once."""

    fn: Callable[[Array, float], Array]
    alpha: float

    def __call__(self, x: Array) -> Array:
        return self.fn(x, self.alpha)


def _with_alpha(fn: Callable[[Array, float], Array], alpha: float) -> Callable[[Array], Array]:
    # What is traced has no value to be compared.
    return (lambda x: fn(x, alpha)) if is_traced(alpha) else _WithAlpha(fn, float(alpha))


def _clip(a: float, low: float, high: float, c: float):
    return elementwise(lambda x: a * jnp.clip(x, low, high) + c, activations.Clip(a, low, high, c))
