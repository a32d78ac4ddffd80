"""What a call of `kernel_fn` costs beside its arithmetic: compilations, and work on the host."""

import warnings

import jax
import numpy as np
import pytest
from nt_core import backends, explain, program
from nt_core.backends.cpu import CpuBackend
from nt_stax import (
    Conv,
    Dense,
    Dropout,
    Elementwise,
    ElementwiseNumerical,
    Erf,
    FanInConcat,
    FanInSum,
    FanOut,
    Flatten,
    GlobalAvgPool,
    GlobalSelfAttention,
    HardSilu,
    Identity,
    LayerNorm,
    Relu,
    Silu,
    Sin,
    parallel,
    serial,
)

pytestmark = pytest.mark.unoptimised

COMPILED = []
X1, X2 = np.ones((2, 4, 4, 3), np.float32), np.full((3, 4, 4, 3), 2, np.float32)


def _record(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(kwargs)


jax.monitoring.register_event_duration_secs_listener(_record)


def square(x):
    return x**2


def square_nngp(cov12, var1, var2):
    return var1 * var2 + 2 * cov12**2


def square_d_nngp(cov12, var1, var2):
    return 4 * cov12


def fcn(W_std):
    return serial(Flatten(), Dense(4, W_std, 0.1), Relu(), Dense(1))


def resnet(W_std):
    block = serial(FanOut(2), parallel(serial(Relu(), Conv(4, (3, 3), padding="SAME")), Identity()), FanInSum())
    readout = serial(LayerNorm(), Erf(), GlobalAvgPool(), Dense(1, W_std))
    return serial(Conv(4, (3, 3), padding="SAME"), block, readout)


def of_functions(W_std):
    given = Elementwise(square, square_nngp, square_d_nngp)
    with warnings.catch_warnings(action="ignore"):  # the derivative is found by differentiation
        numerical = ElementwiseNumerical(square, 3)
    return serial(Conv(4, (3, 3), W_std=W_std), given, Flatten(), Dense(4), numerical, Dense(1))


def dropout(W_std):
    return serial(Conv(4, (3, 3), W_std=W_std), Dropout(0.5), Flatten(), Dense(1))


@pytest.mark.parametrize("network", [fcn, resnet, of_functions, dropout])
@pytest.mark.parametrize("x2", [X2, None])
def test_networks_of_steps_are_compiled_once(network, x2):
    """One program, also for an equal network that is built anew, and for other values of its parameters."""
    jax.clear_caches()
    COMPILED.clear()
    first = network(1.5)[2](X1, x2, "ntk")
    # A function of the user is evaluated at a few points beside, once: it may have a kink.
    assert len(COMPILED) == 1 or network is of_functions
    COMPILED.clear()
    again, other = network(1.5)[2](X1, x2, "ntk"), network(2.5)[2](X1, x2, "ntk")
    assert not COMPILED
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def attention(W_std):
    heads = GlobalSelfAttention(4, 4, 4, 2, linear_scaling=False, attention_mechanism="IDENTITY", W_key_std=W_std)
    return serial(Conv(4, (3, 3)), heads, Flatten(), Dense(1))


def concatenation(W_std):
    branches = parallel(Conv(4, (3, 3), W_std=W_std), Conv(4, (3, 3)))
    return serial(FanOut(2), branches, FanInConcat(1), Flatten(), Dense(1))


@pytest.mark.parametrize("network", [attention, concatenation])
def test_functions_of_kernels_are_compiled_once(network):
    """Each as one, between two programs."""
    jax.clear_caches()
    COMPILED.clear()
    first = network(1.5)[2](X1, X2, "ntk")
    assert len(COMPILED) == 3
    again, other = network(1.5)[2](X1, X2, "ntk"), network(2.5)[2](X1, X2, "ntk")
    assert len(COMPILED) == 3
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_masks_are_compiled_together():
    """Those of all layers as one: however many layers there are."""
    n_compiled = []
    for depth in (1, 4):
        layers = [layer for _ in range(depth) for layer in (Conv(4, (3, 3), padding="SAME"), Relu())]
        _, _, kernel_fn = serial(*layers, GlobalAvgPool(), Dense(1))
        jax.clear_caches()
        COMPILED.clear()
        first = kernel_fn(X1, X2, "ntk", mask_constant=2.0)
        n_compiled.append(len(COMPILED))
        np.testing.assert_array_equal(kernel_fn(X1, X2, "ntk", mask_constant=2.0), first)
        kernel_fn(X1, X2, "ntk", mask_constant=3.0)
        assert len(COMPILED) == n_compiled[-1]
    assert n_compiled[0] == n_compiled[1] <= 8


def test_a_warm_call_neither_collects_nor_decides(monkeypatch):
    kernel_fn = resnet(1.5)[2]
    first = kernel_fn(X1, X2, "ntk")

    def never(*args):
        raise AssertionError("This was done before.")

    monkeypatch.setattr(program.Builder, "add", never)
    monkeypatch.setattr(CpuBackend, "refusal", never)
    np.testing.assert_array_equal(kernel_fn(X1, X2, "ntk"), first)
    with pytest.raises(AssertionError, match="done before"):
        kernel_fn(X1[:1], X2, "ntk")


def test_decisions_follow_the_environment(monkeypatch):
    kernel_fn = fcn(1.5)[2]
    chosen = []
    propagate = {name: backend.propagate for name, backend in backends._BACKENDS.items()}
    for name, backend in backends._BACKENDS.items():
        monkeypatch.setattr(
            backend, "propagate", lambda *args, name=name: (chosen.append(name), propagate[name](*args))[1]
        )
    jax.clear_caches()
    for value, expected in (("", "cpu"), ("xla", "xla"), ("mosaic_gpu, xla", "xla")):
        monkeypatch.setenv("NT_IMPLEMENTATION", value)
        kernel_fn(X1, None, "nngp")
        assert chosen[-1] == expected
    monkeypatch.setenv("NT_IMPLEMENTATION", "gpu")
    with pytest.raises(ValueError, match="Unknown implementation 'gpu'"):
        kernel_fn(X1, None, "nngp")
    with pytest.raises(ValueError, match="`implementation` is empty: name one of cpu, "):
        kernel_fn(X1, None, "nngp", implementation=())


def test_coefficients_may_be_traced_in_networks_built_within():
    """What is remembered of a network with traced coefficients goes with it."""

    def ntk(W_std):
        kernel_fn = fcn(W_std)[2]
        kernel_fn(X1, None, "ntk")
        return kernel_fn(X1, None, "ntk")[0, 1]

    with jax.checking_leaks():
        derivative = jax.jit(jax.grad(ntk))(1.5)
    difference = (ntk(1.51) - ntk(1.49)) / 0.02
    np.testing.assert_allclose(derivative, difference, rtol=1e-3)


@pytest.mark.parametrize(
    "nonlinearity, derivatives",
    [(Relu(), "native"), (Silu(), "native"), (Sin(), "native"), (HardSilu(), "by xla. There is no native")],
)
def test_explain_says_whose_derivatives(nonlinearity, derivatives):
    network = serial(Conv(4, (3,), padding="SAME"), nonlinearity, GlobalAvgPool())
    assert f"  derivatives: {derivatives}" in explain(network[2], (2, 5, 3))
    assert "derivatives" not in explain(network[2], (2, 5, 3), implementation="xla")
