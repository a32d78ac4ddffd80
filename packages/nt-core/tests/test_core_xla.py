"""The xla backend: the conformance suite, and what is its own."""

import math

import jax
import jax.numpy as jnp
import nt_core.evaluation.block as block
import nt_core.evaluation.platform as platform
import numpy as np
import pytest
from conformance import CHAINS, RELU, Conformance, chain, conv, inputs, masks, pool, run, spec_of
from nt_core import Builder, Inputs, Request, definition, propagate, steps
from nt_core.backends.xla import XlaBackend
from nt_core.lowering import Repeated, fold_repeats, lower
from nt_core.lowering.primitives import Pool

PAIRS = Request(ntk=True, covariances=False)


class TestXla(Conformance):
    implementation = "xla"

    @pytest.mark.sample(6)
    @pytest.mark.parametrize("name", CHAINS)
    def test_chain(self, name, x64):
        self.check_chain(name)


SMALL = ["dilated", "circular strides", "pool", "normalised", "gather, circular", "gather, pool", "untie, pool"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SMALL)
def test_planes(name, x64, monkeypatch):
    """Pooling on offset planes, which by default only larger images take."""
    jax.clear_caches()
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    TestXla().check_chain(name)
    jax.clear_caches()


@pytest.mark.parametrize("same", [False, True])
def test_masked_layers_repeat(same, x64):
    """Layers with numbers of each sample are one loop too: masks, and normalisations that count what is not masked."""
    (x1, x2), (mask1, mask2) = inputs((3, 2), 3, 2, "float64"), masks((3, 2), 3, 2)
    if same:
        x2, mask2 = x1, None
    block = [
        conv(),
        steps.Scale(mask1, mask2),
        steps.Normalize(0.1, (0,), 2 * mask1, None if same else 2 * mask2),
        RELU,
    ]
    program = chain(spec_of(x1, x2), [*block * 4, steps.GlobalPool(True)])
    source = Inputs(jnp.asarray(x1), None if same else jnp.asarray(x2), program.sources[0])
    folded = fold_repeats(lower(program, (source,), ntk=True, covariances=True))
    assert [type(node.primitive) for node in folded.nodes] == [Repeated, Pool]
    kernel = run(program, x1, None if same else x2, implementation="xla")
    TestXla().agree(kernel, definition.propagate(program, (x1, x2)), 1e-7 if same else 1e-12)


def test_kernels_of_small_inputs_are_told_apart():
    """As `test_small_inputs_are_told_apart`, for a program that starts from kernels."""
    x1, x2 = inputs((4, 4), 2, 2, "float32")
    scale = np.float32(2.0**-43)
    layers = [conv(b_var=None), RELU, steps.GlobalPool(True)]
    first = chain(spec_of(x1, x2), layers[:1])
    ntk = []
    for c in (np.float32(1), scale):
        kernel = run(first, c * x1, c * x2)
        (out,) = propagate(chain(kernel.spec, layers[1:]), [kernel], implementation="xla")
        ntk.append(out.ntk / c**2)
    np.testing.assert_allclose(ntk[1], ntk[0], rtol=1e-6)


def test_one_equal_input_of_two_does_not_make_batches_equal(x64):
    """The second of two inputs differs: no deficit is known to be 0."""
    x1, x2 = inputs((4, 4), 2, 2, "float64")
    builder = Builder()
    sources = [builder.source(spec_of(x1, x1)), builder.source(spec_of(x1, x2))]
    total = builder.add(steps.Combine((1.0, 1.0)), *(builder.add(conv(), source) for source in sources))
    y = builder.add(RELU, builder.add(conv(), builder.add(pool(), builder.add(RELU, total))))
    program = builder.build(builder.add(steps.GlobalPool(True), y))

    def kernel(order):
        data = [Inputs(jnp.asarray(x1), jnp.array(x1), sources[0].spec), Inputs(jnp.asarray(x1), x2, sources[1].spec)]
        (out,) = propagate(program, [data[i] for i in order], implementation="xla")
        return out.nngp

    np.testing.assert_allclose(kernel((0, 1)), kernel((1, 0)), rtol=1e-12)


GROUPED = {name: CHAINS[name] for name in SMALL} | {
    "prime": ((7, 5), [conv(), RELU, pool((3, 3), (2, 2), "SAME"), conv(), RELU, steps.Flatten()]),
    "prime, global": ((7, 5), [conv(), RELU, steps.GlobalPool(True)]),
}


def traced_for_gpu(program, source, request):
    """The xla backend's program for a GPU, which runs on CPUs too."""
    with platform.traced_for("gpu"):
        (kernel,) = XlaBackend().propagate(program, (source,), request)
    return kernel


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", GROUPED)
def test_planes_in_groups(name, x64, monkeypatch):
    """As a GPU computes them: many planes together, and window sums left to the compiler to fuse."""
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    monkeypatch.setattr(platform, "NUMBERS_ON_GPU", 2**10)
    space, layers = GROUPED[name]
    x1, x2 = inputs(space, 3, 2, "float64")
    program = chain(spec_of(x1, x2), layers)
    source = Inputs(jnp.asarray(x1), jnp.asarray(x2), program.sources[0])
    actual = jax.jit(lambda source: traced_for_gpu(program, source, Request()))(source)
    TestXla().agree(actual, definition.propagate(program, (x1, x2)), 1e-12)


def test_derivatives_of_planes_in_groups(x64, monkeypatch):
    monkeypatch.setattr(platform, "NUMBERS_ON_GPU", 2**10)
    x1, x2 = inputs((6, 6), 2, 2, "float64")
    program = chain(spec_of(x1, x2), [conv(), RELU, pool(), conv(), RELU, steps.GlobalPool(True)])

    def gradient(kernel):
        def total(x1):
            return jnp.sum(kernel(Inputs(x1, jnp.asarray(x2), program.sources[0])).ntk)

        return jax.jit(jax.grad(total))(jnp.asarray(x1))

    grouped = gradient(lambda source: traced_for_gpu(program, source, PAIRS))
    expected = gradient(lambda source: propagate(program, [source], PAIRS, "xla")[0])
    np.testing.assert_allclose(grouped, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("size, strides", [(31, (1, 1)), (32, (2, 2))])
def test_groups_of_planes_are_as_large_as_they_may_be(size, strides):
    """Also if their number has no fitting divisor, and with strides, where planes are larger before than after."""
    x = jax.ShapeDtypeStruct((16, size, size, 3), jnp.float32)
    program = chain(spec_of(x, x), [*[conv(strides=strides), RELU] * 2, steps.GlobalPool(True)])
    source = Inputs(x, x, program.sources[0])
    traced = jax.make_jaxpr(lambda source: traced_for_gpu(program, source, PAIRS))(source)
    assert platform.NUMBERS_ON_GPU / 4 < max(sizes(traced.jaxpr)) <= platform.NUMBERS_ON_GPU


def sizes(jaxpr):
    """Of all arrays, within loops too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(x.aval.shape) for x in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from sizes(getattr(inner, "jaxpr", inner))
