"""The few things that layers do to covariances, each defined once.

A *primitive* is what a backend carries out. It knows how the variances of one sample change (`variance`) and, from
those, how pairs do (`pairs`): a covariance `K` or a deficit `D = (var1 + var2)/2 - K` (half the mean square difference,
the field's semivariance), and the tangent kernel with it. Backends differ in where the numbers are and which pairs of
positions they hold, hence in how they sum over windows and lay out variances; the formulas are these, in JAX and in
Pallas, and as functions of the same names in csrc/primitives.h.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations import Activation
from nt_core.lowering import windows
from nt_core.lowering.windows import Windows
from nt_core.pytrees import pytree_dataclass, static

Scalar = Any  # a Python number or a traced scalar


class Pairs(NamedTuple):
    """Covariances, or deficits, of some pairs of positions, and their tangent kernel (None where it is 0)."""

    value: Array
    ntk: Array | None

    def map(self, fn: Callable[[Array], Array]) -> "Pairs":
        """Applies `fn` to both, where there are both."""
        return Pairs(fn(self.value), None if self.ntk is None else fn(self.ntk))

    def arrays(self) -> list[Array]:
        """Returns both, where there are both."""
        return [self.value] if self.ntk is None else [self.value, self.ntk]


class Variances(Protocol):
    """The variances at both positions of each pair, and their mean; formed when they are read."""

    @property
    def first(self) -> Array: ...
    @property
    def second(self) -> Array: ...
    @property
    def mean(self) -> Array: ...


class Primitive:
    """Base of all primitives.

    Attributes:
      reads_variance: the output depends on the variances of the inputs, not on their covariance alone.
    """

    reads_variance: ClassVar[bool] = False


def as_covariance(x: Pairs, variances: Variances) -> Pairs:
    """Turns deficits into covariances."""
    return Pairs(variances.mean - x.value, x.ntk)


@pytree_dataclass
class Tied(Primitive):
    """Weights that all positions share: `K'(p, p') = w_var A(K)(p, p') + b_var`, with `A` the average over windows that
    move both positions alike.

    The tangent kernel is `T' = w_var A(T) + own_w A(K) + own_b`.

    Attributes:
      windows: along each spatial axis; none for a layer that acts on every position by itself.
      order: which spatial axis of the input stands at each spatial axis of the output.
      follows: `own_w, own_b` are `w_var, b_var`: what the layer's own parameters add to the tangent kernel is `K'`.
    """

    w_var: Scalar
    b_var: Scalar | None
    own_w: Scalar
    own_b: Scalar
    windows: Windows = static()
    order: tuple[int, ...] = static()
    follows: bool = static()

    @property
    def n_taps(self) -> int:
        return windows.size(self.windows)

    @property
    def keeps_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def variance(self, sums: Array) -> Array:
        """Returns variances after the layer, from their sums over windows before it."""
        scaled = self.w_var * sums / self.n_taps
        return scaled if self.b_var is None else scaled + self.b_var

    def pairs(
        self,
        sums: Pairs,
        is_deficit: bool,
        as_deficit: bool,
        has_ntk: bool,
        variance_average: Callable[[], Array],
        after: Variances | None,
    ) -> Pairs:
        """Returns pairs after the layer.

        Args:
          sums: over windows, before it.
          is_deficit: they are of deficits.
          as_deficit: deficits are wanted; only from deficits.
          has_ntk: so is the tangent kernel.
          variance_average: returns the mean, over both positions, of the averages of the variances before it. Called if
            `reads_average` says so.
          after: variances after it, where deficits are wanted.
        """
        share = 1 / self.n_taps
        weight, covariance = self.w_var * share, share * sums.value  # scaled once: each product is a rounding
        value = weight * sums.value
        if self.reads_average(is_deficit, as_deficit, has_ntk):
            covariance = variance_average() - covariance
            value = value if as_deficit else self.w_var * covariance
        if self.b_var is not None and not as_deficit:
            value = value + self.b_var
        if not has_ntk:
            return Pairs(value, None)
        if not self.follows:
            own = self.own_w * covariance + self.own_b
        elif as_deficit:
            assert after is not None
            own = after.mean - value  # the covariance after the layer
        else:
            own = value
        return Pairs(value, own if sums.ntk is None else weight * sums.ntk + own)

    def reads_average(self, is_deficit: bool, as_deficit: bool, has_ntk: bool) -> bool:
        """Whether `pairs` needs the covariance of averages, and has their deficits only."""
        return is_deficit and (not as_deficit or (has_ntk and not self.follows))


@pytree_dataclass
class Dual(Primitive):
    """A nonlinearity, applied to Gaussian pre-activations."""

    activation: Activation

    reads_variance: ClassVar[bool] = True

    def variance(self, variance: Array) -> Array:
        """Returns variances after the nonlinearity."""
        return self.activation.variance(variance)

    def pairs(self, deficit: Pairs, as_deficit: bool, before: Variances, after: Variances) -> Pairs:
        """Returns pairs after the nonlinearity, from deficits before it."""
        arguments = before.first, before.second, deficit.value
        value, factor = self.activation.dual(*arguments)
        x = Pairs(value, None if deficit.ntk is None else deficit.ntk * factor)
        if as_deficit:
            return x
        covariance = self.activation.covariance(*arguments)
        return as_covariance(x, after) if covariance is None else Pairs(covariance, x.ntk)


class Rescale(Primitive):
    """`K'(p, p') = s1(p) s2(p') K(p, p')`, with `s` a function of one sample."""

    def sample_numbers(self, which: int) -> Array | None:
        """Numbers of the samples of a batch that come with the step, `(n, *space)`, or None."""
        return None

    def scale(self, variance: Array | None, numbers: Array | None) -> Array:
        """Returns `s` as `(*space, n)`.

        Args:
          variance: before the step, `(*space, n)`; None where it is not known, for a step that does not read it.
          numbers: those of `sample_numbers`, `(*space, n)`.
        """
        raise NotImplementedError

    @staticmethod
    def variance(variance: Array, scale: Array) -> Array:
        """Returns variances after the step."""
        return variance * scale * scale

    @staticmethod
    def pairs(x: Pairs, as_deficit: bool, scales: Variances, before: Variances | None) -> Pairs:
        """Returns pairs after the step: deficits from deficits, covariances from covariances.

        Args:
          scales: `s` at both positions of each pair, in the place of variances.
          before: variances before the step, for deficits.
        """
        s1, s2 = scales.first, scales.second
        value = x.value * s1 * s2
        if as_deficit:
            assert before is not None
            # (var1 s1^2 + var2 s2^2) / 2 - K s1 s2, without taking the difference of nearly equal numbers
            value = value + 0.5 * (s1 - s2) * (before.first * s1 - before.second * s2)
        return Pairs(value, None if x.ntk is None else x.ntk * s1 * s2)


@pytree_dataclass
class Scale(Rescale):
    """A number for each sample and position: 0 where it is masked, or 1 over the number of positions averaged.

    Attributes:
      first, second: of both batches, `(n, *space)`; `second` is None where the second batch is the first.
    """

    first: Array
    second: Array | None

    def sample_numbers(self, which: int) -> Array | None:
        return self.first if which == 1 or self.second is None else self.second

    def scale(self, variance: Array | None, numbers: Array | None) -> Array:
        assert numbers is not None
        return numbers


@pytree_dataclass
class Normalize(Rescale):
    """Layer normalisation over the channels and the spatial axes numbered in `space_axes`: `s = 1 / sqrt(eps + mean)`.

    Attributes:
      eps: added to the mean of the variances.
      first, second: weights of the variances in their mean, `(n, *space)`: where positions are masked, the number of
        all over that of those which count. None for 1; `second` also where the second batch is the first.
    """

    eps: Scalar
    first: Array | None
    second: Array | None
    space_axes: tuple[int, ...] = static()

    reads_variance: ClassVar[bool] = True

    def sample_numbers(self, which: int) -> Array | None:
        return self.first if which == 1 or self.second is None else self.second

    def scale(self, variance: Array | None, numbers: Array | None) -> Array:
        assert variance is not None
        counted = variance if numbers is None else variance * numbers
        total = jnp.asarray(self.eps, variance.dtype) + jnp.mean(counted, self.space_axes, keepdims=True)
        positive = total > 0  # with eps = 0, zeros stay zeros
        scale = jnp.where(positive, lax.rsqrt(jnp.where(positive, total, 1)), 0)
        return jnp.broadcast_to(scale, variance.shape)


@pytree_dataclass
class Sum(Primitive):
    """A weighted sum of independent branches."""

    weights: tuple[float, ...] = static()

    def variance(self, *variances: Array) -> Array:
        """Returns variances after the step."""
        return _sum([w * v for w, v in zip(self.weights, variances, strict=True)])

    def pairs(self, branches: Sequence[Pairs]) -> Pairs:
        """Returns pairs after the step: deficits from deficits, covariances from covariances."""
        values = [w * x.value for w, x in zip(self.weights, branches, strict=True)]
        ntks = [w * x.ntk for w, x in zip(self.weights, branches, strict=True) if x.ntk is not None]
        return Pairs(_sum(values), _sum(ntks) if ntks else None)


@pytree_dataclass
class Product(Primitive):
    """The product of independent branches: `K = prod_i K_i`, `T = sum_i T_i prod_{j != i} K_j`."""

    @staticmethod
    def variance(*variances: Array) -> Array:
        """Returns variances after the step."""
        return functools.reduce(operator.mul, variances)

    @staticmethod
    def pairs(branches: Sequence[Pairs], as_deficit: bool, before: Sequence[Variances | None]) -> Pairs:
        """Returns pairs after the step: deficits from deficits, covariances from covariances.

        Args:
          before: variances of the branches, for deficits.
        """
        known = [v for v in before if v is not None] if as_deficit else []
        covariances = [as_covariance(x, v) for x, v in zip(branches, known, strict=True)] if as_deficit else branches
        (value, ntk), covariance = branches[0], covariances[0].value
        variances = (known[0].first, known[0].second) if as_deficit else None
        for i in range(1, len(branches)):
            factor, other = branches[i], covariances[i].value
            terms = [t * k for t, k in ((ntk, other), (factor.ntk, covariance)) if t is not None]
            ntk = _sum(terms) if terms else None
            if variances is None:
                value = value * other
            else:  # the mean of the products of variances is that of the means, and what their differences add
                (q1, q2), (r1, r2) = variances, (known[i].first, known[i].second)
                value = (q1 + q2) / 2 * factor.value + value * other + (q1 - q2) * (r1 - r2) / 4
                variances = (q1 * r1, q2 * r2)
            covariance = covariance * other
        return Pairs(value, ntk)


@pytree_dataclass
class Dropout(Primitive):
    """Each entry is kept with probability `rate` and divided by it: what is averaged with itself becomes larger."""

    rate: Scalar

    def variance(self, variance: Array) -> Array:
        """Returns variances after the step."""
        return variance / self.rate

    def pairs(self, x: Pairs, as_deficit: bool, is_same: Array, before: Variances | None) -> Pairs:
        """Returns pairs after the step: deficits from deficits, covariances from covariances.

        Args:
          is_same: which pairs are of one sample and position with itself, so that they share the choice.
          before: variances before the step, for deficits.
        """
        other = x.value
        if as_deficit:
            assert before is not None
            other = x.value + (1 / self.rate - 1) * before.mean
        value = jnp.where(is_same, x.value / self.rate, other)
        return Pairs(value, None if x.ntk is None else jnp.where(is_same, x.ntk / self.rate, x.ntk))


@pytree_dataclass
class Pool(Primitive):
    """Average or sum over windows: `K'(P, P')` is over all pairs of a position in the one and one in the other.

    Attributes:
      windows: along each spatial axis.
      mean: average rather than sum.
      normalize_edges: an average divides by the number of positions inside the image, not by the size of the window.
      keeps_axes: the output has spatial axes. Otherwise there is one window, and none is left.
    """

    windows: Windows = static()
    mean: bool = static()
    normalize_edges: bool = static()
    keeps_axes: bool = static(default=True)

    @property
    def has_uneven_windows(self) -> bool:
        """Whether windows hold different numbers of positions, and are divided by the same number."""
        all_inside = all(w.is_inside(tap) for w in self.windows for tap in range(w.taps))
        return not (self.mean and self.normalize_edges) and not all_inside

    @property
    def divides_by(self) -> float:
        """What a sum over a window is divided by, where that is the same for all."""
        return windows.size(self.windows) if self.mean else 1

    def divisors(self, dtype: Any) -> Array:
        """What the sum over each window is divided by, `(*space,)`."""
        if self.mean and self.normalize_edges:
            return windows.positions_inside(self.windows).astype(dtype)
        return jnp.full(windows.counts(self.windows), self.divides_by, dtype)

    def own_variance(self, own: Array, sums: Array) -> Array:
        """Returns variances after the pool.

        Args:
          own: the pooled deficit of each window with itself, `(*space, n)`.
          sums: of the variances over each window, `(*space, n)`.
        """
        held = windows.positions_inside(self.windows) / self.divisors(own.dtype) ** 2
        return lax.expand_dims(held.astype(own.dtype), (own.ndim - 1,)) * sums - own

    def deficit(self, pooled: Array, own: Variances, sums: Variances, inside: Variances, is_identical: Array) -> Array:
        """Turns a pooled deficit into the deficit of the pooled covariance.

        With S the sums of variances over a window, c the number of its positions inside and m its divisor:
        `K(P, P') = (c(P') S1(P) + c(P) S2(P')) / (2 m^2) - pooled(P, P')`, and the variances are K(P, P) of each sample
        with itself. The deficit is their mean less K, ordered such that equal samples give exactly 0.

        Args:
          own, sums: see `own_variance`, at both windows of each pair.
          inside: the number of positions inside both.
          is_identical: which pairs are of one window of one sample.
        """
        deficit = jnp.where(is_identical, 0, pooled - own.mean)  # not 0 up to rounding: sqrt(1e-7) is 3e-4
        if not self.has_uneven_windows:
            return deficit
        uneven = (inside.first - inside.second) / (2 * self.divides_by**2)
        return deficit + uneven.astype(pooled.dtype) * (sums.first - sums.second)


@pytree_dataclass
class Gather(Primitive):
    """Every position is a copy of one that there was, or zero.

    Attributes:
      positions: along each spatial axis, which position is copied to each place; -1 for zero.
    """

    positions: tuple[tuple[int, ...], ...] = static()

    def copies(self, x: Array, axis: int, position_axis: int) -> Array:
        """Returns the copies along an axis of `x`, that is the spatial axis `axis` of the activations."""
        positions = np.array(self.positions[axis], int)
        copied = jnp.take(x, np.maximum(positions, 0), position_axis)
        if (positions >= 0).all():
            return copied
        is_copy = windows.along_axis(jnp.array(positions >= 0), position_axis, x.ndim)
        return jnp.where(is_copy, copied, jnp.zeros((), x.dtype))

    def variance(self, variance: Array) -> Array:
        """Returns variances `(*space, n)` after the step."""
        for axis in range(len(self.positions)):
            variance = self.copies(variance, axis, axis)
        return variance

    def is_copy(self) -> Array:
        """Where there are copies, `(*space,)`."""
        along = [jnp.array(positions) >= 0 for positions in self.positions]
        pairs = (windows.along_axis(is_copy, axis, len(along)) for axis, is_copy in enumerate(along))
        return functools.reduce(operator.and_, pairs, jnp.ones((1,) * len(along), bool))


@pytree_dataclass
class Untie(Primitive):
    """Reads pairs of equal positions; those of different ones have covariance 0."""


@pytree_dataclass
class Flatten(Primitive):
    """Reads pairs of equal positions and averages them; no positions are left."""


def _sum(terms: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, terms)
