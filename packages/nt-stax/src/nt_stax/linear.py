"""Layers that act linearly on their inputs: with weights (`Dense`, `Conv`) and without."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, random
from nt_core import Bool, Diagonal, Rule, layer, step_rule, steps, supports_masking

from nt_stax.windows import Padding, Windows

_PARAMETERIZATIONS = ("ntk", "standard")
_SPATIAL_LETTERS = "HWDABEFGJKLMPQRSTUVXYZ"


@layer
@supports_masking(remask_kernel=True)
def Dense(
    out_dim: int,
    W_std: float = 1.0,
    b_std: float | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
):
    """A fully connected layer over the channels, the same at every position.

    With standard normal weights `W` of shape `(n_in, out_dim)` and biases `b`, the 'ntk' parameterization is

        y = W_std / sqrt(n_in) x W + b_std b
        K' = W_std^2 K + b_std^2
        T' = W_std^2 T + K'

    for the covariance `K` (NNGP) and the tangent kernel `T` (NTK) of its inputs. In the 'standard' one
    (arXiv:2001.07301) the scales stand in the initial values of the parameters instead, `W ~ W_std / sqrt(n_in / s[0])`
    and `b ~ b_std`, for a layer with `s[1] * out_dim` channels:

        y = x W / sqrt(s[0]) + b
        K' = W_std^2 K + b_std^2
        T' = W_std^2 T + n_in / s[0] K + 1      (without the 1 if there is no bias)

    Args:
      out_dim: number of output channels.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases, None for no bias.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs. All other axes are spatial.
      parameterization: 'ntk' or 'standard'.
      s: width of the layer before this one, and of this one, as multiples of a common base width; for 'standard'.

    >>> from nt_stax import Dense
    >>> init_fn, apply_fn, kernel_fn = Dense(512, W_std=2.0, b_std=1.0)
    >>> print(kernel_fn(jnp.ones((1, 3)), 3 * jnp.ones((1, 3)), ("nngp", "ntk")))
    AnalyticKernel(nngp=Array([[13.]], dtype=float32), ntk=Array([[13.]], dtype=float32))
    """
    weights = _Weights("Dense", out_dim, W_std, b_std, parameterization, s)

    def init_fn(rng, input_shape):
        n_in = _n_channels("Dense", input_shape, channel_axis)
        b_shape = [1] * len(input_shape)
        b_shape[channel_axis] = weights.n_out
        output_shape = list(input_shape)
        output_shape[channel_axis] = weights.n_out
        return tuple(output_shape), weights.init(rng, (n_in, weights.n_out), b_shape, fan_in=n_in)

    def apply_fn(params, inputs, **kwargs):
        W, b = params
        axis = channel_axis % inputs.ndim
        outputs = jnp.moveaxis(jnp.tensordot(inputs, W, (axis, 0)), -1, axis)
        return weights.scaled(outputs, b, fan_in=W.shape[0])

    def mask_fn(mask, input_shape):
        return jnp.all(mask, channel_axis, keepdims=True)

    step = steps.Dense(**weights.fields)
    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_spatial": Diagonal(input=Bool.YES, output=Bool.NO),
    }
    return init_fn, apply_fn, step_rule(step, requirements), mask_fn


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

    >>> from nt_stax import Conv
    >>> init_fn, apply_fn, kernel_fn = Conv(128, (3,), padding="SAME")
    >>> print(kernel_fn(jnp.ones((1, 4, 2)), None, "nngp", diagonal_spatial=True).round(4))  # padding has no variance
    [[[0.6667 1.     1.     0.6667]]]
    """
    lhs, rhs, out = letters = _letters(dimension_numbers, len(filter_shape))
    weights = _Weights("Conv", out_chan, W_std, b_std, parameterization, s)
    n_taps = math.prod(filter_shape)
    batch_axis, channel_axis = lhs.index("N"), lhs.index("C")
    # Windows count spatial axes as the inputs have them, the arguments as the filter has them.
    order = [_spatial(rhs).index(letter) for letter in _spatial(lhs)]
    axes = [lhs.index(letter) for letter in _spatial(lhs)]
    axes_in_filter_order = [lhs.index(letter) for letter in _spatial(rhs)]
    in_filter_order = Windows("Conv", filter_shape, strides, padding)
    windows = Windows(
        "Conv", [in_filter_order.window[i] for i in order], [in_filter_order.strides[i] for i in order], padding
    )
    axes_out = tuple(lhs.index(letter) for letter in out)

    def init_fn(rng, input_shape):
        if len(input_shape) != len(lhs):
            raise ValueError(
                f"Conv with dimension_numbers={letters} and filter_shape={tuple(filter_shape)} takes inputs of rank "
                f"{len(lhs)}, got input_shape={input_shape}."
            )
        n_in = _n_channels("Conv", input_shape, channel_axis)
        sizes = dict(zip(_spatial(rhs), in_filter_order.window, strict=True), I=n_in, O=weights.n_out)
        b_shape = [weights.n_out if letter == "C" else 1 for letter in out]
        space = windows.space([input_shape[a] for a in axes])
        sizes_out = dict(zip(_spatial(lhs), space, strict=True), N=input_shape[batch_axis], C=weights.n_out)
        params = weights.init(rng, [sizes[letter] for letter in rhs], b_shape, fan_in=n_in * n_taps)
        return tuple(sizes_out[letter] for letter in out), params

    def apply_fn(params, inputs, **kwargs):
        W, b = params
        fan_in = inputs.shape[channel_axis] * n_taps
        inputs, pads = in_filter_order.padded(inputs, axes_in_filter_order)
        dtype = jnp.result_type(inputs, W)
        outputs = lax.conv_general_dilated(
            inputs.astype(dtype), W.astype(dtype), in_filter_order.strides, pads, dimension_numbers=letters
        )
        return weights.scaled(outputs, b, fan_in)

    def mask_fn(mask, input_shape):
        mask = windows.mask(jnp.all(mask, channel_axis, keepdims=True), input_shape, axes)
        return jnp.transpose(mask, axes_out)

    step = steps.Conv(
        **weights.fields,
        window=windows.window,
        strides=windows.strides,
        padding=windows.padding,
        dilation=(1,) * len(axes),
        axes_out=None if out == lhs else axes_out,
    )
    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_spatial": Diagonal(input=Bool.YES, output=Bool.NO),
    }
    return init_fn, apply_fn, step_rule(step, requirements), mask_fn


@layer
@supports_masking(remask_kernel=False)
def Flatten(batch_axis: int = 0, batch_axis_out: int = 0):
    """Makes all axes but the batch axis one channel axis.

    Of the kernels, entries of equal positions are read, and averaged over the positions.

    Args:
      batch_axis: batch axis of the inputs.
      batch_axis_out: batch axis of the outputs, 0 or 1.

    >>> from nt_stax import Flatten
    >>> init_fn, apply_fn, kernel_fn = Flatten()
    >>> print(apply_fn((), jnp.ones((5, 2, 3, 4))).shape)
    (5, 24)
    >>> print(kernel_fn(jnp.array([[[1.0], [3.0]]]), None, "nngp"))
    [[5.]]
    """
    if batch_axis_out not in (0, 1, -1, -2):
        raise ValueError(f"Flatten leaves two axes: batch_axis_out must be 0 or 1, got {batch_axis_out}.")

    def flatten(x: Array) -> Array:
        rows = jnp.moveaxis(x, batch_axis, 0).reshape((x.shape[batch_axis], -1))
        return jnp.moveaxis(rows, 0, batch_axis_out)

    def init_fn(rng, input_shape):
        sizes = list(input_shape)
        n = sizes.pop(batch_axis)
        n_channels = -1 if min(sizes, default=1) < 0 else math.prod(sizes)
        return ((n, n_channels) if batch_axis_out in (0, -2) else (n_channels, n)), ()

    def apply_fn(params, inputs, **kwargs):
        return flatten(inputs)

    def mask_fn(mask, input_shape):
        return flatten(jnp.broadcast_to(mask, input_shape))

    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": None,  # all other axes become channels
        "diagonal_spatial": Diagonal(input=Bool.YES, output=Bool.YES),
    }
    return init_fn, apply_fn, step_rule(steps.Flatten(batch_axis_out), requirements), mask_fn


@layer
def Identity():
    """The identity.

    >>> from nt_stax import Identity
    >>> _, apply_fn, _ = Identity()
    >>> print(apply_fn((), jnp.arange(3)))
    [0 1 2]
    """

    def init_fn(rng, input_shape):
        return input_shape, ()

    def apply_fn(params, inputs, **kwargs):
        return inputs

    rule = Rule("Identity", emit=lambda builder, values: values)
    return init_fn, apply_fn, rule


@layer
@supports_masking(remask_kernel=False)
def Dropout(rate: float, mode: str = "train"):
    """Dropout (arXiv:1611.01232): sets entries to zero at random, and scales the others up to keep the mean.

    In the kernels, entries of a sample and position with themselves are divided by `rate`; all others average over
    independent choices, and stay.

    Args:
      rate: the probability, in (0, 1], with which an entry is *kept*.
      mode: 'train', or 'test' for the identity.

    Raises:
      ValueError: a `rate` or `mode` that does not exist; `apply_fn` without `rng`; a kernel of dropout on the inputs,
        which have finitely many channels, so that the covariance of what is left is random.

    >>> from nt_stax import Dense, Dropout, serial
    >>> _, _, kernel_fn = serial(Dense(512), Dropout(rate=0.5))
    >>> print(kernel_fn(jnp.ones((2, 3)), None, "nngp"))
    [[2. 1.]
     [1. 2.]]
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"Dropout keeps entries with a probability `rate` in (0, 1], got {rate}.")
    if mode not in ("train", "test"):
        raise ValueError(f"The mode of Dropout is 'train' or 'test', got {mode!r}.")

    def init_fn(rng, input_shape):
        return input_shape, ()

    if mode == "test":
        identity = Rule("Dropout", {"use_dropout": False}, emit=lambda builder, value: value)
        return init_fn, lambda params, inputs, **kwargs: inputs, identity

    def apply_fn(params, inputs, *, rng=None, **kwargs):
        if rng is None:
            raise ValueError(
                "Dropout in mode 'train' needs a random key: `apply_fn(params, inputs, rng=key)`. Use mode='test' for "
                "the network without dropout."
            )
        keep = random.bernoulli(rng, rate, inputs.shape)
        return jnp.where(keep, inputs / rate, 0)

    return init_fn, apply_fn, step_rule(steps.Dropout(rate), {"use_dropout": True})


class _Weights:
    """Weights and biases in either parameterization."""

    def __init__(
        self, layer: str, out_dim: int, W_std: Any, b_std: Any, parameterization: str, s: tuple[int, int]
    ) -> None:
        self._parameterization = parameterization.lower()
        if self._parameterization not in _PARAMETERIZATIONS:
            raise ValueError(f"{layer}: parameterization={parameterization!r} is unknown, use 'ntk' or 'standard'.")
        self._s = (s[0], s[1])
        self._W_std, self._b_std = W_std, b_std
        self.n_out = out_dim if self._parameterization == "ntk" else s[1] * out_dim

    def init(self, rng: Array, W_shape: Sequence[int], b_shape: Sequence[int], fan_in: int) -> tuple:
        """Returns random `(W, b)`."""
        W_rng, b_rng = random.split(rng)
        W_scale, b_scale = 1.0, 1.0
        if self._parameterization == "standard":
            W_scale, b_scale = self._W_std / (fan_in / self._s[0]) ** 0.5, self._b_std
        W = random.normal(W_rng, tuple(W_shape)) * W_scale
        return W, None if self._b_std is None else random.normal(b_rng, tuple(b_shape)) * b_scale

    def scaled(self, product: Array, b: Array | None, fan_in: int) -> Array:
        """Returns the outputs, given the product of weights and inputs."""
        if self._parameterization == "ntk":
            outputs = product * (self._W_std / fan_in**0.5)
            return outputs if b is None else outputs + b * self._b_std
        outputs = product * (1 / self._s[0] ** 0.5)
        return outputs if b is None else outputs + b

    @property
    def fields(self) -> dict[str, Any]:
        """What the step of any layer with weights has."""
        return {
            "w_var": self._W_std**2,
            "b_var": None if self._b_std is None else self._b_std**2,
            "out_dim": self.n_out,
            "parameterization": self._parameterization,
            "s": self._s,
        }


def _n_channels(layer: str, input_shape: Sequence[int], channel_axis: int) -> int:
    if not -len(input_shape) <= channel_axis < len(input_shape):
        raise ValueError(f"{layer}: inputs of shape {tuple(input_shape)} have no channel axis {channel_axis}.")
    n_channels = input_shape[channel_axis]
    if n_channels < 0:
        raise ValueError(
            f"{layer} needs the size of the channel axis {channel_axis} to make its weights, got input_shape="
            f"{tuple(input_shape)} (-1 stands for an unknown size)."
        )
    return n_channels


def _letters(dimension_numbers: Sequence[str] | None, n_space: int) -> tuple[str, str, str]:
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
            f"Conv with a filter of {n_space} spatial axes needs dimension_numbers=(inputs, filter, outputs) such as "
            f"{default}: N and C, I and O, N and C, and in each the same {n_space} other letters. Got "
            f"{letters}."
        )
    return letters[0], letters[1], letters[2]


def _spatial(spec: str) -> str:
    return "".join(letter for letter in spec if letter not in "NCIO")
