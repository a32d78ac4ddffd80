"""Convolutions as products with patches of the images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, primitives

from nt_empirical._factors import Labels, new_labels
from nt_empirical._uses import Step, Use, shape_of


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
        inputs[0],
        images_at[2:],
        filters.shape[split + 2 :],
        [shape[axis] for axis in outputs_at[2:]],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    sizes = dict(zip(filters.axes, filters.shape, strict=True)) | {sample: shape[outputs_at[0]]}
    of_images: dict[int, Labels] = dict(
        zip(
            images_at,
            [
                (*group, sample) if params["batch_group_count"] > 1 else (sample,),
                (*group, channels) if params["feature_group_count"] > 1 else (channels,),
                *zip(places, taps, strict=True),
            ],
            strict=True,
        )
    )
    labels = tuple(label for axis in range(len(shape)) for label in of_images[axis])
    sizes |= {place: shape[axis] for place, axis in zip(places, outputs_at[2:], strict=True)}
    patches = patches.reshape([sizes[label] for label in labels])

    parts: dict[int, Labels] = dict(
        zip(outputs_at, [(sample,), (*group, features), *((p,) for p in places)], strict=True)
    )
    axes = tuple(label for axis in range(len(shape)) for label in parts[axis])
    new_shape = tuple(sizes[label] for label in axes)
    return filters.replace(axes=axes, shape=new_shape).times(patches, labels)


def _by_group(filters: Use, groups: int) -> Use | None:
    """Splits the leading axis, the output channels, into groups and the channels of each; None if it cannot be."""
    if groups == 1:
        return filters
    features, *others = filters.shape
    shape = (groups, features // groups, *others)
    return filters.moved(Step(primitives.reshape_p, (("new_sizes", shape), ("dimensions", None), ("sharding", None))))


def _patches(
    images: jax.Array,
    space: Sequence[int],
    taps: Sequence[int],
    places: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    image_dilation: Sequence[int],
    filter_dilation: Sequence[int],
) -> jax.Array:
    """Returns what a filter sees: for every axis of space two, of places and of taps.

    Args:
      images: an array.
      space: its axes of space; what follows is for each of them.
      taps, places: sizes of the filter, and of the outputs.
      strides, padding, image_dilation, filter_dilation: as for `jax.lax.conv_general_dilated`.
    """
    between = [(0, 0, 0)] * images.ndim
    for axis, (low, high), dilation in zip(space, padding, image_dilation, strict=True):
        between[axis] = (low, high, dilation - 1)
    images = jax.lax.pad(images, jnp.zeros((), images.dtype), between)
    for i in sorted(range(len(space)), key=lambda i: -space[i]):  # from the last axis, for they become two
        extent = (places[i] - 1) * strides[i] + 1
        starts = [tap * filter_dilation[i] for tap in range(taps[i])]
        if not places[i]:  # where images end before the first place, no tap lies inside
            extent, starts = 0, [0] * taps[i]
        seen = [jax.lax.slice_in_dim(images, start, start + extent, strides[i], axis=space[i]) for start in starts]
        images = jnp.stack(seen, axis=space[i] + 1)
    return images
