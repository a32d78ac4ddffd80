"""The implementations of the NTK give the same kernels, in the same layouts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import (
    TOLERANCE,
    assert_close,
    mlp,
    mlp_kernels,
    mlp_params,
    operations,
    quickly_compiled,
    reduce,
)
from nt_empirical import NtkImplementation, _perturbation, empirical_kernel_fn, empirical_ntk_fn, explain_ntk
from nt_empirical._auto import cheapest
from nt_empirical._cost import Cost, cost_of

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(4, 5, 6)), RNG.normal(size=(3, 5, 6))
LAYOUTS = [((), ()), ((2,), ()), ((1, 2), ()), ((2,), (1,)), ((1,), (2,)), ((), (1, 2)), ((0,), (2,)), ((2,), (0, 1))]
IMPLEMENTATIONS = list(NtkImplementation)


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kernels_are_those_by_hand(implementation, dtype, capsys):
    """In all layouts; without a second batch they are exactly symmetric. Nothing is printed."""
    params = mlp_params(6, 2, dtype=dtype)
    x1, x2 = jnp.asarray(X1[:3], dtype), jnp.asarray(X2, dtype)

    def kernels(params, x1, x2):
        return [
            empirical_ntk_fn(mlp, *axes, vmap_axes=0, implementation=implementation)(x1, x2, params) for axes in LAYOUTS
        ]

    full = mlp_kernels(params, x1, x2)[1]
    for actual, axes in zip(quickly_compiled(kernels)(params, x1, x2), LAYOUTS, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, reduce(full, *axes), TOLERANCE[dtype])
    everything, traced = quickly_compiled(lambda p, x: kernels(p, x, None)[:2])(params, x1)
    np.testing.assert_array_equal(everything, everything.transpose(1, 0, 3, 2, 5, 4))
    np.testing.assert_array_equal(traced, traced.transpose(1, 0, 3, 2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vmap_axes", [None, 0])
def test_batches_of_many_and_of_no_samples(vmap_axes, implementation):
    """More columns than are computed at once."""
    params, x = mlp_params(6, 2, dtype="float32"), RNG.normal(size=(41, 6)).astype("float32")
    ntk_fn = jax.jit(empirical_ntk_fn(mlp, vmap_axes=vmap_axes, implementation=implementation))
    assert_close(ntk_fn(x[:3], x, params), reduce(mlp_kernels(params, x[:3], x)[1], (-1,), ()), TOLERANCE["float32"])
    assert ntk_fn(x[:0], x[:2], params).shape == (0, 2)
    assert ntk_fn(x[:2], x[:0], params).shape == (2, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_named_kernels_and_derivatives(implementation, x64):
    """`empirical_kernel_fn` takes implementations too; kernels can be differentiated and mapped over."""
    params, x1, x2 = mlp_params(6, 2), X1[:, 0], X2[:, 0]
    kernel_fn = empirical_kernel_fn(mlp, implementation=implementation)

    def total(x):
        return jnp.sum(kernel_fn(x, x2, ("ntk",), params).ntk ** 2)

    direction = RNG.normal(size=x1.shape)
    values, slope = quickly_compiled(jax.vmap(jax.value_and_grad(total)))(
        np.stack([x1, x1 + 1e-6 * direction, x1 - 1e-6 * direction])
    )
    assert values[0] == pytest.approx(np.sum(reduce(mlp_kernels(params, x1, x2)[1], (-1,), ()) ** 2), rel=1e-12)
    assert np.sum(slope[0] * direction) == pytest.approx(float(values[1] - values[2]) / 2e-6, rel=1e-7)


@pytest.mark.parametrize(
    "derivative",
    [
        pytest.param(lambda z, c: jnp.clip(c, -0.1, 0.1), id="clipped"),
        pytest.param(lambda z, c: jnp.where(z > 0, c, 0.5), id="with an offset"),
        pytest.param(lambda z, c: jnp.maximum(z, 0.0), id="the same for all outputs"),
        pytest.param(lambda z, c: jnp.where(z > 0, c / jnp.maximum(z, 0.0), 0.0), id="infinite elsewhere"),
    ],
)
def test_structure_of_derivatives_that_are_not_linear(derivative, x64):
    """Functions may say what their derivative is; it counts for each number of the outputs."""
    activation = jax.custom_vjp(lambda z: jnp.maximum(z, 0.0))
    activation.defvjp(lambda z: (jnp.maximum(z, 0.0), z), lambda z, c: (derivative(z, c),))

    def f(w, x):
        return jnp.mean(activation(x @ w[0]), 1) @ w[1]

    w, x = [RNG.normal(size=(6, 4)), RNG.normal(size=(4, 3))], RNG.normal(size=(4, 5, 6))
    by_jacobians, by_structure = (
        empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=implementation)(x, None, w)
        for implementation in (NtkImplementation.JACOBIAN_CONTRACTION, NtkImplementation.STRUCTURED_DERIVATIVES)
    )
    assert_close(by_structure, by_jacobians, 1e-11)


def test_no_double_precision_for_single(x64):
    """Where networks are in single precision nothing is in double, also where the output is a parameter's axis."""
    w, x = [jnp.ones((3, 4), "float32"), jnp.ones(4, "float32")], jnp.ones((2, 3), "float32")
    ntk_fn = empirical_ntk_fn(
        lambda w, x: x @ w[0] + jnp.expand_dims(w[1], 0),
        vmap_axes=0,
        implementation=NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    program = jax.make_jaxpr(ntk_fn)(x, x, w)
    assert all(var.aval.dtype != "float64" for equation in program.eqns for var in equation.outvars)


def test_many_layers_are_traced_in_proportion():
    """Factors of what is behind many layers of positions are few."""

    def equations(layers):
        def f(w, x):
            return jnp.mean(functools.reduce(lambda x, w: jax.nn.relu(x @ w), w[:-1], x), 1) @ w[-1]

        w, x = [jnp.ones((8, 8))] * layers + [jnp.ones((8, 300))], jnp.ones((2, 16, 8))
        ntk_fn = empirical_ntk_fn(f, vmap_axes=0, implementation=NtkImplementation.STRUCTURED_DERIVATIVES)
        return len(jax.make_jaxpr(ntk_fn)(x, None, w).eqns)

    assert equations(24) - equations(16) <= 1.1 * (equations(16) - equations(8))


def test_what_outputs_share_is_not_multiplied_out():
    """Of a mean over positions with a readout of many outputs no array has positions, channels and outputs."""

    def f(w, x):
        return jnp.mean(jax.nn.relu(x @ w[0]), 1) @ w[1]

    w, x = [jnp.ones((3, 16)), jnp.ones((16, 50))], jnp.ones((2, 40, 3))
    ntk_fn = empirical_ntk_fn(f, vmap_axes=0, implementation=NtkImplementation.STRUCTURED_DERIVATIVES)
    program = jax.make_jaxpr(ntk_fn)(x, x, w)
    assert max(math.prod(var.aval.shape) for equation in program.eqns for var in equation.outvars) < 40 * 16 * 50


def test_explanation():
    """It names what is chosen, computes nothing, and takes what comes from `empirical_ntk_fn` alone."""
    params, x = mlp_params(6, 2, dtype="float32"), RNG.normal(size=(3, 6)).astype("float32")
    text = explain_ntk(empirical_ntk_fn(mlp, vmap_axes=0), x, x, params)
    for name in list(NtkImplementation)[1:]:
        assert f"{name.name}: " in text
    assert text.splitlines()[-1] == "AUTO takes STRUCTURED_DERIVATIVES."
    assert explain_ntk(empirical_ntk_fn(mlp, scale=0.0), x, None, params) == "No parameters count: the kernel is 0."
    for other in (mlp, empirical_ntk_fn(mlp, vmap_axes=0, max_bytes=10**9)):
        with pytest.raises(TypeError, match="must come from `empirical_ntk_fn`, without `max_bytes`"):
            explain_ntk(other, x, x, params)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_complex_numbers_are_refused(implementation):
    x = jnp.ones((4, 6))
    ntk_fn = empirical_ntk_fn(lambda w, x: x @ w * (1 + 2j), implementation=implementation)
    with pytest.raises(TypeError, match="real floating-point arrays, got dtype complex64"):
        ntk_fn(x, None, jnp.ones((6, 2)))
    with pytest.raises(TypeError, match="real floating-point arrays, got complex64 in params"):
        ntk_fn(x, None, jnp.ones((6, 2), "complex64"))


# Structured derivatives: what is not computed


def operations_of(implementation, f, params, x):
    """Returns the operations of a kernel of 8 samples."""
    return operations(empirical_ntk_fn(f, vmap_axes=0, implementation=implementation), x, None, params)


def image_network(params, x):
    for w in params[:-1]:
        x = jnp.tanh(jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return jnp.mean(x, (1, 2)) @ params[-1]


STRUCTURED = {
    "dense": (mlp, mlp_params(64, 10, width=128, dtype="float32"), (8, 64)),
    "scaled": (
        lambda p, x: jnp.tanh(x @ (p[0] / 8.0)) @ (p[1] / np.sqrt(128.0, dtype="float32")),
        [jnp.ones((64, 128)), jnp.ones((128, 10))],
        (8, 64),
    ),
    "convolutions": (
        image_network,
        [jnp.ones((3, 3, 3, 16)), jnp.ones((3, 3, 16, 32)), jnp.ones((3, 3, 32, 64)), jnp.ones((64, 10))],
        (8, 8, 8, 3),
    ),
    "embedding": (
        lambda p, x: jnp.mean(p[0][x.astype(int)], 1) @ p[1],
        [jnp.ones((1000, 16)), jnp.ones((16, 4))],
        (8, 5),
    ),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_derivatives_take_less(name):
    """The Jacobians of these have many more entries than what they are products of."""
    f, params, shape = STRUCTURED[name]
    structured, jacobians = (
        operations_of(implementation, f, params, jnp.ones(shape))
        for implementation in (NtkImplementation.STRUCTURED_DERIVATIVES, NtkImplementation.JACOBIAN_CONTRACTION)
    )
    assert structured < jacobians / 4


# AUTO


def program(f, *shapes):
    return jax.make_jaxpr(f)(*map(jnp.ones, shapes)).jaxpr


def test_cost_of_programs():
    """Two operations for each term of a product, 64 for each entry of anything else; memory as equations need it.

    Products copy their factors.
    """
    product = program(lambda a, b: a @ b, (8, 32), (32, 4))
    assert cost_of(product) == Cost(2 * 8 * 32 * 4, 4 * (2 * 8 * 32 + 2 * 32 * 4 + 8 * 4))
    assert cost_of(program(lambda a: jnp.sin(jnp.sin(jnp.sin(a))), (100,))) == Cost(3 * 64 * 100, 3 * 400)
    assert cost_of(program(lambda a: (jnp.sin(a), jnp.sin(a), jnp.sin(a)), (100,))).peak_bytes == 4 * 400

    # Sums of large arrays, each where it is asked for; and what no result depends on.
    sums = program(lambda a: [jnp.sum(b) for b in [jnp.sin(a), jnp.cos(a), jnp.tan(a)]], (100,))
    assert cost_of(sums).peak_bytes == 2 * 400 + 3 * 4
    assert cost_of(program(lambda a: (jnp.sin(a), jnp.sum(a))[1], (100,))) == Cost(64 * 101, 400 + 4)

    def convolution(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")

    assert cost_of(program(convolution, (2, 8, 5, 5), (4, 8, 3, 3))).operations == 2 * 72 * (2 * 4 * 5 * 5)

    def loop(a):
        return jax.lax.scan(lambda h, _: (h @ a, None), a, None, length=7)[0]

    assert cost_of(program(loop, (40, 40))).operations == 7 * 2 * 64000


def test_auto_takes_the_cheapest_that_fits(monkeypatch):
    def large(w):
        return jnp.sum(jnp.sin(jnp.expand_dims(w, 0) * jnp.expand_dims(w, 1)))

    def small(w):
        return jnp.sum(jax.lax.map(lambda v: jnp.sum(jnp.cos(jnp.sin(v * w))), w))

    w = jnp.linspace(0.0, 1.0, 100)
    assert cheapest([large, small], w) == large(w)
    assert cheapest([small, large], w) == large(w)
    monkeypatch.setattr("nt_empirical._auto.MEMORY", 20_000)
    assert cheapest([large, small], w) == small(w)
    monkeypatch.setattr("nt_empirical._auto.MEMORY", 1)
    assert cheapest([large, small], w) == small(w)


@pytest.mark.parametrize("name", ["dense", "embedding"])
def test_auto_is_one_of_the_others(name):
    f, params, shape = STRUCTURED[name]
    counts = {i: operations_of(i, f, params, jnp.ones(shape)) for i in NtkImplementation}
    assert counts[NtkImplementation.AUTO] == counts[NtkImplementation.STRUCTURED_DERIVATIVES]


@pytest.mark.parametrize("unrolled", [False, True])
def test_loops_and_branches_keep_their_structure(unrolled):
    """Layers that are stacked in a scan cost what they cost one by one, a small part of their Jacobians."""

    def layer(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: jnp.tanh(x @ w), lambda: x @ w), None

    def f(params, x):
        if unrolled:
            return functools.reduce(lambda x, w: layer(x, w)[0], params, x)
        return jax.lax.scan(layer, x, params)[0]

    costs = empirical_ntk_fn(f, vmap_axes=0).costs(jnp.ones((8, 64)), None, jnp.ones((3, 64, 64)))
    structured = costs[NtkImplementation.STRUCTURED_DERIVATIVES]
    jacobians = costs[NtkImplementation.JACOBIAN_CONTRACTION]
    assert structured.operations < jacobians.operations / 4
    assert structured.peak_bytes < jacobians.peak_bytes / 10


def test_nested_loops_are_traced_in_proportion(monkeypatch):
    """What is inside of each level is looked at a fixed number of times, and not twice for each level around it."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    def nested(depth):
        if not depth:
            return layer
        inside = nested(depth - 1)

        def loop(x, w):
            return jax.lax.scan(lambda h, i: (jax.lax.cond(i > 0, inside, layer, h, w), None), x, jnp.arange(2))[0]

        return loop

    evaluated = []

    def count(equation, *args):
        evaluated.append(equation)
        return original(equation, *args)

    original = _perturbation.evaluated
    monkeypatch.setattr(_perturbation, "evaluated", count)

    def equations(depth):
        evaluated.clear()
        network = nested(depth)
        ntk_fn = empirical_ntk_fn(lambda w, x: network(x, w), vmap_axes=0, implementation=3)
        jax.make_jaxpr(ntk_fn)(jnp.ones((2, 3)), None, jnp.ones((3, 3)))
        return len(evaluated)

    assert equations(6) < 3 * equations(3)
