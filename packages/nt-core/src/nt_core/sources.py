"""What a program starts from: a pair of input batches, or a covariance that an earlier step has materialised."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped
from nt_core.masks import MaskedArray, Masks
from nt_core.pytrees import register_dataclass
from nt_core.spec import Spec

# Two batches that differ by less are taken to be the same samples by dropout (`Kernel.x1_is_x2`), and by it alone.
SAME_INPUT_TOLERANCE = 1e-12
# Roundings between the covariances of a batch with itself and with an equal one, in units of the last place.
_EQUAL_COVARIANCES = 256


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The covariance of two batches of inputs, not formed yet.

    Attributes:
      x1: array of shape `spec.shape1`.
      x2: array of shape `spec.shape2`, or None for the covariance of `x1` with itself.
      spec: shapes, axes and the layout that the covariance is to have.
      mask1, mask2: see `Kernel`. Where inputs are masked, they are 0.
    """

    x1: Array
    x2: Array | None
    spec: Spec
    mask1: Array | None = None
    mask2: Array | None = None

    def first(self) -> Array:
        """Returns `x1` as `(n1, *space, channels)`."""
        return _batch_first(self.x1, self.spec)

    def second(self) -> Array:
        """Returns `x2` (or `x1` where there is none) as `(n2, *space, channels)`."""
        return self.first() if self.x2 is None else _batch_first(self.x2, self.spec)

    def kernel(self, ntk: bool) -> Kernel:
        """Forms the covariance: `x1 x2^T / n_channels`, uncentred."""
        return Kernel.from_spec(
            self.spec, **_covariances(self, ntk), x1_is_x2=self.same_inputs(), mask1=self.mask1, mask2=self.mask2
        )

    def same_inputs(self) -> bool | Array:
        """Whether both batches are the same samples to dropout; traced where only the values tell."""
        return self._compare(_all_close)

    def identical(self) -> bool | Array:
        """Whether both batches are equal, bit for bit: the covariances of equal samples are then their variances."""
        return self._compare(_all_equal)

    def _compare(self, close: Callable[[Array, Array], Array]) -> bool | Array:
        if self.x2 is None or self.x2 is self.x1:
            return True
        if self.x1.shape != self.x2.shape:
            return False
        return close(self.x1, self.x2)


register_dataclass(Inputs, data_fields=["x1", "x2", "mask1", "mask2"], meta_fields=["spec"])

Source = Inputs | Kernel


def dtype_of(source: Source) -> jnp.dtype:
    """The type of its numbers."""
    return source.x1.dtype if isinstance(source, Inputs) else source.nngp.dtype


def is_symmetric(source: Source) -> bool:
    """Whether the second batch is the first. A kernel without any variances does not tell, and is taken for no."""
    if isinstance(source, Inputs):
        return source.x2 is None
    return source.cov2 is None and source.cov1 is not None


def of_one_batch(source: Source, which: int) -> Source:
    """Returns the covariances of batch 1 or 2 with itself. A kernel has those between all samples if it holds them."""
    spec = source.spec
    shape = spec.shape1 if which == 1 else spec.shape2
    if isinstance(source, Inputs):
        x, mask = (source.x1, source.mask1) if which == 1 or source.x2 is None else (source.x2, source.mask2)
        return Inputs(x, None, spec.replace(shape1=shape, shape2=shape), mask)
    cov, mask = (source.cov1, source.mask1) if which == 1 or source.cov2 is None else (source.cov2, source.mask2)
    assert cov is not None
    return source.replace(
        nngp=cov, ntk=None, cov1=cov, cov2=None, x1_is_x2=True, shape1=shape, shape2=shape, mask1=mask, mask2=None
    )


def masks_of(source: Source) -> Masks | None:
    """Returns where both batches of a source are masked."""
    has_one = source.x2 is None if isinstance(source, Inputs) else source.cov2 is None
    return Masks.of(source.mask1, source.mask2, has_one and source.spec.n1 == source.spec.n2)


# Compiled, each as one: they are also called outside of programs.


@functools.partial(jax.jit, static_argnames="ntk")
def _covariances(inputs: Inputs, ntk: bool) -> dict[str, Array | None]:
    spec, a, b = inputs.spec, inputs.first(), inputs.second()
    return {
        "nngp": _covariance(a, b, spec, same_sample=False),
        "ntk": jnp.zeros((), a.dtype) if ntk else None,
        "cov1": _covariance(a, a, spec, same_sample=spec.diagonal_batch),
        "cov2": None if inputs.x2 is None else _covariance(b, b, spec, same_sample=spec.diagonal_batch),
    }


@jax.jit
def _all_close(x1: Array, x2: Array) -> Array:
    return jnp.all(jnp.abs(x1 - x2) < SAME_INPUT_TOLERANCE)


@jax.jit
def _all_equal(x1: Array, x2: Array) -> Array:
    return jnp.all(x1 == x2)


def same_batches(sources: tuple[Source, ...]) -> bool | Array:
    """Whether both batches are the same samples to dropout."""
    return _all(s.same_inputs() if isinstance(s, Inputs) else s.x1_is_x2 for s in sources)


def identical_batches(sources: tuple[Source, ...]) -> bool | Array:
    """Whether the samples of both batches are equal one by one, so that their deficits are exactly 0."""
    return _all(s.identical() if isinstance(s, Inputs) else _is_identical(s) for s in sources)


def _all(flags: Iterable[bool | Array]) -> bool | Array:
    """Concrete where the flags are."""
    return functools.reduce(lambda a, b: a & b, flags)


def _is_identical(source: Kernel) -> bool | Array:
    """Whether the samples of both batches are equal one by one.

    `Kernel.x1_is_x2` alone does not tell: it has an absolute tolerance, and holds for any two batches that are small
    enough. So the covariances of the samples with themselves must be equal too, but for roundings.
    """
    if source.cov2 is None:
        return True
    if source.cov1 is None or source.spec.n1 != source.spec.n2:
        return False
    own = [source.cov1, source.cov2]
    if not source.diagonal_batch:
        own = [jnp.moveaxis(jnp.diagonal(cov, axis1=0, axis2=1), -1, 0) for cov in own]
    between = jnp.moveaxis(jnp.diagonal(source.nngp, axis1=0, axis2=1), -1, 0)
    roundings = _EQUAL_COVARIANCES * float(jnp.finfo(between.dtype).eps)
    bound = roundings * jnp.max(jnp.abs(own[0]), tuple(range(1, own[0].ndim)), keepdims=True)
    close = (jnp.abs(own[0] - own[1]) <= bound) & (jnp.abs(own[0] - between) <= bound)
    return jnp.all(close) & source.x1_is_x2


def with_batch_sizes(kernel: Kernel) -> Kernel:
    """Returns a kernel whose shapes have as many samples as its arrays have."""
    axis, sizes = kernel.batch_axis, jnp.shape(kernel.nngp)[:2]
    if sizes == (kernel.shape1[axis], kernel.shape2[axis]):
        return kernel
    shapes = zip((kernel.shape1, kernel.shape2), sizes, strict=True)
    shape1, shape2 = ((*shape[:axis], n, *shape[axis + 1 :]) for shape, n in shapes)
    return kernel.replace(shape1=shape1, shape2=shape2)


def check_arrays(kernel: Kernel) -> None:
    """Raises `ValueError` if the arrays of a kernel do not have the shapes that its other fields speak of."""
    spec = kernel.spec
    space = spec.space[::-1] if spec.is_reversed and not spec.diagonal_spatial else spec.space
    pairs = tuple(n for n in space for _ in range(1 if spec.diagonal_spatial else 2))
    between = (spec.n1, spec.n2, *pairs)
    within = [(n, *pairs) if spec.diagonal_batch else (n, n, *pairs) for n in (spec.n1, spec.n2)]
    for name, expected in (("nngp", between), ("ntk", between), ("cov1", within[0]), ("cov2", within[1])):
        array = getattr(kernel, name)
        if array is None or (name == "ntk" and jnp.ndim(array) == 0):
            continue
        if jnp.shape(array) != expected:
            raise ValueError(
                f"A Kernel of activations of shapes {spec.shape1} and {spec.shape2} (batch_axis={spec.batch_axis}, "
                f"channel_axis={spec.channel_axis}, diagonal_batch={spec.diagonal_batch}, diagonal_spatial="
                f"{spec.diagonal_spatial}) has `{name}` of shape {expected}, got {jnp.shape(array)}. Make the shapes, "
                "axes and flags of the Kernel those of its arrays."
            )


def make_inputs(x1: Any, x2: Any, layout: dict[str, Any]) -> Inputs:
    """Checks a pair of input batches and attaches their spec.

    Args:
      x1, x2: arrays (or `MaskedArray`s) with a batch axis, a channel axis and any number of spatial axes. `x2` may be
        None.
      layout: `batch_axis`, `channel_axis`, `diagonal_batch`, `diagonal_spatial`.
    """
    mask1, mask2 = (x.mask if isinstance(x, MaskedArray) else None for x in (x1, x2))
    x1, x2 = (x.masked_value if isinstance(x, MaskedArray) else x for x in (x1, x2))
    x1 = _as_float(x1, "x1")
    x2 = None if x2 is None else (x1 if x2 is x1 else _as_float(x2, "x2"))
    ndim = x1.ndim
    batch_axis = _axis(layout["batch_axis"], x1.shape, "batch_axis")
    channel_axis = layout["channel_axis"]
    if channel_axis is None:  # Flatten comes first: which axis counts as channels makes no difference
        channel_axis = -1 if batch_axis != ndim - 1 else -2
    channel_axis = _axis(channel_axis, x1.shape, "channel_axis")
    if batch_axis == channel_axis:
        raise ValueError(f"batch_axis and channel_axis are both {batch_axis} for inputs of shape {x1.shape}.")
    if x2 is not None:
        sizes1, sizes2 = ([n for a, n in enumerate(x.shape) if a != batch_axis] for x in (x1, x2))
        if sizes1 != sizes2:
            raise ValueError(
                f"x1 and x2 may differ in the batch axis ({batch_axis}) only, got shapes {x1.shape} and {x2.shape}."
            )
    spec = Spec(
        shape1=x1.shape,
        shape2=x1.shape if x2 is None else x2.shape,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
        is_input=True,
        diagonal_batch=layout["diagonal_batch"],
        diagonal_spatial=layout["diagonal_spatial"],
    )
    return Inputs(x1, x2, spec, mask1, mask2)


def _as_float(x: Any, name: str) -> Array:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(
            f"Wrong input types given: {name} is a {type(x).__name__}. Expected an array, or nested lists and tuples "
            "of arrays (or of Kernels, without x2)."
        )
    if x.ndim < 2:
        raise ValueError(f"{name} needs a batch axis and a channel axis, i.e. rank at least 2, got shape {x.shape}.")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} is complex ({x.dtype}), and kernels are of real inputs. Give real and imaginary parts."
        )
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(float))


def _axis(axis: int, shape: tuple[int, ...], name: str) -> int:
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{name}={axis}, which the layers ask for, does not exist in inputs of shape {shape}. Inputs of a "
            "convolution over n axes have rank n + 2; other layers take `batch_axis` and `channel_axis`."
        )
    return axis % ndim


def _batch_first(x: Array, spec: Spec) -> Array:
    return jnp.transpose(x, (spec.batch_axis, *spec.spatial_axes, spec.channel_axis))


def _covariance(a: Array, b: Array, spec: Spec, same_sample: bool) -> Array:
    """Covariance of `(n, *space, channels)` batches in the layout of `spec`."""
    space = tuple(range(1, a.ndim - 1))
    batch = ((0,), (0,)) if same_sample else ((), ())
    if spec.diagonal_spatial:
        batch = (batch[0] + space, batch[1] + space)
    last = a.ndim - 1
    k = lax.dot_general(a, b, (((last,), (last,)), batch), precision=lax.Precision.HIGHEST)
    k = k / a.shape[-1]
    n_space = len(space)
    if spec.diagonal_spatial:
        # dot_general leads with the shared axes: bring (samples) in front of (space).
        if not same_sample:
            k = jnp.moveaxis(k, (-2, -1), (0, 1))
        return k
    if same_sample:  # (n, *space, *space)
        order = (0, *(1 + i + half for i in range(n_space) for half in (0, n_space)))
    else:  # (n1, *space, n2, *space)
        order = (0, 1 + n_space, *(1 + i + half for i in range(n_space) for half in (0, n_space + 1)))
    k = jnp.transpose(k, order)
    return reverse_zipped(k, k.ndim - 2 * n_space) if spec.is_reversed else k


def space_size(spec: Spec) -> int:
    """Number of positions."""
    return math.prod(spec.space)
