"""What a layer does to a covariance, as data.

A step is a small frozen value: a backend reads it, nothing calls it. Its coefficients (variances of weights and biases,
parameters of activations) are pytree leaves and may be traced; everything else is static. `infer` maps the specs of the
inputs to that of the output, and is where bad input is refused.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax import Array, lax

from nt_core.activations import Activation
from nt_core.pytrees import pytree_dataclass, static
from nt_core.spec import Spec

Scalar = Any  # a Python number or a traced scalar
Pads = tuple[tuple[int, int], ...]


step = pytree_dataclass  # leaves are the fields that are not static


class Step:
    """Base of all steps."""

    def infer(self, *specs: Spec) -> Spec:
        """Returns the spec of the output. Raises `ValueError` or `NotImplementedError` for inputs that do not fit."""
        raise NotImplementedError

    def primitive(self, spec: Spec) -> Any:
        """Returns the primitive of `nt_core.lowering` that does this to inputs of `spec`.

        For steps from elsewhere: those of this module are known to `lower`.
        """
        raise NotImplementedError(f"The step {type(self).__name__} does not say which primitive it is.")


class Linear(Step):
    """A layer with weights: `K' = w_var A(K) + b_var`, with `A` an average over a window (nothing, for Dense).

    The tangent kernel is `T' = w_var A(T) + ntk_w A(K) + ntk_b`, see `ntk_coefficients`.
    """

    w_var: Scalar
    b_var: Scalar | None
    out_dim: int
    parameterization: str
    s: tuple[int, int]
    groups: int = 1

    @property
    def window_size(self) -> int:
        return 1

    def ntk_coefficients(self, spec: Spec) -> tuple[Scalar, Scalar]:
        """Returns `(ntk_w, ntk_b)`, the share that this layer's own parameters have in the tangent kernel.

        In the 'ntk' parameterization these are `(w_var, b_var)`. In the 'standard' one (arXiv:2001.07301) the scale
        stands in the initial parameters: the weights contribute `fan_in / s[0]` times the covariance, the bias 1.
        """
        if self.parameterization == "ntk":
            return self.w_var, 0.0 if self.b_var is None else self.b_var
        fan_in = spec.n_channels // self.groups * self.window_size
        return fan_in / self.s[0], 0.0 if self.b_var is None else 1.0


@step
class Dense(Linear):
    """A fully connected layer over the channels, at every position alike."""

    w_var: Scalar
    b_var: Scalar | None
    out_dim: int = static()
    parameterization: str = static(default="ntk")
    s: tuple[int, int] = static(default=(1, 1))

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        return spec.with_shape(spec.space, self.out_dim).replace(is_gaussian=True, is_input=False)


@step
class Conv(Linear):
    """A convolution with shared weights.

    Attributes:
      window, strides, dilation: one number per spatial axis, in the order of the input's axes.
      padding: 'SAME', 'VALID', 'CIRCULAR' or explicit `(low, high)` pairs.
      axes_out: which axis of the input stands at each axis of the output (batch and channel axes included).
      groups: of channels: output channels read the input channels of their group only.
    """

    w_var: Scalar
    b_var: Scalar | None
    out_dim: int = static()
    window: tuple[int, ...] = static()
    strides: tuple[int, ...] = static()
    padding: str | Pads = static()
    dilation: tuple[int, ...] = static()
    axes_out: tuple[int, ...] | None = static(default=None)
    parameterization: str = static(default="ntk")
    s: tuple[int, int] = static(default=(1, 1))
    groups: int = static(default=1)

    @property
    def window_size(self) -> int:
        return math.prod(self.window)

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        _check_spatial_rank("Conv", spec, self.window)
        space = window_space(spec.space, self.window, self.strides, self.padding, self.dilation, "Conv")
        out = spec.with_shape(space, self.out_dim).replace(
            is_gaussian=True, is_input=False, is_reversed=not spec.is_reversed and not spec.diagonal_spatial
        )
        if self.axes_out is None:
            return out
        return out.replace(
            shape1=tuple(out.shape1[a] for a in self.axes_out),
            shape2=tuple(out.shape2[a] for a in self.axes_out),
            batch_axis=self.axes_out.index(spec.batch_axis),
            channel_axis=self.axes_out.index(spec.channel_axis),
        )

    def space_order(self, spec: Spec) -> tuple[int, ...]:
        """Returns which spatial axis of the input stands at each spatial axis of the output."""
        if self.axes_out is None:
            return tuple(range(len(self.window)))
        return tuple(spec.spatial_axes.index(a) for a in self.axes_out if a in spec.spatial_axes)


@step
class Dual(Step):
    """A nonlinearity, applied to Gaussian pre-activations."""

    activation: Activation

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        if not spec.is_gaussian:
            raise ValueError(
                f"The input to the activation function must be Gaussian, i.e. a random affine transformation is "
                f"required before {type(self.activation).__name__}: put a Dense or Conv layer before it."
            )
        return spec.replace(is_gaussian=False, is_input=False)


@step
class Pool(Step):
    """Average or sum over windows.

    Attributes:
      mean: average rather than sum.
      normalize_edges: an average divides by the number of entries inside the image, not by the size of the window.
    """

    window: tuple[int, ...] = static()
    strides: tuple[int, ...] = static()
    padding: str | Pads = static()
    mean: bool = static()
    normalize_edges: bool = static(default=False)

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        _check_spatial_rank("Pooling", spec, self.window)
        ones = (1,) * len(self.window)
        space = window_space(spec.space, self.window, self.strides, self.padding, ones, "Pooling")
        return spec.with_shape(space, spec.n_channels)


@step
class Gather(Step):
    """Every position becomes a copy of one that there was, or zero.

    Attributes:
      positions: for each spatial axis, which position is copied to each place; -1 for zero.
    """

    positions: tuple[tuple[int, ...], ...] = static()

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        if len(self.positions) != len(spec.space) or any(
            not -1 <= p < n for n, positions in zip(spec.space, self.positions, strict=False) for p in positions
        ):
            raise ValueError(
                f"Gather from activations of shape {spec.shape1} needs, for each of {len(spec.space)} spatial axes, "
                f"positions along it or -1 for zero, got {self.positions}."
            )
        return spec.with_shape(tuple(map(len, self.positions)), spec.n_channels)


@step
class Untie(Step):
    """Makes different positions independent: their covariance becomes 0. So do weights of each position's own.

    Attributes:
      is_reversed: how pairs of spatial axes are stored then.
    """

    is_reversed: bool = static(default=False)

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        return spec.replace(is_reversed=self.is_reversed)


@step
class GlobalPool(Step):
    """Average or sum over all positions; the spatial axes vanish."""

    mean: bool = static()

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        keep = sorted((spec.batch_axis, spec.channel_axis))
        return spec.replace(
            shape1=tuple(spec.shape1[a] for a in keep),
            shape2=tuple(spec.shape2[a] for a in keep),
            batch_axis=keep.index(spec.batch_axis),
            channel_axis=keep.index(spec.channel_axis),
            is_reversed=False,
        )


@step
class Flatten(Step):
    """Positions become channels: reads the same-position covariances and averages them."""

    batch_axis: int = static(default=0)

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        n_channels = spec.n_channels * math.prod(spec.space)
        batch_axis = self.batch_axis % 2
        return spec.replace(
            shape1=_flat(spec.n1, n_channels, batch_axis),
            shape2=_flat(spec.n2, n_channels, batch_axis),
            batch_axis=batch_axis,
            channel_axis=1 - batch_axis,
            is_gaussian=False,
            is_reversed=False,
            diagonal_spatial=False,
        )


@step
class Normalize(Step):
    """Division by the root of the mean square over the channels and the spatial axes numbered in `space_axes`.

    Attributes:
      first, second: weights of the variances in their mean, `(n, *space)`, for images with masked positions: the number
        of all positions averaged over that of those which count. None for 1; `second` also where the second batch is
        the first.
    """

    eps: Scalar
    space_axes: tuple[int, ...] = static()
    first: Array | None = None
    second: Array | None = None

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        return spec


@step
class Scale(Step):
    """The activations of each sample and position times a number: 0 where they are masked.

    Attributes:
      first, second: of both batches, `(n, *space)`; `second` is None where the second batch is the first.
    """

    first: Array
    second: Array | None = None

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        for name, numbers, n in (("first", self.first, spec.n1), ("second", self.second, spec.n2)):
            if numbers is not None and numbers.shape != (n, *spec.space):
                raise ValueError(
                    f"Scale of activations of shapes {spec.shape1} and {spec.shape2} needs one number for each sample "
                    f"and position: `{name}` has shape {numbers.shape}, not {(n, *spec.space)}."
                )
        return spec


@step
class Dropout(Step):
    """Entries are kept with probability `rate`, independently, and divided by it."""

    rate: Scalar

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        if spec.is_input:
            raise ValueError(
                "Dropout cannot be applied to the inputs: they have finitely many channels, and the covariance of what "
                "dropout leaves of them is random. Put a Dense or Conv layer before it."
            )
        return spec.replace(is_gaussian=False)


@step
class Combine(Step):
    """A weighted sum of independent branches.

    Attributes:
      weights: one per branch; all 1 for a residual sum, shares of the channels for a concatenation of channels.
      concat: the branches' channels lie side by side instead of being added.
    """

    weights: tuple[float, ...] = static()
    concat: bool = static(default=False)

    def infer(self, *specs: Spec) -> Spec:
        first = specs[0]
        n_channels = sum(s.n_channels for s in specs) if self.concat else first.n_channels
        reversals = sum(s.is_reversed for s in specs)
        return first.with_shape(first.space, n_channels).replace(
            is_gaussian=all(s.is_gaussian for s in specs) and (not self.concat or len(specs) == 1),
            is_reversed=reversals > len(specs) / 2,
            is_input=all(s.is_input for s in specs),
        )


@step
class TakeChannels(Step):
    """Some of the channels: their covariance is that of all, if channels are independent and alike.

    Attributes:
      n_channels: how many.
    """

    n_channels: int = static()

    def infer(self, *specs: Spec) -> Spec:
        (spec,) = specs
        if not spec.is_gaussian:
            raise ValueError(
                "Different channels of activations are alike and independent only if a random affine transformation "
                "made them: put a Dense or Conv layer before the layer that parts the channels."
            )
        return spec.with_shape(spec.space, self.n_channels)


@step
class Multiply(Step):
    """The product of independent branches: `K = prod_i K_i`, `T = sum_i T_i prod_{j != i} K_j`."""

    def infer(self, *specs: Spec) -> Spec:
        first = specs[0]
        reversals = sum(s.is_reversed for s in specs)
        return first.replace(
            is_gaussian=first.is_gaussian and len(specs) == 1,
            is_reversed=reversals > len(specs) / 2,
            is_input=all(s.is_input for s in specs),
        )


def window_pads(
    space: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: str | Pads, dilation: Sequence[int]
) -> Pads:
    """Returns how many positions are added before and after each axis. CIRCULAR adds as many as SAME, wrapped."""
    extent = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    if isinstance(padding, str):
        name = "SAME" if padding == "CIRCULAR" else padding
        return tuple((int(lo), int(hi)) for lo, hi in lax.padtype_to_pads(space, extent, strides, name))
    return padding


def window_space(
    space: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: str | Pads,
    dilation: Sequence[int],
    what: str,
) -> tuple[int, ...]:
    """Returns how many windows fit along each axis."""
    pads = window_pads(space, window, strides, padding, dilation)
    counts = []
    for n, w, s, (lo, hi), d in zip(space, window, strides, pads, dilation, strict=True):
        count = (n + lo + hi - (w - 1) * d - 1) // s + 1
        if count < 1:
            raise ValueError(
                f"{what}: a window of {tuple(window)} (dilation {tuple(dilation)}, padding {padding}) does not fit "
                f"into an image of {tuple(space)}. Use a smaller window, or padding='SAME'."
            )
        counts.append(count)
    return tuple(counts)


def _check_spatial_rank(what: str, spec: Spec, window: tuple[int, ...]) -> None:
    if len(spec.space) != len(window):
        raise ValueError(
            f"{what} with a {len(window)}-dimensional window {window} got activations of shape {spec.shape1}, which "
            f"have {len(spec.space)} spatial axes besides batch axis {spec.batch_axis} and channel axis "
            f"{spec.channel_axis}. Give one window size per spatial axis."
        )


def _flat(n: int, n_channels: int, batch_axis: int) -> tuple[int, int]:
    return (n, n_channels) if batch_axis == 0 else (n_channels, n)
