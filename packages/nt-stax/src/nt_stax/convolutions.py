"""Convolutions: `Conv`, its transpose, and `ConvLocal`, whose weights differ between positions."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from nt_core import Bool, Builder, Diagonal, Rule, Value, layer, steps, supports_masking

from nt_stax.weights import Weights, n_channels_of
from nt_stax.windows import Padding, Windows

_SPATIAL_LETTERS = "HWDABEFGJKLMPQRSTUVXYZ"


@layer
@supports_masking(remask_kernel=True)
def Conv(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Padding = Padding.VALID,
    W_std: float = 1.0,
    b_std: float | None = None,
    dimension_numbers: tuple[str, str, str] | None = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
):
    """A convolution.

    It is `Dense` on patches: `fan_in = n_in * prod(filter_shape)` takes the place of `n_in`, and the average over the
    filter's taps, `A(K)(p, p') = sum_d K(p + d, p' + d) / prod(filter_shape)`, that of `K` (arXiv:1810.05148):

        y = W_std / sqrt(fan_in) conv(x, W) + b_std b
        K' = W_std^2 A(K) + b_std^2
        T' = W_std^2 A(T) + K'

    Args:
      out_chan: number of output channels.
      filter_shape: size of the filter along each spatial axis, in the order of the filter's specification.
      strides: steps of the filter, in the same order. None for 1.
      padding: 'VALID', 'SAME' (zeros) or 'CIRCULAR' (as many positions as SAME, from the other side of the image).
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases, None for no bias.
      dimension_numbers: order of the axes of inputs, filter and outputs, as in `jax.lax.conv_general_dilated`, e.g.
        `('NCHW', 'OIHW', 'NCHW')`: batch N, channels C, in the filter I and O, and any other letters for spatial axes.
        By default channels come last.
      parameterization: 'ntk' or 'standard', see `Dense`.
      s: width of the layer before this one, and of this one, see `Dense`.
      rhs_dilation: distance between neighbouring taps of the filter (arXiv:1511.07122), in the order of `filter_shape`.
        None for 1.
      feature_group_count: number of groups of channels: output channels read the input channels of their group only,
        and `fan_in` is divided by it. In the limit, where every group is infinitely wide, kernels are those without
        groups.

    Raises:
      ValueError: the kernel of groups of channels that are not alike: of the inputs' channels, or of branches.

    >>> from nt_stax import Conv
    >>> init_fn, apply_fn, kernel_fn = Conv(128, (3,), padding="SAME")
    >>> print(kernel_fn(jnp.ones((1, 4, 2)), None, "nngp", diagonal_spatial=True).round(4))  # padding has no variance
    [[[0.6667 1.     1.     0.6667]]]
    """
    weights = Weights("Conv", out_chan, W_std, b_std, parameterization, s)
    groups = feature_group_count
    return _Conv("Conv", weights, filter_shape, strides, padding, dimension_numbers, rhs_dilation, groups).functions()


@layer
@supports_masking(remask_kernel=True)
def ConvTranspose(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Padding = Padding.VALID,
    W_std: float = 1.0,
    b_std: float | None = None,
    dimension_numbers: tuple[str, str, str] | None = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
    rhs_dilation: Sequence[int] | None = None,
):
    """A transposed convolution ("deconvolution"): what `Conv` with these arguments does to a gradient.

    An image of size `n` becomes one of size `n * stride` ('VALID': larger by `filter - stride`, if that is positive).
    Its positions lie `stride` apart, with zeros in between, and a filter moves over it by single positions:

        y = W_std / sqrt(fan_in) conv_transpose(x, W) + b_std b
        K' = W_std^2 A(K) + b_std^2
        T' = W_std^2 A(T) + K'

    with `fan_in = n_in * prod(filter_shape)` and `A` the average over the taps of the filter, zeros included: with
    strides, `y` does not have the same variance at all positions.

    Args:
      out_chan: number of output channels.
      filter_shape: size of the filter along each spatial axis, in the order of the filter's specification.
      strides: distance at which the input's positions lie, in the same order. None for 1.
      padding: 'VALID', 'SAME' or 'CIRCULAR', of the convolution that this one is the transpose of. With 'VALID' and
        'SAME' it is `jax.lax.conv_transpose`; with 'CIRCULAR' what 'VALID' puts beyond the edges of the image comes
        back on its other side.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases, None for no bias.
      dimension_numbers: order of the axes of inputs, filter and outputs, see `Conv`.
      parameterization: 'ntk' or 'standard', see `Dense`.
      s: width of the layer before this one, and of this one, see `Dense`.
      rhs_dilation: distance between neighbouring taps of the filter, see `Conv`.

    With masks, an output is masked if any input that it is a sum over is.

    >>> from nt_stax import ConvTranspose
    >>> init_fn, apply_fn, kernel_fn = ConvTranspose(128, (3,), strides=(2,), padding="SAME")
    >>> print(kernel_fn(jnp.ones((1, 2, 2)), None, "nngp", diagonal_spatial=True).round(4))  # of one input or of two
    [[[0.3333 0.3333 0.6667 0.3333]]]
    """
    weights = Weights("ConvTranspose", out_chan, W_std, b_std, parameterization, s)
    name = "ConvTranspose"
    return _ConvTranspose(name, weights, filter_shape, strides, padding, dimension_numbers, rhs_dilation).functions()


@layer
@supports_masking(remask_kernel=True)
def ConvLocal(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Padding = Padding.VALID,
    W_std: float = 1.0,
    b_std: float | None = None,
    dimension_numbers: tuple[str, str, str] | None = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
    rhs_dilation: Sequence[int] | None = None,
):
    """A locally connected layer: a convolution whose weights and biases are different at every position.

    Outputs at different positions are independent: their kernels are 0. At equal positions they are those of `Conv`
    (arXiv:1810.05148).

    Args:
      out_chan: number of output channels.
      filter_shape: size of the filter along each spatial axis, in the order of the filter's specification.
      strides: steps of the filter, in the same order. None for 1.
      padding: 'VALID', 'SAME' (zeros) or 'CIRCULAR', see `Conv`.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases, None for no bias.
      dimension_numbers: order of the axes of inputs, filter and outputs, see `Conv`. The filter's spatial axes are
        those of the outputs, and its axis I has `n_in * prod(filter_shape)` entries, as in
        `jax.lax.conv_general_dilated_local`.
      parameterization: 'ntk' or 'standard', see `Dense`.
      s: width of the layer before this one, and of this one, see `Dense`.
      rhs_dilation: distance between neighbouring taps of the filter, see `Conv`.

    >>> from nt_stax import ConvLocal
    >>> init_fn, apply_fn, kernel_fn = ConvLocal(128, (2,), b_std=1.0)
    >>> print(kernel_fn(jnp.ones((1, 4, 2)), None, "nngp", diagonal_spatial=False)[0, 0])
    [[2. 0. 0.]
     [0. 2. 0.]
     [0. 0. 2.]]
    """
    weights = Weights("ConvLocal", out_chan, W_std, b_std, parameterization, s)
    return _ConvLocal("ConvLocal", weights, filter_shape, strides, padding, dimension_numbers, rhs_dilation).functions()


class _Conv:
    """A convolution, and what others do alike."""

    diagonal_spatial = Diagonal(input=Bool.YES, output=Bool.NO)

    def __init__(
        self,
        name: str,
        weights: Weights,
        filter_shape: Sequence[int],
        strides: Sequence[int] | None,
        padding: str | Padding,
        dimension_numbers: tuple[str, str, str] | None,
        rhs_dilation: Sequence[int] | None,
        groups: int = 1,
    ) -> None:
        self.name, self.weights, self.n_taps, self.groups = name, weights, math.prod(filter_shape), groups
        if groups < 1 or weights.n_out % groups:
            raise ValueError(
                f"{name}: feature_group_count={groups} must be positive, and divide the {weights.n_out} output "
                "channels."
            )
        self.lhs, self.rhs, self.out = self.letters = _letters(name, dimension_numbers, len(filter_shape))
        self.batch_axis, self.channel_axis = self.lhs.index("N"), self.lhs.index("C")
        self.axes_out = tuple(self.lhs.index(letter) for letter in self.out)
        # Windows count spatial axes as the inputs have them, the arguments as the filter has them.
        self.axes = [self.lhs.index(letter) for letter in _spatial(self.lhs)]
        self.axes_in_filter_order = [self.lhs.index(letter) for letter in _spatial(self.rhs)]
        self.in_filter_order = Windows(name, filter_shape, strides, padding, rhs_dilation)
        self.windows = self.in_filter_order.in_order([_spatial(self.rhs).index(a) for a in _spatial(self.lhs)])

    def functions(self) -> tuple[Any, ...]:
        """Returns `(init_fn, apply_fn, rule, mask_fn)`."""

        def init_fn(rng, input_shape):
            self.check_rank(input_shape)
            n_channels = n_channels_of(self.name, input_shape, self.channel_axis)
            if n_channels % self.groups:
                raise ValueError(
                    f"{self.name}: feature_group_count={self.groups} must divide the {n_channels} channels of inputs "
                    f"of shape {tuple(input_shape)}."
                )
            n_in = n_channels // self.groups
            space = dict(zip(_spatial(self.lhs), self.space([input_shape[a] for a in self.axes]), strict=True))
            W_sizes, b_sizes = self.sizes_of_weights(n_in, space)
            W_shape, b_shape = [W_sizes[letter] for letter in self.rhs], [b_sizes.get(letter, 1) for letter in self.out]
            sizes = dict(space, N=input_shape[self.batch_axis], C=self.weights.n_out)
            params = self.weights.init(rng, W_shape, b_shape, fan_in=n_in * self.n_taps)
            return tuple(sizes[letter] for letter in self.out), params

        def apply_fn(params, inputs, **kwargs):
            self.check_rank(inputs.shape)
            W, b = params
            fan_in = inputs.shape[self.channel_axis] // self.groups * self.n_taps
            dtype = jnp.result_type(inputs, W)
            outputs = self.convolve(inputs.astype(dtype), W.astype(dtype))
            return self.weights.scaled(outputs, b, fan_in)

        requirements = {
            "batch_axis": self.batch_axis,
            "channel_axis": self.channel_axis,
            "diagonal_spatial": self.diagonal_spatial,
        }
        return init_fn, apply_fn, Rule(self.name, requirements, self.emit), self.mask

    def check_rank(self, shape: Sequence[int]) -> None:
        """Raises `ValueError` for inputs with too many or too few axes."""
        if len(shape) != len(self.lhs):
            raise ValueError(
                f"{self.name} with dimension_numbers={self.letters} and filter_shape={self.in_filter_order.window} "
                f"takes inputs of rank {len(self.lhs)}, got shape {tuple(shape)}."
            )

    def space(self, space: Sequence[int]) -> tuple[int, ...]:
        """Returns the sizes of the spatial axes of the outputs, in the order of the inputs; -1 if they are unknown."""
        return self.windows.space(space)

    def sizes_of_weights(self, n_in: int, space: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the sizes of the axes of weights and biases, by their letters; 1 where there is none."""
        window = zip(_spatial(self.rhs), self.in_filter_order.window, strict=True)
        return dict(window, I=n_in, O=self.weights.n_out), {"C": self.weights.n_out}

    def convolve(self, inputs: Array, W: Array) -> Array:
        windows = self.in_filter_order
        inputs, pads = windows.padded(inputs, self.axes_in_filter_order)
        return lax.conv_general_dilated(
            inputs,
            W,
            windows.strides,
            pads,
            rhs_dilation=windows.dilation,
            dimension_numbers=self.letters,
            feature_group_count=self.groups,
        )

    def mask(self, mask, input_shape):
        mask = self.windows.mask(jnp.all(mask, self.channel_axis, keepdims=True), input_shape, self.axes)
        return jnp.transpose(mask, self.axes_out)

    def emit(self, builder: Builder, value: Value) -> Value:
        if self.groups > 1 and not _channels_are_alike(builder, value):
            raise ValueError(
                f"{self.name} with feature_group_count={self.groups} of the inputs' own channels, or of branches side "
                "by side, has no kernel: groups of channels have different covariances. Put a Dense or Conv layer "
                "before it."
            )
        return builder.add(self.step(self.windows.strides, self.windows.padding), value)

    def step(self, strides: tuple[int, ...], padding: str | steps.Pads) -> steps.Conv:
        return steps.Conv(
            **self.weights.fields,
            window=self.windows.window,
            strides=strides,
            padding=padding,
            dilation=self.windows.dilation,
            axes_out=None if self.out == self.lhs else self.axes_out,
            groups=self.groups,
        )


class _ConvTranspose(_Conv):
    """A convolution of an image whose positions lie `strides` apart, with zeros in between."""

    def space(self, space: Sequence[int]) -> tuple[int, ...]:
        return tuple(-1 if n < 0 else a.count for n, a in zip(space, _spreads(self.windows, space), strict=True))

    def convolve(self, inputs: Array, W: Array) -> Array:
        windows, axes = self.in_filter_order, self.axes_in_filter_order
        along = _spreads(windows, [inputs.shape[a] for a in axes])
        strides, pads = windows.strides, [(a.low, a.high) for a in along]
        if windows.padding == Padding.CIRCULAR.value:
            apart, wrapped = [(0, 0, 0)] * inputs.ndim, [(0, 0)] * inputs.ndim
            for axis, stride, a in zip(axes, strides, along, strict=True):
                apart[axis] = (0, stride - 1, stride - 1)
                wrapped[axis] = (a.low, a.extent - 1 - a.low)
            inputs = jnp.pad(lax.pad(inputs, jnp.zeros((), inputs.dtype), apart), wrapped, mode="wrap")
            strides, pads = (1,) * len(axes), "VALID"
        return lax.conv_general_dilated(
            inputs, W, (1,) * len(axes), pads, strides, windows.dilation, dimension_numbers=self.letters
        )

    def mask(self, mask, input_shape):
        mask = jnp.all(mask, self.channel_axis, keepdims=True)
        sizes = [n if a in self.axes else mask.shape[a] for a, n in enumerate(input_shape)]
        sizes_of_W = dict(zip(_spatial(self.rhs), self.in_filter_order.window, strict=True), I=1, O=1)
        ones = jnp.ones([sizes_of_W[letter] for letter in self.rhs])
        return self.convolve(jnp.broadcast_to(mask, sizes).astype(ones.dtype), ones) > 0.5

    def emit(self, builder: Builder, value: Value) -> Value:
        along, windows = _spreads(self.windows, value.spec.space), self.windows
        ones = (1,) * len(along)
        if tuple(a.count for a in along) == value.spec.space:  # without strides: convolutions know these paddings
            pads = tuple((a.low, a.high) for a in along)
            if windows.padding != Padding.CIRCULAR.value:
                return builder.add(self.step(ones, pads), value)
            if pads == steps.window_pads(value.spec.space, windows.window, ones, windows.padding, windows.dilation):
                return builder.add(self.step(ones, windows.padding), value)
        is_circular = windows.padding == Padding.CIRCULAR.value
        spread = builder.add(steps.Gather(tuple(a.positions(is_circular) for a in along)), value)
        return builder.add(self.step(ones, Padding.VALID.value), spread)


class _ConvLocal(_Conv):
    """A convolution whose weights and biases are different at every position."""

    diagonal_spatial = Diagonal(input=Bool.YES, output=Bool.MAYBE)

    def sizes_of_weights(self, n_in: int, space: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        if any(n < 0 for n in space.values()):
            raise ValueError(
                "ConvLocal has weights at every position, and needs the sizes of the spatial axes to make them: "
                "input_shape has an axis of unknown size (-1)."
            )
        n_out = self.weights.n_out
        return dict(space, I=n_in * self.n_taps, O=n_out), dict(space, C=n_out)

    def convolve(self, inputs: Array, W: Array) -> Array:
        windows = self.in_filter_order
        inputs, pads = windows.padded(inputs, self.axes_in_filter_order)
        return lax.conv_general_dilated_local(
            inputs,
            W,
            windows.strides,
            pads,
            windows.window,
            rhs_dilation=windows.dilation,
            dimension_numbers=self.letters,
        )

    def emit(self, builder: Builder, value: Value) -> Value:
        convolved = super().emit(builder, value)
        if value.spec.diagonal_spatial:
            return convolved
        return builder.add(steps.Untie(value.spec.is_reversed), convolved)


class _Spread:
    """One axis of a transposed convolution: where the image's positions lie, and how many outputs there are.

    Attributes:
      extent: of the filter, its gaps included.
      count: number of outputs.
      low, high: zeros before and after positions that lie `stride` apart.
    """

    def __init__(self, n: int, stride: int, extent: int, padding: str) -> None:
        self.n, self.stride, self.extent = n, stride, extent
        beyond = max(extent - stride, 0)  # positions that the transposed convolution pads
        is_valid = padding == Padding.VALID.value
        self.count = n * stride + (beyond if is_valid else 0)
        self.low = extent - 1 - (0 if is_valid else beyond // 2)
        self.high = self.count - 1 - (n - 1) * stride + (extent - 1 - self.low)

    def positions(self, is_circular: bool) -> tuple[int, ...]:
        """Returns the position that lies at each place of the padded image, -1 where there is a zero."""
        places = range(-self.low, self.count + self.extent - 1 - self.low)
        if is_circular:
            places = [place % self.count for place in places]
        last = (self.n - 1) * self.stride
        return tuple(p // self.stride if 0 <= p <= last and p % self.stride == 0 else -1 for p in places)


def _channels_are_alike(builder: Builder, value: Value) -> bool:
    """Whether all channels of a value have the same covariance: weights have mixed them, and no branches are joined."""
    pending = [value.number]
    while pending:
        node = builder.node(number := pending.pop())
        if node is None:
            if builder.spec(number).is_input:
                return False
        elif isinstance(node.step, steps.Combine) and node.step.concat and len(node.inputs) > 1:
            return False
        elif not isinstance(node.step, steps.Linear):
            pending.extend(node.inputs)
    return True


def _spreads(windows: Windows, space: Sequence[int]) -> list[_Spread]:
    """Returns what a transposed convolution does along each axis."""
    return [
        _Spread(n, stride, extent, windows.padding)
        for n, stride, extent in zip(space, windows.strides, windows.extents, strict=True)
    ]


def _letters(layer: str, dimension_numbers: Sequence[str] | None, n_space: int) -> tuple[str, str, str]:
    space = _SPATIAL_LETTERS[:n_space]
    default = f"N{space}C", f"{space}IO", f"N{space}C"
    letters = default if dimension_numbers is None else tuple(dimension_numbers)
    kinds = [set(spec) - set(_spatial(spec)) for spec in letters]
    well_formed = (
        len(letters) == 3
        and kinds == [set("NC"), set("IO"), set("NC")]
        and all(len(spec) == len(set(spec)) == n_space + 2 for spec in letters)
        and len({frozenset(_spatial(spec)) for spec in letters}) == 1
    )
    if not well_formed:
        raise ValueError(
            f"{layer} with a filter of {n_space} spatial axes needs dimension_numbers=(inputs, filter, outputs) such "
            f"as {default}: N and C, I and O, N and C, and in each the same {n_space} other letters. Got "
            f"{letters}."
        )
    return letters[0], letters[1], letters[2]


def _spatial(spec: str) -> str:
    return "".join(letter for letter in spec if letter not in "NCIO")
