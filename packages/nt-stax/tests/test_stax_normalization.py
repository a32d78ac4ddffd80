"""LayerNorm and RMSNorm: the finite functions, and covariances divided by standard deviations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_stax import Dense, LayerNorm, Relu, RMSNorm, serial, unmask_fn
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

# Inputs have 2 or 3 samples, height 3, width 2 and 4 channels, in these orders. H comes before W in all of them.
ORDERS = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 3, 1, 2), "HNCW": (1, 0, 3, 2), "CHWN": (3, 1, 2, 0)}
CASES = [
    ("NHWC", "C"), ("NHWC", "HC"), ("NHWC", "CHW"), ("NHWC", "NC"),
    ("NCHW", "WC"), ("HNCW", "NCHW"), ("CHWN", "HC"), ("CHWN", "NCW"),
]  # fmt: skip


def axes_of(order, names, negative=()):
    """Returns the numbers of axes; those named in `negative` count from the end."""
    return tuple(order.index(n) - (len(order) if n in negative else 0) for n in names)


def normalized(layer, x, axes, eps, valid):
    """`(x - mean) / sqrt(eps + var)`, or `x / sqrt(eps + mean square)`, entry by entry in plain loops.

    `valid` marks the entries that count.
    """
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        group = tuple(slice(None) if a in axes else i for a, i in enumerate(index))
        values = x[group][valid[group]]
        if valid[index]:
            mean = values.mean() if layer is LayerNorm else 0
            out[index] = (x[index] - mean) / np.sqrt(eps + np.mean((values - mean) ** 2))
    return out


@pytest.mark.parametrize(("order", "names"), CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", [LayerNorm, RMSNorm])
def test_finite_function(layer, order, names, masked, dtype):
    x = np.asarray(normal(1, (2, 3, 2, 4), dtype)).transpose(ORDERS[order])
    valid = np.ones(x.shape, bool)
    if masked:
        valid = np.asarray(random.bernoulli(random.key(2), 0.7, x.shape))
    axes = axes_of(order, names)
    kwargs = {"batch_axis": order.index("N"), "channel_axis": order.index("C")}
    init_fn, apply_fn, kernel_fn = layer(axes, eps=0.1, **kwargs)
    assert apply_fn.__name__ == kernel_fn.__name__ == layer.__name__
    assert init_fn(random.key(0), (-1, 3, -1, 4)) == ((-1, 3, -1, 4), ())
    inputs = np.where(valid, x, 100).astype(dtype)
    outputs = jax.jit(lambda x: unmask_fn(apply_fn)((), x, mask_constant=100.0 if masked else None, rng=None))(inputs)
    assert outputs.dtype == dtype
    np.testing.assert_allclose(outputs, normalized(layer, x, axes, 0.1, valid), rtol=1e-5, atol=1e-5)


def test_an_axis_named_twice_counts_once(x64):
    for layers in ((Dense(4),), (Dense(4), Relu(), Dense(3))):
        twice, once = (serial(*layers, LayerNorm(axis, eps=0.1)) for axis in ((1, -1), -1))
        x = normal(1, (2, 3))
        np.testing.assert_array_equal(twice[2](x, None, "ntk"), once[2](x, None, "ntk"))
        params = twice[0](random.key(0), (-1, 3))[1]
        np.testing.assert_array_equal(twice[1](params, x), once[1](params, x))


def expected_kernel(k, q1, q2, names, eps, valid1, valid2):
    """Divides `k[i, j, h, w, h', w']` by standard deviations, from the full covariances `q` of each batch."""

    def variance(q, valid):
        v = np.zeros(valid.shape)
        for index in np.ndindex(*valid.shape):
            group = tuple(range(n) if a in names else [i] for a, n, i in zip("NHW", valid.shape, index, strict=True))
            values = [q[p[0], p[0], p[1], p[2], p[1], p[2]] for p in itertools.product(*group) if valid[p]]
            v[index] = eps + (np.mean(values) if values else 0)
        return v

    v1, v2 = variance(q1, valid1), variance(q2, valid2)
    return k / np.sqrt(v1[:, None, :, :, None, None] * v2[None, :, None, None, :, :])


@pytest.mark.parametrize(("order", "names"), CASES)
@pytest.mark.parametrize(("diagonal_batch", "diagonal_spatial"), [(True, True), (True, False), (False, False)])
@pytest.mark.filterwarnings("ignore:The inputs have batch_axis")
def test_kernel(order, names, diagonal_batch, diagonal_spatial, x64):
    axes = {"batch_axis": order.index("N"), "channel_axis": order.index("C")}
    x1, x2 = (normal(n, (n, 3, 2, 4)).transpose(ORDERS[order]) for n in (2, 3))
    dense = Dense(5, 1.3, 0.2, **axes)
    layer = serial(dense, LayerNorm(axes_of(order, names), eps=0.1, **axes))
    kernel = layer[2](x1, x2, diagonal_batch=diagonal_batch, diagonal_spatial=diagonal_spatial)
    before = dense[2](x1, x2, diagonal_batch=False)
    assert kernel.is_gaussian
    check_kernel(kernel, before, names, np.ones((2, 3, 2), bool), np.ones((3, 3, 2), bool))


def check_kernel(kernel, before, names, valid1, valid2):
    unzipped = {f: np.transpose(getattr(before, f), (0, 1, 2, 4, 3, 5)) for f in ("nngp", "ntk", "cov1", "cov2")}
    valid = {"nngp": (valid1, valid2), "ntk": (valid1, valid2), "cov1": (valid1, valid1), "cov2": (valid2, valid2)}
    own = {"nngp": ("cov1", "cov2"), "ntk": ("cov1", "cov2"), "cov1": ("cov1", "cov1"), "cov2": ("cov2", "cov2")}
    for field, value in unzipped.items():
        q1, q2 = (unzipped[name] for name in own[field])
        expected = expected_kernel(value, q1, q2, names, 0.1, *valid[field])
        letters = "ijhwHW->ij"
        if kernel.diagonal_batch and field.startswith("cov"):
            letters = letters.replace("j", "i").replace("->ii", "->i")
        letters = letters.replace("H", "h").replace("W", "w") + "hw" if kernel.diagonal_spatial else letters + "hHwW"
        actual = getattr(kernel.reverse() if kernel.is_reversed else kernel, field)
        np.testing.assert_allclose(actual, np.einsum(letters, expected), rtol=1e-11, atol=1e-13, err_msg=field)


@pytest.mark.parametrize("names", ["C", "HC", "NCW"])
def test_root_mean_squares_of_what_is_not_gaussian(names, x64):
    """Inputs, and what a nonlinearity leaves, of which the mean is not zero."""
    x1, x2 = (normal(n, (n, 3, 2, 4)) for n in (2, 3))
    valid = (np.ones((n, 3, 2), bool) for n in (2, 3))
    before = serial(Dense(5, 1.3, 0.2), Relu())
    norm = RMSNorm(axes_of("NHWC", names), eps=0.1)
    check_kernel(serial(before, norm)[2](x1, x2), before[2](x1, x2, diagonal_batch=False), names, *valid)
    kernel, inputs = norm[2](x1, None, ("nngp", "cov1")), np.asarray(norm[1]((), x1))
    np.testing.assert_allclose(kernel.nngp, np.einsum("ihwc,jHWc->ijhHwW", inputs, inputs) / 4, rtol=1e-12)
    with pytest.raises(NotImplementedError, match="take RMSNorm"):
        serial(before, LayerNorm(axes_of("NHWC", names)))[2](x1, x2)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("order", "names"), CASES)
@pytest.mark.filterwarnings("ignore:The inputs have batch_axis")
def test_kernel_with_masks(order, names, x64):
    """Masked positions count neither for the variance of a sample nor of a batch."""
    axes = {"batch_axis": order.index("N"), "channel_axis": order.index("C")}
    x1, x2 = (normal(n, (n, 3, 2, 4)) for n in (2, 3))
    valid1, valid2 = (np.array(random.bernoulli(random.key(10 + n), 0.6, (n, 3, 2))) for n in (2, 3))
    valid2[1] = False  # a sample of which nothing is left
    x1, x2 = (jnp.where(v[..., None], x, jnp.nan).transpose(ORDERS[order]) for x, v in ((x1, valid1), (x2, valid2)))
    dense = Dense(5, 1.3, 0.2, **axes)
    layer = serial(dense, LayerNorm(axes_of(order, names), eps=0.1, **axes))
    before = dense[2](x1, x2, mask_constant=jnp.nan, diagonal_batch=False)
    for diagonal_batch, diagonal_spatial in ((True, True), (False, False)):
        kernel = layer[2](
            x1, x2, mask_constant=jnp.nan, diagonal_batch=diagonal_batch, diagonal_spatial=diagonal_spatial
        )
        check_kernel(kernel, before, names, valid1, valid2)


def test_negative_axes(x64):
    """Any way to write an axis means the same."""
    x1, x2 = normal(1, (2, 3, 2, 4)), normal(2, (3, 3, 2, 4))
    for names in ("C", "HC", "CHW", "NC", "NCHW"):
        plain, negative = (
            serial(Dense(5), LayerNorm(axes_of("NHWC", names, which), channel_axis=-1 if which else 3))
            for which in ("", "NHWC")
        )
        for get in ("nngp", "ntk"):
            np.testing.assert_allclose(plain[2](x1, x2, get), negative[2](x1, x2, get), rtol=1e-12)
        np.testing.assert_array_equal(
            LayerNorm(axes_of("NHWC", names))[1]((), x1), LayerNorm(axes_of("NHWC", names, "NHWC"))[1]((), x1)
        )


def test_unit_variance(dtype):
    """After normalisation over the channels every variance is 1, and the covariance is a correlation."""
    x = normal(1, (4, 3), dtype)
    kernel = serial(Dense(5, 1.3, 0.2), LayerNorm())[2](x, None)
    np.testing.assert_allclose(kernel.cov1, np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(jnp.diag(kernel.nngp), np.ones(4), rtol=1e-6)
    k = 1.69 * x @ x.T / 3 + 0.04
    scale = 1 / jnp.sqrt(jnp.diag(k))
    np.testing.assert_allclose(kernel.nngp, k * jnp.outer(scale, scale), rtol=1e-5, atol=1e-6)


def test_zero_inputs_are_no_nan(dtype):
    x = jnp.zeros((2, 3), dtype)
    for layer in (LayerNorm(), LayerNorm((0, 1))):
        _, _, kernel_fn = serial(Dense(5), layer, Relu(), Dense(1))
        for get in ("nngp", "ntk"):
            np.testing.assert_array_equal(kernel_fn(x, None, get), np.zeros((2, 2)))
            assert np.all(np.isfinite(jax.grad(lambda x, get=get, k=kernel_fn: jnp.sum(k(x, x, get)))(x)))
        np.testing.assert_array_equal(layer[1]((), x), x)


def test_errors():
    x = jnp.ones((2, 3, 4))
    for bad, message in (((1,), "does not include the channel axis"), ((3, 2), "must name axes")):
        layer = LayerNorm(bad)
        with pytest.raises(ValueError, match=message):
            layer[0](random.key(0), x.shape)
        with pytest.raises(ValueError, match=message):
            layer[1]((), x)
        with pytest.raises(ValueError, match=message):
            serial(Dense(3), layer)[2](x)
    for axis in (-1, (0, 2)):
        with pytest.raises(NotImplementedError, match="Dense or Conv"):
            serial(Dense(3), Relu(), LayerNorm(axis))[2](x)
