"""The Hermite coefficients of a function for every variance: polynomials, one for each octave of it."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations.arcs import safe_sqrt
from nt_core.activations.coefficients import (
    DOUBLE_NOISE,
    HermiteCoefficients,
    absolute_value_coefficients,
    cusp_at_zero,
    graded_hermite_functions,
    hermite_coefficients,
    known_values,
    no_cusp,
    number_of_terms,
)
from nt_core.activations.groups import group_columns

if TYPE_CHECKING:
    from nt_core.activations.numerical import ElementwiseNumerical

# For each precision the degree of the polynomials, and the octaves: the power of 2 at which they begin, below which a
# smooth function is linear up to rounding, and their number. Where they end, coefficients no longer tell a function.
_SHAPES = {"float32": (8, -24, 54), "float64": (17, -52, 82)}
# Quadrature on either side of 0: panels, and nodes in each. Kinks away from 0 fall into panels.
_PANELS, _NODES = 96, 12
# Exponents that differ less from whole numbers are whole.
_NEARLY = 1e-2


class CoefficientTable(NamedTuple):
    """What csrc/duals_tabulated.h reads.

    Attributes:
      numbers: for each octave and power the columns, which are the coefficients without those of a cusp, half the mean
        square of the function, of the even and the odd part of what is beyond the terms the roots and the orders, and
        `beyond` and `beyond_slope` of a `Cusp`; then for each octave how many terms count; then the function at 0, and
        for each coefficient the power of the deviation that it (without that value) is in proportion to below the first
        octave; then the cusp, 0 without one, and its coefficients at a variance of 1. If there are groups, their
        end and orders, the coefficients of the cusp and, from the first octave that has them on, for each octave and
        power the columns of `GroupColumns`.
      terms: how many coefficients there are, of the orders 0, 1, start, start + step and so on: of most functions, the
        even or the odd part is linear.
      start: 2 or 3.
      step: 1 or 2.
      degree: of the polynomials, whose argument goes from -1 to 1 in each octave.
      lowest: the first octave begins at 2 to this power.
      octaves: how many there are.
      groups: how many groups of orders there are beyond the terms.
      even_groups: how many of them, the first ones, are of even orders.
      first: the first octave with coefficients of groups, counted from the lowest one.
      begin: the octave from which on groups are wanted, by one sample of a pair at least.
    """

    numbers: np.ndarray
    terms: int
    start: int
    step: int
    degree: int
    lowest: int
    octaves: int
    groups: int
    even_groups: int
    first: int
    begin: int

    @property
    def cusp(self) -> float:
        return float(self.numbers[self._start_of_cusp])

    @property
    def coefficients_of_cusp(self) -> np.ndarray:
        return self.numbers[self._start_of_cusp + 1 :][: self.terms]

    @property
    def orders_of_groups(self) -> np.ndarray:
        return self.numbers[self._start_of_groups + 1 :][: self.groups]

    @property
    def least_variance_of_groups(self) -> float:
        return 2.0 ** (self.lowest + self.begin)

    @property
    def end_of_groups(self) -> int:
        return int(self.numbers[self._start_of_groups])

    @property
    def cusps_of_groups(self) -> np.ndarray:
        return self.numbers[self._start_of_groups + 1 + self.groups :][: self.groups]

    def coefficients(self, variances: Array) -> Array:
        """Returns what `prepare` in csrc/duals_tabulated.h computes for some variances, `(terms + 6, *shape)`.

        The coefficients without the cusp's, then of the rest the roots and the orders, then `beyond` and `beyond_slope`
        of the cusp.
        """
        at_zero, *exponents = self.numbers[self._end_of_polynomials + self.octaves :][: self.terms + 1]
        values = self._columns(variances, slice(self.terms), [at_zero, *[0] * (self.terms - 1)], exponents)
        return jnp.concatenate([values, self.rest_of(variances)])

    def rest_of(self, variances: Array) -> Array:
        """Returns the last six of `coefficients`."""
        return self._columns(variances, slice(self.terms + 1, None), [0] * 6, [1, 1, 0, 0, 2, 2])

    def _columns(self, variances: Array, which: slice, at_zero: list[float], exponents: list[float]) -> Array:
        """Returns some columns. Below the first octave they grow from `at_zero` with powers of the deviation."""
        lowest = 2.0**self.lowest
        octave, place = self._place(variances)
        columns = self.numbers[: self._end_of_polynomials].reshape(self.octaves, self.degree + 1, self.terms + 7)
        found = _polynomials(columns[:, :, which], octave, jnp.where(variances < lowest, -1, place))
        offsets, powers = (
            np.reshape(np.array(x, variances.dtype), (-1, *[1] * variances.ndim)) for x in (at_zero, exponents)
        )
        # The derivative of 0 to the power of 0 is none.
        grows, ratio = powers != 0, jnp.minimum(safe_sqrt(variances / lowest), 1)[None]
        found = offsets + (found - offsets) * jnp.where(grows, ratio ** np.where(grows, powers, 1), 1)
        return jnp.where(variances[None] < 2.0 ** (self.lowest + self.octaves), found, jnp.nan)

    def terms_that_count(self, variances: Array) -> Array:
        """Returns how many terms count at some variances."""
        counts = self.numbers[self._end_of_polynomials :][: self.octaves]
        return jnp.take(jnp.asarray(counts, jnp.int32), self._octave(variances))

    def has_groups(self, var1: Array, var2: Array) -> Array:
        """Whether pairs with some variances are added up in groups."""
        smaller, larger = jnp.minimum(var1, var2), jnp.maximum(var1, var2)
        first, begin, end = (2.0 ** (self.lowest + octave) for octave in (self.first, self.begin, self.octaves))
        return (smaller >= first) & (larger >= begin) & (larger < end)

    def groups_of(self, variances: Array) -> Array:
        """Returns `GroupColumns.columns` for some variances, `(groups + 6, *shape)`, 0 below the first octave."""
        columns = self.numbers[self._start_of_groups + 1 + 2 * self.groups :]
        columns = columns.reshape(self.octaves - self.first, self.degree + 1, self.groups + 6)
        octave, place = self._place(variances)
        found = _polynomials(columns, jnp.maximum(octave - self.first, 0), place)
        return jnp.where(variances[None] >= 2.0 ** (self.lowest + self.first), found, 0)

    @property
    def _end_of_polynomials(self) -> int:
        return self.octaves * (self.degree + 1) * (self.terms + 7)

    @property
    def _start_of_cusp(self) -> int:
        return self._end_of_polynomials + self.octaves + 1 + self.terms

    @property
    def _start_of_groups(self) -> int:
        return self._start_of_cusp + 1 + self.terms

    def _octave(self, variances: Array) -> Array:
        return jnp.clip(jnp.frexp(variances)[1] - 1 - self.lowest, 0, self.octaves - 1)

    def _place(self, variances: Array) -> tuple[Array, Array]:
        """Returns the octaves of variances, and where they are in these, from -1 to 1."""
        exponent = lax.stop_gradient(jnp.frexp(variances)[1])
        return self._octave(variances), jnp.ldexp(variances, 2 - exponent) - 3


def _polynomials(columns: np.ndarray, octave: Array, place: Array) -> Array:
    """Returns the values of polynomials, `(columns, *shape)`, with coefficients `(octaves, powers, columns)`."""
    with np.errstate(over="ignore"):  # of functions that grow fast, at variances that nobody has
        by_power = jnp.asarray(columns.T.astype(place.dtype))
    found = jnp.take(by_power[:, -1], octave, 1)
    for power in range(columns.shape[1] - 2, -1, -1):
        found = found * place[None] + jnp.take(by_power[:, power], octave, 1)
    return found


@lru_cache(maxsize=32)
def coefficient_table(activation: "ElementwiseNumerical", precision: str) -> CoefficientTable:
    """Returns the coefficients of a function, as `ElementwiseNumerical` has them at one variance.

    Args:
      activation: the function. Its values at some 10^6 points are computed, once, and those of functions with 100
        coefficients or more at some 10^6 further ones.
      precision: the name of the type that they are for. The table itself is in double precision.

    Raises:
      TracedFunction: the function's values depend on what is being traced.

    >>> import jax.numpy as jnp
    >>> from nt_core.activations import ElementwiseNumerical
    >>> table = coefficient_table(ElementwiseNumerical(jnp.tanh, None, 25), "float32")
    >>> table.terms, table.octaves, table.numbers.size
    (26, 54, 16146)
    >>> coefficient_table(ElementwiseNumerical(jnp.tanh, None, 125), "float32").groups
    48
    """
    terms = number_of_terms(activation.deg)
    degree, lowest, octaves = _SHAPES[precision]
    with np.errstate(all="ignore"):
        if not _is_linear_from(activation, lowest):  # its second derivative jumps at 0
            lowest, octaves = 2 * lowest, octaves - lowest
    points = np.cos(math.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    variances = np.ldexp(1.5 + 0.5 * points, lowest + np.arange(octaves)[:, None])
    with np.errstate(all="ignore"):  # functions may overflow at variances that nobody has
        of = _coefficients(activation, variances, terms)
        orders, columns, counts = _columns(of, float(np.finfo(precision).eps) / 4)
        groups = group_columns(activation, precision, variances, of)
    at_zero = known_values(activation, np.zeros(1))[0]
    powers = _to_powers(columns, points)
    exponents = _exponents(powers[0, :, : len(orders)], at_zero, orders)
    cusp = cusp_at_zero(activation) or 0.0
    cusps = cusp * absolute_value_coefficients(terms)[orders]
    numbers = [powers.ravel(), counts.max(1), at_zero, exponents, [cusp], cusps]
    if groups is not None:
        numbers += [[groups.end], groups.orders, groups.cusps, _to_powers(groups.columns, points).ravel()]
    start, step = (int(orders[2]), int(orders[3] - orders[2])) if len(orders) > 3 else (2, 1)
    in_groups = (0, 0, 0, 0)
    if groups is not None:
        in_groups = len(groups.orders), groups.n_even, groups.first, groups.begin
    return CoefficientTable(np.concatenate(numbers), len(orders), start, step, degree, lowest, octaves, *in_groups)


def _to_powers(columns: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns the polynomials with some values at Chebyshev's points.

    Args:
      columns: the values, `(columns, octaves, points)`.
      points: from -1 to 1.

    Returns:
      Coefficients, `(octaves, powers, columns)`.
    """
    n, degree = len(points), len(points) - 1
    # Chebyshev's coefficients first: they are small where those of powers would only cancel.
    polynomials = np.polynomial.chebyshev.chebvander(points, degree) * np.where(np.arange(n) > 0, 2, 1)
    chebyshev = np.einsum("ik,coi->kco", polynomials / n, columns)
    to_powers = np.zeros((n, n))
    for k in range(n):
        to_powers[: k + 1, k] = np.polynomial.chebyshev.cheb2poly(np.eye(k + 1)[k])
    return np.einsum("pk,kco->opc", to_powers, chebyshev)


def _is_linear_from(activation: "ElementwiseNumerical", lowest: int) -> bool:
    """Whether the mean slope no longer changes from the variance 2^lowest down, but for rounding."""
    variances = np.ldexp(1.0, np.array([lowest, 2 * lowest]))
    linear = _coefficients(activation, variances, 2).values[1] / np.sqrt(variances)
    return not abs(linear[1] - linear[0]) > 2 ** (0.75 * lowest) * np.abs(linear).max()


def _columns(of: HermiteCoefficients, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the orders of the terms, the columns, `(columns, octaves, points)`, and the counts."""
    even, odd = of.rest
    cusp = of.cusp or no_cusp(of.mean_square, len(of.values))
    of_cusp = np.multiply.outer(cusp.coefficients, cusp.std)
    kept = _orders_that_are_there(of.values, of.mean_square)
    orders = kept[:, None, None]
    # With the closed form of the cusp, what is left of the terms is to be added.
    squares = np.abs(of.values * (of.values + 2 * of_cusp))[kept]
    rest = even.root**2 + odd.root**2 + np.abs(2 * cusp.std * cusp.beyond)
    counts = _terms_that_count(squares, rest, of.mean_square, tolerance)
    rest = even.root**2 * even.order + odd.root**2 * odd.order + np.abs(2 * cusp.std * cusp.beyond_slope)
    counts_of_slope = _terms_that_count(orders * squares, rest, of.slope_square, tolerance)
    values = of.values[kept]
    values = np.where(_is_noise(values, of.mean_square)[:, None, None], 0, values)
    columns = [*values, 0.5 * of.mean_square, even.root, odd.root, even.order, odd.order]
    noise = DOUBLE_NOISE * np.sqrt(of.mean_square)
    columns += [np.where(np.abs(x) > noise, x, 0) for x in (cusp.beyond, cusp.beyond_slope)]
    return kept, np.stack(columns), np.maximum(counts, counts_of_slope)


def _coefficients(activation: "ElementwiseNumerical", variances: np.ndarray, terms: int) -> HermiteCoefficients:
    quadrature = graded_hermite_functions(terms, _PANELS, _NODES)
    values, slopes = known_values(activation, np.multiply.outer(quadrature.nodes, np.sqrt(variances)))
    return hermite_coefficients(np, quadrature, variances, values, slopes, cusp_at_zero(activation))


def share_beyond_terms(activation: "ElementwiseNumerical", variances: tuple[float, ...]) -> np.ndarray:
    """Returns which share of the mean square of the function is beyond its terms, for each variance.

    Raises:
      TracedFunction: the function's values depend on what is being traced.
    """
    with np.errstate(all="ignore"):
        of = _coefficients(activation, np.array(variances), number_of_terms(activation.deg))
        cusp = of.cusp or no_cusp(of.mean_square, 0)
        beyond = sum(rest.root**2 for rest in of.rest) + np.abs(2 * cusp.std * cusp.beyond)
        return beyond / np.where(of.mean_square == 0, 1, of.mean_square)


def _orders_that_are_there(a: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Returns the orders of terms: all, or beyond the linear one the even or the odd ones, if the others are noise."""
    is_noise = _is_noise(a, mean_square)
    for start in (2, 3):
        if len(a) > start + 2 and is_noise[5 - start :: 2].all():
            return np.array([0, 1, *range(start, len(a), 2)])
    return np.arange(len(a))


def _is_noise(a: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Which coefficients are zero at every variance."""
    return np.all(np.abs(a) <= DOUBLE_NOISE * np.sqrt(mean_square), axis=(1, 2))


def _exponents(powers: np.ndarray, at_zero: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Returns which powers of the deviation the coefficients are in proportion to, in the first octave.

    The k-th one of a smooth function is in proportion to its k-th power, and with kinks at 0 to the first.
    """
    signs = (-1.0) ** np.arange(len(powers))
    first, last = signs @ powers, powers.sum(0)
    first[0], last[0] = first[0] - at_zero[0], last[0] - at_zero[0]
    is_known = np.minimum(np.abs(first), np.abs(last)) > DOUBLE_NOISE * np.abs(powers).max()
    ratios = np.where(is_known, np.abs(last), 1) / np.where(is_known, np.abs(first), 1)
    exponents = np.where(is_known, 2 * np.log2(ratios), np.maximum(orders, 1))
    whole = np.round(exponents)
    return np.where(np.abs(exponents - whole) < _NEARLY, whole, exponents)


def _terms_that_count(squares: np.ndarray, rest: np.ndarray, total: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns after how many terms what is left of a sum is below the tolerance; two at least."""
    left = np.cumsum(squares[::-1], 0)[::-1] + rest
    return np.maximum((~(left <= tolerance * total)).sum(0), 2)
