"""Parts of activations: `Index`, and `Slice` to write the indices."""

import sys
from collections.abc import Sequence
from typing import Any

from nt_core import Builder, Kernel, Rule, Run, Spec, Value, layer, steps, supports_masking
from nt_core.authoring import NoStep, expand_index, index_mask


class _Slice:
    """Returns the index that it is given, for `Index`.

    >>> from nt_stax import Slice
    >>> Slice[:, 1:3, ...]
    (slice(None, None, None), slice(1, 3, None), Ellipsis)
    """

    def __getitem__(self, idx: Any) -> Any:
        return idx


Slice = _Slice()


@layer
@supports_masking(remask_kernel=False)
def Index(idx: Any, batch_axis: int = 0, channel_axis: int = -1):
    """Takes part of the activations, `inputs[idx]`: some positions, the position of one token, every other sample.

    Args:
      idx: integers, slices and an ellipsis, as `Slice[...]` gives them, for all axes of the inputs. An integer for a
        spatial axis drops it.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    Raises:
      ValueError: `init_fn` of an axis of unknown size (-1) that is not taken whole.
      NotImplementedError: the kernel of a part of the channels, of which there are infinitely many, or of one sample
        without its axis (for sample `i` write `i:i + 1`); `idx` holds arrays, None or booleans.

    >>> import jax.numpy as jnp
    >>> from nt_stax import Index, Slice
    >>> _, apply_fn, kernel_fn = Index(Slice[:, -1])
    >>> x = jnp.array([[[1.0], [3.0]], [[2.0], [5.0]]])  # two samples, two positions, one channel
    >>> print(apply_fn((), x).T, kernel_fn(x, None, "nngp"), sep="\\n")
    [[3. 5.]]
    [[ 9. 15.]
     [15. 25.]]
    """

    def init_fn(rng, input_shape):
        return _indexed_shape(idx, input_shape), ()

    def apply_fn(params, inputs, **kwargs):
        return inputs[expand_index(idx, inputs.shape)]

    def mask_fn(mask, input_shape):
        return index_mask(mask, input_shape, channel_axis % len(input_shape), expand_index(idx, input_shape))

    def emit(builder: Builder, value: Value) -> Value:
        positions, drops_axes = _positions(idx, value.spec)
        taken = copied(builder, value, positions)
        return builder.add(steps.GlobalPool(mean=True), taken) if drops_axes else taken

    def function(kernel: Kernel, run: Run) -> Kernel:
        return kernel[idx]

    requirements = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    return init_fn, apply_fn, Rule("Index", requirements, emit, function), mask_fn


def copied(builder: Builder, value: Value, positions: tuple[tuple[int, ...], ...]) -> Value:
    """Emits copies of these positions, along each spatial axis; nothing if they are all of them, in order."""
    if positions == tuple(tuple(range(n)) for n in value.spec.space):
        return value
    return builder.add(steps.Gather(positions), value)


def _positions(idx: Any, spec: Spec) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Returns which positions are taken along each spatial axis, and whether that is one, without its axes.

    Raises:
      NoStep: other samples are taken, or channels; nothing is; or some spatial axes are dropped, and some are not.
    """
    index = expand_index(idx, spec.shape1)
    whole = [(index[spec.batch_axis], n) for n in (spec.n1, spec.n2)] + [(index[spec.channel_axis], spec.n_channels)]
    if any(not isinstance(i, slice) or range(n)[i] != range(n) for i, n in whole):
        raise NoStep
    along_space = [index[a] for a in spec.spatial_axes]
    dropped = [not isinstance(i, slice) for i in along_space]
    taken = [range(n)[i] for n, i in zip(spec.space, along_space, strict=True)]
    positions = tuple((along,) if isinstance(along, int) else tuple(along) for along in taken)
    if not all(positions) or (any(dropped) and not all(dropped)):
        raise NoStep
    return positions, any(dropped)


def _indexed_shape(idx: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of an indexed array, of which some axes may have unknown sizes (-1)."""
    index = expand_index(idx, tuple(sys.maxsize if n < 0 else n for n in shape))
    if any(n < 0 and i != slice(None) for n, i in zip(shape, index, strict=True)):
        raise ValueError(
            f"Index {idx} takes part of an axis of unknown size: input_shape={tuple(shape)}, where -1 stands for an "
            "unknown size. Give its size, or use `:` there."
        )
    return tuple(n if n < 0 else len(range(n)[i]) for n, i in zip(shape, index, strict=True) if isinstance(i, slice))
