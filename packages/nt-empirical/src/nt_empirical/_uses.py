"""How parameters enter a network: as one factor of a sum of products."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from nt_empirical._factors import Factor, Labels, multiplied, new_labels, product

# Of a cotangent: with more, what is small at first would be multiplied out again and again.
MOST_FACTORS = 4


def shape_of(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a jaxpr."""
    return variable.aval.shape


def dtype_of(variable: Any) -> Any:
    """Returns the dtype of a variable of a jaxpr."""
    return variable.aval.dtype


@dataclasses.dataclass(frozen=True)
class Step:
    """A part, or another arrangement, of an array: an equation of JAX that only moves its entries."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]

    def __call__(self, array: jax.Array) -> jax.Array:
        """Takes the step."""
        return self.primitive.bind(array, **dict(self.params))


@dataclasses.dataclass(frozen=True)
class InEachRound:
    """A step that each round of a loop takes with its entry of an array, along the first axis."""

    step: Any

    def __call__(self, array: jax.Array) -> jax.Array:
        """Takes the step."""
        return jax.vmap(self.step)(array)


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
    steps: tuple[Step | InEachRound, ...]
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

    def compressed(self) -> "Use":
        """Returns the same use with few factors."""
        return self.replace(factors=multiplied(self.factors, (*self.weight_axes, *self.axes), MOST_FACTORS))

    def array(self, dtype: Any) -> jax.Array:
        """Returns the derivatives of the value by all entries of the parameter: axes of the parameter, of the value."""
        alike = [label for label in self.weight_axes if label in self.axes]
        names = dict(zip(alike, new_labels(len(alike)), strict=True))
        labels = [*(names.get(label, label) for label in self.weight_axes), *self.axes]
        shape = (*self.weight_shape, *self.shape)
        sizes = dict(zip(labels, shape, strict=True))
        same = [Factor(jnp.eye(sizes[label], dtype=dtype), (names[label], label)) for label in alike]
        factors = [*self.factors, *same] or [Factor(jnp.ones((), dtype), ())]
        present = [label for label in labels if any(factor.has(label) for factor in factors)]
        entries = product(factors, present).array.astype(dtype)
        absent = [axis for axis, label in enumerate(labels) if label not in present]
        return jnp.broadcast_to(jnp.expand_dims(entries, absent), shape)

    def carried_to_output(self, cotangent: "Use", dtype: Any) -> "Use":
        """Returns how the parameter changes an output.

        Args:
          cotangent: how the output, its `weight_axes`, changes with the value.
          dtype: of what is no factor of either.
        """
        if cotangent.shape != self.shape:
            n = len(cotangent.weight_axes)
            array = cotangent.array(dtype).reshape(*cotangent.weight_shape, *self.shape)
            labels = (*new_labels(n), *self.axes)
            cotangent = cotangent.replace(
                weight_axes=labels[:n], axes=self.axes, shape=self.shape, factors=(Factor(array, labels),)
            )
        name = dict(zip(cotangent.axes, self.axes, strict=True))
        factors = [*self.factors, *(f.named(name) for f in cotangent.factors)]
        outputs: list[int] = []
        for label, size in zip(cotangent.weight_axes, cotangent.weight_shape, strict=True):
            label = name.get(label, label)
            if label in self.weight_axes:  # an axis of the parameter is one of the output
                (new,) = new_labels(1)
                factors.append(Factor(jnp.eye(size, dtype=dtype), (new, label)))
                label = new
            outputs.append(label)
        kept = (*outputs, *self.weight_axes)
        summed = [
            size
            for label, size in zip(self.axes, self.shape, strict=True)
            if label not in kept and not any(f.has(label) for f in factors)
        ]
        factors.append(Factor(jnp.full((), math.prod(summed), dtype), ()))
        return self.replace(axes=tuple(outputs), shape=cotangent.weight_shape, factors=multiplied(factors, kept))

    def taking(self, axes: Sequence[int]) -> "Use":
        """Returns the use of the value with these of its axes, in this order; one that is left out is summed over."""
        return self.replace(axes=tuple(self.axes[a] for a in axes), shape=tuple(self.shape[a] for a in axes))

    def moved(self, step: Step | InEachRound) -> "Use | None":
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
        """Whether no entry of the parameter enters both arrays: if after equal steps they are different slices."""
        differing = (pair for pair in zip(self.steps, other.steps, strict=False) if pair[0] != pair[1])
        mine, others = next(differing, (None, None))
        while isinstance(mine, InEachRound) and isinstance(others, InEachRound):
            mine, others = mine.step, others.step
        if not (isinstance(mine, Step) and isinstance(others, Step)):
            return False
        if not mine.primitive.name == others.primitive.name == "slice":
            return False
        starts1, stops1, starts2, stops2 = (
            dict(step.params)[name] for step in (mine, others) for name in ("start_indices", "limit_indices")
        )
        ranges = zip(starts1, stops1, starts2, stops2, strict=True)
        return any(stop1 <= start2 or stop2 <= start1 for start1, stop1, start2, stop2 in ranges)
