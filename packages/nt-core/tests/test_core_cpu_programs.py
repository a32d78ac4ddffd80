"""Programs drawn at random: the native engine against the xla backend in float64, and against the definitions."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import EVERYTHING, Conformance, inputs, run_all, spec_of
from hypothesis import strategies as st
from nt_core import Builder, Request, activations, definition, steps

pytestmark = pytest.mark.unoptimised

RELUS = [activations.ABRelu(0.0, 1.0), activations.ABRelu(-1.0, 0.5)]
SMOOTH = [
    activations.Erf(1.1, 0.8, 0.2),
    activations.Gelu(),
    activations.Sin(0.9, 1.1, 0.4),
    activations.Rbf(0.6),
    activations.Exp(0.8, 0.3),
    activations.ExpNormalized(0.7, -0.4),
    activations.Gaussian(0.9, -0.4),
    activations.Gabor(),
    activations.Polynomial((0.3, 0.9, 0.2)),
    activations.RectifiedMonomial(2),
    activations.ElementwiseNumerical(jnp.tanh, None, 10),  # several planes at once
]
settings = hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True)


@st.composite
def windows(draw, n_axes, beyond):
    """Window, strides and padding of a convolution or a pool; so many windows may lie beyond each end."""
    sizes = st.lists(st.integers(1, 3), min_size=n_axes, max_size=n_axes).map(tuple)
    window, strides = draw(sizes), draw(st.lists(st.integers(1, 2), min_size=n_axes, max_size=n_axes).map(tuple))
    pads = tuple(draw(st.tuples(st.integers(0, n - 1 + beyond), st.integers(0, n - 1 + beyond))) for n in window)
    return window, strides, draw(st.sampled_from(["SAME", "VALID", pads, "CIRCULAR"]))


@st.composite
def linear(draw, n_axes):
    b_var = draw(st.sampled_from([None, 0.0, 0.3]))
    kwargs = {"parameterization": draw(st.sampled_from(["ntk", "standard"]))}
    if draw(st.integers(0, 3)) == 0 or not n_axes:
        return steps.Dense(1.3, b_var, 8, **kwargs)
    window, strides, padding = draw(windows(n_axes, beyond=2))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(n_axes))
    return steps.Conv(1.6, b_var, 8, window, strides, padding, dilation, **kwargs)


@st.composite
def blocks(draw, builder, value, duals):
    """Appends a few layers, as far as they fit."""
    n_axes = len(value.spec.space)
    kind = draw(st.sampled_from(["plain", "plain", "residual", "product", "normalised", "pool", "copies"]))
    value = builder.add(draw(linear(n_axes)), value)
    if kind == "normalised":
        axes = tuple(a for a in range(n_axes) if draw(st.booleans()))
        value = builder.add(steps.Normalize(1e-2, axes), value)
    activated = builder.add(steps.Dual(draw(st.sampled_from(duals))), value)
    if kind == "residual":
        other = builder.add(steps.Dense(1.1, 0.1, 8), activated)
        return builder.add(steps.Combine((1.0, 0.5)), value, other)
    if kind == "product":
        return builder.add(steps.Multiply(), activated, builder.add(steps.Dense(0.9, 0.2, 8), activated))
    if kind == "pool" and n_axes:
        window, strides, padding = draw(windows(n_axes, beyond=0))  # of nothing there is no average
        mean, edges = draw(st.booleans()), draw(st.booleans())
        return builder.add(steps.Pool(window, strides, padding, mean, edges), activated)
    if kind == "copies" and n_axes:
        if draw(st.booleans()):
            value = builder.add(steps.Untie(value.spec.is_reversed), value)
        numbers = (st.lists(st.integers(-1, n - 1), min_size=1, max_size=5) for n in value.spec.space)
        return builder.add(steps.Gather(tuple(tuple(draw(positions)) for positions in numbers)), value)
    return activated


@st.composite
def of_samples(draw, builder, value, symmetric):
    """Appends a step that treats samples differently: a mask, or dropout."""
    if draw(st.booleans()):
        return builder.add(steps.Dropout(draw(st.sampled_from([0.4, 1.0]))), value)
    random = np.random.default_rng(draw(st.integers(0, 9)))
    first, second = (
        random.integers(0, 2, (n, *value.spec.space)).astype(float) for n in (value.spec.n1, value.spec.n2)
    )
    value = builder.add(steps.Scale(first, None if symmetric else second), value)
    if not value.spec.is_gaussian:
        return value
    return builder.add(steps.Normalize(0.1, (), 1 + first, None if symmetric else 1 + second), value)


@st.composite
def programs(draw, duals, n_axes, all_steps=False):
    """A program and a pair of batches for it; the second is None for the kernel of a batch with itself."""
    outputs = []
    space = tuple(draw(st.integers(1, 5)) for _ in range(n_axes))
    x1, x2 = inputs(
        space, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 17])), "float64", draw(st.integers(0, 9))
    )
    symmetric = draw(st.booleans())
    builder = Builder()
    value = builder.source(spec_of(x1, x1 if symmetric else x2))
    try:
        for _ in range(draw(st.integers(1, 3))):
            value = draw(blocks(builder, value, duals))
            if all_steps and draw(st.booleans()):
                value = draw(of_samples(builder, value, symmetric))
                outputs.append(value)
        readout = draw(st.sampled_from([None, steps.Flatten(), steps.GlobalPool(True), steps.GlobalPool(False)]))
        if readout is not None and n_axes:
            value = builder.add(readout, value)
    except ValueError as error:  # a window larger than the image
        hypothesis.assume("does not fit" not in str(error))
        raise
    return builder.build(*outputs, value), x1, None if symmetric else x2


def check_against_xla(program, x1, x2, dtype):
    with jax.enable_x64(True):
        expected = run_all(program, x1, x2, implementation="xla")
        if dtype == "float64":
            kernels, tolerance = run_all(program, x1, x2, EVERYTHING, "cpu"), 1e-11
    if dtype == "float32":
        x1, x2 = (None if x is None else x.astype(dtype) for x in (x1, x2))
        kernels, tolerance = run_all(program, x1, x2, EVERYTHING, "cpu"), 2e-5
    for kernel, expected_kernel in zip(kernels, expected, strict=True):
        for name in ("nngp", "ntk", "cov1", "cov2"):
            value, wanted = getattr(kernel, name), getattr(expected_kernel, name)
            if wanted is None:
                assert value is None
                continue
            assert value.dtype == dtype and value.shape == wanted.shape
            largest = max(np.abs(wanted).max(), 1e-3)  # what is 0 may be rounding in one of them
            np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@hypothesis.given(st.data())
@hypothesis.settings(settings, max_examples=6)
def test_programs_agree_with_xla(dtype, data):
    check_against_xla(*data.draw(programs(RELUS + SMOOTH, data.draw(st.integers(0, 3)), True)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@hypothesis.given(st.data())
@hypothesis.settings(settings, max_examples=150)
def test_many_programs_agree_with_xla(dtype, data):
    check_against_xla(*data.draw(programs(RELUS + SMOOTH, data.draw(st.integers(0, 3)), True)), dtype)


@hypothesis.given(st.data())
@hypothesis.settings(settings, max_examples=60)
def test_programs_agree_with_the_definitions(data):
    program, x1, x2 = data.draw(programs(RELUS, 2))
    with jax.enable_x64(True):
        kernel = run_all(program, x1, x2, EVERYTHING, "cpu")[0]
        expected = definition.propagate(program, (x1, x1 if x2 is None else x2))
        # The definitions carry correlations: for equal inputs they have half of the digits.
        Conformance().agree(kernel, expected, 1e-11 if x2 is not None else 1e-6)


@hypothesis.given(st.data())
@hypothesis.settings(settings, max_examples=40)
def test_what_is_not_asked_for_changes_nothing(data):
    program, x1, x2 = data.draw(programs(RELUS + SMOOTH, data.draw(st.integers(0, 3))))
    x1, x2 = (None if x is None else x.astype("float32") for x in (x1, x2))
    whole = run_all(program, x1, x2, EVERYTHING, "cpu")[0]
    alone = run_all(program, x1, x2, Request(ntk=False, covariances=False), "cpu")[0]
    assert alone.ntk is None and alone.cov1 is None and alone.cov2 is None
    np.testing.assert_allclose(alone.nngp, whole.nngp, rtol=0, atol=2e-6 * np.abs(whole.nngp).max())
