"""Self-attention over all positions of a sample."""

import dataclasses
import enum
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.core import Tracer
from nt_core import Bool, Diagonal, Kernel, Rule, Spec, layer, supports_masking
from nt_core.authoring import combine, from_positions, to_positions

from nt_stax.weights import normal

_TO_CALLER = 4  # `stacklevel` of a warning: out of the constructor, and of the two decorators around it


class AttentionMechanism(enum.Enum):
    """What turns the products of queries and keys into the weights of an attention head.

    >>> print(AttentionMechanism("RELU").fn()(jnp.array([-1.0, 1.0])))
    [0. 1.]
    """

    SOFTMAX = "SOFTMAX"
    IDENTITY = "IDENTITY"
    ABS = "ABS"
    RELU = "RELU"

    def fn(self) -> Callable[[Array], Array]:
        """Returns the function; `SOFTMAX` is taken over the last axis."""
        return _MECHANISMS[self]


_MECHANISMS: dict[AttentionMechanism, Callable[[Array], Array]] = {
    AttentionMechanism.SOFTMAX: jax.nn.softmax,
    AttentionMechanism.IDENTITY: lambda x: x,
    AttentionMechanism.ABS: jnp.abs,
    AttentionMechanism.RELU: lambda x: jnp.maximum(x, 0),
}


class PositionalEmbedding(enum.Enum):
    """How positional embeddings join the inputs of attention: not at all, added, or as further channels."""

    NONE = "NONE"
    SUM = "SUM"
    CONCAT = "CONCAT"


@layer
@supports_masking(remask_kernel=True)
def GlobalSelfAttention(
    n_chan_out: int,
    n_chan_key: int,
    n_chan_val: int,
    n_heads: int,
    linear_scaling: bool = True,
    W_key_std: float = 1.0,
    W_value_std: float = 1.0,
    W_query_std: float = 1.0,
    W_out_std: float = 1.0,
    b_std: float | None = None,
    attention_mechanism: str | AttentionMechanism = AttentionMechanism.SOFTMAX,
    pos_emb_type: str | PositionalEmbedding = PositionalEmbedding.NONE,
    pos_emb_p_norm: float = 2,
    pos_emb_decay_fn: Callable[[Any], Any] | None = None,
    n_chan_pos_emb: int | None = None,
    W_pos_emb_std: float = 1.0,
    val_pos_emb: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
):
    """Multi-head self-attention over all positions of a sample (arXiv:2006.10540).

    With `x` of shape `(positions, channels)`, `n_in` channels and weights that are standard normal, a head is

        G = mechanism(W_query_std W_key_std / (n_in n_key^e) (x W_query) (x W_key)^T)
        head = W_value_std / sqrt(n_in) G x W_value

    and the output `W_out_std / sqrt(n_val n_heads) concat(heads) W_out + b_std b`. All spatial axes are flattened into
    positions and restored. The limit is that of many heads and wide keys, values and inputs. Keys at masked positions
    are not attended to.

    Args:
      n_chan_out: number of output channels.
      n_chan_key: `n_key`, the width of keys and queries.
      n_chan_val: `n_val`, the width of values.
      n_heads: number of heads.
      linear_scaling: `e = 1`: in the limit `G` is deterministic, for which queries must equal keys (`W_query = W_key`).
        Otherwise `e = 1/2` and `G` stays random; the kernel is then known for the 'IDENTITY' mechanism only.
      W_key_std, W_value_std, W_query_std, W_out_std: standard deviations of the weights.
      b_std: standard deviation of the bias, None for no bias.
      attention_mechanism: 'SOFTMAX', 'IDENTITY', 'ABS' or 'RELU'.
      pos_emb_type: 'NONE', 'SUM' (`x + W_pos_emb_std p`) or 'CONCAT' (`[x, W_pos_emb_std p]`), with `p` standard normal
        parameters, one for each position and channel, that are the same for all samples. Queries and keys see them.
      pos_emb_p_norm: positions have distance `sum_axes |difference|^pos_emb_p_norm`.
      pos_emb_decay_fn: `decay(distance)`, the correlation of the embeddings of two positions, e.g.
        `lambda distance: jnp.exp(-distance)`. None for independent embeddings.
      n_chan_pos_emb: number of channels of concatenated embeddings; by default as many as the input has.
      W_pos_emb_std: standard deviation of the embeddings.
      val_pos_emb: values see the embeddings, too.
      batch_axis: batch axis of the inputs.
      channel_axis: channel axis of the inputs.

    Raises:
      ValueError: an unknown mechanism or embedding; a size that is needed is unknown; `decay` is no correlation.
      NotImplementedError: a kernel with `linear_scaling=False` and a mechanism other than 'IDENTITY'.

    Attention with independent queries and keys, and no nonlinearity, multiplies a covariance by the sum of its squares:

    >>> from nt_stax import GlobalSelfAttention
    >>> _, _, kernel_fn = GlobalSelfAttention(
    ...     8, n_chan_key=4, n_chan_val=4, n_heads=2, linear_scaling=False, attention_mechanism="IDENTITY")
    >>> x = jnp.array([[[1.0], [2.0]]])
    >>> print(kernel_fn(x, None, "nngp")[0, 0])  # (1 + 4 + 4 + 16) times [[1, 2], [2, 4]]
    [[ 25.  50.]
     [ 50. 100.]]
    """
    mechanism = _member(AttentionMechanism, attention_mechanism, "attention_mechanism")
    embedding = _embedding(
        _member(PositionalEmbedding, pos_emb_type, "pos_emb_type"),
        n_chan_pos_emb,
        W_pos_emb_std,
        pos_emb_decay_fn,
        pos_emb_p_norm,
    )
    qk_std, ov_std = W_query_std * W_key_std, W_out_std * W_value_std
    if linear_scaling:
        warnings.warn(
            "GlobalSelfAttention with linear_scaling=True uses the keys as queries: in this scaling the products of "
            "independent ones vanish in the infinite-width limit.",
            stacklevel=_TO_CALLER,
        )

    def init_fn(rng, input_shape):
        n_in = n_key_in = n_value_in = input_shape[channel_axis]
        embedding_shape = None
        if embedding is not None:
            n_embedding = embedding.n_channels_for(n_in)
            embedding_shape = _resized(input_shape, {batch_axis: 1, channel_axis: n_embedding})
            if embedding.concat:
                n_key_in += n_embedding
                n_value_in += n_embedding if val_pos_emb else 0
        if n_in < 0 or (embedding_shape is not None and min(embedding_shape) < 0):
            raise ValueError(
                "GlobalSelfAttention needs the size of the channel axis, and with positional embeddings also those of "
                f"the spatial axes, got input_shape={input_shape} (-1 stands for an unknown size)."
            )
        key_shape = (n_heads, n_key_in, n_chan_key)
        shapes = (
            None if linear_scaling else key_shape,
            key_shape,
            (n_heads, n_value_in, n_chan_val),
            (n_chan_val * n_heads, n_chan_out),
            None if b_std is None else _resized((1,) * len(input_shape), {channel_axis: n_chan_out}),
            embedding_shape,
        )
        keys = random.split(rng, len(shapes))
        params = tuple(None if s is None else normal(k, s) for k, s in zip(keys, shapes, strict=True))
        return _resized(input_shape, {channel_axis: n_chan_out}), params

    def apply_fn(params, inputs, *, mask=None, **kwargs):
        W_query, W_key, W_value, W_out, b, W_embedding = params
        x_value = x_key = to_positions(inputs, batch_axis, channel_axis)
        space = jnp.moveaxis(inputs, (batch_axis, channel_axis), (0, -1)).shape[1:-1]
        masked = None if mask is None else _masked_positions(mask, inputs.shape, batch_axis, channel_axis)
        if embedding is not None:
            x_key = embedding.join(x_key, to_positions(W_embedding, batch_axis, channel_axis), space)
            x_key = x_key if masked is None else jnp.where(masked[..., None], 0, x_key)
            x_value = x_key if val_pos_emb else x_value
        key = jnp.einsum("npc,hck->nhpk", x_key, W_key)
        query = key if W_query is None else jnp.einsum("npc,hck->nhpk", x_key, W_query)
        value = jnp.einsum("npc,hcv->nhpv", x_value, W_value)
        scale = qk_std / (x_key.shape[-1] * n_chan_key ** (1.0 if linear_scaling else 0.5))
        masked_keys = None if masked is None else masked[:, None, None]
        gates = _gates(scale * jnp.einsum("nhpk,nhqk->nhpq", query, key), masked_keys, mechanism)
        # The rows of W_out are ordered by channels of the values first, then by heads.
        heads = jnp.einsum("nhpq,nhqv->npvh", gates, value).reshape(*x_value.shape[:2], -1)
        outputs = ov_std / (heads.shape[-1] * x_value.shape[-1]) ** 0.5 * (heads @ W_out)
        outputs = from_positions(outputs, space, batch_axis, channel_axis)
        return outputs if b is None else outputs + b_std * b

    def mask_fn(mask, input_shape):
        return _position_mask(mask, channel_axis)

    def kernel_fn(kernel: Kernel) -> Kernel:
        if not linear_scaling and mechanism is not AttentionMechanism.IDENTITY:
            raise NotImplementedError(
                "With linear_scaling=False the infinite-width limit is known for attention_mechanism='IDENTITY' only, "
                f"got '{mechanism.name}'. Use linear_scaling=True for other mechanisms."
            )
        return _attended(
            kernel,
            None if embedding is None else embedding.covariance(kernel.spec),
            (qk_std, ov_std, b_std),
            fixed_gates=mechanism if linear_scaling else None,
            val_pos_emb=val_pos_emb,
            n_chan_out=n_chan_out,
        )

    rule = Rule(
        "GlobalSelfAttention",
        requirements={
            "batch_axis": batch_axis,
            "channel_axis": channel_axis,
            "diagonal_spatial": Diagonal(input=Bool.NO, output=Bool.NO),
        },
        function=lambda kernel, run: kernel_fn(kernel),
    )
    return init_fn, apply_fn, rule, mask_fn


@dataclasses.dataclass(frozen=True)
class _Embedding:
    """Positional embeddings: standard normal parameters, the same for all samples, correlated over positions."""

    concat: bool
    n_channels: int | None
    std: Any
    decay_fn: Callable[[Any], Any] | None
    p_norm: float

    def n_channels_for(self, n_in: int) -> int:
        """Returns the number of channels of the embeddings of inputs with `n_in` channels."""
        n = n_in if self.n_channels is None else self.n_channels
        if not self.concat and n != n_in:
            raise ValueError(
                f"Positional embeddings with n_chan_pos_emb={n} channels cannot be added to inputs with {n_in} "
                "channels. Leave n_chan_pos_emb unset, or use pos_emb_type='CONCAT'."
            )
        return n

    def join(self, x: Array, embedding: Array, space: tuple[int, ...]) -> Array:
        """Joins inputs `(n, positions, channels)` with parameters `(1, positions, embedding channels)`."""
        if self.decay_fn is not None:
            factor = _cholesky(self.correlation(space)).astype(embedding.dtype)
            embedding = jnp.einsum("pq,nqc->npc", factor, embedding)
        embedding = jnp.broadcast_to(self.std * embedding, (*x.shape[:2], embedding.shape[-1]))
        return jnp.concatenate([x, embedding], axis=-1) if self.concat else x + embedding

    def covariance(self, spec: Spec) -> tuple[float, Any, Array]:
        """Returns `(share, factor, correlation)`: a covariance of inputs becomes `share K + factor correlation`.

        This is a sum, or an average over the channels of inputs and embeddings.
        """
        n_in = spec.n_channels
        n_embedding = self.n_channels_for(n_in)
        n = n_in + n_embedding
        share, embedding_share = (n_in / n, n_embedding / n) if self.concat else (1.0, 1.0)
        correlation = self.correlation(spec.space)
        _cholesky(correlation)  # is it one?
        return share, embedding_share * self.std**2, correlation

    def correlation(self, space: tuple[int, ...]) -> Array:
        """Returns the correlation of the embeddings of all pairs of positions, `(positions, positions)`."""
        n = math.prod(space)
        if self.decay_fn is None:
            return jnp.eye(n)
        positions = np.indices(space).reshape(len(space), n)
        distance = np.sum(np.abs(positions[:, :, None] - positions[:, None, :]) ** float(self.p_norm), axis=0)
        with jax.ensure_compile_time_eval():
            return jnp.broadcast_to(self.decay_fn(jnp.asarray(distance, float)), (n, n))


def _embedding(kind: PositionalEmbedding, n_channels, std, decay_fn, p_norm) -> _Embedding | None:
    if kind is PositionalEmbedding.NONE:
        return None
    return _Embedding(kind is PositionalEmbedding.CONCAT, n_channels, std, decay_fn, p_norm)


def _cholesky(correlation: Array) -> Array:
    """Returns a lower triangular factor. Raises `ValueError` if there is none."""
    n = len(correlation)
    with jax.ensure_compile_time_eval():
        # Slowly decaying correlations are singular to rounding.
        jitter = n * jnp.finfo(correlation.dtype).eps * jnp.mean(jnp.diagonal(correlation))
        factor = jnp.linalg.cholesky(correlation + jitter * jnp.eye(n, dtype=correlation.dtype))
        if not isinstance(factor, Tracer) and not bool(jnp.all(jnp.isfinite(factor))):
            raise ValueError(
                "pos_emb_decay_fn does not give a correlation: the matrix of its values for all pairs of positions has "
                "negative eigenvalues. Use a positive definite function of the distance, e.g. exp(-distance)."
            )
    return factor


def _gates(logits: Array, masked_keys: Array | None, mechanism: AttentionMechanism) -> Array:
    """Returns how much each position (last axis but one) takes of each key (last axis)."""
    if masked_keys is not None:
        # Not minus infinity: where all keys are masked, softmax would be NaN.
        nothing = jnp.finfo(logits.dtype).min if mechanism is AttentionMechanism.SOFTMAX else 0
        logits = jnp.where(masked_keys, nothing, logits)
    return mechanism.fn()(logits)


@partial(jax.jit, static_argnames=("fixed_gates", "val_pos_emb", "n_chan_out"))
def _attended(
    kernel: Kernel,
    embedding: tuple[float, Any, Array] | None,
    stds: tuple[Any, Any, Any],
    *,
    fixed_gates: AttentionMechanism | None,
    val_pos_emb: bool,
    n_chan_out: int,
) -> Kernel:
    """Returns the kernel of the outputs.

    Args:
      kernel: of the inputs.
      embedding: as `_Embedding.covariance` returns it.
      stds: of queries times keys, of outputs times values, and of biases.
      fixed_gates: what makes gates of the covariance of each sample with itself; None for gates that are random.
      val_pos_emb: whether the values have embeddings too.
      n_chan_out: number of output channels.
    """
    qk_std, ov_std, b_std = stds
    plain = _prepared(kernel)
    joint = plain if embedding is None else _with_embedding(plain, *embedding)
    values = joint if val_pos_emb else plain
    if fixed_gates is not None:
        attended = _attend_with_fixed_gates(joint, values, fixed_gates, qk_std)
    else:
        attended = _attend_with_random_gates(joint, values) * qk_std
    outputs = attended * ov_std
    if b_std is not None:
        outputs = (outputs + b_std).add_to_ntk(b_std**2)
    outputs = outputs.replace(
        is_gaussian=True,
        is_input=False,
        shape1=_resized(plain.shape1, {2: n_chan_out}),
        shape2=_resized(plain.shape2, {2: n_chan_out}),
    )
    return kernel.from_matrices(outputs)


def _with_embedding(kernel: Kernel, share: float, factor: Any, correlation: Array) -> Kernel:
    """Returns the kernel of inputs joined with embeddings, of that of `Kernel.matrices`."""

    def join(k: Array) -> Array:
        added = factor * correlation
        return share * k + added.reshape((1,) * (k.ndim - 2) + added.shape)

    return kernel.map(join).mask(kernel.mask1, kernel.mask2)


def _prepared(kernel: Kernel) -> Kernel:
    """Returns a kernel as matrices, with masks of whole positions, and an array for `ntk` if it was asked for."""
    mask1, mask2 = (
        None if mask is None else _position_mask(mask, kernel.channel_axis) for mask in (kernel.mask1, kernel.mask2)
    )
    return kernel.replace(mask1=mask1, mask2=mask2).matrices().fill_ntk()


def _attend_with_fixed_gates(joint: Kernel, values: Kernel, mechanism: AttentionMechanism, qk_std: Any) -> Kernel:
    """Returns `G1 K G2^T`, with gates that are functions of the covariance of each sample with itself."""

    def gates_of(cov: Array, masked: Array | None) -> Array:
        return _gates(qk_std * cov, None if masked is None else masked[:, None], mechanism)

    def attend(k: Array, first: Array, second: Array) -> Array:
        attended = jnp.matmul(first, k, precision=lax.Precision.HIGHEST)
        return jnp.matmul(attended, jnp.swapaxes(second, -1, -2), precision=lax.Precision.HIGHEST)

    attended = values.map(attend, *joint.per_sample(gates_of))
    return attended.add_to_ntk(2 * attended.nngp)  # of the values' and the output weights


def _attend_with_random_gates(joint: Kernel, values: Kernel) -> Kernel:
    """Returns the kernel for gates that are products of independent Gaussian queries and keys."""

    def inner(a: Array, b: Array) -> Array:
        """Sum over all pairs of positions."""
        return jnp.sum(a * b, axis=(-2, -1), keepdims=True)

    attended = combine(lambda a, b: inner(a, b) * a, [joint, values])
    if joint.ntk is None or values.ntk is None:
        return attended
    through_gates = inner(joint.nngp, values.ntk) + inner(joint.ntk, values.nngp)
    through_inputs = inner(joint.nngp, values.nngp) * joint.ntk
    # Four times the covariance, for the weights of queries, keys, values and outputs.
    return attended.replace(ntk=through_gates * joint.nngp + through_inputs + 4 * attended.nngp)


def _position_mask(mask: Array, channel_axis: int) -> Array:
    """Positions are masked if all their channels are."""
    return jnp.all(mask, axis=channel_axis, keepdims=True)


def _masked_positions(mask: Array, shape: tuple[int, ...], batch_axis: int, channel_axis: int) -> Array:
    """Returns a mask of activations of `shape` as `(n, positions)`."""
    masked = _position_mask(jnp.broadcast_to(mask, shape), channel_axis)
    return to_positions(masked, batch_axis, channel_axis)[..., 0]


def _resized(shape: tuple[int, ...], sizes: dict[int, int]) -> tuple[int, ...]:
    """Returns a shape with other sizes of some axes."""
    resized = list(shape)
    for axis, size in sizes.items():
        resized[axis] = size
    return tuple(resized)


def _member(kind: type[enum.Enum], value: Any, argument: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"GlobalSelfAttention: {argument}={value!r} is unknown, use one of {', '.join(m.name for m in kind)}."
        ) from None
