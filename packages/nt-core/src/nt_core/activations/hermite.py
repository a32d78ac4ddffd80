"""Polynomials, by their expansions in Hermite polynomials.

With `p_l(q) = E f^(l)(u) / sqrt(l!)` for `u ~ N(0, q)`, itself a polynomial, `E f(u) f(v)` is the sum over `l` of
`p_l(var1) p_l(var2) K^l`. There is no square root in it: derivatives are exact everywhere, also at zero variance.
docs/numerics.md derives the deficit, a sum without cancellation.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nt_core.activations.base import Activation, Scalar, activation, cast, static

# The coefficients of all `p_l`: that of `q^i` in `p_l` is at `(l, i)`. What is zero may be missing.
Expansion = dict[tuple[int, int], Scalar]


def expansion(coefficients: Sequence[Scalar]) -> Expansion:
    """Returns the expansion of a polynomial, constant coefficient first."""
    return {
        (n - 2 * i, i): coefficient * _weight(n, i)
        for n, coefficient in enumerate(coefficients)
        for i in range(n // 2 + 1)
    }


def power(degree: int) -> Expansion:
    """Returns the expansion of `x^degree`."""
    return {(degree - 2 * i, i): _weight(degree, i) for i in range(degree // 2 + 1)}


def _weight(n: int, i: int) -> float:
    """The factor of `q^i` in `p_l`, with `l = n - 2 i`, for `f(x) = x^n`."""
    return (math.factorial(n) // (2**i * math.factorial(i))) / math.sqrt(math.factorial(n - 2 * i))


class Series(Activation):
    """What is given by an expansion. The dual costs some `degree^2 / 2` products for each pair."""

    def expansion(self) -> Expansion:
        """Returns the coefficients of all `p_l`."""
        raise NotImplementedError

    def variance(self, var):
        return series_variance(self.expansion(), var)

    def dual(self, var1, var2, deficit):
        series = self.expansion()
        return series_deficit(series, var1, var2, deficit), series_factor(series, var1, var2, deficit)

    def covariance(self, var1, var2, deficit):
        return series_covariance(self.expansion(), var1, var2, deficit)


@activation
class Polynomial(Series):
    """`f(x) = coefficients[0] + coefficients[1] x + coefficients[2] x^2 + ...`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Polynomial
      >>> one = jnp.ones(())
      >>> deficit, dot = Polynomial((0., 1., 2.)).dual(one, one, one)  # independent: E f(u) f(v) = 4, E f'(u) f'(v) = 1
      >>> print(Polynomial((0., 1., 2.)).variance(one) - deficit, dot)
      4.0 1.0
    """

    coefficients: tuple[Scalar, ...]

    def expansion(self):
        return expansion(self.coefficients)


@activation
class Monomial(Series):
    """`f(x) = x^degree`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Monomial
      >>> print(Monomial(3).variance(jnp.ones(())))  # E u^6
      15.0
    """

    degree: int = static()

    def expansion(self):
        return power(self.degree)


@activation
class Hermite(Series):
    """The covariance to the power `degree`.

    That is the dual of the normalized Hermite polynomial, `He_degree(x) / sqrt(degree!)`, of inputs of variance 1; and
    for other variances `q`, of `q^(degree / 2)` times it at `x / sqrt(q)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Hermite
      >>> one = jnp.ones(())
      >>> deficit, dot = Hermite(3).dual(one, one, 0.5 * one)
      >>> print(1 - deficit, dot)
      0.125 0.75
    """

    degree: int = static()

    def expansion(self):
        return {(self.degree, 0): 1.0}


def series_variance(series: Expansion, var: jax.Array) -> jax.Array:
    """Returns `E f(u)^2`."""
    powers = _powers(var, _degree(series))
    total = jnp.zeros_like(var)
    for l in _orders(series):
        p = _evaluate(series, l, powers)
        total = total + p * p * powers[l]
    return total


def series_covariance(series: Expansion, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> jax.Array:
    """Returns `E f(u) f(v)`."""
    terms = _terms(series, var1, var2, deficit)
    return sum((both * powers[l] for l, both, powers in terms), jnp.zeros_like(deficit))


def series_factor(series: Expansion, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> jax.Array:
    """Returns `E f'(u) f'(v)`."""
    terms = _terms(series, var1, var2, deficit)
    return sum((l * both * powers[l - 1] for l, both, powers in terms if l > 0), jnp.zeros_like(deficit))


def _terms(series, var1, var2, deficit):
    """For each order `l`: it, `p_l(var1) p_l(var2)`, and all powers of the covariance."""
    degree = _degree(series)
    powers = _powers(0.5 * (var1 + var2) - deficit, degree)
    powers1, powers2 = _powers(var1, degree), _powers(var2, degree)
    return [(l, _evaluate(series, l, powers1) * _evaluate(series, l, powers2), powers) for l in _orders(series)]


def series_deficit(series: Expansion, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> jax.Array:
    """Returns the deficit after `f`."""
    degree = _degree(series)
    mean, half_difference = 0.5 * (var1 + var2), 0.5 * (var1 - var2)
    square = half_difference * half_difference
    quotients, excess = _quotients(mean, square, degree)
    missing = _missing(mean, deficit, degree)
    powers1, powers2 = _powers(var1, degree), _powers(var2, degree)
    total = jnp.zeros_like(deficit)
    for l in _orders(series):
        both = _evaluate(series, l, powers1) * _evaluate(series, l, powers2)
        slopes = _evaluate(series, l, quotients) * _evaluate(series, l, quotients[l:])
        total = total + both * (excess[l] + missing[l]) + 2 * square * slopes
    return total


def _quotients(mean, square, degree):
    """Returns `(var1^k - var2^k) / (var1 - var2)`, and the mean of `var1^k` and `var2^k` less `mean^k`, for all `k`."""
    quotients, excess = [jnp.zeros_like(mean)], [jnp.zeros_like(mean)]
    mean_of_powers = jnp.ones_like(mean)
    for _ in range(degree):
        excess.append(mean * excess[-1] + square * quotients[-1])
        quotient = mean * quotients[-1] + mean_of_powers
        mean_of_powers = mean * mean_of_powers + square * quotients[-1]
        quotients.append(quotient)
    return quotients, excess


def _missing(mean, deficit, degree):
    """Returns `mean^k - K^k` for all `k`."""
    covariance = mean - deficit
    of_squares = deficit * (mean + covariance)  # mean^2 - K^2
    missing, power = [jnp.zeros_like(mean), deficit], jnp.ones_like(mean)
    for _ in range(2, degree + 1):
        missing.append(mean * mean * missing[-2] + power * of_squares)
        power = power * covariance
    return missing


def _powers(x, degree):
    powers = [jnp.ones_like(x)]
    for _ in range(degree):
        powers.append(powers[-1] * x)
    return powers


def _evaluate(series, l, powers):
    """`p_l`, of the powers of its argument."""
    terms = [cast(series[l, i], powers[0]) * powers[i] for m, i in series if m == l]
    return sum(terms[1:], terms[0])


def _orders(series):
    return sorted({l for l, _ in series})


def _degree(series):
    return max((l + i for l, i in series), default=0)
