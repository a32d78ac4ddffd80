"""Any activation, by its Hermite coefficients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations.arcs import one_minus_correlation, safe_sqrt
from nt_core.activations.base import Activation, activation, static
from nt_core.activations.coefficients import (
    Cusp,
    HermiteCoefficients,
    Quadrature,
    Rest,
    Sums,
    TracedFunction,
    cusp_at_zero,
    derivative_of,
    evaluate,
    hermite_coefficients,
    hermite_functions,
    last_node,
    number_of_terms,
    rest_of_pair,
    sum_of_rest,
)
from nt_core.activations.elementwise import ScalarFunction, check_function
from nt_core.activations.relu import ABRelu
from nt_core.activations.tables import CoefficientTable, coefficient_table
from nt_core.evaluation.platform import is_gpu

# Terms in one turn of a loop. Carries pass through memory once in a turn: with few terms in it, that takes longer than
# the terms.
_TOGETHER = 20


@activation
class ElementwiseNumerical(Activation):
    """Any function `fn`, from its coefficients in the orthonormal Hermite polynomials, which quadrature gives.

    With `a_k` the coefficients at one variance and `b_k` those at the other, the covariance is `sum_k a_k b_k c^k` for
    a correlation of `c`. There are `2 deg` terms, 300 at most. What is beyond them is known at `c = 1` and `c = -1`,
    from the mean squares of `fn` and `df` and their even and odd parts, and is taken for terms that decay like a power
    of their order, with the mean order that is known. So polynomials of a degree below `2 deg` are exact, smooth
    functions converge quickly, and with kinks the variance and the factor of the tangent kernel of equal inputs are
    right. A kink at 0 is split off: that much of `|x|` has its closed form, and the terms are what is left of the sum.
    With `deg=50` or more, at large variances, orders beyond the terms are added up in groups:
    `nt_core.activations.groups`.

    The coefficients depend on one sample only; for a pair of samples `2 deg` terms are added, whatever `fn` costs.

    `fn` acts on arrays elementwise; `df` is its derivative, found by differentiation where it is None. Derivatives in a
    variance are defined as 0 at variance 0.

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
        check_function("fn", self.fn)
        if self.df is not None:
            check_function("df", self.df)
        if not isinstance(self.deg, int | np.integer) or self.deg < 1:
            raise ValueError(f"The degree `deg` of the quadrature should be a positive integer, got {self.deg!r}.")

    def variance(self, var):
        nodes, weights, _ = _quadrature(self.deg, var.dtype)
        return _mean(weights, evaluate(self.fn, _at(nodes, var)) ** 2)

    def dual(self, var1, var2, deficit):
        value, factor = self._beside_cusp(var1, var2, deficit)
        cusp = cusp_at_zero(self)
        if cusp is None:
            return value, factor
        cusp_value, cusp_factor = ABRelu(-cusp, cusp).dual(var1, var2, deficit)
        return value + cusp_value, factor + cusp_factor

    def _beside_cusp(self, var1: Array, var2: Array, deficit: Array) -> tuple[Array, Array]:
        """The dual, less that of the cusp."""
        first, second = (self._coefficients(var) for var in (var1, var2))
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        value, factor = _sum_of_terms(first, second, w)
        more, slope = self._beyond_terms(var1, var2, first, second, w)
        value, factor = value + more, factor + slope / jnp.where(scale > 0, scale, 1)
        # At variances of 0 there is no correlation, but the derivative is the factor as elsewhere.
        value = _with_slope(value, deficit, jnp.where(scale > 0, 0, factor))
        # Rounding may tell equal inputs apart; their derivatives are wanted nevertheless.
        is_equal = (deficit == 0) & (var1 == var2)
        return value - jnp.where(is_equal, lax.stop_gradient(value), 0), factor

    def _beyond_terms(
        self, var1: Array, var2: Array, first: HermiteCoefficients, second: HermiteCoefficients, w: Array
    ) -> tuple[Array, Array]:
        """Returns the share in the deficit, and that in the factor times the standard deviations."""
        n_terms, table = len(first.values), self._table(w.dtype)

        def without_groups() -> tuple[Array, Array]:
            return _sum_of_rests(n_terms, first, second, w)

        if table is None or table.groups == 0:
            return without_groups()
        in_groups = table.has_groups(var1, var2)

        def with_groups() -> tuple[Array, Array]:
            columns1, columns2 = table.groups_of(var1), table.groups_of(var2)
            value, slope = _sum_of_groups(table, in_groups, columns1, columns2, first.cusp, second.cusp, w)
            rest1, rest2 = (
                _with_rest(of, columns[table.groups :], in_groups)
                for of, columns in ((first, columns1), (second, columns2))
            )
            more, more_slope = _sum_of_rests(jnp.where(in_groups, table.end_of_groups, n_terms), rest1, rest2, w)
            return value + more, slope + more_slope

        if is_gpu():
            return with_groups()  # a condition would make it wait
        return lax.cond(jnp.any(in_groups), with_groups, without_groups)

    def _coefficients(self, var: Array) -> HermiteCoefficients:
        quadrature = _quadrature(self.deg, var.dtype)
        at = _at(quadrature.nodes, var)
        with jax.default_matmul_precision("highest"):
            values, slopes = evaluate(self.fn, at), evaluate(derivative_of(self), at)
            of = hermite_coefficients(jnp, quadrature, var, values, slopes, cusp_at_zero(self))
        table = self._table(var.dtype)
        if table is None:
            return of
        # By quadrature in this precision, what is beyond the terms would be a difference of nearly equal numbers.
        rest = table.rest_of(var)
        return _with_rest(of, rest, jnp.isfinite(rest[0]))

    def _table(self, dtype: Any) -> CoefficientTable | None:
        """None if the values of the function are not known yet."""
        try:
            return coefficient_table(self, jnp.dtype(dtype).name)
        except TracedFunction:
            return None


@jax.custom_jvp
def _with_slope(value: Array, of: Array, slope: Array) -> Array:
    """Returns `value`, with so much added to its derivative in `of`."""
    del of, slope
    return value


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    dvalue, dof, _ = tangents
    return _with_slope(*primals), dvalue + primals[2] * dof


def _sum_of_terms(first: HermiteCoefficients, second: HermiteCoefficients, w: Array) -> tuple[Array, Array]:
    """Returns the sums of `(a - b)^2 / 2 + a b (1 - c^k)` and of `a' b' c^k` over the terms, for `w = 1 - c`.

    Both are less the terms of the cusp.
    """
    c, of_cusp, of_cusp_slope = 1 - w, None, None
    std1, std2 = (0, 0) if first.cusp is None or second.cusp is None else (first.cusp.std, second.cusp.std)
    if first.cusp is not None:
        of_cusp = first.cusp.coefficients
        of_cusp_slope = jnp.append(np.sqrt(np.arange(1, len(of_cusp), dtype=w.dtype)) * of_cusp[1:], 0)

    def add(sums: Sums, terms: Any) -> Sums:
        a, b, slope_a, slope_b, cusp, cusp_slope = terms
        square, both, slopes = (a - b) ** 2, a * b, slope_a * slope_b
        if cusp is not None:  # the products with it
            square, both = square + 2 * cusp * (std1 - std2) * (a - b), both + cusp * (a * std2 + std1 * b)
            slopes = slopes + cusp_slope * (slope_a + slope_b)
        return sums.plus(square, both, slopes).then(c, w)

    zero = jnp.zeros_like(w)

    def add_turn(sums: Sums, terms: Any) -> tuple[Sums, None]:
        # By themselves first: added to the large ones one by one, small ones would be rounded off.
        of_turn = sums._replace(value=zero, factor=zero)
        for k in range(len(terms[0])):
            of_turn = add(of_turn, jax.tree.map(lambda x, k=k: x[k], terms))
        return of_turn._replace(value=sums.value + of_turn.value, factor=sums.factor + of_turn.factor), None

    terms = (first.values, second.values, first.slopes, second.slopes, of_cusp, of_cusp_slope)
    n_turns = len(first.values) // _TOGETHER
    end = n_turns * _TOGETHER
    turns = jax.tree.map(lambda x: jnp.reshape(x[:end], (n_turns, _TOGETHER, *x.shape[1:])), terms)
    sums, _ = lax.scan(add_turn, Sums(jnp.ones_like(w), zero, zero, zero), turns)
    sums, _ = add_turn(sums, jax.tree.map(lambda x: x[end:], terms))
    return sums.value, sums.factor


def _sum_of_rests(
    n_terms: Any, first: HermiteCoefficients, second: HermiteCoefficients, w: Array
) -> tuple[Array, Array]:
    """Returns the sums of `sum_of_rest` for both parities."""
    cusps = (first.cusp, second.cusp) if first.cusp and second.cusp else None
    value, slope = jnp.zeros_like(w), jnp.zeros_like(w)
    for parity, of_parity in enumerate((cusps, None)):
        rests = rest_of_pair(jnp, first.rest[parity], second.rest[parity], of_parity)
        more, more_slope = sum_of_rest(jnp, parity, n_terms, rests, w)
        value, slope = value + more, slope + more_slope
    return value, slope


def _sum_of_groups(
    table: CoefficientTable,
    in_groups: Array,
    columns1: Array,
    columns2: Array,
    cusp1: Cusp | None,
    cusp2: Cusp | None,
    w: Array,
) -> tuple[Array, Array]:
    """Returns the sums of `(a - b)^2 / 2 + a b (1 - c^k)` and of `k a b c^(k - 1)` over groups of orders."""
    is_negative = w > 1
    away = jnp.minimum(jnp.where(is_negative, 2 - w, w), 1 - float(jnp.finfo(w.dtype).eps))
    log = jnp.log1p(-away)
    std1, std2 = (0, 0) if cusp1 is None or cusp2 is None else (cusp1.std, cusp2.std)

    def add(sums: tuple[Array, Array], group: Any) -> tuple[tuple[Array, Array], None]:
        order, is_odd, cusp, a, b = group
        apart = 0.5 * (a - b) ** 2 + cusp * (std1 - std2) * (a - b)
        both = a * b + cusp * (a * std2 + std1 * b)
        one_minus_power, slope = -jnp.expm1(order * log), order * jnp.exp((order - 1) * log)
        one_minus_power = jnp.where(is_negative & is_odd, 2 - one_minus_power, one_minus_power)
        slope = jnp.where(is_negative & ~is_odd, -slope, slope)
        value = jnp.where(in_groups, apart + both * one_minus_power, 0)
        return (sums[0] + value, sums[1] + jnp.where(in_groups, both * slope, 0)), None

    groups = (
        jnp.asarray(table.orders_of_groups, w.dtype),
        np.arange(table.groups) >= table.even_groups,
        jnp.asarray(table.cusps_of_groups, w.dtype),
        columns1[: table.groups],
        columns2[: table.groups],
    )
    zeros = jnp.zeros_like(w)
    return lax.scan(add, (zeros, zeros), groups)[0]


def _with_rest(of: HermiteCoefficients, rest: Array, is_known: Array) -> HermiteCoefficients:
    """Returns the coefficients with other numbers of what is beyond the terms, where these are known.

    Args:
      of: the coefficients.
      rest: the numbers, `(6, *shape)`, as tables have them.
      is_known: `(*shape)`.
    """
    even_root, odd_root, even_order, odd_order, beyond, beyond_slope = rest

    def choose(known: Array, other: Array) -> Array:
        return jnp.where(is_known, known, other)

    def choose_rest(root: Array, order: Array, other: Rest) -> Rest:
        is_there = root > 0  # polynomials of what is nearly zero may be negative
        return Rest(choose(jnp.where(is_there, root, 0), other.root), choose(order, other.order))

    even, odd = of.rest
    rests = [choose_rest(even_root, even_order, even), choose_rest(odd_root, odd_order, odd)]
    if of.cusp is None:
        return of._replace(rest=rests)
    beyond, beyond_slope = choose(beyond, of.cusp.beyond), choose(beyond_slope, of.cusp.beyond_slope)
    return of._replace(rest=rests, cusp=of.cusp._replace(beyond=beyond, beyond_slope=beyond_slope))


def _at(nodes: Array, var: Array) -> Array:
    """The nodes for normal variables with some variances, `(nodes, *shape)`."""
    return nodes.reshape(-1, *[1] * var.ndim) * safe_sqrt(var)[None]


def _mean(weights: Array, values: Array) -> Array:
    return jnp.tensordot(weights, values, 1, precision=lax.Precision.HIGHEST)


def _quadrature(degree: int, dtype: Any) -> Quadrature:
    """Returns that for a degree, in the precision of a type."""
    n_terms = number_of_terms(degree)
    # More than two nodes for each wave of the last polynomial.
    nodes, weights, products = hermite_functions(n_terms, 1, int(0.7 * last_node(n_terms) * math.sqrt(n_terms)) + 40)
    is_number = weights > float(jnp.finfo(dtype).tiny)
    return Quadrature(*(jnp.asarray(x[..., is_number], dtype) for x in (nodes, weights, products)))
