"""The README runs as it stands; and so do the examples of the archived library's README."""

import pathlib
import re

import jax
import neural_tangents as nt
import numpy as np
import pytest
from jax import random
from neural_tangents import stax

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore:FanInSum")
def test_readme_runs_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["ntk"].shape == (4, 4)
    assert names["mean"].shape == (5, 1)


def test_fully_connected_kernels():
    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.Dense(512), stax.Relu(), stax.Dense(512), stax.Relu(), stax.Dense(1)
    )
    key1, key2 = random.split(random.key(1))
    x1, x2 = random.normal(key1, (10, 100)), random.normal(key2, (20, 100))
    kernel = kernel_fn(x1, x2, "nngp")
    assert kernel.shape == (10, 20)
    both = kernel_fn(x1, x2, ("nngp", "ntk"))
    np.testing.assert_array_equal(both.nngp, kernel)
    assert type(both).__name__ == "AnalyticKernel"
    _, params = init_fn(random.key(0), (-1, 100))
    assert apply_fn(params, x1).shape == (10, 1)


def test_kernels_compose_from_kernels():
    _, _, first = stax.serial(stax.Dense(512), stax.Relu())
    _, _, second = stax.serial(stax.Dense(512), stax.Relu(), stax.Dense(1))
    _, _, whole = stax.serial(stax.Dense(512), stax.Relu(), stax.Dense(512), stax.Relu(), stax.Dense(1))
    x1, x2 = random.normal(random.key(1), (4, 10)), random.normal(random.key(2), (3, 10))
    kernel = second(first(x1, x2))
    expected = whole(x1, x2)
    for name in ("nngp", "ntk", "cov1", "cov2"):
        np.testing.assert_allclose(getattr(kernel, name), getattr(expected, name), rtol=1e-5)


def test_ensemble_of_trained_networks():
    _, _, kernel_fn = stax.serial(stax.Dense(512), stax.Relu(), stax.Dense(1))
    key1, key2, key3 = random.split(random.key(1), 3)
    x_train, x_test, y_train = random.normal(key1, (20, 10)), random.normal(key2, (5, 10)), random.normal(key3, (20, 1))
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
    ntk_mean = predict_fn(x_test=x_test, get="ntk")
    assert ntk_mean.shape == (5, 1)
    posterior = predict_fn(x_test=x_test, get="nngp", compute_cov=True)
    assert posterior.covariance.shape == (5, 5)
    both = predict_fn(x_test=x_test, get=("nngp", "ntk"))
    np.testing.assert_allclose(both.ntk, ntk_mean)


def WideResnetBlock(channels, strides=(1, 1), channel_mismatch=False):
    main = stax.serial(
        stax.Relu(),
        stax.Conv(channels, (3, 3), strides, padding="SAME"),
        stax.Relu(),
        stax.Conv(channels, (3, 3), padding="SAME"),
    )
    shortcut = stax.Identity() if not channel_mismatch else stax.Conv(channels, (3, 3), strides, padding="SAME")
    return stax.serial(stax.FanOut(2), stax.parallel(main, shortcut), stax.FanInSum())


def WideResnetGroup(n, channels, strides=(1, 1)):
    blocks = [WideResnetBlock(channels, strides, channel_mismatch=True)]
    blocks += [WideResnetBlock(channels, (1, 1)) for _ in range(n - 1)]
    return stax.serial(*blocks)


def WideResnet(block_size, k, num_classes):
    return stax.serial(
        stax.Conv(16, (3, 3), padding="SAME"),
        WideResnetGroup(block_size, int(16 * k)),
        WideResnetGroup(block_size, int(32 * k), (2, 2)),
        WideResnetGroup(block_size, int(64 * k), (2, 2)),
        stax.AvgPool((8, 8)),
        stax.Flatten(),
        stax.Dense(num_classes, 1.0, 0.0),
    )


@pytest.mark.filterwarnings("ignore:FanInSum")
def test_wide_resnet():
    init_fn, apply_fn, kernel_fn = WideResnet(block_size=1, k=1, num_classes=10)
    x = random.normal(random.key(0), (2, 32, 32, 3))
    shape, params = init_fn(random.key(1), x.shape)
    assert shape == apply_fn(params, x).shape == (2, 10)
    ntk = jax.jit(kernel_fn, static_argnames="get")(x, None, get="ntk")
    assert ntk.shape == (2, 2)
    assert np.linalg.eigvalsh(ntk).min() > 0
