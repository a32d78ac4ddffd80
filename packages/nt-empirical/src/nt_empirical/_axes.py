"""Axes of the outputs of a network, and where they are in a kernel."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.cells import NotCut
from nt_core.grid import swapped

from nt_empirical._batches import check_same_structure
from nt_empirical._parameters import labelled

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class OutputAxes:
    """What becomes of every axis of outputs in a kernel.

    A kernel has two axes, side by side, for each axis of the outputs; one for a diagonal axis; none for a traced axis.
    Outputs `(4, 5, 7)` and `(6, 5, 7)` with `traced=(2,)` and `diagonal=(1,)` have kernels of shape `(4, 6, 5)`.
    """

    ndim: int
    traced: tuple[int, ...]
    diagonal: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, trace_axes: Axes, diagonal_axes: Axes | None) -> "OutputAxes":
        """Resolves negative and repeated axes of outputs with `ndim` axes; None for all that are not traced.

        Raises:
          ValueError: an axis does not exist, or is both a trace and a diagonal axis.
        """
        traced = _non_negative(trace_axes, ndim, "trace_axes")
        if diagonal_axes is None:
            return cls(ndim, traced, tuple(axis for axis in range(ndim) if axis not in traced))
        diagonal = _non_negative(diagonal_axes, ndim, "diagonal_axes")
        if set(traced) & set(diagonal):
            raise ValueError(
                f"For outputs with {ndim} axes, trace_axes={trace_axes} and diagonal_axes={diagonal_axes} share one. "
                "An axis can be traced or diagonal, not both."
            )
        return cls(ndim, traced, diagonal)

    def contract(self, a: jax.Array, b: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """Returns the mean over traced axes, and the sum over all axes that follow the outputs', of products.

        Args:
          a, b: arrays with the axes of the outputs, then any axes that both share, such as those of parameters.
          scale: broadcasts to the axes that they share; what the products are multiplied by.

        Returns:
          The kernel, in float32 if `a` and `b` have less precision; exactly symmetric if `b` is `a`.
        """
        self.check_sizes(a.shape[: self.ndim], b.shape[: self.ndim])
        following = range(2 * self.ndim, self.ndim + a.ndim)
        factors = [(a, [*self.labels1, *following]), (b, [*self.labels2, *following])]
        if scale is not None:
            factors.append(labelled(scale, a.shape[self.ndim :], following))
        products = sum_of_products(factors, self.labels_of_kernel)
        kernel = products / self.size_of_traced(a.shape)
        return self.symmetric(kernel) if b is a else kernel

    def kernel_of_columns(self, columns: jax.Array, rows: Sequence[int]) -> jax.Array:
        """Returns the kernel, given its columns.

        Args:
          columns: an array with all axes of the outputs for `x2`, then those axes of the outputs for `x1` that are in
            `rows`. Of a shared axis that is not in `rows` there are equal positions only.
          rows: axes of the outputs, in order; among them all that are not shared.
        """
        labels = [*self.labels2, *(self.labels1[axis] for axis in rows)]
        return jnp.einsum(columns, labels, self.labels_of_kernel) / self.size_of_traced(columns.shape)

    def symmetric(self, kernel: jax.Array) -> jax.Array:
        """Returns an exactly symmetric kernel: products may round an entry and its mirror image differently."""
        return (kernel + swapped(kernel, self.pairs())) / 2

    @property
    def labels1(self) -> list[int]:
        """Labels of the axes of outputs for `x1` in an einsum, below twice their number."""
        return [2 * axis for axis in range(self.ndim)]

    @property
    def labels2(self) -> list[int]:
        """Labels of the axes of outputs for `x2`, those of `labels1` where axes are shared."""
        return [2 * axis + (axis not in self.shared) for axis in range(self.ndim)]

    @property
    def labels_of_kernel(self) -> list[int]:
        """Labels of the axes of a kernel."""
        return sorted({*self.labels1, *self.labels2} - {2 * axis for axis in self.traced})

    def size_of_traced(self, shape: tuple[int, ...]) -> int:
        """Returns how many products are summed in a trace over outputs of this shape."""
        return math.prod(shape[axis] for axis in self.traced)

    @property
    def shared(self) -> tuple[int, ...]:
        """The axes at which both outputs have the same position, in order."""
        return tuple(sorted((*self.traced, *self.diagonal)))

    def pairs(self) -> list[tuple[int, int]]:
        """Returns the axes of a kernel that are a pair, of which the kernel of `(x2, x1)` has them exchanged."""
        pairs, axis = [], 0
        for output_axis in range(self.ndim):
            if output_axis in self.diagonal:
                axis += 1
            elif output_axis not in self.traced:
                pairs.append((axis, axis + 1))
                axis += 2
        return pairs

    def check_sizes(self, shape1: tuple[int, ...], shape2: tuple[int, ...]) -> None:
        """Raises a ValueError for outputs that differ along shared axes, or have no entries along traced ones."""
        for axis in (*self.traced, *self.diagonal):
            if shape1[axis] != shape2[axis]:
                raise ValueError(
                    f"Outputs must have the same size along trace and diagonal axes, got shapes {shape1} for x1 and "
                    f"{shape2} for x2, which differ at axis {axis}."
                )
        if 0 in (shape1[axis] for axis in self.traced):
            raise ValueError(f"Outputs of shape {shape1} have no entries along the traced axes {self.traced}.")


def sum_of_products(operands: Sequence[tuple[jax.Array, Sequence[int]]], labels: Sequence[int]) -> jax.Array:
    """Returns an einsum of arrays with labelled axes, accumulated in float32 at least.

    Kernels are ill-conditioned: the reduced precision that accelerators default to would not leave them positive
    semi-definite.
    """
    dtype = jnp.promote_types(jnp.result_type(*(array for array, _ in operands)), jnp.float32)
    # An einsum takes the last operands first, and sums over axes in the order of their labels: where that is the order
    # in which products have them, nothing is transposed.
    appearing = dict.fromkeys(label for _, of_operand in reversed(operands) for label in of_operand)
    number = {label: i for i, label in enumerate(appearing)}
    arguments = [
        argument for array, of_array in operands for argument in (array, [number[label] for label in of_array])
    ]
    arguments.append([number[label] for label in labels])
    return jnp.einsum(*arguments, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of outputs that are traced or diagonal in kernels, as a user names them, or None for all others."""

    trace_axes: Axes
    diagonal_axes: Axes | None

    def axes_of(self, outputs1: Any, outputs2: Any) -> list[OutputAxes]:
        """Returns the axes of every output of a network, for outputs for `x1` and for `x2` that must fit.

        Raises:
          ValueError: they do not fit, or an axis does not exist.
        """
        check_same_structure(outputs1, outputs2)
        leaves = jax.tree.leaves(outputs1), jax.tree.leaves(outputs2)
        axes = [OutputAxes.of(y.ndim, self.trace_axes, self.diagonal_axes) for y in leaves[0]]
        for y1, y2, output in zip(*leaves, axes, strict=True):
            output.check_sizes(y1.shape, y2.shape)
        return axes


def axis_pairs(kernel_ndim: int, trace_axes: Axes, diagonal_axes: Axes) -> list[tuple[int, int]] | None:
    """Returns the pairs of axes of a kernel; None if negative axes leave it open where its diagonal axes are.

    Raises:
      NotCut: the samples, along the first axis of the outputs, have no pair of axes.
    """
    found = []
    for ndim in range(1, kernel_ndim + len(_as_tuple(trace_axes)) + 1):
        try:
            axes = OutputAxes.of(ndim, trace_axes, diagonal_axes)
        except ValueError:  # axes that outputs with so many do not have
            continue
        if 2 * (ndim - len(axes.traced)) - len(axes.diagonal) == kernel_ndim:
            found.append(axes)
    if all(0 in (*axes.traced, *axes.diagonal) for axes in found):
        raise NotCut(
            "Cell by cell, the first axis of the outputs holds the samples, and can be neither a trace nor a diagonal "
            f"axis; got trace_axes={trace_axes} and diagonal_axes={diagonal_axes}."
        )
    first, *others = (axes.pairs() for axes in found)
    return first if all(other == first for other in others) else None


def _as_tuple(axes: Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _non_negative(axes: Axes, ndim: int, name: str) -> tuple[int, ...]:
    return tuple(sorted({non_negative_axis(axis, ndim, name) for axis in _as_tuple(axes)}))


def non_negative_axis(axis: int, ndim: int, name: str) -> int:
    """Resolves a negative axis; `name` is that of the argument, for the error."""
    if not -ndim <= axis < ndim:
        advice = f"Give axes from {-ndim} to {ndim - 1}." if ndim else f"Scalars need `{name}` without axes."
        raise ValueError(f"`{name}` contains {axis}, but the array has {ndim} axes. {advice}")
    return axis % ndim
