"""Layer normalisation, and that by the root mean square alone."""

from collections.abc import Callable, Sequence

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

    return _normalization("LayerNorm", axis, eps, batch_axis, channel_axis, subtracts_mean=True)


@layer
@supports_masking(remask_kernel=False)
def RMSNorm(axis: int | Sequence[int] = -1, eps: float = 1e-6, batch_axis: int = 0, channel_axis: int = -1):
    """Division by the root mean square, `x / sqrt(eps + mean(x^2))` over some axes (arXiv:1910.07467).

    In kernels it is what `LayerNorm` is: a covariance of two samples, and their tangent kernel, are divided by
    `sqrt((eps + v1) (eps + v2))`, with `v` the average over the normalised positions of a sample's covariance with
    itself. Inputs need not be Gaussian: it may follow a nonlinearity, or be the first layer. Masked entries do not
    count for the mean.

    Args:
      axis: the axes to be normalised over, in any order. The channel axis must be among them. With the batch axis, the
        statistics are those of all samples of a batch together.
      eps: added to the mean square.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    Raises:
      ValueError: the channel axis is not in `axis`, or `axis` does not fit the inputs.
      NotImplementedError: the kernel of inputs that are masked in some channels only.

    >>> from nt_stax import Dense, RMSNorm, Relu, serial
    >>> _, _, kernel_fn = serial(Dense(512, W_std=3.0), Relu(), RMSNorm())
    >>> print(kernel_fn(jnp.ones((1, 3)), 2 * jnp.ones((1, 3)), "nngp").round(4))
    [[1.]]
    """
    return _normalization("RMSNorm", axis, eps, batch_axis, channel_axis, subtracts_mean=False)


def _normalization(
    name: str, axis: int | Sequence[int], eps: float, batch_axis: int, channel_axis: int, subtracts_mean: bool
) -> tuple[Callable, Callable, Rule]:
    """Returns the layer of this name. The mean matters to the finite network alone: it is 0 in the limit."""

    def axes_of(ndim: int) -> tuple[int, ...]:
        return _normalized_axes(name, axis, ndim, channel_axis)

    def init_fn(rng, input_shape):
        axes_of(len(input_shape))
        return input_shape, ()

    def apply_fn(params, inputs, *, mask=None, **kwargs):
        axes = axes_of(inputs.ndim)
        if subtracts_mean:
            inputs = inputs - _mean(inputs, axes, mask)
        return inputs / jnp.sqrt(eps + _mean(inputs**2, axes, mask))

    def step_for(spec: Spec, *weights: Array | None) -> steps.Normalize:
        if subtracts_mean and not spec.is_gaussian:
            raise NotImplementedError(
                f"{name} of non-Gaussian inputs, whose mean is not zero, has no kernel here: put a Dense or Conv layer "
                "before it, or take RMSNorm."
            )
        return steps.Normalize(eps, space_axes(spec), *weights)

    def space_axes(spec: Spec) -> tuple[int, ...]:
        axes = axes_of(spec.ndim)
        return tuple(i for i, a in enumerate(spec.spatial_axes) if a in axes)

    def emit(builder: Builder, value: Value) -> Value:
        if value.spec.batch_axis in axes_of(value.spec.ndim):
            raise NoStep
        masks = (None, None)
        if value.masks is not None:  # which the mean over positions leaves out
            masks = value.masks.unmasked(value.spec)
        axes = space_axes(value.spec)
        weights = [None if unmasked is None or not axes else _weights(unmasked, axes) for unmasked in masks]
        return builder.add(step_for(value.spec, *weights), value)

    def over_batch(kernel: Kernel, run: Run) -> Kernel:
        if kernel.is_reversed:
            return over_batch(kernel.reverse(), run).reverse()
        return _normalize_over_batch(kernel, step_for(kernel.spec))

    requirements = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    return init_fn, apply_fn, Rule(name, requirements, emit, over_batch)


def _normalized_axes(name: str, axis: int | Sequence[int], ndim: int, channel_axis: int) -> tuple[int, ...]:
    """Returns the axes to be normalised over, non-negative and checked."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name}: axis={axis} must name axes of inputs of rank {ndim}.")
    if channel_axis % ndim not in (a % ndim for a in axes):
        raise ValueError(
            f"{name}: axis={axis} does not include the channel axis {channel_axis} of inputs of rank {ndim}, and "
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
    axes = (0, *(1 + i for i in step.space_axes))

    def scale(cov: Array, masked: Array | None) -> Array:
        """Returns `1 / sqrt(eps + variance)` as `(n, *space)`."""
        variance = cov if kernel.diagonal_spatial else zipped_diagonal(cov, 1)
        total = jnp.broadcast_to(step.eps + _mean(variance, axes, masked), variance.shape)
        positive = total > 0  # with eps = 0, zero inputs stay zero
        return jnp.where(positive, lax.rsqrt(jnp.where(positive, total, 1)), 0)

    return kernel.rescale(*kernel.per_sample(scale))
