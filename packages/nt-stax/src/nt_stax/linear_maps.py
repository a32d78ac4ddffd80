"""Linear maps without weights: products with constants (`DotGeneral`) and other sizes of images (`ImageResize`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.image import ResizeMethod
from nt_core import Bool, Builder, Diagonal, Kernel, Rule, Run, Spec, Value, layer, step_rule, steps, supports_masking
from nt_core.authoring import is_traced

from nt_stax.indexing import copied


@layer
@supports_masking(remask_kernel=False)
def DotGeneral(
    *,
    lhs: Array | float | None = None,
    rhs: Array | float | None = None,
    dimension_numbers: lax.DotDimensionNumbers = (((), ()), ((), ())),
    precision: lax.Precision | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
):
    """The product of the inputs with a constant: `lax.dot_general(lhs, inputs)` or `lax.dot_general(inputs, rhs)`.

    With a matrix `M`, `y = M x` over positions, a covariance `K` becomes `M K M^T`; with a number `c`, `c^2 K`.

    Args:
      lhs, rhs: the constant, as the left or the right operand. None for both makes the layer the identity.
      dimension_numbers: which axes of both operands are contracted, and which ones are shared, as in `lax.dot_general`.
        Of the inputs' axes that of the channels is not among them; that of the batch may be contracted in the last
        layer of a network. Axes come out as those of `lax.dot_general`: shared ones first, then those of the left
        operand.
      precision: of the finite network's product, as in `lax.dot_general`.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    With masks, an output is masked if all inputs are that it is a sum over.

    Raises:
      ValueError: two constants; a kernel whose channel axis is contracted or shared.

    >>> from nt_stax import DotGeneral
    >>> _, apply_fn, kernel_fn = DotGeneral(rhs=jnp.array([1.0, -1.0]), dimension_numbers=(((1,), (0,)), ((), ())))
    >>> x = jnp.array([[[5.0], [3.0]]])  # one sample, two positions, one channel
    >>> print(apply_fn((), x), kernel_fn(x, None, "nngp"))
    [[2.]] [[4.]]
    """
    if lhs is not None and rhs is not None:
        raise ValueError("DotGeneral multiplies inputs with one constant: give `lhs` or `rhs`, not both.")
    is_lhs = lhs is not None
    constant = lhs if is_lhs else rhs
    contracted = dimension_numbers[0][1 if is_lhs else 0]

    def dot(x: Array, other: Any) -> Array:
        dtype = jnp.result_type(x, other)
        x, other = jnp.asarray(x, dtype), jnp.asarray(other, dtype)
        operands = (other, x) if is_lhs else (x, other)
        return lax.dot_general(*operands, dimension_numbers, precision=precision)

    def init_fn(rng, input_shape):
        if constant is None:
            return input_shape, ()
        return _shape_with_unknown(lambda x: dot(x, constant), "DotGeneral", input_shape), ()

    def apply_fn(params, inputs, **kwargs):
        return inputs if constant is None else dot(inputs, constant)

    def mask_fn(mask, input_shape):
        if constant is None:
            return mask
        channel = channel_axis % len(input_shape)
        sizes = [mask.shape[a] if a == channel else n for a, n in enumerate(input_shape)]
        counts = jnp.broadcast_to(~mask, sizes).astype(float)
        return dot(counts, (jnp.asarray(constant) != 0).astype(float)) < 0.5

    if constant is None:
        return init_fn, apply_fn, Rule("DotGeneral", emit=lambda builder, value: value), mask_fn

    is_number = jnp.ndim(constant) == 0 and jnp.isrealobj(constant) and not is_traced(constant)
    if is_number and not any(len(axes) for pair in dimension_numbers for axes in pair):
        factor = float(constant)
        step = steps.Combine((factor * factor,))
        return init_fn, apply_fn, step_rule(step, {"batch_axis": batch_axis, "channel_axis": channel_axis}), mask_fn

    def function(kernel: Kernel, run: Run) -> Kernel:
        other = jnp.asarray(constant, kernel.nngp.dtype)
        return kernel.dot_general(other, other, is_lhs, dimension_numbers)

    mixes_positions = any(a != batch_axis for a in contracted)
    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_batch": batch_axis not in contracted,
        "diagonal_spatial": Diagonal(input=Bool.NO if mixes_positions else Bool.YES, output=Bool.NO),
    }
    return init_fn, apply_fn, Rule("DotGeneral", requirements, function=function), mask_fn


@layer
@supports_masking(remask_kernel=True)
def ImageResize(
    shape: Sequence[int],
    method: str | ResizeMethod,
    antialias: bool = True,
    precision: lax.Precision = lax.Precision.HIGHEST,
    batch_axis: int = 0,
    channel_axis: int = -1,
):
    """Images of another size, by interpolation: `jax.image.resize`.

    Interpolation is a matrix `M` along each axis, whatever the method: a covariance `K` becomes `M K M^T`.

    Args:
      shape: of the outputs; -1 keeps the size of an axis. Channels must keep theirs.
      method: 'nearest', 'linear', 'cubic', 'lanczos3' or 'lanczos5', or a `jax.image.ResizeMethod`.
      antialias: smooth images that become smaller.
      precision: of the finite network's products, as in `jax.image.resize`.
      batch_axis: batch axis of the inputs. Samples are interpolated, too, if `shape` has a size for it.
      channel_axis: channel axis of the inputs.

    With masks, an output is masked if all inputs are that it is interpolated from. Masked inputs count as zeros.

    Raises:
      ValueError: an unknown method; a shape of another rank than the inputs; a kernel of resized channels.

    >>> from nt_stax import ImageResize
    >>> _, apply_fn, kernel_fn = ImageResize((-1, 3, -1), "linear")
    >>> x = jnp.array([[[1.0], [3.0]]])  # one sample, two positions, one channel
    >>> print(apply_fn((), x)[0, :, 0], kernel_fn(x, None, "nngp")[0, 0], sep="\\n")
    [1. 2. 3.]
    [[1. 2. 3.]
     [2. 4. 6.]
     [3. 6. 9.]]
    """
    method = _method(method)
    sizes, ndim = tuple(shape), len(shape)
    batch, channel = batch_axis % ndim, channel_axis % ndim

    def init_fn(rng, input_shape):
        return _resized_shape(sizes, input_shape), ()

    def apply_fn(params, inputs, **kwargs):
        return jax.image.resize(inputs, _resized_shape(sizes, inputs.shape), method, antialias, precision)

    def mask_fn(mask, input_shape):
        counts = (~mask).astype(float)
        for axis, (n, size) in enumerate(zip(input_shape, sizes, strict=True)):
            if size != -1 and mask.shape[axis] > 1:
                weights = jnp.abs(_interpolation(n, size, method, antialias, counts.dtype))
                counts = _along(counts, weights, axis)
        return counts < 16 * jnp.finfo(counts.dtype).eps  # weights that are 0 are so up to rounding

    def check_channels(spec: Spec) -> None:
        if _resized_shape(sizes, spec.shape1)[channel] != spec.n_channels:
            raise ValueError(
                f"ImageResize to {sizes} would interpolate along the channel axis {channel_axis}, and there are "
                "infinitely many channels in no order. Use -1 there."
            )

    def emit(builder: Builder, value: Value) -> Value:
        check_channels(value.spec)
        new_sizes = [sizes[a] for a in value.spec.spatial_axes]
        along = zip(value.spec.space, new_sizes, strict=True)
        positions = tuple(tuple(range(n)) if size == -1 else _nearest(n, size) for n, size in along)
        return copied(builder, value, positions)

    def function(kernel: Kernel, run: Run) -> Kernel:
        check_channels(kernel.spec)
        return _resized(kernel, sizes, method, antialias)

    copies_positions = method is ResizeMethod.NEAREST and sizes[batch] == -1  # and interpolates nothing
    resizes_space = any(size != -1 for axis, size in enumerate(sizes) if axis not in (batch, channel))
    mixes_positions = resizes_space and not copies_positions
    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_batch": sizes[batch] == -1,
        "diagonal_spatial": Diagonal(input=Bool.NO if mixes_positions else Bool.YES, output=Bool.NO),
    }
    if copies_positions:
        rule = Rule("ImageResize", requirements, emit=emit)
    else:
        rule = Rule("ImageResize", requirements, function=function)
    return init_fn, apply_fn, rule, mask_fn


@partial(jax.jit, static_argnames=("sizes", "method", "antialias"))
def _resized(kernel: Kernel, sizes: tuple[int, ...], method: ResizeMethod, antialias: bool) -> Kernel:
    """Returns the kernel of resized activations; a size of -1 keeps that of an axis."""
    spec, dtype = kernel.spec, kernel.nngp.dtype

    def interpolated(k: Array) -> Array:
        for i, axis in enumerate(spec.spatial_axes):
            if sizes[axis] != -1:
                matrix = _interpolation(spec.space[i], sizes[axis], method, antialias, dtype)
                for stored in _stored_axes(spec, i, k.ndim):
                    k = _along(k, matrix, stored)
        return k

    kernel = kernel.map(interpolated)
    if sizes[spec.batch_axis] != -1:
        # What `map` hands on of each sample are its weights in all samples of the result.
        first, second = (
            _interpolation(n, sizes[spec.batch_axis], method, antialias, dtype).T for n in (spec.n1, spec.n2)
        )
        kernel = kernel.map(lambda k, a, b: _along(_along(k, a[:, 0].T, 0), b[0].T, 1), first, second)
    return kernel.replace(shape1=_resized_shape(sizes, kernel.shape1), shape2=_resized_shape(sizes, kernel.shape2))


def _resized_shape(sizes: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) != len(sizes):
        raise ValueError(f"ImageResize to {sizes} takes inputs of rank {len(sizes)}, got shape {tuple(shape)}.")
    return tuple(n if size == -1 else size for size, n in zip(sizes, shape, strict=True))


def _interpolation(n: int, size: int, method: ResizeMethod, antialias: bool, dtype: Any) -> Array:
    """Returns the matrix that interpolates along an axis of `n` positions, `(size, n)`."""
    return jax.image.resize(jnp.eye(n, dtype=dtype), (size, n), method, antialias, lax.Precision.HIGHEST)


def _method(method: str | ResizeMethod) -> ResizeMethod:
    try:
        return ResizeMethod.from_string(method) if isinstance(method, str) else ResizeMethod(method)
    except ValueError:
        raise ValueError(
            f"ImageResize: method={method!r} is unknown, use 'nearest', 'linear', 'cubic', 'lanczos3', 'lanczos5' or a "
            "jax.image.ResizeMethod."
        ) from None


def _nearest(n: int, size: int) -> tuple[int, ...]:
    """Returns which of `n` positions is copied to each of `size`."""
    with jax.ensure_compile_time_eval():
        copies = _interpolation(n, size, ResizeMethod.NEAREST, antialias=False, dtype=jnp.float32)
    return tuple(np.asarray(copies).argmax(axis=1).tolist())


def _along(x: Array, matrix: Array, axis: int) -> Array:
    """Returns the products of a matrix with the columns along an axis."""
    product = jnp.tensordot(matrix, x, (1, axis), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(product, 0, axis)


def _stored_axes(spec: Spec, i: int, ndim: int) -> tuple[int, int]:
    """Returns where a covariance of rank `ndim` holds the spatial axis number `i`, of the first and second position."""
    n_space = len(spec.space)
    first = ndim - 2 * n_space + 2 * (n_space - 1 - i if spec.is_reversed else i)
    return first, first + 1


def _shape_with_unknown(fn: Any, name: str, input_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of `fn(inputs)`, with -1 where it is an unknown size (-1) of the inputs.

    Such axes are found by giving them two different sizes.
    """

    def shape_for(size: int) -> tuple[int, ...]:
        sizes = [size if n < 0 else n for n in input_shape]
        return jax.eval_shape(fn, jax.ShapeDtypeStruct(sizes, jnp.result_type(float))).shape

    if all(n >= 0 for n in input_shape):
        return shape_for(1)
    try:
        shapes = shape_for(2), shape_for(3)
    except TypeError as error:
        raise ValueError(
            f"{name} contracts or shares an axis of unknown size (-1): input_shape={tuple(input_shape)}. Give its size."
        ) from error
    return tuple(-1 if a != b else a for a, b in zip(*shapes, strict=True))
