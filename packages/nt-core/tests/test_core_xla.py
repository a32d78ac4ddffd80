"""The xla backend: the conformance suite, and what is its own."""

import math

import jax
import nt_core.backends.xla.block as block
import pytest
from conformance import CHAINS, Conformance, chain, inputs, spec_of
from nt_core.steps import GlobalPool, Pool


class TestXla(Conformance):
    implementation = "xla"


def pools_a_small_image(name):
    space, layers = CHAINS[name]
    program = chain(spec_of(*inputs(space, 1, 1, "float32")), layers)
    pools = [node for node in program.nodes if isinstance(node.step, Pool | GlobalPool)]
    return any(math.prod(program.spec(pool.inputs[0]).space) < block._MIN_POSITIONS_FOR_PLANES for pool in pools)


@pytest.mark.parametrize("name", [n for n in CHAINS if pools_a_small_image(n) and n != "large image"])  # see "pool"
def test_planes(name, x64, monkeypatch):
    """Pooling on offset planes, which by default only larger images take."""
    jax.clear_caches()
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    TestXla().check_chain(name)
    jax.clear_caches()
