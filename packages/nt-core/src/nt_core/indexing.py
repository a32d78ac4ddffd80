"""Indices of activations: what `kernel[...]` takes, and what it does to shapes and masks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_core.spec import Spec

Index = tuple[slice | int, ...]


def expand_index(idx: Any, shape: tuple[int, ...]) -> Index:
    """Returns one slice or integer per axis."""
    index = idx if isinstance(idx, tuple) else (idx,)
    n_ellipses = sum(i is Ellipsis for i in index)
    n_given = len(index) - n_ellipses
    if n_ellipses > 1 or n_given > len(shape):
        raise IndexError(f"Index {idx} has two ellipses, or too many entries for activations of shape {shape}.")
    rest = (slice(None),) * (len(shape) - n_given)
    if n_ellipses:
        position = next(p for p, i in enumerate(index) if i is Ellipsis)
        index = index[:position] + rest + index[position + 1 :]
    else:
        index = index + rest
    for axis, (i, n) in enumerate(zip(index, shape, strict=True)):
        if not isinstance(i, slice | int | np.integer) or isinstance(i, bool):
            raise NotImplementedError(f"Index activations with integers, slices and an ellipsis, got {i!r} in {idx}.")
        if not isinstance(i, slice) and not -n <= i < n:
            raise IndexError(f"Index {i} is out of bounds for axis {axis} of activations of shape {shape}.")
    return index


def check_index(index: Index, spec: Spec) -> None:
    """Raises `NotImplementedError` if an index removes the batch axis, or selects channels."""
    if not isinstance(index[spec.batch_axis], slice):
        raise NotImplementedError(
            f"Index {index[spec.batch_axis]} would remove batch axis {spec.batch_axis}, and a kernel always has one. "
            "Use a slice to keep the axis."
        )
    channels = index[spec.channel_axis]
    if not isinstance(channels, slice) or range(spec.n_channels)[channels] != range(spec.n_channels):
        raise NotImplementedError(
            f"Index {channels} selects from channel axis {spec.channel_axis}, which is infinite. Use `:` there."
        )


def indexed_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Returns the shape of the indexed activations."""
    return tuple(len(range(n)[i]) for n, i in zip(shape, index, strict=True) if isinstance(i, slice))


def axis_after(index: Index, axis: int) -> int:
    """Returns the position of `axis` when the axes indexed by integers are gone."""
    return sum(isinstance(i, slice) for i in index[:axis])


def index_mask(mask: Array | None, shape: tuple[int, ...], channel_axis: int, index: Index) -> Array | None:
    """Returns the mask of the indexed activations, given that of activations of `shape`."""
    if mask is None:
        return None
    # Axes of size 1 are written out, so that any index applies; all channels are taken.
    sizes = [mask.shape[a] if a == channel_axis else n for a, n in enumerate(shape)]
    return jnp.broadcast_to(mask, sizes)[index]
