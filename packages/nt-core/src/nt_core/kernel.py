"""Covariances of two batches of activations, with all that is needed to carry them through the next layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.contractions import Contraction
from nt_core.layouts import interleave_ones, reverse_zipped, transpose_zipped
from nt_core.spec import Spec


def _static() -> Any:
    return dataclasses.field(metadata={"pytree_node": False})


# Compared by identity: `==` on arrays has no truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """Covariances of two batches of activations, of an infinitely wide network.

    With `N1` and `N2` samples and spatial axes `H, W`, a covariance between all positions is stored *zipped*, as
    `(N1, N2, H, H, W, W)`: position in the first sample, then in the second, axis by axis. With `is_reversed` the last
    axis comes first, `(N1, N2, W, W, H, H)`. With `diagonal_spatial` only equal positions are stored, as
    `(N1, N2, H, W)`. Batch axes lead, wherever `batch_axis` is. A kernel is a pytree of the fields that are arrays.

    Attributes:
      nngp: covariance of the first batch with the second, divided by the number of channels.
      ntk: neural tangent kernel, shaped as `nngp`; a scalar zero before the first layer with parameters, None if it was
        not asked for.
      cov1: covariance of the first batch with itself, `(N1, H, H, W, W)`, or `(N1, N1, H, H, W, W)` without
        `diagonal_batch`. None if it was not asked for.
      cov2: the same of the second batch; None also where the second batch is the first.
      x1_is_x2: whether both batches are the same samples, a boolean or a boolean array.
      is_gaussian: the activations are Gaussian and independent over channels.
      is_reversed: pairs of spatial axes are stored last to first; no meaning with `diagonal_spatial`.
      is_input: these are the inputs of the network.
      diagonal_batch: `cov1` and `cov2` hold only same-sample entries.
      diagonal_spatial: all covariances hold only same-position entries.
      shape1, shape2: shapes of the activations of the finite network, batch and channel axes included.
      batch_axis, channel_axis: their positions in `shape1` and `shape2`, non-negative. All other axes are spatial.
      mask1, mask2: booleans that broadcast to `shape1` and `shape2`, True where masked. None where nothing is masked;
        `mask2` also where the second batch is the first (`cov2` is None).

    >>> import jax.numpy as jnp
    >>> from nt_core import Kernel
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> kernel = Kernel(
    ...     nngp=x @ x.T / 2, ntk=None, cov1=jnp.mean(x**2, axis=1), cov2=None, x1_is_x2=True,
    ...     is_gaussian=False, is_reversed=False, is_input=True, diagonal_batch=True, diagonal_spatial=False,
    ...     shape1=(2, 2), shape2=(2, 2), batch_axis=0, channel_axis=1)
    >>> print((2.0 * kernel).nngp)
    [[10. 22.]
     [22. 50.]]
    """

    nngp: Array
    ntk: Array | None
    cov1: Array | None
    cov2: Array | None
    x1_is_x2: bool | Array
    is_gaussian: bool = _static()
    is_reversed: bool = _static()
    is_input: bool = _static()
    diagonal_batch: bool = _static()
    diagonal_spatial: bool = _static()
    shape1: tuple[int, ...] = _static()
    shape2: tuple[int, ...] = _static()
    batch_axis: int = _static()
    channel_axis: int = _static()
    mask1: Array | None = None
    mask2: Array | None = None

    @classmethod
    def from_spec(
        cls,
        spec: Spec,
        *,
        nngp: Array,
        ntk: Array | None,
        cov1: Array | None,
        cov2: Array | None,
        x1_is_x2: bool | Array,
        mask1: Array | None = None,
        mask2: Array | None = None,
    ) -> "Kernel":
        """Returns the kernel with these arrays, in the layout of `spec`."""
        return cls(
            nngp=nngp, ntk=ntk, cov1=cov1, cov2=cov2, x1_is_x2=x1_is_x2, mask1=mask1, mask2=mask2, **_fields_of(spec)
        )

    @property
    def spec(self) -> Spec:
        """The static part: shapes, axes and layout."""
        return Spec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Spec)})

    def replace(self, **changes: Any) -> "Kernel":
        """Returns a copy with other values of the named fields."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """Returns the fields by name, in order; arrays are not copied."""
        return _fields_of(self)

    def astuple(self) -> tuple[Any, ...]:
        """Returns the fields in order; arrays are not copied."""
        return tuple(_fields_of(self).values())

    def slice(self, n1_slice: slice, n2_slice: slice) -> "Kernel":
        """Returns the kernel of some samples of the first batch with some of the second.

        Args:
          n1_slice, n2_slice: slices of the batches.

        The result has a second batch of its own (`cov2` is not None). `x1_is_x2` becomes False if the slices take
        different samples.
        """
        for s in (n1_slice, n2_slice):
            if not isinstance(s, slice):
                raise TypeError(f"Kernel.slice takes slices, got {s!r}. For the single sample i: slice(i, i + 1).")
        spec, second = self.spec, self._with_second_batch()
        rows, columns = range(spec.n1)[n1_slice], range(spec.n2)[n2_slice]
        sliced = second._map(
            lambda k: k[n1_slice, n2_slice],
            lambda k: k[(n1_slice,) * self._batch_ndim],
            lambda k: k[(n2_slice,) * self._batch_ndim],
        )
        return sliced.replace(
            x1_is_x2=self.x1_is_x2 if rows == columns else False,
            shape1=_with_size(self.shape1, self.batch_axis, len(rows)),
            shape2=_with_size(self.shape2, self.batch_axis, len(columns)),
            mask1=_slice_mask(self.mask1, self.batch_axis, n1_slice),
            mask2=_slice_mask(second.mask2, self.batch_axis, n2_slice),
        )

    def reverse(self) -> "Kernel":
        """Stores pairs of spatial axes in the opposite order; the meaning stays the same."""
        reversed_pairs = self if self.diagonal_spatial else self._map_space(reverse_zipped)
        return reversed_pairs.replace(is_reversed=not self.is_reversed)

    def transpose(self, axes: Sequence[int] | None = None) -> "Kernel":
        """Permutes the spatial axes: axis `i` of the result is axis `axes[i]` of this kernel, with None the same.

        Spatial axes are numbered from 0 in the order of `shape1`, without batch and channel axes.
        """
        if axes is None:
            return self
        spatial_axes = self.spec.spatial_axes
        if sorted(axes) != list(range(len(spatial_axes))):
            raise ValueError(
                f"Expected a permutation of the {len(spatial_axes)} spatial axes (numbered from 0) of activations of "
                f"shape {self.shape1}, got {tuple(axes)}."
            )
        order = list(range(len(self.shape1)))
        for axis, source in zip(spatial_axes, axes, strict=True):
            order[axis] = spatial_axes[source]
        return self._map_space(self._transposition(axes)).replace(
            shape1=tuple(self.shape1[a] for a in order),
            shape2=tuple(self.shape2[a] for a in order),
            mask1=None if self.mask1 is None else jnp.transpose(self.mask1, order),
            mask2=None if self.mask2 is None else jnp.transpose(self.mask2, order),
        )

    def mask(self, mask1: Array | None, mask2: Array | None) -> "Kernel":
        """Zeroes the entries of which either position is masked, and keeps the masks.

        Args:
          mask1, mask2: booleans that broadcast to `shape1` and `shape2`, True where masked, the same for all channels.
            None masks nothing; but `mask2=None` stands for `mask1` where the second batch is the first (`cov2` is
            None).

        Raises:
          NotImplementedError: a mask differs between channels.
        """
        mask11, mask12, mask22 = self._get_mask_prods(mask1, mask2)
        masked = self._map(lambda k: _zeroed(k, mask12), lambda k: _zeroed(k, mask11), lambda k: _zeroed(k, mask22))
        return masked.replace(mask1=mask1, mask2=mask2)

    def dot_general(
        self,
        other1: Array | float | None,
        other2: Array | float | None,
        is_lhs: bool,
        dimension_numbers: lax.DotDimensionNumbers,
    ) -> "Kernel":
        """Returns the kernel of `lax.dot_general` of constants with the activations.

        The result is never reversed, and has no masks: they are for the caller to set. Where the batch axis is
        contracted, covariances are laid out over all remaining axes in order, as the output of a last layer.

        Args:
          other1, other2: the constants that the first and the second batch are multiplied with. None for both changes
            nothing.
          is_lhs: the constants are the left operand, the activations the right one.
          dimension_numbers: as in `lax.dot_general`. The channel axis is not among them.

        Raises:
          NotImplementedError: the two constants differ in rank.
          ValueError: the channel axis is contracted or shared, or an axis is contracted of which only the diagonal is
            stored.
        """
        if other1 is None and other2 is None:
            return self
        same_constant = other1 is other2
        other1, other2 = (None if other is None else jnp.asarray(other) for other in (other1, other2))
        if other1 is None or other2 is None or other1.ndim != other2.ndim:
            ranks = tuple(None if other is None else other.ndim for other in (other1, other2))
            raise NotImplementedError(f"dot_general needs two constants of the same rank, got ranks {ranks}.")
        contraction = Contraction(self.spec, other1.ndim, is_lhs, dimension_numbers)
        contraction.check()
        shape1 = contraction.shape(self.shape1, other1.shape)
        shape2 = contraction.shape(self.shape2, other2.shape)
        # With a constant of its own, the second batch is no longer the first.
        kernel = self if same_constant else self._with_second_batch()
        if self.is_reversed:
            kernel = kernel.reverse()
        return kernel._map(
            lambda k: contraction.covariance(k, other1, other2, same_sample=False),
            lambda k: contraction.covariance(k, other1, other1, same_sample=self.diagonal_batch),
            lambda k: contraction.covariance(k, other2, other2, same_sample=self.diagonal_batch),
        ).replace(
            shape1=shape1,
            shape2=shape2,
            batch_axis=contraction.batch_axis,
            channel_axis=contraction.channel_axis,
            mask1=None,
            mask2=None,
        )

    def __getitem__(self, idx: Any) -> "Kernel":
        """Returns the kernel of the activations indexed with `idx`: slices, integers and an ellipsis.

        Raises:
          NotImplementedError: `idx` removes the batch axis, or selects channels.
        """
        spec = self.spec
        index = _expand_index(idx, self.shape1)
        _check_index(index, spec)
        batch = index[self.batch_axis]
        space = [index[a] for a in spec.spatial_axes]
        if self.is_reversed and not self.diagonal_spatial:
            space.reverse()
        space = tuple(i for i in space for _ in range(1 if self.diagonal_spatial else 2))
        indexed = self._map(
            lambda k: k[(batch, batch, *space)],
            lambda k: k[(batch,) * self._batch_ndim + space],
            lambda k: k[(batch,) * self._batch_ndim + space],
        )
        return indexed.replace(
            shape1=_indexed_shape(self.shape1, index),
            shape2=_indexed_shape(self.shape2, index),
            batch_axis=_axis_after(index, self.batch_axis),
            channel_axis=_axis_after(index, self.channel_axis),
            mask1=_index_mask(self.mask1, self.shape1, self.channel_axis, index),
            mask2=_index_mask(self.mask2, self.shape2, self.channel_axis, index),
        )

    def __mul__(self, other: float) -> "Kernel":
        """Returns the kernel of the activations times a number: covariances are multiplied by its square."""
        if isinstance(other, Kernel):
            return NotImplemented
        return self._scale(other**2)

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> "Kernel":
        """Returns the kernel of the activations divided by a number."""
        if isinstance(other, Kernel):
            return NotImplemented
        return self._scale(1.0 / other**2)

    def __add__(self, other: float) -> "Kernel":
        """Returns the kernel of the activations plus `other` times an independent standard normal bias per channel."""
        if isinstance(other, Kernel):
            return NotImplemented
        shifted = self.replace(ntk=None)._map(*(lambda k: k + other**2,) * 3)
        return shifted.replace(ntk=self.ntk)

    __sub__ = __add__  # the bias is symmetric

    def __neg__(self) -> "Kernel":
        return self

    def __pos__(self) -> "Kernel":
        return self

    @property
    def _batch_ndim(self) -> int:
        """Number of batch axes of `cov1` and `cov2`."""
        return 1 if self.diagonal_batch else 2

    def _with_second_batch(self) -> "Kernel":
        """Spells out `cov2` and `mask2` where the second batch is the first."""
        if self.cov2 is not None:
            return self
        return self.replace(cov2=self.cov1, mask2=self.mask1 if self.mask2 is None else self.mask2)

    def _map(
        self, between: Callable[[Array], Array], first: Callable[[Array], Array], second: Callable[[Array], Array]
    ) -> "Kernel":
        """Applies `between` to `nngp` and `ntk`, `first` to `cov1` and `second` to `cov2`, where there are any."""
        return self.replace(
            nngp=None if self.nngp is None else between(self.nngp),
            # A scalar zero has no entries to be selected or combined.
            ntk=self.ntk if self.ntk is None or jnp.ndim(self.ntk) == 0 else between(self.ntk),
            cov1=None if self.cov1 is None else first(self.cov1),
            cov2=None if self.cov2 is None else second(self.cov2),
        )

    def _map_space(self, fn: Callable[[Array, int], Array]) -> "Kernel":
        """Applies `fn(covariance, start)`, with `start` the first spatial axis, to all covariances."""
        within = lambda k: fn(k, self._batch_ndim)  # noqa: E731
        return self._map(lambda k: fn(k, 2), within, within)

    def _scale(self, factor: Any) -> "Kernel":
        return self._map(*(lambda k: k * factor,) * 3)

    def _transposition(self, axes: Sequence[int]) -> Callable[[Array, int], Array]:
        if self.diagonal_spatial:
            return lambda k, start: jnp.transpose(k, [*range(start), *(start + a for a in axes)])
        order = [len(axes) - 1 - a for a in reversed(axes)] if self.is_reversed else axes
        return lambda k, start: transpose_zipped(k, order, start)

    def _get_mask_prods(
        self, mask1: Array | None, mask2: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Returns where `cov1`, `nngp` and `cov2` are masked, because either position is."""
        if mask1 is None and mask2 is None:
            return None, None, None
        if mask2 is None and self.cov2 is None:
            mask2 = mask1
        first = _mask_of_positions(mask1, self.shape1, self.spec)
        second = _mask_of_positions(mask2, self.shape2, self.spec)
        return (
            self._mask_of_pairs(first, first, same_sample=self.diagonal_batch),
            self._mask_of_pairs(first, second, same_sample=False),
            self._mask_of_pairs(second, second, same_sample=self.diagonal_batch),
        )

    def _mask_of_pairs(self, first: Array, second: Array, same_sample: bool) -> Array:
        start = 1 if same_sample else 0
        stop = 1 if self.diagonal_spatial else first.ndim
        masked = interleave_ones(first, start, stop, second=False) | interleave_ones(second, start, stop, second=True)
        if self.is_reversed and not self.diagonal_spatial:
            return reverse_zipped(masked, 2 - start)
        return masked


jax.tree_util.register_dataclass(
    Kernel,
    data_fields=[f.name for f in dataclasses.fields(Kernel) if f.metadata.get("pytree_node", True)],
    meta_fields=[f.name for f in dataclasses.fields(Kernel) if not f.metadata.get("pytree_node", True)],
)


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _zeroed(k: Array, mask: Array | None) -> Array:
    return k if mask is None else jnp.where(mask, jnp.zeros((), k.dtype), k)


def _with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return shape[:axis] + (size,) + shape[axis + 1 :]


def _slice_mask(mask: Array | None, batch_axis: int, batch_slice: slice) -> Array | None:
    if mask is None or mask.shape[batch_axis] == 1:  # one mask for all samples
        return mask
    return mask[(slice(None),) * batch_axis + (batch_slice,)]


def _mask_of_positions(mask: Array | None, shape: tuple[int, ...], spec: Spec) -> Array:
    """Returns a mask as `(n, *space)`."""
    sizes = _with_size(shape, spec.channel_axis, 1)
    if mask is None:
        mask = jnp.zeros(sizes, bool)
    if mask.ndim != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"A mask must broadcast to the shape {shape} of the activations, got shape {mask.shape}.")
    if mask.shape[spec.channel_axis] != 1:
        raise NotImplementedError(
            f"Masks that differ between channels have no infinite-width limit here, got a mask of shape {mask.shape} "
            f"with channel axis {spec.channel_axis}. Mask all channels of a position, or none."
        )
    mask = jnp.squeeze(jnp.broadcast_to(mask, sizes), spec.channel_axis)
    return jnp.moveaxis(mask, spec.batch_axis - (spec.batch_axis > spec.channel_axis), 0)


def _expand_index(idx: Any, shape: tuple[int, ...]) -> tuple[slice | int, ...]:
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


def _check_index(index: tuple[slice | int, ...], spec: Spec) -> None:
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


def _indexed_shape(shape: tuple[int, ...], index: tuple[slice | int, ...]) -> tuple[int, ...]:
    return tuple(len(range(n)[i]) for n, i in zip(shape, index, strict=True) if isinstance(i, slice))


def _axis_after(index: tuple[slice | int, ...], axis: int) -> int:
    """Returns the position of `axis` when the axes indexed by integers are gone."""
    return sum(isinstance(i, slice) for i in index[:axis])


def _index_mask(
    mask: Array | None, shape: tuple[int, ...], channel_axis: int, index: tuple[slice | int, ...]
) -> Array | None:
    if mask is None:
        return None
    # Axes of size 1 are written out, so that any index applies; all channels are taken.
    return jnp.broadcast_to(mask, _with_size(shape, channel_axis, mask.shape[channel_axis]))[index]
