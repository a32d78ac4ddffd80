"""Averages and sums over positions."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from nt_core import Bool, Builder, Diagonal, Rule, Value, layer, step_rule, steps, supports_masking

from nt_stax.windows import Padding, Windows


@layer
@supports_masking(remask_kernel=True)
def AvgPool(
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Padding = Padding.VALID,
    normalize_edges: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
):
    """Averages over windows of positions.

    A covariance of two positions becomes the average over all pairs of a position of the one window and a position of
    the other. Masked positions count as zeros.

    Args:
      window_shape: size of the window along each spatial axis.
      strides: steps of the window. None for 1.
      padding: 'VALID', 'SAME' (zeros) or 'CIRCULAR' (the image continues on its other side).
      normalize_edges: with 'SAME', divide by the number of positions inside of the image, not by the window's size.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    >>> from nt_stax import AvgPool
    >>> _, apply_fn, kernel_fn = AvgPool((2,))
    >>> x = jnp.array([[[1.0], [3.0], [5.0]]])
    >>> print(apply_fn((), x)[0, :, 0])
    [2. 4.]
    >>> print(kernel_fn(x, None, "nngp")[0, 0])
    [[ 4.  8.]
     [ 8. 16.]]
    """
    return _pool("AvgPool", window_shape, strides, padding, True, normalize_edges, batch_axis, channel_axis)


@layer
@supports_masking(remask_kernel=True)
def SumPool(
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Padding = Padding.VALID,
    batch_axis: int = 0,
    channel_axis: int = -1,
):
    """Sums over windows of positions.

    A covariance of two positions becomes the sum over all pairs of a position of the one window and a position of the
    other.

    Args:
      window_shape: size of the window along each spatial axis.
      strides: steps of the window. None for 1.
      padding: 'VALID', 'SAME' (zeros) or 'CIRCULAR' (the image continues on its other side).
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    >>> from nt_stax import SumPool
    >>> _, apply_fn, _ = SumPool((2,))
    >>> print(apply_fn((), jnp.array([[[1.0], [3.0], [5.0]]]))[0, :, 0])
    [4. 8.]
    """
    return _pool("SumPool", window_shape, strides, padding, False, False, batch_axis, channel_axis)


@layer
@supports_masking(remask_kernel=True)
def GlobalAvgPool(batch_axis: int = 0, channel_axis: int = -1):
    """Averages over all positions; the spatial axes vanish. Masked positions do not count.

    Args:
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    >>> from nt_stax import GlobalAvgPool
    >>> _, apply_fn, kernel_fn = GlobalAvgPool()
    >>> x = jnp.array([[[1.0], [3.0], [-1.0]]])
    >>> print(apply_fn((), x), kernel_fn(x, None, "nngp"))
    [[1.]] [[1.]]
    >>> print(kernel_fn(x, None, "nngp", mask_constant=-1.0))
    [[4.]]
    """
    return _global_pool(True, batch_axis, channel_axis)


@layer
@supports_masking(remask_kernel=True)
def GlobalSumPool(batch_axis: int = 0, channel_axis: int = -1):
    """Sums over all positions; the spatial axes vanish.

    Args:
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    >>> from nt_stax import GlobalSumPool
    >>> _, apply_fn, kernel_fn = GlobalSumPool()
    >>> x = jnp.array([[[1.0], [3.0], [-1.0]]])
    >>> print(apply_fn((), x), kernel_fn(x, None, "nngp"))
    [[3.]] [[9.]]
    """
    return _global_pool(False, batch_axis, channel_axis)


def _pool(
    name: str,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: str | Padding,
    mean: bool,
    normalize_edges: bool,
    batch_axis: int,
    channel_axis: int,
):
    windows = Windows(name, window_shape, strides, padding)
    normalize_edges = normalize_edges and windows.padding == Padding.SAME.value

    def spatial_axes(shape: Sequence[int]) -> tuple[int, ...]:
        axes = _spatial_axes(name, shape, batch_axis, channel_axis)
        if len(axes) != len(windows.window):
            raise ValueError(
                f"{name} with a window of {windows.window} takes inputs with {len(windows.window)} spatial axes, got "
                f"shape {tuple(shape)} with batch axis {batch_axis} and channel axis {channel_axis}."
            )
        return axes

    def init_fn(rng, input_shape):
        axes = spatial_axes(input_shape)
        output_shape = list(input_shape)
        for axis, n in zip(axes, windows.space([input_shape[a] for a in axes]), strict=True):
            output_shape[axis] = n
        return tuple(output_shape), ()

    def apply_fn(params, inputs, **kwargs):
        axes = spatial_axes(inputs.shape)
        sums = _window_sums(inputs, axes, windows)
        if not mean:
            return sums
        if not normalize_edges:
            return sums / math.prod(windows.window)
        ones = [inputs.shape[a] if a in axes else 1 for a in range(inputs.ndim)]
        return sums / _window_sums(jnp.ones(ones, inputs.dtype), axes, windows)

    def mask_fn(mask, input_shape):
        return windows.mask(mask, input_shape, spatial_axes(input_shape))

    step = steps.Pool(windows.window, windows.strides, windows.padding, mean, normalize_edges)
    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_spatial": Diagonal(input=Bool.MAYBE, output=Bool.NO),
    }
    return init_fn, apply_fn, step_rule(step, requirements), mask_fn


def _window_sums(x: Array, axes: Sequence[int], windows: Windows) -> Array:
    x, pads = windows.padded(x, axes)
    sizes, strides, all_pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
    for axis, w, s, pad in zip(axes, windows.window, windows.strides, pads, strict=True):
        sizes[axis], strides[axis], all_pads[axis] = w, s, pad
    # A NumPy zero, since only with a concrete one is the sum known to be a sum, and differentiable.
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, sizes, strides, all_pads)


def _global_pool(mean: bool, batch_axis: int, channel_axis: int):
    name = "GlobalAvgPool" if mean else "GlobalSumPool"

    def spatial_axes(shape: Sequence[int]) -> tuple[int, ...]:
        return _spatial_axes(name, shape, batch_axis, channel_axis)

    def init_fn(rng, input_shape):
        axes = spatial_axes(input_shape)
        return tuple(n for a, n in enumerate(input_shape) if a not in axes), ()

    def apply_fn(params, inputs, *, mask=None, **kwargs):
        axes = spatial_axes(inputs.shape)
        sums = jnp.sum(inputs, axes)
        return sums / _unmasked(mask, inputs.shape, axes) if mean else sums

    def mask_fn(mask, input_shape):
        return jnp.all(mask, spatial_axes(input_shape))

    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_spatial": Diagonal(input=Bool.MAYBE, output=Bool.YES),
    }
    if not mean:
        return init_fn, apply_fn, step_rule(steps.GlobalPool(mean=False), requirements), mask_fn

    def emit(builder: Builder, value: Value) -> Value:
        if value.masks is None:
            return builder.add(steps.GlobalPool(mean=True), value)
        first, second = value.masks.unmasked(value.spec)
        shares = _share(first), None if second is None else _share(second)
        return builder.add(steps.Scale(*shares), builder.add(steps.GlobalPool(mean=False), value))

    return init_fn, apply_fn, Rule(name, requirements, emit), mask_fn


def _share(unmasked: Array) -> Array:
    """Returns one over the number of positions that are not masked, `(n,)`, from `(n, *space)`."""
    counts = jnp.sum(unmasked, tuple(range(1, unmasked.ndim)))
    return 1 / jnp.maximum(counts, 1).astype(float)  # where all is masked the sum is 0, and so shall be the average


def _unmasked(mask: Array | None, shape: Sequence[int], axes: tuple[int, ...]) -> Array | int:
    """Returns what a sum over `axes` is divided by to give the average of what is not masked."""
    if mask is None:
        return math.prod(shape[a] for a in axes)
    # Where all is masked the sum is 0, and so shall be the average.
    return jnp.maximum(jnp.sum(~jnp.broadcast_to(mask, shape), axes), 1)


def _spatial_axes(name: str, shape: Sequence[int], batch_axis: int, channel_axis: int) -> tuple[int, ...]:
    ndim = len(shape)
    if any(not -ndim <= axis < ndim for axis in (batch_axis, channel_axis)):
        raise ValueError(
            f"{name}: inputs of shape {tuple(shape)} have no batch axis {batch_axis} or no channel axis {channel_axis}."
        )
    return tuple(a for a in range(ndim) if a not in (batch_axis % ndim, channel_axis % ndim))
