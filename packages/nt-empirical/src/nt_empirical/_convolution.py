"""Convolutions as products with patches of the images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, primitives

from nt_empirical._uses import Labels, Step, Use, new_labels, shape_of


def convolution(use: Use, which: int, inputs: list[Any], equation: JaxprEqn) -> Use | None:
    """The rule (see `_rules`) of a convolution, for its filters; with groups, axes are split into them and the rest."""
    params, shape = equation.params, shape_of(equation.outvars[0])
    images_at, filters_at, outputs_at = params["dimension_numbers"]
    filters = _by_group(use.taking(filters_at), max(params["feature_group_count"], params["batch_group_count"]))
    if which == 0 or filters is None:
        return None
    split = len(filters.axes) - len(shape)
    group, (features, channels, *taps) = filters.axes[:split], filters.axes[split:]
    sample, *places = new_labels(1 + len(taps))
    patches = _patches(
        jnp.transpose(inputs[0], images_at),
        filters.shape[split + 2 :],
        [shape[axis] for axis in outputs_at[2:]],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    of_samples = (*group, sample) if params["batch_group_count"] > 1 else (sample,)
    of_channels = (*group, channels) if params["feature_group_count"] > 1 else (channels,)
    of_space = tuple(label for pair in zip(places, taps, strict=True) for label in pair)
    sizes = dict(zip(filters.axes, filters.shape, strict=True)) | {sample: shape[outputs_at[0]]}
    patches = patches.reshape(*(sizes[label] for label in (*of_samples, *of_channels)), *patches.shape[2:])

    sizes |= {place: shape[axis] for place, axis in zip(places, outputs_at[2:], strict=True)}
    parts: dict[int, Labels] = dict(
        zip(outputs_at, [(sample,), (*group, features), *((p,) for p in places)], strict=True)
    )
    axes = tuple(label for axis in range(len(shape)) for label in parts[axis])
    new_shape = tuple(sizes[label] for label in axes)
    return filters.replace(axes=axes, shape=new_shape).times(patches, (*of_samples, *of_channels, *of_space))


def _by_group(filters: Use, groups: int) -> Use | None:
    """Splits the leading axis, the output channels, into groups and the channels of each; None if it cannot be."""
    if groups == 1:
        return filters
    features, *others = filters.shape
    shape = (groups, features // groups, *others)
    return filters.moved(Step(primitives.reshape_p, (("new_sizes", shape), ("dimensions", None), ("sharding", None))))


def _patches(
    images: jax.Array,
    taps: Sequence[int],
    places: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    image_dilation: Sequence[int],
    filter_dilation: Sequence[int],
) -> jax.Array:
    """Returns what a filter sees: axes of samples and channels, then for every axis of space those of places and taps.

    Args:
      images: axes are samples, channels, and those of space.
      taps, places: sizes of the filter, and of the outputs, along the axes of space.
      strides, padding, image_dilation, filter_dilation: as for `jax.lax.conv_general_dilated`.
    """
    between = [(low, high, dilation - 1) for (low, high), dilation in zip(padding, image_dilation, strict=True)]
    images = jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *between])
    for i in range(len(taps)):
        first, inside = jnp.arange(places[i]) * strides[i], jnp.arange(taps[i]) * filter_dilation[i]
        # The axes of space before this one have become two.
        images = jnp.take(images, jnp.expand_dims(first, 1) + jnp.expand_dims(inside, 0), axis=2 + 2 * i, mode="clip")
    return images
