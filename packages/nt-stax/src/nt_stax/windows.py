"""Windows that move over the spatial axes of activations: what convolutions and pools share."""

import enum
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from nt_core import steps


class Padding(enum.Enum):
    """What stands beyond the edges of an image: the other side of it, zeros, or nothing (windows stay inside)."""

    CIRCULAR = "CIRCULAR"
    SAME = "SAME"
    VALID = "VALID"


class Windows:
    """Windows over the spatial axes of activations.

    Args:
      layer: its name, for messages.
      window, strides, dilation: one number per spatial axis, in the order of the axes of the activations; `strides` and
        `dilation` may be None for 1.
      padding: a `Padding` or its value.
    """

    def __init__(
        self,
        layer: str,
        window: Sequence[int],
        strides: Sequence[int] | None,
        padding: str | Padding,
        dilation: Sequence[int] | None = None,
    ) -> None:
        self.layer = layer
        self.window = _sizes(layer, "window", window)
        ones = (1,) * len(self.window)
        self.strides = _sizes(layer, "strides", ones if strides is None else strides)
        self.dilation = _sizes(layer, "rhs_dilation", ones if dilation is None else dilation)
        for name, sizes in (("strides", self.strides), ("rhs_dilation", self.dilation)):
            if len(sizes) != len(self.window):
                raise ValueError(
                    f"{layer}: {name} {sizes} and window {self.window} must have one number per spatial axis."
                )
        try:
            self.padding: str = Padding(padding).value
        except ValueError:
            raise ValueError(
                f"{layer}: padding={padding!r} is unknown, use one of {', '.join(p.name for p in Padding)}."
            ) from None

    @property
    def extents(self) -> tuple[int, ...]:
        """How many positions lie between the ends of a window, its gaps included."""
        return tuple((w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True))

    def in_order(self, order: Sequence[int]) -> "Windows":
        """Returns the windows with spatial axis `order[i]` in the place of axis `i`."""
        window, strides, dilation = ([sizes[i] for i in order] for sizes in (self.window, self.strides, self.dilation))
        return Windows(self.layer, window, strides, self.padding, dilation)

    def space(self, space: Sequence[int]) -> tuple[int, ...]:
        """Returns the number of windows along each axis, -1 along axes of unknown size (-1)."""
        return tuple(
            -1 if n < 0 else steps.window_space((n,), (w,), (s,), self.padding, (d,), self.layer)[0]
            for n, w, s, d in zip(space, self.window, self.strides, self.dilation, strict=True)
        )

    def padded(self, x: Array, axes: Sequence[int]) -> tuple[Array, steps.Pads]:
        """Wraps the spatial axes of `x` around, if so asked. Returns also the zeros that are still to be padded."""
        space = [x.shape[a] for a in axes]
        self.space(space)  # raises where a window does not fit
        pads = steps.window_pads(space, self.window, self.strides, self.padding, self.dilation)
        if self.padding != Padding.CIRCULAR.value:
            return x, pads
        widths = [(0, 0)] * x.ndim
        for axis, pad in zip(axes, pads, strict=True):
            widths[axis] = pad
        return jnp.pad(x, widths, mode="wrap"), ((0, 0),) * len(pads)

    def mask(self, mask: Array, shape: Sequence[int], axes: Sequence[int]) -> Array:
        """Returns the mask of the windows: a window is masked where its centre is.

        Args:
          mask: broadcasts to `shape`.
          shape: of the activations.
          axes: the spatial axes.
        """
        space = [shape[a] for a in axes]
        pads = steps.window_pads(space, self.window, self.strides, self.padding, self.dilation)
        index = [slice(None)] * mask.ndim
        counts = self.space(space)
        for axis, extent, s, (low, _), count in zip(axes, self.extents, self.strides, pads, counts, strict=True):
            if mask.shape[axis] > 1:
                first = (extent - 1) // 2 - low
                index[axis] = slice(first, first + (count - 1) * s + 1, s)
        return mask[tuple(index)]


def _sizes(layer: str, what: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if any(int(n) != n or n < 1 for n in sizes):
        raise ValueError(f"{layer}: {what} must be positive integers, one per spatial axis, got {tuple(sizes)}.")
    return tuple(int(n) for n in sizes)
