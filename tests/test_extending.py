"""docs/extending.md, done: what it adds from outside gives the right kernels."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import nt_core
import numpy as np
import pytest
from neural_tangents import stax
from nt_core import backends

pytestmark = pytest.mark.unoptimised

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """Everything that the blocks of the page define, run in order."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))  # the page registers a backend
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
        yield names


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def covariance(x1, x2):
    """The mean over the channels, for all pairs of samples and of positions: `(n1, n2, P, P)`."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1]) for x in (x1, x2))
    return np.einsum("npc,mqc->nmpq", a, b) / a.shape[-1]


def test_an_activation(page):
    """The kernel of `a x^2` in terms of covariances, its tangent kernel by the product rule."""
    x1, x2 = inputs(3, 4), inputs(2, 4)
    K, q1, q2 = (1.5**2 * covariance(a, b)[..., 0, 0] for a, b in ((x1, x2), (x1, x1), (x2, x2)))
    q1, q2 = np.diag(q1)[:, None], np.diag(q2)
    nngp = 0.25 * (q1 * q2 + 2 * K**2)
    kernel = page["square_kernel_fn"](x1, x2, ("nngp", "ntk"))
    np.testing.assert_allclose(kernel.nngp, nngp, rtol=1e-5)
    np.testing.assert_allclose(kernel.ntk, nngp + K * 0.25 * 4 * K, rtol=1e-5)  # the first layer: T = K
    same = page["square_kernel_fn"](x1, x1, "nngp")
    np.testing.assert_allclose(np.diag(same), 0.25 * 3 * np.squeeze(q1, 1) ** 2, rtol=1e-6)
    assert page["apply_fn"](page["init_fn"](jax.random.key(0), (3, 4))[1], x1).shape == (3, 1)


def test_a_layer_that_emits_steps(page):
    """With a dilation of 2, a convolution acts on each of the four subgrids by itself."""
    x = inputs(2, 6, 6, 2)
    kernel = page["conv_kernel_fn"](x, None, ("nngp", "ntk"))
    _, _, plain_kernel_fn = stax.Conv(4, (3, 3), padding="SAME")
    for i, j in itertools.product(range(2), repeat=2):
        part = plain_kernel_fn(x[:, i::2, j::2], None, ("nngp", "ntk"))
        for name in ("nngp", "ntk"):
            of_grid = getattr(kernel, name)[:, :, j::2, j::2, i::2, i::2]  # a convolution reverses the axes
            np.testing.assert_allclose(of_grid, getattr(part, name), rtol=1e-5, atol=1e-6)
    # Outputs are linear in the parameters: the tangent kernel of a finite layer is that of the infinite one.
    shape, params = page["conv_init_fn"](jax.random.key(0), x.shape)
    assert shape == (2, 6, 6, 4)
    jacobian = jax.jacobian(page["conv_apply_fn"])(params, x)[..., 0, :, :, :, :].reshape(2, 36, -1)
    ntk = np.einsum("npk,mqk->nmpq", jacobian, jacobian).reshape(2, 2, 6, 6, 6, 6)
    np.testing.assert_allclose(ntk, np.transpose(kernel.ntk, (0, 1, 4, 2, 5, 3)), rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_a_function_of_kernels(page):
    x1, x2 = inputs(3, 2, 3, 4), inputs(2, 2, 3, 4)
    y1, y2 = (page["mix_apply_fn"]((), x) for x in (x1, x2))
    np.testing.assert_allclose(y1.reshape(3, 6, 4), page["matrix"] @ x1.reshape(3, 6, 4), rtol=1e-5)
    kernel = page["mix_kernel_fn"](x1, x2)
    for k, expected in ((kernel.nngp, covariance(y1, y2)), (kernel.cov1, covariance(y1, y1)[range(3), range(3)])):
        matrices = np.moveaxis(k, (-4, -2), (-4, -3)).reshape(*k.shape[:-4], 6, 6)
        np.testing.assert_allclose(matrices, expected, rtol=1e-4, atol=1e-5)
    # In a network: the tangent kernel of a linear layer is mixed as its covariance is.
    _, _, kernel_fn = stax.serial(stax.Dense(8), page["MixPositions"](page["matrix"]), stax.Flatten())
    flat = kernel_fn(x1, x2, ("nngp", "ntk"))
    expected = np.einsum("nmpp->nm", covariance(y1, y2)) / 6
    np.testing.assert_allclose(flat.nngp, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat.ntk, flat.nngp, rtol=1e-6)


def test_a_step(page):
    """On inputs, the kernel of a pool is the covariance of pooled inputs; in a network it is pooled like them."""
    x = inputs(2, 5, 4, 3)
    y = page["pool_apply_fn"]((), x)
    assert y.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(y[:, 0, 0], (x[:, 0, 0] + x[:, 2, 0] + x[:, 0, 1] + x[:, 2, 1]) / 4, rtol=1e-5)
    kernel = page["pool_kernel_fn"](x)
    expected = covariance(y, y).reshape(2, 2, 3, 3, 3, 3)
    np.testing.assert_allclose(kernel.nngp, np.transpose(expected, (0, 1, 2, 4, 3, 5)), rtol=1e-4, atol=1e-5)
    # Before a nonlinearity the variances after the pool count, too.
    layers = stax.Dense(8), page["DilatedPool"]((2, 2), (2, 1)), stax.Relu(), stax.GlobalAvgPool()
    kernel_fn = stax.serial(*layers)[2]
    assert "program 1, on cpu" in nt_core.explain(kernel_fn, x.shape)
    nngp = kernel_fn(x, None, "nngp")
    k = covariance(y, y)
    q = np.einsum("nnpp->np", k)
    scale = np.sqrt(q[:, None, :, None] * q[:, None])
    angle = np.arccos(np.clip(k / scale, -1, 1))
    relu = scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    np.testing.assert_allclose(nngp, relu.mean((2, 3)), rtol=1e-4)


def test_a_backend(page):
    assert str(page["comparison"]) == "fully_connected and xla: no difference above 1e-05 in 6 values"
    kernel_fn, x = page["network_kernel_fn"], page["x"]
    explained = nt_core.explain(kernel_fn, (3, 5))
    assert "program 1, on fully_connected" in explained
    np.testing.assert_allclose(kernel_fn(x, None, "ntk"), kernel_fn(x, None, "ntk", implementation="xla"), rtol=1e-5)
    with pytest.raises(NotImplementedError, match="there are positions"):
        page["conv_kernel_fn"](inputs(2, 6, 6, 2), implementation="fully_connected")
