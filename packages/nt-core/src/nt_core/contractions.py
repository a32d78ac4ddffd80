"""Covariances of `lax.dot_general` of a constant with activations."""

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.spec import Spec


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A `lax.dot_general` of a constant with activations `x`.

    Every axis has a number: those of the activations first, then those of the constant.

    Attributes:
      spec: of the activations, not reversed.
      other_ndim: rank of the constant.
      is_lhs: the constant is the left operand.
      dimension_numbers: as in `lax.dot_general`.
    """

    spec: Spec
    other_ndim: int
    is_lhs: bool
    dimension_numbers: lax.DotDimensionNumbers

    def check(self) -> None:
        """Raises `ValueError` if the covariances do not hold what the contraction needs."""
        contracted, shared = self._x_contracted, self._x_shared
        if self.spec.channel_axis in (*contracted, *shared):
            raise ValueError(
                f"Axis {self.spec.channel_axis} of the activations is the channel axis, which is infinite: it cannot "
                f"be contracted or be a batch dimension, got dimension_numbers={self.dimension_numbers}."
            )
        if self.spec.diagonal_batch and self.spec.batch_axis in contracted:
            raise ValueError("To contract the batch axis, compute the incoming kernel with diagonal_batch=False.")
        if self.spec.diagonal_spatial and set(contracted) & set(self.spec.spatial_axes):
            raise ValueError("To contract spatial axes, compute the incoming kernel with diagonal_spatial=False.")

    def shape(self, x_shape: tuple[int, ...], other_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the result."""
        x, other = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, other_shape))
        operands = (other, x) if self.is_lhs else (x, other)
        return jax.eval_shape(lambda a, b: lax.dot_general(a, b, self.dimension_numbers), *operands).shape

    @property
    def channel_axis(self) -> int:
        """Position of the channel axis in the result."""
        return self._axes_out.index(self.spec.channel_axis)

    @property
    def batch_axis(self) -> int:
        """Position of the batch axis in the result; of the first axis that may stand for it, if it was contracted."""
        if self.spec.batch_axis in self._axes_out:
            return self._axes_out.index(self.spec.batch_axis)
        return 1 if self.channel_axis == 0 and len(self._axes_out) > 1 else 0

    def covariance(self, k: Array, other1: Array, other2: Array, same_sample: bool) -> Array:
        """Returns the covariance of `other1` times the first activations with `other2` times the second.

        Args:
          k: covariance of the activations, in the layout of `spec`, with one batch axis if `same_sample`, else two.
          other1, other2: the constants.
          same_sample: `k` holds same-sample entries only.
        """
        batch = [self.spec.batch_axis]
        space_out = [a for a in self._axes_out if a not in (self.spec.batch_axis, self.spec.channel_axis)]
        batch_out = [a for a in batch if a in self._axes_out]
        return jnp.einsum(
            k,
            self._pair_labels([*batch, *self.spec.spatial_axes], same_sample),
            other1,
            self._other_axes,
            other2,
            [self._second_label(a, same_sample) for a in self._other_axes],
            self._pair_labels([*batch_out, *space_out], same_sample),
            precision=lax.Precision.HIGHEST,
        )

    def _pair_labels(self, axes: list[int], same_sample: bool) -> list[int]:
        """Labels of a covariance over `axes`: of the first and the second position, or one where they are the same."""
        return [label for a in axes for label in dict.fromkeys((a, self._second_label(a, same_sample)))]

    def _second_label(self, axis: int, same_sample: bool) -> int:
        """Label of the second position along an axis; that of the first is the number of the axis."""
        stored_once = same_sample if axis == self.spec.batch_axis else self.spec.diagonal_spatial
        return axis if stored_once else axis + self.spec.ndim + self.other_ndim

    @property
    def _x_contracted(self) -> tuple[int, ...]:
        return tuple(self.dimension_numbers[0][1 if self.is_lhs else 0])

    @property
    def _x_shared(self) -> tuple[int, ...]:
        return tuple(self.dimension_numbers[1][1 if self.is_lhs else 0])

    @cached_property
    def _other_axes(self) -> list[int]:
        """Number of every axis of the constant; contracted and shared ones have that of their partner in `x`."""
        partners = {}
        for lhs, rhs in self.dimension_numbers:
            x, other = (rhs, lhs) if self.is_lhs else (lhs, rhs)
            partners.update(zip(other, x, strict=True))
        return [partners.get(j, self.spec.ndim + j) for j in range(self.other_ndim)]

    @cached_property
    def _axes_out(self) -> list[int]:
        """Axes of the result: shared ones, then the free ones of the left operand and of the right one."""
        used = {*self._x_contracted, *self._x_shared}
        x_free = [a for a in range(self.spec.ndim) if a not in used]
        other_free = [a for a in self._other_axes if a not in used]
        return [*self._x_shared, *(other_free + x_free if self.is_lhs else x_free + other_free)]
