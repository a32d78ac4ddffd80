"""Activations given by functions of the user."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nt_core.activations.arcs import reciprocal
from nt_core.activations.base import Activation, activation, static

ScalarFunction = Callable[..., Any]


@activation
class Elementwise(Activation):
    """Any function whose covariance is known: `nngp_fn(cov12, var1, var2)` is `E f(u) f(v)`, on scalars.

    The factor of the tangent kernel is `d_nngp_fn`, with the same arguments, or the derivative of `nngp_fn` in its
    first argument where that is None. The deficit is a difference of values of `nngp_fn`, hence less accurate for
    nearly equal inputs than that of the other activations; it is exactly 0 for equal ones. Derivatives, and what
    happens at zero variance, are those of the functions.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Elementwise
      >>> square = Elementwise(lambda cov12, var1, var2: 2 * cov12 ** 2 + var1 * var2)  # f(x) = x^2
      >>> deficit, dot = square.dual(jnp.ones(2), jnp.ones(2), jnp.array([0., 0.5]))
      >>> print(deficit, dot)
      [0.  1.5] [4. 2.]
    """

    nngp_fn: ScalarFunction = static()
    d_nngp_fn: ScalarFunction | None = static(default=None)

    def __post_init__(self):
        _check_function("nngp_fn", self.nngp_fn)
        if self.d_nngp_fn is not None:
            _check_function("d_nngp_fn", self.d_nngp_fn)

    def variance(self, var):
        return _map_scalars("nngp_fn", self.nngp_fn, var, var, var)

    def dual(self, var1, var2, deficit):
        covariance = 0.5 * (var1 + var2) - deficit
        difference = 0.5 * (self.variance(var1) + self.variance(var2))
        difference = difference - _map_scalars("nngp_fn", self.nngp_fn, covariance, var1, var2)
        is_equal = (deficit == 0) & (var1 == var2)
        d_nngp_fn = jax.grad(self.nngp_fn) if self.d_nngp_fn is None else self.d_nngp_fn
        dot = _map_scalars("d_nngp_fn", d_nngp_fn, covariance, var1, var2)
        # The values of equal inputs may differ in the last place, but their derivatives are wanted.
        return difference - jnp.where(is_equal, jax.lax.stop_gradient(difference), 0), dot


@activation
class ElementwiseNumerical(Activation):
    """Any function `fn`, by Gauss-Hermite quadrature with `deg * deg` nodes; exact for polynomials of degree `< deg`.

    `fn` acts on arrays elementwise; `df` is its derivative, found by differentiation where it is None. The deficit is
    the mean of `(f(u) - f(v))^2 / 2` over nodes placed symmetrically in `u` and `v`, so nothing cancels for nearly
    equal inputs. The mean of `f(u) f(v)` over nodes in `u`, and in `v` given `u`, is a little different: by the error
    of the quadrature, which vanishes as `deg` grows (slowly where `fn` has kinks).

    First derivatives are those of the integrals: that in the deficit is the quadrature of `E f'(u) f'(v)`. Derivatives
    in a variance are defined as 0 at variance 0. At exactly equal inputs the second derivative in a variance and the
    deficit is not the true one.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import ElementwiseNumerical
      >>> one = jnp.ones(())
      >>> deficit, dot = ElementwiseNumerical(jnp.sin, jnp.cos, 20).dual(one, one, 0.5 * one)
      >>> f"{deficit:.5f} {dot:.5f}"  # covariance 1/2: (1 - exp(-2))/2 - exp(-1) sinh(1/2) and exp(-1) cosh(1/2)
      '0.24063 0.41483'
    """

    fn: ScalarFunction = static()
    df: ScalarFunction | None = static()
    deg: int = static()

    def __post_init__(self):
        _check_function("fn", self.fn)
        if self.df is not None:
            _check_function("df", self.df)
        _nodes(self.deg)

    def variance(self, var):
        return _variance(self._functions(), self.deg, var)

    def dual(self, var1, var2, deficit):
        functions = self._functions()
        deficit_out = _deficit(functions, self.deg, var1, var2, deficit)
        return deficit_out, _covariance(functions[1:], self.deg, var1, var2, deficit)

    def _functions(self) -> tuple[ScalarFunction, ...]:
        return (self.fn, _derivative(self.fn) if self.df is None else self.df)


# Quadrature of means over u and v. `functions` holds a function and as many of its derivatives as are known.


def _covariance(functions, degree, var1, var2, deficit):
    """Returns `E f(u) f(v)`; by the deficit, so that it has the latter's derivatives."""
    variances = _variance(functions, degree, var1) + _variance(functions, degree, var2)
    return 0.5 * variances - _deficit(functions, degree, var1, var2, deficit)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _variance(functions, degree, var):
    return _mean(lambda u: functions[0](u) ** 2, degree, var)


@_variance.defjvp
def _variance_jvp(functions, degree, primals, tangents):
    (var,), (dvar,) = primals, tangents
    f, df = _with_derivative(functions)[:2]
    slope = _mean(lambda u: f(u) * df(u) * u, degree, var) * reciprocal(var)
    return _variance(functions, degree, var), slope * dvar


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _deficit(functions, degree, var1, var2, deficit):
    return _pair_mean(lambda u, v: 0.5 * (functions[0](u) - functions[0](v)) ** 2, degree, var1, var2, deficit)


@_deficit.defjvp
def _deficit_jvp(functions, degree, primals, tangents):
    # E f'(u) f'(v) is the derivative in the deficit. Scaling u (at a fixed correlation) moves the deficit by var1 - K.
    var1, var2, deficit = primals
    dvar1, dvar2, ddeficit = tangents
    functions = _with_derivative(functions)
    f, df = functions[:2]
    dot = _covariance(functions[1:], degree, *primals)
    scaling1 = _pair_mean(lambda u, v: (f(u) - f(v)) * df(u) * u, degree, *primals)
    scaling2 = _pair_mean(lambda u, v: (f(v) - f(u)) * df(v) * v, degree, *primals)
    half_difference = 0.5 * (var1 - var2)
    slope1 = 0.5 * reciprocal(var1) * (scaling1 - dot * (deficit + half_difference))
    slope2 = 0.5 * reciprocal(var2) * (scaling2 - dot * (deficit - half_difference))
    return _deficit(functions, degree, *primals), dot * ddeficit + slope1 * dvar1 + slope2 * dvar2


def _mean(integrand, degree, var):
    """Returns the mean of `integrand(u)` over `u` with this variance."""
    nodes, weights = _nodes(degree)
    std = _safe_sqrt(var)
    return _weighted_sum(lambda x: integrand(std * x), nodes, weights, var)


def _pair_mean(integrand, degree, var1, var2, deficit):
    """Returns the mean of `integrand(u, v)` over `u`, `v` with these variances and deficit."""
    nodes, weights = _nodes(degree)
    std1, std2 = _safe_sqrt(var1), _safe_sqrt(var2)
    scale = std1 * std2
    has_scale = scale > 0
    cosine_deficit = (deficit - 0.5 * (std1 - std2) ** 2) / jnp.where(has_scale, scale, 1)
    cosine_deficit = jnp.where(has_scale, jnp.clip(cosine_deficit, 0, 2), 1)
    cos, sin = _safe_sqrt(1 - 0.5 * cosine_deficit), _safe_sqrt(0.5 * cosine_deficit)  # of half the angle of u and v

    def integrand_at(node):
        x, y = node
        return integrand(std1 * (cos * x + sin * y), std2 * (cos * x - sin * y))

    pairs = np.stack([np.repeat(nodes, degree), np.tile(nodes, degree)], axis=1)
    return _weighted_sum(integrand_at, pairs, np.outer(weights, weights).ravel(), deficit)


def _weighted_sum(integrand, nodes, weights, like):
    """Sums one node at a time, so that memory does not grow with their number."""

    def add(total, node_and_weight):
        node, weight = node_and_weight
        return total + weight * jnp.asarray(integrand(node), like.dtype), None

    xs = jnp.asarray(nodes, like.dtype), jnp.asarray(weights, like.dtype)
    return jax.lax.scan(add, jnp.zeros_like(like), xs)[0]


@lru_cache
def _nodes(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and weights of the Gauss quadrature for the standard normal distribution."""
    if not isinstance(degree, int | np.integer) or degree < 1:
        raise ValueError(f"The degree `deg` of the quadrature should be a positive integer, got {degree!r}.")
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    if not np.isfinite(weights).all():
        raise ValueError(f"The quadrature of degree `deg={degree}` overflows: choose a smaller degree, e.g. 100.")
    return nodes, weights / math.sqrt(2 * math.pi)


@lru_cache
def _derivative(fn: ScalarFunction) -> ScalarFunction:
    """Returns the derivative of an elementwise function."""

    def derivative(x):
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]

    return derivative


def _with_derivative(functions):
    return functions if len(functions) > 1 else (*functions, _derivative(functions[0]))


def _safe_sqrt(x):
    """Returns the square root, with the derivative at 0 defined as 0."""
    is_positive = x > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1)), 0)


def _map_scalars(name, fn, *arguments):
    """Maps a function of scalars over arrays."""
    result = jnp.vectorize(fn)(*arguments)
    if result.shape != arguments[0].shape:
        raise ValueError(
            f"{name} should map scalars to a scalar, but it returned an array of shape "
            f"{result.shape[arguments[0].ndim :]} for scalar arguments."
        )
    return result.astype(arguments[0].dtype)


def _check_function(name, fn):
    if not callable(fn):
        raise TypeError(f"{name} should be a function, got {fn!r}.")
