"""Outputs and the kernels of outputs, as matrices.

The outputs of a network have shape `y.shape`. A kernel of them has, for every axis of `y` that is not a trace axis, a
pair of neighbouring axes (position in the first outputs, position in the second), in the order of `y`; along the trace
axes it acts as the identity. All linear algebra happens in two dimensions: outputs are matrices (position, trace
position), kernels are matrices (position, position).
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.layouts import make_2d, zip_axes
from nt_core.tracing import evaluate_now, is_traced

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class OutputLayout:
    """The shape of the training outputs and the axes along which their kernel acts as the identity."""

    shape: tuple[int, ...]
    trace_axes: tuple[int, ...]  # non-negative, sorted, without duplicates

    @classmethod
    def of(cls, y_train: Any, trace_axes: Axes) -> "OutputLayout":
        """Returns the layout of `y_train`, or raises `ValueError` for axes that it does not have."""
        shape = jnp.shape(y_train)
        axes = (trace_axes,) if isinstance(trace_axes, int) else tuple(trace_axes)
        axes = tuple(operator.index(axis) for axis in axes)
        if not all(-len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(
                f"`trace_axes={trace_axes}` do not exist in `y_train` of shape {shape}. "
                "Give `y_train` one axis per output axis, e.g. shape (n, 1) for n scalar labels."
            )
        if 0 in shape:
            raise ValueError(f"`y_train` of shape {shape} has no entries: there is nothing to learn from.")
        return cls(shape, tuple(sorted({axis % len(shape) for axis in axes})))

    @property
    def size(self) -> int:
        """Number of entries of the training outputs; the loss is the mean over them."""
        return math.prod(self.shape)

    @property
    def kernel_axes(self) -> tuple[int, ...]:
        """Axes of the outputs that have a pair of axes in the kernel."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.trace_axes)

    @property
    def train_positions(self) -> tuple[int, ...]:
        """Sizes of the axes of the training outputs that the kernel has."""
        return tuple(self.shape[axis] for axis in self.kernel_axes)

    @property
    def n_points(self) -> int:
        """Number of training points: the first of the axes that the kernel has."""
        return math.prod(self.train_positions[:1])

    def with_points(self, n: int) -> "OutputLayout":
        """Returns the layout of other labels, of so many points."""
        return dataclasses.replace(self, shape=self.output_shape((n, *self.train_positions[1:])))

    def output_shape(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of outputs whose kernel has axes of these sizes."""
        shape = list(self.shape)
        for axis, size in zip(self.kernel_axes, positions, strict=True):
            shape[axis] = size
        return tuple(shape)

    def outputs_to_matrix(self, outputs: Any, positions: Sequence[int], dtype: Any, name: str) -> jax.Array:
        """Returns outputs (or what broadcasts to them, such as a scalar) as a matrix (position, trace position)."""
        outputs, shape = jnp.asarray(outputs, dtype), self.output_shape(positions)
        try:
            outputs = jnp.broadcast_to(outputs, shape)
        except ValueError:
            raise ValueError(f"`{name}` has shape {outputs.shape}, which does not broadcast to {shape}.") from None
        outputs = outputs.transpose(self.kernel_axes + self.trace_axes)
        return outputs.reshape(math.prod(positions), -1)

    def labels_to_matrix(self, y_train: Any, dtype: Any) -> jax.Array:
        """Returns training labels as a matrix; raises `ValueError` if they are known not to be finite."""
        with evaluate_now():
            y = self.outputs_to_matrix(y_train, self.train_positions, dtype, "y_train")
            if not is_traced(y) and not jnp.isfinite(y).all():
                raise ValueError("`y_train` is infinite or not a number somewhere.")
        return y

    def matrix_to_outputs(self, matrix: jax.Array, positions: Sequence[int], leading: tuple[int, ...]) -> jax.Array:
        """Returns matrices of shape (*, position, trace position) as outputs with the axes `leading` in front."""
        order = self.kernel_axes + self.trace_axes
        shape = self.output_shape(positions)
        outputs = matrix.reshape(leading + tuple(shape[axis] for axis in order))
        source = [order.index(axis) + len(leading) for axis in range(len(order))]
        return outputs.transpose([*range(len(leading)), *source])

    def train_train(self, kernel: Any, name: str) -> jax.Array:
        """Returns a train-train kernel as a symmetric matrix, at least in single precision."""
        with evaluate_now():  # the matrix is kept
            kernel = as_array(kernel, name)
            self._check_train_train(kernel, name)
            return symmetric(make_2d(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))))

    def given_matrix(self, kernel: Any, name: str) -> Any:
        """Returns a train-train kernel as a matrix, as it is: it may be an array that is larger than memory."""
        self._check_train_train(kernel, name)
        return kernel if kernel.ndim == 2 else make_2d(kernel)

    def check_points(self, n: int, kernel_of_one: Any) -> None:
        """Raises `ValueError` unless these are the number of training points, and the kernel of one of them."""
        kernel_of_one = as_array(kernel_of_one, "kernel_fn(x_train[:1], None)")
        one = self.with_points(1)
        one._check_train_train(kernel_of_one, "kernel_fn(x_train[:1], None)")
        if n != self.n_points:
            raise ValueError(f"`x_train` has {n} samples, but `y_train` of shape {self.shape} {self.n_points}.")

    def test_train(self, kernel: Any, dtype: Any, name: str) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns a test-train kernel as a matrix, and the sizes of its test axes."""
        kernel = as_array(kernel, name).astype(dtype)
        positions = kernel.shape[::2]
        if len(positions) != len(self.train_positions) or kernel.shape != _zip(positions, self.train_positions):
            template = _zip(["any"] * len(self.train_positions), self.train_positions)
            expected = f"({', '.join(map(str, template))})"
            raise ValueError(self._misfit(name, kernel, f"the test-train kernel must have shape {expected}"))
        return make_2d(kernel), positions

    def test_test(
        self,
        kernel: Any,
        positions: tuple[int, ...],
        dtype: Any,
        name: str,
        columns: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Returns a kernel of test points as a matrix, of all with each other or of some with others, in `columns`."""
        kernel = as_array(kernel, name).astype(dtype)
        shape = _zip(positions, positions if columns is None else columns)
        if kernel.shape != shape:
            expected = f"the test-test kernel must have shape {shape} to fit the test-train kernel"
            raise ValueError(self._misfit(name, kernel, expected))
        return make_2d(kernel)

    def _check_train_train(self, kernel: Any, name: str) -> None:
        expected = _zip(self.train_positions, self.train_positions)
        if kernel.shape != expected:
            raise ValueError(self._misfit(name, kernel, f"the train-train kernel must have shape {expected}"))

    def _misfit(self, name: str, kernel: jax.Array, expected: str) -> str:
        return (
            f"`{name}` has shape {kernel.shape}; for `y_train` of shape {self.shape} and trace axes {self.trace_axes} "
            f"{expected}: a pair of axes for every axis of `y_train` that is not in `trace_axes`."
            + (" Give n scalar labels the shape (n, 1)." if len(self.shape) == 1 else "")
        )


def as_array(kernel: Any, name: str) -> jax.Array:
    """Returns a real kernel matrix as a JAX array, or says what was given instead."""
    if hasattr(kernel, "nngp") or hasattr(kernel, "ntk"):
        raise TypeError(f"`{name}` must be one array, but is a {type(kernel).__name__}: pass its `.ntk` or `.nngp`.")
    kernel = jnp.asarray(kernel)
    if jnp.issubdtype(kernel.dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` must be real, but has dtype {kernel.dtype}.")
    return kernel if jnp.issubdtype(kernel.dtype, jnp.floating) else kernel.astype(float)


def symmetric(matrix: jax.Array) -> jax.Array:
    """Returns the symmetric part of (stacked) matrices, symmetric to the last bit."""
    return (matrix + matrix.swapaxes(-1, -2)) / 2


def matrix_to_kernel(matrix: jax.Array, positions: tuple[int, ...], leading: tuple[int, ...]) -> jax.Array:
    """Returns square matrices of shape (*, position, position) as kernels, with the axes `leading` in front."""
    return zip_axes(matrix.reshape(leading + positions + positions), start=len(leading))


def _zip(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(size for pair in zip(first, second, strict=True) for size in pair)
