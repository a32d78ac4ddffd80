"""Duals that are sums over Hermite coefficients: the numbers of each sample, and how kernels add them up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nt_core.activations import ElementwiseNumerical
from nt_core.activations.arcs import one_minus_correlation
from nt_core.activations.numerical import Rest, Sums, number_of_terms, sum_of_rest
from nt_core.activations.tables import coefficient_table
from nt_core.backends.mosaic.duals import inlined

Int = Any  # a Python number or a traced scalar
# Terms in one turn of a loop: the numbers of one are loaded while others are added.
_TOGETHER = 4
# In the place of variances of 0: the factor divides by deviations.
_LEAST_VARIANCE = 2.0**-110


class Terms:
    """The terms of a function, those left out that are zero at every variance.

    A sample has in each position its coefficients of the orders 0 and 1, then those of the orders `start + step k` in
    turns of several, then of what is beyond all terms the roots and the mean orders, each of the even and of the odd
    part of the function.

    Raises:
      TracedFunction: the function's values are not known yet.
    """

    def __init__(self, activation: ElementwiseNumerical) -> None:
        self._table = coefficient_table(activation, "float32")
        self._n_terms = number_of_terms(activation.deg)  # with those that are left out
        self._turns = _turns(self._table.terms)
        self._rest = 2 + self._turns * _TOGETHER

    @property
    def n_numbers(self) -> int:
        """How many numbers a sample has in each position."""
        return self._rest + 4

    def numbers(self, variances: Array) -> Array:
        """Returns the numbers for some variances, `(numbers, *shape)`."""
        found = self._table.coefficients(jnp.maximum(variances, _LEAST_VARIANCE))
        values, rest = jnp.split(found, [self._table.terms])
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
        value, slope = self._sum_of_terms(turns, load, w)

        def with_rest(value: Array, slope: Array) -> tuple[Array, Array]:
            for parity in range(2):
                roots, orders = load(self._rest + parity), load(self._rest + 2 + parity)
                first, second = map(self._rest_of, roots, orders)
                more, of_slope = inlined(partial(sum_of_rest, parity, self._n_terms), first, second, w)
                value, slope = value + more, slope + of_slope
            return value, slope

        # If not all terms are needed, nothing is beyond them.
        value, slope = lax.cond(turns < self._turns, lambda *sums: sums, with_rest, value, slope)
        std1, std2 = (jnp.sqrt(jnp.maximum(var, _LEAST_VARIANCE)) for var in (var1, var2))
        return value, slope / (std1 * std2)

    def _sum_of_terms(self, turns: Array, load: Callable[[Int], tuple[Array, Array]], w: Array) -> tuple[Array, Array]:
        """Returns the sums of `(a - b)^2 / 2 + a b (1 - c^k)` and of `k a b c^(k - 1)`, for `w = 1 - c`."""
        c, start, step = 1 - w, self._table.start, self._table.step
        (a0, b0), (a1, b1) = load(0), load(1)
        sums = Sums(jnp.ones_like(w), w, 0.5 * (a0 - b0) ** 2, jnp.zeros_like(w)).plus(a1, b1, a1 * b1)
        for _ in range(start - 1):
            sums = sums.then(c, w)
        of_step = (c, w) if step == 1 else (c * c, w * (1 + c))

        def add(turn: Array, sums: Sums) -> Sums:
            for k in range(_TOGETHER):
                number = turn * _TOGETHER + k
                order = lax.convert_element_type(start + step * number, jnp.float32)
                a, b = load(2 + number)
                sums = sums.plus(a, b, order * (a * b)).then(*of_step)
            return sums

        sums = lax.fori_loop(jnp.int32(0), turns.astype(jnp.int32), add, sums)
        return sums.value, sums.factor

    def _rest_of(self, root: Array, order: Array) -> Rest:
        return Rest(jnp.maximum(root, 0), jnp.maximum(order, self._n_terms))  # ghosts have no order


def _turns(terms: Any) -> Any:
    """How many turns some terms take."""
    return -(-(terms - 2) // _TOGETHER)
