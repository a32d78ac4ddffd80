"""What is known of a covariance before any of its numbers is: shapes, axes and storage layout."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a `Kernel`.

    Attributes:
      shape1, shape2: shapes of the activations of the finite network, batch and channel axes included.
      batch_axis, channel_axis: their positions in `shape1` and `shape2`, non-negative. All other axes are spatial.
      is_gaussian: the activations are Gaussian and independent over channels (the last layer was a linear one).
      is_reversed: pairs of spatial axes are stored last to first, see `Kernel`.
      is_input: these are the inputs of the network, or made of them without random weights and nonlinearities.
      diagonal_batch: covariances of a batch with itself hold only same-sample entries.
      diagonal_spatial: all covariances hold only same-position entries.
    """

    shape1: tuple[int, ...]
    shape2: tuple[int, ...]
    batch_axis: int
    channel_axis: int
    is_gaussian: bool = False
    is_reversed: bool = False
    is_input: bool = False
    diagonal_batch: bool = True
    diagonal_spatial: bool = False

    def replace(self, **changes) -> "Spec":
        return dataclasses.replace(self, **changes)

    @property
    def ndim(self) -> int:
        return len(self.shape1)

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """Axes of `shape1` that are neither batch nor channels, in order."""
        return tuple(a for a in range(self.ndim) if a not in (self.batch_axis, self.channel_axis))

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(self.shape1[a] for a in self.spatial_axes)

    @property
    def n_channels(self) -> int:
        return self.shape1[self.channel_axis]

    @property
    def n1(self) -> int:
        return self.shape1[self.batch_axis]

    @property
    def n2(self) -> int:
        return self.shape2[self.batch_axis]

    def with_shape(self, space: tuple[int, ...], n_channels: int) -> "Spec":
        """Returns this spec with other sizes of the spatial and channel axes (same number of axes)."""
        return self.replace(
            shape1=_resized(self.shape1, self, space, n_channels), shape2=_resized(self.shape2, self, space, n_channels)
        )


def _resized(shape: tuple[int, ...], spec: Spec, space: tuple[int, ...], n_channels: int) -> tuple[int, ...]:
    sizes = list(shape)
    for axis, size in zip(spec.spatial_axes, space, strict=True):
        sizes[axis] = size
    sizes[spec.channel_axis] = n_channels
    return tuple(sizes)
