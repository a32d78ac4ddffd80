"""Layer normalisation."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from nt_core import Builder, Kernel, Rule, Run, Spec, Value, layer, steps, supports_masking
from nt_core.authoring import NoStep, zipped_diagonal


@layer
@supports_masking(remask_kernel=False)
def LayerNorm(axis: int | Sequence[int] = -1, eps: float = 1e-12, batch_axis: int = 0, channel_axis: int = -1):
    """Layer normalisation, `(x - mean) / sqrt(eps + variance)` over some axes (arXiv:1607.06450).

    Of an infinitely wide Gaussian layer the mean is zero, and the variance `v` of a sample is the average over the
    normalised positions of its covariance with itself: a covariance of two samples, and their tangent kernel, are
    divided by `sqrt((eps + v1) (eps + v2))`. Masked entries count neither for the mean nor for the variance.

    Args:
      axis: the axes to be normalised over, in any order; to name one twice, as `(1, -1)` does for inputs of rank 2,
        is to name it once. The channel axis must be among them. With the batch axis, the statistics are those of all
        samples of a batch together.
      eps: added to the variance.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    Raises:
      ValueError: the channel axis is not in `axis`, or `axis` does not fit the inputs.
      NotImplementedError: the kernel of inputs that are not Gaussian, or masked in some channels only.

    >>> from nt_stax import Dense, LayerNorm, serial
    >>> _, _, kernel_fn = serial(Dense(512, W_std=3.0), LayerNorm())
    >>> print(kernel_fn(jnp.ones((1, 3)), 2 * jnp.ones((1, 3)), "nngp").round(4))
    [[1.]]
    """

    def init_fn(rng, input_shape):
        _normalized_axes(axis, len(input_shape), channel_axis)
        return input_shape, ()

    def apply_fn(params, inputs, *, mask=None, **kwargs):
        axes = _normalized_axes(axis, inputs.ndim, channel_axis)
        mean = _mean(inputs, axes, mask)
        variance = _mean((inputs - mean) ** 2, axes, mask)
        return (inputs - mean) / jnp.sqrt(eps + variance)

    def space_axes(spec: Spec) -> tuple[int, ...]:
        axes = _normalized_axes(axis, spec.ndim, channel_axis)
        return tuple(i for i, a in enumerate(spec.spatial_axes) if a in axes)

    def is_over_batch(spec: Spec) -> bool:
        return spec.batch_axis in _normalized_axes(axis, spec.ndim, channel_axis)

    def emit(builder: Builder, value: Value) -> Value:
        if is_over_batch(value.spec):
            raise NoStep
        axes, masks = space_axes(value.spec), (None, None)
        if value.masks is not None:  # which the mean over positions leaves out
            masks = value.masks.unmasked(value.spec)
        weights = [None if unmasked is None or not axes else _weights(unmasked, axes) for unmasked in masks]
        return builder.add(steps.Normalize(eps, axes, *weights), value)

    def over_batch(kernel: Kernel, run: Run) -> Kernel:
        if kernel.is_reversed:
            return over_batch(kernel.reverse(), run).reverse()
        return _normalize_over_batch(kernel, steps.Normalize(eps, space_axes(kernel.spec)))

    requirements = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    return init_fn, apply_fn, Rule("LayerNorm", requirements, emit, over_batch)


def _normalized_axes(axis: int | Sequence[int], ndim: int, channel_axis: int) -> tuple[int, ...]:
    """Returns the axes to be normalised over, non-negative and checked."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"LayerNorm: axis={axis} must name axes of inputs of rank {ndim}.")
    if channel_axis % ndim not in (a % ndim for a in axes):
        raise ValueError(
            f"LayerNorm: axis={axis} does not include the channel axis {channel_axis} of inputs of rank {ndim}, and "
            "only averages over infinitely many channels have a limit. Add it to `axis`."
        )
    return tuple(sorted({a % ndim for a in axes}))


def _mean(x: Array, axes: tuple[int, ...], mask: Array | None) -> Array:
    """Mean over the entries that are not masked, with axes of size 1 in the place of `axes`."""
    if mask is None:
        return jnp.mean(x, axes, keepdims=True)
    valid = jnp.broadcast_to(~mask, x.shape)
    count = jnp.sum(valid, axes, keepdims=True, dtype=x.dtype)
    return jnp.sum(x, axes, keepdims=True, where=valid) / jnp.maximum(count, 1)


def _weights(unmasked: Array, axes: tuple[int, ...]) -> Array:
    """Returns weights such that the mean over some axes of `(n, *space)` is that of what is not masked."""
    share = jnp.mean(unmasked, tuple(1 + a for a in axes), keepdims=True, dtype=float)
    return jnp.broadcast_to(1 / jnp.where(share > 0, share, 1), unmasked.shape)


def _normalize_over_batch(kernel: Kernel, step: steps.Normalize) -> Kernel:
    step.infer(kernel.spec)  # checks it
    axes = (0, *(1 + i for i in step.space_axes))

    def scale(cov: Array, masked: Array | None) -> Array:
        """Returns `1 / sqrt(eps + variance)` as `(n, *space)`."""
        variance = cov if kernel.diagonal_spatial else zipped_diagonal(cov, 1)
        total = jnp.broadcast_to(step.eps + _mean(variance, axes, masked), variance.shape)
        positive = total > 0  # with eps = 0, zero inputs stay zero
        return jnp.where(positive, lax.rsqrt(jnp.where(positive, total, 1)), 0)

    return kernel.rescale(*kernel.per_sample(scale)).replace(is_input=False)
