"""Self-attention: the finite network, and its kernel, against formulas written out position by position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_stax import (
    AttentionMechanism,
    Conv,
    Dense,
    GlobalSelfAttention,
    PositionalEmbedding,
    Relu,
    serial,
    unmask_fn,
)
from stax_samples import normal

pytestmark = [
    pytest.mark.filterwarnings("ignore:GlobalSelfAttention with linear_scaling=True"),
    pytest.mark.unoptimised,
]

MECHANISMS = {
    "SOFTMAX": lambda x: np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True),
    "IDENTITY": lambda x: x,
    "ABS": np.abs,
    "RELU": lambda x: np.maximum(x, 0),
}
STD = {"W_key_std": 1.2, "W_query_std": 0.9, "W_value_std": 1.1, "W_out_std": 1.3}
EMBEDDINGS = {
    "none": {},
    "sum": {"pos_emb_type": "SUM", "W_pos_emb_std": 0.8},
    "sum, decaying": {"pos_emb_type": "SUM", "W_pos_emb_std": 0.8, "pos_emb_decay_fn": lambda d: jnp.exp(-d)},
    "sum, seen by values": {"pos_emb_type": "SUM", "W_pos_emb_std": 0.8, "val_pos_emb": True},
    "concat": {"pos_emb_type": "CONCAT", "n_chan_pos_emb": 2, "W_pos_emb_std": 0.8},
    "concat, all": {
        "pos_emb_type": "CONCAT",
        "W_pos_emb_std": 0.8,
        "val_pos_emb": True,
        "pos_emb_decay_fn": lambda d: jnp.exp(-d / 2),
        "pos_emb_p_norm": 1,
    },
}


def correlation(space, decay_fn=None, p_norm=2):
    """Correlation of the embeddings of all positions, in the order of a flattened image."""
    positions = list(np.ndindex(*space))
    if decay_fn is None:
        return np.eye(len(positions))
    distances = [[sum(abs(a - b) ** p_norm for a, b in zip(p, q, strict=True)) for q in positions] for p in positions]
    return np.asarray(decay_fn(np.array(distances, float)))


def correlation_of(embedding, space):
    return correlation(space, embedding.get("pos_emb_decay_fn"), embedding.get("pos_emb_p_norm", 2))


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("mechanism", "linear_scaling", "embedding"),
    [*((m, True, "none") for m in MECHANISMS), *(("SOFTMAX", False, e) for e in EMBEDDINGS)],
)
def test_finite_network(embedding, mechanism, linear_scaling, dtype):
    """One sample, one head and one position at a time."""
    embedding = EMBEDDINGS[embedding]
    init_fn, apply_fn, kernel_fn = GlobalSelfAttention(
        7, 5, 6, 2, linear_scaling, b_std=0.3, attention_mechanism=mechanism, **STD, **embedding
    )
    assert apply_fn.__name__ == kernel_fn.__name__ == "GlobalSelfAttention"
    space, n_in = (2, 3), 4
    x = normal(1, (2, *space, n_in), dtype)
    shape, params = init_fn(random.key(2), x.shape)
    outputs = jax.jit(lambda p, x: apply_fn(p, x, rng=None, anything=1))(params, x)
    assert shape == outputs.shape == (2, *space, 7)
    assert outputs.dtype == dtype

    W_query, W_key, W_value, W_out, b, pos_emb = (None if p is None else np.asarray(p, float) for p in params)
    assert (W_query is None) == linear_scaling
    x_value = x_key = np.asarray(x, float).reshape(2, 6, n_in)
    if embedding:
        pos_emb = np.linalg.cholesky(correlation_of(embedding, space)) @ pos_emb.reshape(6, -1)
        pos_emb = np.broadcast_to(0.8 * pos_emb, (2, *pos_emb.shape))
        x_key = x_key + pos_emb if embedding["pos_emb_type"] == "SUM" else np.concatenate([x_key, pos_emb], -1)
        x_value = x_key if embedding.get("val_pos_emb") else x_value
    n_key_in, n_value_in = x_key.shape[-1], x_value.shape[-1]
    expected = np.zeros((2, 6, 7))
    for n in range(2):
        heads = np.zeros((6, 6, 2))  # position, channel of the value, head
        for h in range(2):
            keys = x_key[n] @ W_key[h]
            queries = keys if linear_scaling else x_key[n] @ W_query[h]
            logits = 0.9 * 1.2 / (n_key_in * 5 ** (1 if linear_scaling else 0.5)) * queries @ keys.T
            heads[:, :, h] = MECHANISMS[mechanism](logits) @ x_value[n] @ W_value[h]
        expected[n] = 1.1 * 1.3 / np.sqrt(6 * 2 * n_value_in) * heads.reshape(6, 12) @ W_out + 0.3 * b.reshape(7)
    tolerance = {"float64": 1e-9, "float32": 2e-4}[dtype]  # the factor of a correlation is that of a regularised one
    np.testing.assert_allclose(outputs.reshape(2, 6, 7), expected, rtol=tolerance, atol=tolerance)


def test_parameters(x64):
    """Standard normal; queries, keys, values, output, bias, embeddings, each from its own key."""
    embedding = {"pos_emb_type": "CONCAT", "n_chan_pos_emb": 3, "val_pos_emb": True}
    init_fn, _, _ = GlobalSelfAttention(8, 5, 6, 2, linear_scaling=False, b_std=0.1, **embedding)
    shape, params = init_fn(random.key(3), (-1, 4, 5, 7))
    assert shape == (-1, 4, 5, 8)
    shapes = [(2, 10, 5), (2, 10, 5), (2, 10, 6), (12, 8), (1, 1, 1, 8), (1, 4, 5, 3)]
    for param, expected_shape, key in zip(params, shapes, random.split(random.key(3), 6), strict=True):
        np.testing.assert_array_equal(param, random.normal(key, expected_shape))
    _, params = GlobalSelfAttention(8, 5, 6, 2)[0](random.key(3), (-1, -1, -1, 7))
    assert params[0] is None and params[4] is None and params[5] is None


def expected_kernel(kernel, embedding, linear_scaling, mechanism, b_std, n_in):
    """The kernel after attention, pair by pair of samples, from covariances `(n1, n2, positions, positions)`."""
    r = correlation_of(embedding, (2, 3))
    share, embedding_share = 1.0, 0.8**2
    if embedding.get("pos_emb_type") == "CONCAT":
        n_embedding = embedding.get("n_chan_pos_emb", n_in)
        share, embedding_share = n_in / (n_in + n_embedding), 0.8**2 * n_embedding / (n_in + n_embedding)
    qk, ov = 1.2 * 0.9, 1.1 * 1.3
    matrices = {}
    for name in ("nngp", "ntk", "cov1", "cov2"):
        k = np.asarray(getattr(kernel, name)).transpose(0, 1, 2, 4, 3, 5)
        matrices[name] = k.reshape(*k.shape[:2], 6, 6)
    joint = {n: share * k + embedding_share * r if embedding else k for n, k in matrices.items()}
    values = joint if embedding.get("val_pos_emb") else matrices
    outputs = {name: np.zeros_like(k) for name, k in matrices.items()}
    own = {"nngp": ("cov1", "cov2"), "cov1": ("cov1", "cov1"), "cov2": ("cov2", "cov2")}
    for name, (first, second) in own.items():
        for i, j in np.ndindex(matrices[name].shape[:2]):
            k, k_values = joint[name][i, j], values[name][i, j]
            # cov1 and cov2 have no tangent kernel
            t, t_values = (k["ntk"][i, j] if name == "nngp" else 0 for k in (joint, values))
            if linear_scaling:
                gate1 = MECHANISMS[mechanism](qk * joint[first][i, i])
                gate2 = MECHANISMS[mechanism](qk * joint[second][j, j])
                attended = ov**2 * gate1 @ k_values @ gate2.T
                tangent = ov**2 * gate1 @ (t_values + 2 * k_values) @ gate2.T
            else:
                attended = (qk * ov) ** 2 * np.sum(k * k_values) * k
                through = np.sum(k * t_values) + np.sum(t * k_values)
                tangent = (qk * ov) ** 2 * (through * k + np.sum(k * k_values) * t) + 4 * attended
            outputs[name][i, j] = attended + b_std**2
            if name == "nngp":
                outputs["ntk"][i, j] = tangent + b_std**2
    return {name: k.reshape(*k.shape[:2], 2, 3, 2, 3).transpose(0, 1, 2, 4, 3, 5) for name, k in outputs.items()}


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("mechanism", "linear_scaling", "embedding"),
    [*((m, True, "none") for m in MECHANISMS), *(("SOFTMAX", True, e) for e in EMBEDDINGS if e != "none")]
    + [("IDENTITY", False, e) for e in EMBEDDINGS],
)
def test_kernel(embedding, mechanism, linear_scaling, x64):
    embedding = EMBEDDINGS[embedding]
    attention = GlobalSelfAttention(
        7, 5, 6, 2, linear_scaling, b_std=0.3, attention_mechanism=mechanism, **STD, **embedding
    )
    x1, x2 = normal(1, (2, 2, 3, 4)), normal(2, (3, 2, 3, 4))
    before = serial(Dense(5, 1.1, 0.2), Relu())
    kernel_before = before[2](x1, x2, diagonal_batch=False)
    expected = expected_kernel(kernel_before, embedding, linear_scaling, mechanism, 0.3, n_in=5)
    kernels = {
        "full": attention[2](kernel_before),
        "diagonal_batch": serial(before, attention)[2](x1, x2),
    }
    for layout, kernel in kernels.items():
        assert kernel.is_gaussian and not kernel.is_reversed and kernel.shape1 == (2, 2, 3, 7)
        for name, value in expected.items():
            if layout == "diagonal_batch" and name.startswith("cov"):
                value = np.einsum("ii...->i...", value)
            np.testing.assert_allclose(getattr(kernel, name), value, rtol=1e-11, atol=1e-12, err_msg=f"{layout} {name}")


def test_first_layer_has_no_tangent_kernel_yet(x64):
    """On inputs T = 0: the tangent kernel is that of the layer's own weights."""
    x = normal(1, (2, 3, 4))
    _, _, kernel_fn = GlobalSelfAttention(7, 5, 6, 2, b_std=0.3)
    kernel = kernel_fn(x)
    np.testing.assert_allclose(kernel.ntk, 2 * (kernel.nngp - 0.09) + 0.09, rtol=1e-12)
    assert kernel_fn(x, None, ("nngp",))._fields == ("nngp",)
    np.testing.assert_allclose(kernel_fn(x, None, "nngp"), kernel.nngp, rtol=1e-12)


@pytest.mark.parametrize(("batch_axis", "channel_axis", "order"), [(0, 1, (0, 3, 1, 2)), (3, 1, (1, 3, 2, 0))])
@pytest.mark.filterwarnings("ignore:The inputs have batch_axis")
def test_order_of_axes(batch_axis, channel_axis, order, x64):
    kwargs = dict(EMBEDDINGS["concat"], b_std=0.3)
    axes = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    plain, moved = GlobalSelfAttention(7, 5, 6, 2, **kwargs), GlobalSelfAttention(7, 5, 6, 2, **axes, **kwargs)
    x = normal(1, (2, 2, 3, 4))
    shape, params = plain[0](random.key(2), x.shape)
    moved_shape, moved_params = moved[0](random.key(2), x.transpose(order).shape)
    assert moved_shape == tuple(shape[a] for a in order)
    assert [p.shape for p in moved_params[1:4]] == [p.shape for p in params[1:4]]
    moved_params = (*params[:4], *(p.transpose(order) for p in params[4:]))
    expected = plain[1](params, x).transpose(order)
    np.testing.assert_allclose(moved[1](moved_params, x.transpose(order)), expected, rtol=1e-11)
    np.testing.assert_allclose(moved[2](x.transpose(order), None, "ntk"), plain[2](x, None, "ntk"), rtol=1e-11)


def test_reversed_kernel(x64):
    """A convolution stores pairs of axes in the opposite order; attention keeps it."""
    x = normal(1, (2, 2, 3, 4))
    conv = Conv(5, (2, 2), padding="SAME")
    attention = GlobalSelfAttention(7, 5, 6, 2, **EMBEDDINGS["sum, decaying"])
    before = conv[2](x)
    assert before.is_reversed
    after = attention[2](before)
    assert after.is_reversed
    for name in ("nngp", "ntk", "cov1"):
        expected = getattr(attention[2](before.reverse()), name)
        np.testing.assert_allclose(getattr(after.reverse(), name), expected, rtol=1e-12)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("mechanism", "linear_scaling", "embedding"),
    [*((m, True, "none") for m in MECHANISMS), ("IDENTITY", False, "none")]
    + [("SOFTMAX", True, "sum, seen by values"), ("RELU", True, "sum, decaying"), ("IDENTITY", False, "concat")],
)
def test_masked_positions_do_not_exist(embedding, mechanism, linear_scaling, x64):
    """Sequences that end in masked positions give what the shorter sequences give."""
    kwargs = dict(EMBEDDINGS[embedding], attention_mechanism=mechanism, b_std=0.3)
    init_fn, apply_fn, kernel_fn = GlobalSelfAttention(7, 5, 6, 2, linear_scaling, **kwargs)
    x1, x2 = normal(1, (1, 5, 4)), normal(2, (1, 5, 4))
    short1, short2 = x1[:, :2], x2[:, :3]
    x1, x2 = x1.at[:, 2:].set(99.0), x2.at[:, 3:].set(99.0)
    _, params = init_fn(random.key(3), x1.shape)
    short_params = params if params[5] is None else (*params[:5], params[5][:, :2])
    outputs = unmask_fn(apply_fn)(params, x1, mask_constant=99.0)
    np.testing.assert_allclose(outputs[:, :2], apply_fn(short_params, short1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(outputs[:, 2:], 0)

    kernel = kernel_fn(x1, x2, mask_constant=99.0)
    less_padded = kernel_fn(x1[:, :3], short2, mask_constant=99.0)
    expected = {name: getattr(less_padded, name) for name in ("nngp", "ntk")}
    expected.update(cov1=kernel_fn(short1).cov1, cov2=kernel_fn(short2).cov1)
    for name, short in expected.items():
        padded = np.zeros_like(getattr(kernel, name))
        padded[..., : short.shape[-2], : short.shape[-1]] = short
        np.testing.assert_allclose(getattr(kernel, name), padded, rtol=1e-10, atol=1e-13)


@pytest.mark.sample(3)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_fully_masked_sample(mechanism, dtype):
    init_fn, apply_fn, kernel_fn = GlobalSelfAttention(7, 5, 6, 2, b_std=0.3, attention_mechanism=mechanism)
    x = normal(1, (2, 3, 4), dtype).at[1].set(jnp.nan)
    kernel = kernel_fn(x, None, mask_constant=jnp.nan)
    np.testing.assert_array_equal(kernel.nngp[1], 0)
    np.testing.assert_array_equal(kernel.ntk[:, 1], 0)
    assert np.all(np.isfinite(kernel.nngp)) and np.all(np.asarray(kernel.nngp[0, 0]) != 0)
    _, params = init_fn(random.key(2), x.shape)
    outputs = unmask_fn(apply_fn)(params, x, mask_constant=jnp.nan)
    np.testing.assert_array_equal(outputs[1], 0)
    assert np.all(np.isfinite(outputs))


def test_equal_inputs_stay_equal(dtype):
    """The covariance of a sample with itself is the same number wherever it is stored."""
    x = normal(1, (3, 4, 5), dtype)
    attention = GlobalSelfAttention(7, 5, 6, 2)
    kernel = serial(Dense(5), Relu(), attention)[2](x)
    np.testing.assert_array_equal(np.einsum("ii...->i...", kernel.nngp), kernel.cov1)


def test_transforms(x64):
    """jit, and derivatives with respect to inputs and standard deviations, also inside of the decay function."""
    x1, x2 = normal(1, (1, 2, 4)), normal(2, (1, 2, 4))

    def total(x1, std, rate):
        decay_fn = lambda d: jnp.exp(-rate * d)  # noqa: E731
        attention = GlobalSelfAttention(
            7, 5, 6, 2, W_key_std=std, b_std=std, pos_emb_type="SUM", W_pos_emb_std=std, pos_emb_decay_fn=decay_fn
        )
        return jnp.sum(attention[2](x1, x2).ntk ** 2)

    np.testing.assert_allclose(jax.jit(total)(x1, 0.7, 0.4), total(x1, 0.7, 0.4), rtol=1e-12)
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(x1, 0.7, 0.4)
    h = 1e-6
    direction = normal(3, x1.shape)
    differences = (
        (total(x1 + h * direction, 0.7, 0.4) - total(x1 - h * direction, 0.7, 0.4)) / (2 * h),
        (total(x1, 0.7 + h, 0.4) - total(x1, 0.7 - h, 0.4)) / (2 * h),
        (total(x1, 0.7, 0.4 + h) - total(x1, 0.7, 0.4 - h)) / (2 * h),
    )
    found = (jnp.sum(gradients[0] * direction), *gradients[1:])
    np.testing.assert_allclose(found, differences, rtol=1e-6)


def test_slowly_decaying_embeddings(dtype):
    """Correlations that are singular to rounding, up to embeddings that are the same everywhere."""
    for decay_fn in (lambda d: jnp.exp(-d / 1000), lambda d: 1.0):
        init_fn, apply_fn, kernel_fn = GlobalSelfAttention(3, 5, 6, 2, pos_emb_type="SUM", pos_emb_decay_fn=decay_fn)
        x = normal(1, (1, 8, 8, 4), dtype)
        _, params = init_fn(random.key(2), x.shape)
        assert np.all(np.isfinite(jax.jit(apply_fn)(params, x)))
        assert np.all(np.isfinite(kernel_fn(x, None, "nngp")))


class TestErrors:
    def test_names(self):
        for member in AttentionMechanism:
            assert member.value == member.name
            GlobalSelfAttention(3, 4, 5, 2, attention_mechanism=member)
        assert {m.name: m.value for m in PositionalEmbedding} == {"NONE": "NONE", "SUM": "SUM", "CONCAT": "CONCAT"}
        with pytest.raises(ValueError, match=r"attention_mechanism='softmax'.*SOFTMAX, IDENTITY, ABS, RELU"):
            GlobalSelfAttention(3, 4, 5, 2, attention_mechanism="softmax")
        with pytest.raises(ValueError, match=r"pos_emb_type='ADD'.*NONE, SUM, CONCAT"):
            GlobalSelfAttention(3, 4, 5, 2, pos_emb_type="ADD")

    def test_mechanisms(self):
        x = np.array([[-1.0, 0.5, 2.0], [0.0, 0.0, 0.0]])
        for name, fn in MECHANISMS.items():
            np.testing.assert_allclose(AttentionMechanism(name).fn()(x), fn(x), rtol=1e-6)

    def test_keys_as_queries_are_announced(self):
        with pytest.warns(UserWarning, match="keys as queries") as record:
            GlobalSelfAttention(3, 4, 5, 2)
        assert record[0].filename == __file__

    def test_limit_is_unknown(self):
        _, _, kernel_fn = GlobalSelfAttention(3, 4, 5, 2, linear_scaling=False)
        with pytest.raises(NotImplementedError, match=r"IDENTITY.*SOFTMAX.*linear_scaling=True"):
            kernel_fn(jnp.ones((2, 3, 4)))

    def test_needs_all_pairs_of_positions(self):
        _, _, kernel_fn = GlobalSelfAttention(3, 4, 5, 2)
        with pytest.raises(ValueError, match="diagonal_spatial"):
            kernel_fn(jnp.ones((2, 3, 4)), diagonal_spatial=True)
        with pytest.raises(ValueError, match="sufficient information"):
            kernel_fn(Dense(3)[2](jnp.ones((2, 3, 4)), diagonal_spatial=True))

    def test_sizes(self):
        x = jnp.ones((2, 3, 4))
        added = GlobalSelfAttention(3, 4, 5, 2, pos_emb_type="SUM", n_chan_pos_emb=7)
        with pytest.raises(ValueError, match=r"n_chan_pos_emb=7.*4.*CONCAT"):
            added[0](random.key(0), x.shape)
        with pytest.raises(ValueError, match=r"n_chan_pos_emb=7.*4.*CONCAT"):
            added[2](x)
        for shape in ((-1, -1, 4), (-1, 3, -1)):
            with pytest.raises(ValueError, match=r"-1 stands for an unknown size"):
                GlobalSelfAttention(3, 4, 5, 2, pos_emb_type="CONCAT")[0](random.key(0), shape)

    def test_no_correlation(self):
        """Negative eigenvalues are refused, by the finite network and by the kernel, also under jit."""
        decay_fn = lambda d: jnp.where(d == 1, 0.9, jnp.where(d == 0, 1.0, 0.0))  # noqa: E731
        attention = GlobalSelfAttention(3, 4, 5, 2, pos_emb_type="SUM", pos_emb_decay_fn=decay_fn)
        x = jnp.ones((2, 6, 4))
        _, params = attention[0](random.key(0), x.shape)
        for fn in (lambda: attention[1](params, x), lambda: attention[2](x), lambda: jax.jit(attention[1])(params, x)):
            with pytest.raises(ValueError, match=r"negative eigenvalues.*exp"):
                fn()


@pytest.mark.parametrize("space", [(), (3,), (2, 1, 3)])
def test_any_number_of_spatial_axes(space, x64):
    """Positions are positions: only their number matters, without embeddings."""
    n = int(np.prod(space, dtype=int))
    x = normal(1, (2, n, 4))
    layer = GlobalSelfAttention(7, 5, 6, 2)
    _, params = layer[0](random.key(2), x.shape)
    np.testing.assert_allclose(
        layer[1](params, x.reshape(2, *space, 4)).reshape(2, n, 7), layer[1](params, x), rtol=1e-11
    )
    flat, shaped = layer[2](x, None, "ntk"), layer[2](x.reshape(2, *space, 4), None, "ntk")
    order = [2 + 2 * i + half for half in (0, 1) for i in range(len(space))]
    np.testing.assert_allclose(np.transpose(shaped, [0, 1, *order]).reshape(flat.shape), flat, rtol=1e-11)
    assert list(itertools.chain(shaped.shape[2::2])) == list(space)
