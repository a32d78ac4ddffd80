"""Sums over many orders of Hermite polynomials, by quadrature: each order stands for a group of others."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from nt_core.activations.coefficients import (
    DOUBLE_NOISE,
    Cusp,
    HermiteCoefficients,
    Rest,
    absolute_value_coefficients,
    cusp_at_zero,
    grade,
    hermite_recursion,
    known_function,
    no_cusp,
    rest_of_pair,
    sum_of_rest,
)

if TYPE_CHECKING:
    from nt_core.activations.numerical import ElementwiseNumerical

# For each precision, how many groups an octave of orders has, and by how much sums of slopes may be off without groups,
# relative to the mean square of the slope.
_PER_OCTAVE = {"float32": 6, "float64": 11}
_TOLERANCE = {"float32": 2.0**-22, "float64": 2.0**-42}
# With so many fewer groups, sums must not differ by more than the tolerance, or this share of what groups change.
_FEWER, _SHARE = 2, 0.1
# Samples with variances that are so many octaves below have coefficients of groups, for pairs with others.
_MARGIN = 8
# Functions with fewer coefficients have no groups, nor do smaller variances.
_LEAST_TERMS, _LEAST_VARIANCE = 100, 2.0**-4
# Nobody has such variances: whether groups agree is not asked.
_LARGEST_VARIANCE = 2.0**14
# In fewer octaves of variances, groups may be right by chance.
_LEAST_OCTAVES = 4
# The `1 - c` for which sums are compared.
_DISTANCES = 2.0 ** -np.arange(1, 24)
# Groups that have more slope than what is beyond the terms, by this share of all, are those of jumps.
_JUMPS = 1e-3
# Where the groups end, about.
_END = 2**16
# From so many whole orders those in between are interpolated.
_NEARBY = 16
# Quadrature on either side of 0: its nodes in each panel, and its end, where the density is rounding.
_NODES, _LAST_NODE = 12, 12.0


class OrderGroups(NamedTuple):
    """Orders and weights: sums over the orders from the first ones to `end` are weighted sums over these.

    In an octave of orders, sums over the even ones are by Gauss quadrature, and those over the odd ones by the same
    with orders that are larger by one. So most orders are no whole numbers. Coefficients of even orders, and of odd
    ones, change their signs in turn, and but for that are smooth: they are interpolated.

    Attributes:
      even, odd: the orders, `(n,)` each.
      roots: of the weights, `(n,)`, which are products of those of both coefficients.
      end: the first order that is in no group.
    """

    even: np.ndarray
    odd: np.ndarray
    roots: np.ndarray
    end: int


@lru_cache
def order_groups(n_terms: int, per_octave: int) -> OrderGroups:
    """Returns the groups of orders from `n_terms` on, an even number.

    >>> groups = order_groups(100, 2)
    >>> groups.even[:4].round(1).tolist(), groups.end
    ([120.1, 177.9, 241.3, 356.7], 51200)
    >>> f"{sum(groups.roots**2 * groups.even):.0f}", sum(range(100, 51200, 2))
    ('655331950', 655331950)
    """
    n_octaves = round(math.log2(_END / n_terms))
    orders, weights = [], []
    for first in (n_terms << octave for octave in range(n_octaves)):
        nodes, of_nodes = _gauss_quadrature_of_sums(first // 2, per_octave)
        orders.append(first + 2 * nodes)
        weights.append(of_nodes)
    even = np.concatenate(orders)
    return OrderGroups(even, even + 1, np.sqrt(np.concatenate(weights)), n_terms << n_octaves)


def _gauss_quadrature_of_sums(n: int, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and weights that are exact for sums over 0, ..., n - 1 of polynomials of degree < 2 n_nodes.

    From the recurrence of the discrete Chebyshev polynomials, by Golub & Welsch (1969).
    """
    k = np.arange(1, n_nodes)
    beside = 0.5 * k * np.sqrt((n**2 - k**2) / (4 * k**2 - 1))
    nodes, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return nodes + 0.5 * (n - 1), n * vectors[0] ** 2


class Stencil(NamedTuple):
    """The interpolation of alternating coefficients at orders that are no whole numbers.

    Attributes:
      nearby: whole orders of the same parity, `(orders, nearby)`.
      weights: of coefficients there, with their signs.
    """

    nearby: np.ndarray
    weights: np.ndarray


def _stencil(orders: np.ndarray, parity: int) -> Stencil:
    place = 0.5 * (orders - parity)
    nearby = np.floor(place).astype(int)[:, None] + np.arange(1 - _NEARBY // 2, 1 + _NEARBY // 2)
    differences = (place[:, None] - nearby)[:, None, :]
    among = (nearby[:, :, None] - nearby[:, None, :]).astype(float)
    itself = np.eye(_NEARBY, dtype=bool)
    lagrange = np.prod(np.where(itself, 1, differences) / np.where(itself, 1, among), -1)
    return Stencil(2 * nearby + parity, lagrange * (-1.0) ** nearby)


class GroupQuadrature(NamedTuple):
    """What coefficients of groups are sums over.

    Attributes:
      nodes: positive ones, `(nodes,)`; functions are wanted at these and at their negatives.
      products: for each number of groups in an octave, those of weights, Hermite polynomials and the roots of
        `OrderGroups`, of the even and of the odd groups, each `(groups, nodes)`.
    """

    nodes: np.ndarray
    products: list[tuple[np.ndarray, np.ndarray]]


@lru_cache(maxsize=8)
def group_quadrature(n_terms: int, *per_octave: int) -> GroupQuadrature:
    """Returns the quadrature for several `order_groups`."""
    groups = [order_groups(n_terms, n) for n in per_octave]
    at, widths = np.polynomial.legendre.leggauss(_NODES)
    edges = grade(_LAST_NODE, 4 * math.pi / math.sqrt(groups[0].end))  # two waves of the last polynomial in each panel
    half = 0.5 * np.diff(edges)[:, None]
    nodes, widths = (half * (at + 1) + edges[:-1, None]).ravel(), (half * widths).ravel()
    root = np.exp(-(nodes**2) / 4) / (2 * math.pi) ** 0.25
    stencils = [_stencil(orders, parity) for of in groups for parity, orders in enumerate((of.even, of.odd))]
    wanted = np.unique(np.concatenate([stencil.nearby.ravel() for stencil in stencils]))
    rows, found = {int(order): row for row, order in enumerate(wanted)}, np.empty((len(wanted), len(nodes)))
    for order, function in hermite_recursion(nodes, root, int(wanted[-1]) + 1):
        if order in rows:
            found[rows[order]] = function
    found *= widths * root

    def products(stencil: Stencil, roots: np.ndarray) -> np.ndarray:
        return np.einsum("gk,gkn->gn", roots[:, None] * stencil.weights, found[np.searchsorted(wanted, stencil.nearby)])

    of_roots = [of.roots for of in groups for _ in range(2)]
    both = [products(*of) for of in zip(stencils, of_roots, strict=True)]
    return GroupQuadrature(nodes, list(zip(both[::2], both[1::2], strict=True)))


class GroupColumns(NamedTuple):
    """What a function has of groups.

    Attributes:
      orders: `(groups,)`, first those of the even part of the function.
      n_even: how many these are.
      cusps: the coefficients of its cusp at a variance of 1, times the roots.
      end: the first order that is in no group.
      first: the first octave of variances with coefficients of groups.
      begin: the octave from which on they are wanted: that of one sample of a pair at least.
      columns: from the first octave on, for each variance, the coefficients without those of the cusp, times the roots;
        then what is beyond the groups: the roots and the orders, of the even and the odd part, and `beyond` and
        `beyond_slope` of the `Cusp`. `(groups + 6, octaves, points)`.
    """

    orders: np.ndarray
    n_even: int
    cusps: np.ndarray
    end: int
    first: int
    begin: int
    columns: np.ndarray


def group_columns(
    activation: "ElementwiseNumerical", precision: str, variances: np.ndarray, of: HermiteCoefficients
) -> GroupColumns | None:
    """Returns what a function has of groups; None if they change nothing, or are not accurate.

    Args:
      activation: the function.
      precision: the name of a type.
      variances: decreasing ones in increasing octaves, `(octaves, points)`.
      of: the coefficients for these, `(terms, octaves, points)`.
    """
    lowest = int(np.searchsorted(variances[:, -1], _LEAST_VARIANCE))
    if len(of.values) < _LEAST_TERMS or lowest == len(variances):
        return None
    of = jax.tree.map(lambda x: x[..., lowest:, :] if np.ndim(x) > 1 else x, of)
    variances = variances[lowest:]
    per_octave = (_PER_OCTAVE[precision], _PER_OCTAVE[precision] - _FEWER)
    size = cusp_at_zero(activation) or 0.0
    values = _coefficients(activation, size, variances, group_quadrature(len(of.values), *per_octave))
    groups, fewer = (
        _Grouped.of(order_groups(len(of.values), n), x, size, of) for n, x in zip(per_octave, values, strict=True)
    )
    begin = _begin(variances, of, groups, fewer, _TOLERANCE[precision])
    if begin is None:
        return None
    first = max(0, begin - _MARGIN)
    root = DOUBLE_NOISE * np.sqrt(of.mean_square[first:])
    values = groups.values[:, first:]
    is_there = np.any(np.abs(values) > root, axis=(1, 2))
    rests = [x[first:] for x in (*(rest.root for rest in groups.rest), *(rest.order for rest in groups.rest))]
    of_cusp = (x[first:] for x in (groups.cusp.beyond, groups.cusp.beyond_slope))
    columns = np.stack([*values[is_there], *rests, *(np.where(np.abs(x) > root, x, 0) for x in of_cusp)])
    orders, cusps = groups.orders[is_there], groups.cusp.coefficients[is_there]
    n_even = int(is_there[: len(is_there) // 2].sum())
    return GroupColumns(orders, n_even, cusps, groups.end, lowest + first, lowest + begin, columns)


def _coefficients(
    activation: "ElementwiseNumerical", cusp: float, variances: np.ndarray, quadrature: GroupQuadrature
) -> list[np.ndarray]:
    """Returns the coefficients without those of the cusp, times the roots, each of `(groups, octaves, points)`."""
    at_zero = known_function(activation.fn, np.zeros(1))

    def coefficients(variances: np.ndarray) -> list[np.ndarray]:
        at = quadrature.nodes[:, None] * np.sqrt(variances)
        right, left = (known_function(activation.fn, x) - (at_zero + cusp * at) for x in (at, -at))
        return [np.concatenate([even @ (right + left), odd @ (right - left)]) for even, odd in quadrature.products]

    return [np.stack(x, 1) for x in zip(*map(coefficients, variances), strict=True)]


class _Grouped(NamedTuple):
    """A function in groups: their orders, the coefficients times the roots, and what is from the order `end` on."""

    orders: np.ndarray
    values: np.ndarray
    rest: list[Rest]
    cusp: Cusp
    end: int

    @staticmethod
    def without_groups(of: HermiteCoefficients) -> "_Grouped":
        cusp = of.cusp or no_cusp(of.mean_square, 0)
        none = np.empty((0, *of.mean_square.shape))
        return _Grouped(np.empty(0), none, of.rest, cusp._replace(coefficients=np.empty(0)), len(of.values))

    @staticmethod
    def of(groups: OrderGroups, values: np.ndarray, cusp: float, of: HermiteCoefficients) -> "_Grouped":
        orders = np.concatenate([groups.even, groups.odd])
        k, squares = orders[:, None, None], values**2
        halves = slice(len(groups.even)), slice(len(groups.even), None)

        def beyond(parity: int) -> Rest:
            half, before = halves[parity], of.rest[parity]
            slope = before.root**2 * before.order - (k * squares)[half].sum(0)
            # With a smaller order, it is what the quadrature is off.
            square = np.minimum(before.root**2 - squares[half].sum(0), slope / groups.end)
            is_there = square > DOUBLE_NOISE * of.mean_square
            order = slope / np.where(is_there, square, 1)
            return Rest(np.sqrt(np.where(is_there, square, 0)), np.where(is_there, order, groups.end))

        before = of.cusp or no_cusp(of.mean_square, 0)
        cusps = cusp * _absolute_value_in_groups(groups)
        products = cusps[:, None, None] * values
        of_cusp = Cusp(cusps, before.std, before.beyond - products.sum(0), before.beyond_slope - (k * products).sum(0))
        return _Grouped(orders, values, [beyond(0), beyond(1)], of_cusp, groups.end)

    def slopes(self, w: np.ndarray) -> np.ndarray:
        """Returns what the sum of `k a^2 c^(k - 1)` has of groups and what is beyond them, for `w = 1 - c`.

        At the largest variance of each octave, `(octaves, distances)`.
        """
        rest, cusp = jax.tree.map(lambda x: x[..., :1] if np.ndim(x) > 1 else x, (self.rest, self.cusp))
        rests = [rest_of_pair(np, of, of, cusps) for of, cusps in zip(rest, ((cusp, cusp), None), strict=True)]
        beyond = sum(sum_of_rest(np, parity, self.end, of, w[None])[1] for parity, of in enumerate(rests))
        return beyond + self.slopes_of_groups(w)

    def slopes_of_groups(self, w: np.ndarray) -> np.ndarray:
        """Returns the same of the groups."""
        of_cusp = np.multiply.outer(self.cusp.coefficients, self.cusp.std[:, 0])
        values = self.values[:, :, 0]
        squares = self.orders[:, None] * values * (values + 2 * of_cusp)
        return np.einsum("ko,kw->ow", squares, np.exp(np.multiply.outer(self.orders - 1, np.log1p(-w))))


def _absolute_value_in_groups(groups: OrderGroups) -> np.ndarray:
    """Returns the coefficients of `|x|` at a variance of 1, times the roots."""
    stencil = _stencil(groups.even, 0)
    coefficients = absolute_value_coefficients(int(stencil.nearby.max()) + 1)[stencil.nearby]
    return np.concatenate([groups.roots * (stencil.weights * coefficients).sum(1), np.zeros(len(groups.odd))])


def _begin(
    variances: np.ndarray, of: HermiteCoefficients, groups: _Grouped, fewer: _Grouped, tolerance: float
) -> int | None:
    """Returns the octave from which on groups are wanted, None if there is none."""
    without, total = _Grouped.without_groups(of), of.slope_square[:, :1]
    slopes = groups.slopes(_DISTANCES)
    changes = np.max(np.abs(slopes - without.slopes(_DISTANCES)) / total, 1)
    errors = np.max(np.abs(slopes - fewer.slopes(_DISTANCES)) / total, 1)
    parallel = np.zeros(1)
    of_jumps = ((groups.slopes_of_groups(parallel) - without.slopes(parallel)) / total)[:, 0]
    is_wanted = (changes > tolerance) & (variances[:, 0] < _LARGEST_VARIANCE)
    is_right = (errors < np.maximum(_SHARE * changes, tolerance)) & (of_jumps < _JUMPS)
    wrong, right = (np.flatnonzero(is_wanted & x) for x in (~is_right, is_right))
    right = right[right > wrong.max(initial=-1)]
    return int(right[0]) if len(right) >= _LEAST_OCTAVES else None
