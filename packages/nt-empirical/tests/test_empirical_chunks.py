"""Large samples that are differentiated in turn: the same kernels, in less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_functions import TABLE
from empirical_networks import assert_close
from jax.sharding import PartitionSpec
from nt_empirical import NtkImplementation, _chunks, _ntk, empirical_ntk_fn
from nt_empirical._equations import CALLS, closed, evaluated_channels_last

RNG = np.random.default_rng(0)
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
IMPLEMENTATIONS = [NtkImplementation.JACOBIAN_CONTRACTION, NtkImplementation.STRUCTURED_DERIVATIVES]


def cnn(params, x):
    for w in params["convolutions"]:
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST))
    return jnp.mean(x, (1, 2)) @ params["readout"]


def arguments(channels, size, n1=5, n2=3, outputs=2, dtype="float64"):
    """Returns parameters, and two batches of images."""

    def draw(*shape):
        return jnp.asarray(RNG.normal(size=shape), dtype)

    layers = [draw(3, 3, inputs, channels) for inputs in (2, channels)]
    params = {"convolutions": layers, "readout": draw(channels, outputs)}
    return params, draw(n1, size, size, 2), draw(n2, size, size, 2)


def loops(fn, *args):
    """Returns how many rounds each loop of a program has, also inside of functions that it calls."""

    def rounds(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["length"]
            elif equation.primitive.name in CALLS:
                yield from rounds(closed(equation.params[CALLS[equation.primitive.name]]).jaxpr)

    return list(rounds(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.fixture
def one_by_one(monkeypatch):
    """All samples are taken one by one."""
    monkeypatch.setattr(_chunks, "_samples_at_once", lambda of_one, of_two, n: 1)


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr(_chunks, "_samples_at_once", lambda of_one, of_two, n: 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_at_a_time(implementation, one_by_one, x64):
    params, x1, x2 = arguments(3, 5)
    ntk_fn = empirical_ntk_fn(cnn, vmap_axes=0, implementation=implementation)
    assert loops(ntk_fn, x1, x2, params) == [5, 3]
    assert loops(ntk_fn, x1, None, params) == [5]
    expected = empirical_ntk_fn(cnn)
    assert_close(jax.jit(ntk_fn)(x1, x2, params), expected(x1, x2, params), 1e-13)
    kernel = jax.jit(ntk_fn)(x1, None, params)
    assert_close(kernel, expected(x1, None, params), 1e-13)
    np.testing.assert_array_equal(kernel, kernel.T)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_that_do_not_divide(implementation, two_at_once, x64):
    """Samples, outputs and keywords along other axes; the last chunk is not full."""
    params, x1, x2 = arguments(3, 5)

    def f(params, x, factor, shared):
        return (cnn(params, jnp.moveaxis(x, -1, 0)) * factor[:, None] + shared).T

    ntk_fn = empirical_ntk_fn(f, (), vmap_axes=(-1, 1, {"factor": 0}), implementation=implementation)
    kwargs = {"factor": (jnp.arange(1.0, 6), jnp.arange(1.0, 4)), "shared": 2.0}
    x1, x2 = (jnp.moveaxis(x, 0, -1) for x in (x1, x2))
    assert loops(functools.partial(ntk_fn, **kwargs), x1, x2, params) == [3, 2]
    expected = empirical_ntk_fn(f, ())(x1, x2, params, **kwargs)
    assert_close(jax.jit(ntk_fn)(x1, x2, params, **kwargs), expected, 1e-13)


def test_small_samples_are_taken_at_once():
    params, x1, x2 = arguments(3, 5, dtype="float32")
    assert loops(empirical_ntk_fn(cnn, vmap_axes=0), x1, x2, params) == []


def test_large_results_are_taken_at_once():
    """Of dense layers the Jacobians are nearly all that is in memory, and a loop would copy them."""
    params, x = [jnp.ones((800, 800))] * 4, jnp.ones((4, 800))

    def f(params, x):
        return jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x), -1, keepdims=True)

    assert loops(empirical_ntk_fn(f, vmap_axes=0), x, None, params) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_of_large_images(implementation, monkeypatch):
    params, x, _ = arguments(64, 32, n1=8, outputs=10, dtype="float32")

    def compiled():
        ntk_fn = empirical_ntk_fn(cnn, vmap_axes=0, implementation=implementation)
        return jax.jit(ntk_fn).lower(x, None, params).compile()

    in_turn = compiled()
    monkeypatch.setattr(_ntk, "is_for_one_processor", lambda: False)
    at_once = compiled()
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (in_turn, at_once)]
    assert sizes[0] < sizes[1] / 2, sizes
    assert_close(in_turn(x, None, params), at_once(x, None, params), 1e-5)


def test_derivatives_of_kernels(one_by_one, x64):
    """Kernels by loops are differentiated, by parameters and by inputs, and mapped over networks."""
    params, x, _ = arguments(2, 4, n1=3)

    def total(ntk_fn, params, x):
        return jnp.sum(jnp.sin(ntk_fn(x, None, params)))

    for implementation in IMPLEMENTATIONS:
        in_turn = functools.partial(total, empirical_ntk_fn(cnn, vmap_axes=0, implementation=implementation))
        at_once = functools.partial(total, empirical_ntk_fn(cnn))
        assert loops(in_turn, params, x) == [3]
        gradients, expected = (jax.jit(jax.grad(fn, (0, 1)))(params, x) for fn in (in_turn, at_once))
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), gradients, expected)
        networks = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
        values, expected = (jax.jit(jax.vmap(fn, (0, None)))(networks, x) for fn in (in_turn, at_once))
        assert_close(values, expected, 1e-12)


def test_under_shard_map(one_by_one, x64):
    params, x1, x2 = arguments(3, 5)
    whole = PartitionSpec()
    for implementation in IMPLEMENTATIONS:
        ntk_fn = empirical_ntk_fn(cnn, vmap_axes=0, implementation=implementation)
        mesh = jax.make_mesh((1,), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = {"in_specs": (PartitionSpec("samples"), whole, whole), "out_specs": PartitionSpec("samples")}
        kernel = jax.jit(jax.shard_map(ntk_fn, mesh=mesh, **specs))(x1, x2, params)
        assert_close(kernel, empirical_ntk_fn(cnn)(x1, x2, params), 1e-13)


@pytest.mark.parametrize("implementation", [0, 1, 3])
def test_equation_by_equation_there_are_no_loops(implementation, one_by_one):
    """They would be compiled in each call."""
    params, x1, _ = arguments(3, 5, dtype="float32")
    ntk_fn = empirical_ntk_fn(cnn, vmap_axes=0, implementation=implementation)
    ntk_fn(x1, None, params)
    compilations = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ntk_fn(x1, None, params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations


def test_within_a_bound_samples_are_taken_at_once(one_by_one):
    """The Jacobians by all arrays would be in memory together, which the bound does not count."""
    params, x1, _ = arguments(3, 5, dtype="float32")
    unbounded, within = (empirical_ntk_fn(cnn, vmap_axes=0, max_bytes=bound) for bound in (None, 2**30))
    assert loops(jax.jit(unbounded), x1, None, params) == [5]
    assert loops(within, x1, None, params) == []


def test_batches_of_different_sizes_are_refused(one_by_one):
    params, x1, x2 = arguments(3, 5, dtype="float32")

    def f(params, x):
        return cnn(params, x["a"]) + cnn(params, x["b"])

    with pytest.raises(ValueError, match="inconsistent sizes"):
        jax.jit(empirical_ntk_fn(f, vmap_axes=0))({"a": x1, "b": x2}, None, params)


def test_convolutions_in_loops_of_the_network(x64):
    """They have the same layout, for they are slow in any other."""
    f, shape, of_sample = TABLE["loops"]["convolutions"]
    params, x = RNG.normal(size=shape), RNG.normal(size=(2, *of_sample))
    program = jax.make_jaxpr(jax.jacrev(f))(params, x)
    evaluate = jax.jit(lambda *leaves: evaluated_channels_last(program, leaves))
    assert_close(evaluate(params, x)[0], jax.jit(jax.jacrev(f))(params, x), 1e-13)
    layouts = re.findall(r"dim_labels=(\w+->\w+)|\b(\w+_\w+->\w+)\b", evaluate.lower(params, x).as_text("hlo"))
    assert {a or b for a, b in layouts} == {"b01f_01io->b01f"}


@pytest.mark.parametrize("name", list(TABLE["convolutions"]))
def test_convolutions_of_every_kind(name, x64):
    """In loops they have one layout, whatever that of the network is; so have those of its derivatives."""
    f, shapes, shape = TABLE["convolutions"][name]
    params = jax.tree.map(lambda s: RNG.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    x = RNG.normal(size=(2, *shape))

    def jacobians(params, x):
        return f(params, x), jax.jacrev(f, (0, 1))(params, x)

    program = jax.make_jaxpr(jacobians)(params, x)
    found = jax.jit(lambda *leaves: evaluated_channels_last(program, leaves))(*jax.tree.leaves((params, x)))
    for actual, expected in zip(found, jax.tree.leaves(jax.jit(jacobians)(params, x)), strict=True):
        assert_close(actual, expected, 1e-13)
