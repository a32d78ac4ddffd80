"""`Dense`, and what changes shapes or entries: `Flatten`, `Identity`, `Dropout`."""

import math

import jax.numpy as jnp
from jax import Array, random
from nt_core import Bool, Diagonal, Rule, layer, step_rule, steps, supports_masking

from nt_stax.weights import Weights, n_channels_of


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
    weights = Weights("Dense", out_dim, W_std, b_std, parameterization, s)

    def init_fn(rng, input_shape):
        n_in = n_channels_of("Dense", input_shape, channel_axis)
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
def Scale(factor: float):
    """Multiplies by a number, as between the parts of deep residual networks.

    >>> from nt_stax import Dense, Scale, serial
    >>> _, _, kernel_fn = serial(Dense(512), Scale(0.5))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, ("nngp", "ntk")))
    AnalyticKernel(nngp=Array([[0.25]], dtype=float32), ntk=Array([[0.25]], dtype=float32))
    """

    def init_fn(rng, input_shape):
        return input_shape, ()

    def apply_fn(params, inputs, **kwargs):
        return factor * inputs

    return init_fn, apply_fn, step_rule(steps.Combine((float(factor) ** 2,)))


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
        keep = random.bernoulli(rng, rate, (inputs.size,)).reshape(inputs.shape)  # along one axis: see `normal`
        return jnp.where(keep, inputs / rate, 0)

    return init_fn, apply_fn, step_rule(steps.Dropout(rate), {"use_dropout": True})
