"""Programs without positions, on angular deficits: as csrc/angular.h.

Of a pair with the correlation `c`, the angular deficit is `1 - |c|` with the sign of `c`. Neither inputs on a line nor
nearly parallel and antiparallel ones cost it digits, whatever their lengths, where `(var1 + var2)/2 - K` would cancel.
See docs/cpu-engine.md, "Without positions".
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.activations import ABRelu
from nt_core.activations.arcs import arccos_polynomials, horner
from nt_core.activations.base import cast
from nt_core.evaluation.block import Block
from nt_core.evaluation.geometry import Geometry, Sides
from nt_core.evaluation.samples import MAX_CHANNELS_FOR_DIFFERENCES, SourceLoader, half_mean_square_difference
from nt_core.lowering import Lowered, LoweredNode, Pairs, Repeated
from nt_core.lowering.primitives import Dropout, Dual, Product, Rescale, Sum, Tied

# With a correlation nearer to 1 or -1 than this, the product of two inputs has lost digits that their difference keeps.
_CLOSE = 1e-2


def has_no_positions(lowered: Lowered) -> bool:
    """Whether a program can be evaluated on angular deficits, and has deficits at all."""
    known = Tied | Dual | Rescale | Sum | Product | Dropout | Repeated
    return (
        not any(form.space for form in lowered.forms)
        and any(form.deficit for form in lowered.forms)
        and all(isinstance(node.primitive, known) for node in lowered.nodes)
    )


@jax.custom_jvp
def with_derivatives_of(value: Array, other: Array) -> Array:
    """Returns `value`, with the derivatives of `other`: the same but for rounding.

    Angles have infinite derivatives at zero inputs, where those of covariances and deficits are finite.
    """
    del other
    return value


@with_derivatives_of.defjvp
def _with_derivatives_of_jvp(primals, tangents):
    return with_derivatives_of(*primals), tangents[1]


class Distances(NamedTuple):
    """`1 - c` and `1 + c`, each accurate where it is small."""

    from_parallel: Array
    from_antiparallel: Array


def distances(u: Array) -> Distances:
    """Returns the distances that an angular deficit stands for."""
    return Distances(jnp.where(u < 0, 2 + u, u), jnp.where(u < 0, -u, 2 - u))


def nearer(from_parallel: Array, from_antiparallel: Array) -> Array:
    """Returns the angular deficit of two distances."""
    return _signed(jnp.minimum(from_parallel, from_antiparallel), from_antiparallel - from_parallel)


def correlation(u: Array) -> Array:
    """Returns the correlation that an angular deficit stands for."""
    return jnp.where(u < 0, -1 - u, 1 - u)


def _signed(magnitude: Array, sign: Array) -> Array:
    """Returns a magnitude with a sign. A zero would lose it."""
    return jnp.where(sign < 0, -jnp.maximum(magnitude, float(jnp.finfo(magnitude.dtype).tiny)), magnitude)


class AngularLoader(SourceLoader):
    """Forms the angular deficits of sources."""

    def _input_deficit(self, number: int, geometry: Geometry, x1: Array, x2: Array) -> Array:
        x1, x2 = _unit(x1), _unit(x2)
        if x1.shape[-3] <= MAX_CHANNELS_FOR_DIFFERENCES:
            u = nearer(half_mean_square_difference(x1, x2), half_mean_square_difference(x1, -x2))
            return jnp.where(self.identical((), geometry, u.ndim), 0, u)
        c = self._product(x1, x2)
        u = _signed(jnp.maximum(1 - jnp.abs(c), 0), c)
        identical = self.identical((), geometry, u.ndim)
        doubtful = jnp.any((jnp.abs(u) < _CLOSE) & ~identical)
        return jnp.where(identical, 0, lax.cond(doubtful, _row_by_row, lambda *_: u, x1, x2))

    def _deficit_of(self, number: int, geometry: Geometry, covariance: Array) -> Array:
        scale = jnp.sqrt(self.first.variance[number]) * jnp.sqrt(self.second.variance[number])
        has_scale = scale > 0
        apart = jnp.maximum(scale - jnp.abs(covariance), 0) / jnp.where(has_scale, scale, 1)
        u = _signed(jnp.where(has_scale, apart, 1), covariance)
        return jnp.where(self.identical((), geometry, u.ndim), 0, u)


def _unit(x: Array) -> Array:
    """Scales samples `(channels, *batch)` to a mean square of 1; zeros stay zeros."""
    square = jnp.mean(x * x, -3, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1))


def _row_by_row(x1: Array, x2: Array) -> Array:
    def row(x: Array) -> Array:
        others = x2[:, 0, :]
        near, far = (jnp.mean((x[:, None] + sign * others) ** 2, 0) / 2 for sign in (-1, 1))
        return nearer(near, far)

    return lax.map(row, jnp.moveaxis(x1[..., 0], -1, 0))


class AngularBlock(Block):
    """The pairs of two batches, in a program without positions; deficits are angular."""

    def _stds(self, number: int, geometry: Geometry) -> Sides:
        return Sides(geometry, *(jnp.sqrt(s.variance[number]) for s in (self._first, self._second)))

    def _shares(self, weight: Array | float, number: int, of: int | None, geometry: Geometry) -> Sides:
        """Roots of the shares that a branch, or a bias (`of=None`), has in the variances of a sum."""

        def root(variance: dict[int, Array]) -> Array:
            total = variance[number]
            part = weight if of is None else weight * variance[of]
            return jnp.sqrt(part / jnp.where(total > 0, total, 1))

        return Sides(geometry, root(self._first.variance), root(self._second.variance))

    def _as_covariance(self, number: int, x: Pairs, geometry: Geometry) -> Pairs:
        if not self._is_deficit(number):
            return x
        return Pairs(_product(self._stds(number, geometry)) * correlation(x.value), x.ntk)

    def _apply(self, number: int, node: LoweredNode, inputs: list[Pairs], before: Geometry, after: Geometry) -> Pairs:
        primitive, x = node.primitive, inputs[0]
        if isinstance(primitive, Dual):
            return self._dual(number, node, primitive, x, after)
        if isinstance(primitive, Repeated) or not self._is_deficit(number):
            return super()._apply(number, node, inputs, before, after)
        match primitive:
            case Tied():
                return self._tied_angular(number, node.inputs[0], primitive, x, after)
            case Rescale():
                return _rescale(x, _product(Sides(after, self._first.scale[number], self._second.scale[number])))
            case Sum():
                shares = [
                    self._shares(w, number, i, after) for w, i in zip(primitive.weights, node.inputs, strict=True)
                ]
                return Pairs(_mixed([x.value for x in inputs], shares), primitive.pairs(inputs).ntk)
            case Product():
                covariances = [self._as_covariance(i, x, after) for i, x in zip(node.inputs, inputs, strict=True)]
                ntk = primitive.pairs(covariances, False, []).ntk
                return Pairs(functools.reduce(_of_product, (x.value for x in inputs)), ntk)
        assert isinstance(primitive, Dropout)
        return _dropout(primitive, x, self._load.same((), after, x.value.ndim))

    def _tied_angular(self, number: int, source: int, primitive: Tied, x: Pairs, geometry: Geometry) -> Pairs:
        covariance = self._as_covariance(source, x, geometry)
        ntk = primitive.pairs(covariance, False, False, self._ntk, lambda: covariance.value, None).ntk
        if primitive.b_var is None:
            return Pairs(x.value, ntk)
        shares = [
            self._shares(primitive.w_var, number, source, geometry),
            self._shares(cast(primitive.b_var, x.value), number, None, geometry),
        ]
        return Pairs(_mixed([x.value, jnp.zeros_like(x.value)], shares), ntk)

    def _dual(self, number: int, node: LoweredNode, primitive: Dual, x: Pairs, geometry: Geometry) -> Pairs:
        (source,), as_deficit = node.inputs, self._is_deficit(number)
        stds = self._stds(source, geometry)
        if isinstance(primitive.activation, ABRelu):
            return _ab_relu(primitive.activation, x, _product(stds), as_deficit)
        variances = self._variances(source, geometry)
        deficit = _product(stds) * distances(x.value).from_parallel + _half_gap(stds)
        after = self._variances_after_dual(node, geometry)
        y = primitive.pairs(Pairs(deficit, x.ntk), as_deficit, variances, after)
        return Pairs(_angle_between(y.value, self._stds(number, geometry)), y.ntk) if as_deficit else y


def _product(sides: Sides) -> Array:
    return sides.first * sides.second


def _half_gap(sides: Sides) -> Array:
    """Half the squared difference."""
    return 0.5 * (sides.first - sides.second) ** 2


def _angle_between(deficit: Array, stds: Sides) -> Array:
    """The angular deficit, from `(var1 + var2)/2 - K`; uncorrelated where a variance is 0."""
    scale = _product(stds)
    has_scale = scale > 0
    near = jnp.maximum(deficit - _half_gap(stds), 0) / jnp.where(has_scale, scale, 1)
    near = jnp.where(has_scale, jnp.minimum(near, 2), 1)
    return nearer(near, 2 - near)


def _ab_relu(activation: ABRelu, x: Pairs, scale: Array, as_deficit: bool) -> Pairs:
    """The ReLU family: a function of the correlation alone, and of the lengths what they are."""
    a, b = cast(activation.a, scale), cast(activation.b, scale)
    slope, kink = 0.5 * (a * a + b * b), 0.5 * (a - b) ** 2
    u = jnp.where(scale > 0, x.value, 1)
    w, c, is_negative = jnp.abs(u), correlation(u), u < 0
    root = jnp.sqrt(w)
    p, q = arccos_polynomials(w.dtype)
    kappa1, kappa0 = w * (root * horner(q, w)), root * horner(p, w)
    factor = slope - kink * jnp.where(is_negative, 1 - kappa0, kappa0)
    ntk = None if x.ntk is None else x.ntk * factor
    if not as_deficit:
        return Pairs(scale * (slope * c + kink * (kappa1 - jnp.minimum(c, 0))), ntk)
    ratio = jnp.where(slope > 0, kink / jnp.where(slope > 0, slope, 1), 0)  # (a - b)^2 / (a^2 + b^2)
    near = jnp.where(is_negative, 2 - ratio + (ratio - 1) * w, w) - ratio * kappa1
    far = jnp.where(is_negative, w + ratio * (1 - w), 2 - w) + ratio * kappa1
    return Pairs(nearer(near, far), ntk)


def _rescale(x: Pairs, scales: Array) -> Pairs:
    """Scales may be negative."""
    u = x.value
    flipped = jnp.where(scales < 0, _signed(jnp.abs(u), -correlation(u)), u)
    return Pairs(flipped, None if x.ntk is None else x.ntk * scales)


def _dropout(primitive: Dropout, x: Pairs, is_same: Array) -> Pairs:
    u = x.value
    other = _signed(1 - primitive.rate + primitive.rate * jnp.abs(u), u)
    return Pairs(jnp.where(is_same, u, other), primitive.pairs(x, False, is_same, None).ntk)


def _mixed(branches: Sequence[Array], shares: Sequence[Sides]) -> Array:
    """Returns the angular deficit of a sum of independent branches.

    With `s_i` the root of a branch's share of the variance of the sum, `(s_1, s_2, ...)` is a unit vector for either
    sample, and `1 - sum_i s_i s'_i c_i = sum_i s_i s'_i (1 - c_i) + (s_i - s'_i)^2 / 2`.
    """
    near, far = 0.0, 0.0
    for u, share in zip(branches, shares, strict=True):
        of_branch, both, gap = distances(u), _product(share), _half_gap(share)
        near, far = near + both * of_branch.from_parallel + gap, far + both * of_branch.from_antiparallel + gap
    return nearer(jnp.asarray(near), jnp.asarray(far))


def _of_product(u: Array, v: Array) -> Array:
    """`|c| = |c_1| |c_2|`."""
    a, b = jnp.abs(u), jnp.abs(v)
    return _signed(a * (1 - b) + b, correlation(u) * correlation(v))
