"""Duals that are sums over Hermite coefficients: the numbers of each sample, and how kernels add them up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nt_core.activations import ElementwiseNumerical
from nt_core.activations.arcs import one_minus_correlation
from nt_core.activations.coefficients import (
    Cusp,
    PairOfRests,
    Rest,
    Sums,
    absolute_value_coefficients,
    number_of_terms,
    rest_of_pair,
    sum_of_rest,
)
from nt_core.activations.tables import coefficient_table
from nt_core.backends.mosaic.duals import inlined, relu_dual

Int = Any  # a Python number or a traced scalar
# Terms in one turn of a loop: the numbers of one are loaded while others are added.
_TOGETHER = 4
# In the place of variances of 0: the factor divides by deviations.
_LEAST_VARIANCE = 2.0**-110


class Terms:
    """The terms of a function, those left out that are zero at every variance.

    A sample has in each position its coefficients of the orders 0 and 1, then those of the orders `start + step k` in
    turns of several, then of what is beyond all terms the roots and the mean orders, each of the even and of the odd
    part of the function, and `beyond` and `beyond_slope` of its `Cusp`.

    Raises:
      TracedFunction: the function's values are not known yet.
    """

    def __init__(self, activation: ElementwiseNumerical) -> None:
        self._table = coefficient_table(activation, "float32")
        self._cusp = self._table.cusp
        self._n_terms = number_of_terms(activation.deg)  # with those that are left out
        self._turns = _turns(self._table.terms)
        self._rest = 2 + self._turns * _TOGETHER

    @property
    def n_numbers(self) -> int:
        """How many numbers a sample has in each position."""
        return self._rest + 6

    def numbers(self, variances: Array) -> Array:
        """Returns the numbers for some variances, `(numbers, *shape)`."""
        variances = jnp.maximum(variances, _LEAST_VARIANCE)
        values, rest = jnp.split(self._table.coefficients(variances), [self._table.terms])
        of_cusp = jnp.asarray(self._table.coefficients_of_cusp, variances.dtype)
        values = values + jnp.multiply.outer(of_cusp, jnp.sqrt(variances))
        absent = jnp.zeros((self._rest - self._table.terms, *variances.shape), variances.dtype)
        return jnp.concatenate([values, absent, rest])

    def turns(self, variances: Array) -> Array:
        """Returns how many turns count for some of the variances, `(count, ...)`, as `(count,)`."""
        counts = self._table.terms_that_count(variances)
        return _turns(jnp.max(counts, range(1, counts.ndim))).astype(variances.dtype)

    def dual(
        self, turns: Array, load: Callable[[Int], tuple[Array, Array]], var1: Array, var2: Array, deficit: Array
    ) -> tuple[Array, Array]:
        """As `ElementwiseNumerical.dual`.

        Args:
          turns: how many are needed.
          load: returns one of the numbers of the first and of the second sample.
        """
        w = inlined(one_minus_correlation, var1, var2, deficit)[2]
        std1, std2 = (jnp.sqrt(jnp.maximum(var, _LEAST_VARIANCE)) for var in (var1, var2))
        stds = std1, std2
        value, slope = self._sum_of_terms(turns, load, w, stds)

        def with_rest(value: Array, slope: Array) -> tuple[Array, Array]:
            for parity in range(2):
                rests = self._rests(parity, load, stds)
                more, of_slope = inlined(partial(sum_of_rest, jnp, parity, self._n_terms), rests, w)
                value, slope = value + more, slope + of_slope
            return value, slope

        # If not all terms are needed, nothing is beyond them.
        value, slope = lax.cond(turns < self._turns, lambda *sums: sums, with_rest, value, slope)
        factor = slope / (std1 * std2)
        if self._cusp == 0:
            return value, factor
        of_cusp, _, factor_of_cusp = relu_dual(-self._cusp, self._cusp, jnp.sqrt(var1), jnp.sqrt(var2), deficit)
        return value + of_cusp, factor + factor_of_cusp

    def _sum_of_terms(
        self, turns: Array, load: Callable[[Int], tuple[Array, Array]], w: Array, stds: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Returns the sums of `(a - b)^2 / 2 + a b (1 - c^k)` and of `k a b c^(k - 1)`, for `w = 1 - c`.

        Both are less the terms of the cusp.
        """
        c, start, step = 1 - w, self._table.start, self._table.step
        scale, apart = stds[0] * stds[1], (stds[0] - stds[1]) ** 2

        def plus(sums: Sums, number: Int, order: Any, cusp: Any) -> Sums:
            a, b = load(number)
            square, both = (a - b) ** 2, a * b
            if cusp is not None:
                square, both = square - cusp * apart, both - cusp * scale
            return sums.plus(square, both, order * both)

        # The squares of the coefficients of the cusp, at a variance of 1: only even orders have them.
        constant = float((self._cusp * absolute_value_coefficients(2)[0]) ** 2)
        zero = jnp.zeros_like(w)
        sums = plus(Sums(jnp.ones_like(w), zero, zero, zero), 0, 0.0, constant if self._cusp else None)
        sums = plus(sums._replace(one_minus_power=w), 1, 1.0, None)
        for _ in range(start - 1):
            sums = sums.then(c, w)
        of_step = (c, w) if step == 1 else (c * c, w * (1 + c))

        def add(turn: Array, carry: tuple[Sums, Array]) -> tuple[Sums, Array]:
            sums, cusp = carry
            for k in range(_TOGETHER):
                number = turn * _TOGETHER + k
                order = lax.convert_element_type(start + step * number, jnp.float32)
                has_cusp = self._cusp != 0 and (start + step * k) % 2 == 0
                if has_cusp:
                    cusp = cusp * (order - 3) * (order - 3) / (order * (order - 1))
                # The last turn goes beyond the last term.
                of_term = jnp.where(2 + number < self._table.terms, cusp, 0.0) if has_cusp else None
                sums = plus(sums, 2 + number, order, of_term).then(*of_step)
            return sums, cusp

        sums, _ = lax.fori_loop(jnp.int32(0), turns.astype(jnp.int32), add, (sums, jnp.float32(constant)))
        return sums.value, sums.factor

    def _rests(self, parity: int, load: Callable[[Int], tuple[Array, Array]], stds: tuple[Array, Array]) -> PairOfRests:
        roots, orders = load(self._rest + parity), load(self._rest + 2 + parity)
        # Ghosts have no order.
        first, second = (
            Rest(jnp.maximum(x, 0), jnp.maximum(k, self._n_terms)) for x, k in zip(roots, orders, strict=True)
        )
        if parity == 1 or self._cusp == 0:
            return rest_of_pair(jnp, first, second, None)
        beyond, slopes = load(self._rest + 4), load(self._rest + 5)
        of_first, of_second = (Cusp((), *of) for of in zip(stds, beyond, slopes, strict=True))
        return rest_of_pair(jnp, first, second, (of_first, of_second))


def _turns(terms: Any) -> Any:
    """How many turns some terms take."""
    return -(-(terms - 2) // _TOGETHER)
