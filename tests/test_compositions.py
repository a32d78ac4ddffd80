"""Random networks of all layers: applied part by part they are what they are in one piece."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from neural_tangents import stax

pytestmark = [
    pytest.mark.unoptimised,
    pytest.mark.usefixtures("x64"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # layers that state their assumptions
]
# To find a smaller network that fails would compile for many minutes.
few = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


def conv(window=(2, 2), strides=(1, 1), padding="SAME", **kwargs):
    return stax.Conv(4, window, strides, padding, 1.2, 0.3, **kwargs)


def residual():
    return stax.serial(
        stax.FanOut(2), stax.parallel(stax.Identity(), stax.serial(conv(), stax.Relu(), conv())), stax.FanInSum()
    )


def channels():
    return stax.serial(
        stax.FanOut(2),
        stax.parallel(stax.serial(conv(), stax.Relu()), stax.serial(stax.Dense(4), stax.Erf())),
        stax.FanInConcat(-1),
    )


def attention():
    return stax.GlobalSelfAttention(4, 4, 4, 1, W_value_std=1.1, b_std=0.2)


# Each takes images of at least 2 x 2 pixels to such images.
BLOCKS = {
    "conv": lambda: [conv(), stax.Relu()],
    "strides": lambda: [conv((3, 2), (1, 2), "SAME"), stax.Erf(), stax.ImageResize((-1, 4, 3, -1), "linear")],
    "circular": lambda: [conv(padding="CIRCULAR"), stax.Gelu()],
    "standard": lambda: [conv(parameterization="standard"), stax.LeakyRelu(0.1)],
    "dilated": lambda: [conv(rhs_dilation=(2, 1)), stax.Abs()],
    "transposed": lambda: [stax.ConvTranspose(4, (2, 2), (2, 1), "SAME", 1.2, 0.3), stax.Sin()],
    "local": lambda: [stax.ConvLocal(4, (2, 2), padding="SAME", W_std=1.2), stax.Gaussian()],
    "pool": lambda: [conv(), stax.Relu(), stax.AvgPool((2, 2), (1, 1), "SAME", normalize_edges=True)],
    "sums": lambda: [conv(), stax.Polynomial([0.2, 1.0, 0.1]), stax.SumPool((2, 1), (1, 1), "CIRCULAR")],
    "normalized": lambda: [conv(), stax.LayerNorm((1, 2, -1)), stax.Relu()],
    "resized": lambda: [stax.Dense(4), stax.ImageResize((-1, 3, 4, -1), "linear")],
    "indexed": lambda: [conv(), stax.Relu(), stax.Index(stax.Slice[:, ::-1, :2])],
    "graph": lambda: [stax.Dense(4), stax.Aggregate((1, 2)), stax.Sigmoid_like()],
    "product": lambda: [stax.Dense(4), stax.DotGeneral(lhs=0.7), stax.Monomial(1)],
    "residual": lambda: [conv(), residual()],
    "channels": lambda: [channels()],
    "attention": lambda: [stax.Dense(4), attention()],
    "repeated": lambda: [conv(), stax.repeat(stax.serial(stax.Relu(), conv()), 3)],
    "dropout": lambda: [conv(), stax.Dropout(0.8, mode="test"), stax.Rbf()],
}
READOUTS = {
    "average": lambda: [stax.GlobalAvgPool(), stax.Dense(1, 1.1, 0.2)],
    "sum": lambda: [stax.GlobalSumPool()],
    "flatten": lambda: [stax.Flatten(), stax.Dense(4, 1.1), stax.Relu(), stax.Dense(1)],
    "images": lambda: [],
}

networks = st.tuples(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=2, max_size=3), st.sampled_from(sorted(READOUTS))
)


def layers_of(network):
    blocks, readout = network
    return [layer for block in blocks for layer in BLOCKS[block]()] + READOUTS[readout]()


def inputs(seed, n):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 4, 3, 2)))


def assert_same(kernel, expected):
    """Kernels in any order of the spatial axes."""
    if kernel.is_reversed != expected.is_reversed:
        kernel = kernel.reverse()
    for name in ("nngp", "ntk", "cov1", "cov2"):
        value, wanted = getattr(kernel, name), getattr(expected, name)
        assert (value is None) == (wanted is None), name
        if wanted is not None:
            np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max(), err_msg=name)


def check_part_by_part(network, data):
    layers = layers_of(network)
    where = data.draw(st.integers(1, len(layers) - 1), "where it is cut")
    diagonal_batch, same = data.draw(st.booleans(), "diagonal_batch"), data.draw(st.booleans(), "one batch")
    x1, x2 = inputs(1, 3), None if same else inputs(2, 2)
    layout = {"diagonal_batch": diagonal_batch, "diagonal_spatial": False}
    whole, first, second = (stax.serial(*part)[2] for part in (layers, layers[:where], layers[where:]))
    expected = whole(x1, x2, **layout)
    assert_same(second(first(x1, x2, **layout)), expected)
    pair = whole(x1, x2, ("ntk", "nngp"), **layout)
    np.testing.assert_allclose(pair.ntk, expected.ntk, rtol=0, atol=1e-10 * np.abs(expected.ntk).max())
    np.testing.assert_allclose(pair.nngp, expected.nngp, rtol=0, atol=1e-10 * np.abs(expected.nngp).max())


@given(networks, st.data())
@settings(few, max_examples=5)
def test_part_by_part(network, data):
    check_part_by_part(network, data)


@pytest.mark.slow
@given(networks, st.data())
@settings(few, max_examples=60)
def test_part_by_part_of_many_networks(network, data):
    check_part_by_part(network, data)


@given(networks)
@settings(few, max_examples=6)
def test_samples_and_batches_are_independent(network):
    """The kernel of a part of the samples is that part of the kernel, in either order of the batches."""
    x1, x2 = inputs(1, 3), inputs(2, 2)
    kernel_fn = stax.serial(*layers_of(network), stax.GlobalAvgPool() if network[1] == "images" else stax.Identity())[2]
    whole, swapped = kernel_fn(x1, x2, ("nngp", "ntk")), kernel_fn(x2, x1, ("nngp", "ntk"))
    part = kernel_fn(x1[1:], x2[:1], ("nngp", "ntk"))
    for name in ("nngp", "ntk"):
        value = getattr(whole, name)
        tolerance = 1e-9 * np.abs(value).max()
        np.testing.assert_allclose(getattr(swapped, name).T, value, rtol=0, atol=tolerance)
        np.testing.assert_allclose(getattr(part, name), value[1:, :1], rtol=0, atol=tolerance)
