"""The Hermite coefficients of a function at some variances, what is beyond them, and sums over both."""

import math
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations.elementwise import ScalarFunction
from nt_core.tracing import evaluate_now, is_traced

if TYPE_CHECKING:
    from nt_core.activations.numerical import ElementwiseNumerical

# Beyond, polynomials would leave the range of numbers.
_MAX_TERMS = 300
# What is below this is noise, in units of the precision; and in double precision.
_NOISE = 2**6
DOUBLE_NOISE = _NOISE * float(np.finfo(float).eps)
# A function has jumps if its terms alone have so many times the mean square of the derivative, which is the most.
_JUMPS = 1.01
# Points beside 0 that tell the slopes on either side. They must not differ by more than this share of the slopes.
_NEAR_ZERO, _SAME_SLOPE = np.array([-(2.0**-90), -(2.0**-100), 2.0**-100, 2.0**-90]), 2.0**-10
# The relative error of quadrature, whose nodes and weights are computed in double precision.
_QUADRATURE = 1e-12
# Of graded quadrature, the width of the first panel, and the growth of those after it.
_FIRST_PANEL, _GROWTH = 2.0**-18, 1.25
# For what is beyond the terms, see `sum_of_rest`: log v^3 at Gauss-Legendre nodes, and 3 v^2 times their weights.
_REST = [
    (3 * math.log(0.5 * (x + 1)), float(0.375 * (x + 1) ** 2 * weight))
    for x, weight in zip(*np.polynomial.legendre.leggauss(6), strict=True)
]


class Rest(NamedTuple):
    """What is beyond the terms, of the even or the odd part of a function without its cusp.

    Attributes:
      root: of its mean square.
      order: the mean order.
    """

    root: Any
    order: Any


class Cusp(NamedTuple):
    """What is of `|x|` in a function with a kink at 0.

    Attributes:
      coefficients: its Hermite coefficients at a variance of 1, `(terms,)`.
      std: the standard deviations, with which they grow.
      beyond: the sum, over the orders beyond the terms, of its coefficients at a variance of 1 times those of the rest
        of the function.
      beyond_slope: the sum of these products times their orders.
    """

    coefficients: Any
    std: Any
    beyond: Any
    beyond_slope: Any


def no_cusp(std: Any, n_terms: int) -> Cusp:
    """Returns the zeros that a smooth function has, in NumPy."""
    zeros = np.zeros_like(std)
    return Cusp(np.zeros(n_terms), zeros, zeros, zeros)


class Quadrature(NamedTuple):
    """For means over a standard normal variable.

    Attributes:
      nodes, weights: `(nodes,)`.
      products: of weights and Hermite polynomials, `(terms, nodes)`.
    """

    nodes: Any
    weights: Any
    products: Any


class HermiteCoefficients(NamedTuple):
    """Of a function at some variances.

    Attributes:
      values: its Hermite coefficients, `(terms, *shape)`, without those of its cusp.
      slopes: those of its derivative, without those of the cusp's.
      rest: of its even part, and of its odd part.
      mean_square: of the function.
      slope_square: the mean square of its derivative, times the variance.
      cusp: None if it has no kink at 0.
    """

    values: Any
    slopes: Any
    rest: list[Rest]
    mean_square: Any
    slope_square: Any
    cusp: Cusp | None = None


def hermite_coefficients(
    xp: ModuleType, quadrature: Quadrature, var: Any, values: Any, slopes: Any, cusp: Any
) -> HermiteCoefficients:
    """Returns the coefficients of a function by quadrature.

    Args:
      xp: `numpy` or `jax.numpy`.
      quadrature: of `hermite_functions`.
      var: the variances, `(*shape)`.
      values, slopes: the function and its derivative at the nodes for these variances, `(nodes, *shape)`.
      cusp: of `cusp_at_zero`.
    """
    if cusp is None:
        return _without_cusp(xp, quadrature, var, values, slopes)
    std, nodes = _root(xp, var), quadrature.nodes.reshape(-1, *[1] * var.ndim)
    size, sign = cusp * xp.abs(nodes), cusp * xp.sign(nodes)
    size_here = size * std[None]
    others = _without_cusp(xp, quadrature, var, values - size_here, slopes - sign)
    orders = np.arange(len(others.values), dtype=values.dtype).reshape(-1, *[1] * var.ndim)
    coefficients = cusp * xp.asarray(absolute_value_coefficients(len(orders)), values.dtype).reshape(orders.shape)
    # The means of products of both, and of their derivatives.
    both = xp.tensordot(quadrature.weights, (values - size_here) * size, 1)
    both_slopes = std * xp.tensordot(quadrature.weights, (slopes - sign) * sign, 1)
    products = others.values * coefficients
    return HermiteCoefficients(
        others.values,
        others.slopes,
        others.rest,
        others.mean_square + 2 * std * both + cusp**2 * var,
        others.slope_square + 2 * std * both_slopes + cusp**2 * var,
        Cusp(coefficients.ravel(), std, both - xp.sum(products, 0), both_slopes - xp.sum(orders * products, 0)),
    )


def _without_cusp(xp: ModuleType, quadrature: Quadrature, var: Any, values: Any, slopes: Any) -> HermiteCoefficients:
    _, weights, products = quadrature
    noise = _NOISE * float(jnp.finfo(values.dtype).eps)
    orders = np.arange(len(products), dtype=values.dtype).reshape(-1, *[1] * var.ndim)
    std, roots = _root(xp, var), np.sqrt(orders[1:])
    mean_square = xp.tensordot(weights, values**2, 1)
    slope_square = var * xp.tensordot(weights, slopes**2, 1)
    constant = lax.stop_gradient if xp is jnp else np.asarray
    mean = xp.tensordot(products[:1], values, 1)
    values = values - constant(mean)  # beyond the first term, errors are in proportion to how much the function varies
    # The derivative has the coefficients sqrt(k + 1) a_(k + 1) / std. By quadrature those of the derivative have more
    # digits where the function varies less than its size: the values are rounded. They lack what jumps add, and are
    # poor where it has kinks away from 0, so they are taken where those of the values agree. A function that jumps has
    # terms of more slope than the derivative, which then stays as it is. JAX differentiates both as they are by
    # quadrature.
    a, of_slopes = xp.tensordot(products[1:], values, 1), xp.tensordot(products[:-1], slopes, 1)
    by_slopes = std[None] / roots * of_slopes
    tolerance = noise * _root(xp, mean_square) + _QUADRATURE * _root(xp, slope_square)
    agree = xp.max(xp.abs(by_slopes - a), 0) <= tolerance
    takes_slopes = ((agree & (slope_square <= mean_square)) | (std == 0))[None]
    keeps_slopes = takes_slopes | (xp.sum(orders[1:] * a**2, 0) > _JUMPS * slope_square)[None]
    by_values = roots * a / xp.where(keeps_slopes, 1, std[None])
    of_slopes = of_slopes + constant(xp.where(keeps_slopes, 0, by_values - of_slopes))
    terms = xp.concatenate([mean, a + constant(xp.where(takes_slopes, by_slopes - a, 0))])
    # The rest is beyond the terms of the values, also where others are taken: by one quadrature nothing else is left.
    squares = xp.concatenate([xp.zeros_like(mean), a**2])

    def rest(parity: int) -> Rest:
        sign = 1 - 2 * parity
        part, slope = 0.5 * (values + sign * values[::-1]), 0.5 * (slopes - sign * slopes[::-1])
        missing = xp.tensordot(weights, part**2, 1) - xp.sum(squares[parity::2], 0)
        missing_slope = var * xp.tensordot(weights, slope**2, 1) - xp.sum((orders * squares)[parity::2], 0)
        is_missing = missing > noise * mean_square
        order = missing_slope / xp.where(is_missing, missing, 1)
        order = xp.where(is_missing, xp.maximum(order, len(products)), len(products))
        return Rest(_root(xp, xp.where(is_missing, missing, 0)), order)

    of_slopes = xp.concatenate([of_slopes, xp.zeros_like(a[:1])])
    return HermiteCoefficients(terms, of_slopes, [rest(0), rest(1)], mean_square, slope_square)


def _root(xp: ModuleType, x: Any) -> Any:
    """As `safe_sqrt`."""
    is_positive = x > 0
    return xp.where(is_positive, xp.sqrt(xp.where(is_positive, x, 1)), 0)


class Sums(NamedTuple):
    """Sums over terms, from the first one on.

    Attributes:
      power: of the correlation, by which the next slopes are multiplied.
      one_minus_power: 1 less the power that belongs to the next coefficients.
      value: the sum of `(a - b)^2 / 2 + a b (1 - c^k)`.
      factor: the sum of slopes times powers.
    """

    power: Array
    one_minus_power: Array
    value: Array
    factor: Array

    def plus(self, square: Array, both: Array, slopes: Array) -> "Sums":
        """Adds the square of a difference of coefficients, their product, and that of slopes."""
        value = self.value + (0.5 * square + both * self.one_minus_power)
        return self._replace(value=value, factor=self.factor + slopes * self.power)

    def then(self, c: Array, w: Array) -> "Sums":
        """Goes on to orders that have `c = 1 - w` more among their powers."""
        return self._replace(power=c * self.power, one_minus_power=c * self.one_minus_power + w)


class PairOfRests(NamedTuple):
    """What is beyond the terms of a pair, with `a` and `b` the coefficients of both, less what is of the cusp.

    Attributes:
      apart: the sum of `(a - b)^2 / 2`.
      both: that of `a b`.
      slope: that of `k a b`.
      order: the mean order, by the latter two.
    """

    apart: Array
    both: Array
    slope: Array
    order: Array


def rest_of_pair(xp: ModuleType, rest1: Rest, rest2: Rest, cusps: tuple[Cusp, Cusp] | None) -> PairOfRests:
    """Returns what is beyond the terms of one parity; cusps are of the even one."""
    both, order = rest1.root * rest2.root, 0.5 * (rest1.order + rest2.order)
    apart, slope = 0.5 * (rest1.root - rest2.root) ** 2, order * both
    if cusps is None:
        return PairOfRests(apart, both, slope, order)
    first, second = cusps
    apart = apart + (first.std - second.std) * (first.beyond - second.beyond)
    both = both + (first.std * second.beyond + first.beyond * second.std)
    slope = slope + (first.std * second.beyond_slope + first.beyond_slope * second.std)
    # Of less, second derivatives of the quotient would overflow.
    is_there = xp.abs(both) > float(jnp.finfo(both.dtype).tiny) ** 0.5
    return PairOfRests(apart, both, slope, xp.where(is_there, slope / xp.where(is_there, both, 1), 0))


def sum_of_rest(xp: ModuleType, parity: int, n_terms: int, rests: PairOfRests, w: Any) -> tuple[Any, Any]:
    """Returns the share of the rest in the deficit, and that in the factor times the standard deviations.

    Terms in proportion to a power of their order k, for k from k0 on: with v = (k / k0)^(-1 / (3 spread)) they are the
    integral of 3 v^2 c^k over v from 0 to 1, and their mean order is k0 / (1 - spread).

    Args:
      xp: `numpy` or `jax.numpy`.
      parity: of the orders.
      n_terms: the order after that of the last term, or of the last group.
      rests: of the pair.
      w: 1 less the correlation.
    """
    is_negative = w > 1
    # An uncorrelated pair has no rest; the derivatives of powers stay finite.
    away = xp.minimum(xp.where(is_negative, 2 - w, w), 1 - float(jnp.finfo(w.dtype).eps))
    log = xp.log1p(-away)
    least = n_terms - 1 + parity  # every second order, each in the middle of its interval
    mean_order = xp.maximum(rests.order, n_terms)
    spread = 1 - least / mean_order
    relative = [xp.exp(-spread * at) for at, _ in _REST]
    scale = mean_order / sum(share * order for (_, share), order in zip(_REST, relative, strict=True))
    one_minus_power, slope = xp.zeros_like(w), xp.zeros_like(w)
    for (_, share), order in zip(_REST, relative, strict=True):
        order = scale * order  # their mean is the mean order, whatever few nodes make of the integral
        one_minus_power = one_minus_power - share * xp.expm1(order * log)
        slope = slope + share * order * xp.exp((order - 1) * log)
    slope = rests.slope / mean_order * slope
    if parity == 1:
        one_minus_power = xp.where(is_negative, 2 - one_minus_power, one_minus_power)
    else:
        slope = xp.where(is_negative, -slope, slope)
    return rests.apart + rests.both * one_minus_power, slope


def evaluate(fn: ScalarFunction, x: Array) -> Array:
    """Returns the function of an array, in the precision of that, whatever type it returns."""
    return jnp.broadcast_to(jnp.asarray(fn(x), x.dtype), x.shape)


def number_of_terms(degree: int) -> int:
    """Returns how many coefficients a degree stands for."""
    return min(2 * int(degree), _MAX_TERMS)


def last_node(n_terms: int) -> float:
    """Beyond, the last polynomial no longer oscillates."""
    return 2 * math.sqrt(n_terms) + 8


@lru_cache
def hermite_functions(n_terms: int, n_panels: int, n_nodes: int) -> Quadrature:
    """Returns nodes, weights and Hermite polynomials, in double precision.

    Args:
      n_terms: how many polynomials.
      n_panels, n_nodes: of Gauss-Legendre quadrature on either side of 0, so that kinks there do no harm.
    """
    return _half_line_quadrature(n_terms, np.linspace(0, last_node(n_terms), n_panels + 1), n_nodes)


@lru_cache
def graded_hermite_functions(n_terms: int, n_panels: int, n_nodes: int) -> Quadrature:
    """As `hermite_functions`, with more and smaller panels beside 0: large variances compress functions."""
    end = last_node(n_terms)
    return _half_line_quadrature(n_terms, grade(end, end / n_panels), n_nodes)


def _half_line_quadrature(n_terms: int, edges: np.ndarray, n_nodes: int) -> Quadrature:
    """Returns that by Gauss-Legendre quadrature in panels with these edges, and in their reflections."""
    at, widths = np.polynomial.legendre.leggauss(n_nodes)
    half_width = 0.5 * np.diff(edges)[:, None]
    half, half_weights = (half_width * (at + 1) + edges[:-1, None]).ravel(), (half_width * widths).ravel()
    nodes, widths = np.concatenate([-half[::-1], half]), np.concatenate([half_weights[::-1], half_weights])
    root = np.exp(-(nodes**2) / 4) / (2 * math.pi) ** 0.25  # of the density: polynomials times it are bounded
    functions = [function for _, function in hermite_recursion(nodes, root, n_terms)]
    return Quadrature(nodes, widths * root**2, widths * root * np.stack(functions))


def grade(end: float, largest: float) -> np.ndarray:
    """Returns edges of panels from 0 to an end: the first ones grow in proportion to where they are."""
    edges = [0.0, _FIRST_PANEL]
    while edges[-1] * (_GROWTH - 1) < largest:
        edges.append(edges[-1] * _GROWTH)
    return np.concatenate([edges[:-1], np.linspace(edges[-1], end, math.ceil((end - edges[-1]) / largest) + 1)])


def hermite_recursion(nodes: np.ndarray, root: np.ndarray, n_terms: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the orders from 0 on and the orthonormal Hermite polynomials at nodes, times `root`."""
    last, function = np.zeros_like(nodes), root
    for k in range(n_terms):
        yield k, function
        last, function = function, (nodes * function - math.sqrt(k) * last) / math.sqrt(k + 1)


def cusp_at_zero(activation: "ElementwiseNumerical") -> Any:
    """Returns half of what the derivative of the function jumps by at 0: that much of `|x|` is in it.

    None if it does not jump, and what is traced if that is.
    """
    try:
        return _known_cusp(activation)
    except TracedFunction:
        return _half_of_jump(jnp, evaluate(derivative_of(activation), jnp.asarray(_NEAR_ZERO, float)))


@lru_cache
def _known_cusp(activation: "ElementwiseNumerical") -> float | None:
    return float(_half_of_jump(np, known_values(activation, _NEAR_ZERO)[1])) or None


def _half_of_jump(xp: ModuleType, slopes: Any) -> Any:
    far_left, left, right, far_right = slopes
    size = xp.abs(left) + xp.abs(right)
    has_limits = xp.abs(far_left - left) + xp.abs(far_right - right) <= _SAME_SLOPE * size
    is_jump = has_limits & (xp.abs(right - left) > _NOISE * float(jnp.finfo(slopes.dtype).eps) * size)
    return xp.where(is_jump, 0.5 * (right - left), 0)


@lru_cache
def absolute_value_coefficients(n_terms: int) -> np.ndarray:
    """Returns the Hermite coefficients of `|x|` at a variance of 1."""
    coefficients = np.zeros(n_terms)
    coefficients[0] = math.sqrt(2 / math.pi)
    for k in range(2, n_terms, 2):
        coefficients[k] = -(k - 3) / math.sqrt(k * (k - 1)) * coefficients[k - 2]
    return coefficients


class TracedFunction(Exception):
    """The values of a function are not known yet."""


def known_values(activation: "ElementwiseNumerical", x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the function and its derivative in double precision.

    Raises:
      TracedFunction: they depend on what is being traced.
    """
    return known_function(activation.fn, x), known_function(derivative_of(activation), x)


def known_function(fn: ScalarFunction, x: np.ndarray) -> np.ndarray:
    """Returns a function in double precision.

    Raises:
      TracedFunction: it depends on what is being traced.
    """
    with jax.enable_x64(True), evaluate_now():
        values = fn(jnp.asarray(x))
    if is_traced(values):
        raise TracedFunction
    return np.broadcast_to(np.asarray(values, float), x.shape)


def derivative_of(activation: "ElementwiseNumerical") -> ScalarFunction:
    """Returns the derivative of the function, that was given or is found by differentiation."""
    return _derivative(activation.fn) if activation.df is None else activation.df


@lru_cache
def _derivative(fn: ScalarFunction) -> ScalarFunction:
    """The same function object every time: others would compile again."""

    def derivative(x):
        return jax.jvp(lambda x: evaluate(fn, x), (x,), (jnp.ones_like(x),))[1]

    return derivative
