"""Covariances of two batches of activations, with all that is needed to carry them through the next layer."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.contractions import Contraction
from nt_core.indexing import axis_after, check_index, expand_index, index_mask, indexed_shape
from nt_core.layouts import (
    interleave_ones,
    make_2d,
    reverse_zipped,
    same_sample,
    to_positions,
    transpose_zipped,
    zip_axes,
)
from nt_core.masks import mask_of_positions
from nt_core.spec import Spec

_T = TypeVar("_T")


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
      is_input: these are the inputs of the network, or made of them without random weights and nonlinearities.
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

    def map(self, fn: Callable[..., Array], first: Any = None, second: Any = None) -> "Kernel":
        """Applies a function to all covariances that there are.

        What was not asked for stays None, and a tangent kernel that is a scalar zero stays zero. Where the second batch
        is the first (`cov2` is None), `cov1` is read off the new `nngp`, so that equal inputs stay exactly equal.

        Args:
          fn: `fn(k)` or, with `first`, `fn(k, a, b)`: takes a covariance in the layout of this kernel, and returns one.
          first: what `fn` needs to know of each sample of the first batch: an array whose leading axis is that of the
            samples, or a pytree of these. For the pairs of samples in `k`, `fn` gets that of the first ones as `a` and
            that of the second ones as `b`, with axes of size 1 such that their leading axes broadcast against `k`.
          second: the same of the second batch; None for `first`.

        >>> import jax.numpy as jnp
        >>> from nt_core.layer import layer
        >>> @layer
        ... def DivideByIndex():  # divides sample i by i + 1
        ...     def init_fn(rng, input_shape):
        ...         return input_shape, ()
        ...     def apply_fn(params, inputs, **kwargs):
        ...         return inputs / (1.0 + jnp.arange(len(inputs)))[:, None]
        ...     def kernel_fn(kernel, **kwargs):
        ...         number1, number2 = (1.0 + jnp.arange(n) for n in kernel.nngp.shape)
        ...         return kernel.map(lambda k, a, b: k / (a * b), number1, number2)
        ...     return init_fn, apply_fn, kernel_fn
        >>> print(DivideByIndex()[2](jnp.ones((2, 1)), jnp.ones((3, 1)), "nngp"))
        [[1.     0.5    0.3333]
         [0.5    0.25   0.1667]]
        """
        second = first if second is None else second

        def of_pairs(k: Array, a: Any, b: Any) -> Array:
            return fn(k) if first is None else fn(k, _with_axis(a, 1), _with_axis(b, 0))

        def within(k: Array, a: Any) -> Array:
            if not self.diagonal_batch:
                return of_pairs(k, a, a)
            return fn(k) if first is None else fn(k, a, a)

        is_one_batch = self.cov1 is not None and self.cov2 is None
        mapped = (self.replace(cov1=None) if is_one_batch else self)._map(
            lambda k: of_pairs(k, first, second), lambda k: within(k, first), lambda k: within(k, second)
        )
        if not is_one_batch:
            return mapped
        return mapped.replace(cov1=same_sample(mapped.nngp) if self.diagonal_batch else mapped.nngp)

    def per_sample(self, fn: Callable[[Array, Array | None], _T]) -> tuple[_T, _T]:
        """Computes something of each sample alone, for both batches: `map` takes the results.

        Args:
          fn: `fn(cov, mask)`, with the covariances of samples with themselves, `(n, H, H, W, W)` (as `cov1` with
            `diagonal_batch`), and which positions are masked, `(n, H, W)`, or None if none is.

        Returns:
          That of the first batch and that of the second; the same object where the second batch is the first.

        Raises:
          ValueError: the kernel has no `cov1`.
          NotImplementedError: a mask differs between channels.

        >>> import jax.numpy as jnp
        >>> from nt_core.layer import layer
        >>> @layer
        ... def UnitVariance():  # divides each sample by its norm
        ...     def init_fn(rng, input_shape):
        ...         return input_shape, ()
        ...     def apply_fn(params, inputs, **kwargs):
        ...         return inputs / jnp.sqrt(jnp.mean(inputs**2, axis=1, keepdims=True))
        ...     def kernel_fn(kernel, **kwargs):
        ...         variance1, variance2 = kernel.per_sample(lambda cov, mask: cov)
        ...         return kernel.map(lambda k, a, b: k / jnp.sqrt(a * b), variance1, variance2)
        ...     return init_fn, apply_fn, kernel_fn
        >>> print(UnitVariance()[2](jnp.array([[3.0, 0.0], [3.0, 4.0]]), None, "nngp"))
        [[1.  0.6]
         [0.6 1. ]]
        """
        if self.cov1 is None:
            raise ValueError(
                "This needs the covariances of samples with themselves, and the kernel has no `cov1`: compute the "
                "kernel with get=None."
            )

        def of_batch(cov: Array, mask: Array | None, shape: tuple[int, ...]) -> _T:
            own = cov if self.diagonal_batch else same_sample(cov)
            return fn(own, None if mask is None else mask_of_positions(mask, shape, self.spec))

        first = of_batch(self.cov1, self.mask1, self.shape1)
        return first, first if self.cov2 is None else of_batch(self.cov2, self.mask2, self.shape2)

    def rescale(self, scale1: Array, scale2: Array | None = None) -> "Kernel":
        """Returns the kernel of the activations times numbers: `K'(p, p') = s1(p) s2(p') K(p, p')`.

        Args:
          scale1: `s1`, of each sample and position of the first batch, `(n1, H, W)`.
          scale2: `s2`, of the second batch; None for `scale1`.

        >>> import jax.numpy as jnp
        >>> from nt_core import Inputs, Spec
        >>> spec = Spec((1, 2, 1), (1, 2, 1), batch_axis=0, channel_axis=2)  # one sample, two positions, one channel
        >>> kernel = Inputs(jnp.ones((1, 2, 1)), None, spec).kernel(ntk=False)
        >>> print(kernel.rescale(jnp.array([[1.0, 3.0]])).nngp[0, 0])
        [[1. 3.]
         [3. 9.]]
        """

        def at_both(scale: Array) -> tuple[Array, Array]:
            """Lays a scale out at the first positions, and at the second."""
            if self.diagonal_spatial:
                return scale, scale
            sides = (interleave_ones(scale, 1, scale.ndim, second) for second in (False, True))
            at_first, at_second = (reverse_zipped(side, 1) if self.is_reversed else side for side in sides)
            return at_first, at_second

        scale2 = scale1 if scale2 is None else scale2
        return self.map(lambda k, a, b: k * a[0] * b[1], at_both(scale1), at_both(scale2))

    def matrices(self) -> "Kernel":
        """Returns the kernel with all positions along one spatial axis, so that covariances are matrices.

        Whatever the layout was: activations are `(n, P, channels)`, with `P` the number of positions, `nngp` and `ntk`
        are `(n1, n2, P, P)`, `cov1` is `(n1, P, P)` or, without `diagonal_batch`, `(n1, n1, P, P)`, and masks are
        `(n, P, 1)`. With `diagonal_spatial` there is one `P` in the place of two. `from_matrices` goes back.

        >>> import jax.numpy as jnp
        >>> from nt_core import Inputs, Spec
        >>> spec = Spec((5, 2, 3, 1), (5, 2, 3, 1), batch_axis=0, channel_axis=3)
        >>> kernel = Inputs(jnp.ones((5, 2, 3, 1)), None, spec).kernel(ntk=False)
        >>> kernel.nngp.shape, kernel.matrices().nngp.shape, kernel.matrices().shape1
        ((5, 5, 2, 2, 3, 3), (5, 5, 6, 6), (5, 6, 1))
        """
        spec = self.spec
        n_positions = math.prod(spec.space)

        def as_matrices(k: Array, start: int) -> Array:
            return jnp.reshape(k, k.shape[:start] + (n_positions,)) if self.diagonal_spatial else make_2d(k, start)

        def as_positions(mask: Array | None, shape: tuple[int, ...]) -> Array | None:
            if mask is None:
                return None
            sizes = [mask.shape[a] if a == spec.channel_axis else n for a, n in enumerate(shape)]
            return to_positions(jnp.broadcast_to(mask, sizes), spec.batch_axis, spec.channel_axis)

        ordered = self.reverse() if self.is_reversed else self
        return ordered._map_space(as_matrices).replace(
            shape1=(spec.n1, n_positions, spec.n_channels),
            shape2=(spec.n2, n_positions, spec.n_channels),
            batch_axis=0,
            channel_axis=2,
            mask1=as_positions(self.mask1, self.shape1),
            mask2=as_positions(self.mask2, self.shape2),
        )

    def from_matrices(self, matrices: "Kernel", space: tuple[int, ...] | None = None) -> "Kernel":
        """Returns what was made of `self.matrices()`, with the axes and the layout of this kernel.

        Args:
          matrices: activations are `(n, P, channels)`, covariances as `matrices` lays them out.
          space: sizes of the spatial axes, whose product is `P`; None for those of this kernel.

        Raises:
          ValueError: `space` has another number of axes than this kernel, or does not make `P` positions.

        >>> import jax.numpy as jnp
        >>> from nt_core import Inputs, Spec
        >>> spec = Spec((1, 4, 1), (1, 4, 1), batch_axis=0, channel_axis=2)
        >>> kernel = Inputs(jnp.ones((1, 4, 1)), None, spec).kernel(ntk=False)
        >>> means = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])  # average positions in pairs
        >>> halved = kernel.matrices().map(lambda k: means @ k @ means.T)
        >>> halved = halved.replace(shape1=(1, 2, 1), shape2=(1, 2, 1))
        >>> kernel.from_matrices(halved, space=(2,)).nngp.shape
        (1, 1, 2, 2)
        """
        spec = self.spec
        space = spec.space if space is None else space
        n_positions = matrices.shape1[1]
        if len(space) != len(spec.space) or math.prod(space) != n_positions:
            raise ValueError(
                f"Expected {len(spec.space)} sizes of spatial axes with {n_positions} positions in all, got {space}. "
                "State the number of positions of `matrices` in its shape1 and shape2."
            )

        def from_positions(n: int, shape: tuple[int, ...]) -> tuple[int, ...]:
            sizes = iter(space)
            named = {spec.batch_axis: n, spec.channel_axis: shape[2]}
            return tuple(named[a] if a in named else next(sizes) for a in range(spec.ndim))

        def as_zipped(k: Array, start: int) -> Array:
            lead = k.shape[:start]
            return k.reshape(lead + space) if self.diagonal_spatial else zip_axes(k.reshape(lead + space * 2), start)

        def as_mask(mask: Array | None) -> Array | None:
            if mask is None:
                return None
            mask = jnp.reshape(mask, (mask.shape[0], *space, mask.shape[2]))
            return jnp.moveaxis(mask, (0, -1), (spec.batch_axis, spec.channel_axis))

        zipped = matrices._map_space(as_zipped).replace(
            shape1=from_positions(matrices.shape1[0], matrices.shape1),
            shape2=from_positions(matrices.shape2[0], matrices.shape2),
            batch_axis=spec.batch_axis,
            channel_axis=spec.channel_axis,
            mask1=as_mask(matrices.mask1),
            mask2=as_mask(matrices.mask2),
        )
        return zipped.reverse() if self.is_reversed else zipped

    def fill_ntk(self) -> "Kernel":
        """Returns the kernel with a tangent kernel that is shaped as `nngp`: zeros, where it was a scalar zero.

        A tangent kernel that was not asked for stays None.
        """
        return self if self.ntk is None else self.replace(ntk=jnp.broadcast_to(self.ntk, self.nngp.shape))

    def add_to_ntk(self, contribution: Array | float) -> "Kernel":
        """Adds what the parameters of a layer contribute to the tangent kernel, if that was asked for.

        Args:
          contribution: the covariance of the derivatives with respect to the layer's parameters; broadcasts to `nngp`.

        >>> import jax.numpy as jnp
        >>> from nt_core import Inputs, Spec
        >>> spec = Spec((1, 1), (1, 1), batch_axis=0, channel_axis=1)
        >>> kernel = Inputs(jnp.ones((1, 1)), None, spec).kernel(ntk=True)
        >>> print(kernel.ntk, kernel.add_to_ntk(kernel.nngp).ntk)
        0.0 [[1.]]
        """
        filled = self.fill_ntk()
        return filled if filled.ntk is None else filled.replace(ntk=filled.ntk + contribution)

    def __getitem__(self, idx: Any) -> "Kernel":
        """Returns the kernel of the activations indexed with `idx`: slices, integers and an ellipsis.

        Raises:
          NotImplementedError: `idx` removes the batch axis, or selects channels.
        """
        spec = self.spec
        index = expand_index(idx, self.shape1)
        check_index(index, spec)
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
            shape1=indexed_shape(self.shape1, index),
            shape2=indexed_shape(self.shape2, index),
            batch_axis=axis_after(index, self.batch_axis),
            channel_axis=axis_after(index, self.channel_axis),
            mask1=index_mask(self.mask1, self.shape1, self.channel_axis, index),
            mask2=index_mask(self.mask2, self.shape2, self.channel_axis, index),
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
        spec = self.spec
        nothing = jnp.zeros((1,) * spec.ndim, bool)
        first = mask_of_positions(nothing if mask1 is None else mask1, spec.shape1, spec)
        second = mask_of_positions(nothing if mask2 is None else mask2, spec.shape2, spec)
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


def combine(fn: Callable[..., Array], kernels: Sequence[Kernel]) -> Kernel:
    """Applies a function to each covariance of several kernels of the same layout.

    Args:
      fn: `fn(k1, k2, ...)`, takes the covariance of each kernel. It is called for `nngp`, `ntk`, `cov1` and `cov2`; not
        where one of the kernels has none, nor for tangent kernels that are all a scalar zero.
      kernels: one or more.

    Returns:
      A kernel whose other fields are those of the first of `kernels`.

    >>> import jax.numpy as jnp
    >>> from nt_core import Inputs, Spec
    >>> spec = Spec((1, 1), (1, 1), batch_axis=0, channel_axis=1)
    >>> kernel = Inputs(jnp.full((1, 1), 3.0), None, spec).kernel(ntk=True)
    >>> print(combine(lambda a, b: a + b, [kernel, kernel]).nngp)
    [[18.]]
    """
    if any(kernel.ntk is not None and kernel.ntk.ndim > 0 for kernel in kernels):
        kernels = [kernel.fill_ntk() for kernel in kernels]

    def combined(name: str) -> Array | None:
        arrays = [getattr(kernel, name) for kernel in kernels]
        if any(k is None for k in arrays):
            return None
        return arrays[0] if arrays[0].ndim == 0 else fn(*arrays)

    return kernels[0].replace(**{name: combined(name) for name in ("nngp", "ntk", "cov1", "cov2")})


def _with_axis(tree: Any, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.expand_dims(x, axis), tree)


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
