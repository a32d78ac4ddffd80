"""How parameters enter a network: as one factor of a sum of products."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

Labels = tuple[int, ...]
_numbers = itertools.count()


def shape_of(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a jaxpr."""
    return variable.aval.shape


def dtype_of(variable: Any) -> Any:
    """Returns the dtype of a variable of a jaxpr."""
    return variable.aval.dtype


def new_labels(n: int) -> Labels:
    """Returns labels of axes that are in use nowhere else."""
    return tuple(itertools.islice(_numbers, n))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["labels", "chosen"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of the products, an array with labelled axes.

    Attributes:
      array: its axes are, with many samples, that of the samples, and those of `labels`.
      labels: of its axes.
      chosen: None; or a label and a size: the array then has positions along that axis (those outside of it are -1),
        and the factor is 1 at them and 0 elsewhere. So are rows of a table, which would be large as numbers.
    """

    array: jax.Array
    labels: Labels
    chosen: tuple[int, int] | None = None

    def has(self, label: int) -> bool:
        """Whether the factor differs along an axis."""
        return label in self.labels or (self.chosen is not None and self.chosen[0] == label)

    def written_out(self) -> "Factor":
        """Returns an equal factor without `chosen`."""
        if self.chosen is None:
            return self
        label, size = self.chosen
        return Factor(jax.nn.one_hot(self.array, size), (*self.labels, label))


@dataclasses.dataclass(frozen=True)
class Step:
    """A part, or another arrangement, of an array: an equation of JAX that only moves its entries."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]

    def __call__(self, array: jax.Array) -> jax.Array:
        """Takes the step."""
        return self.primitive.bind(array, **dict(self.params))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors"],
    meta_fields=["parameter", "steps", "weight_axes", "weight_shape", "axes", "shape"],
)
@dataclasses.dataclass(frozen=True)
class Use:
    """How changes of a parameter change a value: an einsum, `weight_axes, factors -> axes`.

    Attributes:
      parameter: its number.
      steps: lead from the parameter to the array that enters.
      weight_axes, weight_shape: axes of that array. One that is neither in `axes` nor in a factor is summed over.
      axes, shape: axes of the value, or of the value reshaped. One that is not in `weight_axes` nor in a factor is an
        axis along which the array is repeated.
      factors: what the array is multiplied by.
    """

    parameter: int
    steps: tuple[Step, ...]
    weight_axes: Labels
    weight_shape: tuple[int, ...]
    axes: Labels
    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()

    @classmethod
    def of(cls, parameter: int, weights: jax.Array) -> "Use":
        """Returns the use of a parameter as it is."""
        axes = new_labels(weights.ndim)
        return cls(parameter, (), axes, weights.shape, axes, weights.shape)

    def replace(self, **changes: Any) -> "Use":
        """Returns the use with other attributes."""
        return dataclasses.replace(self, **changes)

    def times(self, array: jax.Array, labels: Labels = ()) -> "Use":
        """Returns the use of the value times another factor."""
        return self.replace(factors=(*self.factors, Factor(array, labels)))

    def taking(self, axes: Sequence[int]) -> "Use":
        """Returns the use of the value with these of its axes, in this order; one that is left out is summed over."""
        return self.replace(axes=tuple(self.axes[a] for a in axes), shape=tuple(self.shape[a] for a in axes))

    def moved(self, step: Step) -> "Use | None":
        """Returns the use after a step, or None if the value is not just the array, rearranged and scaled."""
        if set(self.axes) != set(self.weight_axes) or any(factor.labels or factor.chosen for factor in self.factors):
            return None
        order = tuple(self.weight_axes.index(label) for label in self.axes)
        turn = Step(primitives.transpose_p, (("permutation", order),))
        steps = (*self.steps, step) if order == tuple(range(len(order))) else (*self.steps, turn, step)
        shape = jax.eval_shape(step, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape
        axes = new_labels(len(shape))
        return Use(self.parameter, steps, axes, shape, axes, shape, self.factors)

    def apart(self, other: "Use") -> bool:
        """Whether no entry of the parameter enters both arrays."""
        differing = (pair for pair in zip(self.steps, other.steps, strict=False) if pair[0] != pair[1])
        mine, others = next(differing, (None, None))
        if mine is None or others is None or not mine.primitive.name == others.primitive.name == "slice":
            return False
        starts1, stops1, starts2, stops2 = (
            dict(step.params)[name] for step in (mine, others) for name in ("start_indices", "limit_indices")
        )
        ranges = zip(starts1, stops1, starts2, stops2, strict=True)
        return any(stop1 <= start2 or stop2 <= start1 for start1, stop1, start2, stop2 in ranges)
