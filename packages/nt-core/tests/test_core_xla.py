"""The xla backend: the conformance suite, and what is its own."""

import jax
import jax.numpy as jnp
import nt_core.evaluation.block as block
import nt_core.evaluation.planes as planes
import numpy as np
import pytest
from conformance import CHAINS, RELU, Conformance, chain, conv, inputs, masks, pool, run, spec_of
from nt_core import Builder, Inputs, Request, definition, propagate, steps
from nt_core.backends.xla import XlaBackend
from nt_core.evaluation.platform import traced_for
from nt_core.lowering import Repeated, fold_repeats, lower
from nt_core.lowering.primitives import Pool


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


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SMALL)
def test_planes_in_groups(name, x64, monkeypatch):
    """As a GPU computes them: many planes together, and window sums left to the compiler to fuse."""
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    monkeypatch.setattr(planes, "_NUMBERS_AT_ONCE", 2**9)
    space, layers = CHAINS[name]
    x1, x2 = inputs(space, 3, 2, "float64")
    program = chain(spec_of(x1, x2), layers)
    source = Inputs(jnp.asarray(x1), jnp.asarray(x2), program.sources[0])

    @jax.jit
    def kernel(source):
        with traced_for("gpu"):
            return XlaBackend().propagate(program, (source,), Request())

    (actual,) = kernel(source)
    TestXla().agree(actual, definition.propagate(program, (x1, x2)), 1e-12)
