"""What equations of JAX that are linear in an array make of its use.

A rule is `rule(use, which, inputs, equation)`, where the input number `which` is the value that `use` is of. It returns
the use of the output; None where that would be no einsum.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, primitives

from nt_empirical._convolution import convolution
from nt_empirical._factors import Factor, Labels, new_labels
from nt_empirical._uses import Step, Use, shape_of

Rule = Callable[[Use, int, list[Any], JaxprEqn], Use | None]


def _same(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    """Copies, and other precision."""
    return use


def _neg(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    return use.times(-jnp.ones((), inputs[0].dtype))


def _mul(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    return _scaled(use, inputs[1 - which], equation)


def _div(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use | None:
    if which != 0:
        return None
    divisor = jnp.asarray(inputs[1])  # whose reciprocal may be beyond the range of half precision
    return _scaled(use, 1 / divisor.astype(jnp.promote_types(divisor.dtype, jnp.float32)), equation)


def _scaled(use: Use, by: Any, equation: JaxprEqn) -> Use:
    by, shape = jnp.asarray(by), shape_of(equation.outvars[0])
    axes = _broadcast(use.axes, use.shape, shape)
    ones = tuple(axis for axis in range(by.ndim) if by.shape[axis] != shape[axis])
    labels = tuple(axes[axis] for axis in range(by.ndim) if axis not in ones)
    return use.replace(axes=axes, shape=shape).times(jnp.squeeze(by, ones), labels)


def _broadcast(axes: Labels, shape: tuple[int, ...], new_shape: tuple[int, ...]) -> Labels:
    """Returns the axes of an array after it was broadcast, a number or with axes of size 1."""
    if not axes:
        return new_labels(len(new_shape))
    return tuple(
        label if size == new_size else new_labels(1)[0]
        for label, size, new_size in zip(axes, shape, new_shape, strict=True)
    )


def _broadcast_in_dim(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    shape, dims = shape_of(equation.outvars[0]), equation.params["broadcast_dimensions"]
    axes = list(new_labels(len(shape)))
    for label, size, dim in zip(use.axes, use.shape, dims, strict=True):
        if shape[dim] == size:
            axes[dim] = label
    return use.replace(axes=tuple(axes), shape=shape)


def _transpose(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    return use.taking(equation.params["permutation"])


def _squeeze(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    dropped = equation.params["dimensions"]
    return use.taking([axis for axis in range(len(use.axes)) if axis not in dropped])


def _reduce_sum(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    summed = equation.params["axes"]
    known = {*use.weight_axes, *(label for factor in use.factors for label in factor.labels)}
    repeated = math.prod(use.shape[axis] for axis in summed if use.axes[axis] not in known)
    kept = use.taking([axis for axis in range(len(use.axes)) if axis not in summed])
    return kept if repeated == 1 else kept.times(jnp.full((), repeated, inputs[0].dtype))


def _reshape(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use | None:
    shape = shape_of(equation.outvars[0])
    kept = [axis for axis, size in enumerate(use.shape) if size != 1]
    if [use.shape[axis] for axis in kept] != [size for size in shape if size != 1]:
        return _moved(use, which, inputs, equation)
    remaining = iter(kept)
    axes = tuple(new_labels(1)[0] if size == 1 else use.axes[next(remaining)] for size in shape)
    return use.replace(axes=axes, shape=shape)


def _moved(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use | None:
    return use.moved(Step(equation.primitive, tuple(equation.params.items())))


def split(use: Use, equation: JaxprEqn) -> list[Use] | None:
    """Returns the uses of the outputs of `split`, which are slices, or of `unstack`; None as rules do."""
    axis, start = equation.params["axis"], 0
    unstacked = equation.primitive.name == "unstack"
    uses: list[Use] = []
    for size in [1] * use.shape[axis] if unstacked else map(int, equation.params["sizes"]):
        starts, limits = [0] * len(use.shape), list(use.shape)
        starts[axis], limits[axis] = start, start + size
        params = (("start_indices", tuple(starts)), ("limit_indices", tuple(limits)), ("strides", None))
        part = use.moved(Step(primitives.slice_p, params))
        if part is None:
            return None
        uses.append(part.taking([a for a in range(len(use.shape)) if a != axis]) if unstacked else part)
        start += size
    return uses


def _dot_general(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use:
    contracted, batched = equation.params["dimension_numbers"]
    other = inputs[1 - which]
    labels = list(new_labels(other.ndim))
    for mine, others in ((dims[which], dims[1 - which]) for dims in (contracted, batched)):
        for axis, other_axis in zip(mine, others, strict=True):
            labels[other_axis] = use.axes[axis]
    of_inputs = (use.axes, tuple(labels)) if which == 0 else (tuple(labels), use.axes)
    axes = [of_inputs[0][axis] for axis in batched[0]]
    for of_input, *dims in zip(of_inputs, contracted, batched, strict=True):
        axes += [label for axis, label in enumerate(of_input) if not any(axis in d for d in dims)]
    return use.replace(axes=tuple(axes), shape=shape_of(equation.outvars[0])).times(other, tuple(labels))


def _gather(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use | None:
    """Rows of a table, along one axis of it."""
    dims, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    rows = dims.collapsed_slice_dims
    whole = all(size == use.shape[axis] for axis, size in enumerate(sizes) if axis not in rows)
    if which != 0 or len(rows) != 1 or rows != dims.start_index_map or dims.operand_batching_dims or not whole:
        return None
    (axis,) = rows
    size, shape = use.shape[axis], shape_of(equation.outvars[0])
    positions = jnp.squeeze(inputs[1], -1)
    if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        positions = jnp.clip(positions, 0, size - 1)
    positions = jnp.where((positions >= 0) & (positions < size), positions, -1)
    labels = new_labels(positions.ndim)
    of_rows, of_positions = iter(use.axes[:axis] + use.axes[axis + 1 :]), iter(labels)
    axes = tuple(next(of_rows if out in dims.offset_dims else of_positions) for out in range(len(shape)))
    chosen = Factor(positions, labels, (use.axes[axis], size))
    return use.replace(axes=axes, shape=shape, factors=(*use.factors, chosen))


# Their outputs are still parameters, in another arrangement.
ARRANGEMENTS: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "neg": _neg,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "rev": _moved,
    "slice": _moved,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
# Their outputs are scaled parameters or activations.
SCALINGS: dict[str, Rule] = {"div": _div, "mul": _mul}
# Their outputs are activations.
PRODUCTS: dict[str, Rule] = {"conv_general_dilated": convolution, "dot_general": _dot_general, "gather": _gather}
# What is small, or needs no copies: cotangents take these as products.
LINEAR = ARRANGEMENTS | SCALINGS | {"dot_general": _dot_general}
RULES = ARRANGEMENTS | SCALINGS | PRODUCTS


def is_arrangement(name: str, use: Use) -> bool:
    """Whether the output of an equation, with this use, is still to be seen as parameters."""
    return name in ARRANGEMENTS or (name in SCALINGS and set(use.axes) <= set(use.weight_axes))
