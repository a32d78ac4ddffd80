"""Embeddings of tokens."""

import jax
import jax.numpy as jnp
from jax import Array
from nt_core import Builder, Inputs, Kernel, Rule, Spec, Value, layer, steps, supports_masking
from nt_core.authoring import is_traced, zip_axes

from nt_stax.weights import normal

# Inputs are real numbers: in single precision, integers beyond are not told apart.
_MAX_TOKENS = 2**24


@layer
@supports_masking(remask_kernel=True)
def Embedding(vocab_size: int, out_dim: int, W_std: float = 1.0, batch_axis: int = 0, channel_axis: int = -1):
    """Random vectors for tokens, as the first layer of a network: `y = W_std W[token]`, with standard normal `W`.

    The covariance of two positions is `W_std^2` where they hold the same token, and 0 elsewhere; the tangent kernel is
    the same. It is formed for all pairs of positions that the network needs, whatever the size of the vocabulary.

    Inputs are tokens, the integers from 0 to `vocab_size - 1`, with a channel axis of size 1: `(n, length, 1)`. With
    `mask_constant`, tokens that equal it are masked.

    Args:
      vocab_size: number of tokens that there are.
      out_dim: number of output channels.
      W_std: standard deviation of the entries of the vectors.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    Raises:
      ValueError: a vocabulary of more than 2^24 tokens; inputs with other than one channel, or (unless they are traced)
        with what is no token; the layer is not the first one.

    >>> from nt_stax import Embedding
    >>> init_fn, apply_fn, kernel_fn = Embedding(1000, 512)
    >>> tokens = jnp.array([[7, 3, 7]])[..., None]
    >>> print(kernel_fn(tokens, None, "nngp")[0, 0])
    [[1. 0. 1.]
     [0. 1. 0.]
     [1. 0. 1.]]
    """

    if not 0 < vocab_size <= _MAX_TOKENS:
        raise ValueError(f"Embedding takes a positive vocab_size of at most {_MAX_TOKENS}, got {vocab_size}.")

    def init_fn(rng, input_shape):
        _check_channels(input_shape, channel_axis)
        output_shape = list(input_shape)
        output_shape[channel_axis] = out_dim
        return tuple(output_shape), normal(rng, (vocab_size, out_dim))

    def apply_fn(params, inputs, **kwargs):
        _check_channels(inputs.shape, channel_axis)
        tokens = jnp.squeeze(inputs, channel_axis)
        _check_tokens(tokens, vocab_size)
        vectors = jnp.take(params, tokens.astype(int), axis=0)
        return jnp.moveaxis(W_std * vectors, -1, channel_axis)

    def of_inputs(inputs: Inputs) -> Kernel:
        _check_channels(inputs.spec.shape1, inputs.spec.channel_axis)
        first, second = (jnp.squeeze(x, -1) for x in (inputs.first(), inputs.second()))
        for tokens in (first, second):
            _check_tokens(tokens, vocab_size)
        spec = inputs.spec.with_shape(inputs.spec.space, vocab_size).replace(is_input=False)
        kernel = Kernel.from_spec(
            spec,
            nngp=_equal(first, second, spec, False),
            ntk=jnp.zeros((), first.dtype),
            cov1=_equal(first, first, spec, spec.diagonal_batch),
            cov2=None if inputs.x2 is None else _equal(second, second, spec, spec.diagonal_batch),
            x1_is_x2=inputs.same_inputs(),
        )
        return kernel if inputs.mask1 is None and inputs.mask2 is None else kernel.mask(inputs.mask1, inputs.mask2)

    def emit(builder: Builder, value: Value) -> Value:
        if builder.node(value.number) is not None or value.spec.is_input or value.spec.n_channels != vocab_size:
            raise ValueError("Embedding takes tokens: it has to be the first layer of the whole network.")
        return builder.add(steps.Dense(W_std**2, None, out_dim), value)

    requirements = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    return init_fn, apply_fn, Rule("Embedding", requirements, emit=emit, of_inputs=of_inputs)


def _check_channels(shape: tuple[int, ...], channel_axis: int) -> None:
    if shape[channel_axis] != 1:
        raise ValueError(
            f"Embedding takes tokens with one channel, got inputs of shape {tuple(shape)} with channel_axis="
            f"{channel_axis}. Of tokens (n, length) these are `tokens[..., None]`."
        )


def _check_tokens(tokens: Array, vocab_size: int) -> None:
    if not is_traced(tokens) and not _are_tokens(tokens, vocab_size):
        raise ValueError(
            f"Embedding takes the integers from 0 to {vocab_size - 1}, got other numbers among the inputs."
        )


@jax.jit
def _are_tokens(tokens: Array, vocab_size: int) -> Array:
    return jnp.all((tokens >= 0) & (tokens < vocab_size) & (tokens == jnp.round(tokens)))


def _equal(a: Array, b: Array, spec: Spec, same_sample: bool) -> Array:
    """1 where tokens `(n, *space)` are equal, in the layout of covariances."""
    n_space, n_batch = len(spec.space), 1 if same_sample else 2
    if not same_sample:
        a, b = a[:, None], b[None]
    if not spec.diagonal_spatial:
        a = a.reshape(a.shape + (1,) * n_space)
        b = b.reshape(b.shape[:n_batch] + (1,) * n_space + b.shape[n_batch:])
    equal = (a == b).astype(a.dtype)
    return equal if spec.diagonal_spatial else zip_axes(equal, n_batch)
